// One pass over the raw embeddings that leaves unit rows in the order of the positive groups: the CUDA twin of
// clop_kernels/backends/triton/prologue.py.
//
// For every row, zhat = z / max(|z|, kEps<float>), or z as it is, rounded to the compute dtype, the norm |z|, and the distance of zhat
// (as rounded, which is what all later products see) to the prototype of its label.
//
// Tile picture: a team of kThreads = 8, 32 or 256 neighbouring threads takes a row, thread t its chunks t, t + kThreads,
// t + 2 kThreads, ... of 16 bytes of input:
//
//     row:      | chunk 0 | chunk 1 |  ...  | chunk kThreads-1 | chunk kThreads |  ...  | rest
//     thread:        0         1                kThreads-1            0                        the first kHeld stay in registers
//
// A chunk is one load where rows are aligned and whole chunks, else one a number. It is one store of zhat, whose rows are aligned
// whatever D is, but for the rest of a row that is no whole number of chunks.
//
// The launcher gives a row the smallest team whose registers hold it, so that it is read once; what is beyond 256 threads'
// registers is read three times, twice of them from cache. Sums have one order: the same bits from run to run.
// Bytes: N D of input and N D of zhat; a row's prototype comes from cache. Flops: O(N D).
#pragma once

#include "numbers.cuh"

namespace clop::cuda {

constexpr int kHeld = 2;  // chunks a thread keeps in registers
template <class In>
constexpr int kVecOf = 16 / sizeof(In);  // numbers of a chunk

// A team is a block, or a part of a warp.
template <int kThreads>
constexpr int kBlockThreads = kThreads > 32 ? kThreads : 128;

// Moved by one instruction, or by 16 bytes at a time.
template <class T, int kVec>
struct alignas(sizeof(T) * kVec < 16 ? sizeof(T) * kVec : 16) Pack {
  T at[kVec];
};

// kVec numbers of a row from a column on, by one load if kIsAligned, else each by itself; zeros past the row's end.
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

// Drops a NaN. It comes back with the sum of squares.
struct Max {
  __device__ float operator()(float a, float b) const { return fmaxf(a, b); }
};

// Combines the x of a team's threads; each of them gets the result. All threads of a block must call it: a mask of lanes
// that is not a constant would cost a subroutine.
template <int kThreads, class Op>
__device__ float combine(float x, Op op) {
#pragma unroll
  for (int apart = (kThreads < 32 ? kThreads : 32) / 2; apart > 0; apart /= 2) x = op(x, __shfl_xor_sync(0xffffffffu, x, apart));
  if constexpr (kThreads > 32) {
    auto* const of_warps = reinterpret_cast<float*>(shared_memory());
    __syncthreads();  // what was combined before may not yet have been read by all
    if (threadIdx.x % 32 == 0) of_warps[threadIdx.x / 32] = x;
    __syncthreads();
    x = of_warps[0];
#pragma unroll
    for (int warp = 1; warp < kThreads / 32; ++warp) x = op(x, of_warps[warp]);
  }
  return x;
}

// One column's term of the distance between a unit row and its target.
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

// Shared memory that `combine` takes.
template <int kThreads>
constexpr int kSharedBytes = kThreads > 32 ? kThreads / 32 * int(sizeof(float)) : 0;

// kIsAligned: rows of the embeddings and of the prototypes are whole chunks, each a single load.
template <class In, class Out, bool kIsAligned, int kThreads>
__global__ void __launch_bounds__(kBlockThreads<kThreads>, 1) prologue_kernel(const Prologue p) {
  constexpr int kVec = kVecOf<In>;
  // Positions and rows are below 2^31; what they address is not.
  const unsigned index = blockIdx.x * (kBlockThreads<kThreads> / kThreads) + threadIdx.x / kThreads;
  const bool is_row = index < p.n_rows;
  const unsigned position = is_row ? index : 0;
  const int64_t width = is_row ? p.width : 0;  // a team beyond the last row takes one without columns
  const int row = row_of(p, int(position));
  const In* const z = static_cast<const In*>(p.embeddings) + row * p.row_stride;
  Out* const zhat = static_cast<Out*>(p.zhat) + int64_t(position) * p.pitch;

  const int thread = threadIdx.x % kThreads;
  const int64_t first_column = int64_t(thread) * kVec;
  constexpr int kStep = kThreads * kVec;
  // Calls visit(column, x) for each chunk of this thread, x being the row's entries times `shrink`.
  float held[kHeld][kVec] = {};
  float shrink = 1.0f;
  const auto for_each_chunk = [&](auto visit) {
#pragma unroll
    for (int h = 0; h < kHeld; ++h)
      if (first_column + h * kStep < width) visit(first_column + h * kStep, held[h]);
#pragma unroll 1  // unrolled, it takes registers from the rows that do not need it
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
    if (first_column + h * kStep < width)
      load_chunk<kIsAligned>(held[h], z, p.column_stride, first_column + h * kStep, width);

  // Scaled first, so that no square overflows: any finite row has a finite direction. The scale is the power of two at its
  // largest entry, not the entry itself, for that is exact, and one division serves the whole row; 2^126 at most, so that
  // its inverse is a normal number.
  float largest = kEps<float>;
  for_each_chunk([&](int64_t, const float(&x)[kVec]) {
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
  for_each_chunk([&](int64_t, const float(&x)[kVec]) {
#pragma unroll
    for (int v = 0; v < kVec; ++v) squares += x[v] * x[v];
  });
  const float norm = sqrtf(combine<kThreads>(squares, Sum()));
  // By `shrink`, a power of two, the quotient is z again, but for digits 2^149 times smaller than the row's largest number.
  const float smallest = kEps<float> * shrink;
  const float divisor = !p.normalize ? shrink : norm < smallest ? smallest : norm, inverse = 1.0f / divisor;  // a NaN stays one

  const int64_t label = p.prototypes != nullptr ? p.labels[instance_of(p, row)] : -1;
  const float* const target = label < 0 ? nullptr : p.prototypes + (label < p.n_classes ? label : p.n_classes - 1) * p.width;
  float terms = 0.0f;
  for_each_chunk([&](int64_t column, const float(&x)[kVec]) {
    float c[kVec] = {};
    if (target != nullptr) load_chunk<kIsAligned>(c, target, 1, column, width);
    Pack<Out, kVec> rounded;
#pragma unroll
    for (int v = 0; v < kVec; ++v) {
      // The remainder makes the quotient that of a division, but for rare last bits: zhat of one column is 1 or -1.
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
  // There are more threads than counters: a row has eight or more, and a block 128.
  reset_counter(p.n_finished, p.n_rows, blockIdx.x * kBlockThreads<kThreads> + threadIdx.x);
}

}  // namespace clop::cuda
