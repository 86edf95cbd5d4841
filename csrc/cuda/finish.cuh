// The O(N D) end of the backward pass: it turns a row's sum over pairs into the gradient of the raw row.
//
//     dz_i = (g_i - (zhat_i . g_i) zhat_i) / |z_i|,    g_i = dL_contrastive/dzhat_i + w_i lambda dd(zhat_i, c)/dzhat_i
//
// Unnormalised rows take dz_i = g_i. The same dot products give the temperature's gradient: S is linear in 1/tau and in each of
// its two rows, so
//
//     dL/dtau = -1/(2 tau) sum_i zhat_i . dL_contrastive/dzhat_i
//
// A warp takes a row. A `Row` object holds it, in registers (gradient.cuh) or in memory (wide.cuh), and offers
//     for_each(visit)       calls visit(column, g, zhat) for the numbers of this lane; visit may change g
//     sum(x)                the sum of x over the lanes
#pragma once

#include "pairs.cuh"

namespace clop::cuda {

// M is multiplied by this before it is rounded to the operands' type.
__device__ inline float scale_of_m(Dtype compute_dtype) { return compute_dtype == Dtype::float16 ? kFloat16Scale : 1.0f; }

// d distance / d zhat in one column, for the Manhattan distance; finish_row and prototype_kernel write out the others.
__device__ inline float manhattan_gradient(float unit, float target) {
  const float offset = unit - target;
  return offset > 0.0f ? 1.0f : offset < 0.0f ? -1.0f : offset;
}

// Rounds a row to T and stores it.
template <class T, class Row>
__device__ void store_row(void* to, int64_t offset, Row& row) {
  row.for_each([&](int column, float& g, float) { round_to(static_cast<T*>(to)[offset + column], g); });
}

// Turns the gradient of zhat = z / max(|z|, kEps<float>) into the gradient of z, in place.
template <class Row>
__device__ void project_row(float norm, Dtype dtype, Row& row) {
  // Unless |z| is below kEps, the derivative of the norm removes the radial part of the gradient.
  const bool is_tiny = norm < kEps<float>;
  float radial = 0.0f;
  row.for_each([&](int, float& g, float zhat) { radial += g * zhat; });
  radial = row.sum(radial);
  radial = is_tiny ? 0.0f : radial;
  const float inverse = 1.0f / (is_tiny ? kEps<float> : norm);
  const float largest = is_tiny && dtype == Dtype::float16 ? kLargestFloat16<float> : __int_as_float(0x7f800000);
  row.for_each([&](int, float& g, float zhat) {
    g = (g - radial * zhat) * inverse;
    g = g > largest ? largest : g < -largest ? -largest : g;
  });
}

// Stores the row's sum, divided by the scale of M.
template <class Row>
__device__ void finish_sum(const PairGradient& p, int position, Row& row) {
  const float unit = 1.0f / scale_of_m(p.compute_dtype);
  row.for_each([&](int, float& g, float) { g *= unit; });
  store_row<float>(p.sums, int64_t(position) * p.width, row);
}

// Stores the row's gradient and returns the row's share of the temperature's gradient.
template <class Row>
__device__ float finish_row(const Backward& p, const Scale& scale, int position, Row& row) {
  const float inverse_temperature = (scale.value + scale.rest) * kLn2, upstream = *p.upstream;
  float of_contrastive = upstream * inverse_temperature / scale_of_m(p.compute_dtype);
  float pull = upstream * read(p.prototype_weight);
  if (p.reduction == Reduction::mean) {
    of_contrastive /= fmaxf(p.counts[0], 1.0f);
    pull /= fmaxf(p.counts[1], 1.0f);
  }
  float dot = 0.0f;
  row.for_each([&](int, float& g, float zhat) {
    g *= of_contrastive;
    dot += g * zhat;
  });
  dot = row.sum(dot);
  const float share = -0.5f * inverse_temperature * dot;

  const int row_index = row_of(p, position);
  const int64_t label = p.prototypes != nullptr ? p.labels[instance_of(p, row_index)] : -1;
  if (label >= 0) {
    const float* const target = p.prototypes + (label < p.n_classes ? label : p.n_classes - 1) * p.width;
    if (p.weights != nullptr) pull *= p.weights[position];
    if (p.distance == Distance::manhattan) {
      row.for_each([&](int column, float& g, float zhat) { g += pull * manhattan_gradient(zhat, target[column]); });
    } else {  // for the other distances the gradient is of_unit zhat - of_target c
      float of_unit = 0.0f, of_target = pull;
      if (p.distance == Distance::euclidean) {
        float length = 0.0f;
        row.for_each([&](int column, float&, float zhat) { length += (zhat - target[column]) * (zhat - target[column]); });
        length = sqrtf(row.sum(length));
        of_unit = of_target = length == 0.0f ? 0.0f : pull / length;  // zero if the row lies on its prototype
      }
      row.for_each([&](int column, float& g, float zhat) { g += of_unit * zhat - of_target * target[column]; });
    }
  }

  if (p.normalize) project_row(p.norms[position], p.dtype, row);
  const int64_t offset = row_index * p.width;
  switch (p.dtype) {
    case Dtype::float64:
      break;  // no tensor here is float64
    case Dtype::float32:
      store_row<float>(p.grad_embeddings, offset, row);
      break;
    case Dtype::float16:
      store_row<__half>(p.grad_embeddings, offset, row);
      break;
    case Dtype::bfloat16:
      store_row<__nv_bfloat16>(p.grad_embeddings, offset, row);
      break;
  }
  return share;
}

// Adds up the shares of the warps; all lanes of a warp hold the same share. The sum is the share of a block of rows. The last
// block to finish adds up the shares of all blocks of rows; the result is the temperature's gradient. scratch: 33 floats.
template <int kThreads>
__device__ void finish_temperature(const Backward& p, float share, unsigned block_of_rows, unsigned n_blocks, float* scratch) {
  if (p.grad_temperature == nullptr) return;
  share = sum_of_block<kThreads>(threadIdx.x % 32 == 0 ? share : 0.0f, scratch);
  if (threadIdx.x == 0) p.partial_sums[block_of_rows] = share;
  if (!is_last_block(p.n_finished, n_blocks, scratch + 32)) return;
  float sum = 0.0f;
  for (unsigned block = threadIdx.x; block < n_blocks; block += kThreads) sum += load_from_l2(p.partial_sums + block);
  sum = sum_of_block<kThreads>(sum, scratch);
  if (threadIdx.x == 0) *p.grad_temperature = sum;
}

}  // namespace clop::cuda
