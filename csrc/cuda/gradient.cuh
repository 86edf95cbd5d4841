// The last launch of the backward pass: the gradient of the raw rows, and of the temperature.
//
// Let e_ij = 2^(S_ij - shift), w_i the upstream gradient of row i's term, n_i its number of positives, and a_i = w_i / total_i (0
// for a row that is no anchor). If all rows have the same shift, then
//
//     dL/dzhat_i = 1/tau sum_{j != i} M_ij zhat_j        M_ij = e_ij (a_i + a_j)                      j not a positive
//                                                        M_ij = e_ij (b_i + b_j) - (c_i + c_j)        j a positive of i
//     n_i > 1:  b_i = a_i,  c_i = w_i / n_i              n_i = 1:  b_i = 0,  c_i = w_i negative_i / total_i
//
// For n_i = 1 both choices of b and c give the same M; the second choice avoids a subtraction that cancels. With a shift for each
// row, 2^(S_ij - shift_j) a_j replaces e_ij a_j, and the same for b_j. M_ij is 0 if i and j are not a pair. M is symmetric, so
// row i's gradient is one sum over j: a block that owns rows i makes their whole gradient, and no other block adds to it. The
// gradient needs no atomics and has the same bits from run to run.
//
// Tile picture: pairs.cuh. This is attention with K = V = zhat. One column tile k in shared memory serves both products, and S
// becomes the A operand of the second product without leaving its registers:
//
//     S = q k^T  ->  M, rounded to the operands' type  ->  G += M k   (kRows, D) floats in registers, 64 to 128 a thread
//
// At the end, warps take whole rows of G by way of shared memory, and finish.cuh turns each into the gradient of the raw row.
//
// Units: w_i is 1 for an anchor. With Reduction::none it is the row's upstream gradient, divided by the largest magnitude among
// all rows. Hence |M| <= 2, whatever the loss is scaled by.
//
// Flops: 4 N^2 D, and N^2 exponentials (twice as many for tau < 0.026 and for unnormalised rows); with two sides 8 L R D and 2 L
// R. Besides the products, a pair costs a multiply-add, an ex2, an add, a multiply and half a conversion.
//
// Bytes: each block of rows reads zhat once from L2. That is N^2 D itemsize / 128 bytes, 256 flops a byte at 16 bits. Device
// memory sees O(N D). If n blocks share rows, their sums are 4 n N W bytes, written to L2 and read from there. From shared memory
// each warp reads a column tile twice, once for each product, and its rows of q once for each tile.
//
// Predicted with the rates of an H200 in softmax.cuh, at N = 65536, 16 bits. D = 128: 2.2 Tflop take 3.5 ms on matrix units, 3.4
// ms of shared memory and 1.1 ms of ex2. D = 256, with 16 rows a warp: 7.1 ms on matrix units and 11.3 ms of shared memory, which
// limits it. Forward and backward together take 5.3 ms (D = 128) and 15.8 ms (D = 256) at best: 63% and 42% of 990 Tflop/s, by 6
// N^2 D. An H200 took 11.4 and 26.9 ms. These times include the host, and are of an older version, whose walks had more
// instructions and whose blocks did not share rows. A profile has yet to explain the difference.
//
// Instructions of a warp for a far tile of 32 columns at D = 128, 16 bits, one shift, counted in a build for sm_90 that has only
// this path: 429, of which 128 mma, 48 ldmatrix, 5 cp.async, 144 for M. A version that computed addresses anew for each tile, and
// did not keep the rows' a_i in registers, had 510.
#pragma once

#include "finish.cuh"

namespace clop::cuda {

// The coefficients of a row that replace a_i in a pair of positives.
struct alignas(8) OfPositive {
  float b, c;
};

// The layout of the coefficients, which the first launch of the pass writes: a, shift, (b, c) and the positive run, by position;
// zero past the last row. Addresses are computed where they are needed: four pointers would take eight registers.
struct LaidOut {
  float* const& memory;
  const int64_t& n_padded;

  __device__ float& a(int position) const { return memory[position]; }
  __device__ float& shift(int position) const { return memory[n_padded + position]; }
  __device__ OfPositive& of_positive(int position) const {
    return reinterpret_cast<OfPositive*>(memory + 2 * n_padded)[position];
  }
  __device__ Run& run(int position) const { return reinterpret_cast<Run*>(memory + 4 * n_padded)[position]; }
};

constexpr int kCoefficientThreads = 128;

__device__ inline int position_of_thread() { return int(blockIdx.x) * kCoefficientThreads + int(threadIdx.x); }

// Writes the coefficients of a position, and resets one of the counters n_finished for the next launch.
__device__ inline void lay_out(const PairGradient& p, int position, const Run& run, float a, const OfPositive& of_positive,
                               float shift) {
  const LaidOut to{p.coefficients, p.n_padded};
  to.a(position) = a;
  to.shift(position) = shift;
  to.of_positive(position) = of_positive;
  to.run(position) = run;
  reset_counter(p.n_finished, p.n_rows, position);
}

// Makes the coefficients from the results of the forward pass. A thread takes a position.
__global__ void __launch_bounds__(kCoefficientThreads) coefficients_kernel(const Backward p) {
  const int position = position_of_thread();
  const Run run = run_of(p, position);
  const int n_positives = positives_of(p, run);
  float a = 0.0f, shift = 0.0f;
  OfPositive of_positive = {0.0f, 0.0f};
  if (position < p.n_rows) {
    const float w = (p.weights != nullptr ? p.weights[position] : 1.0f) * scale_of_m(p.compute_dtype);
    a = w * p.inverse_total[position];
    shift = p.shift[position];
    of_positive.b = n_positives == 1 ? 0.0f : a;
    of_positive.c = n_positives == 1 ? a * p.negative[position] : n_positives > 1 ? w / float(n_positives) : 0.0f;
  }
  lay_out(p, position, run, a, of_positive, shift);
}

// Lays out coefficients that the caller gives (the separate pass pair_gradient). A thread takes a position.
__global__ void __launch_bounds__(kCoefficientThreads) given_coefficients_kernel(const PairGradient p) {
  const int position = position_of_thread();
  float a = 0.0f, shift = 0.0f;
  OfPositive of_positive = {0.0f, 0.0f};
  if (position < p.n_rows) {
    const float unit = scale_of_m(p.compute_dtype);
    const float* const from = p.given + position;
    a = unit * from[0];
    of_positive = {unit * from[p.n_rows], unit * from[2 * p.n_rows]};
    shift = from[3 * p.n_rows];
  }
  lay_out(p, position, run_of(p, position), a, of_positive, shift);
}

// Turns a tile of S into a tile of M, in place. There are three cases, the cheapest first.
template <class S>
__device__ void weigh_tile(const Pairs& p, const Span<S>& span, const LaidOut& of, const Scale& scale, bool is_fixed,
                           bool is_near, int first_column, const float (&a_rows)[S::kRowTiles][2], const float* a_columns,
                           const float* shift_columns, const Place<S>& place, float (&s)[S::kRowTiles][S::kTiles][4]) {
  using Product = typename S::Product;
#pragma unroll
  for (int r = 0; r < S::kRowTiles; ++r)
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int position = span.first_row + place.row(r, h);
      const float a = a_rows[r][h], shift = is_fixed ? scale.value : of.shift(position);
      if (!is_near && is_fixed) {  // a far tile, with one shift for all rows: one exponential for a pair
#pragma unroll
        for (int n = 0; n < S::kTiles; ++n)
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            float& m = s[r][n][2 * h + e];
            m = exp2_approx(scale.apply<Product>(m, shift)) * (a + a_columns[place.column(n, e)]);
          }
        continue;
      }
      if (!is_near) {  // a far tile, with a shift for each row and column: two exponentials for a pair
#pragma unroll
        for (int n = 0; n < S::kTiles; ++n)
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            float& m = s[r][n][2 * h + e];
            const int column = place.column(n, e);
            m = exp2_approx(scale.apply<Product>(m, shift)) * a +
                exp2_approx(scale.apply<Product>(m, shift_columns[column])) * a_columns[column];
          }
        continue;
      }
      __syncwarp();  // otherwise the compiler would load the numbers of all rows first, and registers would not suffice
      // A near tile: the mask decides which pairs count, and positives take b and c instead of a.
      const Mask mask(p, position, span.columns, of.run(position), 0);
      const OfPositive of_positive = of.of_positive(position);
#pragma unroll
      for (int n = 0; n < S::kTiles; ++n)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          float& m = s[r][n][2 * h + e];
          const int of_tile = place.column(n, e), column = first_column + of_tile;
          const float of_row = exp2_approx(scale.apply<Product>(m, shift)),
                      of_column = is_fixed ? of_row : exp2_approx(scale.apply<Product>(m, shift_columns[of_tile]));
          float row = a, other = a_columns[of_tile], less = 0.0f;
          if (mask.is_positive(column)) {
            const OfPositive of_other = of.of_positive(column);
            row = of_positive.b;
            other = of_other.b;
            less = of_positive.c + of_other.c;
          }
          m = mask.is_pair(column) ? of_row * row + of_column * other - less : 0.0f;
        }
    }
}

// G += M k, for one tile of columns.
//
// Matrix units truncate their running sums toward zero. Over many columns this becomes a bias: 1e-4 of a float32 gradient at N =
// 13200, measured on an H200. Beside the rounding of half precision it is small. Products with kIsExact therefore begin the sums
// of each tile at zero, and add them to G in ordinary float32, which rounds to nearest.
template <class S>
__device__ void add_products(float (&gradient)[S::kRowTiles][S::kWidth / 8][4], const float (&m)[S::kRowTiles][S::kTiles][4],
                             const typename S::Rows& columns, const Place<S>& place) {
  using Product = typename S::Product;
  using A = typename Product::A;
  using B = typename Product::B;
  constexpr int kResultTiles = Product::kResultTiles, kSteps = S::kTiles / kResultTiles;
  const auto load = [&](B(&b)[2], int step, int d) {
    Product::load_transposed(b, columns, place.column(step * kResultTiles, 0) - 2 * place.t, 8 * d, place.lane);
  };
  if constexpr (Product::kIsExact) {
    A a[S::kRowTiles][kSteps];
#pragma unroll
    for (int r = 0; r < S::kRowTiles; ++r)
#pragma unroll
      for (int step = 0; step < kSteps; ++step) a[r][step] = Product::a_of_result(&m[r][step * kResultTiles]);
#pragma unroll
    for (int d = 0; d < S::kWidth / 8; d += 2) {
      float sums[S::kRowTiles][2][4] = {};
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        B b[2];
        load(b, step, d);
#pragma unroll
        for (int r = 0; r < S::kRowTiles; ++r)
#pragma unroll
          for (int next = 0; next < 2; ++next) Product::multiply(sums[r][next], a[r][step], b[next]);
      }
#pragma unroll
      for (int r = 0; r < S::kRowTiles; ++r)
#pragma unroll
        for (int next = 0; next < 2; ++next)
#pragma unroll
          for (int k = 0; k < 4; ++k) gradient[r][d + next][k] += sums[r][next][k];
    }
  } else {
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      A a[S::kRowTiles];
#pragma unroll
      for (int r = 0; r < S::kRowTiles; ++r) a[r] = Product::a_of_result(&m[r][step * kResultTiles]);
#pragma unroll
      for (int d = 0; d < S::kWidth / 8; d += 2) {
        B b[2];
        load(b, step, d);
#pragma unroll
        for (int r = 0; r < S::kRowTiles; ++r)
#pragma unroll
          for (int next = 0; next < 2; ++next) Product::multiply(gradient[r][d + next], a[r], b[next]);
      }
    }
  }
}

// A row of G in the registers of a warp, together with its zhat. Lane `lane` has column lane + 32 k in g[k].
template <int kWidth>
struct WarpRow {
  float g[kWidth / 32], zhat[kWidth / 32];
  int lane, width;

  template <class Visit>
  __device__ void for_each(Visit&& visit) {
#pragma unroll
    for (int k = 0; k < kWidth / 32; ++k)
      if (lane + 32 * k < width) visit(lane + 32 * k, g[k], zhat[k]);
  }
  __device__ float sum(float x) const { return sum_of_warp(x); }
};

// How many blocks the registers of a processor should hold at once, as kSoftmaxBlocks in softmax.cuh.
template <class S>
constexpr int kGradientBlocks = S::kThreads <= 128 ? 2 : 1;

template <class S>
__global__ void __launch_bounds__(S::kThreads, kGradientBlocks<S>) gradient_kernel(const Backward p) {
  constexpr bool kHold = false;
  constexpr int kWidthTiles = S::kWidth / 8;
  const Place<S> place;
  const Span<S> span(p);
  const Memory<S> memory;
  const Scale scale(p);
  const bool is_fixed = scale.is_fixed(p);
  const int last_row = min(span.first_row + S::kRows, span.row_end) - 1;
  const LaidOut of{p.coefficients, p.n_padded};

  // A tile is near if it may hold positives of the block's rows: those between the first row's run and the last row's run.
  const Run near = {of.run(span.first_row).start, of.run(last_row).end};
  float a_rows[S::kRowTiles][2];
#pragma unroll
  for (int r = 0; r < S::kRowTiles; ++r)
#pragma unroll
    for (int h = 0; h < 2; ++h) a_rows[r][h] = of.a(span.first_row + place.row(r, h));

  // The walk: G, the block's sums, stays in registers.
  float gradient[S::kRowTiles][kWidthTiles][4] = {};
  walk<S, kHold>(p, span, p.coefficients, is_fixed ? 1 : 2, p.n_padded, place, [&](int first_column, int stage, auto& s) {
    weigh_tile<S>(p, span, of, scale, is_fixed, span.is_near(first_column, near), first_column, a_rows, memory.numbers(stage, 0),
                  memory.numbers(stage, 1), place, s);
    add_products<S>(gradient, s, memory.columns(stage), place);
  });

  // Add the sums of the blocks that share these rows, in the order of the blocks. Each block stores its fragments as they are,
  // four numbers a thread at a time. All but the last block to finish leave here.
  const Share<S> share_of_rows(p);
  if (share_of_rows.n_blocks > 1) {
    const auto place_of = [&](int block, int r, int n) {
      const int64_t fragment = (share_of_rows.first_block + block) * (S::kRowTiles * kWidthTiles) + r * kWidthTiles + n;
      return p.split_sums + (fragment * S::kThreads + threadIdx.x) * 4;
    };
#pragma unroll
    for (int r = 0; r < S::kRowTiles; ++r)
#pragma unroll
      for (int n = 0; n < kWidthTiles; ++n) store(place_of(share_of_rows.block, r, n), gradient[r][n]);
    if (!is_last_block(share_of_rows.n_finished(p), share_of_rows.n_blocks, memory.scratch())) return;
#pragma unroll
    for (int r = 0; r < S::kRowTiles; ++r)
#pragma unroll
      for (int n = 0; n < kWidthTiles; ++n) load_from_l2(gradient[r][n], place_of(0, r, n));
#pragma unroll 1
    for (int block = 1; block < share_of_rows.n_blocks; ++block)
#pragma unroll
      for (int r = 0; r < S::kRowTiles; ++r)
#pragma unroll
        for (int n = 0; n < kWidthTiles; ++n) {
          float part[4];
          load_from_l2(part, place_of(block, r, n));
#pragma unroll
          for (int k = 0; k < 4; ++k) gradient[r][n][k] += part[k];
        }
    __syncthreads();  // all threads have read the flag of is_last_block
  }

  // From fragments to whole rows. The fragments are written to the memory where the columns were, and each warp then reads whole
  // rows from there. A piece has kPartRows rows of every warp: 16 if they fit, else 8 or 4. Numbers are swizzled as the chunks of
  // a tile are (tiles.cuh).
  constexpr int kPartBytes = S::kWarps * S::kWidth * int(sizeof(float));
  constexpr int kPartRows = S::kStages * S::kColumnBytes >= 16 * kPartBytes  ? 16
                            : S::kStages * S::kColumnBytes >= 8 * kPartBytes ? 8
                                                                             : 4;
  static_assert(S::kStages * S::kColumnBytes >= kPartRows * kPartBytes, "four rows of every warp fit where the columns were");
  float* const parts = memory.scratch();
  const auto part = [&](int row_warp, int row, int column) -> float& {
    return parts[(row_warp * kPartRows + row) * S::kWidth + (column ^ (row % 4 * 8))];
  };
  const bool has_loss = p.grad_embeddings != nullptr;
  float share = 0.0f;
#pragma unroll
  for (int r = 0; r < S::kRowTiles; ++r)
#pragma unroll
    for (int first = 0; first < 16; first += kPartRows) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int row = 8 * h + place.g - first;
        if (row < 0 || row >= kPartRows) continue;
#pragma unroll
        for (int n = 0; n < kWidthTiles; ++n) {
          float* const to = &part(place.warp, row, 8 * n + 2 * place.t);
          to[0] = gradient[r][n][2 * h];
          to[1] = gradient[r][n][2 * h + 1];
        }
      }
      __syncthreads();
#pragma unroll 1
      for (int index = threadIdx.x / 32; index < S::kWarps * kPartRows; index += S::kThreads / 32) {
        const int row_warp = index / kPartRows, row = index % kPartRows,
                  of_block = (row_warp * S::kRowTiles + r) * 16 + first + row;
        if (span.first_row + of_block >= span.row_end) continue;
        WarpRow<S::kWidth> of_warp{{}, {}, place.lane, int(p.width)};
#pragma unroll
        for (int k = 0; k < S::kWidth / 32; ++k) {
          const int column = place.lane + 32 * k;
          of_warp.zhat[k] = to_float(*memory.rows().template at<typename S::Element>(of_block, column));
          of_warp.g[k] = part(row_warp, row, column);
        }
        if (has_loss)
          share += finish_row(p, scale, span.first_row + of_block, of_warp);
        else
          finish_sum(p, span.first_row + of_block, of_warp);
      }
      __syncthreads();
    }
  finish_temperature<S::kThreads>(p, share, share_of_rows.block_of_rows, share_of_rows.n_blocks_of_rows, memory.scratch());
}

}  // namespace clop::cuda
