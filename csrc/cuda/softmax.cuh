// Second launch of the forward pass: the softmax statistics of every row of S, its term of the loss, and the loss.
//
// Tile picture: pairs.cuh. Of each row a thread keeps four numbers, over the columns it sees, a quarter of a tile's:
//
//     negative_i = sum_j 2^(S_ij - shift_i)       over pairs that are not positives
//     positive_i, positive_logits_i               over positives: the same sum, and that of S_ip - log2(e) / tau, which is small where
//                                                 they dominate, and keeps digits that S_ip has no room for
//     shift_i                                     log2(e) / tau of unit rows while tau >= 0.026, else the largest S_ij so far
//
// Positives are summed apart, from the very products that all other pairs have, because near-duplicate views need log(1 +
// negative / positive) to the last digit; sums of zhat over a group would not do (clop_kernels/backends/tiled.py). Where
// positives are no pairs they are in no sum, and row i's term is log(2^shift_i negative_i).
//
// Flops 2 N^2 D, exponentials N^2; of two sides 4 L R D and 2 L R. A pair costs one multiply-add, one ex2 and one add besides.
// Bytes: each block of rows reads zhat once, from L2: N^2 D itemsize / 128, 128 flops a byte at 16 bits; device memory O(N D). Where
// blocks share rows, each writes 16 bytes a row, and the last one reads them. From shared memory a warp reads each column tile once:
// 512 bytes for every 4 (32 rows a warp) or 2 (16 rows) instructions of 4096 flops.
// Predicted for an H200 (132 processors, 1.8 GHz, mma.sync at 620 of wgmma's 990 Tflop/s, 128 bytes of shared memory and 16 ex2 a
// cycle and processor) at N = 65536, 16 bits: D = 128, 1.1 Tflop, 1.8 ms of matrix units, 1.1 ms of shared memory, 1.1 ms of ex2;
// D = 256 (16 rows a warp) 3.5 ms of matrix units, 4.5 ms of shared memory, which bounds it. Measured there, host and all, with
// walks of more instructions and before blocks shared rows: 5.2 ms and 10.2 ms, more than twice as much; a profile has yet to say why.
//
// Instructions a warp for a far tile of 32 columns, D = 128, 16 bits, one shift, in code for sm_90 that has no other path: 235 (305
// before addresses went on from tile to tile), of which 64 mma, 16 ldmatrix, 4 cp.async, 100 for exponentials and their sums.
//
// The last block to finish adds the partial sums of all blocks of rows, in their order, to the loss: no launch of its own, and the
// same bits from run to run.
#pragma once

#include "pairs.cuh"

namespace clop::cuda {

struct RowSums {
  static constexpr int kNumbers = 4;
  float shift, negative, positive, positive_logits;

  // One row after another, as the blocks that share rows leave them.
  __device__ static RowSums load_from_l2(const float* from) {
    float x[kNumbers];
    cuda::load_from_l2(x, from);
    return {x[0], x[1], x[2], x[3]};
  }
  __device__ void store(float* to) const { cuda::store(to, {shift, negative, positive, positive_logits}); }

  // The row in (4, N) statistics.
  __device__ static RowSums load(const float* statistics, int64_t n_rows, int position) {
    const float* const from = statistics + position;
    return {from[0], from[n_rows], from[2 * n_rows], from[3 * n_rows]};
  }
  __device__ void store(float* statistics, int64_t n_rows, int position) const {
    float* const to = statistics + position;
    to[0] = shift;
    to[n_rows] = negative;
    to[2 * n_rows] = positive;
    to[3 * n_rows] = positive_logits;
  }
};

__device__ inline RowSums merge(const RowSums& x, const RowSums& y) {
  const float shift = fmaxf(x.shift, y.shift);
  const float of_x = exp2_approx(x.shift - shift), of_y = exp2_approx(y.shift - shift);
  return {shift, x.negative * of_x + y.negative * of_y, x.positive * of_x + y.positive * of_y,
          x.positive_logits + y.positive_logits};
}

// Of the kLanes lanes whose numbers differ in the lowest bits; the same bits in all of them.
template <int kLanes>
__device__ RowSums merge_lanes(RowSums row, int lane) {
#pragma unroll
  for (int apart = 1; apart < kLanes; apart *= 2) {
    const RowSums other = {__shfl_xor_sync(0xffffffffu, row.shift, apart), __shfl_xor_sync(0xffffffffu, row.negative, apart),
                           __shfl_xor_sync(0xffffffffu, row.positive, apart),
                           __shfl_xor_sync(0xffffffffu, row.positive_logits, apart)};
    row = lane & apart ? merge(other, row) : merge(row, other);
  }
  return row;
}

// log(1 + x) for -1/2 <= x <= 1 to the last digits of float, near 0 too: 2 artanh(r), r = x / (2 + x), |r| <= 1/3; the first term
// left out is below r^18 / 19 = 1.4e-10 of the sum.
__device__ inline float log1p_series(float x) {
  const float r = x / (2.0f + x), square = r * r;
  float series = square * (1.0f / 17) + 1.0f / 15;
  series = series * square + 1.0f / 13;
  series = series * square + 1.0f / 11;
  series = series * square + 1.0f / 9;
  series = series * square + 1.0f / 7;
  series = series * square + 1.0f / 5;
  series = series * square + 1.0f / 3;
  return 2.0f * (r + r * square * series);
}

// lse_i - mean_p s_ip in a form that cancels only what the rounding of the inputs has left; lse_i where there are no positives.
__device__ inline float contrastive_term(const RowSums& row, int n_positives, const Scale& scale) {
  if (n_positives == 1 && row.negative < row.positive) return log1p_series(row.negative / row.positive);
  const float total = row.negative + row.positive;
  if (!(total < __int_as_float(0x7f800000))) return total;  // the bits of a NaN or an infinity are not a number's
  // log2(total) = exponent + log2(mantissa), mantissa in [1/2, 1): the large parts are subtracted first.
  const int bits = __float_as_int(total);
  const float exponent = float((bits >> 23) - 126), mantissa = __int_as_float((bits & 0x7fffff) | 0x3f000000);
  const float shift = n_positives > 0 ? row.shift - scale.value : row.shift;
  const float mean_positive = n_positives > 0 ? row.positive_logits / float(n_positives) : 0.0f;
  return (shift + exponent - mean_positive) * kLn2 + log1p_series(mantissa - 1.0f);
}

// Adds one tile of S to the sums of the thread's rows.
template <class S>
__device__ void add_tile(const Pairs& p, const Span<S>& span, const Scale& scale, bool is_fixed, bool is_near, int first_column,
                         const Place<S>& place, const float (&s)[S::kRowTiles][S::kTiles][4], RowSums (&sums)[S::kRowTiles][2]) {
  using Product = typename S::Product;
#pragma unroll
  for (int r = 0; r < S::kRowTiles; ++r)
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      RowSums& row = sums[r][h];
      const int position = span.first_row + place.row(r, h);
      const Mask mask(p, position, span.columns, is_near ? run_of(p, position) : Run{0, 0}, first_column + place.column(0, 0));
      if (!is_fixed) {
        float largest = row.shift;
#pragma unroll
        for (int n = 0; n < S::kTiles; ++n)
#pragma unroll
          for (int e = 0; e < 2; ++e)
            if (!is_near || mask.is_pair(8 * n + e)) largest = fmaxf(largest, scale.apply<Product>(s[r][n][2 * h + e], 0.0f));
        row = merge(row, {largest, 0.0f, 0.0f, 0.0f});
      }
      float of_tile = 0.0f;  // apart, so that a million columns are not a million roundings
      if (!is_near) {
#pragma unroll
        for (int n = 0; n < S::kTiles; ++n)
#pragma unroll
          for (int e = 0; e < 2; ++e) of_tile += exp2_approx(scale.apply<Product>(s[r][n][2 * h + e], row.shift));
      } else {
#pragma unroll
        for (int n = 0; n < S::kTiles; ++n)
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            const float power = mask.is_pair(8 * n + e) ? exp2_approx(scale.apply<Product>(s[r][n][2 * h + e], row.shift)) : 0.0f;
            const bool is_positive = mask.is_positive(8 * n + e);
            row.positive += is_positive ? power : 0.0f;
            row.positive_logits += is_positive ? scale.apply<Product>(s[r][n][2 * h + e], scale.value) : 0.0f;
            of_tile += is_positive ? 0.0f : power;
          }
      }
      row.negative += of_tile;
    }
}

// ---- from the sums to the loss -----------------------------------------------------------------------------------------------

// The sums of a row with that of S_ip itself, as a pass over pairs alone gives them.
__device__ inline RowSums with_whole_logits(const Pairs& p, const Scale& scale, int position, RowSums row) {
  row.positive_logits = fmaf(float(positives_of(p, run_of(p, position))), scale.value, row.positive_logits);
  return row;
}

// Stores what the backward pass needs of a row, and adds its share of the loss to `parts`.
__device__ inline void finish_term(const Forward& p, const Scale& scale, int position, const RowSums& row,
                                   float (&parts)[kPartialSums]) {
  const int n_positives = positives_of(p, run_of(p, position));
  const float total = row.negative + row.positive;
  const bool is_anchor = p.negatives_only ? total != 0.0f : n_positives > 0;  // a NaN is not lost
  p.shift[position] = row.shift;
  p.inverse_total[position] = is_anchor ? 1.0f / total : 0.0f;
  p.negative[position] = row.negative;

  const float term = is_anchor ? contrastive_term(row, n_positives, scale) : 0.0f, distance = p.distances[position];
  const int row_index = row_of(p, position);
  const int64_t label = p.labels != nullptr ? p.labels[instance_of(p, row_index)] : -1;
  parts[0] += term;
  parts[1] += distance;
  parts[2] += is_anchor ? 1.0f : 0.0f;
  parts[3] += label >= 0 ? 1.0f : 0.0f;
  parts[4] += label < -1 || (p.n_classes > 0 && label >= p.n_classes) ? 1.0f : 0.0f;
  if (p.reduction == Reduction::none) p.loss[row_index] = term + read(p.prototype_weight) * distance;
}

// The partial sums of the blocks of rows to the loss; the last block calls it.
template <int kThreads>
__device__ void finish_loss(const Forward& p, unsigned n_blocks, float* scratch) {
  float sums[kPartialSums];
#pragma unroll
  for (int k = 0; k < kPartialSums; ++k) {
    float part = 0.0f;
    for (unsigned block = threadIdx.x; block < n_blocks; block += kThreads)
      part += load_from_l2(p.partial_sums + int64_t(k) * n_blocks + block);
    sums[k] = sum_of_block<kThreads>(part, scratch);
  }
  if (threadIdx.x != 0) return;
  const float n_anchors = sums[2], n_labelled = sums[3];
  p.counts[0] = n_anchors;
  p.counts[1] = n_labelled;
  device_assert(sums[4] == 0.0f, "clop_kernels: labels holds a value below -1 or without a prototype");
  if (const float* const temperature = p.temperature.tensor; temperature != nullptr)
    device_assert(*temperature > 0.0f && *temperature < __int_as_float(0x7f800000),
                  "clop_kernels: temperature is not a positive finite number");
  const float prototype_weight = read(p.prototype_weight);
  device_assert(prototype_weight >= 0.0f && prototype_weight < __int_as_float(0x7f800000),
                "clop_kernels: prototype_weight is not a finite number of at least 0");
  if (p.reduction == Reduction::none) return;
  const bool is_mean = p.reduction == Reduction::mean;
  const float contrastive = sums[0] / (is_mean ? fmaxf(n_anchors, 1.0f) : 1.0f);
  const float distance = sums[1] / (is_mean ? fmaxf(n_labelled, 1.0f) : 1.0f);
  *p.loss = contrastive + prototype_weight * distance;
}

// The end of the pass: the threads' parts to those of a block of rows, and in the last of these blocks all of them to the loss.
// scratch: 33 floats.
template <int kThreads>
__device__ void finish_block(const Forward& p, const float (&parts)[kPartialSums], unsigned block_of_rows, unsigned n_blocks,
                             float* scratch) {
#pragma unroll
  for (int k = 0; k < kPartialSums; ++k) {
    const float sum = sum_of_block<kThreads>(parts[k], scratch);
    if (threadIdx.x == 0) p.partial_sums[int64_t(k) * n_blocks + block_of_rows] = sum;
  }
  if (is_last_block(p.n_finished, n_blocks, scratch + 32)) finish_loss<kThreads>(p, n_blocks, scratch);
}

// ---- the pass ------------------------------------------------------------------------------------------------------------------

// How many blocks the registers of a processor shall hold at once.
template <class S>
constexpr int kSoftmaxBlocks = S::kThreads <= 128 ? 3 : 1;

template <class S>
__global__ void __launch_bounds__(S::kThreads, kSoftmaxBlocks<S>) softmax_kernel(const Forward p) {
  constexpr bool kHold = !S::Product::kIsExact && S::kRowTiles * S::kSteps <= 16;  // at most 64 registers
  const Place<S> place;
  const Span<S> span(p);
  const Scale scale(p);
  const bool is_fixed = scale.is_fixed(p);
  const Run near = {run_of(p, span.first_row).start, run_of(p, min(span.first_row + S::kRows, span.row_end) - 1).end};

  RowSums sums[S::kRowTiles][2];
#pragma unroll
  for (int r = 0; r < S::kRowTiles; ++r)
#pragma unroll
    for (int h = 0; h < 2; ++h) sums[r][h] = {is_fixed ? scale.value : kLeastShift, 0.0f, 0.0f, 0.0f};
  walk<S, kHold>(p, span, nullptr, 0, 0, place, [&](int first_column, int, const auto& s) {
    add_tile<S>(p, span, scale, is_fixed, span.is_near(first_column, near), first_column, place, s, sums);
  });

  // The four lanes that share a row.
  const Memory<S> memory;
  auto* const of_rows = reinterpret_cast<RowSums*>(memory.scratch());
#pragma unroll
  for (int r = 0; r < S::kRowTiles; ++r)
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const RowSums row = merge_lanes<4>(sums[r][h], place.lane);
      if (place.t == 0) of_rows[place.row(r, h)] = row;
    }
  __syncthreads();
  static_assert(S::kRows <= S::kThreads, "a thread a row");
  RowSums row = of_rows[threadIdx.x % S::kRows];
  float* const scratch = reinterpret_cast<float*>(memory.base);  // where the rows of the block were, which are done with

  // The blocks that share the rows, in their order.
  const Share<S> share(p);
  if (share.n_blocks > 1) {
    const auto place_of = [&](int block) {
      return p.split_sums + ((share.first_block + block) * S::kRows + threadIdx.x) * RowSums::kNumbers;
    };
    if (threadIdx.x < S::kRows) row.store(place_of(share.block));
    if (!is_last_block(share.n_finished(p), share.n_blocks, scratch)) return;
    if (threadIdx.x < S::kRows) {
      row = RowSums::load_from_l2(place_of(0));
      for (int block = 1; block < share.n_blocks; ++block) row = merge(row, RowSums::load_from_l2(place_of(block)));
    }
  }

  float parts[kPartialSums] = {};
  const int position = span.first_row + int(threadIdx.x);
  const bool is_row = threadIdx.x < S::kRows && position < span.row_end;
  if (p.loss == nullptr) {
    if (is_row) with_whole_logits(p, scale, position, row).store(p.statistics, p.n_rows, position);
    return;
  }
  if (is_row) finish_term(p, scale, position, row, parts);
  finish_block<S::kThreads>(p, parts, share.block_of_rows, share.n_blocks_of_rows, scratch);
}

}  // namespace clop::cuda
