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
// Rows of two sides, L on the left and R on the right: a block owns rows of one side and walks over the columns of the other, the
// blocks of left rows first. 2 L R pairs are visited, half of N^2 where the sides are as large; so with all that softmax.cuh and
// gradient.cuh count in N^2:
//
//                     left     right
//     left rows    [         |  S  P  ]     P: row i + L or i - L, or the run of the other side that has the label
//     right rows   [  S  P   |        ]
//
// Where nothing is compared, one view of instances or an empty side, there are no columns, and no walk.
//
// A block has 128 rows: kWarps warps, four or eight, and each has kRowTiles x kTiles results of 16 x 8, of 32 or 16 rows and all
// columns of the tile of S. Where the blocks of 128 rows are fewer than the processors take at once, or leave many of them without
// one at the end, several blocks share the same rows, and each walks over a part of the columns (Split in loss.h, which plan_of in
// loss.cu chooses; Share). Each of them writes its sums to memory, and the last to finish adds them, in the order of the parts: the
// same bits from run to run.
//
//     columns  [ tiles of block 0 | tiles of block 1 | tiles of block 2 | fewer, of block 3 ]     4 blocks share the rows
//
// Rows are sorted by group, so that positives lie together, without sides near the diagonal: *near* tiles, which may hold some,
// or columns that are none of the walk's, pay for masks. All blocks walk in the same order, so that tiles of columns come from
// L2, those of one part of the columns at a time.
#pragma once

#include "loss.h"
#include "tiles.cuh"

namespace clop::cuda {

constexpr float kLn2 = 0.693147181f;

// Up to which log2(e) / tau, in bits, 2^S needs no maximum: of unit rows it is the largest S, that of equal ones. While twice that is
// below 110, 2^(S - log2(e) / tau) is above 2^-110 for every pair, a normal float even with what is divided by it. It has all its
// digits where S is largest, as near-duplicate views ask for; without a shift S itself would have been rounded at log2(e) / tau. Rows
// as they are may have any S. (On the CPU nothing is shifted then, and there is room for more: kLargestUnshiftedLogit.)
constexpr float kLargestUnshiftedBits = 55.0f;

constexpr float kLeastShift = -1e38f;  // where a maximum begins: finite, so that no two infinities are subtracted
constexpr int kNumbers = 2;            // coefficients of each column that come with its tile: a_j and the shift

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
  // Shared memory: q, the stages, and for each stage the coefficients of its columns.
  static constexpr int kSharedBytes = kRowBytes + kStages * (kColumnBytes + kNumberBytes);

  static_assert(kTiles % 2 == 0, "columns are loaded 16 at a time");
  static_assert(kColumns <= 128 && 128 % kColumns == 0, "coefficients are padded to 128 rows");
  static_assert(kRows == kBlockRows);
};

// The shape for rows of kWidth numbers. Rows of 512 bytes, and operands that come in parts, leave registers for 16 rows a warp only;
// 64 columns at a time take too many where the gradient takes 128.
template <class Product, int kWidth>
constexpr int kBytesOf = kWidth * int(sizeof(typename Product::Element));
template <class Product, int kWidth>
constexpr bool kIsHeavy = kBytesOf<Product, kWidth> > 256 || sizeof(typename Product::Element) > 2;
template <class Product, int kWidth>
using ShapeOf = Shape<Product, kWidth, kIsHeavy<Product, kWidth> ? 8 : 4, kIsHeavy<Product, kWidth> ? 1 : 2,
                      (kBytesOf<Product, kWidth> > 128) ? 32 : 64, (kBytesOf<Product, kWidth> > 256) ? 2 : 4>;

// ---- what is known of a position -------------------------------------------------------------------------------------------

using Run = RunOf<int>;

// The columns that a position is compared with, itself apart.
__host__ __device__ inline Run columns_of(const Pairs& p, int position) {
  const int n_rows = int(p.n_rows), n_left = int(p.n_left);
  if (!has_pairs(p) || n_left == n_rows) return {0, 0};
  if (n_left < 0) return {0, n_rows};
  return position < n_left ? Run{n_left, n_rows} : Run{0, n_left};
}

// Which columns, counted from an origin, make a pair with a position, and which of those are positives; for near tiles.
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

struct Scale : LogitScale {
  __device__ explicit Scale(const Options& p)
      : LogitScale(p.temperature.tensor != nullptr ? logit_scale(double(*p.temperature.tensor)) : p.scale) {}
  // Whether all rows have the shift `value`.
  __device__ bool is_fixed(const Options& p) const { return p.normalize && value <= kLargestUnshiftedBits; }
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

// Where a walk over columns begins: their coefficients are copied four at a time.
__host__ __device__ inline int first_column_of(const Run& columns) { return columns.start & ~3; }

// Which rows a block has, and with which other blocks it shares them. Those of left rows come first, and those that share rows lie
// side by side.
template <class S>
struct Share {
  int n_blocks, block, first_block;     // how many share the rows, which of them this is, and the first of them in the grid
  int block_of_rows, n_blocks_of_rows;  // whichever block has them
  bool is_right;

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
  // Those that are done.
  template <class Pass>
  __device__ unsigned* n_finished(const Pass& p) const {
    return p.n_finished + 1 + block_of_rows;
  }
};

// What a block walks over: rows of one side, and columns of the other.
template <class S>
struct Span {
  int first_row, row_end;  // kRows rows, but for those from row_end on, the end of their side; positions are int32, and so is N
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
  // Whether a tile of columns is near rows whose positives are in `run`.
  __device__ bool is_near(int first, const Run& run) const {
    const int end = first + S::kColumns;
    return (first < run.end && end > run.start) || first < columns.start || end > columns.end;
  }
};

// Where a thread stands.
template <class S>
struct Place {
  int warp, lane, g, t;

  __device__ Place() {
    warp = threadIdx.x / 32;
    lane = threadIdx.x % 32;
    g = lane / 4;
    t = lane % 4;
  }
  // The first row of the block's tile that the warp has.
  __device__ int first_row() const { return warp * S::kRowTiles * 16; }
  // Row of the block's tile that results c[r][.][2 h + e] are of.
  __device__ int row(int r, int h) const { return first_row() + 16 * r + 8 * h + g; }
  // Column of the tile that results c[.][n][2 h + e] are of.
  __device__ int column(int n, int e) const { return 8 * n + 2 * t + e; }
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
__device__ void walk(const Pairs& p, const Span<S>& span, const float* numbers, int n_numbers,
                     int64_t stride, const Place<S>& place, Visit&& visit) {
  using Product = typename S::Product;
  const auto* const zhat = static_cast<const typename S::Element*>(p.zhat);
  const Memory<S> memory;
  // Matrix units cut their sums off, toward zero, at what the sum so far can hold: over all of the width that takes digits of the
  // largest S, which near-duplicates need. Exact kinds add the sums of two steps at a time in float32, which rounds to nearest.
  constexpr int kPiece = Product::kIsExact ? 2 : 1;
  static_assert(S::kSteps % kPiece == 0);
  // The compiler would begin all pieces at once, for which there are no registers.
  [[maybe_unused]] constexpr int kAtOnce = Product::kIsExact ? 2 : S::kSteps;
  const int width = int(p.width), pitch = int(p.pitch);
  const int begin = first_column_of(span.columns), end = span.columns.end;

  Copies<typename S::Element, S::kRows, S::kThreads, typename S::Rows>(zhat, span.first_row, span.row_end, width, pitch)
      .begin(memory.rows());
  Copies<typename S::Element, S::kColumns, S::kThreads, typename S::Rows> copies(zhat, begin, end, width, pitch);
  numbers += begin + 4 * int(threadIdx.x);
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
    __syncthreads();  // the tile is there for all, and the tile before it is done with
    load(first_column + (S::kStages - 1) * S::kColumns, (stage + S::kStages - 1) % S::kStages);

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
  wait_for_copies<0>();  // of the rows, where there was no tile
  __syncthreads();       // the stages are free
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

// True in the block that is the last of n_blocks to come here: it sees what the others have written before they came. `flag`: a
// float of shared memory.
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
