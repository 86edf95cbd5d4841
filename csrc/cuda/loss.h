// The parameters of each pass of the CUDA loss. This header needs neither torch nor CUDA's headers.
//
// Tensors come as pointers to the memory of one GPU; they are contiguous unless a comment says otherwise. There are N rows of
// width D, B = N / n_views instances and K prototypes. A position is an index into the rows sorted by side and then by group; see
// clop_kernels/groups.py. Rows of zhat are `pitch` numbers apart: see unit_rows in clop_kernels/backends/contract.py.
#pragma once

#include <cstdint>

#include "../common/constants.h"
#include "../common/options.h"

struct CUstream_st;  // what cudaStream_t points to

namespace clop::cuda {

// Either a number that the host knows, or a float32 number in GPU memory, which the host does not read.
struct Number {
  float value;
  const float* tensor;  // if not null, it replaces `value`
};

// log2(e) / temperature as the sum of two floats. A single float would carry the same rounding error into every similarity, as if
// the temperature were different.
struct LogitScale {
  float value, rest;
};

CLOP_INLINE LogitScale logit_scale(double temperature) {
  const double precise = kLog2E / temperature;
  const float value = float(precise);
  return {value, float(precise - double(value))};
}

// LossOptions in clop_kernels/backends/contract.py explains each option. is_tf32: products of float32 rows round their operands
// to TF32; otherwise products are as accurate as float32.
struct Options {
  CLOP_OPTIONS(CLOP_FIELD)
  CLOP_CUDA_SETTINGS(CLOP_FIELD)
  LogitScale scale;  // of the temperature, unless that is a tensor
};

// How the columns of a pass over pairs are split, so that even few rows make enough blocks for all processors. A block walks over
// at most n_tiles tiles of columns. of_left blocks share the same left rows, of_right blocks the same right rows. Without sides
// all rows are left.
struct Split {
  int n_tiles = 0, of_left = 1, of_right = 1;
};

// Which rows are compared: everything that the passes over pairs need to know about a loss.
struct Pairs : Options {
  int64_t n_rows, width;
  int64_t pitch;          // numbers from one row of zhat to the next, a multiple of 16 bytes; numbers past D are never read
  void* zhat;             // (N, D) compute_dtype, by position; only the prologue writes it
  const int32_t* groups;  // (3, N): order, starts, ends. Null: the views of an instance form a group, with sides one view a side
  bool is_one_way;        // with two sides: only the left rows get results
  Split split;            // for a pass over pairs; its launch fills it in
};

// The labels and prototypes of a loss.
struct Classes {
  const int64_t* labels;    // (B,), or null; a negative label means unlabelled
  const float* prototypes;  // (K, D), or null
  int64_t n_classes;        // K, or 0
};

// Parameters of groups_kernel.
struct Grouping : Options {
  int64_t n_instances;
  const int64_t* labels;  // (B,)
  int32_t* groups;        // (3, N): order, starts, ends
};

// Parameters of the prologue. The values of `groups` are trusted; labels are clamped to the existing prototypes.
struct Prologue : Pairs, Classes {
  const void* embeddings;             // (N, D) dtype; row v * B + b is view v of instance b
  int64_t row_stride, column_stride;  // in elements
  Dtype dtype;
  // Results by position, (N,) each, beside zhat.
  float* norms;          // not clamped
  float* distances;      // to the prototypes: 0 for a row without a label, NaN for a row that is not finite
  unsigned* n_finished;  // (n_counters(N),) or null; set to zero for the launch that follows
};

// Parameters of pair_softmax, the separate forward pass over pairs.
struct PairSoftmax : Pairs {
  float* statistics;  // (4, N) by position, the result; for wide rows the panels have made it
  // Scratch.
  unsigned* n_finished;  // (n_counters(N),): the number of finished blocks of rows; then, for each block of rows, the number of
                         // finished blocks among those that share it. Zero before the launch
  float* split_sums;     // split_floats() numbers: the sums that blocks which share rows leave for the last of them
};

// The forward pass of the loss: the same sums, and the loss. Residuals in clop_kernels/backends/contract.py explains the results.
struct Forward : PairSoftmax, Classes {
  float* loss;                              // (), or with Reduction::none (N,), by row. Null: only the sums are wanted
  float *shift, *inverse_total, *negative;  // (N,) by position
  float* counts;                            // (2,)
  const float* distances;                   // (N,), the prologue's
  // Scratch.
  float* partial_sums;  // (kPartialSums, n_row_blocks), most_blocks(N) at most
};

// Sums of contrastive terms and of distances; numbers of anchors, of labelled rows, and of labels without a prototype.
constexpr int kPartialSums = 5;

// Parameters of pair_gradient, the separate backward pass over pairs.
struct PairGradient : Pairs {
  const float* given;  // (4, N): a, b, c, shift. Null: the first launch makes them from Forward's results
  float* sums;         // (N, D) by position: sum_j M_ij zhat_j, the result; for wide rows the input of the end of the pass
  // Scratch.
  float* coefficients;   // (6, n_padded): LaidOut in gradient.cuh
  int64_t n_padded;      // padded_rows(N)
  unsigned* n_finished;  // as in PairSoftmax, but the launch of the coefficients sets it to zero; or null
  float* split_sums;     // as in PairSoftmax
};

// The backward pass of the loss: the same sums, and the gradient of the raw rows.
struct Backward : PairGradient, Classes {
  const float* upstream;  // (), the gradient of the loss; with Reduction::none the unit of `weights`
  const float* weights;   // (N,) by position, at most 1; null means 1 for every row
  const float *norms, *shift, *inverse_total, *negative, *counts;  // as Prologue and Forward left them
  Dtype dtype;                                                     // of the embeddings and of their gradient
  void* grad_embeddings;                                           // (N, D) dtype, by row. Null: only the sums are wanted
  float* grad_temperature;                                         // (), or null
  // Scratch.
  float* partial_sums;  // (n_row_blocks,), most_blocks(N) at most
};

// A panel: a rectangle of the similarities of wide rows; see wide.cuh.
struct Panel : Pairs {
  const float* products;  // (n_panel_rows, n_panel_columns): zhat_i . zhat_j
  int64_t first_row, first_column, n_panel_rows, n_panel_columns;
  float* statistics;    // forward, (4, N) by position: RowSums in softmax.cuh; the panel is added to it
  bool adds_scale;      // make positive_logits the sums of S_ip itself, as pair_softmax returns them
  float* coefficients;  // backward: as in PairGradient, with n_padded
  int64_t n_padded;
  void* pairs;  // backward, (n_panel_rows, n_panel_columns) compute_dtype: M
};

// Parameters of the prototypes' gradient.
struct PrototypeGradient : Pairs, Classes {
  const float *upstream, *weights, *counts;  // as in Backward
  const int64_t* by_class;                   // (N,), positions sorted by label
  const int64_t* bounds;                     // (K + 1,): class k is by_class[bounds[k]:bounds[k + 1]]
  int64_t n_parts;
  float* partial_gradients;  // (n_parts, K, D), the result: its sum over n_parts is the gradient
};

// The length of each coefficient's row. It leaves room for whole tiles of 128 from any position on, because the first tile of the
// right side begins at n_left.
constexpr int64_t padded_rows(int64_t n_rows) { return (n_rows + 255) / 128 * 128; }

// Whether rows are too wide to stay on chip as operands of both products. Wide rows go by panels.
constexpr bool is_wide(int64_t width, Dtype compute_dtype) { return width > (compute_dtype == Dtype::float32 ? 128 : 256); }

// An upper bound on the blocks of rows of a launch with partial sums. The smallest blocks have 8 rows; blocks of kBlockRows are
// fewer, even with the blocks of each side apart.
constexpr int64_t most_blocks(int64_t n_rows) { return (n_rows + 15) / 8; }

// Rows of a block in the passes over pairs, and the length of n_finished: one counter for all, and one for each block of rows of
// two sides.
constexpr int kBlockRows = 128, kMoreCounters = 3;
constexpr int64_t n_counters(int64_t n_rows) { return n_rows / kBlockRows + kMoreCounters; }

// The length of split_sums. If it is 0, split_sums may be null.
int64_t split_floats(const PairSoftmax& pass, int64_t n_processors);
int64_t split_floats(const PairGradient& pass, int64_t n_processors);

// Each function launches a pass, or for wide rows a part of one, and returns a cudaError_t: 0, or why a kernel could not be
// launched. `forward` comes after `prologue`.
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

// Returns 0, or the cudaError_t that says why the kernels have no code for the current device.
int find_prologue();

}  // namespace clop::cuda
