// CUDA and torch's allocator behind runtime.h: messages for CUDA errors, devices and streams, memory.
#include "runtime.h"

#include <cuda_runtime_api.h>

#include <stdexcept>

#include "../common/arguments.h"
#include "loss.h"

// The only symbol that a torch without CUDA lacks. It is weak, so that the extension loads there too. torch declares it only
// under USE_CUDA, and torch's stable wrapper needs torch 2.13.
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

// Says for a person what went wrong and what helps.
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
      return "there is no NVIDIA GPU that this process can see (CUDA_VISIBLE_DEVICES hides it, or there is none)";
    case cudaErrorNoKernelImageForDevice:
    case cudaErrorInvalidDeviceFunction:
      return "the kernels have no code for " + device_text(device) + ": " + built +
             "; to build for this GPU, run `CLOP_CUDA_ARCHS=<its number, 80 or above> pip install --no-build-isolation .` in the "
             "source";
    case cudaErrorUnsupportedPtxVersion:
      return "the NVIDIA driver is too old to compile the kernels for " + device_text(device) + ": " + built +
             "; update the driver, or build for this GPU's own architecture (CLOP_CUDA_ARCHS)";
    default:
      return std::string(cudaGetErrorString(error)) + " on " + device_text(device) + "; " + built;
  }
}

}  // namespace

std::optional<std::string> obstacle(int64_t device) {
  int n_devices = 0;
  if (const cudaError_t error = cudaGetDeviceCount(&n_devices); error != cudaSuccess) return explain(error, 0);
  if (aoti_torch_get_current_cuda_stream == nullptr) return "this build of torch has no CUDA";
  if (device < 0 || device >= n_devices)
    return "there is no GPU " + std::to_string(device) + ": this process sees " + std::to_string(n_devices);
  const CurrentDevice current(static_cast<int32_t>(device));
  const auto error = static_cast<cudaError_t>(find_prologue());
  if (error == cudaSuccess) return std::nullopt;
  cudaGetLastError();  // clear the error, so that the next launch does not report it
  return explain(error, static_cast<int>(device));
}

void check(const char* what, int error, int32_t device) {
  if (error != cudaSuccess)
    throw std::runtime_error(std::string("clop_native: ") + what + ": " + explain(static_cast<cudaError_t>(error), device));
}

// ---- devices and streams -----------------------------------------------------------------------------------------------

bool is_on_gpu(const Tensor& tensor) { return tensor.is_cuda(); }

CurrentDevice::CurrentDevice(int32_t index) : guard_(index) { check("cannot use the GPU", cudaSetDevice(index), index); }

CUstream_st* current_stream(int32_t device) {
  if (aoti_torch_get_current_cuda_stream == nullptr)
    throw std::runtime_error("clop_native: this build of torch has no CUDA; its CUDA builds are at https://pytorch.org");
  void* stream = nullptr;
  // torch's own macros do not fit: 2.11 lacks STABLE_TORCH_ERROR_CODE_CHECK, and TORCH_ERROR_CODE_CHECK does not name the GPU.
  if (aoti_torch_get_current_cuda_stream(device, &stream) != 0)
    throw std::runtime_error("clop_native: torch cannot say which stream of " + device_text(device) + " is the current one");
  return static_cast<CUstream_st*>(stream);
}

int64_t n_processors_of(int32_t device) {
  int count = 0;
  check("cannot ask the GPU", cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device), device);
  return count;
}

// ---- memory ------------------------------------------------------------------------------------------------------------

// torch's C interface does not say why an allocation failed, so the message states how much was asked for.
Tensor allocate(const char* name, const Tensor& like, std::initializer_list<int64_t> sizes, ScalarType dtype) {
  try {
    return empty(sizes, dtype, aoti_torch_device_type_cuda(), like.get_device_index());
  } catch (const std::runtime_error&) {
    throw std::runtime_error(std::string("clop_native: cannot allocate ") + name + " " + shape_text(sizes) +
                             ": is the memory of the GPU full?");
  }
}

// Allocates one tensor for all parts, because each allocation costs the host a microsecond.
Memory allocate_scratch(const Tensor& like, int n_parts, const int64_t* bytes, void** pointers) {
  constexpr int64_t kAlignment = 256;
  const auto rounded = [](int64_t size) { return (size + kAlignment - 1) / kAlignment * kAlignment; };
  int64_t total = 0;
  for (int k = 0; k < n_parts; ++k) total += rounded(bytes[k]);
  Memory memory = {allocate("scratch", like, {total}, ScalarType::Byte)};
  auto* at = static_cast<unsigned char*>(memory[0].mutable_data_ptr());
  for (int k = 0; k < n_parts; at += rounded(bytes[k++])) pointers[k] = bytes[k] > 0 ? at : nullptr;
  return memory;
}

}  // namespace clop::cuda
