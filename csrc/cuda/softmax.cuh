// The second launch of the forward pass: the statistics of every row of S, the row's term of the loss, and the loss.
//
// Tile picture: pairs.cuh. A thread sees a quarter of the columns of each of its rows. For every row it keeps four numbers:
//
//     negative_i            sum_j 2^(S_ij - shift_i) over negatives
//     positive_i            the same sum over positives
//     positive_logits_i     the sum of S_ip - log2(e) / tau over positives. The difference is small where positives dominate, and
//                           keeps digits that S_ip has no room for
//     shift_i               log2(e) / tau for unit rows while tau >= 0.026, else the largest S_ij so far
//
// Positives are summed apart, from the same products as all other pairs, because near-duplicate views need log(1 + negative /
// positive) to the last digit. Sums of zhat over a group would not do (clop_kernels/backends/tiled.py). With negatives_only,
// positives are in no sum, and row i's term is log(2^shift_i negative_i).
//
// Flops: 2 N^2 D, and N^2 exponentials; with two sides 4 L R D and 2 L R. Besides the product, a pair costs one multiply-add, one
// ex2 and one add.
//
// Bytes: each block of rows reads zhat once from L2. That is N^2 D itemsize / 128 bytes, 128 flops a byte at 16 bits. Device
// memory sees O(N D). If blocks share rows, each writes 16 bytes a row, and the last one reads them. From shared memory a warp
// reads each column tile once: 512 bytes for every 4 instructions (32 rows a warp) or 2 instructions (16 rows) of 4096 flops.
//
// Predicted for an H200 at N = 65536, 16 bits. (132 processors at 1.8 GHz; mma.sync at 620 of wgmma's 990 Tflop/s; 128 bytes of
// shared memory and 16 ex2 a cycle and processor.) D = 128: 1.1 Tflop take 1.8 ms on matrix units, 1.1 ms of shared memory and
// 1.1 ms of ex2. D = 256, with 16 rows a warp: 3.5 ms on matrix units and 4.5 ms of shared memory, which limits it. An H200 took
// 5.2 ms and 10.2 ms, more than twice as much. These times include the host, and are of an older version, whose walks had more
// instructions and whose blocks did not share rows. A profile has yet to explain the difference.
//
// Instructions of a warp for a far tile of 32 columns at D = 128, 16 bits, one shift, counted in a build for sm_90 that has only
// this path: 235, of which 64 mma, 16 ldmatrix, 4 cp.async, 100 for exponentials and their sums. A version that computed
// addresses anew for each tile had 305.
//
// The last block to finish adds up the partial sums of all blocks of rows, in the order of the blocks; the result is the loss.
// This needs no launch of its own, and the bits are the same from run to run.
#pragma once

#include "pairs.cuh"

namespace clop::cuda {

// The statistics of a row.
struct RowSums {
  static constexpr int kNumbers = 4;
  float shift, negative, positive, positive_logits;

  // A row as the blocks that share rows store it: its four numbers side by side.
  __device__ static RowSums load_from_l2(const float* from) {
    float x[kNumbers];
    cuda::load_from_l2(x, from);
    return {x[0], x[1], x[2], x[3]};
  }
  __device__ void store(float* to) const { cuda::store(to, {shift, negative, positive, positive_logits}); }

  // A row in (4, N) statistics: its four numbers lie N apart.
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

// The statistics of a row over two disjoint sets of columns together.
__device__ inline RowSums merge(const RowSums& x, const RowSums& y) {
  const float shift = fmaxf(x.shift, y.shift);
  const float of_x = exp2_approx(x.shift - shift), of_y = exp2_approx(y.shift - shift);
  return {shift, x.negative * of_x + y.negative * of_y, x.positive * of_x + y.positive * of_y,
          x.positive_logits + y.positive_logits};
}

// Merges the rows of kLanes lanes, whose numbers differ in the lowest bits. All of these lanes get the same bits.
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

// log(1 + x) for -1/2 <= x <= 1 to the last digits of float, also near 0. It is 2 artanh(r) with r = x / (2 + x), |r| <= 1/3. The
// first omitted term is below r^18 / 19 = 1.4e-10 of the sum.
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

// lse_i - mean_p s_ip, or lse_i if there are no positives. In this form, cancellation loses no more digits than the rounding of
// the statistics already has.
__device__ inline float contrastive_term(const RowSums& row, int n_positives, const Scale& scale) {
  if (n_positives == 1 && row.negative < row.positive) return log1p_series(row.negative / row.positive);
  const float total = row.negative + row.positive;
  if (!(total < __int_as_float(0x7f800000))) return total;  // NaN or infinity, whose bits cannot be taken apart below
  // log2(total) = exponent + log2(mantissa), with the mantissa in [1/2, 1). The large parts are subtracted from each other first.
  const int bits = __float_as_int(total);
  const float exponent = float((bits >> 23) - 126), mantissa = __int_as_float((bits & 0x7fffff) | 0x3f000000);
  const float shift = n_positives > 0 ? row.shift - scale.value : row.shift;
  const float mean_positive = n_positives > 0 ? row.positive_logits / float(n_positives) : 0.0f;
  return (shift + exponent - mean_positive) * kLn2 + log1p_series(mantissa - 1.0f);
}

// Adds one tile of S to the statistics of the thread's rows. A far tile takes neither masks nor positives.
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
      if (!is_fixed) {  // online softmax: raise the shift to the largest S so far, and rescale the sums
        float largest = row.shift;
#pragma unroll
        for (int n = 0; n < S::kTiles; ++n)
#pragma unroll
          for (int e = 0; e < 2; ++e)
            if (!is_near || mask.is_pair(8 * n + e)) largest = fmaxf(largest, scale.apply<Product>(s[r][n][2 * h + e], 0.0f));
        row = merge(row, {largest, 0.0f, 0.0f, 0.0f});
      }
      float of_tile = 0.0f;  // a sum of its own, so that a million columns do not cause a million roundings of the row's sum
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

// Makes positive_logits the sum of S_ip itself, as the separate pass pair_softmax returns it.
__device__ inline RowSums with_whole_logits(const Pairs& p, const Scale& scale, int position, RowSums row) {
  row.positive_logits = fmaf(float(positives_of(p, run_of(p, position))), scale.value, row.positive_logits);
  return row;
}

// Stores what the backward pass needs of a row, and adds the row's share of the loss to `parts`.
__device__ inline void finish_term(const Forward& p, const Scale& scale, int position, const RowSums& row,
                                   float (&parts)[kPartialSums]) {
  const int n_positives = positives_of(p, run_of(p, position));
  const float total = row.negative + row.positive;
  const bool is_anchor = p.negatives_only ? total != 0.0f : n_positives > 0;  // a NaN total counts, so that it shows in the loss
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

// Adds up the partial sums of all blocks of rows, which gives the loss. Only the last block calls it.
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

// The end of the pass: the threads' parts become the partial sums of a block of rows. The last block to finish adds up the
// partial sums of all blocks of rows. scratch: 33 floats.
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

// ---- the pass -----------------------------------------------------------------------------------------------------------------

// How many blocks the registers of a processor should hold at once. The compiler limits registers accordingly.
template <class S>
constexpr int kSoftmaxBlocks = S::kThreads <= 128 ? 3 : 1;

template <class S>
__global__ void __launch_bounds__(S::kThreads, kSoftmaxBlocks<S>) softmax_kernel(const Forward p) {
  constexpr bool kHold = !S::Product::kIsExact && S::kRowTiles * S::kSteps <= 16;  // they take at most 64 registers
  const Place<S> place;
  const Span<S> span(p);
  const Scale scale(p);
  const bool is_fixed = scale.is_fixed(p);
  // A tile is near if it may hold positives of the block's rows: those between the first row's run and the last row's run.
  const Run near = {run_of(p, span.first_row).start, run_of(p, min(span.first_row + S::kRows, span.row_end) - 1).end};

  RowSums sums[S::kRowTiles][2];
#pragma unroll
  for (int r = 0; r < S::kRowTiles; ++r)
#pragma unroll
    for (int h = 0; h < 2; ++h) sums[r][h] = {is_fixed ? scale.value : kLeastShift, 0.0f, 0.0f, 0.0f};
  walk<S, kHold>(p, span, nullptr, 0, 0, place, [&](int first_column, int, const auto& s) {
    add_tile<S>(p, span, scale, is_fixed, span.is_near(first_column, near), first_column, place, s, sums);
  });

  // Merge the four lanes that hold parts of the same row. From here on a thread has one whole row.
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
  float* const scratch = reinterpret_cast<float*>(memory.base);  // where the rows q were, which are no longer needed

  // Merge the sums of the blocks that share these rows, in the order of the blocks. All blocks but the last to finish leave here.
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

  // Each row's term of the loss; for the separate pass pair_softmax, the statistics.
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
