// The two passes over pairs of rows, O(N^2 D): softmax statistics forward, sums of zhat weighted by M backward.
//
// Tile picture. The N x N matrix of similarities is symmetric. Each pass therefore visits only the tiles on and above the
// diagonal, each of them once; a tile serves its rows and, transposed, its columns. Rows are sorted by group, so the positives
// (P) lie at the diagonal:
//
//             j: 0    1    2    3
//     i: 0     [ P    x    x    x ]    S_ij = zhat_i . zhat_j log2(e) / tau       in panels of kPairColumns columns
//        1     [      P    x    x ]    forward:   sums of 2^S over rows and columns, a panel at a time; no tile is stored
//        2     [           P    x ]    backward:  S becomes M, then grad_i += M zhat_j and grad_j += M^T zhat_i
//        3     [                P ]
//
// With a_i = w_i / sum_j exp s_ij and q_i = w_i / n_i, M_ij = exp(s_ij) (a_i + a_j) - [j in P(i)] (q_i + q_j). If row i has one
// positive p, then exp(s_ip) a_i - q_i = -w_i negative_i / total_i, which needs no subtraction. clop_kernels/backends/tiled.py
// says why positives are subtracted here, inside the tile.
//
// Two sides. The only tiles are those with rows on the left and columns on the right, each visited once. Positives lie where a
// row's run on the other side is. L rows against R rows take 2 L R D flops forward and 6 L R D backward. One way (only left rows
// get results), a tile serves only its rows, and the backward pass takes 4 L R D.
//
// Flops: N^2 D forward, 3 N^2 D backward, and N^2 exponentials in the two passes together.
//
// Bytes: a tile of side T reads two blocks of T rows of zhat forward and four backward; backward it also reads and writes two
// blocks of grad. Everything else stays in the L1 and L2 caches. In float32 that is 8 T D bytes for T^2 D multiply-adds forward,
// and 32 T D bytes for 3 T^2 D multiply-adds backward.
//
// Memory: two further forms of zhat, and grad, (N, D) each, and T^2 numbers a thread, 0.2 MB.
//
// Order. Tiles are handed out in rounds. Round r has the tiles with i + j = r modulo an odd number of blocks (with two sides: the
// tiles with j - i = r, counted on each side), so no two tiles of a round share a block. Without sides, every second round hands
// out its tiles in reverse, so that two successive tiles of a block are always about one round apart. Sums of a block are added
// in the order of the rounds (Turns). The result is therefore the same bits for any number of threads.
#pragma once

#include "product.h"
#include "rows.h"

namespace clop::cpu {
namespace CLOP_LEVEL {

// A shift below every similarity. It is finite, so that no two infinities are subtracted.
template <class T>
constexpr T kNoShift = sizeof(T) == 8 ? T(-1e300) : T(-1e38);

// The side of a tile. S takes about 240 KB. Together with the panels of zhat that the tile reads, it stays in an L2 cache of 512
// KB.
template <class T>
int64_t tile_side(int64_t n_rows, int64_t asked_for) {
  constexpr int64_t kUnit = kPairColumns<T>, kFewestBlocks = 8;
  const int64_t largest = asked_for > 0 ? asked_for : sizeof(T) == 8 ? 168 : 240;
  const int64_t side = asked_for > 0 ? largest : n_rows / kFewestBlocks < largest ? n_rows / kFewestBlocks : largest;
  return round_up(side > 0 ? side : 1, kUnit);
}

// How rows are cut into blocks, and the order in which pairs of blocks (tasks, one tile each) are visited.
class Blocks {
 public:
  // n_left < 0 means one side: each block meets every other block and itself. Otherwise the blocks of the left side come first.
  Blocks(int64_t n_rows, int64_t n_left, int64_t side)
      : side(side),
        n_left(n_left < 0 ? 0 : (n_left + side - 1) / side),
        count(this->n_left + (n_rows - (n_left < 0 ? 0 : n_left) + side - 1) / side),
        n_rows_(n_rows),
        left_rows_(n_left),
        modulus_(n_left < 0                            ? count + 1 - count % 2
                 : this->n_left < count - this->n_left ? count - this->n_left
                                                       : this->n_left) {}

  int64_t begin(int64_t block) const { return block < n_left ? block * side : first_right() + (block - n_left) * side; }
  int64_t end(int64_t block) const {
    const int64_t end = begin(block) + side, last = block < n_left ? left_rows_ : n_rows_;
    return end < last ? end : last;
  }
  int64_t rows(int64_t block) const { return end(block) - begin(block); }
  bool has_sides() const { return left_rows_ >= 0; }

  int64_t n_tasks() const { return modulus_ * (has_sides() ? modulus_ : (modulus_ + 1) / 2); }

  struct Task {
    int64_t i, j, round;
  };

  // The blocks are padded: without sides to an odd number, with sides to equally many on both. False for a task of the padding.
  bool has(Task task) const { return task.j < count && (!has_sides() || task.i < n_left); }

  // The task of an index, with i <= j.
  Task task(int64_t index) const {
    if (has_sides()) {
      const int64_t i = index % modulus_, round = index / modulus_;
      return {i, n_left + (i + round) % modulus_, round};
    }
    const int64_t per_round = (modulus_ + 1) / 2, round = index / per_round;
    const int64_t distance = round % 2 == 0 ? index % per_round : per_round - 1 - index % per_round;
    const int64_t half = round * per_round % modulus_;  // 2 half = round, modulo modulus_
    const int64_t a = (half + distance) % modulus_, b = (half + modulus_ - distance) % modulus_;
    return {a < b ? a : b, a < b ? b : a, round};
  }

  // The number of tasks that a block has before its task of this round.
  int64_t turn(int64_t block, int64_t round) const {
    if (has_sides() && block < n_left) return n_below(count - n_left, block, round);
    if (has_sides()) return n_below(n_left, (block - n_left + modulus_ + 1 - round) % modulus_, round);
    return round - (modulus_ > count && round > (block + count) % modulus_ ? 1 : 0);
  }

  const int64_t side, n_left, count;

 private:
  int64_t first_right() const { return left_rows_ < 0 ? 0 : left_rows_; }

  // How many of the n <= modulus numbers from `first` on, taken modulo the modulus, are below `bound`.
  int64_t n_below(int64_t bound, int64_t first, int64_t n) const {
    const int64_t leg = n < modulus_ - first ? n : modulus_ - first, below = bound - first;
    return (below < 0 ? 0 : below < leg ? below : leg) + (n - leg < bound ? n - leg : bound);
  }

  int64_t n_rows_, left_rows_, modulus_;
};

// The rows, in the forms that the products read, and their positive runs. Positions past the last row are padding.
template <class T>
struct Rows {
  Rows(const Pairs& pairs, const T* zhat, const T* norms, bool with_panels)
      : n_rows(pairs.n_rows),
        n_results(pairs.n_results()),
        is_one_way(pairs.is_one_way),
        width(pairs.width),
        padded_width(round_up(width, kWidthColumns<T>)),
        blocks(n_rows, pairs.n_left, tile_side<T>(n_rows, pairs.tile_rows)),
        padding_of_left(pairs.n_left < 0 ? 0 : round_up(pairs.n_left, kPairColumns<T>) - pairs.n_left),
        padded_rows(round_up(n_rows + padding_of_left, kPairColumns<T>)),
        has_pairs(clop::has_pairs(pairs)),
        unshifted(fits_unshifted(pairs, norms)),
        scale(kLog2E / pairs.temperature),
        negatives_only(pairs.negatives_only),
        zhat(zhat),
        starts(padded_rows),
        ends(padded_rows),
        transposed(padded_rows * width),
        panels(with_panels ? padded_rows * padded_width : 0) {
    if (!has_pairs) return;
    for_ranges(blocks.count, 20.0 * blocks.side * width, pairs.n_threads, [&](int64_t first, int64_t last, int) {
      for (int64_t b = first; b < last; ++b) {
        const int64_t begin = blocks.begin(b), end = blocks.end(b);
        for (int64_t i = begin; i < end && i < n_results; ++i) {
          const RunOf<int64_t> run = run_of(pairs, i);
          starts[i] = int32_t(run.start), ends[i] = int32_t(run.end);
        }
        const bool is_columns = b >= blocks.n_left;  // left blocks are never columns of S; only M^T zhat_i reads their panels
        if (is_columns) pack_transposed<T>(begin, end, width, zhat, unshifted ? scale : 1, transposed + slot(b) * width);
        if (with_panels && (is_columns || !is_one_way)) pack_panels<T>(begin, end, width, zhat, panel_size(b), panels_of(b));
      }
    });
  }

  // The rows of a block, padded to whole panels of S.
  int64_t padded_block(int64_t block) const { return round_up(blocks.rows(block), kPairColumns<T>); }
  int64_t panel_size(int64_t block) const { return padded_block(block) * kWidthColumns<T>; }

  // Where a block begins in the padded forms. Both sides are padded.
  int64_t slot(int64_t block) const { return blocks.begin(block) + (block < blocks.n_left ? 0 : padding_of_left); }
  T* panels_of(int64_t block) { return panels + slot(block) * padded_width; }

  // Computes one panel of S, (rows of i, kPairColumns), in the tile of blocks i and j. `local` columns of the tile come before
  // it.
  //
  // Unshifted, S is small, and the transposed form of zhat is scaled beforehand. Otherwise the products are scaled here. Scaled
  // rows would round S_ij and S_ji differently by an ulp of S, which for S in the thousands is a visible part of 2^S.
  void similarities_of(int64_t i, int64_t j, int64_t local, T* s) {
    similarities<T>(blocks.rows(i), width, zhat + blocks.begin(i) * width, transposed + (slot(j) + local) * width, s);
    if (unshifted) return;
    const Vec<T> rounded = broadcast(T(scale)), rest = broadcast(T(scale - double(T(scale))));
    for (int64_t k = 0; k < blocks.rows(i) * kPairColumns<T>; k += kLanes<T>) {
      const Vec<T> product = load(s + k);
      store(s + k, product * rounded + product * rest);
    }
  }

  // Whether the tile holds positives, the diagonal or padding. The pairs of such a near tile need masks.
  bool is_masked(int64_t i, int64_t j) {
    return i == j || padded_block(j) > blocks.rows(j) ||
           (ends[blocks.end(i) - 1] > blocks.begin(j) && starts[blocks.begin(i)] < blocks.end(j));
  }

  const int64_t n_rows, n_results;
  const bool is_one_way;
  const int64_t width, padded_width;
  const Blocks blocks;
  const int64_t padding_of_left, padded_rows;
  const bool has_pairs;  // if false, no row can have a positive, and the prototype term stands alone
  const bool unshifted;
  const double scale;
  const bool negatives_only;
  const T* const zhat;
  Buffer<int32_t> starts, ends;
  Buffer<T> transposed, panels;

 private:
  // Whether max |zhat|^2 / tau, which bounds |s_ij|, is small enough. False if a norm is NaN, or if the norms are unknown.
  static bool fits_unshifted(const Pairs& pairs, const T* norms) {
    if (!pairs.normalize && norms == nullptr) return false;
    double largest = pairs.normalize ? 1 : 0;
    for (int64_t k = 0; !pairs.normalize && k < pairs.n_rows; ++k)
      if (!(double(norms[k]) <= largest)) largest = double(norms[k]);
    return largest * largest / pairs.temperature <= kLargestUnshiftedLogit<T>;
  }
};

// Masks for the pairs of row i with the kLanes columns from `column` on: the pairs that count, and the positives among them.
template <class T>
struct Masks {
  Vec<Int<T>> valid, positive;

  Masks(Rows<T>& rows, int64_t i, int64_t column) {
    // Positions relative to `column`, so that they fit into a lane for any N.
    const Vec<Int<T>> lane = lane_numbers<T>();
    const auto clamp = [&](int64_t position) {
      const int64_t x = position - column;
      return Int<T>(x < 0 ? 0 : x > kLanes<T> ? kLanes<T> : x);
    };
    const Vec<Int<T>> other = lane != Int<T>(i - column < 0 || i - column >= kLanes<T> ? kLanes<T> : i - column);
    valid = (lane < clamp(rows.n_rows)) & other;
    positive = (lane >= clamp(rows.starts[i])) & (lane < clamp(rows.ends[i])) & other;
    if (rows.negatives_only) {
      valid &= ~positive;
      positive ^= positive;
    }
  }
};

// ---- forward ---------------------------------------------------------------------------------------------------------

// Row statistics: the sum of 2^(S_ij - shift_i) over negatives, the same sum over positives, and the sum of the positives' S_ip.
template <class T>
struct Softmax {
  explicit Softmax(int64_t n_rows) : shift(n_rows), negative(n_rows), positive(n_rows), positive_logits(n_rows) {}
  Buffer<T> shift;
  Buffer<double> negative, positive, positive_logits;
};

// One thread's partial sums of the current tile: lane by lane for its rows, column by column for its columns.
template <class T>
struct TileSums {
  static constexpr int kL = kLanes<T>;
  static int64_t size(int64_t side) { return side * (3 * kL + 1 + 3 + 1); }

  TileSums(int64_t side, T* memory) {
    std::memset(memory, 0, size(side) * sizeof(T));
    const auto take = [&](int64_t n) { return memory += n, memory - n; };
    for (T*& sum : row) sum = take(side * kL);
    for (T*& sum : column) sum = take(side);
    row_shift = take(side);
    column_shift = take(side);
  }

  T *row[3], *column[3];  // negative, positive, positive_logits
  T *row_shift, *column_shift;
};

// Adds a panel of S to the tile's sums. Its rows are those of block i_block; its columns begin at position `column`, `local`
// columns into the tile.
template <class T, bool kMasked, bool kShifted, bool kOneWay>
void add_panel(Rows<T>& rows, int64_t i_block, int64_t column, int64_t local, const T* s, TileSums<T>& sums) {
  constexpr int kL = kLanes<T>, kP = kPairColumns<T>;
  const int64_t begin = rows.blocks.begin(i_block), count = rows.blocks.rows(i_block);
  Vec<T> column_sum[3][kPairVectors];
  for (int k = 0; k < 3; ++k)
    for (int v = 0; v < kPairVectors; ++v) column_sum[k][v] = Vec<T>{};
  for (int64_t i = 0; i < count; ++i) {
    Vec<T> row_sum[3] = {};
#pragma GCC unroll 4
    for (int v = 0; v < kPairVectors; ++v) {
      const Vec<T> logits = load(s + i * kP + v * kL);
      Vec<T> of_row, of_column;
      if (kShifted) {
        of_row = exp2_or_zero<T>(logits - sums.row_shift[i]);
        if (!kOneWay) of_column = exp2_or_zero<T>(logits - load(sums.column_shift + local + v * kL));
      } else {
        of_row = of_column = exp2<T>(logits);
      }
      if (kMasked) {
        const Masks<T> mask(rows, begin + i, column + v * kL);
        const Vec<Int<T>> negative = mask.valid & ~mask.positive;
        row_sum[0] += negative ? of_row : Vec<T>{};
        row_sum[1] += mask.positive ? of_row : Vec<T>{};
        row_sum[2] += mask.positive ? logits : Vec<T>{};
        if (kOneWay) continue;
        column_sum[0][v] += negative ? of_column : Vec<T>{};
        column_sum[1][v] += mask.positive ? of_column : Vec<T>{};
        column_sum[2][v] += mask.positive ? logits : Vec<T>{};
      } else {
        row_sum[0] += of_row;
        if (!kOneWay) column_sum[0][v] += of_column;
      }
    }
    for (int k = 0; k < (kMasked ? 3 : 1); ++k) {
      T* const sum = sums.row[k] + i * kL;
      store(sum, load(sum) + row_sum[k]);
    }
  }
  if (kOneWay) return;
  for (int k = 0; k < (kMasked ? 3 : 1); ++k)
    for (int v = 0; v < kPairVectors; ++v) store(sums.column[k] + local + v * kL, column_sum[k][v]);
}

// Writes the largest S of each row and column of a tile to row_shift and column_shift.
template <class T, bool kOneWay>
void find_shifts(Rows<T>& rows, int64_t i_block, int64_t j_block, const T* tile, TileSums<T>& sums) {
  constexpr int kL = kLanes<T>, kP = kPairColumns<T>;
  const int64_t begin = rows.blocks.begin(i_block), count = rows.blocks.rows(i_block), columns = rows.padded_block(j_block);
  const bool masked = rows.is_masked(i_block, j_block);
  const Vec<T> none = broadcast(kNoShift<T>);
  for (int64_t j = 0; j < columns; ++j) sums.column_shift[j] = kNoShift<T>;
  for (int64_t i = 0; i < count; ++i) {
    Vec<T> row_largest = none;
    for (int64_t j = 0; j < columns; j += kL) {
      Vec<T> logits = load(tile + j / kP * (count * kP) + i * kP + j % kP);
      if (masked) logits = Masks<T>(rows, begin + i, rows.blocks.begin(j_block) + j).valid ? logits : none;
      row_largest = maximum<T>(row_largest, logits);
      if (!kOneWay) store(sums.column_shift + j, maximum<T>(load(sums.column_shift + j), logits));
    }
    T largest = row_largest[0];
    for (int lane = 1; lane < kL; ++lane)
      if (!(row_largest[lane] <= largest) && largest == largest) largest = row_largest[lane];
    sums.row_shift[i] = largest;
  }
}

// Adds a tile's sums of one row to the row's statistics.
template <class T>
void merge(Softmax<T>& softmax, int64_t row, bool unshifted, T tile_shift, const double (&tile)[3]) {
  double keep = 1, scale = 1;
  if (!unshifted) {
    const T before = softmax.shift[row], shift = tile_shift <= before ? before : tile_shift;
    keep = __builtin_exp2(double(before) - double(shift));
    scale = __builtin_exp2(double(tile_shift) - double(shift));
    softmax.shift[row] = shift;
  }
  softmax.negative[row] = softmax.negative[row] * keep + tile[0] * scale;
  softmax.positive[row] = softmax.positive[row] * keep + tile[1] * scale;
  softmax.positive_logits[row] += tile[2];
}

// One tile of the forward pass: computes S, sums it, and adds the sums to the statistics of its rows and columns, each in its
// turn.
template <class T, bool kOneWay>
void softmax_tile(Rows<T>& rows, Blocks::Task task, Turns& turns, T* s, TileSums<T> sums, Softmax<T>& softmax) {
  constexpr int kL = kLanes<T>, kP = kPairColumns<T>;
  const Blocks& blocks = rows.blocks;
  const auto [i, j, round] = task;
  const int64_t count = blocks.rows(i), first = blocks.begin(j), columns = rows.padded_block(j);
  const bool masked = rows.is_masked(i, j);
  if (rows.unshifted) {
    for (int64_t local = 0; local < columns; local += kP) {
      rows.similarities_of(i, j, local, s);
      const auto add = masked ? add_panel<T, true, false, kOneWay> : add_panel<T, false, false, kOneWay>;
      add(rows, i, first + local, local, s, sums);
    }
  } else {
    for (int64_t local = 0; local < columns; local += kP) rows.similarities_of(i, j, local, s + local * count);
    find_shifts<T, kOneWay>(rows, i, j, s, sums);
    const auto add = masked ? add_panel<T, true, true, kOneWay> : add_panel<T, false, true, kOneWay>;
    for (int64_t local = 0; local < columns; local += kP) add(rows, i, first + local, local, s + local * count, sums);
  }

  turns.wait(i, blocks.turn(i, round));
  for (int64_t row = 0; row < count; ++row) {
    double tile[3];
    for (int k = 0; k < 3; ++k) tile[k] = sum_of_lanes<T>(load(sums.row[k] + row * kL));
    merge(softmax, blocks.begin(i) + row, rows.unshifted, sums.row_shift[row], tile);
  }
  turns.pass(i);
  if (kOneWay || i == j) return;
  turns.wait(j, blocks.turn(j, round));
  for (int64_t column = 0; column < blocks.rows(j); ++column) {
    const double tile[3] = {sums.column[0][column], sums.column[1][column], sums.column[2][column]};
    merge(softmax, first + column, rows.unshifted, sums.column_shift[column], tile);
  }
  turns.pass(j);
}

// Calls body(task, thread) for every tile, in the order of the rounds.
template <class T, class F>
void for_tiles(Rows<T>& rows, int n_threads, F&& body) {
  Counter counter;
  const Blocks& blocks = rows.blocks;
  for_each_thread(n_threads, [&](int thread) {
    for (int64_t index = counter.next(); index < blocks.n_tasks(); index = counter.next()) {
      const Blocks::Task task = blocks.task(index);
      if (blocks.has(task)) body(task, thread);
    }
  });
}

// Scratch of `size` numbers for each thread, on cache lines of its own.
template <class T>
struct Scratch {
  Scratch(int n_threads, int64_t size) : stride(round_up(size, 64 / sizeof(T))), memory(n_threads * stride) {}
  T* of(int thread) { return memory + thread * stride; }
  int64_t stride;
  Buffer<T> memory;
};

// The forward pass over pairs: the statistics of the rows that get results.
template <class T>
void softmax_of_pairs(Rows<T>& rows, int n_threads, Softmax<T>& softmax) {
  for (int64_t row = 0; row < rows.n_results; ++row) {
    softmax.shift[row] = rows.unshifted ? 0 : kNoShift<T>;
    softmax.negative[row] = softmax.positive[row] = softmax.positive_logits[row] = 0;
  }
  if (!rows.has_pairs) return;
  const int64_t side = rows.blocks.side, columns = rows.unshifted ? int64_t(kPairColumns<T>) : side;
  n_threads = threads_for(double(rows.n_rows) * rows.n_rows * (rows.width + 16), n_threads);
  Scratch<T> tiles(n_threads, side * columns), sums(n_threads, TileSums<T>::size(side));
  Turns turns(rows.blocks.count);
  const auto add_tile = rows.is_one_way ? softmax_tile<T, true> : softmax_tile<T, false>;
  for_tiles(rows, n_threads, [&](Blocks::Task task, int thread) {
    add_tile(rows, task, turns, tiles.of(thread), TileSums<T>(side, sums.of(thread)), softmax);
  });
}

// ---- backward --------------------------------------------------------------------------------------------------------

// The coefficients that M is made of: a, b, c and the shift of every row, padded with zeros. For a positive pair M is 2^S (b_i +
// b_j) - (c_i + c_j), for any other pair 2^S (a_i + a_j).
template <class T>
struct Coefficients {
  explicit Coefficients(int64_t padded_rows) : a(padded_rows), b(padded_rows), c(padded_rows), shift(padded_rows) {
    for (int64_t row = 0; row < padded_rows; ++row) a[row] = b[row] = c[row] = shift[row] = 0;
  }
  Buffer<T> a, b, c, shift;
};

// Turns a panel of S into a panel of M, in place.
template <class T, bool kMasked, bool kShifted>
void weigh_panel(Rows<T>& rows, int64_t i_block, int64_t column, Coefficients<T>& coefficients, T* s) {
  constexpr int kL = kLanes<T>, kP = kPairColumns<T>;
  const int64_t begin = rows.blocks.begin(i_block), count = rows.blocks.rows(i_block);
  Vec<T> a[kPairVectors], b[kPairVectors], c[kPairVectors], shift[kPairVectors];
  for (int v = 0; v < kPairVectors; ++v) {
    a[v] = load(coefficients.a + column + v * kL);
    if (kMasked) b[v] = load(coefficients.b + column + v * kL), c[v] = load(coefficients.c + column + v * kL);
    if (kShifted) shift[v] = load(coefficients.shift + column + v * kL);
  }
  for (int64_t i = 0; i < count; ++i) {
    const int64_t row = begin + i;
#pragma GCC unroll 4
    for (int v = 0; v < kPairVectors; ++v) {
      T* const at = s + i * kP + v * kL;
      const Vec<T> logits = load(at);
      Vec<T> m, of_positive;
      if (kShifted) {
        const Vec<T> of_row = exp2_or_zero<T>(logits - coefficients.shift[row]), of_column = exp2_or_zero<T>(logits - shift[v]);
        m = of_row * coefficients.a[row] + of_column * a[v];
        if (kMasked) of_positive = of_row * coefficients.b[row] + of_column * b[v];
      } else {
        const Vec<T> power = exp2<T>(logits);
        m = power * (coefficients.a[row] + a[v]);
        if (kMasked) of_positive = power * (coefficients.b[row] + b[v]);
      }
      if (kMasked) {
        const Masks<T> mask(rows, row, column + v * kL);
        m = mask.positive ? of_positive - (coefficients.c[row] + c[v]) : m;
        m = mask.valid ? m : Vec<T>{};
      }
      store(at, m);
    }
  }
}

// One tile of the backward pass: computes S, turns it into M, and adds M zhat_j and M^T zhat_i to the gradient, each in its turn.
template <class T>
void gradient_tile(Rows<T>& rows, Blocks::Task task, Turns& turns, Coefficients<T>& coefficients, T* m, T* grad) {
  constexpr int kP = kPairColumns<T>;
  const Blocks& blocks = rows.blocks;
  const auto [i, j, round] = task;
  const int64_t count = blocks.rows(i), columns = rows.padded_block(j), m_panel = count * kP;
  const bool masked = rows.is_masked(i, j);
  const auto weigh = rows.unshifted ? (masked ? weigh_panel<T, true, false> : weigh_panel<T, false, false>)
                                    : (masked ? weigh_panel<T, true, true> : weigh_panel<T, false, true>);
  for (int64_t local = 0; local < columns; local += kP) {
    T* const panel = m + local * count;
    rows.similarities_of(i, j, local, panel);
    weigh(rows, i, blocks.begin(j) + local, coefficients, panel);
  }

  const int64_t width = rows.padded_width;
  turns.wait(i, blocks.turn(i, round));
  add_to_rows<T>(count, columns / kP, m_panel, m, width, rows.panel_size(j), rows.panels_of(j), grad + blocks.begin(i) * width);
  turns.pass(i);
  if (rows.is_one_way || i == j) return;
  turns.wait(j, blocks.turn(j, round));
  add_to_columns<T>(count, blocks.rows(j), m_panel, m, width, rows.panel_size(i), rows.panels_of(i),
                    grad + blocks.begin(j) * width);
  turns.pass(j);
}

// The backward pass over pairs: grad_i = sum_{j != i} M_ij zhat_j, (n_results, padded_width).
template <class T>
void gradient_of_pairs(Rows<T>& rows, int n_threads, Coefficients<T>& coefficients, T* grad) {
  if (rows.n_rows == 0) return;
  std::memset(grad, 0, rows.n_results * rows.padded_width * sizeof(T));
  if (!rows.has_pairs) return;
  const int64_t side = rows.blocks.side;
  n_threads = threads_for(3.0 * rows.n_rows * rows.n_rows * (rows.width + 8), n_threads);
  Scratch<T> tiles(n_threads, side * side);
  Turns turns(rows.blocks.count);
  for_tiles(rows, n_threads,
            [&](Blocks::Task task, int thread) { gradient_tile(rows, task, turns, coefficients, tiles.of(thread), grad); });
}

}  // namespace CLOP_LEVEL
}  // namespace clop::cpu
