// The operators of the CUDA backend, for torch's stable ABI: their names, schemas, functions and arguments.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <tuple>

#include "../common/options.h"

// X(operator, schema without its name, function of clop::cuda). clop_kernels/backends/contract.py describes the residuals, and
// clop_kernels/backends/positions.py the upstream gradients. `groups` is (3, N) int32, or (3, 0) if positives are found by
// instance. n_left = -1 means that there is one side. zhat, also where an operator writes it, is laid out as unit_rows in the
// contract says.
// clang-format off
#define CLOP_CUDA_OPERATORS(X)                                                                                                 \
  /* (B,) int64 labels -> (3, N) int32, the table of clop_kernels/groups.py. */                                                \
  X(cuda_groups, "(Tensor labels" CLOP_CUDA_OPTIONS_SCHEMA ") -> Tensor", groups)                                              \
  /* (N, D) embeddings, (B,) int64 labels, (K, D) float32 prototypes -> by position: zhat, norms, distances to prototypes. */  \
  X(cuda_prologue,                                                                                                             \
    "(Tensor embeddings, Tensor(a!) zhat, Tensor groups, Tensor? labels, Tensor? prototypes" CLOP_CUDA_OPTIONS_SCHEMA          \
    ") -> (Tensor norms, Tensor distances)",                                                                                   \
    prologue)                                                                                                                  \
  /* The two passes of the loss. */                                                                                            \
  X(cuda_forward,                                                                                                              \
    "(Tensor embeddings, Tensor(a!) zhat, Tensor groups, Tensor? labels, Tensor? prototypes" CLOP_CUDA_OPTIONS_SCHEMA          \
    ") -> (Tensor loss, Tensor norms, Tensor shift, Tensor inverse_total, Tensor negative, Tensor counts)",                    \
    forward)                                                                                                                   \
  X(cuda_backward,                                                                                                             \
    "(Tensor upstream, Tensor? weights, Tensor embeddings, Tensor zhat, Tensor norms, Tensor shift, Tensor inverse_total, "    \
    "Tensor negative, Tensor groups, Tensor counts, Tensor? labels, Tensor? prototypes, bool needs_temperature"                \
    CLOP_CUDA_OPTIONS_SCHEMA ") -> (Tensor grad_embeddings, Tensor? grad_temperature)",                                        \
    backward)                                                                                                                  \
  /* (N,) positions sorted by label and (K + 1,) bounds of the classes in them -> (parts, K, D); its sum is the gradient. */   \
  X(cuda_prototype_gradient,                                                                                                   \
    "(Tensor upstream, Tensor? weights, Tensor zhat, Tensor counts, Tensor by_class, Tensor bounds, Tensor prototypes"         \
    CLOP_CUDA_OPTIONS_SCHEMA ") -> Tensor",                                                                                    \
    prototype_gradient)                                                                                                        \
  /* The separate passes over pairs. (M, D) zhat, (3, M) groups -> (4, M) shift, negative, positive and */                     \
  /* positive_logits; with sides, of the left rows only. (4, M) float32 a, b, c, shift -> (M, D) or (n_left, D) sums. */       \
  /* For wide rows, cuda_pair_coefficients makes the coefficients that cuda_panel_pairs takes. */                              \
  X(cuda_pair_softmax, "(Tensor zhat, Tensor groups" CLOP_CUDA_OPTIONS_SCHEMA ") -> Tensor", pair_softmax)                     \
  X(cuda_pair_gradient, "(Tensor zhat, Tensor groups, Tensor given" CLOP_CUDA_OPTIONS_SCHEMA ") -> Tensor", pair_gradient)     \
  X(cuda_pair_coefficients, "(Tensor zhat, Tensor groups, Tensor given" CLOP_CUDA_OPTIONS_SCHEMA ") -> Tensor",                \
    pair_coefficients)                                                                                                         \
  /* Wide rows: the kernels between the library's products, which clop_kernels/backends/cuda.py calls. adds_scale: make the */ \
  /* statistics those that cuda_pair_softmax returns. */                                                                       \
  X(cuda_panel_softmax,                                                                                                        \
    "(Tensor products, int first_row, int first_column, Tensor(a!) statistics, Tensor zhat, Tensor groups, bool adds_scale"    \
    CLOP_CUDA_OPTIONS_SCHEMA ") -> ()",                                                                                        \
    panel_softmax)                                                                                                             \
  X(cuda_panel_loss,                                                                                                           \
    "(Tensor statistics, Tensor distances, Tensor zhat, Tensor groups, Tensor? labels, Tensor? prototypes"                     \
    CLOP_CUDA_OPTIONS_SCHEMA ") -> (Tensor loss, Tensor shift, Tensor inverse_total, Tensor negative, Tensor counts)",         \
    panel_loss)                                                                                                                \
  X(cuda_coefficients,                                                                                                         \
    "(Tensor? weights, Tensor zhat, Tensor shift, Tensor inverse_total, Tensor negative, Tensor groups"                        \
    CLOP_CUDA_OPTIONS_SCHEMA ") -> (Tensor coefficients, Tensor n_finished)",                                                  \
    coefficients)                                                                                                              \
  X(cuda_panel_pairs,                                                                                                          \
    "(Tensor products, int first_row, int first_column, Tensor coefficients, Tensor zhat, Tensor groups"                       \
    CLOP_CUDA_OPTIONS_SCHEMA ") -> Tensor",                                                                                    \
    panel_pairs)                                                                                                               \
  X(cuda_panel_finish,                                                                                                         \
    "(Tensor(a!) sums, Tensor(b!) n_finished, Tensor upstream, Tensor? weights, Tensor embeddings, Tensor zhat, "              \
    "Tensor norms, Tensor groups, Tensor counts, Tensor? labels, Tensor? prototypes, bool needs_temperature"                   \
    CLOP_CUDA_OPTIONS_SCHEMA ") -> (Tensor grad_embeddings, Tensor? grad_temperature)",                                        \
    panel_finish)
// clang-format on

namespace clop::cuda {

using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;

// The gradients of embeddings and temperature. The latter is empty if it was not asked for.
using Gradients = std::tuple<Tensor, MaybeTensor>;

Tensor groups(const Tensor& labels CLOP_CUDA_OPTIONS_PARAMETERS);
std::tuple<Tensor, Tensor> prologue(const Tensor& embeddings, const Tensor& zhat, const Tensor& groups, const MaybeTensor& labels,
                                    const MaybeTensor& prototypes CLOP_CUDA_OPTIONS_PARAMETERS);

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> forward(const Tensor& embeddings, const Tensor& zhat,
                                                                   const Tensor& groups, const MaybeTensor& labels,
                                                                   const MaybeTensor& prototypes CLOP_CUDA_OPTIONS_PARAMETERS);
Gradients backward(const Tensor& upstream, const MaybeTensor& weights, const Tensor& embeddings, const Tensor& zhat,
                   const Tensor& norms, const Tensor& shift, const Tensor& inverse_total, const Tensor& negative,
                   const Tensor& groups, const Tensor& counts, const MaybeTensor& labels, const MaybeTensor& prototypes,
                   bool needs_temperature CLOP_CUDA_OPTIONS_PARAMETERS);
Tensor prototype_gradient(const Tensor& upstream, const MaybeTensor& weights, const Tensor& zhat, const Tensor& counts,
                          const Tensor& by_class, const Tensor& bounds, const Tensor& prototypes CLOP_CUDA_OPTIONS_PARAMETERS);

Tensor pair_softmax(const Tensor& zhat, const Tensor& groups CLOP_CUDA_OPTIONS_PARAMETERS);
Tensor pair_gradient(const Tensor& zhat, const Tensor& groups, const Tensor& given CLOP_CUDA_OPTIONS_PARAMETERS);
Tensor pair_coefficients(const Tensor& zhat, const Tensor& groups, const Tensor& given CLOP_CUDA_OPTIONS_PARAMETERS);

void panel_softmax(const Tensor& products, int64_t first_row, int64_t first_column, const Tensor& statistics, const Tensor& zhat,
                   const Tensor& groups, bool adds_scale CLOP_CUDA_OPTIONS_PARAMETERS);
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> panel_loss(const Tensor& statistics, const Tensor& distances,
                                                              const Tensor& zhat, const Tensor& groups, const MaybeTensor& labels,
                                                              const MaybeTensor& prototypes CLOP_CUDA_OPTIONS_PARAMETERS);
std::tuple<Tensor, Tensor> coefficients(const MaybeTensor& weights, const Tensor& zhat, const Tensor& shift,
                                        const Tensor& inverse_total, const Tensor& negative,
                                        const Tensor& groups CLOP_CUDA_OPTIONS_PARAMETERS);
Tensor panel_pairs(const Tensor& products, int64_t first_row, int64_t first_column, const Tensor& coefficients,
                   const Tensor& zhat, const Tensor& groups CLOP_CUDA_OPTIONS_PARAMETERS);
Gradients panel_finish(const Tensor& sums, const Tensor& n_finished, const Tensor& upstream, const MaybeTensor& weights,
                       const Tensor& embeddings, const Tensor& zhat, const Tensor& norms, const Tensor& groups,
                       const Tensor& counts, const MaybeTensor& labels, const MaybeTensor& prototypes,
                       bool needs_temperature CLOP_CUDA_OPTIONS_PARAMETERS);

}  // namespace clop::cuda
