// The positive groups by label, for few instances, in one launch. For more instances clop_kernels/groups.py sorts instead.
//
// Tile picture: a thread takes an instance. It compares the instance's label with all labels, kGroupThreads of them at a time in
// shared memory, and counts the smaller labels and the equal ones. With sides, the counts over its own side give its position,
// and the counts over the other side give its positive run. An unlabelled instance gets a key of its own, below all labels.
//
// Comparisons: B^2; up to a few thousand instances they take less time than the launches of a sort. Bytes: 8 B^2 / kGroupThreads
// from L2.
#pragma once

#include "device.cuh"
#include "loss.h"

namespace clop::cuda {

constexpr int kGroupThreads = 128;

__global__ void __launch_bounds__(kGroupThreads) groups_kernel(const Grouping p) {
  auto* const keys = reinterpret_cast<int64_t*>(shared_memory());  // (kGroupThreads,)
  const auto key_of = [&](int64_t b) { return p.labels[b] >= 0 ? p.labels[b] : -1 - b; };
  const int64_t instance = int64_t(blockIdx.x) * kGroupThreads + threadIdx.x;
  const bool is_instance = instance < p.n_instances;
  const int64_t key = is_instance ? key_of(instance) : 0;
  const bool has_sides = p.n_left >= 0, is_left = instance < p.n_left;
  int64_t n_ahead = 0, n_before = 0, n_equal = 0;  // rows ahead of its position, rows before its run, rows in its run
  for (int64_t first = 0; first < p.n_instances; first += kGroupThreads) {
    const int64_t mine = first + threadIdx.x;
    __syncthreads();  // all threads have read the previous keys
    if (mine < p.n_instances) keys[threadIdx.x] = key_of(mine);
    __syncthreads();
    const int64_t left = p.n_instances - first;
    for (int k = 0; k < kGroupThreads && k < left; ++k) {
      const bool is_same_side = (first + k < p.n_left) == is_left, is_before = keys[k] < key, is_equal = keys[k] == key;
      n_ahead += is_same_side && (is_before || (is_equal && first + k < instance)) ? 1 : 0;
      n_before += is_same_side != has_sides && is_before ? 1 : 0;
      n_equal += is_same_side != has_sides && is_equal ? 1 : 0;
    }
  }
  if (!is_instance) return;
  if (has_sides) (is_left ? n_before : n_ahead) += p.n_left;  // positions of the right side begin there
  const int64_t n_rows = p.n_views * p.n_instances;
  for (int64_t view = 0; view < p.n_views; ++view) {
    const int64_t position = p.n_views * n_ahead + view;
    p.groups[position] = int32_t(view * p.n_instances + instance);
    p.groups[n_rows + position] = int32_t(p.n_views * n_before);
    p.groups[2 * n_rows + position] = int32_t(p.n_views * (n_before + n_equal));
  }
}

}  // namespace clop::cuda
