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

// `normalized`, here and below, is laid out as unit_rows of clop_kernels/backends/contract.py says; written.
std::tuple<Tensor, Tensor> prologue(Tensor embeddings, Tensor normalized, std::optional<Tensor> order,
                                    std::optional<Tensor> labels, std::optional<Tensor> prototypes, int64_t n_views,
                                    int64_t distance, bool normalize, bool has_sides);

// What describes a loss to every operator below.
#define CLOP_LOSS_PARAMETERS                                                                                          \
  Tensor groups, std::optional<Tensor> labels, std::optional<Tensor> prototypes, std::optional<Tensor> temperature,   \
      double scale, double scale_rest, int64_t n_views, double prototype_weight, int64_t distance, int64_t reduction, \
      ScalarType compute_dtype, bool is_tf32, bool normalize, int64_t n_left, bool negatives_only

// What the forward pass has left, and the upstream gradient.
#define CLOP_BACKWARD_PARAMETERS                                                                                    \
  Tensor upstream, std::optional<Tensor> weights, Tensor embeddings, Tensor normalized, Tensor norms, Tensor shift, \
      Tensor inverse_total, Tensor negative, Tensor counts, bool needs_temperature, CLOP_LOSS_PARAMETERS

Tensor groups(Tensor labels, int64_t n_views, int64_t n_left);
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> forward(Tensor embeddings, Tensor normalized, CLOP_LOSS_PARAMETERS);
std::tuple<Tensor, Tensor> backward(CLOP_BACKWARD_PARAMETERS);
Tensor prototype_gradient(Tensor upstream, std::optional<Tensor> weights, Tensor normalized, Tensor counts, Tensor by_class,
                          Tensor bounds, CLOP_LOSS_PARAMETERS);

// What describes pairs alone.
#define CLOP_PAIRS_PARAMETERS \
  Tensor groups, int64_t n_left, std::optional<Tensor> temperature, double scale, double scale_rest, bool is_tf32, bool normalize

Tensor pair_softmax(Tensor zhat, CLOP_PAIRS_PARAMETERS);
Tensor pair_coefficients(Tensor zhat, Tensor given, CLOP_PAIRS_PARAMETERS);
Tensor pair_gradient(Tensor zhat, Tensor given, CLOP_PAIRS_PARAMETERS);

// Wide rows: the launches between the library's products.
void panel_softmax(Tensor products, int64_t first_row, int64_t first_column, Tensor statistics, Tensor normalized,
                   bool pairs_alone, CLOP_LOSS_PARAMETERS);
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> panel_loss(Tensor statistics, Tensor distances, Tensor normalized,
                                                              CLOP_LOSS_PARAMETERS);
std::tuple<Tensor, Tensor> coefficients(CLOP_BACKWARD_PARAMETERS);
Tensor panel_pairs(Tensor products, int64_t first_row, int64_t first_column, Tensor coefficients, Tensor normalized,
                   CLOP_LOSS_PARAMETERS);
std::tuple<Tensor, Tensor> panel_finish(Tensor sums, Tensor n_finished, CLOP_BACKWARD_PARAMETERS);

}  // namespace clop::cuda
