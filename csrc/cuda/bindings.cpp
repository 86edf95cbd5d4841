// The operators of the CUDA backend: they check their arguments, allocate results and scratch, and launch the passes.
#include "bindings.h"

#include "../common/arguments.h"
#include "loss.h"
#include "runtime.h"

namespace clop::cuda {
namespace {

constexpr auto kFloat = ScalarType::Float;

// ---- arguments ---------------------------------------------------------------------------------------------------------

using clop::decode;

void decode(const char* name, ScalarType given, Dtype& option) {
  const std::optional<Dtype> dtype = dtype_of(given);
  if (!dtype || *dtype == Dtype::float64) refuse(name, "float32, float16 or bfloat16");
  option = *dtype;
}

void decode(const char*, double given, Number& option) { option = {static_cast<float>(given), nullptr}; }

// The kernels trust their arguments, but anyone can call the operators. A wrong call must raise an exception, not crash. Returns
// a null pointer if there is no tensor.
template <class T>
const T* data(const char* name, const MaybeTensor& tensor, ScalarType dtype, const char* dtype_name, int32_t device,
              std::initializer_list<int64_t> sizes) {
  if (!tensor) return nullptr;
  bool is_right = is_on_gpu(*tensor) && tensor->get_device_index() == device && tensor->scalar_type() == dtype &&
                  tensor->is_contiguous() && tensor->dim() == int64_t(sizes.size());
  int64_t dim = 0;
  for (const int64_t size : sizes) is_right = is_right && tensor->size(dim++) == size;
  if (!is_right)
    refuse(name,
           std::string("a contiguous ") + dtype_name + " tensor of shape " + shape_text(sizes) + " on the GPU of the embeddings");
  return static_cast<const T*>(tensor->const_data_ptr());
}

const float* floats(const char* name, const MaybeTensor& tensor, int32_t device, std::initializer_list<int64_t> sizes) {
  return data<float>(name, tensor, kFloat, "float32", device, sizes);
}

const int64_t* integers(const char* name, const MaybeTensor& tensor, int32_t device, std::initializer_list<int64_t> sizes) {
  return data<int64_t>(name, tensor, ScalarType::Long, "int64", device, sizes);
}

// The same for a tensor that the operator writes.
float* written_floats(const char* name, const Tensor& tensor, int32_t device, std::initializer_list<int64_t> sizes) {
  return const_cast<float*>(floats(name, tensor, device, sizes));
}

float* mutable_floats(const Tensor& tensor) { return static_cast<float*>(tensor.mutable_data_ptr()); }

// The options of the operator at hand, whose parameters must be in scope.
#define CLOP_SET_TENSOR(kind, name) options.name.tensor = floats(#name, name##_tensor, gpu, {});
#define CLOP_GIVEN_OPTIONS(device)                                     \
  [&](int32_t gpu) {                                                   \
    Options options = {};                                              \
    CLOP_OPTIONS(CLOP_DECODE)                                          \
    CLOP_CUDA_SETTINGS(CLOP_DECODE)                                    \
    CLOP_NUMBERS(CLOP_SET_TENSOR)                                      \
    if (!temperature_tensor) options.scale = logit_scale(temperature); \
    return options;                                                    \
  }(device)

int32_t device_of(const char* name, const Tensor& tensor) {
  if (!is_on_gpu(tensor) || tensor.dim() != 2 || tensor.size(0) < 1 || tensor.size(1) < 1)
    refuse(name, "(N, D) on a GPU, not empty");
  return tensor.get_device_index();
}

// ---- parameters of the passes ------------------------------------------------------------------------------------------

// Sets the rows. `rows` are the embeddings or zhat, on `device`. Kernels copy zhat 16 bytes at a time, so its rows must be
// aligned.
void set_rows(Pairs& p, const Options& options, const Tensor& rows, const Tensor& zhat, ScalarType compute_dtype,
              int32_t device) {
  static_cast<Options&>(p) = options;
  if (rows.size(0) > INT32_MAX - kBlockRows) refuse("embeddings", "fewer than 2^31 - 128 rows");
  if (p.n_views < 1 || rows.size(0) % p.n_views != 0) refuse("n_views", "a divisor of the number of rows");
  p.n_rows = rows.size(0);
  p.width = rows.size(1);
  if (!is_on_gpu(zhat) || zhat.get_device_index() != device || zhat.scalar_type() != compute_dtype || zhat.dim() != 2 ||
      zhat.size(0) != p.n_rows || zhat.size(1) != p.width)
    refuse("zhat", "a compute_dtype tensor of shape " + shape_text({p.n_rows, p.width}) + " on the GPU of the embeddings");
  p.pitch = zhat.stride(0);
  const void* const memory = zhat.const_data_ptr();
  if (zhat.stride(1) != 1 || p.pitch < p.width || p.pitch > INT32_MAX || p.pitch * int64_t(zhat.element_size()) % 16 != 0 ||
      reinterpret_cast<uintptr_t>(memory) % 16 != 0)
    refuse("zhat", "rows that begin at multiples of 16 bytes, as unit_rows in clop_kernels/backends/contract.py lays them");
  p.zhat = const_cast<void*>(memory);  // only the prologue writes it
}

// Sets the rows and their positive groups.
void set_pairs(Pairs& p, const Options& options, const Tensor& rows, const Tensor& zhat, const Tensor& groups,
               ScalarType compute_dtype, int32_t device) {
  const bool by_label = options.positives == Positives::label;
  if (groups.dim() != 2) refuse("groups", "(3, N) or (3, 0)");
  if (options.n_left < -1 || options.n_left > rows.size(0)) refuse("n_left", "a number of rows, or -1");
  if (options.n_left >= 0 && (by_label ? options.n_views != 1 : options.n_views != 2 || 2 * options.n_left != rows.size(0)))
    refuse("n_left", "N / 2 of two views, or groups by label of one view");
  set_rows(p, options, rows, zhat, compute_dtype, device);
  p.groups = data<int32_t>("groups", groups, ScalarType::Int, "int32", device, {3, by_label ? p.n_rows : 0});
  if (!by_label) p.groups = nullptr;
}

// The same for a separate pass over pairs.
void set_pairs_alone(Pairs& p, const Options& options, const Tensor& zhat, const Tensor& groups, ScalarType compute_dtype,
                     int32_t device) {
  if (options.positives != Positives::label || groups.dim() != 2 || groups.size(1) != zhat.size(0)) refuse("groups", "(3, N)");
  if (options.n_left == 0 || options.n_left == zhat.size(0)) refuse("n_left", "rows on both sides");
  set_pairs(p, options, zhat, zhat, groups, compute_dtype, device);
  p.is_one_way = p.n_left >= 0;
}

void set_classes(Classes& c, const Pairs& p, const MaybeTensor& labels, const MaybeTensor& prototypes, int32_t device) {
  if (prototypes && (prototypes->dim() != 2 || prototypes->size(0) < 1)) refuse("prototypes", "(K, D), at least one");
  if (prototypes && !labels) refuse("labels", "a tensor, since there are prototypes");
  c.n_classes = prototypes ? prototypes->size(0) : 0;
  c.labels = integers("labels", labels, device, {p.n_rows / p.n_views});
  c.prototypes = floats("prototypes", prototypes, device, {c.n_classes, p.width});
}

// Sets what the prologue reads. Returns the norms, which are a result.
Tensor set_embeddings(Prologue& p, const Tensor& embeddings) {
  decode("embeddings", embeddings.scalar_type(), p.dtype);
  p.embeddings = embeddings.const_data_ptr();
  p.row_stride = embeddings.stride(0);
  p.column_stride = embeddings.stride(1);
  const Tensor norms = allocate("norms", embeddings, {p.n_rows}, kFloat);
  p.norms = mutable_floats(norms);
  return norms;
}

// Allocates the results of a forward pass and sets their pointers.
struct Losses {
  Tensor loss, shift, inverse_total, negative, counts;

  Losses(Forward& p, const Tensor& like)
      : loss(p.reduction == Reduction::none ? allocate("loss", like, {p.n_rows}, kFloat) : allocate("loss", like, {}, kFloat)),
        shift(allocate("shift", like, {p.n_rows}, kFloat)),
        inverse_total(allocate("inverse_total", like, {p.n_rows}, kFloat)),
        negative(allocate("negative", like, {p.n_rows}, kFloat)),
        counts(allocate("counts", like, {2}, kFloat)) {
    p.loss = mutable_floats(loss);
    p.shift = mutable_floats(shift);
    p.inverse_total = mutable_floats(inverse_total);
    p.negative = mutable_floats(negative);
    p.counts = mutable_floats(counts);
  }
};

// Sets what a backward pass reads, except its coefficients; allocates the gradients and sets their pointers.
Gradients set_gradients(Backward& p, const Tensor& upstream, const MaybeTensor& weights, const Tensor& embeddings,
                        const Tensor& norms, const Tensor& counts, bool needs_temperature, int32_t device) {
  decode("embeddings", embeddings.scalar_type(), p.dtype);
  p.upstream = floats("upstream", upstream, device, {});
  p.weights = floats("weights", weights, device, {p.n_rows});
  p.norms = floats("norms", norms, device, {p.n_rows});
  p.counts = floats("counts", counts, device, {2});
  Gradients gradients = {allocate("the gradient", embeddings, {p.n_rows, p.width}, embeddings.scalar_type()), std::nullopt};
  auto& [grad_embeddings, grad_temperature] = gradients;
  p.grad_embeddings = grad_embeddings.mutable_data_ptr();
  if (needs_temperature) {
    grad_temperature = allocate("the temperature's gradient", embeddings, {}, kFloat);
    p.grad_temperature = mutable_floats(*grad_temperature);
  }
  return gradients;
}

// Sets the statistics that the coefficients are made of.
void set_softmax(Backward& p, const MaybeTensor& weights, const Tensor& shift, const Tensor& inverse_total,
                 const Tensor& negative, int32_t device) {
  p.weights = floats("weights", weights, device, {p.n_rows});
  p.shift = floats("shift", shift, device, {p.n_rows});
  p.inverse_total = floats("inverse_total", inverse_total, device, {p.n_rows});
  p.negative = floats("negative", negative, device, {p.n_rows});
}

// Sets n_padded, and returns how many numbers the coefficients are.
int64_t n_coefficients(PairGradient& p) {
  p.n_padded = padded_rows(p.n_rows);
  return 6 * p.n_padded;
}

void set_panel(Panel& p, const Options& options, const Tensor& products, int64_t first_row, int64_t first_column,
               const Tensor& zhat, const Tensor& groups, ScalarType compute_dtype, int32_t device) {
  set_pairs(p, options, zhat, zhat, groups, compute_dtype, device);
  if (products.dim() != 2 || first_row < 0 || first_column < 0 || first_row + products.size(0) > p.n_rows ||
      first_column + products.size(1) > p.n_rows)
    refuse("products", "a rectangle of the (N, N) similarities");
  p.n_panel_rows = products.size(0);
  p.n_panel_columns = products.size(1);
  p.products = floats("products", products, device, {p.n_panel_rows, p.n_panel_columns});
  p.first_row = first_row;
  p.first_column = first_column;
}

}  // namespace

Tensor groups(const Tensor& labels CLOP_CUDA_OPTIONS_PARAMETERS) {
  if (!is_on_gpu(labels) || labels.dim() != 1 || labels.size(0) < 1) refuse("labels", "(B,) on a GPU, not empty");
  if (n_views < 1 || labels.size(0) > INT32_MAX / n_views) refuse("n_views", "1 or more, and fewer than 2^31 rows in all");
  if (n_left < -1 || n_left > labels.size(0) || (n_left >= 0 && n_views != 1))
    refuse("n_left", "-1, or a number of labels of one view");
  const int32_t device = labels.get_device_index();
  const CurrentDevice current(device);
  Grouping p = {};
  static_cast<Options&>(p) = CLOP_GIVEN_OPTIONS(device);
  p.n_instances = labels.size(0);
  p.labels = integers("labels", labels, device, {p.n_instances});
  const Tensor table = allocate("groups", labels, {3, n_views * p.n_instances}, ScalarType::Int);
  p.groups = static_cast<int32_t*>(table.mutable_data_ptr());
  check("cannot launch the kernel 'groups'", group(p, current_stream(device)), device);
  return table;
}

std::tuple<Tensor, Tensor> prologue(const Tensor& embeddings, const Tensor& zhat, const Tensor& groups, const MaybeTensor& labels,
                                    const MaybeTensor& prototypes CLOP_CUDA_OPTIONS_PARAMETERS) {
  if (!is_on_gpu(embeddings) || embeddings.dim() != 2 || embeddings.size(1) < 1) refuse("embeddings", "(N, D) on a GPU");
  const int32_t device = embeddings.get_device_index();
  const CurrentDevice current(device);
  Prologue p = {};
  set_pairs(p, CLOP_GIVEN_OPTIONS(device), embeddings, zhat, groups, compute_dtype, device);
  set_classes(p, p, labels, prototypes, device);
  const Tensor norms = set_embeddings(p, embeddings), distances = allocate("distances", embeddings, {p.n_rows}, kFloat);
  p.distances = mutable_floats(distances);
  check("cannot launch the kernel 'prologue'", prologue(p, current_stream(device)), device);
  return {norms, distances};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> forward(const Tensor& embeddings, const Tensor& zhat,
                                                                   const Tensor& groups, const MaybeTensor& labels,
                                                                   const MaybeTensor& prototypes CLOP_CUDA_OPTIONS_PARAMETERS) {
  const int32_t device = device_of("embeddings", embeddings);
  const CurrentDevice current(device);
  Prologue before = {};
  set_pairs(before, CLOP_GIVEN_OPTIONS(device), embeddings, zhat, groups, compute_dtype, device);
  set_classes(before, before, labels, prototypes, device);
  const Tensor norms = set_embeddings(before, embeddings);
  Forward p = {};
  static_cast<Pairs&>(p) = before;
  static_cast<Classes&>(p) = before;
  const Losses of(p, embeddings);
  const int64_t n_processors = n_processors_of(device);
  const Memory scratch =
      allocate_scratch(embeddings, Part{before.distances, p.n_rows}, Part{p.partial_sums, kPartialSums * most_blocks(p.n_rows)},
                       Part{p.n_finished, n_counters(p.n_rows)}, Part{p.split_sums, split_floats(p, n_processors)});
  before.n_finished = p.n_finished;
  p.distances = before.distances;
  CUstream_st* const stream = current_stream(device);
  check("cannot launch the forward pass", prologue(before, stream), device);
  check("cannot launch the forward pass", forward(p, n_processors, stream), device);
  return {of.loss, norms, of.shift, of.inverse_total, of.negative, of.counts};
}

Gradients backward(const Tensor& upstream, const MaybeTensor& weights, const Tensor& embeddings, const Tensor& zhat,
                   const Tensor& norms, const Tensor& shift, const Tensor& inverse_total, const Tensor& negative,
                   const Tensor& groups, const Tensor& counts, const MaybeTensor& labels, const MaybeTensor& prototypes,
                   bool needs_temperature CLOP_CUDA_OPTIONS_PARAMETERS) {
  const int32_t device = device_of("embeddings", embeddings);
  const CurrentDevice current(device);
  Backward p = {};
  set_pairs(p, CLOP_GIVEN_OPTIONS(device), embeddings, zhat, groups, compute_dtype, device);
  set_classes(p, p, labels, prototypes, device);
  set_softmax(p, weights, shift, inverse_total, negative, device);
  Gradients gradients = set_gradients(p, upstream, weights, embeddings, norms, counts, needs_temperature, device);
  const int64_t n_processors = n_processors_of(device);
  const Memory scratch =
      allocate_scratch(embeddings, Part{p.coefficients, n_coefficients(p)}, Part{p.partial_sums, most_blocks(p.n_rows)},
                       Part{p.n_finished, n_counters(p.n_rows)}, Part{p.split_sums, split_floats(p, n_processors)});
  check("cannot launch the backward pass", backward(p, n_processors, current_stream(device)), device);
  return gradients;
}

Tensor prototype_gradient(const Tensor& upstream, const MaybeTensor& weights, const Tensor& zhat, const Tensor& counts,
                          const Tensor& by_class, const Tensor& bounds, const Tensor& prototypes CLOP_CUDA_OPTIONS_PARAMETERS) {
  const int32_t device = device_of("zhat", zhat);
  const CurrentDevice current(device);
  PrototypeGradient p = {};
  set_rows(p, CLOP_GIVEN_OPTIONS(device), zhat, zhat, compute_dtype, device);
  if (prototypes.dim() != 2 || prototypes.size(0) < 1) refuse("prototypes", "(K, D), at least one");
  p.n_classes = prototypes.size(0);
  p.prototypes = floats("prototypes", prototypes, device, {p.n_classes, p.width});
  p.upstream = floats("upstream", upstream, device, {});
  p.weights = floats("weights", weights, device, {p.n_rows});
  p.counts = floats("counts", counts, device, {2});
  p.by_class = integers("by_class", by_class, device, {p.n_rows});
  p.bounds = integers("bounds", bounds, device, {p.n_classes + 1});
  const int64_t parts = 4 * n_processors_of(device) / p.n_classes;  // four blocks a processor, unless there are more classes
  p.n_parts = parts < 1 ? 1 : parts;
  const Tensor partial_gradients = allocate("partial gradients", zhat, {p.n_parts, p.n_classes, p.width}, kFloat);
  p.partial_gradients = mutable_floats(partial_gradients);
  check("cannot launch the gradient of the prototypes", prototype_gradient(p, current_stream(device)), device);
  return partial_gradients;
}

// ---- the separate passes over pairs ------------------------------------------------------------------------------------

Tensor pair_softmax(const Tensor& zhat, const Tensor& groups CLOP_CUDA_OPTIONS_PARAMETERS) {
  const int32_t device = device_of("zhat", zhat);
  const CurrentDevice current(device);
  PairSoftmax p = {};
  set_pairs_alone(p, CLOP_GIVEN_OPTIONS(device), zhat, groups, compute_dtype, device);
  const Tensor statistics = allocate("statistics", zhat, {4, p.n_rows}, kFloat);
  p.statistics = mutable_floats(statistics);
  const int64_t n_processors = n_processors_of(device), n_floats = split_floats(p, n_processors);
  Memory scratch;
  if (n_floats > 0) scratch = allocate_scratch(zhat, Part{p.split_sums, n_floats}, Part{p.n_finished, n_counters(p.n_rows)});
  check("cannot launch the sums over pairs", pair_softmax(p, n_processors, current_stream(device)), device);
  return statistics;
}

Tensor pair_gradient(const Tensor& zhat, const Tensor& groups, const Tensor& given CLOP_CUDA_OPTIONS_PARAMETERS) {
  const int32_t device = device_of("zhat", zhat);
  const CurrentDevice current(device);
  PairGradient p = {};
  set_pairs_alone(p, CLOP_GIVEN_OPTIONS(device), zhat, groups, compute_dtype, device);
  p.given = floats("given", given, device, {4, p.n_rows});
  const Tensor sums = allocate("sums", zhat, {p.is_one_way ? p.n_left : p.n_rows, p.width}, kFloat);
  p.sums = mutable_floats(sums);
  const int64_t n_processors = n_processors_of(device), n_floats = split_floats(p, n_processors);
  const Memory scratch = allocate_scratch(zhat, Part{p.coefficients, n_coefficients(p)}, Part{p.split_sums, n_floats},
                                          Part{p.n_finished, n_floats > 0 ? n_counters(p.n_rows) : 0});
  check("cannot launch the gradient over pairs", pair_gradient(p, n_processors, current_stream(device)), device);
  return sums;
}

Tensor pair_coefficients(const Tensor& zhat, const Tensor& groups, const Tensor& given CLOP_CUDA_OPTIONS_PARAMETERS) {
  const int32_t device = device_of("zhat", zhat);
  const CurrentDevice current(device);
  PairGradient p = {};
  set_pairs_alone(p, CLOP_GIVEN_OPTIONS(device), zhat, groups, compute_dtype, device);
  p.given = floats("given", given, device, {4, p.n_rows});
  const Tensor coefficients = allocate("coefficients", zhat, {n_coefficients(p)}, kFloat);
  p.coefficients = mutable_floats(coefficients);
  check("cannot launch the coefficients", pair_coefficients(p, current_stream(device)), device);
  return coefficients;
}

// ---- wide rows: the launches between the library's products ------------------------------------------------------------

void panel_softmax(const Tensor& products, int64_t first_row, int64_t first_column, const Tensor& statistics, const Tensor& zhat,
                   const Tensor& groups, bool adds_scale CLOP_CUDA_OPTIONS_PARAMETERS) {
  const int32_t device = device_of("zhat", zhat);
  const CurrentDevice current(device);
  Panel p = {};
  set_panel(p, CLOP_GIVEN_OPTIONS(device), products, first_row, first_column, zhat, groups, compute_dtype, device);
  p.adds_scale = adds_scale;
  p.statistics = written_floats("statistics", statistics, device, {4, p.n_rows});
  check("cannot launch the sums of a panel", panel_softmax(p, current_stream(device)), device);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> panel_loss(const Tensor& statistics, const Tensor& distances,
                                                              const Tensor& zhat, const Tensor& groups, const MaybeTensor& labels,
                                                              const MaybeTensor& prototypes CLOP_CUDA_OPTIONS_PARAMETERS) {
  const int32_t device = device_of("zhat", zhat);
  const CurrentDevice current(device);
  Forward p = {};
  set_pairs(p, CLOP_GIVEN_OPTIONS(device), zhat, zhat, groups, compute_dtype, device);
  set_classes(p, p, labels, prototypes, device);
  p.statistics = written_floats("statistics", statistics, device, {4, p.n_rows});
  p.distances = floats("distances", distances, device, {p.n_rows});
  const Losses of(p, zhat);
  const Memory scratch = allocate_scratch(zhat, Part{p.partial_sums, kPartialSums * most_blocks(p.n_rows)},
                                          Part{p.n_finished, n_counters(p.n_rows)});
  check("cannot launch the loss", panel_loss(p, current_stream(device)), device);
  return {of.loss, of.shift, of.inverse_total, of.negative, of.counts};
}

std::tuple<Tensor, Tensor> coefficients(const MaybeTensor& weights, const Tensor& zhat, const Tensor& shift,
                                        const Tensor& inverse_total, const Tensor& negative,
                                        const Tensor& groups CLOP_CUDA_OPTIONS_PARAMETERS) {
  const int32_t device = device_of("zhat", zhat);
  const CurrentDevice current(device);
  Backward p = {};
  set_pairs(p, CLOP_GIVEN_OPTIONS(device), zhat, zhat, groups, compute_dtype, device);
  set_softmax(p, weights, shift, inverse_total, negative, device);
  const Tensor coefficients = allocate("coefficients", zhat, {n_coefficients(p)}, kFloat),
               n_finished = allocate("counters", zhat, {n_counters(p.n_rows)}, ScalarType::Int);
  p.coefficients = mutable_floats(coefficients);
  p.n_finished = static_cast<unsigned*>(n_finished.mutable_data_ptr());
  check("cannot launch the coefficients", clop::cuda::coefficients(p, current_stream(device)), device);
  return {coefficients, n_finished};
}

Tensor panel_pairs(const Tensor& products, int64_t first_row, int64_t first_column, const Tensor& coefficients,
                   const Tensor& zhat, const Tensor& groups CLOP_CUDA_OPTIONS_PARAMETERS) {
  const int32_t device = device_of("zhat", zhat);
  const CurrentDevice current(device);
  Panel p = {};
  set_panel(p, CLOP_GIVEN_OPTIONS(device), products, first_row, first_column, zhat, groups, compute_dtype, device);
  p.n_padded = padded_rows(p.n_rows);
  p.coefficients = written_floats("coefficients", coefficients, device, {6 * p.n_padded});
  const Tensor pairs = allocate("a panel", zhat, {p.n_panel_rows, p.n_panel_columns}, compute_dtype);
  p.pairs = pairs.mutable_data_ptr();
  check("cannot launch the weights of a panel", panel_pairs(p, current_stream(device)), device);
  return pairs;
}

Gradients panel_finish(const Tensor& sums, const Tensor& n_finished, const Tensor& upstream, const MaybeTensor& weights,
                       const Tensor& embeddings, const Tensor& zhat, const Tensor& norms, const Tensor& groups,
                       const Tensor& counts, const MaybeTensor& labels, const MaybeTensor& prototypes,
                       bool needs_temperature CLOP_CUDA_OPTIONS_PARAMETERS) {
  const int32_t device = device_of("embeddings", embeddings);
  const CurrentDevice current(device);
  Backward p = {};
  set_pairs(p, CLOP_GIVEN_OPTIONS(device), embeddings, zhat, groups, compute_dtype, device);
  set_classes(p, p, labels, prototypes, device);
  Gradients gradients = set_gradients(p, upstream, weights, embeddings, norms, counts, needs_temperature, device);
  p.sums = written_floats("sums", sums, device, {p.n_rows, p.width});
  data<int32_t>("n_finished", n_finished, ScalarType::Int, "int32", device, {n_counters(p.n_rows)});
  p.n_finished = static_cast<unsigned*>(n_finished.mutable_data_ptr());
  const Memory scratch = allocate_scratch(embeddings, Part{p.partial_sums, most_blocks(p.n_rows)});
  check("cannot launch the end of the backward pass", panel_finish(p, current_stream(device)), device);
  return gradients;
}

}  // namespace clop::cuda
