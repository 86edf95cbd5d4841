// csrc/cuda/runtime.h for a simulated GPU, and the operators of csrc/cuda/bindings.h as clop_host::*, for tensors of the CPU.
//
// Every byte that the operators allocate begins as 0xff, which is a NaN in every format, so that tests notice numbers that a
// kernel does not write. Each part of the scratch is a separate allocation, so that AddressSanitizer sees where it ends.
#include "runtime.h"

#include <torch/csrc/stable/library.h>

#include <cstring>
#include <stdexcept>

#include "../../csrc/common/arguments.h"
#include "bindings.h"
#include "gpu.h"
#include "simt.h"

namespace host {

int64_t n_processors = 2;

}  // namespace host

namespace clop::cuda {

void check(const char* what, int error, int32_t) {
  if (error != 0) throw std::runtime_error(std::string("clop_host: ") + what + ": cudaError_t " + std::to_string(error));
}

bool is_on_gpu(const Tensor& tensor) { return tensor.is_cpu(); }

CurrentDevice::CurrentDevice(int32_t) {}

CUstream_st* current_stream(int32_t) { return nullptr; }

int64_t n_processors_of(int32_t) { return host::n_processors; }

Tensor allocate(const char*, const Tensor&, std::initializer_list<int64_t> sizes, ScalarType dtype) {
  Tensor tensor = empty(sizes, dtype, aoti_torch_device_type_cpu(), 0);
  const auto fill = [&](int byte) {
    if (tensor.numel() > 0) std::memset(tensor.mutable_data_ptr(), byte, tensor.numel() * tensor.element_size());
  };
  if (simt::launches)
    fill(0xff);
  else if (dtype == ScalarType::Int)
    fill(0);  // positions: torch may use them as indices
  return tensor;
}

Memory allocate_scratch(const Tensor& like, int n_parts, const int64_t* bytes, void** pointers) {
  Memory memory;
  for (int k = 0; k < n_parts; ++k) {
    memory.push_back(allocate("scratch", like, {bytes[k]}, ScalarType::Byte));
    pointers[k] = bytes[k] > 0 ? memory.back().mutable_data_ptr() : nullptr;
  }
  return memory;
}

}  // namespace clop::cuda

#define CLOP_DEFINE(name, schema, function) m.def(#name schema);
#define CLOP_IMPLEMENT(name, schema, function) m.impl(#name, TORCH_BOX(&clop::cuda::function));

STABLE_TORCH_LIBRARY(clop_host, m) { CLOP_CUDA_OPERATORS(CLOP_DEFINE) }
STABLE_TORCH_LIBRARY_IMPL(clop_host, CPU, m) { CLOP_CUDA_OPERATORS(CLOP_IMPLEMENT) }
