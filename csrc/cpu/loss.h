// The parameters of each pass of the CPU loss, and the table of SIMD levels that compute the passes. This header does not use
// torch.
//
// Tensors come as pointers. There are N rows of width D, B = N / n_views instances and K prototypes. T is double if compute_dtype
// is Dtype::float64, else float. A position is an index into the rows sorted by group; see clop_kernels/groups.py.
#pragma once

#include <cstdint>

#include "../common/options.h"

namespace clop::cpu {

using Number = double;

// LossOptions in clop_kernels/backends/contract.py explains each option.
struct Options {
  CLOP_OPTIONS(CLOP_FIELD)
  CLOP_CPU_SETTINGS(CLOP_FIELD)  // tile_rows: the side of a tile, rounded up to whole panels; 0 lets the kernels choose
};

// Which rows are compared: everything that the passes over pairs need to know about a loss.
struct Pairs : Options {
  int64_t n_rows, width;
  const int32_t* groups;  // (3, N): order, starts, ends. Null: the views of an instance form a group, with sides one view a side
  bool is_one_way;        // with two sides: only the left rows get results

  int64_t n_results() const { return is_one_way ? n_left : n_rows; }
};

struct Loss : Pairs {
  Dtype dtype;             // of the embeddings and of their gradient
  const int64_t* labels;   // (B,), or null
  const void* prototypes;  // (K, D) T, or null
  int64_t n_classes;       // K
};

struct Forward : Loss {
  const void* embeddings;
  int64_t row_stride, column_stride;  // in elements
  // Results, explained by Residuals in clop_kernels/backends/contract.py. Rows are in the order of their positions.
  void* loss;                                      // T, () or with Reduction::none (N,), in the order of the embeddings
  void* zhat;                                      // (N, D) compute_dtype
  void *norms, *shift, *inverse_total, *negative;  // (N,) T
  void* counts;                                    // (2,) T
};

struct Backward : Loss {
  const void* grad_loss;                                                 // T, () or (N,)
  const void *zhat, *norms, *shift, *inverse_total, *negative, *counts;  // as Forward left them
  // Results. A null pointer means that this gradient was not asked for.
  void* grad_embeddings;   // (N, D) dtype, contiguous
  void* grad_temperature;  // () T
  void* grad_prototypes;   // (K, D) T
};

// The separate passes over pairs. Rows are in the order of their positions. There are M rows; the first R, n_results(), get
// results.
struct PairSoftmax : Pairs {
  const void* zhat;  // (M, D) compute_dtype
  // Results, (R,) T each, explained by Softmax in clop_kernels/backends/contract.py.
  void *shift, *negative, *positive, *positive_logits;
};

struct PairGradient : Pairs {
  const void* zhat;          // (M, D) compute_dtype
  const void* coefficients;  // (4, M) T; Coefficients in clop_kernels/backends/contract.py
  void* grad;                // (R, D) T, the result
};

// The functions of one SIMD level, that is, of one compilation of level.cpp.
struct Level {
  const char* name;
  void (*forward)(const Forward&);
  void (*backward)(const Backward&);
  void (*pair_softmax)(const PairSoftmax&);
  void (*pair_gradient)(const PairGradient&);
  void (*exp2)(Dtype, int64_t n, const void* x, void* result);  // float32 or float64; a test measures its accuracy
};

namespace portable {
extern const Level kLevel;
}
#if defined(__x86_64__)
namespace avx2 {
extern const Level kLevel;
}
namespace avx512 {
extern const Level kLevel;
}
#endif

}  // namespace clop::cpu
