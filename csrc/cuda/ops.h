// The CUDA kernels as operators of torch's stable ABI; csrc/registration.cpp has their schemas and says what they take.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <optional>
#include <string>
#include <tuple>

namespace clop::cuda {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Why the kernels cannot run on this device, or nothing if they can.
std::optional<std::string> obstacle(int64_t device);

std::tuple<Tensor, Tensor, Tensor> prologue(Tensor embeddings, std::optional<Tensor> order, std::optional<Tensor> labels,
                                            std::optional<Tensor> prototypes, int64_t n_views, int64_t distance,
                                            ScalarType compute_dtype);

}  // namespace clop::cuda
