// The gradient of the prototypes, for whoever trains them: a segment sum over the rows of each class.
//
// Tile picture: block (k, s, c) adds, for 256 columns, one a thread, the rows of class k whose place within the class is in the
// s-th of n_parts, kRowsAtOnce at a time and always in the same order; the parts are then added up. No atomics: the same bits from
// run to run. The Euclidean distance's gradient needs |zhat - c|, which the warps find first.
// Bytes: each labelled row of zhat once (Euclidean: once more a block of columns), and n_parts K D partial sums. Flops: O(N D).
#pragma once

#include "finish.cuh"

namespace clop::cuda {

constexpr int kPrototypeThreads = 256, kRowsAtOnce = 32;

template <class T>
__global__ void __launch_bounds__(kPrototypeThreads) prototype_kernel(const PrototypeGradient p) {
  auto* const lengths = reinterpret_cast<float*>(shared_memory());  // (kRowsAtOnce,)
  const auto* const zhat = static_cast<const T*>(p.zhat);
  const int64_t n_column_blocks = (p.width + kPrototypeThreads - 1) / kPrototypeThreads;
  const int64_t column = blockIdx.x % n_column_blocks * kPrototypeThreads + threadIdx.x, rest = blockIdx.x / n_column_blocks;
  const int64_t k = rest % p.n_classes, part = rest / p.n_classes;
  const bool is_column = column < p.width;

  const int64_t share = (p.bounds[k + 1] - p.bounds[k] + p.n_parts - 1) / p.n_parts, begin = p.bounds[k] + part * share;
  const int64_t end = begin + share < p.bounds[k + 1] ? begin + share : p.bounds[k + 1];
  const float* const target = p.prototypes + k * p.width;
  const float target_here = is_column ? target[column] : 0.0f;
  float sum = 0.0f;
  for (int64_t first = begin; first < end; first += kRowsAtOnce) {
    const int count = end - first < kRowsAtOnce ? int(end - first) : kRowsAtOnce;
    if (p.distance == Distance::euclidean) {
      __syncthreads();  // the lengths before are read
      for (int i = threadIdx.x / 32; i < count; i += kPrototypeThreads / 32) {
        const T* const row = zhat + p.by_class[first + i] * p.pitch;
        float square = 0.0f;
        for (int64_t d = threadIdx.x % 32; d < p.width; d += 32)
          square += (to_float(row[d]) - target[d]) * (to_float(row[d]) - target[d]);
        square = sum_of_warp(square);
        if (threadIdx.x % 32 == 0) lengths[i] = sqrtf(square);
      }
      __syncthreads();
    }
    if (!is_column) continue;
    for (int i = 0; i < count; ++i) {
      const int64_t position = p.by_class[first + i];
      const float unit = to_float(zhat[position * p.pitch + column]), w = p.weights != nullptr ? p.weights[position] : 1.0f;
      // The distances depend on zhat - c, all but the cosine, whose derivative with respect to c is -zhat.
      switch (p.distance) {
        case Distance::cosine:
          sum -= w * unit;
          break;
        case Distance::euclidean:
          sum -= lengths[i] == 0.0f ? 0.0f : w / lengths[i] * (unit - target_here);
          break;
        case Distance::manhattan:
          sum -= w * manhattan_gradient(unit, target_here);
          break;
      }
    }
  }
  float pull = *p.upstream * read(p.prototype_weight);
  if (p.reduction == Reduction::mean) pull /= fmaxf(p.counts[1], 1.0f);
  if (is_column) p.partial_gradients[(part * p.n_classes + k) * p.width + column] = pull * sum;
}

}  // namespace clop::cuda
