// The launches of the two passes: which kernels, on how many blocks, in which shape.

#include "gradient.cuh"
#include "groups.cuh"
#include "prologue.h"
#include "prototype_gradient.cuh"
#include "softmax.cuh"
#include "wide.cuh"

namespace clop::cuda {
namespace {

constexpr int64_t kTallRows = 128, kShortRows = 16;

int64_t n_blocks_for(int64_t n_rows, int64_t per_block) { return (n_rows + per_block - 1) / per_block; }

// The blocks of a pass over pairs: each has rows of one side, and those of the right side come last; Span in pairs.cuh.
int64_t n_blocks_for(const Loss& p, int64_t per_block) {
  if (p.n_left < 0) return n_blocks_for(p.n_rows, per_block);
  return n_blocks_for(p.n_left, per_block) + (p.pairs_alone ? 0 : n_blocks_for(p.n_rows - p.n_left, per_block));
}

// Blocks of few rows where there are not enough rows to give three quarters of the processors a tall block.
bool is_short(const Loss& p, int64_t n_processors) { return 4 * n_blocks_for(p, kTallRows) < 3 * n_processors; }

template <class S>
struct Tag {
  using Shape = S;
};

// Calls visit(Tag<Shape>) for the shape that the rows ask for.
template <class Product, int kWidth, class Visit>
cudaError_t with_shape(bool is_short, Visit&& visit) {
  static_assert(Tall<Product, kWidth>::kRows == kTallRows && Short<Product, kWidth>::kRows == kShortRows, "heights");
  return is_short ? visit(Tag<Short<Product, kWidth>>()) : visit(Tag<Tall<Product, kWidth>>());
}

template <class Visit>
cudaError_t with_shape(const Loss& p, bool is_short, Visit&& visit) {
  switch (p.compute_dtype) {
    case Dtype::bfloat16:
      if (p.width <= 64) return with_shape<Bf16, 64>(is_short, visit);
      if (p.width <= 128) return with_shape<Bf16, 128>(is_short, visit);
      return with_shape<Bf16, 256>(is_short, visit);
    case Dtype::float16:
      if (p.width <= 64) return with_shape<F16, 64>(is_short, visit);
      if (p.width <= 128) return with_shape<F16, 128>(is_short, visit);
      return with_shape<F16, 256>(is_short, visit);
    case Dtype::float32:
      if (p.is_tf32) return p.width <= 64 ? with_shape<Tf32<1>, 64>(is_short, visit) : with_shape<Tf32<1>, 128>(is_short, visit);
      return p.width <= 64 ? with_shape<Tf32<2>, 64>(is_short, visit) : with_shape<Tf32<2>, 128>(is_short, visit);
  }
  return cudaErrorInvalidValue;
}

// Calls visit with a number of the type of zhat.
template <class Visit>
cudaError_t with_element(const Loss& p, Visit&& visit) {
  switch (p.compute_dtype) {
    case Dtype::float32:
      return visit(float());
    case Dtype::float16:
      return visit(__half());
    case Dtype::bfloat16:
      return visit(__nv_bfloat16());
  }
  return cudaErrorInvalidValue;
}

bool is_valid(const Loss& p) {
  constexpr int64_t kLargestInt = 0x7fffffff;  // positions are int32 in `groups`
  const bool has_sides = p.n_left >= 0, has_views = p.groups == nullptr;
  if (p.pairs_alone && (has_views || p.n_left == 0 || p.n_left == p.n_rows)) return false;
  if (has_sides && (p.n_left > p.n_rows || p.n_views != (has_views ? 2 : 1))) return false;
  if (has_sides && has_views && p.n_left * 2 != p.n_rows) return false;
  return p.n_rows > 0 && p.n_rows <= kLargestInt - kTallRows && p.width > 0 && p.n_views > 0 && p.n_views <= kLargestInt &&
         p.n_rows % p.n_views == 0 && (p.prototypes == nullptr || (p.labels != nullptr && p.n_classes > 0));
}

}  // namespace

int group(const Grouping& p, CUstream_st* stream) {
  if (p.n_instances < 1 || p.n_views < 1 || p.n_instances * p.n_views > 0x7fffffff) return cudaErrorInvalidValue;
  if (p.n_left > p.n_instances || (p.n_left >= 0 && p.n_views != 1)) return cudaErrorInvalidValue;
  const auto n_blocks = unsigned(n_blocks_for(p.n_instances, kGroupThreads));
  return launch(groups_kernel, n_blocks, kGroupThreads, kGroupThreads * sizeof(int64_t), stream, p);
}

int forward(const Forward& p, int64_t n_processors, CUstream_st* stream) {
  if (!is_valid(p) || is_wide(p.width, p.compute_dtype)) return cudaErrorInvalidValue;
  const Prologue prologue = {p.embeddings, p.stride_z_row,  p.stride_z_column, p.groups,    p.labels,     p.prototypes, p.zhat,
                             p.norms,      p.distances,     p.n_finished,      p.n_rows,    p.n_views,    p.n_classes,  p.width,
                             p.pitch,      p.dtype,         p.compute_dtype,   p.distance,  p.normalize,  p.n_left >= 0};
  if (const int error = launch_prologue(prologue, stream); error != cudaSuccess) return error;
  return pair_softmax(p, n_processors, stream);
}

int pair_softmax(const Forward& p, int64_t n_processors, CUstream_st* stream) {
  if (!is_valid(p) || is_wide(p.width, p.compute_dtype)) return cudaErrorInvalidValue;
  return with_shape(p, is_short(p, n_processors), [&](auto tag) {
    using S = typename decltype(tag)::Shape;
    return launch(softmax_kernel<S>, unsigned(n_blocks_for(p, S::kRows)), S::kThreads, S::kSharedBytes, stream, p);
  });
}

int backward(const Backward& p, int64_t n_processors, CUstream_st* stream) {
  if (!is_valid(p) || is_wide(p.width, p.compute_dtype)) return cudaErrorInvalidValue;
  if (const int error = coefficients(p, stream); error != cudaSuccess) return error;
  return with_shape(p, is_short(p, n_processors), [&](auto tag) {
    using S = typename decltype(tag)::Shape;
    return launch(gradient_kernel<S>, unsigned(n_blocks_for(p, S::kRows)), S::kThreads, S::kSharedBytes, stream, p);
  });
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
  if (!is_valid(p) || p.n_padded != padded_rows(p.n_rows)) return cudaErrorInvalidValue;
  return launch(coefficients_kernel, unsigned(p.n_padded / kCoefficientThreads), kCoefficientThreads, 0, stream, p);
}

int panel_softmax(const Panel& p, CUstream_st* stream) {
  if (!is_valid(p)) return cudaErrorInvalidValue;
  return launch(panel_softmax_kernel, unsigned(n_blocks_for(p.n_panel_rows, kPanelWarps)), kPanelThreads, 0, stream, p);
}

int panel_loss(const Forward& p, CUstream_st* stream) {
  if (!is_valid(p)) return cudaErrorInvalidValue;
  if (const cudaError_t error = set_to_zero(p.n_finished, stream); error != cudaSuccess) return error;
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
  if (!is_valid(p)) return cudaErrorInvalidValue;
  return with_element(p, [&](auto element) {
    return launch(panel_finish_kernel<decltype(element)>, unsigned(n_blocks_for(p.n_rows, kPanelWarps)), kPanelThreads,
                  33 * sizeof(float), stream, p);
  });
}

}  // namespace clop::cuda
