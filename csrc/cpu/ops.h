// The loss on a CPU as operators of torch's stable ABI; csrc/registration.cpp has their schemas and says what they take.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <optional>
#include <string>
#include <tuple>

namespace clop::cpu {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// The level that calls get: the widest that this CPU has, or what CLOP_SIMD in the environment names.
const char* simd_level();

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> forward(
    Tensor embeddings, Tensor groups, std::optional<Tensor> labels, std::optional<Tensor> prototypes, double temperature,
    int64_t n_views, double prototype_weight, int64_t distance, int64_t reduction, ScalarType compute_dtype, bool normalize,
    int64_t n_left, bool negatives_only, int64_t tile_rows, int64_t n_threads);

std::tuple<Tensor, Tensor, Tensor> backward(Tensor grad_loss, Tensor embeddings, Tensor normalized, Tensor norms, Tensor shift,
                                            Tensor inverse_total, Tensor negative, Tensor groups, Tensor counts,
                                            std::optional<Tensor> labels, std::optional<Tensor> prototypes, bool needs_embeddings,
                                            bool needs_temperature, bool needs_prototypes, double temperature, int64_t n_views,
                                            double prototype_weight, int64_t distance, int64_t reduction,
                                            ScalarType compute_dtype, bool normalize, int64_t n_left, bool negatives_only,
                                            int64_t tile_rows, int64_t n_threads);

std::tuple<Tensor, Tensor, Tensor, Tensor> pair_softmax(Tensor zhat, Tensor groups, double temperature, bool normalize,
                                                        int64_t n_left, int64_t tile_rows, int64_t n_threads);

Tensor pair_gradient(Tensor zhat, Tensor groups, Tensor coefficients, double temperature, bool normalize, int64_t n_left,
                     int64_t tile_rows, int64_t n_threads);

Tensor exp2(Tensor x);

}  // namespace clop::cpu
