// Vectors as wide as the registers of a SIMD level, and 2^x on them.
//
// Everything here is compiled once for each SIMD level, into that level's own namespace. The linker can therefore never replace a
// function for an older CPU by the same function compiled for AVX-512. For the same reason the code of a level uses no template
// of the standard library. The vectors are those of GCC and Clang: the compilers provide the operators, and a scalar operand is
// broadcast.
#pragma once

#include <cstdint>
#include <cstring>

namespace clop::cpu {
namespace CLOP_LEVEL {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

template <class T>
struct VectorOf {
  typedef T type __attribute__((vector_size(kVectorBytes)));
};

template <class T>
using Vec = typename VectorOf<T>::type;

template <class T>
constexpr int kLanes = kVectorBytes / sizeof(T);

template <class T>
struct IntegerOf;
template <>
struct IntegerOf<float> {
  using type = int32_t;
  using unsigned_type = uint32_t;
};
template <>
struct IntegerOf<double> {
  using type = int64_t;
  using unsigned_type = uint64_t;
};

// Integers as wide as T. A comparison of two Vec<T> gives a vector of them, with -1 for true.
template <class T>
using Int = typename IntegerOf<T>::type;
template <class T>
using Unsigned = typename IntegerOf<T>::unsigned_type;

template <class T>
inline Vec<T> load(const T* from) {
  Vec<T> v;
  std::memcpy(&v, from, sizeof v);
  return v;
}

template <class T>
inline void store(T* to, Vec<T> v) {
  std::memcpy(to, &v, sizeof v);
}

template <class T>
inline Vec<T> broadcast(T x) {
  return x - Vec<T>{};  // x + 0 would remain an addition, because it changes -0
}

// 0, 1, 2, ... in the lanes.
template <class T>
inline Vec<Int<T>> lane_numbers() {
  Vec<Int<T>> v;
  for (int lane = 0; lane < kLanes<T>; ++lane) v[lane] = lane;
  return v;
}

template <class T>
inline T sum_of_lanes(Vec<T> v) {
  T sum = 0;
  for (int lane = 0; lane < kLanes<T>; ++lane) sum += v[lane];
  return sum;
}

// A NaN in either operand is returned: the maximum of a row that holds a NaN must show it.
template <class T>
inline Vec<T> maximum(Vec<T> a, Vec<T> b) {
  return (a < b) | (b != b) ? b : a;
}

template <class T>
inline Vec<T> absolute(Vec<T> v) {
  return v < 0 ? -v : v;
}

// 2^x = 2^n 2^f with n the nearest integer and |f| <= 1/2. Adding 1.5 * 2^(mantissa bits) leaves n in the low bits of the sum; a
// shift moves it from there onto the exponent. 2^f is a polynomial, the Chebyshev interpolant on [-1/2, 1/2]. Its own error is
// below a tenth of the rounding error.
template <class T>
struct Exp2;

template <>
struct Exp2<float> {
  static constexpr int kMantissaBits = 23;
  static constexpr float kSmallest = -126.0f;
  static constexpr int kDegree = 6;
  static constexpr float kCoefficients[kDegree + 1] = {1.0f,         0.6931472f,    0.2402265f,    0.05550327f,
                                                       0.009618057f, 0.0013400428f, 0.00015461445f};
};

template <>
struct Exp2<double> {
  static constexpr int kMantissaBits = 52;
  static constexpr double kSmallest = -1022.0;
  static constexpr int kDegree = 11;
  // clang-format off
  static constexpr double kCoefficients[kDegree + 1] = {
      1.0, 0.6931471805599453, 0.24022650695910158, 0.055504108664821625, 0.009618129107587256,
      0.001333355814640647, 0.00015403530463724353, 1.5252733841556773e-05, 1.3215432535912375e-06,
      1.0178057087733941e-07, 7.074194297288521e-09, 4.4558179083360645e-10};
  // clang-format on
};

// 2^x to 1 ulp, or to 1.5 ulp without a fused multiply-add (a test in tests/cpu/ measures it over the range). The result must be
// a normal number: -126 <= x < 127.5 in float, -1022 <= x < 1023.5 in double. A NaN stays a NaN.
template <class T>
inline Vec<T> exp2(Vec<T> x) {
  using E = Exp2<T>;
  const T magic = T(1.5) * T(int64_t(1) << E::kMantissaBits);
  const Vec<T> shifted = x + magic;
  const Vec<T> f = x - (shifted - magic);
  Vec<T> power = broadcast<T>(E::kCoefficients[E::kDegree]);
#pragma GCC unroll 16
  for (int k = E::kDegree - 1; k >= 0; --k) power = power * f + E::kCoefficients[k];
  // Unsigned, because x may be anything for pairs that a mask later removes, and signed integers must not overflow.
  return (Vec<T>)((Vec<Unsigned<T>>)power + ((Vec<Unsigned<T>>)shifted << E::kMantissaBits));
}

// The same for x that may be far below the range: the result is 0 if it would not be a normal number.
template <class T>
inline Vec<T> exp2_or_zero(Vec<T> x) {
  const Vec<T> smallest = broadcast<T>(Exp2<T>::kSmallest);
  const auto underflows = x < smallest;
  return underflows ? Vec<T>{} : exp2<T>(underflows ? smallest : x);
}

}  // namespace CLOP_LEVEL
}  // namespace clop::cpu
