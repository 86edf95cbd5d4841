// What the passes of the CUDA loss are given, for code that knows neither torch nor CUDA's headers.
//
// Tensors come as pointers to the memory of one GPU, contiguous where nothing else is said. N rows, D wide; B = N / n_views
// instances; K prototypes. A position is an index into the rows as sorted by group, and before that by side; see
// clop_kernels/groups.py. Rows of zhat are `pitch` numbers apart: unit_rows in clop_kernels/backends/contract.py.
#pragma once

#include <cstdint>

#include "../common/constants.h"
#include "../common/options.h"

struct CUstream_st;  // what cudaStream_t points to

namespace clop::cuda {

// A number that the host knows, or one in the memory of the GPU, float32, that the host does not read.
struct Number {
  float value;
  const float* tensor;  // or null
};

// log2(e) / temperature as the sum of two floats. One alone would be off by its rounding in every similarity alike, as if the
// temperature were another.
struct LogitScale {
  float value, rest;
};

CLOP_INLINE LogitScale logit_scale(double temperature) {
  const double precise = kLog2E / temperature;
  const float value = float(precise);
  return {value, float(precise - double(value))};
}

// What each option means: LossOptions in clop_kernels/backends/contract.py. is_tf32: products of float32 are of operands rounded to
// TF32, else as accurate as float32's.
struct Options {
  CLOP_OPTIONS(CLOP_FIELD)
  CLOP_CUDA_SETTINGS(CLOP_FIELD)
  LogitScale scale;  // of the temperature, where that is no tensor
};

// How the columns of a pass over pairs are split, so that few rows make enough blocks for all processors: a block walks over n_tiles
// tiles of them at most, and of_left blocks share the same left rows, of_right the same right rows. Without sides all rows are left.
struct Split {
  int n_tiles = 0, of_left = 1, of_right = 1;
};

// Which rows are compared, and how: what everything that looks at pairs needs to know.
struct Pairs : Options {
  int64_t n_rows, width;
  int64_t pitch;          // numbers from a row of zhat to the next, a multiple of 16 bytes; past D none is read
  void* zhat;             // (N, D) compute_dtype, by position; written by the prologue alone
  const int32_t* groups;  // (3, N): order, starts, ends. Null: the views of an instance are a group, with sides one view a side
  bool is_one_way;        // of two sides only the left one gets results
  Split split;            // of a pass over pairs; its launch fills it in
};

// What labels and prototypes add to a loss.
struct Classes {
  const int64_t* labels;    // (B,), negative: unlabelled; or null
  const float* prototypes;  // (K, D), or null
  int64_t n_classes;        // K, or 0
};

struct Grouping : Options {
  int64_t n_instances;
  const int64_t* labels;  // (B,)
  int32_t* groups;        // (3, N): order, starts, ends
};

// Values of `groups` are trusted; labels are cut to the prototypes that there are.
struct Prologue : Pairs, Classes {
  const void* embeddings;             // (N, D) dtype; row v * B + b is view v of instance b
  int64_t row_stride, column_stride;  // in elements
  Dtype dtype;
  // Results, (N,) by position, beside zhat.
  float* norms;          // not clamped
  float* distances;      // to the prototypes: 0 for a row without label, NaN for one that is not finite
  unsigned* n_finished;  // (n_counters(N),), set to zero, for the launch that follows; or null
};

struct PairSoftmax : Pairs {
  float* statistics;  // (4, N) by position, the result; with wide rows what Panel leaves
  // Scratch.
  unsigned* n_finished;  // (n_counters(N),): row blocks of the pass over pairs that are done, and of each the blocks that share it
                         // and are done; zero before the launch
  float* split_sums;     // split_floats(): what the blocks that share rows leave for the last of them
};

// The same sums, and from them the loss. Results: Residuals in clop_kernels/backends/contract.py says what they are.
struct Forward : PairSoftmax, Classes {
  float* loss;                              // (), or with Reduction::none (N,), by row. Null: the sums are all
  float *shift, *inverse_total, *negative;  // (N,) by position
  float* counts;                            // (2,)
  const float* distances;                   // (N,), the prologue's
  // Scratch.
  float* partial_sums;  // (kPartialSums, n_row_blocks), most_blocks(N) at most
};

constexpr int kPartialSums =
    5;  // of contrastive terms, of distances, and how many anchors, labelled rows, labels without prototype

struct PairGradient : Pairs {
  const float* given;  // (4, N): a, b, c, shift; null where the launch makes them from what Forward left
  float* sums;         // (N, D) by position: sum_j M_ij zhat_j, the result; with wide rows what the end of the pass is given
  // Scratch.
  float* coefficients;   // (6, n_padded): LaidOut in gradient.cuh
  int64_t n_padded;      // padded_rows(N)
  unsigned* n_finished;  // as in PairSoftmax, but that the launch of the coefficients sets it to zero; or null
  float* split_sums;     // as in PairSoftmax
};

// The same sums, and from them the gradient of the raw rows.
struct Backward : PairGradient, Classes {
  const float* upstream;  // (), the gradient of the loss; with Reduction::none the unit that `weights` are in
  const float* weights;   // (N,) by position, at most 1, or null: 1 each
  const float *norms, *shift, *inverse_total, *negative, *counts;  // as Prologue and Forward left them
  Dtype dtype;                                                     // of the embeddings and of their gradient
  void* grad_embeddings;    // (N, D) dtype, by row. Null: the sums are all
  float* grad_temperature;  // (), or null
  // Scratch.
  float* partial_sums;  // (n_row_blocks,), most_blocks(N) at most
};

// A rectangle of the similarities of wide rows; see wide.cuh.
struct Panel : Pairs {
  const float* products;  // (n_panel_rows, n_panel_columns): zhat_i . zhat_j
  int64_t first_row, first_column, n_panel_rows, n_panel_columns;
  float* statistics;          // forward, (4, N) by position: RowSums in softmax.cuh; added to
  bool adds_scale;            // whether positive_logits become sums of S_ip itself, as in a pass over pairs alone
  float* coefficients;        // backward: as in PairGradient, with n_padded
  int64_t n_padded;
  void* pairs;  // backward, (n_panel_rows, n_panel_columns) compute_dtype: M
};

struct PrototypeGradient : Pairs, Classes {
  const float *upstream, *weights, *counts;  // as in Backward
  const int64_t* by_class;                   // (N,), positions sorted by label
  const int64_t* bounds;                     // (K + 1,): class k is by_class[bounds[k]:bounds[k + 1]]
  int64_t n_parts;
  float* partial_gradients;  // (n_parts, K, D), the result as so many summands
};

// Rows of the coefficients: whole tiles of 128 from any row on, for with sides a tile begins where its side does.
constexpr int64_t padded_rows(int64_t n_rows) { return (n_rows + 255) / 128 * 128; }

// Whether the rows are too wide for the passes over pairs: more than stay on chip as operands of both products.
constexpr bool is_wide(int64_t width, Dtype compute_dtype) { return width > (compute_dtype == Dtype::float32 ? 128 : 256); }

// How many blocks of rows a launch with partial sums has at most: of 8 rows; of kBlockRows, those of each side apart, they are
// fewer.
constexpr int64_t most_blocks(int64_t n_rows) { return (n_rows + 15) / 8; }

// Rows of a block of the passes over pairs, and how many numbers n_finished is: one, and one for each block of rows of two sides.
constexpr int kBlockRows = 128, kMoreCounters = 3;
constexpr int64_t n_counters(int64_t n_rows) { return n_rows / kBlockRows + kMoreCounters; }

// How many numbers split_sums is; 0: null will do.
int64_t split_floats(const PairSoftmax& pass, int64_t n_processors);
int64_t split_floats(const PairGradient& pass, int64_t n_processors);

// These launch a pass, or for wide rows a part of one. They return a cudaError_t: 0, or why a kernel could not be launched. `forward`
// comes after `prologue`.
int group(const Grouping& grouping, CUstream_st* stream);
int prologue(const Prologue& pass, CUstream_st* stream);
int forward(const Forward& pass, int64_t n_processors, CUstream_st* stream);
int backward(const Backward& pass, int64_t n_processors, CUstream_st* stream);
int prototype_gradient(const PrototypeGradient& pass, CUstream_st* stream);

int pair_softmax(const PairSoftmax& pass, int64_t n_processors, CUstream_st* stream);
int pair_gradient(const PairGradient& pass, int64_t n_processors, CUstream_st* stream);

int panel_softmax(const Panel& panel, CUstream_st* stream);
int panel_loss(const Forward& pass, CUstream_st* stream);
int coefficients(const Backward& pass, CUstream_st* stream);
int pair_coefficients(const PairGradient& pass, CUstream_st* stream);
int panel_pairs(const Panel& panel, CUstream_st* stream);
int panel_finish(const Backward& pass, CUstream_st* stream);

// 0, or why the kernels have no code for the current device, a cudaError_t.
int find_prologue();

}  // namespace clop::cuda
