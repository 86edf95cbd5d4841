// Rows against columns: the walk that both passes over pairs take, and what they know of a pair.
//
// Tile picture. A block owns kRows rows q, which stay in shared memory, and walks over all N rows as columns k, kColumns at a
// time; of S only the tile at hand exists, in registers. kStages tiles of columns are in shared memory, one at work and the
// others on their way:
//
//                     columns j, kColumns at a time
//                      near  near
//     rows i  [ q ]   |  S  |  P  |  S  | ... |  S  |      S_ij = zhat_i . zhat_j log2(e) / tau;  P: positives, the diagonal
//
// kRowWarps x kColumnWarps warps share the tile of S. A warp's part is kRowTiles x kTiles results of 16 x 8. Many rows: four or
// eight row warps, each with all columns. Few rows: blocks of 16 rows, so that there are blocks for all processors, and four
// column warps, whose sums are added at the end.
//
// Rows are sorted by group, so that positives lie near the diagonal: *near* tiles, which may hold some, pay for masks. All blocks
// walk in the same order, so that tiles of columns come from L2.
#pragma once

#include "loss.h"
#include "tiles.cuh"

namespace clop::cuda {

constexpr float kLog2E = 1.44269504f, kLn2 = 0.693147181f;

// S is at most log2(e) / tau, that of equal rows. While twice that is below 110, 2^(S - log2(e) / tau) is above 2^-110 for every pair,
// a normal float even with what is divided by it, and needs no maximum. It has all its digits where S is largest, as near-duplicate
// views ask for; without a shift S itself would have been rounded at log2(e) / tau.
constexpr float kLargestFixed = 55.0f;

constexpr float kLeastShift = -1e38f;  // where a maximum begins: finite, so that no two infinities are subtracted
constexpr int kNumbers = 2;            // coefficients of each column that come with its tile: a_j and the shift

template <class Product_, int kWidth_, int kRowWarps_, int kColumnWarps_, int kRowTiles_, int kColumns_, int kStages_>
struct Shape {
  using Product = Product_;
  using Element = typename Product::Element;
  static constexpr int kWidth = kWidth_, kRowWarps = kRowWarps_, kColumnWarps = kColumnWarps_, kRowTiles = kRowTiles_;
  static constexpr int kColumns = kColumns_, kStages = kStages_;
  static constexpr int kThreads = 32 * kRowWarps * kColumnWarps;
  static constexpr int kRows = 16 * kRowTiles * kRowWarps;
  static constexpr int kTiles = kColumns / kColumnWarps / 8;
  static constexpr int kSteps = kWidth * int(sizeof(Element)) / kStepBytes;
  using Rows = Tile<kWidth* int(sizeof(Element))>;

  static constexpr int kRowBytes = kRows * Rows::kRowBytes, kColumnBytes = kColumns * Rows::kRowBytes;
  static constexpr int kNumberBytes = kNumbers * kColumns * int(sizeof(float));
  // Shared memory: q, the stages, and for each stage the coefficients of its columns.
  static constexpr int kSharedBytes = kRowBytes + kStages * (kColumnBytes + kNumberBytes);

  static_assert(kTiles % 2 == 0, "columns are loaded 16 at a time");
  static_assert(kColumns <= 128 && 128 % kColumns == 0 && 128 % kRows == 0, "coefficients are padded to 128 rows");
};

// The shapes for rows of kWidth numbers, of 128 rows and of 16. Rows of 512 bytes, and operands that come in parts, leave registers
// for 16 rows a warp only; 64 columns at a time take too many where the gradient takes 128.
template <class Product, int kWidth>
constexpr int kBytesOf = kWidth * int(sizeof(typename Product::Element));
template <class Product, int kWidth>
constexpr bool kIsHeavy = kBytesOf<Product, kWidth> > 256 || sizeof(typename Product::Element) > 2;
template <class Product, int kWidth>
using Tall = Shape<Product, kWidth, kIsHeavy<Product, kWidth> ? 8 : 4, 1, kIsHeavy<Product, kWidth> ? 1 : 2,
                   (kBytesOf<Product, kWidth> > 128) ? 32 : 64, (kBytesOf<Product, kWidth> > 256) ? 2 : 4>;
template <class Product, int kWidth>
using Short = Shape<Product, kWidth, 1, 4, 1, 64, 2>;

// ---- what is known of a position -------------------------------------------------------------------------------------------

__device__ inline int64_t row_of(const Loss& p, int position) {
  if (p.groups != nullptr) return p.groups[position];
  const unsigned views = unsigned(p.n_views), index = unsigned(position);  // 32-bit divisions take a fraction of the registers
  return int64_t(index % views) * (p.n_rows / p.n_views) + index / views;
}

struct Group {
  int start, end;
};

// The run of positions of the group of a position; of one past the end, an empty run.
__device__ inline Group group_of(const Loss& p, int position) {
  if (position >= p.n_rows) return {0, 0};
  if (p.groups != nullptr) return {p.groups[p.n_rows + position], p.groups[2 * p.n_rows + position]};
  const int views = int(p.n_views), start = int(unsigned(position) / unsigned(views)) * views;
  return {start, start + views};
}

struct Scale {
  float value, rest;  // log2(e) / tau is their sum

  __device__ explicit Scale(const Loss& p) : value(p.scale), rest(p.scale_rest) {
    if (p.temperature == nullptr) return;
    const double precise = 1.4426950408889634 / double(*p.temperature);
    value = float(precise);
    rest = float(precise - double(value));
  }
  __device__ bool is_fixed() const { return value <= kLargestFixed; }  // whether all rows have the shift `value`
  // S - shift
  template <class Product>
  __device__ float apply(float product, float shift) const {
    return Product::kIsExact ? exact(product, shift) : fmaf(product, value, -shift);
  }
  __device__ float exact(float product, float shift) const {
    return fmaf(product, rest, fmaf(product, value, -shift));  // the rest last: next to a shift it would be lost
  }
};

// ---- the walk ----------------------------------------------------------------------------------------------------------------

// Where a thread stands.
template <class S>
struct Place {
  int lane, g, t, row_warp, column_warp;
  int first_row;

  __device__ Place() {
    const int warp = threadIdx.x / 32;
    lane = threadIdx.x % 32;
    g = lane / 4;
    t = lane % 4;
    row_warp = warp % S::kRowWarps;
    column_warp = warp / S::kRowWarps;
    first_row = int(blockIdx.x) * S::kRows;  // positions are int32, and so is N
  }
  // Row of the block's tile that results c[r][.][2 h + e] are of.
  __device__ int row(int r, int h) const { return (row_warp * S::kRowTiles + r) * 16 + 8 * h + g; }
  // Column of the tile that results c[.][n][2 h + e] are of.
  __device__ int column(int n, int e) const { return column_warp * (S::kColumns / S::kColumnWarps) + 8 * n + 2 * t + e; }
};

template <class S>
struct Memory {
  unsigned char* base = shared_memory();

  __device__ typename S::Rows rows() const { return {base}; }
  __device__ typename S::Rows columns(int stage) const { return {base + S::kRowBytes + stage * S::kColumnBytes}; }
  // Coefficient `which` of the columns of a stage.
  __device__ float* numbers(int stage, int which) const {
    return reinterpret_cast<float*>(base + S::kRowBytes + S::kStages * S::kColumnBytes + stage * S::kNumberBytes) +
           which * S::kColumns;
  }
  // The stages' memory, free when the walk is over.
  __device__ float* scratch() const { return reinterpret_cast<float*>(base + S::kRowBytes); }
};

// Calls visit(first column, stage, S / scale) for each tile of columns. The first n_numbers rows of `numbers`, (n_numbers, stride),
// are loaded with the columns; they must be there past the last one. kHold: the A operands of q stay in registers.
template <class S, bool kHold, class Visit>
__device__ void walk(const Loss& p, const void* zhat_pointer, const float* numbers, int n_numbers, int64_t stride,
                     const Place<S>& place, Visit&& visit) {
  using Product = typename S::Product;
  const auto* const zhat = static_cast<const typename S::Element*>(zhat_pointer);
  const Memory<S> memory;
  const int width = int(p.width), n_rows = int(p.n_rows), n_tiles = (n_rows + S::kColumns - 1) / S::kColumns;

  const auto load = [&](int tile) {
    if (tile < n_tiles) {
      const int stage = tile % S::kStages;
      const int first = tile * S::kColumns;
      load_tile<typename S::Element, S::kColumns, S::kThreads>(memory.columns(stage), zhat, first, n_rows, width);
#pragma unroll
      for (int which = 0; which < kNumbers; ++which)
        if (which < n_numbers && threadIdx.x < S::kColumns / 4)
          copy_async(memory.numbers(stage, which) + 4 * threadIdx.x, numbers + which * stride + first + 4 * threadIdx.x,
                     kChunkBytes);
    }
    commit_copies();
  };
  load_tile<typename S::Element, S::kRows, S::kThreads>(memory.rows(), zhat, place.first_row, n_rows, width);
#pragma unroll
  for (int tile = 0; tile < S::kStages - 1; ++tile) load(tile);

  typename Product::A held[kHold ? S::kRowTiles : 1][kHold ? S::kSteps : 1];
  for (int tile = 0; tile < n_tiles; ++tile) {
    wait_for_copies<S::kStages - 2>();
    __syncthreads();  // the tile is there for all, and the tile before it is done with
    if (kHold && tile == 0) {
#pragma unroll
      for (int r = 0; r < S::kRowTiles; ++r)
#pragma unroll
        for (int step = 0; step < S::kSteps; ++step) {
          uint32_t word[4];
          load_a(word, memory.rows(), place.row(r, 0) - place.g, step, place.lane);
          if constexpr (kHold) held[r][step] = Product::a_of(word);
        }
    }
    load(tile + S::kStages - 1);

    const int stage = tile % S::kStages;
    float s[S::kRowTiles][S::kTiles][4] = {};
#pragma unroll
    for (int step = 0; step < S::kSteps; ++step) {
      typename Product::A a[S::kRowTiles];
#pragma unroll
      for (int r = 0; r < S::kRowTiles; ++r) {
        if constexpr (kHold) {
          a[r] = held[r][step];
        } else {
          uint32_t word[4];
          load_a(word, memory.rows(), place.row(r, 0) - place.g, step, place.lane);
          a[r] = Product::a_of(word);
        }
      }
#pragma unroll
      for (int n = 0; n < S::kTiles; n += 2) {
        uint32_t word[4];
        load_b(word, memory.columns(stage), place.column(n, 0) - 2 * place.t, step, place.lane);
        const typename Product::B b0 = Product::b_of(word[0], word[1]), b1 = Product::b_of(word[2], word[3]);
#pragma unroll
        for (int r = 0; r < S::kRowTiles; ++r) {
          Product::multiply(s[r][n], a[r], b0);
          Product::multiply(s[r][n + 1], a[r], b1);
        }
      }
    }
    visit(tile * S::kColumns, stage, s);
  }
  __syncthreads();  // the stages are free
}

// The columns near the rows of a block: of their groups.
template <class S>
__device__ Group near_columns(const Loss& p, const Place<S>& place) {
  const int n_rows = int(p.n_rows), last = place.first_row + S::kRows < n_rows ? place.first_row + S::kRows : n_rows;
  return {group_of(p, place.first_row).start, group_of(p, last - 1).end};
}

// ---- sums over a block, in one order ----------------------------------------------------------------------------------------

__device__ inline float sum_of_warp(float x) {
#pragma unroll
  for (int apart = 16; apart > 0; apart /= 2) x += __shfl_xor_sync(0xffffffffu, x, apart);
  return x;
}

// Of the threads' x; valid in thread 0. scratch: one float a warp, free before and after.
template <int kThreads>
__device__ float sum_of_block(float x, float* scratch) {
  x = sum_of_warp(x);
  __syncthreads();
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = x;
  __syncthreads();
  float sum = scratch[0];
#pragma unroll
  for (int warp = 1; warp < kThreads / 32; ++warp) sum += scratch[warp];
  return sum;
}

// True in the block that is the last of the grid to come here: it sees what the others have written before they came. `flag`: a
// float of shared memory.
__device__ inline bool is_last_block(unsigned* n_finished, float* flag) {
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) *flag = atomicAdd(n_finished, 1) + 1 == gridDim.x ? 1.0f : 0.0f;
  __syncthreads();
  const bool is_last = *flag != 0.0f;
  __threadfence();
  return is_last;
}

}  // namespace clop::cuda
