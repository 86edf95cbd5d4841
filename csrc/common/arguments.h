// Tensor helpers that the operators of both backends share: they decode options, refuse wrong arguments and allocate memory.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/stableivalue_conversions.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <initializer_list>
#include <optional>
#include <stdexcept>
#include <string>

#include "options.h"

namespace clop {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

[[noreturn]] inline void refuse(const char* name, const std::string& expected) {
  throw std::runtime_error(std::string("clop_native: ") + name + ": expected " + expected);
}

inline std::string shape_text(std::initializer_list<int64_t> sizes) {
  std::string text;
  for (const int64_t size : sizes) text += (text.empty() ? "(" : ", ") + std::to_string(size);
  return text + ")";
}

inline std::optional<Dtype> dtype_of(ScalarType type) {
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
      return std::nullopt;
  }
}

template <class T>
inline void decode(const char*, T given, T& option) {
  option = given;
}
inline void decode(const char* name, int64_t given, Positives& option) {
  if (given < 0 || given > 1) refuse(name, "0 or 1");
  option = Positives(given);
}
inline void decode(const char* name, int64_t given, Distance& option) {
  if (given < 0 || given > 2) refuse(name, "0, 1 or 2");
  option = Distance(given);
}
inline void decode(const char* name, int64_t given, Reduction& option) {
  if (given < 0 || given > 2) refuse(name, "0, 1 or 2");
  option = Reduction(given);
}

// Copies one argument of an operator into the field of the same name in the struct `options`. A backend may add overloads of
// `decode` for types of its own.
#define CLOP_DECODE(kind, name) decode(#name, name, options.name);

// Allocates a contiguous tensor; its contents are undefined. torch::stable::new_empty first asks a tensor for all its properties
// and takes two to three times as long. At small N, allocations are most of a call's cost.
inline Tensor empty(std::initializer_list<int64_t> sizes, ScalarType dtype, int32_t device_type, int32_t device_index) {
  constexpr int kMostDims = 3;
  int64_t strides[kMostDims] = {1, 1, 1};
  const int n_dims = int(sizes.size());
  for (int dim = n_dims - 2; dim >= 0; --dim) strides[dim] = strides[dim + 1] * sizes.begin()[dim + 1];
  AtenTensorHandle handle = nullptr;
  const auto code = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
  if (aoti_torch_empty_strided(n_dims, sizes.begin(), strides, code, device_type, device_index, &handle) != 0)
    throw std::runtime_error("clop_native: torch could not allocate a tensor of shape " + shape_text(sizes));
  return Tensor(handle);
}

}  // namespace clop
