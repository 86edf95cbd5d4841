// The operators of the CPU backend: they choose the SIMD level, check their arguments, allocate results and call the level's
// passes.
#include "bindings.h"

#include <torch/csrc/stable/ops.h>

#include <cstdlib>
#include <string_view>
#include <vector>

#include "../common/arguments.h"
#include "loss.h"

namespace clop::cpu {
namespace {

// ---- levels ----------------------------------------------------------------------------------------------------------

// The levels that this CPU can run, widest first.
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
  static const std::vector<const Level*> levels = runnable_levels();
  const char* const text = std::getenv("CLOP_SIMD");  // read at each call, because tests change it
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

using clop::decode;
using clop::empty;

void decode(const char* name, ScalarType given, Dtype& option) {
  const std::optional<Dtype> dtype = dtype_of(given);
  if (!dtype) refuse(name, "float64, float32, float16 or bfloat16");
  option = *dtype;
}

// The options of the operator at hand, whose parameters must be in scope.
#define CLOP_GIVEN_OPTIONS         \
  [&] {                            \
    Options options = {};          \
    CLOP_OPTIONS(CLOP_DECODE)      \
    CLOP_CPU_SETTINGS(CLOP_DECODE) \
    return options;                \
  }()

// The kernels trust their arguments, but anyone can call the operators. A wrong call must raise an exception, not crash.
void check(const char* name, const Tensor& tensor, ScalarType dtype, std::initializer_list<int64_t> sizes) {
  bool is_right = tensor.is_cpu() && tensor.scalar_type() == dtype && tensor.dim() == int64_t(sizes.size());
  int64_t dim = 0;
  for (const int64_t size : sizes) is_right = is_right && tensor.size(dim++) == size;
  if (!is_right || !tensor.is_contiguous())
    throw std::runtime_error(std::string("clop_native: ") + name + " has the wrong device, dtype, shape or layout");
}

// Checks numbers that index memory. clop_kernels has checked them with a better message; this check only prevents bad memory
// accesses.
void check_positions(const int32_t* positions, int64_t count, int64_t largest) {
  for (int64_t k = 0; k < count; ++k)
    if (positions[k] < 0 || positions[k] > largest)
      throw std::runtime_error("clop_native: groups holds an index that is out of range");
}

ScalarType precise_of(const Pairs& pairs) {
  return pairs.compute_dtype == Dtype::float64 ? ScalarType::Double : ScalarType::Float;
}

Tensor empty(std::initializer_list<int64_t> sizes, ScalarType dtype) {
  return empty(sizes, dtype, aoti_torch_device_type_cpu(), 0);
}

// Fills in and checks what every pass needs to know of `rows`, (N, D). It does not check the values of `groups`.
void set_pairs(Pairs& pairs, const Options& options, const Tensor& rows, const Tensor& groups) {
  static_cast<Options&>(pairs) = options;
  if (!(pairs.temperature > 0) || pairs.tile_rows < 0 || pairs.n_threads < 1)
    throw std::runtime_error("clop_native: an option is out of its range");
  if (pairs.n_threads > 1024) pairs.n_threads = 1024;
  pairs.n_rows = rows.size(0);
  pairs.width = rows.size(1);
  const bool by_label = pairs.positives == Positives::label, has_sides = pairs.n_left >= 0;
  if (pairs.n_left < -1 || pairs.n_left > pairs.n_rows || (has_sides && !by_label && 2 * pairs.n_left != pairs.n_rows))
    throw std::runtime_error("clop_native: n_left: expected the rows of the left side, or -1");
  check("groups", groups, ScalarType::Int, {3, by_label ? pairs.n_rows : 0});
  pairs.groups = by_label ? static_cast<const int32_t*>(groups.const_data_ptr()) : nullptr;
}

// Fills in and checks the parameters that both passes of the loss have.
void set_loss(Loss& loss, const Options& options, const Tensor& embeddings, const Tensor& groups,
              const std::optional<Tensor>& labels, const std::optional<Tensor>& prototypes) {
  if (!embeddings.is_cpu() || embeddings.dim() != 2 || embeddings.size(1) < 1 || options.n_views < 1 ||
      embeddings.size(0) % options.n_views != 0)
    throw std::runtime_error("clop_native: embeddings: expected (n_views * B, D) on the CPU");
  set_pairs(loss, options, embeddings, groups);
  decode("embeddings", embeddings.scalar_type(), loss.dtype);
  const int64_t n_instances = loss.n_rows / loss.n_views;
  if (labels) {
    check("labels", *labels, ScalarType::Long, {n_instances});
    loss.labels = static_cast<const int64_t*>(labels->const_data_ptr());
  }
  if (prototypes) {
    loss.n_classes = prototypes->size(0);
    check("prototypes", *prototypes, precise_of(loss), {loss.n_classes, loss.width});
    loss.prototypes = prototypes->const_data_ptr();
  }
  if (loss.groups != nullptr) {
    check_positions(loss.groups, loss.n_rows, loss.n_rows - 1);
    check_positions(loss.groups + loss.n_rows, 2 * loss.n_rows, loss.n_rows);
  }
  for (int64_t k = 0; loss.labels != nullptr && loss.prototypes != nullptr && k < n_instances; ++k)
    if (loss.labels[k] >= loss.n_classes) throw std::runtime_error("clop_native: labels holds a value without a prototype");
}

// Fills in and checks the parameters that both separate passes over pairs have.
void set_pairs_alone(Pairs& pairs, const Options& options, const Tensor& zhat, const Tensor& groups) {
  if (!zhat.is_cpu() || zhat.dim() != 2 || zhat.size(1) < 1 || !zhat.is_contiguous())
    throw std::runtime_error("clop_native: zhat: expected (M, D), contiguous, on the CPU");
  if (dtype_of(zhat.scalar_type()) != options.compute_dtype) refuse("zhat", "a tensor of compute_dtype");
  if (options.n_left == 0 || options.n_left == zhat.size(0))
    throw std::runtime_error("clop_native: n_left: expected rows on either side, or -1");
  if (options.positives != Positives::label || options.n_views != 1 || options.negatives_only)
    throw std::runtime_error("clop_native: an option is out of its range");
  set_pairs(pairs, options, zhat, groups);
  pairs.is_one_way = pairs.n_left >= 0;
  for (int64_t bound = 1; bound < 3; ++bound)  // starts and ends; these passes do not read the order
    check_positions(pairs.groups + bound * pairs.n_rows, pairs.n_results(), pairs.n_rows);
}

}  // namespace

const char* simd_level() { return level().name; }

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> forward(
    const Tensor& embeddings, const Tensor& groups, const std::optional<Tensor>& labels,
    const std::optional<Tensor>& prototypes CLOP_CPU_OPTIONS_PARAMETERS) {
  Forward f = {};
  set_loss(f, CLOP_GIVEN_OPTIONS, embeddings, groups, labels, prototypes);
  const ScalarType precise = precise_of(f);
  const auto per_row = [&] { return empty({f.n_rows}, precise); };
  Tensor loss = f.reduction == Reduction::none ? per_row() : empty({}, precise);
  Tensor zhat = empty({f.n_rows, f.width}, compute_dtype);
  Tensor norms = per_row(), shift = per_row(), inverse_total = per_row(), negative = per_row();
  Tensor counts = empty({2}, precise);
  f.embeddings = embeddings.const_data_ptr();
  f.row_stride = embeddings.stride(0);
  f.column_stride = embeddings.stride(1);
  f.loss = loss.mutable_data_ptr();
  f.zhat = zhat.mutable_data_ptr();
  f.norms = norms.mutable_data_ptr();
  f.shift = shift.mutable_data_ptr();
  f.inverse_total = inverse_total.mutable_data_ptr();
  f.negative = negative.mutable_data_ptr();
  f.counts = counts.mutable_data_ptr();
  level().forward(f);
  return {loss, zhat, norms, shift, inverse_total, negative, counts};
}

Gradients backward(const Tensor& grad_loss, const Tensor& embeddings, const Tensor& zhat, const Tensor& norms,
                   const Tensor& shift, const Tensor& inverse_total, const Tensor& negative, const Tensor& groups,
                   const Tensor& counts, const std::optional<Tensor>& labels, const std::optional<Tensor>& prototypes,
                   bool needs_embeddings, bool needs_temperature, bool needs_prototypes CLOP_CPU_OPTIONS_PARAMETERS) {
  Backward b = {};
  set_loss(b, CLOP_GIVEN_OPTIONS, embeddings, groups, labels, prototypes);
  const ScalarType precise = precise_of(b);
  if (b.reduction == Reduction::none)
    check("grad_loss", grad_loss, precise, {b.n_rows});
  else
    check("grad_loss", grad_loss, precise, {});
  check("zhat", zhat, compute_dtype, {b.n_rows, b.width});
  check("norms", norms, precise, {b.n_rows});
  check("shift", shift, precise, {b.n_rows});
  check("inverse_total", inverse_total, precise, {b.n_rows});
  check("negative", negative, precise, {b.n_rows});
  check("counts", counts, precise, {2});
  if (needs_prototypes && !prototypes) throw std::runtime_error("clop_native: needs_prototypes: expected prototypes");
  b.grad_loss = grad_loss.const_data_ptr();
  b.zhat = zhat.const_data_ptr();
  b.norms = norms.const_data_ptr();
  b.shift = shift.const_data_ptr();
  b.inverse_total = inverse_total.const_data_ptr();
  b.negative = negative.const_data_ptr();
  b.counts = counts.const_data_ptr();
  std::optional<Tensor> grad_embeddings, grad_temperature, grad_prototypes;
  if (needs_embeddings) grad_embeddings = empty({b.n_rows, b.width}, embeddings.scalar_type());
  if (needs_temperature) grad_temperature = empty({}, precise);
  if (needs_prototypes) grad_prototypes = empty({b.n_classes, b.width}, precise);
  b.grad_embeddings = grad_embeddings ? grad_embeddings->mutable_data_ptr() : nullptr;
  b.grad_temperature = grad_temperature ? grad_temperature->mutable_data_ptr() : nullptr;
  b.grad_prototypes = grad_prototypes ? grad_prototypes->mutable_data_ptr() : nullptr;
  level().backward(b);
  return {grad_embeddings, grad_temperature, grad_prototypes};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> pair_softmax(const Tensor& zhat, const Tensor& groups CLOP_CPU_OPTIONS_PARAMETERS) {
  PairSoftmax p = {};
  set_pairs_alone(p, CLOP_GIVEN_OPTIONS, zhat, groups);
  const auto per_row = [&] { return empty({p.n_results()}, precise_of(p)); };
  Tensor shift = per_row(), negative = per_row(), positive = per_row(), positive_logits = per_row();
  p.zhat = zhat.const_data_ptr();
  p.shift = shift.mutable_data_ptr();
  p.negative = negative.mutable_data_ptr();
  p.positive = positive.mutable_data_ptr();
  p.positive_logits = positive_logits.mutable_data_ptr();
  level().pair_softmax(p);
  return {shift, negative, positive, positive_logits};
}

Tensor pair_gradient(const Tensor& zhat, const Tensor& groups, const Tensor& coefficients CLOP_CPU_OPTIONS_PARAMETERS) {
  PairGradient p = {};
  set_pairs_alone(p, CLOP_GIVEN_OPTIONS, zhat, groups);
  check("coefficients", coefficients, precise_of(p), {4, p.n_rows});
  Tensor grad = empty({p.n_results(), p.width}, precise_of(p));
  p.zhat = zhat.const_data_ptr();
  p.coefficients = coefficients.const_data_ptr();
  p.grad = grad.mutable_data_ptr();
  level().pair_gradient(p);
  return grad;
}

Tensor exp2(const Tensor& x) {
  const std::optional<Dtype> dtype = dtype_of(x.scalar_type());
  if (!x.is_cpu() || !x.is_contiguous() || (dtype != Dtype::float32 && dtype != Dtype::float64))
    refuse("x", "a contiguous float32 or float64 tensor on the CPU");
  Tensor result = torch::stable::empty_like(x);
  level().exp2(*dtype, x.numel(), x.const_data_ptr(), result.mutable_data_ptr());
  return result;
}

}  // namespace clop::cpu
