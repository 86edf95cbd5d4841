#include "ops.h"

#include <cuda_runtime_api.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/ops.h>

#include <initializer_list>
#include <stdexcept>

#include "prologue.h"

// The one symbol that only a torch with CUDA has. Weak, so that the extension loads without it too; torch declares it only
// under USE_CUDA, and its stable wrapper needs torch 2.13.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** ret_stream);

namespace clop::cuda {
namespace {

// ---- errors ----------------------------------------------------------------------------------------------------------

std::string version_text(int version) { return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10); }

std::string device_text(int device) {
  cudaDeviceProp properties;
  std::string text = "GPU " + std::to_string(device);
  if (cudaGetDeviceProperties(&properties, device) != cudaSuccess) return text;
  return text + " (" + properties.name + ", sm_" + std::to_string(properties.major) + std::to_string(properties.minor) + ")";
}

// What went wrong and what helps, for a person.
std::string explain(cudaError_t error, int device) {
  const std::string built = "built with CUDA " CLOP_CUDA_VERSION " for the architectures " CLOP_CUDA_ARCHS;
  switch (error) {
    case cudaErrorInsufficientDriver: {
      int supported = 0;
      if (cudaDriverGetVersion(&supported) != cudaSuccess || supported == 0) return "there is no NVIDIA driver on this machine";
      return "the NVIDIA driver supports CUDA " + version_text(supported) +
             " and these kernels need CUDA " CLOP_CUDA_VERSION
             ": update the driver, or install a build of clop_kernels for an older CUDA";
    }
    case cudaErrorNoDevice:
      return "there is no NVIDIA GPU that this process can see (CUDA_VISIBLE_DEVICES hides them, or none is there)";
    case cudaErrorNoKernelImageForDevice:
    case cudaErrorInvalidDeviceFunction:
      return "the kernels have no code for " + device_text(device) + ": " + built +
             "; to build for this GPU, CLOP_CUDA_ARCHS=<its number, 80 or above> pip install --no-build-isolation . from source";
    case cudaErrorUnsupportedPtxVersion:
      return "the NVIDIA driver is too old to compile the kernels for " + device_text(device) + ": " + built +
             "; update the driver, or build for this GPU's own architecture (CLOP_CUDA_ARCHS)";
    default:
      return std::string(cudaGetErrorString(error)) + " on " + device_text(device) + "; " + built;
  }
}

void check(const char* what, int error, int device) {
  if (error != cudaSuccess)
    throw std::runtime_error(std::string("clop_native: ") + what + ": " + explain(static_cast<cudaError_t>(error), device));
}

// ---- devices and streams -----------------------------------------------------------------------------------------------

// Makes a device the current one of torch, and of the CUDA runtime that is linked into this extension.
class Device {
 public:
  explicit Device(int32_t index) : guard_(index) { check("cannot use the GPU", cudaSetDevice(index), index); }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
};

CUstream_st* current_stream(int32_t device) {
  if (aoti_torch_get_current_cuda_stream == nullptr)
    throw std::runtime_error("clop_native: this build of torch has no CUDA; its CUDA builds are at https://pytorch.org");
  void* stream = nullptr;
  // torch's macros for this will not do: 2.11 lacks STABLE_TORCH_ERROR_CODE_CHECK, and TORCH_ERROR_CODE_CHECK names no GPU.
  if (aoti_torch_get_current_cuda_stream(device, &stream) != 0)
    throw std::runtime_error("clop_native: torch cannot say which stream of " + device_text(device) + " is the current one");
  return static_cast<CUstream_st*>(stream);
}

// ---- tensors -----------------------------------------------------------------------------------------------------------

[[noreturn]] void refuse(const char* name, const std::string& expected) {
  throw std::runtime_error(std::string("clop_native: ") + name + ": expected " + expected);
}

std::string shape_text(std::initializer_list<int64_t> sizes) {
  std::string text;
  for (const int64_t size : sizes) text += (text.empty() ? "(" : ", ") + std::to_string(size);
  return text + ")";
}

Dtype dtype_of(const char* name, ScalarType type) {
  switch (type) {
    case ScalarType::Float:
      return Dtype::float32;
    case ScalarType::Half:
      return Dtype::float16;
    case ScalarType::BFloat16:
      return Dtype::bfloat16;
    default:
      refuse(name, "float32, float16 or bfloat16");
  }
}

// The kernels trust what they are given, and the operators can be called by anyone: a wrong call is an exception, not a crash.
// A null pointer where there is no tensor.
template <class T>
const T* data(const char* name, const std::optional<Tensor>& tensor, ScalarType dtype, const char* dtype_name, int32_t device,
              std::initializer_list<int64_t> sizes) {
  if (!tensor) return nullptr;
  bool is_right = tensor->is_cuda() && tensor->get_device_index() == device && tensor->scalar_type() == dtype &&
                  tensor->is_contiguous() && tensor->dim() == int64_t(sizes.size());
  int64_t dim = 0;
  for (const int64_t size : sizes) is_right = is_right && tensor->size(dim++) == size;
  if (!is_right)
    refuse(name,
           std::string("a contiguous ") + dtype_name + " tensor of shape " + shape_text(sizes) + " on the GPU of the embeddings");
  return static_cast<const T*>(tensor->const_data_ptr());
}

// The rows zhat of a pass, which its kernels copy 16 bytes at a time.
template <class Pass>
void set_zhat(Pass& p, const Tensor& normalized, ScalarType dtype, int32_t device) {
  if (!normalized.is_cuda() || normalized.get_device_index() != device || normalized.scalar_type() != dtype ||
      normalized.dim() != 2 || normalized.size(0) != p.n_rows || normalized.size(1) != p.width)
    refuse("normalized",
           "a compute_dtype tensor of shape " + shape_text({p.n_rows, p.width}) + " on the GPU of the embeddings");
  const int64_t pitch = normalized.stride(0), row_bytes = pitch * int64_t(normalized.element_size());
  const void* const zhat = normalized.const_data_ptr();
  if (normalized.stride(1) != 1 || pitch < p.width || pitch > INT32_MAX || row_bytes % 16 != 0 ||
      reinterpret_cast<uintptr_t>(zhat) % 16 != 0)
    refuse("normalized", "rows that begin at multiples of 16 bytes, as unit_rows in clop_kernels/backends/contract.py lays them");
  p.zhat = const_cast<void*>(zhat);  // a result of the forward pass, and else only read
  p.pitch = pitch;
}

// On the embeddings' device. Why torch has no memory does not come through its C interface; how much was asked for is said here.
Tensor allocate(const char* name, const Tensor& embeddings, std::initializer_list<int64_t> sizes, ScalarType dtype) {
  try {
    return torch::stable::new_empty(embeddings, sizes, dtype);
  } catch (const std::runtime_error& error) {
    throw std::runtime_error(std::string("clop_native: cannot allocate ") + name + " " + shape_text(sizes) +
                             ": is the memory of the GPU full? " + error.what());
  }
}

}  // namespace

std::optional<std::string> obstacle(int64_t device) {
  int n_devices = 0;
  if (const cudaError_t error = cudaGetDeviceCount(&n_devices); error != cudaSuccess) return explain(error, 0);
  if (aoti_torch_get_current_cuda_stream == nullptr) return "this build of torch has no CUDA";
  if (device < 0 || device >= n_devices)
    return "there is no GPU " + std::to_string(device) + ": this process sees " + std::to_string(n_devices);
  const Device current(static_cast<int32_t>(device));
  const auto error = static_cast<cudaError_t>(find_prologue());
  if (error == cudaSuccess) return std::nullopt;
  cudaGetLastError();  // told here, so that the next launch does not report it
  return explain(error, static_cast<int>(device));
}

std::tuple<Tensor, Tensor> prologue(Tensor embeddings, Tensor normalized, std::optional<Tensor> order,
                                    std::optional<Tensor> labels, std::optional<Tensor> prototypes, int64_t n_views,
                                    int64_t distance, bool normalize, bool has_sides) {
  if (n_views < 1) refuse("n_views", "1 or more");
  if (!embeddings.is_cuda() || embeddings.dim() != 2 || embeddings.size(1) < 1 || embeddings.size(0) % n_views != 0)
    refuse("embeddings", "(n_views * B, D) on a GPU");
  if (embeddings.size(0) > INT32_MAX) refuse("embeddings", "fewer than 2^31 rows");
  if (distance < 0 || distance > 2) refuse("distance", "0, 1 or 2");
  const int32_t device = embeddings.get_device_index();

  Prologue p = {};
  p.n_rows = embeddings.size(0);
  p.width = embeddings.size(1);
  p.n_views = n_views;
  p.n_classes = prototypes && prototypes->dim() == 2 ? prototypes->size(0) : 0;
  p.dtype = dtype_of("embeddings", embeddings.scalar_type());
  p.compute_dtype = dtype_of("normalized", normalized.scalar_type());
  set_zhat(p, normalized, normalized.scalar_type(), device);
  p.distance = Distance(distance);
  p.normalize = normalize;
  p.has_sides = has_sides;
  p.embeddings = embeddings.const_data_ptr();
  p.stride_z_row = embeddings.stride(0);
  p.stride_z_column = embeddings.stride(1);
  p.order = data<int32_t>("order", order, ScalarType::Int, "int32", device, {p.n_rows});
  p.labels = data<int64_t>("labels", labels, ScalarType::Long, "int64", device, {p.n_rows / n_views});
  p.prototypes = data<float>("prototypes", prototypes, ScalarType::Float, "float32", device, {p.n_classes, p.width});
  if (prototypes && p.n_classes < 1) refuse("prototypes", "at least one");
  if (prototypes && !labels) refuse("labels", "a tensor, since there are prototypes");

  const Device current(device);
  Tensor norms = allocate("norms", embeddings, {p.n_rows}, ScalarType::Float);
  Tensor distances = allocate("distances", embeddings, {p.n_rows}, ScalarType::Float);
  p.norms = static_cast<float*>(norms.mutable_data_ptr());
  p.distances = static_cast<float*>(distances.mutable_data_ptr());
  p.n_finished = nullptr;
  check("cannot launch the kernel 'prologue'", launch_prologue(p, current_stream(device)), device);
  return {norms, distances};
}

// ---- the passes --------------------------------------------------------------------------------------------------------

namespace {

constexpr auto kFloat = ScalarType::Float;

int64_t n_processors_of(int32_t device) {
  int count = 0;
  check("cannot ask the GPU", cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device), device);
  return count;
}

int32_t device_of(const char* name, const Tensor& tensor) {
  if (!tensor.is_cuda() || tensor.dim() != 2 || tensor.size(0) < 1 || tensor.size(1) < 1)
    refuse(name, "(N, D) on a GPU, not empty");
  return tensor.get_device_index();
}

const float* floats(const char* name, const Tensor& tensor, int32_t device, std::initializer_list<int64_t> sizes) {
  return data<float>(name, tensor, kFloat, "float32", device, sizes);
}

float* mutable_floats(const Tensor& tensor) { return static_cast<float*>(tensor.mutable_data_ptr()); }

// Scratch of a pass over pairs, where several blocks share the same rows.
struct SplitTensors {
  std::optional<Tensor> split_sums, n_finished;

  template <class Pass>
  SplitTensors(Pass& p, const Tensor& like, int64_t n_processors) {
    const int64_t n_floats = split_floats(p, n_processors);
    if (n_floats == 0) return;
    split_sums = allocate("sums over parts of the columns", like, {n_floats}, kFloat);
    p.split_sums = mutable_floats(*split_sums);
    if (p.n_finished != nullptr) return;
    n_finished = allocate("counters", like, {n_counters(p.n_rows)}, ScalarType::Int);
    p.n_finished = static_cast<unsigned*>(n_finished->mutable_data_ptr());
  }
};

// The fields of a pass that describe its loss. `rows`: the embeddings or zhat.
template <class Pass>
Pass pass_of(const Tensor& rows, int32_t device, CLOP_LOSS_PARAMETERS) {
  if (rows.size(0) > INT32_MAX - 128) refuse("embeddings", "fewer than 2^31 - 128 rows");
  if (n_views < 1 || rows.size(0) % n_views != 0) refuse("n_views", "a divisor of the number of rows");
  if (distance < 0 || distance > 2) refuse("distance", "0, 1 or 2");
  if (reduction < 0 || reduction > 2) refuse("reduction", "0, 1 or 2");
  if (prototypes && (prototypes->dim() != 2 || prototypes->size(0) < 1)) refuse("prototypes", "(K, D), at least one");
  if (prototypes && !labels) refuse("labels", "a tensor, since there are prototypes");
  if (groups.dim() != 2) refuse("groups", "(3, N) or (3, 0)");
  if (n_left < -1 || n_left > rows.size(0)) refuse("n_left", "a number of rows, or -1");
  if (n_left >= 0 && (groups.size(1) == 0 ? n_views != 2 || 2 * n_left != rows.size(0) : n_views != 1))
    refuse("n_left", "N / 2 of two views, or groups by label of one view");
  Pass p = {};
  p.n_rows = rows.size(0);
  p.width = rows.size(1);
  p.n_views = n_views;
  p.n_classes = prototypes ? prototypes->size(0) : 0;
  p.dtype = dtype_of("embeddings", rows.scalar_type());
  p.compute_dtype = dtype_of("compute_dtype", compute_dtype);
  p.is_tf32 = is_tf32;
  p.groups = data<int32_t>("groups", groups, ScalarType::Int, "int32", device, {3, groups.size(1) == 0 ? 0 : p.n_rows});
  if (groups.size(1) == 0) p.groups = nullptr;
  p.labels = data<int64_t>("labels", labels, ScalarType::Long, "int64", device, {p.n_rows / n_views});
  p.prototypes = data<float>("prototypes", prototypes, kFloat, "float32", device, {p.n_classes, p.width});
  p.temperature = data<float>("temperature", temperature, kFloat, "float32", device, {});
  p.scale = static_cast<float>(scale);
  p.scale_rest = static_cast<float>(scale_rest);
  p.prototype_weight = static_cast<float>(prototype_weight);
  p.distance = Distance(distance);
  p.reduction = Reduction(reduction);
  p.n_left = n_left;
  p.normalize = normalize;
  p.negatives_only = negatives_only;
  return p;
}

#define CLOP_LOSS_ARGUMENTS                                                                                                  \
  groups, labels, prototypes, temperature, scale, scale_rest, n_views, prototype_weight, distance, reduction, compute_dtype, \
      is_tf32, normalize, n_left, negatives_only

// The same where pairs are alone.
template <class Pass>
Pass pairs_of(const Tensor& zhat, int32_t device, CLOP_PAIRS_PARAMETERS) {
  if (groups.dim() != 2 || groups.size(1) != zhat.size(0)) refuse("groups", "(3, N)");
  if (n_left == 0 || n_left == zhat.size(0)) refuse("n_left", "rows on both sides");
  Pass p = pass_of<Pass>(zhat, device, groups, {}, {}, temperature, scale, scale_rest, 1, 0.0, 0, 0, zhat.scalar_type(), is_tf32,
                         normalize, n_left, false);
  p.pairs_alone = true;
  return p;
}

#define CLOP_PAIRS_ARGUMENTS groups, n_left, temperature, scale, scale_rest, is_tf32, normalize

// What a forward pass writes beside zhat and the norms, and its scratch. Tensors live as long as the launches are not yet queued;
// after that the allocator hands their memory to later work of the same stream only.
struct LossTensors {
  Tensor loss, shift, inverse_total, negative, counts, partial_sums, n_finished;

  LossTensors(Forward& p, const Tensor& like)
      : loss(p.reduction == Reduction::none ? allocate("loss", like, {p.n_rows}, kFloat) : allocate("loss", like, {}, kFloat)),
        shift(allocate("shift", like, {p.n_rows}, kFloat)),
        inverse_total(allocate("inverse_total", like, {p.n_rows}, kFloat)),
        negative(allocate("negative", like, {p.n_rows}, kFloat)),
        counts(allocate("counts", like, {2}, kFloat)),
        partial_sums(allocate("partial sums", like, {kPartialSums, most_blocks(p.n_rows)}, kFloat)),
        n_finished(allocate("counters", like, {n_counters(p.n_rows)}, ScalarType::Int)) {
    p.loss = mutable_floats(loss);
    p.shift = mutable_floats(shift);
    p.inverse_total = mutable_floats(inverse_total);
    p.negative = mutable_floats(negative);
    p.counts = mutable_floats(counts);
    p.partial_sums = mutable_floats(partial_sums);
    p.n_finished = static_cast<unsigned*>(n_finished.mutable_data_ptr());
  }
};

// The same of a backward pass.
struct GradientTensors {
  Backward p;
  int32_t device;
  Tensor grad_z, grad_temperature, partial_sums, n_finished, coefficients;

  explicit GradientTensors(CLOP_BACKWARD_PARAMETERS)
      : p(pass_of<Backward>(embeddings, device_of("embeddings", embeddings), CLOP_LOSS_ARGUMENTS)),
        device(embeddings.get_device_index()),
        grad_z(allocate("the gradient", embeddings, {p.n_rows, p.width}, embeddings.scalar_type())),
        grad_temperature(needs_temperature ? allocate("the temperature's gradient", embeddings, {}, kFloat)
                                           : allocate("no gradient", embeddings, {0}, kFloat)),
        partial_sums(allocate("partial sums", embeddings, {most_blocks(p.n_rows)}, kFloat)),
        n_finished(allocate("counters", embeddings, {n_counters(p.n_rows)}, ScalarType::Int)),
        coefficients(allocate("coefficients", embeddings, {6, padded_rows(p.n_rows)}, kFloat)) {
    p.upstream = floats("upstream", upstream, device, {});
    p.weights = data<float>("weights", weights, kFloat, "float32", device, {p.n_rows});
    set_zhat(p, normalized, compute_dtype, device);
    p.norms = floats("norms", norms, device, {p.n_rows});
    p.shift = floats("shift", shift, device, {p.n_rows});
    p.inverse_total = floats("inverse_total", inverse_total, device, {p.n_rows});
    p.negative = floats("negative", negative, device, {p.n_rows});
    p.counts = floats("counts", counts, device, {2});
    p.grad_z = grad_z.mutable_data_ptr();
    p.grad_temperature = needs_temperature ? mutable_floats(grad_temperature) : nullptr;
    p.partial_sums = mutable_floats(partial_sums);
    p.n_finished = static_cast<unsigned*>(n_finished.mutable_data_ptr());
    p.coefficients = mutable_floats(coefficients);
    p.n_padded = padded_rows(p.n_rows);
  }
};

#define CLOP_BACKWARD_ARGUMENTS \
  upstream, weights, embeddings, normalized, norms, shift, inverse_total, negative, counts, needs_temperature, CLOP_LOSS_ARGUMENTS

// A backward pass over pairs alone, of the coefficients that are given.
struct PairGradient {
  Backward p;
  Tensor coefficients;

  PairGradient(const Tensor& zhat, const Tensor& given, int32_t device, CLOP_PAIRS_PARAMETERS)
      : p(pairs_of<Backward>(zhat, device, CLOP_PAIRS_ARGUMENTS)),
        coefficients(allocate("coefficients", zhat, {6, padded_rows(p.n_rows)}, kFloat)) {
    set_zhat(p, zhat, zhat.scalar_type(), device);
    p.given = floats("given", given, device, {4, p.n_rows});
    p.coefficients = mutable_floats(coefficients);
    p.n_padded = padded_rows(p.n_rows);
  }
};

Panel panel_of(const Tensor& products, int64_t first_row, int64_t first_column, const Tensor& normalized, int32_t device,
               CLOP_LOSS_PARAMETERS) {
  Panel p = pass_of<Panel>(normalized, device, CLOP_LOSS_ARGUMENTS);
  if (products.dim() != 2 || first_row < 0 || first_column < 0 || first_row + products.size(0) > p.n_rows ||
      first_column + products.size(1) > p.n_rows)
    refuse("products", "a rectangle of the (N, N) similarities");
  p.n_panel_rows = products.size(0);
  p.n_panel_columns = products.size(1);
  p.products = floats("products", products, device, {p.n_panel_rows, p.n_panel_columns});
  p.first_row = first_row;
  p.first_column = first_column;
  return p;
}

}  // namespace

Tensor groups(Tensor labels, int64_t n_views, int64_t n_left) {
  if (!labels.is_cuda() || labels.dim() != 1 || labels.size(0) < 1) refuse("labels", "(B,) on a GPU, not empty");
  if (n_views < 1 || labels.size(0) > INT32_MAX / n_views) refuse("n_views", "1 or more, and fewer than 2^31 rows in all");
  if (n_left < -1 || n_left > labels.size(0) || (n_left >= 0 && n_views != 1))
    refuse("n_left", "-1, or a number of labels of one view");
  const int32_t device = labels.get_device_index();
  const Device current(device);
  Grouping p = {};
  p.n_instances = labels.size(0);
  p.n_views = n_views;
  p.n_left = n_left;
  p.labels = data<int64_t>("labels", labels, ScalarType::Long, "int64", device, {p.n_instances});
  const Tensor table = allocate("groups", labels, {3, n_views * p.n_instances}, ScalarType::Int);
  p.groups = static_cast<int32_t*>(table.mutable_data_ptr());
  check("cannot launch the kernel 'groups'", group(p, current_stream(device)), device);
  return table;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> forward(Tensor embeddings, Tensor normalized, CLOP_LOSS_PARAMETERS) {
  const int32_t device = device_of("embeddings", embeddings);
  const Device current(device);
  Forward p = pass_of<Forward>(embeddings, device, CLOP_LOSS_ARGUMENTS);
  p.embeddings = embeddings.const_data_ptr();
  p.stride_z_row = embeddings.stride(0);
  p.stride_z_column = embeddings.stride(1);
  set_zhat(p, normalized, compute_dtype, device);
  const LossTensors of(p, embeddings);
  const Tensor norms = allocate("norms", embeddings, {p.n_rows}, kFloat),
               distances = allocate("distances", embeddings, {p.n_rows}, kFloat);
  p.norms = mutable_floats(norms);
  p.distances = mutable_floats(distances);
  const int64_t n_processors = n_processors_of(device);
  const SplitTensors of_split(p, embeddings, n_processors);
  check("cannot launch the forward pass", forward(p, n_processors, current_stream(device)), device);
  return {of.loss, norms, of.shift, of.inverse_total, of.negative, of.counts};
}

std::tuple<Tensor, Tensor> backward(CLOP_BACKWARD_PARAMETERS) {
  const Device current(device_of("embeddings", embeddings));
  GradientTensors of(CLOP_BACKWARD_ARGUMENTS);
  const int64_t n_processors = n_processors_of(of.device);
  const SplitTensors of_split(of.p, embeddings, n_processors);
  check("cannot launch the backward pass", backward(of.p, n_processors, current_stream(of.device)), of.device);
  return {of.grad_z, of.grad_temperature};
}

Tensor prototype_gradient(Tensor upstream, std::optional<Tensor> weights, Tensor normalized, Tensor counts, Tensor by_class,
                          Tensor bounds, CLOP_LOSS_PARAMETERS) {
  const int32_t device = device_of("normalized", normalized);
  const Device current(device);
  auto p = pass_of<PrototypeGradient>(normalized, device, CLOP_LOSS_ARGUMENTS);
  if (p.prototypes == nullptr) refuse("prototypes", "a tensor");
  p.upstream = floats("upstream", upstream, device, {});
  p.weights = data<float>("weights", weights, kFloat, "float32", device, {p.n_rows});
  set_zhat(p, normalized, compute_dtype, device);
  p.counts = floats("counts", counts, device, {2});
  p.by_class = data<int64_t>("by_class", by_class, ScalarType::Long, "int64", device, {p.n_rows});
  p.bounds = data<int64_t>("bounds", bounds, ScalarType::Long, "int64", device, {p.n_classes + 1});
  const int64_t parts = 4 * n_processors_of(device) / p.n_classes;  // four blocks a processor, where there are not more classes
  p.n_parts = parts < 1 ? 1 : parts;
  const Tensor partial_gradients = allocate("partial gradients", normalized, {p.n_parts, p.n_classes, p.width}, kFloat);
  p.partial_gradients = mutable_floats(partial_gradients);
  check("cannot launch the gradient of the prototypes", prototype_gradient(p, current_stream(device)), device);
  return partial_gradients;
}

Tensor pair_softmax(Tensor zhat, CLOP_PAIRS_PARAMETERS) {
  const int32_t device = device_of("zhat", zhat);
  const Device current(device);
  Forward p = pairs_of<Forward>(zhat, device, CLOP_PAIRS_ARGUMENTS);
  set_zhat(p, zhat, zhat.scalar_type(), device);
  const Tensor statistics = allocate("statistics", zhat, {4, p.n_rows}, kFloat);
  p.statistics = mutable_floats(statistics);
  const int64_t n_processors = n_processors_of(device);
  const SplitTensors of_split(p, zhat, n_processors);
  check("cannot launch the sums over pairs", pair_softmax(p, n_processors, current_stream(device)), device);
  return statistics;
}

Tensor pair_coefficients(Tensor zhat, Tensor given, CLOP_PAIRS_PARAMETERS) {
  const int32_t device = device_of("zhat", zhat);
  const Device current(device);
  const PairGradient of(zhat, given, device, CLOP_PAIRS_ARGUMENTS);
  check("cannot launch the coefficients", coefficients(of.p, current_stream(device)), device);
  return of.coefficients;
}

Tensor pair_gradient(Tensor zhat, Tensor given, CLOP_PAIRS_PARAMETERS) {
  const int32_t device = device_of("zhat", zhat);
  const Device current(device);
  PairGradient of(zhat, given, device, CLOP_PAIRS_ARGUMENTS);
  const Tensor sums = allocate("sums", zhat, {n_left < 0 ? of.p.n_rows : n_left, of.p.width}, kFloat);
  of.p.sums = mutable_floats(sums);
  const int64_t n_processors = n_processors_of(device);
  const SplitTensors of_split(of.p, zhat, n_processors);
  check("cannot launch the gradient over pairs", backward(of.p, n_processors, current_stream(device)), device);
  return sums;
}

void panel_softmax(Tensor products, int64_t first_row, int64_t first_column, Tensor statistics, Tensor normalized,
                   bool pairs_alone, CLOP_LOSS_PARAMETERS) {
  const int32_t device = device_of("normalized", normalized);
  const Device current(device);
  Panel p = panel_of(products, first_row, first_column, normalized, device, CLOP_LOSS_ARGUMENTS);
  p.pairs_alone = pairs_alone;
  floats("statistics", statistics, device, {4, p.n_rows});
  p.statistics = mutable_floats(statistics);
  check("cannot launch the sums of a panel", panel_softmax(p, current_stream(device)), device);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> panel_loss(Tensor statistics, Tensor distances, Tensor normalized,
                                                              CLOP_LOSS_PARAMETERS) {
  const int32_t device = device_of("normalized", normalized);
  const Device current(device);
  Forward p = pass_of<Forward>(normalized, device, CLOP_LOSS_ARGUMENTS);
  floats("statistics", statistics, device, {4, p.n_rows});
  floats("distances", distances, device, {p.n_rows});
  p.statistics = mutable_floats(statistics);
  p.distances = mutable_floats(distances);
  const LossTensors of(p, normalized);
  check("cannot launch the loss", panel_loss(p, current_stream(device)), device);
  return {of.loss, of.shift, of.inverse_total, of.negative, of.counts};
}

std::tuple<Tensor, Tensor> coefficients(CLOP_BACKWARD_PARAMETERS) {
  const Device current(device_of("embeddings", embeddings));
  const GradientTensors of(CLOP_BACKWARD_ARGUMENTS);
  check("cannot launch the coefficients", coefficients(of.p, current_stream(of.device)), of.device);
  return {of.coefficients, of.n_finished};
}

Tensor panel_pairs(Tensor products, int64_t first_row, int64_t first_column, Tensor coefficients, Tensor normalized,
                   CLOP_LOSS_PARAMETERS) {
  const int32_t device = device_of("normalized", normalized);
  const Device current(device);
  Panel p = panel_of(products, first_row, first_column, normalized, device, CLOP_LOSS_ARGUMENTS);
  p.n_padded = padded_rows(p.n_rows);
  floats("coefficients", coefficients, device, {6, p.n_padded});
  p.coefficients = mutable_floats(coefficients);
  const Tensor pairs = allocate("a panel", normalized, {p.n_panel_rows, p.n_panel_columns}, compute_dtype);
  p.pairs = pairs.mutable_data_ptr();
  check("cannot launch the weights of a panel", panel_pairs(p, current_stream(device)), device);
  return pairs;
}

std::tuple<Tensor, Tensor> panel_finish(Tensor sums, Tensor n_finished, CLOP_BACKWARD_PARAMETERS) {
  const Device current(device_of("embeddings", embeddings));
  GradientTensors of(CLOP_BACKWARD_ARGUMENTS);
  floats("sums", sums, of.device, {of.p.n_rows, of.p.width});
  data<int32_t>("n_finished", n_finished, ScalarType::Int, "int32", of.device, {n_counters(of.p.n_rows)});
  of.p.sums = mutable_floats(sums);
  of.p.n_finished = static_cast<unsigned*>(n_finished.mutable_data_ptr());
  check("cannot launch the end of the backward pass", panel_finish(of.p, current_stream(of.device)), of.device);
  return {of.grad_z, of.grad_temperature};
}

}  // namespace clop::cuda
