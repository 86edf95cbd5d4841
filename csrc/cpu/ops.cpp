#include "ops.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdlib>
#include <string_view>
#include <vector>

#include "loss.h"

namespace clop::cpu {
namespace {

// ---- levels ----------------------------------------------------------------------------------------------------------

// Widest first, those that this CPU can run.
std::vector<const Level*> runnable_levels() {
  std::vector<const Level*> levels;
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl"))
    levels.push_back(&avx512::kLevel);
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) levels.push_back(&avx2::kLevel);
#endif
  levels.push_back(&portable::kLevel);
  return levels;
}

const Level& level() {
  const std::vector<const Level*> levels = runnable_levels();
  const char* const text = std::getenv("CLOP_SIMD");  // read at each call: a test changes it
  if (text == nullptr || *text == '\0') return *levels.front();
  std::string names;
  for (const Level* each : levels) {
    if (each->name == std::string_view(text)) return *each;
    names += names.empty() ? "" : ", ";
    names += each->name;
  }
  throw std::runtime_error("CLOP_SIMD='" + std::string(text) + "' in the environment: expected one of " + names +
                           ", which this CPU can run, or nothing");
}

// ---- tensors ---------------------------------------------------------------------------------------------------------

Dtype dtype_of(const char* name, ScalarType type) {
  switch (type) {
    case ScalarType::Double:
      return Dtype::float64;
    case ScalarType::Float:
      return Dtype::float32;
    case ScalarType::Half:
      return Dtype::float16;
    case ScalarType::BFloat16:
      return Dtype::bfloat16;
    default:
      throw std::runtime_error(std::string("clop_native: ") + name + ": expected float64, float32, float16 or bfloat16");
  }
}

// The kernels trust what they are given, and the operators can be called by anyone: a wrong call is an exception, not a crash.
void check(const char* name, const Tensor& tensor, ScalarType dtype, std::initializer_list<int64_t> sizes) {
  bool is_right = tensor.is_cpu() && tensor.scalar_type() == dtype && tensor.dim() == int64_t(sizes.size());
  int64_t dim = 0;
  for (const int64_t size : sizes) is_right = is_right && tensor.size(dim++) == size;
  if (!is_right || !tensor.is_contiguous())
    throw std::runtime_error(std::string("clop_native: ") + name + " has the wrong device, dtype, shape or layout");
}

// Values that index memory. clop_kernels checks them with a better message; here they are only kept from doing harm.
void check_positions(const int32_t* positions, int64_t count, int64_t largest) {
  for (int64_t k = 0; k < count; ++k)
    if (positions[k] < 0 || positions[k] > largest)
      throw std::runtime_error("clop_native: groups holds an index that is out of range");
}

ScalarType precise_of(const Pairs& pairs) {
  return pairs.compute_dtype == Dtype::float64 ? ScalarType::Double : ScalarType::Float;
}

// Fills in what every pass is given of `rows`, (N, D), and checks it, all but the values of `groups`.
void set_pairs(Pairs& pairs, const Tensor& rows, const Tensor& groups, double temperature, int64_t n_views,
               ScalarType compute_dtype, bool normalize, int64_t n_left, bool negatives_only, int64_t tile_rows,
               int64_t n_threads) {
  if (!(temperature > 0) || tile_rows < 0 || n_threads < 1)
    throw std::runtime_error("clop_native: an option is out of its range");
  pairs.n_rows = rows.size(0);
  const bool is_paired = groups.size(1) == 0 && n_left >= 0;  // row by row
  if (n_left < -1 || n_left > pairs.n_rows || (is_paired && 2 * n_left != pairs.n_rows))
    throw std::runtime_error("clop_native: n_left: expected the rows of the left side, or -1");
  check("groups", groups, ScalarType::Int, {3, groups.size(1) == 0 ? 0 : pairs.n_rows});
  pairs.width = rows.size(1);
  pairs.n_views = n_views;
  pairs.compute_dtype = dtype_of("compute_dtype", compute_dtype);
  pairs.groups = groups.size(1) == 0 ? nullptr : static_cast<const int32_t*>(groups.const_data_ptr());
  pairs.temperature = temperature;
  pairs.normalize = normalize;
  pairs.n_left = n_left;
  pairs.one_way = false;
  pairs.negatives_only = negatives_only;
  pairs.tile_rows = tile_rows;
  pairs.n_threads = int(n_threads < 1024 ? n_threads : 1024);
}

// The same for both passes of the loss.
void set_loss(Loss& loss, const Tensor& embeddings, const Tensor& groups, const std::optional<Tensor>& labels,
              const std::optional<Tensor>& prototypes, double temperature, int64_t n_views, double prototype_weight,
              int64_t distance, int64_t reduction, ScalarType compute_dtype, bool normalize, int64_t n_left, bool negatives_only,
              int64_t tile_rows, int64_t n_threads) {
  if (!embeddings.is_cpu() || embeddings.dim() != 2 || embeddings.size(1) < 1 || n_views < 1 || embeddings.size(0) % n_views != 0)
    throw std::runtime_error("clop_native: embeddings: expected (n_views * B, D) on the CPU");
  if (distance < 0 || distance > 2 || reduction < 0 || reduction > 2)
    throw std::runtime_error("clop_native: an option is out of its range");
  set_pairs(loss, embeddings, groups, temperature, n_views, compute_dtype, normalize, n_left, negatives_only, tile_rows,
            n_threads);
  loss.dtype = dtype_of("embeddings", embeddings.scalar_type());
  loss.labels = nullptr;
  if (labels) {
    check("labels", *labels, ScalarType::Long, {loss.n_rows / n_views});
    loss.labels = static_cast<const int64_t*>(labels->const_data_ptr());
  }
  loss.n_prototypes = 0;
  loss.prototypes = nullptr;
  if (prototypes) {
    loss.n_prototypes = prototypes->size(0);
    check("prototypes", *prototypes, precise_of(loss), {loss.n_prototypes, loss.width});
    loss.prototypes = prototypes->const_data_ptr();
  }
  loss.prototype_weight = prototype_weight;
  loss.distance = Distance(distance);
  loss.reduction = Reduction(reduction);
  if (loss.groups != nullptr) {
    check_positions(loss.groups, loss.n_rows, loss.n_rows - 1);
    check_positions(loss.groups + loss.n_rows, 2 * loss.n_rows, loss.n_rows);
  }
  for (int64_t k = 0; loss.labels != nullptr && loss.prototypes != nullptr && k < loss.n_rows / n_views; ++k)
    if (loss.labels[k] >= loss.n_prototypes) throw std::runtime_error("clop_native: labels holds a value without a prototype");
}

// The same for both passes over pairs alone.
void set_pairs_alone(Pairs& pairs, const Tensor& zhat, const Tensor& groups, double temperature, bool normalize, int64_t n_left,
                     int64_t tile_rows, int64_t n_threads) {
  if (!zhat.is_cpu() || zhat.dim() != 2 || zhat.size(1) < 1 || !zhat.is_contiguous())
    throw std::runtime_error("clop_native: zhat: expected (M, D), contiguous, on the CPU");
  if (n_left == 0 || n_left == zhat.size(0)) throw std::runtime_error("clop_native: n_left: expected rows on either side, or -1");
  check("groups", groups, ScalarType::Int, {3, zhat.size(0)});
  set_pairs(pairs, zhat, groups, temperature, /*n_views=*/1, zhat.scalar_type(), normalize, n_left, /*negatives_only=*/false,
            tile_rows, n_threads);
  pairs.one_way = n_left >= 0;
  for (int64_t bound = 1; bound < 3; ++bound)  // the order is not asked for
    check_positions(pairs.groups + bound * pairs.n_rows, pairs.n_results(), pairs.n_rows);
}

}  // namespace

const char* simd_level() { return level().name; }

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> forward(
    Tensor embeddings, Tensor groups, std::optional<Tensor> labels, std::optional<Tensor> prototypes, double temperature,
    int64_t n_views, double prototype_weight, int64_t distance, int64_t reduction, ScalarType compute_dtype, bool normalize,
    int64_t n_left, bool negatives_only, int64_t tile_rows, int64_t n_threads) {
  Forward f;
  set_loss(f, embeddings, groups, labels, prototypes, temperature, n_views, prototype_weight, distance, reduction, compute_dtype,
           normalize, n_left, negatives_only, tile_rows, n_threads);
  const ScalarType precise = precise_of(f);
  const auto per_row = [&] { return torch::stable::new_empty(embeddings, {f.n_rows}, precise); };
  Tensor loss = f.reduction == Reduction::none ? per_row() : torch::stable::new_empty(embeddings, {}, precise);
  Tensor normalized = torch::stable::new_empty(embeddings, {f.n_rows, f.width}, compute_dtype);
  Tensor norms = per_row(), shift = per_row(), inverse_total = per_row(), negative = per_row();
  Tensor counts = torch::stable::new_empty(embeddings, {2}, precise);
  f.embeddings = embeddings.const_data_ptr();
  f.row_stride = embeddings.stride(0);
  f.column_stride = embeddings.stride(1);
  f.loss = loss.mutable_data_ptr();
  f.normalized = normalized.mutable_data_ptr();
  f.norms = norms.mutable_data_ptr();
  f.shift = shift.mutable_data_ptr();
  f.inverse_total = inverse_total.mutable_data_ptr();
  f.negative = negative.mutable_data_ptr();
  f.counts = counts.mutable_data_ptr();
  level().forward(f);
  return {loss, normalized, norms, shift, inverse_total, negative, counts};
}

std::tuple<Tensor, Tensor, Tensor> backward(Tensor grad_loss, Tensor embeddings, Tensor normalized, Tensor norms, Tensor shift,
                                            Tensor inverse_total, Tensor negative, Tensor groups, Tensor counts,
                                            std::optional<Tensor> labels, std::optional<Tensor> prototypes, bool needs_embeddings,
                                            bool needs_temperature, bool needs_prototypes, double temperature, int64_t n_views,
                                            double prototype_weight, int64_t distance, int64_t reduction,
                                            ScalarType compute_dtype, bool normalize, int64_t n_left, bool negatives_only,
                                            int64_t tile_rows, int64_t n_threads) {
  Backward b;
  set_loss(b, embeddings, groups, labels, prototypes, temperature, n_views, prototype_weight, distance, reduction, compute_dtype,
           normalize, n_left, negatives_only, tile_rows, n_threads);
  const ScalarType precise = precise_of(b);
  const bool per_row = b.reduction == Reduction::none;
  if (per_row)
    check("grad_loss", grad_loss, precise, {b.n_rows});
  else
    check("grad_loss", grad_loss, precise, {});
  check("normalized", normalized, compute_dtype, {b.n_rows, b.width});
  check("norms", norms, precise, {b.n_rows});
  check("shift", shift, precise, {b.n_rows});
  check("inverse_total", inverse_total, precise, {b.n_rows});
  check("negative", negative, precise, {b.n_rows});
  check("counts", counts, precise, {2});
  if (needs_prototypes && !prototypes) throw std::runtime_error("clop_native: a gradient of prototypes that are not there");
  b.grad_loss = grad_loss.const_data_ptr();
  b.normalized = normalized.const_data_ptr();
  b.norms = norms.const_data_ptr();
  b.shift = shift.const_data_ptr();
  b.inverse_total = inverse_total.const_data_ptr();
  b.negative = negative.const_data_ptr();
  b.counts = counts.const_data_ptr();
  // What is not asked for has no elements.
  Tensor grad_embeddings = needs_embeddings ? torch::stable::new_empty(embeddings, {b.n_rows, b.width})
                                            : torch::stable::new_empty(embeddings, {0});
  Tensor grad_temperature = needs_temperature ? torch::stable::new_empty(embeddings, {}, precise)
                                              : torch::stable::new_empty(embeddings, {0}, precise);
  Tensor grad_prototypes = needs_prototypes ? torch::stable::new_empty(embeddings, {b.n_prototypes, b.width}, precise)
                                            : torch::stable::new_empty(embeddings, {0}, precise);
  b.grad_embeddings = needs_embeddings ? grad_embeddings.mutable_data_ptr() : nullptr;
  b.grad_temperature = needs_temperature ? grad_temperature.mutable_data_ptr() : nullptr;
  b.grad_prototypes = needs_prototypes ? grad_prototypes.mutable_data_ptr() : nullptr;
  level().backward(b);
  return {grad_embeddings, grad_temperature, grad_prototypes};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> pair_softmax(Tensor zhat, Tensor groups, double temperature, bool normalize,
                                                        int64_t n_left, int64_t tile_rows, int64_t n_threads) {
  PairSoftmax p;
  set_pairs_alone(p, zhat, groups, temperature, normalize, n_left, tile_rows, n_threads);
  const auto per_row = [&] { return torch::stable::new_empty(zhat, {p.n_results()}, precise_of(p)); };
  Tensor shift = per_row(), negative = per_row(), positive = per_row(), positive_logits = per_row();
  p.zhat = zhat.const_data_ptr();
  p.shift = shift.mutable_data_ptr();
  p.negative = negative.mutable_data_ptr();
  p.positive = positive.mutable_data_ptr();
  p.positive_logits = positive_logits.mutable_data_ptr();
  level().pair_softmax(p);
  return {shift, negative, positive, positive_logits};
}

Tensor pair_gradient(Tensor zhat, Tensor groups, Tensor coefficients, double temperature, bool normalize, int64_t n_left,
                     int64_t tile_rows, int64_t n_threads) {
  PairGradient p;
  set_pairs_alone(p, zhat, groups, temperature, normalize, n_left, tile_rows, n_threads);
  check("coefficients", coefficients, precise_of(p), {4, p.n_rows});
  Tensor grad = torch::stable::new_empty(zhat, {p.n_results(), p.width}, precise_of(p));
  p.zhat = zhat.const_data_ptr();
  p.coefficients = coefficients.const_data_ptr();
  p.grad = grad.mutable_data_ptr();
  level().pair_gradient(p);
  return grad;
}

Tensor exp2(Tensor x) {
  const Dtype dtype = dtype_of("x", x.scalar_type());
  if (!x.is_cpu() || !x.is_contiguous() || (dtype != Dtype::float32 && dtype != Dtype::float64))
    throw std::runtime_error("clop_native: x: expected a contiguous float32 or float64 tensor on the CPU");
  Tensor result = torch::stable::empty_like(x);
  level().exp2(dtype, x.numel(), x.const_data_ptr(), result.mutable_data_ptr());
  return result;
}

}  // namespace clop::cpu
