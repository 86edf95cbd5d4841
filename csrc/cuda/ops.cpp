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
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
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
    refuse(name, std::string("a contiguous ") + dtype_name + " tensor of shape " + shape_text(sizes) +
                     " on the GPU of the embeddings");
  return static_cast<const T*>(tensor->const_data_ptr());
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

std::tuple<Tensor, Tensor, Tensor> prologue(Tensor embeddings, std::optional<Tensor> order, std::optional<Tensor> labels,
                                            std::optional<Tensor> prototypes, int64_t n_views, int64_t distance,
                                            ScalarType compute_dtype) {
  if (n_views < 1) refuse("n_views", "1 or more");
  if (!embeddings.is_cuda() || embeddings.dim() != 2 || embeddings.size(1) < 1 || embeddings.size(0) % n_views != 0)
    refuse("embeddings", "(n_views * B, D) on a GPU");
  if (embeddings.size(0) > INT32_MAX) refuse("embeddings", "fewer than 2^31 rows");
  if (distance < 0 || distance > 2) refuse("distance", "0, 1 or 2");
  const int32_t device = embeddings.get_device_index();

  Prologue p;
  p.n_rows = embeddings.size(0);
  p.width = embeddings.size(1);
  p.n_views = n_views;
  p.n_classes = prototypes && prototypes->dim() == 2 ? prototypes->size(0) : 0;
  p.dtype = dtype_of("embeddings", embeddings.scalar_type());
  p.compute_dtype = dtype_of("compute_dtype", compute_dtype);
  p.distance = Distance(distance);
  p.embeddings = embeddings.const_data_ptr();
  p.stride_z_row = embeddings.stride(0);
  p.stride_z_column = embeddings.stride(1);
  p.order = data<int32_t>("order", order, ScalarType::Int, "int32", device, {p.n_rows});
  p.labels = data<int64_t>("labels", labels, ScalarType::Long, "int64", device, {p.n_rows / n_views});
  p.prototypes = data<float>("prototypes", prototypes, ScalarType::Float, "float32", device, {p.n_classes, p.width});
  if (prototypes && p.n_classes < 1) refuse("prototypes", "at least one");
  if (prototypes && !labels) refuse("labels", "a tensor, since there are prototypes");

  const Device current(device);
  Tensor normalized = allocate("normalized", embeddings, {p.n_rows, p.width}, compute_dtype);
  Tensor norms = allocate("norms", embeddings, {p.n_rows}, ScalarType::Float);
  Tensor distances = allocate("distances", embeddings, {p.n_rows}, ScalarType::Float);
  p.zhat = normalized.mutable_data_ptr();
  p.norms = static_cast<float*>(norms.mutable_data_ptr());
  p.distances = static_cast<float*>(distances.mutable_data_ptr());
  p.n_finished = nullptr;
  check("cannot launch the kernel 'prologue'", launch_prologue(p, current_stream(device)), device);
  return {normalized, norms, distances};
}

}  // namespace clop::cuda
