// The launches of the passes: which kernel, in which shape, on how many blocks.

#include <algorithm>

#include "gradient.cuh"
#include "groups.cuh"
#include "prototype_gradient.cuh"
#include "softmax.cuh"
#include "wide.cuh"

namespace clop::cuda {
namespace {

// n_rows / per_block, rounded up.
int64_t n_blocks_for(int64_t n_rows, int64_t per_block) { return (n_rows + per_block - 1) / per_block; }

template <class S>
struct Tag {
  using Shape = S;
};

// Calls visit(Tag<Shape>) with the shape for these rows.
template <class Visit>
cudaError_t with_shape(const Pairs& p, Visit&& visit) {
  switch (p.compute_dtype) {
    case Dtype::float64:
      break;
    case Dtype::bfloat16:
      if (p.width <= 64) return visit(Tag<ShapeOf<Bf16, 64>>());
      if (p.width <= 128) return visit(Tag<ShapeOf<Bf16, 128>>());
      return visit(Tag<ShapeOf<Bf16, 256>>());
    case Dtype::float16:
      if (p.width <= 64) return visit(Tag<ShapeOf<F16, 64>>());
      if (p.width <= 128) return visit(Tag<ShapeOf<F16, 128>>());
      return visit(Tag<ShapeOf<F16, 256>>());
    case Dtype::float32:
      if (p.is_tf32) return p.width <= 64 ? visit(Tag<ShapeOf<Tf32<1>, 64>>()) : visit(Tag<ShapeOf<Tf32<1>, 128>>());
      return p.width <= 64 ? visit(Tag<ShapeOf<Tf32<2>, 64>>()) : visit(Tag<ShapeOf<Tf32<2>, 128>>());
  }
  return cudaErrorInvalidValue;
}

// ---- how the columns of a pass over pairs are split ----------------------------------------------------------------------

// The unit of time is one column of a block's walk. A block takes kStartColumns to begin. If blocks share rows, a block takes the
// part columns of its pass to write its sums, and the last block takes the same time for each block whose sums it adds. For the
// gradient these sums are 128 W floats to or from L2. At 40 bytes a cycle that is the time of 16 columns at a quarter of the
// matrix units' rate, which one block a processor may reach. All of this is estimated, for all widths together; no GPU has run
// with these numbers.
constexpr int64_t kStartColumns = 64, kSoftmaxPartColumns = 2, kGradientPartColumns = 16;
// At most kMostShares blocks share rows, and only if the grid has at most kMostRounds rounds. split_sums is then at most 128 W
// floats for each block of 3 rounds of 2 blocks a processor (W = 256: 1 block), which is 384 KB a processor, whatever N is.
constexpr int64_t kMostShares = 16, kMostRounds = 3;

// How many blocks a pass over pairs has, and how they share rows.
struct Plan {
  Split split;
  int64_t n_blocks;
  bool has_shared_rows;
};

// Chooses how many blocks share the same rows. Few rows make fewer blocks than the processors take at once; with more rows, many
// processors may get no block in the last round. The time of a grid is its number of rounds (n_places blocks run at once) times
// the length of a walk, plus the cost of sharing. A larger number of sharing blocks must save at least a twentieth of the least
// time so far. Walks are equally long on both sides.
template <class S>
Plan plan_of(const Pairs& p, int64_t n_places, int64_t part_columns) {
  const auto n_tiles_of = [&](int64_t n_blocks_of_rows, int64_t first_row) -> int64_t {
    const Run columns = columns_of(p, int(first_row));
    return n_blocks_of_rows == 0 ? 0 : n_blocks_for(columns.end - first_column_of(columns), S::kColumns);
  };
  const int64_t n_left = p.n_left < 0 ? p.n_rows : p.n_left;
  const int64_t left = n_blocks_for(n_left, S::kRows), right = p.is_one_way ? 0 : n_blocks_for(p.n_rows - n_left, S::kRows);
  const int64_t left_tiles = n_tiles_of(left, 0), right_tiles = n_tiles_of(right, n_left),
                most = std::max(left_tiles, right_tiles);

  Plan best = {};
  int64_t least = 0;
  for (int64_t n = 1; n == 1 || (n <= kMostShares && n <= most); ++n) {
    const int64_t n_tiles = std::max(n_blocks_for(most, n), int64_t(1));
    const int64_t of_left = std::max(n_blocks_for(left_tiles, n_tiles), int64_t(1)),
                  of_right = std::max(n_blocks_for(right_tiles, n_tiles), int64_t(1));
    const int64_t n_blocks = left * of_left + right * of_right, n_rounds = n_blocks_for(n_blocks, n_places);
    if (n > 1 && n_rounds > kMostRounds) break;
    const int64_t of_part = n > 1 ? part_columns : 0;
    const int64_t time = n_rounds * (n_tiles * S::kColumns + kStartColumns + of_part) + std::max(of_left, of_right) * of_part;
    if (n > 1 && 20 * time > 19 * least) continue;
    least = time;
    best = {{int(n_tiles), int(of_left), int(of_right)}, n_blocks, n > 1};
  }
  return best;
}

template <class S>
Plan plan_of(const PairSoftmax& p, int64_t n_processors) {
  return plan_of<S>(p, n_processors * kSoftmaxBlocks<S>, kSoftmaxPartColumns);
}

template <class S>
Plan plan_of(const PairGradient& p, int64_t n_processors) {
  return plan_of<S>(p, n_processors * kGradientBlocks<S>, kGradientPartColumns);
}

// How many numbers the blocks that share rows leave. `of_row` gives the number for one row, by shape.
template <class Pass, class OfRow>
int64_t split_floats(const Pass& p, int64_t n_processors, OfRow&& of_row) {
  int64_t n_floats = 0;
  with_shape(p, [&](auto tag) {
    using S = typename decltype(tag)::Shape;
    const Plan plan = plan_of<S>(p, n_processors);
    n_floats = plan.has_shared_rows ? plan.n_blocks * S::kRows * of_row(tag) : 0;
    return cudaSuccess;
  });
  return n_floats;
}

// Calls visit with a number whose type is that of zhat.
template <class Visit>
cudaError_t with_element(const Pairs& p, Visit&& visit) {
  switch (p.compute_dtype) {
    case Dtype::float64:
      break;
    case Dtype::float32:
      return visit(float());
    case Dtype::float16:
      return visit(__half());
    case Dtype::bfloat16:
      return visit(__nv_bfloat16());
  }
  return cudaErrorInvalidValue;
}

bool is_valid(const Pairs& p) {
  constexpr int64_t kLargestInt = 0x7fffffff;  // positions are int32 in `groups`
  const bool has_sides = p.n_left >= 0, has_views = p.groups == nullptr;
  if (has_sides && (p.n_left > p.n_rows || p.n_views != (has_views ? 2 : 1))) return false;
  if (has_sides && has_views && p.n_left * 2 != p.n_rows) return false;
  return p.n_rows > 0 && p.n_rows <= kLargestInt - kBlockRows && p.width > 0 && p.n_views > 0 && p.n_views <= kLargestInt &&
         p.n_rows % p.n_views == 0;
}

bool is_valid(const Classes& p) { return p.prototypes == nullptr || (p.labels != nullptr && p.n_classes > 0); }

template <class Pass>
bool is_valid_loss(const Pass& p) {
  return is_valid(static_cast<const Pairs&>(p)) && is_valid(static_cast<const Classes&>(p));
}

// Whether a separate pass over pairs is valid: it has groups by label, and no side is empty.
bool is_valid_alone(const Pairs& p) {
  return is_valid(p) && p.groups != nullptr && p.n_left != 0 && p.n_left != p.n_rows && p.is_one_way == (p.n_left >= 0);
}

// n_finished must be zero if blocks share rows.
template <class S>
cudaError_t launch_softmax(Forward p, const Plan& plan, cudaStream_t stream) {
  p.split = plan.split;
  return launch(softmax_kernel<S>, unsigned(plan.n_blocks), S::kThreads, S::kSharedBytes, stream, p);
}

// The coefficients must have been made.
cudaError_t launch_gradient(Backward p, int64_t n_processors, cudaStream_t stream) {
  return with_shape(p, [&](auto tag) {
    using S = typename decltype(tag)::Shape;
    const Plan plan = plan_of<S>(p, n_processors);
    p.split = plan.split;
    return launch(gradient_kernel<S>, unsigned(plan.n_blocks), S::kThreads, S::kSharedBytes, stream, p);
  });
}

}  // namespace

int group(const Grouping& p, CUstream_st* stream) {
  if (p.n_instances < 1 || p.n_views < 1 || p.n_instances * p.n_views > 0x7fffffff) return cudaErrorInvalidValue;
  if (p.n_left > p.n_instances || (p.n_left >= 0 && p.n_views != 1)) return cudaErrorInvalidValue;
  const auto n_blocks = unsigned(n_blocks_for(p.n_instances, kGroupThreads));
  return launch(groups_kernel, n_blocks, kGroupThreads, kGroupThreads * sizeof(int64_t), stream, p);
}

int forward(const Forward& p, int64_t n_processors, CUstream_st* stream) {
  if (!is_valid_loss(p) || is_wide(p.width, p.compute_dtype) || p.loss == nullptr) return cudaErrorInvalidValue;
  return with_shape(p, [&](auto tag) {
    using S = typename decltype(tag)::Shape;
    return launch_softmax<S>(p, plan_of<S>(p, n_processors), stream);
  });
}

int pair_softmax(const PairSoftmax& p, int64_t n_processors, CUstream_st* stream) {
  if (!is_valid_alone(p) || is_wide(p.width, p.compute_dtype)) return cudaErrorInvalidValue;
  Forward pass = {};
  static_cast<PairSoftmax&>(pass) = p;
  return with_shape(p, [&](auto tag) {
    using S = typename decltype(tag)::Shape;
    const Plan plan = plan_of<S>(p, n_processors);
    if (plan.has_shared_rows)
      if (const cudaError_t error = set_to_zero(p.n_finished, n_counters(p.n_rows), stream); error != cudaSuccess) return error;
    return launch_softmax<S>(pass, plan, stream);
  });
}

int backward(const Backward& p, int64_t n_processors, CUstream_st* stream) {
  if (is_wide(p.width, p.compute_dtype) || p.grad_embeddings == nullptr) return cudaErrorInvalidValue;
  if (const int error = coefficients(p, stream); error != cudaSuccess) return error;
  return launch_gradient(p, n_processors, stream);
}

int pair_gradient(const PairGradient& p, int64_t n_processors, CUstream_st* stream) {
  if (is_wide(p.width, p.compute_dtype)) return cudaErrorInvalidValue;
  if (const int error = pair_coefficients(p, stream); error != cudaSuccess) return error;
  Backward pass = {};
  static_cast<PairGradient&>(pass) = p;
  return launch_gradient(pass, n_processors, stream);
}

int64_t split_floats(const PairSoftmax& p, int64_t n_processors) {
  return split_floats(p, n_processors, [](auto) -> int64_t { return RowSums::kNumbers; });
}

int64_t split_floats(const PairGradient& p, int64_t n_processors) {
  return split_floats(p, n_processors, [](auto tag) -> int64_t { return decltype(tag)::Shape::kWidth; });
}

int prototype_gradient(const PrototypeGradient& p, CUstream_st* stream) {
  const int64_t n_blocks = (p.width + kPrototypeThreads - 1) / kPrototypeThreads * p.n_classes * p.n_parts;
  if (p.prototypes == nullptr || p.n_parts < 1 || n_blocks > 0x7fffffff) return cudaErrorInvalidValue;
  return with_element(p, [&](auto element) {
    return launch(prototype_kernel<decltype(element)>, unsigned(n_blocks), kPrototypeThreads, kRowsAtOnce * sizeof(float), stream,
                  p);
  });
}

int coefficients(const Backward& p, CUstream_st* stream) {
  if (!is_valid_loss(p) || p.n_padded != padded_rows(p.n_rows)) return cudaErrorInvalidValue;
  return launch(coefficients_kernel, unsigned(p.n_padded / kCoefficientThreads), kCoefficientThreads, 0, stream, p);
}

int pair_coefficients(const PairGradient& p, CUstream_st* stream) {
  if (!is_valid_alone(p) || p.n_padded != padded_rows(p.n_rows)) return cudaErrorInvalidValue;
  return launch(given_coefficients_kernel, unsigned(p.n_padded / kCoefficientThreads), kCoefficientThreads, 0, stream, p);
}

int panel_softmax(const Panel& p, CUstream_st* stream) {
  if (!is_valid(p)) return cudaErrorInvalidValue;
  return launch(panel_softmax_kernel, unsigned(n_blocks_for(p.n_panel_rows, kPanelWarps)), kPanelThreads, 0, stream, p);
}

int panel_loss(const Forward& p, CUstream_st* stream) {
  if (!is_valid_loss(p)) return cudaErrorInvalidValue;
  if (const cudaError_t error = set_to_zero(p.n_finished, 1, stream); error != cudaSuccess) return error;
  return launch(panel_loss_kernel, unsigned(n_blocks_for(p.n_rows, kPanelThreads)), kPanelThreads, 33 * sizeof(float), stream, p);
}

int panel_pairs(const Panel& p, CUstream_st* stream) {
  if (!is_valid(p)) return cudaErrorInvalidValue;
  return with_element(p, [&](auto element) {
    return launch(panel_pairs_kernel<decltype(element)>, unsigned(n_blocks_for(p.n_panel_rows, kPanelWarps)), kPanelThreads, 0,
                  stream, p);
  });
}

int panel_finish(const Backward& p, CUstream_st* stream) {
  if (!is_valid_loss(p)) return cudaErrorInvalidValue;
  return with_element(p, [&](auto element) {
    return launch(panel_finish_kernel<decltype(element)>, unsigned(n_blocks_for(p.n_rows, kPanelWarps)), kPanelThreads,
                  33 * sizeof(float), stream, p);
  });
}

}  // namespace clop::cuda
