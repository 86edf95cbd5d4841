// Rows against columns: the walk that both passes over pairs take, and the helpers that tell which pairs count.
//
// Tile picture. A block owns kRows rows q, which stay in shared memory. It walks over all N rows as columns k, kColumns at a
// time. Only the current tile of S exists, in registers. Shared memory holds kStages tiles of columns: one is in use while the
// others are being copied.
//
//                     columns j, kColumns at a time
//                      near  near
//     rows i  [ q ]   |  P  |  P  |  S  | ... |  S  |      S_ij = zhat_i . zhat_j log2(e) / tau;  P: S, with masks
//
// Two sides, L rows on the left and R rows on the right: a block owns rows of one side and walks over the columns of the other
// side. Blocks of left rows come first in the grid. The walks visit 2 L R pairs, half of N^2 if the sides are equally long; every
// count of N^2 in softmax.cuh and gradient.cuh changes in the same way.
//
//                     left     right
//     left rows    [         |  S  P  ]     P: row i + L or i - L, or the run of the other side that has the label
//     right rows   [  S  P   |        ]
//
// If nothing is compared (one view of each instance, or an empty side), there are no columns and no walk.
//
// A block has 128 rows and kWarps warps, four or eight. Each warp owns kRowTiles x kTiles results of 16 x 8: 32 or 16 rows, and
// all columns of the tile of S.
//
// Shared rows. There may be fewer blocks of 128 rows than the processors take at once, or many processors may get no block in the
// last round. Then several blocks share the same rows, and each of them walks over a part of the columns (Split in loss.h, chosen
// by plan_of in loss.cu; Share below). Each writes its sums to memory. The last of them to finish adds these sums in the order of
// the parts, so the bits are the same from run to run.
//
//     columns  [ tiles of block 0 | tiles of block 1 | tiles of block 2 | fewer, of block 3 ]     4 blocks share the rows
//
// Near and far tiles. Rows are sorted by group, so positives lie together; without sides they lie near the diagonal. Only near
// tiles pay for masks: tiles that may hold positives or the diagonal, or columns outside the walk. All blocks with the same part
// of the columns walk over it in the same order, so tiles of columns come from L2.
#pragma once

#include "loss.h"
#include "tiles.cuh"

namespace clop::cuda {

constexpr float kLn2 = 0.693147181f;

// The largest log2(e) / tau, in bits, for which 2^S needs no running maximum.
//
// For unit rows, log2(e) / tau is the largest possible S, that of two equal rows. It serves as the shift of all rows. S - shift
// is at least -2 log2(e) / tau. While that is at least -110, 2^(S - shift) is at least 2^-110. That is a normal float, and stays
// one if it is divided by a total of up to 2^16. The shift is part of the multiply-add that scales the product, so S - shift has
// all its digits where S is largest, as near-duplicate views need. Without a shift, S would be rounded at the magnitude of
// log2(e) / tau. Unnormalised rows may have any S and always take the maximum. (Where this kernel has one shift for all rows, the
// CPU has none, and its bound is larger: kLargestUnshiftedLogit.)
constexpr float kLargestUnshiftedBits = 55.0f;

constexpr float kLeastShift = -1e38f;  // where a running maximum starts: finite, so that no two infinities are subtracted
constexpr int kNumbers = 2;            // coefficients of each column that are copied with its tile: a_j and the shift

// The shape of a pass: the tiles, warps and stages of a block. All numbers follow from the template's parameters.
template <class Product_, int kWidth_, int kWarps_, int kRowTiles_, int kColumns_, int kStages_>
struct Shape {
  using Product = Product_;
  using Element = typename Product::Element;
  static constexpr int kWidth = kWidth_, kWarps = kWarps_, kRowTiles = kRowTiles_;
  static constexpr int kColumns = kColumns_, kStages = kStages_;
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kRows = 16 * kRowTiles * kWarps;
  static constexpr int kTiles = kColumns / 8;
  static constexpr int kSteps = kWidth * int(sizeof(Element)) / kStepBytes;
  using Rows = Tile<kWidth* int(sizeof(Element))>;

  static constexpr int kRowBytes = kRows * Rows::kRowBytes, kColumnBytes = kColumns * Rows::kRowBytes;
  static constexpr int kNumberBytes = kNumbers * kColumns * int(sizeof(float));
  // Shared memory: q, the stages, and the coefficients of each stage's columns.
  static constexpr int kSharedBytes = kRowBytes + kStages * (kColumnBytes + kNumberBytes);

  static_assert(kTiles % 2 == 0, "columns are loaded 16 at a time");
  static_assert(kColumns <= 128 && 128 % kColumns == 0, "coefficients are padded to 128 rows");
  static_assert(kRows == kBlockRows);
};

// The shape for rows of kWidth numbers. A warp has 32 rows, or 16 if rows have 512 bytes or numbers have 32 bits (kIsHeavy),
// because there are no registers for more. A tile has 64 columns, or 32 if rows have more than 128 bytes: 64 columns spill where
// the gradient alone takes 128 registers.
template <class Product, int kWidth>
constexpr int kBytesOf = kWidth * int(sizeof(typename Product::Element));
template <class Product, int kWidth>
constexpr bool kIsHeavy = kBytesOf<Product, kWidth> > 256 || sizeof(typename Product::Element) > 2;
template <class Product, int kWidth>
using ShapeOf = Shape<Product, kWidth, kIsHeavy<Product, kWidth> ? 8 : 4, kIsHeavy<Product, kWidth> ? 1 : 2,
                      (kBytesOf<Product, kWidth> > 128) ? 32 : 64, (kBytesOf<Product, kWidth> > 256) ? 2 : 4>;

// ---- which pairs count -----------------------------------------------------------------------------------------------------

using Run = RunOf<int>;

// The columns that a position is compared with. They may include the position itself, which the mask removes.
__host__ __device__ inline Run columns_of(const Pairs& p, int position) {
  const int n_rows = int(p.n_rows), n_left = int(p.n_left);
  if (!has_pairs(p) || n_left == n_rows) return {0, 0};
  if (n_left < 0) return {0, n_rows};
  return position < n_left ? Run{n_left, n_rows} : Run{0, n_left};
}

// For near tiles: which columns make a pair with a position, and which of these pairs are positives. Columns are counted from
// `origin`. In softmax.cuh that is the thread's first column, so that the compiler knows its columns.
struct Mask {
  int position;
  Run columns, run;
  bool negatives_only;

  __device__ Mask(const Pairs& p, int position, const Run& columns, const Run& run, int origin)
      : position(position - origin),
        columns(counted_from(origin, columns)),
        run(counted_from(origin, run)),
        negatives_only(p.negatives_only) {}
  __device__ bool is_pair(int column) const {
    return holds(columns, column) && column != position && !(negatives_only && holds(run, column));
  }
  __device__ bool is_positive(int column) const { return is_pair(column) && holds(run, column); }
};

// log2(e) / tau, and how it turns a product into S - shift.
struct Scale : LogitScale {
  __device__ explicit Scale(const Options& p)
      : LogitScale(p.temperature.tensor != nullptr ? logit_scale(double(*p.temperature.tensor)) : p.scale) {}
  // Whether all rows have the same shift, `value`.
  __device__ bool is_fixed(const Options& p) const { return p.normalize && value <= kLargestUnshiftedBits; }
  // S - shift. Exact products take both floats of log2(e) / tau, the others only `value`.
  template <class Product>
  __device__ float apply(float product, float shift) const {
    return Product::kIsExact ? exact(product, shift) : fmaf(product, value, -shift);
  }
  __device__ float exact(float product, float shift) const {
    return fmaf(product, rest, fmaf(product, value, -shift));  // `rest` last: before the shift it would be rounded away
  }
};

// ---- the walk ----------------------------------------------------------------------------------------------------------------

// The column where a walk begins, rounded down to a multiple of four, because coefficients are copied four at a time.
__host__ __device__ inline int first_column_of(const Run& columns) { return columns.start & ~3; }

// Which rows a block has, and which other blocks share them. Blocks of left rows come first in the grid. Blocks that share rows
// are neighbours in the grid.
template <class S>
struct Share {
  int n_blocks, block, first_block;     // how many blocks share the rows, which of them this is, the first of them in the grid
  int block_of_rows, n_blocks_of_rows;  // which 128 rows these are, and how many such blocks of rows there are
  bool is_right;                        // whether the rows are on the right side

  __device__ explicit Share(const Pairs& p) {
    const int n_left = int(p.n_left < 0 ? p.n_rows : p.n_left), n_right = p.is_one_way ? 0 : int(p.n_rows) - n_left;
    const int n_left_rows = (n_left + S::kRows - 1) / S::kRows, n_left_blocks = n_left_rows * p.split.of_left;
    const int index = int(read_block_index());
    is_right = index >= n_left_blocks;
    const int origin = is_right ? n_left_blocks : 0;
    n_blocks = is_right ? p.split.of_right : p.split.of_left;
    const int of_side = int(unsigned(index - origin) / unsigned(n_blocks));
    first_block = origin + of_side * n_blocks;
    block = index - first_block;
    block_of_rows = of_side + (is_right ? n_left_rows : 0);
    n_blocks_of_rows = n_left_rows + (n_right + S::kRows - 1) / S::kRows;
  }
  // The counter of the sharing blocks that have finished.
  template <class Pass>
  __device__ unsigned* n_finished(const Pass& p) const {
    return p.n_finished + 1 + block_of_rows;
  }
};

// What a block walks over: its rows, and its part of the columns that these rows are compared with.
template <class S>
struct Span {
  int first_row, row_end;  // kRows rows, cut off at row_end, the end of their side; positions fit into an int
  Run columns;

  __device__ explicit Span(const Pairs& p) {
    const Share<S> share(p);
    const int n_left = p.n_left < 0 ? 0 : int(p.n_left), n_left_rows = (n_left + S::kRows - 1) / S::kRows;
    first_row = share.is_right ? n_left + (share.block_of_rows - n_left_rows) * S::kRows : share.block_of_rows * S::kRows;
    row_end = p.n_left < 0 || share.is_right ? int(p.n_rows) : n_left;
    columns = columns_of(p, first_row);
    const int of_block = p.split.n_tiles * S::kColumns, first = first_column_of(columns) + share.block * of_block;
    columns = {max(columns.start, first), min(columns.end - first, of_block) + first};
  }
  // Whether a tile of columns is near, for rows whose positives lie in `run`.
  __device__ bool is_near(int first, const Run& run) const {
    const int end = first + S::kColumns;
    return (first < run.end && end > run.start) || first < columns.start || end > columns.end;
  }
};

// The thread's place in the block's tile. g and t are the row and column index of a lane in the matrix instructions (tiles.cuh).
template <class S>
struct Place {
  int warp, lane, g, t;

  __device__ Place() {
    warp = threadIdx.x / 32;
    lane = threadIdx.x % 32;
    g = lane / 4;
    t = lane % 4;
  }
  // The warp's first row in the block's tile.
  __device__ int first_row() const { return warp * S::kRowTiles * 16; }
  // The row, in the block's tile, of the results c[r][.][2 h + e].
  __device__ int row(int r, int h) const { return first_row() + 16 * r + 8 * h + g; }
  // The column, in the tile, of the results c[.][n][2 h + e].
  __device__ int column(int n, int e) const { return 8 * n + 2 * t + e; }
};

// The layout of the block's shared memory.
template <class S>
struct Memory {
  unsigned char* base = shared_memory();

  __device__ typename S::Rows rows() const { return {base}; }
  __device__ typename S::Rows columns(int stage) const { return {base + S::kRowBytes + stage * S::kColumnBytes}; }
  // Coefficient `which` of a stage's columns.
  __device__ float* numbers(int stage, int which) const {
    return reinterpret_cast<float*>(base + S::kRowBytes + S::kStages * S::kColumnBytes + stage * S::kNumberBytes) +
           which * S::kColumns;
  }
  // The memory of the stages, which is free after the walk.
  __device__ float* scratch() const { return reinterpret_cast<float*>(base + S::kRowBytes); }
};

// The walk. It calls visit(first column, stage, s) for each tile of columns, where s is S / scale in registers. `numbers` has
// rows of `stride` floats, one float for each position. Its first n_numbers rows are copied with the columns. They must be long
// enough for whole tiles, past the last column. kHold keeps the A operands of q in registers.
//
// Copies run kStages - 1 tiles ahead of the products. Each turn of the loop waits for the oldest stage, starts the copy of a new
// tile into the stage that has just become free, multiplies, and visits.
template <class S, bool kHold, class Visit>
__device__ void walk(const Pairs& p, const Span<S>& span, const float* numbers, int n_numbers, int64_t stride,
                     const Place<S>& place, Visit&& visit) {
  using Product = typename S::Product;
  const auto* const zhat = static_cast<const typename S::Element*>(p.zhat);
  const Memory<S> memory;
  // Matrix units cut their sums off, toward zero, at the precision of the sum so far. Over the whole width this would lose digits
  // of the largest S, which near-duplicates need. Products with kIsExact (tiles.cuh) therefore sum only two steps in the matrix
  // units. The pieces are then added in ordinary float32, which rounds to nearest.
  constexpr int kPiece = Product::kIsExact ? 2 : 1;
  static_assert(S::kSteps % kPiece == 0);
  // If the loop were fully unrolled, the compiler would begin all pieces at once. There are not enough registers for that.
  [[maybe_unused]] constexpr int kAtOnce = Product::kIsExact ? 2 : S::kSteps;
  const int width = int(p.width), pitch = int(p.pitch);
  const int begin = first_column_of(span.columns), end = span.columns.end;

  // The rows of the block, copied once.
  Copies<typename S::Element, S::kRows, S::kThreads, typename S::Rows>(zhat, span.first_row, span.row_end, width, pitch)
      .begin(memory.rows());
  Copies<typename S::Element, S::kColumns, S::kThreads, typename S::Rows> copies(zhat, begin, end, width, pitch);
  numbers += begin + 4 * int(threadIdx.x);
  // Starts the copy of a tile of columns and its coefficients. Past the last tile it only ends an empty group, to keep the count.
  const auto load = [&](int first, int stage) {
    if (first < end) {
      copies.begin(memory.columns(stage));
#pragma unroll
      for (int which = 0; which < kNumbers; ++which)
        if (which < n_numbers && threadIdx.x < S::kColumns / 4)
          copy_async(memory.numbers(stage, which) + 4 * threadIdx.x, numbers + which * stride, kChunkBytes);
      numbers += S::kColumns;
    }
    commit_copies();
  };
#pragma unroll
  for (int tile = 0; tile < S::kStages - 1; ++tile) load(begin + tile * S::kColumns, tile);

  typename Product::A held[kHold ? S::kRowTiles : 1][kHold ? S::kSteps : 1];
  if constexpr (kHold) {
    wait_for_copies<S::kStages - 2>();
    __syncthreads();
#pragma unroll
    for (int r = 0; r < S::kRowTiles; ++r)
#pragma unroll
      for (int step = 0; step < S::kSteps; ++step) {
        uint32_t word[4];
        load_a(word, memory.rows(), 16 * r, place.first_row(), step, place.lane);
        held[r][step] = Product::a_of(word);
      }
  }
  unsigned stage = 0;
  for (int first_column = begin; first_column < end; first_column += S::kColumns) {
    wait_for_copies<S::kStages - 2>();
    __syncthreads();  // every thread's part of the tile has arrived, and no thread still reads the previous tile
    load(first_column + (S::kStages - 1) * S::kColumns, (stage + S::kStages - 1) % S::kStages);

    // S = q k^T for this tile.
    float s[S::kRowTiles][S::kTiles][4] = {};
#pragma unroll kAtOnce
    for (int first = 0; first < S::kSteps; first += kPiece) {
      typename Product::A a[S::kRowTiles][kPiece];
#pragma unroll
      for (int r = 0; r < S::kRowTiles; ++r)
#pragma unroll
        for (int k = 0; k < kPiece; ++k) {
          if constexpr (kHold) {
            a[r][k] = held[r][first + k];
          } else {
            uint32_t word[4];
            load_a(word, memory.rows(), 16 * r, place.first_row(), first + k, place.lane);
            a[r][k] = Product::a_of(word);
          }
        }
#pragma unroll
      for (int n = 0; n < S::kTiles; n += 2) {
        float piece[S::kRowTiles][2][4] = {};
#pragma unroll
        for (int k = 0; k < kPiece; ++k) {
          uint32_t word[4];
          load_b(word, memory.columns(stage), place.column(n, 0) - 2 * place.t, first + k, place.lane);
          const typename Product::B b[2] = {Product::b_of(word[0], word[1]), Product::b_of(word[2], word[3])};
#pragma unroll
          for (int r = 0; r < S::kRowTiles; ++r)
#pragma unroll
            for (int next = 0; next < 2; ++next)
              Product::multiply(Product::kIsExact ? piece[r][next] : s[r][n + next], a[r][k], b[next]);
        }
        if constexpr (Product::kIsExact) {
#pragma unroll
          for (int r = 0; r < S::kRowTiles; ++r)
#pragma unroll
            for (int next = 0; next < 2; ++next)
#pragma unroll
              for (int e = 0; e < 4; ++e) s[r][n + next][e] += piece[r][next][e];
        }
      }
    }
    visit(first_column, stage, s);
    stage = (stage + 1) % S::kStages;
  }
  wait_for_copies<0>();  // for the rows, in case there was no tile
  __syncthreads();       // now the memory of the stages is free
}

// ---- sums over a block, in a fixed order -------------------------------------------------------------------------------------

__device__ inline float sum_of_warp(float x) {
#pragma unroll
  for (int apart = 16; apart > 0; apart /= 2) x += __shfl_xor_sync(0xffffffffu, x, apart);
  return x;
}

// The sum of x over the threads of a block, valid in thread 0. scratch: one float for each warp, free before and after the call.
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

// True in the last of n_blocks blocks to call this. That block sees everything that the other blocks wrote before their calls.
// `flag` is a float in shared memory.
__device__ inline bool is_last_block(unsigned* n_finished, unsigned n_blocks, float* flag) {
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) *flag = atomicAdd(n_finished, 1) + 1 == n_blocks ? 1.0f : 0.0f;
  __syncthreads();
  const bool is_last = *flag != 0.0f;
  __threadfence();
  return is_last;
}

}  // namespace clop::cuda
