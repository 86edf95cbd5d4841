// The operators of the CPU backend, for torch's stable ABI: their names, schemas, functions and arguments.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <tuple>

#include "../common/options.h"

// X(operator, schema without its name, function of clop::cpu). clop_kernels/backends/contract.py describes the residuals and the
// `needs_...` flags. `groups` is (3, N) int32, or (3, 0) if positives are found by instance. n_left = -1 means that there is one
// side.
#define CLOP_CPU_OPERATORS(X)                                                                                                   \
  /* The two passes of the loss. */                                                                                             \
  X(cpu_forward,                                                                                                                \
    "(Tensor embeddings, Tensor groups, Tensor? labels, Tensor? prototypes" CLOP_CPU_OPTIONS_SCHEMA                             \
    ") -> (Tensor loss, Tensor zhat, Tensor norms, Tensor shift, Tensor inverse_total, Tensor negative, Tensor counts)",        \
    forward)                                                                                                                    \
  X(cpu_backward,                                                                                                               \
    "(Tensor grad_loss, Tensor embeddings, Tensor zhat, Tensor norms, Tensor shift, Tensor inverse_total, Tensor negative, "    \
    "Tensor groups, Tensor counts, Tensor? labels, Tensor? prototypes, bool needs_embeddings, bool needs_temperature, "         \
    "bool needs_prototypes" CLOP_CPU_OPTIONS_SCHEMA                                                                             \
    ") -> (Tensor? grad_embeddings, Tensor? grad_temperature, Tensor? grad_prototypes)",                                        \
    backward)                                                                                                                   \
  /* The separate passes over pairs: (M, D) zhat, (3, M) groups, (4, M) coefficients. With n_left >= 0 they go one way. */      \
  X(cpu_pair_softmax,                                                                                                           \
    "(Tensor zhat, Tensor groups" CLOP_CPU_OPTIONS_SCHEMA                                                                       \
    ") -> (Tensor shift, Tensor negative, Tensor positive, Tensor positive_logits)",                                            \
    pair_softmax)                                                                                                               \
  X(cpu_pair_gradient, "(Tensor zhat, Tensor groups, Tensor coefficients" CLOP_CPU_OPTIONS_SCHEMA ") -> Tensor", pair_gradient) \
  /* The kernels' own 2^x, so that a test can measure its accuracy. */                                                          \
  X(cpu_exp2, "(Tensor x) -> Tensor", exp2)

namespace clop::cpu {

using torch::stable::Tensor;

// The SIMD level that calls use: the widest that this CPU can run, or the level named by CLOP_SIMD in the environment.
const char* simd_level();

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> forward(
    const Tensor& embeddings, const Tensor& groups, const std::optional<Tensor>& labels,
    const std::optional<Tensor>& prototypes CLOP_CPU_OPTIONS_PARAMETERS);

// The gradients of embeddings, temperature and prototypes. Gradients that were not asked for are empty.
using Gradients = std::tuple<std::optional<Tensor>, std::optional<Tensor>, std::optional<Tensor>>;

Gradients backward(const Tensor& grad_loss, const Tensor& embeddings, const Tensor& zhat, const Tensor& norms,
                   const Tensor& shift, const Tensor& inverse_total, const Tensor& negative, const Tensor& groups,
                   const Tensor& counts, const std::optional<Tensor>& labels, const std::optional<Tensor>& prototypes,
                   bool needs_embeddings, bool needs_temperature, bool needs_prototypes CLOP_CPU_OPTIONS_PARAMETERS);

std::tuple<Tensor, Tensor, Tensor, Tensor> pair_softmax(const Tensor& zhat, const Tensor& groups CLOP_CPU_OPTIONS_PARAMETERS);

Tensor pair_gradient(const Tensor& zhat, const Tensor& groups, const Tensor& coefficients CLOP_CPU_OPTIONS_PARAMETERS);

Tensor exp2(const Tensor& x);

}  // namespace clop::cpu
