// The prologue: one pass over the raw embeddings that leaves unit rows in the order of the positive groups. Its Triton
// counterpart is clop_kernels/backends/triton/prologue.py.
//
// For every row it computes three things: zhat = z / max(|z|, kEps<float>) (or z itself, if unnormalised), rounded to the compute
// dtype; the norm |z|; and the distance of zhat to the prototype of its label. The distance takes zhat as rounded, as all later
// products do.
//
// Tile picture: a team of kThreads = 8, 32 or 256 neighbouring threads takes a row. Thread t takes the chunks t, t + kThreads,
// t + 2 kThreads, ... of 16 bytes of input:
//
//     row:      | chunk 0 | chunk 1 |  ...  | chunk kThreads-1 | chunk kThreads |  ...  | rest
//     thread:        0         1                kThreads-1            0                        the first kHeld stay in registers
//
// A chunk is one load if rows are aligned and consist of whole chunks; otherwise every number is a load. Rows of zhat are aligned
// whatever D is, so a chunk of zhat is one store, except for the rest of a row that is not a whole number of chunks.
//
// The launcher gives a row the smallest team whose registers hold it, so that the row is read once. Chunks beyond the registers
// of 256 threads are read three times, two of them from cache. Sums are added in one order, so the bits are the same from run to
// run. Bytes: N D of input and N D of zhat; a row's prototype comes from cache. Flops: O(N D).
#pragma once

#include "numbers.cuh"

namespace clop::cuda {

constexpr int kHeld = 2;  // chunks that a thread keeps in registers
template <class In>
constexpr int kVecOf = 16 / sizeof(In);  // numbers in a chunk

// Threads of a block. A team is a whole block, or a part of a warp.
template <int kThreads>
constexpr int kBlockThreads = kThreads > 32 ? kThreads : 128;

// kVec numbers, moved by one instruction, or by several of 16 bytes.
template <class T, int kVec>
struct alignas(sizeof(T) * kVec < 16 ? sizeof(T) * kVec : 16) Pack {
  T at[kVec];
};

// Loads kVec numbers of a row from a column on: with one load if kIsAligned, else number by number, with zeros past the row's
// end.
template <bool kIsAligned, int kVec, class T>
__device__ void load_chunk(float (&x)[kVec], const T* row, int64_t stride, int64_t column, int64_t width) {
  if constexpr (kIsAligned) {
    const auto pack = *reinterpret_cast<const Pack<T, kVec>*>(row + column);
#pragma unroll
    for (int v = 0; v < kVec; ++v) x[v] = to_float(pack.at[v]);
  } else {
#pragma unroll
    for (int v = 0; v < kVec; ++v) x[v] = column + v < width ? to_float(row[(column + v) * stride]) : 0.0f;
  }
}

struct Sum {
  __device__ float operator()(float a, float b) const { return a + b; }
};

// The larger number. It drops a NaN, but the sum of squares shows the NaN again.
struct Max {
  __device__ float operator()(float a, float b) const { return fmaxf(a, b); }
};

// Combines the x of a team's threads, and gives each of them the result. All threads of a block must call it: a mask of lanes
// that is not a constant would be compiled to the call of a subroutine.
template <int kThreads, class Op>
__device__ float combine(float x, Op op) {
#pragma unroll
  for (int apart = (kThreads < 32 ? kThreads : 32) / 2; apart > 0; apart /= 2) x = op(x, __shfl_xor_sync(0xffffffffu, x, apart));
  if constexpr (kThreads > 32) {
    auto* const of_warps = reinterpret_cast<float*>(shared_memory());
    __syncthreads();  // every thread has read the previous result
    if (threadIdx.x % 32 == 0) of_warps[threadIdx.x / 32] = x;
    __syncthreads();
    x = of_warps[0];
#pragma unroll
    for (int warp = 1; warp < kThreads / 32; ++warp) x = op(x, of_warps[warp]);
  }
  return x;
}

// One column's term of the distance between a row of zhat and its prototype.
__device__ inline float distance_term(Distance distance, float unit, float target) {
  switch (distance) {
    case Distance::cosine:
      return unit * target;
    case Distance::euclidean:
      return (unit - target) * (unit - target);
    default:
      return fabsf(unit - target);
  }
}

// The distance, from the sum of its terms.
__device__ inline float distance_of_terms(Distance distance, float sum) {
  switch (distance) {
    case Distance::cosine:
      return 1.0f - sum;
    case Distance::euclidean:
      return sqrtf(sum);
    default:
      return sum;
  }
}

// Bytes of shared memory that `combine` needs.
template <int kThreads>
constexpr int kSharedBytes = kThreads > 32 ? kThreads / 32 * int(sizeof(float)) : 0;

// kIsAligned: rows of the embeddings and of the prototypes are aligned whole chunks, so each chunk is a single load.
template <class In, class Out, bool kIsAligned, int kThreads>
__global__ void __launch_bounds__(kBlockThreads<kThreads>, 1) prologue_kernel(const Prologue p) {
  constexpr int kVec = kVecOf<In>;
  // Positions and rows are below 2^31, but the addresses that they give are not.
  const unsigned index = blockIdx.x * (kBlockThreads<kThreads> / kThreads) + threadIdx.x / kThreads;
  const bool is_row = index < p.n_rows;
  const unsigned position = is_row ? index : 0;
  const int64_t width = is_row ? p.width : 0;  // a team past the last row works on a row without columns
  const int row = row_of(p, int(position));
  const In* const z = static_cast<const In*>(p.embeddings) + row * p.row_stride;
  Out* const zhat = static_cast<Out*>(p.zhat) + int64_t(position) * p.pitch;

  const int thread = threadIdx.x % kThreads;
  const int64_t first_column = int64_t(thread) * kVec;
  constexpr int kStep = kThreads * kVec;
  // Calls visit(column, x) for each chunk of this thread. x holds the row's entries times `shrink`.
  float held[kHeld][kVec] = {};
  float shrink = 1.0f;
  const auto for_each_chunk = [&](auto visit) {
#pragma unroll
    for (int h = 0; h < kHeld; ++h)
      if (first_column + h * kStep < width) visit(first_column + h * kStep, held[h]);
#pragma unroll 1  // unrolled, this loop would take registers even from rows that do not need it
    for (int64_t column = first_column + kHeld * kStep; column < width; column += kStep) {
      float again[kVec];
      load_chunk<kIsAligned>(again, z, p.column_stride, column, width);
#pragma unroll
      for (int v = 0; v < kVec; ++v) again[v] *= shrink;
      visit(column, again);
    }
  };

#pragma unroll
  for (int h = 0; h < kHeld; ++h)
    if (first_column + h * kStep < width) load_chunk<kIsAligned>(held[h], z, p.column_stride, first_column + h * kStep, width);

  // The row is scaled first, so that no square overflows: any finite row has a finite direction. The scale is the power of two of
  // the largest entry, not the entry itself: the scaling is then exact, and one division serves the whole row. It is at most
  // 2^126, so that its inverse is a normal number.
  float largest = kEps<float>;
  for_each_chunk([&](int64_t, const float (&x)[kVec]) {
#pragma unroll
    for (int v = 0; v < kVec; ++v) largest = Max()(largest, fabsf(x[v]));
  });
  largest = combine<kThreads>(largest, Max());
  const int exponent = min(__float_as_int(largest) >> 23, 253);
  const float scale = __int_as_float(exponent << 23);
  shrink = __int_as_float((254 - exponent) << 23);
#pragma unroll
  for (int h = 0; h < kHeld; ++h)
#pragma unroll
    for (int v = 0; v < kVec; ++v) held[h][v] *= shrink;

  float squares = 0.0f;
  for_each_chunk([&](int64_t, const float (&x)[kVec]) {
#pragma unroll
    for (int v = 0; v < kVec; ++v) squares += x[v] * x[v];
  });
  const float norm = sqrtf(combine<kThreads>(squares, Sum()));
  // If unnormalised, the divisor is `shrink`. It is a power of two, so the quotient is z again, except for digits 2^149 times
  // smaller than the row's largest number.
  const float smallest = kEps<float> * shrink;
  const float divisor = !p.normalize ? shrink : norm < smallest ? smallest : norm, inverse = 1.0f / divisor;  // a NaN stays one

  const int64_t label = p.prototypes != nullptr ? p.labels[instance_of(p, row)] : -1;
  const float* const target = label < 0 ? nullptr : p.prototypes + (label < p.n_classes ? label : p.n_classes - 1) * p.width;
  float terms = 0.0f;
  for_each_chunk([&](int64_t column, const float (&x)[kVec]) {
    float c[kVec] = {};
    if (target != nullptr) load_chunk<kIsAligned>(c, target, 1, column, width);
    Pack<Out, kVec> rounded;
#pragma unroll
    for (int v = 0; v < kVec; ++v) {
      // The fused remainder corrects the quotient to that of a division, except for rare last bits: zhat of one column is 1 or
      // -1.
      const float quotient = x[v] * inverse;
      round_to(rounded.at[v], fmaf(fmaf(-quotient, divisor, x[v]), inverse, quotient));
      const float unit = to_float(rounded.at[v]);
      terms += target != nullptr ? distance_term(p.distance, unit, c[v]) : 0.0f * unit;
    }
    if (kIsAligned || column + kVec <= width) {
      *reinterpret_cast<Pack<Out, kVec>*>(zhat + column) = rounded;
    } else {
#pragma unroll
      for (int v = 0; v < kVec; ++v)
        if (column + v < width) zhat[column + v] = rounded.at[v];
    }
  });
  terms = combine<kThreads>(terms, Sum());
  if (is_row && thread == 0) {
    p.norms[position] = norm * scale;
    p.distances[position] = target != nullptr ? distance_of_terms(p.distance, terms) : terms;
  }
  // There are more threads than counters: a row has at least eight threads, and a block has 128.
  reset_counter(p.n_finished, p.n_rows, blockIdx.x * kBlockThreads<kThreads> + threadIdx.x);
}

}  // namespace clop::cuda
