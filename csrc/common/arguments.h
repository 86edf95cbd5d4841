// From the arguments of an operator to the options of a pass, and how an operator refuses wrong ones.
#pragma once

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

// Of the arguments of an operator, which have the names of the options, into the struct `options`. A backend may have a `decode` of
// its own for kinds that are its own.
#define CLOP_DECODE(kind, name) decode(#name, name, options.name);

}  // namespace clop
