// What the passes of the loss are given, and the SIMD levels that compute them. Knows no torch.
//
// Tensors come as pointers. N rows, D wide; B = N / n_views instances; K prototypes. T is double where compute_dtype is
// Dtype::float64, else float. "Position" is an index into the rows as sorted by group; see clop_kernels/groups.py.
#pragma once

#include <cstdint>

namespace clop::cpu {

enum class Dtype { float64, float32, float16, bfloat16 };

// In the order of DISTANCES and REDUCTIONS in clop_kernels/backends/contract.py.
enum class Distance { cosine, euclidean, manhattan };
enum class Reduction { mean, sum, none };

// Which rows are compared, and how: what the passes over pairs need to know of a loss.
struct Pairs {
  int64_t n_rows, width, n_views;
  Dtype compute_dtype;    // what the rows zhat are rounded to
  const int32_t* groups;  // (3, N): order, starts, ends. Null: the views of an instance are a group, one view a side if there are
  double temperature;
  bool normalize;       // whether zhat is z / max(|z|, kEps), or z itself
  int64_t n_left;       // rows of the left side, which come first and are compared with the others only; -1: there are no sides
  bool one_way;         // of two sides only the left one gets results
  bool negatives_only;  // positives are no pairs, and a row's term is its log-sum-exp
  int64_t tile_rows;    // the side of a tile, rounded up to what the kernels can take; 0: theirs to choose
  int n_threads;

  int64_t n_results() const { return one_way ? n_left : n_rows; }
};

struct Loss : Pairs {
  int64_t n_prototypes;
  Dtype dtype;             // of the embeddings and of their gradient
  const int64_t* labels;   // (B,), or null
  const void* prototypes;  // (K, D) T, or null
  double prototype_weight;
  Distance distance;
  Reduction reduction;
};

struct Forward : Loss {
  const void* embeddings;
  int64_t row_stride, column_stride;  // in elements
  // Results; Residuals in clop_kernels/backends/contract.py says what they are. Rows in the order of their positions.
  void* loss;        // T, () or with Reduction::none (N,), in the order of the embeddings
  void* normalized;  // (N, D) compute_dtype
  void *norms, *shift, *inverse_total, *negative;  // (N,) T
  void* counts;                            // (2,) T
};

struct Backward : Loss {
  const void* grad_loss;   // T, () or (N,)
  const void* normalized;  // as Forward left them
  const void *norms, *shift, *inverse_total, *negative, *counts;
  // Results; null where not asked for.
  void* grad_embeddings;   // (N, D) dtype, contiguous
  void* grad_temperature;  // () T
  void* grad_prototypes;   // (K, D) T
};

// The passes over pairs alone, of rows in the order of their positions. M rows; the first R of them, n_results(), get results.
struct PairSoftmax : Pairs {
  const void* zhat;  // (M, D) compute_dtype
  // Results, (R,) T each; Softmax in clop_kernels/backends/contract.py says what they are.
  void *shift, *negative, *positive, *positive_logits;
};

struct PairGradient : Pairs {
  const void* zhat;          // (M, D) compute_dtype
  const void* coefficients;  // (4, M) T; Coefficients in clop_kernels/backends/contract.py
  void* grad;                // (R, D) T, the result
};

// One compilation of level.cpp.
struct Level {
  const char* name;
  void (*forward)(const Forward&);
  void (*backward)(const Backward&);
  void (*pair_softmax)(const PairSoftmax&);
  void (*pair_gradient)(const PairGradient&);
  void (*exp2)(Dtype, int64_t n, const void* x, void* result);  // for the test of its accuracy; float32 or float64
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
