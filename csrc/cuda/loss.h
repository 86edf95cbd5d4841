// What the two passes of the CUDA loss are given, for code that knows neither torch nor CUDA's headers.
//
// Tensors come as pointers to the memory of one GPU, contiguous where nothing else is said. N rows, D wide; B = N / n_views
// instances; K prototypes. A position is an index into the rows as sorted by group, and before that by side; see
// clop_kernels/groups.py. Rows of zhat are `pitch` numbers apart: unit_rows in clop_kernels/backends/contract.py.
#pragma once

#include <cstdint>

struct CUstream_st;  // what cudaStream_t points to

namespace clop::cuda {

enum class Dtype { float32, float16, bfloat16 };

// In the order of DISTANCES and REDUCTIONS in clop_kernels/backends/contract.py.
enum class Distance { cosine, euclidean, manhattan };
enum class Reduction { mean, sum, none };

// How the columns of a pass over pairs are split, so that few rows make enough blocks for all processors: a block walks over n_tiles
// tiles of them at most, and of_left blocks share the same left rows, of_right the same right rows. Without sides all rows are left.
struct Split {
  int n_tiles = 0, of_left = 1, of_right = 1;
};

struct Loss {
  int64_t n_rows, width, n_views, n_classes;
  Dtype dtype;              // of the embeddings and of their gradient
  Dtype compute_dtype;      // what the rows zhat are rounded to
  int64_t pitch;            // numbers from a row of zhat to the next, a multiple of 16 bytes; past D none is read
  bool is_tf32;             // float32 zhat: products of operands rounded to TF32, else as accurate as float32's
  const int32_t* groups;    // (3, N): order, starts, ends. Null: the views of an instance are a group, with sides one view a side
  const int64_t* labels;    // (B,), or null
  const float* prototypes;  // (K, D), or null
  const float* temperature;  // (), or null: scale and scale_rest hold log2(e) / temperature, as the sum of two floats
  float scale, scale_rest;
  float prototype_weight;
  Distance distance;
  Reduction reduction;
  int64_t n_left = -1;          // rows on the left side, the first ones, compared with those on the right only; -1: no sides
  bool normalize = true;        // zhat is z / |z|, else z
  bool negatives_only = false;  // positives are no pairs, and the term of a row is its lse; without any pair it is no anchor
  bool pairs_alone = false;     // a pass ends with its sums over pairs, with sides of rows on the left alone: one way
  Split split = {};             // of a pass over pairs; its launch fills it in
};

struct Grouping {
  int64_t n_instances, n_views;
  int64_t n_left;         // as in Loss
  const int64_t* labels;  // (B,)
  int32_t* groups;        // (3, N): order, starts, ends
};

struct Forward : Loss {
  const void* embeddings;                 // (N, D) dtype; row v * B + b is view v of instance b
  int64_t stride_z_row, stride_z_column;  // in elements
  // Results; Residuals in clop_kernels/backends/contract.py says what they are. By position, but for `loss`. A pass over pairs alone
  // is given zhat, and the others are null.
  float* loss;                              // (), or with Reduction::none (N,), by row
  void* zhat;                               // (N, D) compute_dtype
  float *norms, *shift, *inverse_total, *negative;  // (N,)
  float* counts;                            // (2,)
  // Scratch.
  float* distances;      // (N,)
  float* partial_sums;   // (kPartialSums, n_row_blocks), most_blocks(N) at most
  unsigned* n_finished;  // (n_counters(N),): row blocks of the pass over pairs that are done, and of each the blocks that share it
                         // and are done; set to zero by the prologue
  float* split_sums;     // split_floats(): what the blocks that share rows leave for the last of them
  float* statistics;     // (4, N), as Panel leaves them: what wide rows come with, or all that a pass over pairs alone leaves
};

constexpr int kPartialSums =
    5;  // of contrastive terms, of distances, and how many anchors, labelled rows, labels without prototype

struct Backward : Loss {
  const float* upstream;  // (), the gradient of the loss; with Reduction::none the unit that `weights` are in
  const float* weights;   // (N,) by position, at most 1, or null: 1 each
  const void* zhat;       // as Forward left them
  const float *norms, *shift, *inverse_total, *negative, *counts;
  const float* given;  // (4, N): a, b, c, shift, in a pass over pairs alone; all above is null there, but for zhat
  // Results. Null in a pass over pairs alone.
  void* grad_z;             // (N, D) dtype, by row
  float* grad_temperature;  // (), or null
  // Scratch.
  float* coefficients;   // (6, n_padded): Coefficients in gradient.cuh
  int64_t n_padded;      // padded_rows(N)
  float* partial_sums;   // (n_row_blocks,), most_blocks(N) at most
  unsigned* n_finished;  // as in Forward; set to zero by coefficients_kernel
  float* split_sums;     // as in Forward
  float* sums;           // (N, D): sum_j M_ij zhat_j by position; of wide rows, overwritten, or the result of pairs alone
};

// A rectangle of the similarities of wide rows; see wide.cuh.
struct Panel : Loss {
  const float* products;  // (n_panel_rows, n_panel_columns): zhat_i . zhat_j
  int64_t first_row, first_column, n_panel_rows, n_panel_columns;
  float* statistics;    // forward, (4, N) by position: RowSums in softmax.cuh; added to
  float* coefficients;  // backward: as in Backward, with n_padded
  int64_t n_padded;
  void* pairs;  // backward, (n_panel_rows, n_panel_columns) compute_dtype: M
};

struct PrototypeGradient : Loss {
  const float *upstream, *weights;  // as in Backward
  const void* zhat;                 // as Forward left it, and counts
  const float* counts;
  const int64_t* by_class;  // (N,), positions sorted by label
  const int64_t* bounds;    // (K + 1,): class k is by_class[bounds[k]:bounds[k + 1]]
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
int64_t split_floats(const Forward& pass, int64_t n_processors);
int64_t split_floats(const Backward& pass, int64_t n_processors);

// These launch a pass, or for wide rows a part of one. They return a cudaError_t: 0, or why a kernel could not be launched.
int group(const Grouping& grouping, CUstream_st* stream);
int forward(const Forward& pass, int64_t n_processors, CUstream_st* stream);
int backward(const Backward& pass, int64_t n_processors, CUstream_st* stream);
int pair_softmax(const Forward& pass, int64_t n_processors, CUstream_st* stream);
int prototype_gradient(const PrototypeGradient& pass, CUstream_st* stream);

int panel_softmax(const Panel& panel, CUstream_st* stream);
int panel_loss(const Forward& pass, CUstream_st* stream);
int coefficients(const Backward& pass, CUstream_st* stream);
int panel_pairs(const Panel& panel, CUstream_st* stream);
int panel_finish(const Backward& pass, CUstream_st* stream);

}  // namespace clop::cuda
