// Rows too wide for a block to hold (D > 256; float32: D > 128): the passes over pairs as kernels between a library's matrix
// products.
//
// Tile picture. A panel is a rectangle of the similarities, of at most panel_rows() rows and columns
// (clop_kernels/backends/cuda.py). The library's matrix product leaves it in memory as float32, and a kernel reads it while most
// of it is still in L2:
//
//     forward:   S_ij = z_i z_j^T  (library)  ->  panel_softmax_kernel adds the panel to its rows' sums       for all i, j
//     backward:  S_ij              (library)  ->  panel_pairs_kernel makes M of it, rounded as zhat is
//                grad_i += M z_j,  grad_j += M^T z_i   (library)                                              for i <= j
//
// clop_kernels/backends/cuda.py strings these steps together. A warp takes a row of a panel; its lanes take the columns in turn.
// With sides, a panel has rows of one side and columns of the other side. In the backward pass, the rows are on the left side and
// the columns on the right side.
//
// Flops, all in the library: 2 N^2 D forward, 3 N^2 D backward; with two sides 4 L R D and 6 L R D. Bytes of a P x P panel: S
// costs 4 P^2 bytes written and read, and M at 16 bits 2 P^2 bytes written and read twice, for 6 P^2 D flops. At D = 512 that is
// 300 flops a byte, most of the bytes from L2. These kernels cost little beside the products, because they touch a pair once.
#pragma once

#include "gradient.cuh"
#include "softmax.cuh"

namespace clop::cuda {

constexpr int kPanelThreads = 256, kPanelWarps = kPanelThreads / 32;
static_assert(most_blocks(8 * kPanelWarps) >= 8, "partial sums have room for a warp a row");

// Adds a panel to the sums of its rows, statistics: (4, N). The first panel of a row begins the sums. With adds_scale, it also
// turns positive_logits, which are sums of S_ip - log2(e) / tau, into sums of S_ip itself. A row that has no columns gets no
// sums.
__global__ void __launch_bounds__(kPanelThreads) panel_softmax_kernel(const Panel p) {
  const int row = int(blockIdx.x) * kPanelWarps + int(threadIdx.x / 32), lane = threadIdx.x % 32;
  if (row >= p.n_panel_rows) return;
  const Scale scale(p);
  const bool is_fixed = scale.is_fixed(p);
  const int position = int(p.first_row) + row;
  const Run columns = columns_of(p, position);
  const Run run = run_of(p, position);
  const Mask mask(p, position, columns, run, 0);
  const float* const products = p.products + row * p.n_panel_columns;

  RowSums sums = {is_fixed ? scale.value : kLeastShift, 0.0f, 0.0f, 0.0f};
  for (int64_t k = lane; k < p.n_panel_columns; k += 32) {
    const int column = int(p.first_column + k);
    if (!mask.is_pair(column)) continue;
    const float product = products[k];
    if (!is_fixed) sums = merge(sums, {fmaxf(sums.shift, scale.exact(product, 0.0f)), 0.0f, 0.0f, 0.0f});
    const float power = exp2_approx(scale.exact(product, sums.shift));
    const bool is_positive = mask.is_positive(column);
    sums.positive += is_positive ? power : 0.0f;
    sums.positive_logits += is_positive ? scale.exact(product, scale.value) : 0.0f;
    sums.negative += is_positive ? 0.0f : power;
  }
  sums = merge_lanes<32>(sums, lane);
  if (lane != 0) return;
  if (p.first_column > columns.start)
    sums = merge(RowSums::load(p.statistics, p.n_rows, position), sums);
  else if (p.adds_scale)
    sums = with_whole_logits(p, scale, position, sums);
  sums.store(p.statistics, p.n_rows, position);
}

// Turns the sums of all rows into the loss.
__global__ void __launch_bounds__(kPanelThreads) panel_loss_kernel(const Forward p) {
  const int position = int(blockIdx.x) * kPanelThreads + int(threadIdx.x);
  float parts[kPartialSums] = {};
  if (position < p.n_rows) {
    const Run columns = columns_of(p, position);
    RowSums sums = {};
    if (columns.start < columns.end) sums = RowSums::load(p.statistics, p.n_rows, position);
    finish_term(p, Scale(p), position, sums, parts);
  }
  finish_block<kPanelThreads>(p, parts, blockIdx.x, gridDim.x, reinterpret_cast<float*>(shared_memory()));
}

// Turns a panel of S into a panel of M. pairs: (n_panel_rows, n_panel_columns) in the type of zhat.
template <class T>
__global__ void __launch_bounds__(kPanelThreads) panel_pairs_kernel(const Panel p) {
  const int row = int(blockIdx.x) * kPanelWarps + int(threadIdx.x / 32), lane = threadIdx.x % 32;
  if (row >= p.n_panel_rows) return;
  const Scale scale(p);
  const bool is_fixed = scale.is_fixed(p);
  const int position = int(p.first_row) + row;
  const LaidOut of{p.coefficients, p.n_padded};
  const float a = of.a(position), shift = is_fixed ? scale.value : of.shift(position);
  const OfPositive of_positive = of.of_positive(position);
  const Mask mask(p, position, columns_of(p, position), of.run(position), 0);
  const float* const products = p.products + row * p.n_panel_columns;
  T* const pairs = static_cast<T*>(p.pairs) + row * p.n_panel_columns;
  for (int64_t k = lane; k < p.n_panel_columns; k += 32) {
    const int column = int(p.first_column + k);
    const bool is_positive = mask.is_positive(column);
    const OfPositive row = is_positive ? of_positive : OfPositive{a, 0.0f},
                     other = is_positive ? of.of_positive(column) : OfPositive{of.a(column), 0.0f};
    const float product = products[k], of_row = exp2_approx(scale.exact(product, shift)),
                of_column = is_fixed ? of_row : exp2_approx(scale.exact(product, of.shift(column)));
    const float m = of_row * row.b + of_column * other.b - (row.c + other.c);
    round_to(pairs[k], mask.is_pair(column) ? m : 0.0f);
  }
}

// A row of sums in memory. Lane `lane` has the columns lane + 32 k.
template <class T>
struct MemoryRow {
  float* g;
  const T* zhat;
  int lane, width;

  template <class Visit>
  __device__ void for_each(Visit&& visit) {
    for (int column = lane; column < width; column += 32) visit(column, g[column], to_float(zhat[column]));
  }
  __device__ float sum(float x) const { return sum_of_warp(x); }
};

// Turns p.sums, (N, D), into the gradient of the raw rows.
template <class T>
__global__ void __launch_bounds__(kPanelThreads) panel_finish_kernel(const Backward p) {
  const int position = int(blockIdx.x) * kPanelWarps + int(threadIdx.x / 32), lane = threadIdx.x % 32;
  float share = 0.0f;
  if (position < p.n_rows) {
    MemoryRow<T> row{p.sums + position * p.width, static_cast<const T*>(p.zhat) + position * p.pitch, lane, int(p.width)};
    share = finish_row(p, Scale(p), position, row);
  }
  finish_temperature<kPanelThreads>(p, share, blockIdx.x, gridDim.x, reinterpret_cast<float*>(shared_memory()));
}

}  // namespace clop::cuda
