// What the operators need of a GPU: tensors that are there, its current stream, its memory. runtime.cpp asks CUDA and torch;
// tests/host/runtime.cpp, in its place, makes a GPU of the CPU, for the kernels that simt.h runs there.
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

// Why the kernels cannot run on this device, or nothing if they can.
std::optional<std::string> obstacle(int64_t device);

// Throws if `error`, a cudaError_t, is one: what went wrong and what helps, for a person.
void check(const char* what, int error, int32_t device);

bool is_on_gpu(const Tensor& tensor);

// Makes a device the current one of torch, and of the CUDA runtime that is linked into this extension.
class CurrentDevice {
 public:
  explicit CurrentDevice(int32_t index);

 private:
  std::optional<torch::stable::accelerator::DeviceGuard> guard_;
};

CUstream_st* current_stream(int32_t device);
int64_t n_processors_of(int32_t device);

// On the device of `like`; what it holds at first is undefined. `name` is for the message where there is no memory.
Tensor allocate(const char* name, const Tensor& like, std::initializer_list<int64_t> sizes, ScalarType dtype);

// Scratch: `count` numbers for each pointer, which begin at a multiple of 16 bytes; null where it is none. It lives as long as the launches
// are not yet queued; after that the allocator hands its memory to later work of the same stream only.
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
