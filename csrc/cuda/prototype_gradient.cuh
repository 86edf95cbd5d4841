// The gradient of trained prototypes: a sum over the rows of each class.
//
// Tile picture: block (k, s, c) sums over rows of class k, for 256 columns, one a thread. The rows of the class are cut into
// n_parts; the block takes the s-th part, kRowsAtOnce rows at a time and always in the same order. Torch then adds the parts.
// There are no atomics, and the bits are the same from run to run. The gradient of the Euclidean distance needs |zhat - c|, which
// the warps compute first.
//
// Bytes: each labelled row of zhat once (Euclidean: once more for each block of columns), and n_parts K D partial sums. Flops:
// O(N D).
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
      __syncthreads();  // every thread has read the previous lengths
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
      // The gradient in c is the negative of the gradient in zhat, except for the cosine distance, where it is -zhat.
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
