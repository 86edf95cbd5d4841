// The services of a GPU that the operators need: where tensors are, the current stream, memory. runtime.cpp asks CUDA and torch.
// tests/host/runtime.cpp replaces it in tests: there the CPU plays the GPU, and simt.h runs the kernels.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <initializer_list>
#include <optional>
#include <string>
#include <vector>

struct CUstream_st;

namespace clop::cuda {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Says why the kernels cannot run on this device; empty if they can.
std::optional<std::string> obstacle(int64_t device);

// If `error`, a cudaError_t, is not 0, throws an exception that says for a person what went wrong and what helps.
void check(const char* what, int error, int32_t device);

bool is_on_gpu(const Tensor& tensor);

// Makes a device the current device, both of torch and of the CUDA runtime that is linked into this extension.
class CurrentDevice {
 public:
  explicit CurrentDevice(int32_t index);

 private:
  std::optional<torch::stable::accelerator::DeviceGuard> guard_;
};

CUstream_st* current_stream(int32_t device);
int64_t n_processors_of(int32_t device);

// Allocates a tensor on the device of `like`; its contents are undefined. `name` stands in the message if there is not enough
// memory.
Tensor allocate(const char* name, const Tensor& like, std::initializer_list<int64_t> sizes, ScalarType dtype);

// A part of the scratch: memory for `count` numbers, at a multiple of 16 bytes, whose address is written to `pointer` (null for 0
// numbers). Hold the returned Memory until all launches are queued. Afterwards the allocator gives it only to later work of the
// same stream.
template <class T>
struct Part {
  T*& pointer;
  int64_t count;
};
template <class T>
Part(T*&, int64_t) -> Part<T>;

using Memory = std::vector<Tensor>;
Memory allocate_scratch(const Tensor& like, int n_parts, const int64_t* bytes, void** pointers);

template <class... T>
Memory allocate_scratch(const Tensor& like, const Part<T>&... parts) {
  const int64_t bytes[] = {parts.count * int64_t(sizeof(T))...};
  void* pointers[sizeof...(T)] = {};
  Memory memory = allocate_scratch(like, int(sizeof...(T)), bytes, pointers);
  int k = 0;
  ((parts.pointer = static_cast<T*>(pointers[k++])), ...);
  return memory;
}

}  // namespace clop::cuda
