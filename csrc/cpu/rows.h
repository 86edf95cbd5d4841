// The work that is done row by row, O(N D): reading and normalising embeddings, distances to prototypes, and storing gradients.
#pragma once

#include "../common/constants.h"
#include "../common/positions.h"
#include "loss.h"
#include "parallel.h"
#include "simd.h"

namespace clop::cpu {
namespace CLOP_LEVEL {

// ---- dtypes ----------------------------------------------------------------------------------------------------------

inline uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

inline float float_of(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

inline float from_bfloat16(uint16_t half) { return float_of(uint32_t(half) << 16); }

inline uint16_t to_bfloat16(float x) {
  const uint32_t bits = bits_of(x);
  if (x != x) return uint16_t(bits >> 16 | 0x40);             // keeps a NaN a NaN when its low bits are dropped
  return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);  // to nearest, ties to even
}

inline float from_float16(uint16_t half) {
  const uint32_t magnitude = half & 0x7fff, sign = uint32_t(half & 0x8000) << 16;
  if (magnitude >= 0x7c00) return float_of(sign | 0x7f800000 | magnitude << 13);         // infinite, NaN
  if (magnitude < 0x0400) return float_of(sign | bits_of(float(magnitude) * 0x1p-24f));  // subnormal
  return float_of(sign | ((magnitude << 13) + (uint32_t(127 - 15) << 23)));
}

inline uint16_t to_float16(float x) {
  const uint32_t bits = bits_of(x), sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000) return uint16_t(sign | 0x7e00);   // NaN
  if (magnitude >= 0x477ff000) return uint16_t(sign | 0x7c00);  // 65520 and above round to infinity
  if (magnitude < 0x38800000)  // subnormal: a unit in the last place of 1/2 is 2^-24, so the addition rounds to those
    return uint16_t(sign | (bits_of(float_of(magnitude) + 0.5f) - bits_of(0.5f)));
  return uint16_t(sign | (magnitude - (uint32_t(127 - 15) << 23) + 0xfff + (magnitude >> 13 & 1)) >> 13);
}

template <class T>
void read_row(Dtype dtype, const void* base, int64_t offset, int64_t stride, int64_t width, T* row) {
  switch (dtype) {
    case Dtype::float64:
      for (int64_t k = 0; k < width; ++k) row[k] = T(static_cast<const double*>(base)[offset + k * stride]);
      break;
    case Dtype::float32:
      for (int64_t k = 0; k < width; ++k) row[k] = T(static_cast<const float*>(base)[offset + k * stride]);
      break;
    case Dtype::float16:
      for (int64_t k = 0; k < width; ++k) row[k] = T(from_float16(static_cast<const uint16_t*>(base)[offset + k * stride]));
      break;
    case Dtype::bfloat16:
      for (int64_t k = 0; k < width; ++k) row[k] = T(from_bfloat16(static_cast<const uint16_t*>(base)[offset + k * stride]));
      break;
  }
}

template <class T>
void write_row(Dtype dtype, void* base, int64_t offset, int64_t width, const T* row) {
  switch (dtype) {
    case Dtype::float64:
      for (int64_t k = 0; k < width; ++k) static_cast<double*>(base)[offset + k] = double(row[k]);
      break;
    case Dtype::float32:
      for (int64_t k = 0; k < width; ++k) static_cast<float*>(base)[offset + k] = float(row[k]);
      break;
    case Dtype::float16:
      for (int64_t k = 0; k < width; ++k) static_cast<uint16_t*>(base)[offset + k] = to_float16(float(row[k]));
      break;
    case Dtype::bfloat16:
      for (int64_t k = 0; k < width; ++k) static_cast<uint16_t*>(base)[offset + k] = to_bfloat16(float(row[k]));
      break;
  }
}

template <class T>
constexpr Dtype kDtypeOf = sizeof(T) == 8 ? Dtype::float64 : Dtype::float32;

// ---- memory and loops ------------------------------------------------------------------------------------------------

// Working memory of one call. Its contents are undefined at first.
template <class T>
class Buffer {
 public:
  explicit Buffer(int64_t size = 0) : data_(size > 0 ? static_cast<T*>(allocate(size * sizeof(T))) : nullptr) {}
  ~Buffer() { release(data_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  operator T*() { return data_; }

 private:
  T* data_;
};

// for_ranges calls f(begin, end, part) on equal parts of [0, n), each the work of one thread. `cost` is the number of flops of an
// item. There are only as many parts as have at least kFlopsWorthAThread flops each.
constexpr double kFlopsWorthAThread = 1e6;

inline int threads_for(double flops, int n_threads) {
  const double worth = flops / kFlopsWorthAThread;
  return worth < 1 ? 1 : worth < n_threads ? int(worth) : n_threads;
}

template <class F>
void for_each_thread(int n_threads, F&& f) {
  run_parallel(n_threads, [](void* context, int thread) { (*static_cast<decltype(&f)>(context))(thread); }, &f);
}

template <class F>
void for_ranges(int64_t n, double cost, int n_threads, F&& f) {
  const int64_t parts = threads_for(cost * n, n_threads);
  for_each_thread(parts, [&](int part) { f(n * part / parts, n * (part + 1) / parts, part); });
}

// ---- rows ------------------------------------------------------------------------------------------------------------

template <class T>
T dot(int64_t width, const T* a, const T* b) {
  Vec<T> sum{};
  int64_t k = 0;
  for (; k + kLanes<T> <= width; k += kLanes<T>) sum += load(a + k) * load(b + k);
  T rest = 0;
  for (; k < width; ++k) rest += a[k] * b[k];
  return sum_of_lanes<T>(sum) + rest;
}

// The magnitude of the largest entry, or NaN if the row holds one.
inline double largest_entry(int64_t width, const double* row) {
  double largest = 0;
  for (int64_t k = 0; k < width; ++k) {
    const double magnitude = row[k] < 0 ? -row[k] : row[k];
    if (!(magnitude <= largest)) largest = magnitude;
    if (largest != largest) break;
  }
  return largest;
}

// The squares of a float row are summed in double, where none overflows.
inline double norm_of(int64_t width, const float* row) {
  constexpr int kSums = 8;
  double sum[kSums] = {};
  int64_t k = 0;
  for (; k + kSums <= width; k += kSums)
    for (int lane = 0; lane < kSums; ++lane) sum[lane] += double(row[k + lane]) * double(row[k + lane]);
  for (; k < width; ++k) sum[0] += double(row[k]) * double(row[k]);
  for (int lane = 1; lane < kSums; ++lane) sum[0] += sum[lane];
  return __builtin_sqrt(sum[0]);
}

inline double norm_of(int64_t width, const double* row) { return __builtin_sqrt(dot(width, row, row)); }

// Replaces a row by row / max(|row|, kEps<double>) and returns |row|. The quotient of a float is rounded once: a rounded norm
// would put an error of one sign into all similarities of the row.
inline float normalize(int64_t width, float* row) {
  const double norm = norm_of(width, row), scale = 1 / (norm < kEps<double> ? kEps<double> : norm);
  for (int64_t k = 0; k < width; ++k) row[k] = float(row[k] * scale);
  return float(norm);
}

// A double row is first scaled by its largest entry, so that any finite row has a finite direction.
inline double normalize(int64_t width, double* row) {
  double largest = largest_entry(width, row);
  if (largest < kEps<double>) largest = kEps<double>;
  for (int64_t k = 0; k < width; ++k) row[k] /= largest;
  const double norm = norm_of(width, row);
  const double floor = kEps<double> / largest, divisor = norm < floor ? floor : norm;
  for (int64_t k = 0; k < width; ++k) row[k] /= divisor;
  return norm * largest;
}

// The distance from zhat to its prototype.
template <class T>
T distance_to(Distance distance, int64_t width, const T* zhat, const T* target) {
  if (distance == Distance::cosine) return 1 - dot(width, zhat, target);
  T sum = 0;
  for (int64_t k = 0; k < width; ++k) {
    const T offset = zhat[k] - target[k];
    sum += distance == Distance::euclidean ? offset * offset : offset < 0 ? -offset : offset;
  }
  return distance == Distance::euclidean ? T(__builtin_sqrt(sum)) : sum;
}

// Entry k of d distance / d zhat, for a row at distance `length` from its prototype; zero if the row lies on its prototype.
template <class T>
T distance_gradient(Distance distance, T length, T zhat, T target) {
  if (distance == Distance::cosine) return -target;
  const T offset = zhat - target;
  if (distance == Distance::euclidean) return length > 0 ? offset / length : offset;
  return offset > 0 ? T(1) : offset < 0 ? T(-1) : offset;
}

}  // namespace CLOP_LEVEL
}  // namespace clop::cpu
