// The only file that registers: the operators clop_native::*, and the Python module whose import loads them.
//
// Everything here is torch's stable ABI and Python's limited API, so that one build serves every Python >= 3.10 and every
// torch >= 2.11. Operators are called by clop_kernels/backends/native.py, below autograd and autocast.

#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <torch/csrc/stable/library.h>

#include <string>

#include "cpu/ops.h"
#ifdef CLOP_CUDA_VERSION
#include "cuda/ops.h"
#endif

namespace {

#ifdef CLOP_CUDA_VERSION
constexpr const char* kCudaVersion = "\"" CLOP_CUDA_VERSION "\"";
constexpr const char* kCudaArchs = "\"" CLOP_CUDA_ARCHS "\"";
#else
constexpr const char* kCudaVersion = "null";
constexpr const char* kCudaArchs = "null";
#endif

#if defined(__clang__)
constexpr const char* kCompiler = "clang " __clang_version__;
#else
constexpr const char* kCompiler = "gcc " __VERSION__;
#endif

// How the extension was built, and the SIMD level that it takes on this CPU, as JSON.
std::string build_info() {
  return std::string("{\"cuda\": ") + kCudaVersion + ", \"cuda_archs\": " + kCudaArchs + ", \"simd\": \"" +
         clop::cpu::simd_level() + "\", \"compiler\": \"" + kCompiler + "\"}";
}

}  // namespace

STABLE_TORCH_LIBRARY(clop_native, m) {
  m.def("build_info() -> str");

  // The two passes of the loss. Residuals, and `needs`, as in clop_kernels/backends/contract.py; groups is (3, N) int32, or (3, 0)
  // for the views of instances; distance and reduction are indices into DISTANCES and REDUCTIONS; n_left -1: one side; tile_rows 0:
  // the kernel's choice.
  m.def(
      "cpu_forward(Tensor embeddings, Tensor groups, Tensor? labels, Tensor? prototypes, float temperature, int n_views, "
      "float prototype_weight, int distance, int reduction, ScalarType compute_dtype, bool normalize, int n_left, "
      "bool negatives_only, int tile_rows, int n_threads) -> "
      "(Tensor loss, Tensor normalized, Tensor norms, Tensor shift, Tensor inverse_total, Tensor negative, Tensor counts)");
  m.def(
      "cpu_backward(Tensor grad_loss, Tensor embeddings, Tensor normalized, Tensor norms, Tensor shift, Tensor inverse_total, "
      "Tensor negative, Tensor groups, Tensor counts, Tensor? labels, Tensor? prototypes, bool needs_embeddings, "
      "bool needs_temperature, bool needs_prototypes, float temperature, int n_views, float prototype_weight, int distance, "
      "int reduction, ScalarType compute_dtype, bool normalize, int n_left, bool negatives_only, int tile_rows, "
      "int n_threads) -> (Tensor grad_embeddings, Tensor grad_temperature, Tensor grad_prototypes)");
  // The passes over pairs alone: (M, D) zhat, (3, M) int32 groups, (4, M) coefficients, as in clop_kernels/backends/contract.py;
  // one way where n_left is not -1.
  m.def(
      "cpu_pair_softmax(Tensor zhat, Tensor groups, float temperature, bool normalize, int n_left, int tile_rows, int n_threads) "
      "-> (Tensor shift, Tensor negative, Tensor positive, Tensor positive_logits)");
  m.def(
      "cpu_pair_gradient(Tensor zhat, Tensor groups, Tensor coefficients, float temperature, bool normalize, int n_left, "
      "int tile_rows, int n_threads) -> Tensor");
  m.def("cpu_exp2(Tensor x) -> Tensor");  // the kernels' own 2^x, for the test of its accuracy

#ifdef CLOP_CUDA_VERSION
  m.def("cuda_obstacle(int device) -> str?");
  // (N, D) embeddings, (N,) int32 order of the rows or None for groups of instances (with sides: as they are), (B,) int64 labels,
  // (K, D) float32 prototypes -> by position: (N, D) zhat, which is written where the caller has laid it out (unit_rows of
  // clop_kernels/backends/contract.py, here and below), (N,) norms, (N,) distances to the prototypes.
  m.def(
      "cuda_prologue(Tensor embeddings, Tensor(a!) normalized, Tensor? order, Tensor? labels, Tensor? prototypes, int n_views, "
      "int distance, bool normalize, bool has_sides) -> (Tensor norms, Tensor distances)");

  // The two passes; the residuals of clop_kernels/backends/contract.py, upstream gradients of clop_kernels/backends/positions.py.
  // n_left -1: no sides.
#define CLOP_LOSS                                                                                                           \
  "Tensor groups, Tensor? labels, Tensor? prototypes, Tensor? temperature, float scale, float scale_rest, int n_views, "    \
  "float prototype_weight, int distance, int reduction, ScalarType compute_dtype, bool is_tf32, bool normalize, int n_left, " \
  "bool negatives_only"
#define CLOP_BACKWARD                                                                                                       \
  "Tensor upstream, Tensor? weights, Tensor embeddings, Tensor normalized, Tensor norms, Tensor shift, "                      \
  "Tensor inverse_total, Tensor negative, Tensor counts, bool needs_temperature, " CLOP_LOSS
  // (B,) int64 -> (3, N) int32, as clop_kernels/groups.py has it
  m.def("cuda_groups(Tensor labels, int n_views, int n_left) -> Tensor");
  m.def(
      "cuda_forward(Tensor embeddings, Tensor(a!) normalized, " CLOP_LOSS ") -> (Tensor loss, Tensor norms, Tensor shift, "
      "Tensor inverse_total, Tensor negative, Tensor counts)");
  m.def("cuda_backward(" CLOP_BACKWARD ") -> (Tensor grad_embeddings, Tensor grad_temperature)");
  // (N,) positions sorted by label, (K + 1,) bounds of the classes among them -> (parts, K, D), whose sum is the gradient.
  m.def(
      "cuda_prototype_gradient(Tensor upstream, Tensor? weights, Tensor normalized, Tensor counts, Tensor by_class, "
      "Tensor bounds, " CLOP_LOSS ") -> Tensor");
  // The passes over pairs alone of clop_kernels/backends/contract.py: (M, D) zhat, (3, M) groups, n_left -1 without sides ->
  // (4, M) shift, negative, positive, positive_logits, with sides of the rows on the left alone; (4, M) float32 a, b, c, shift ->
  // (M, D) or (n_left, D) sums, of wide rows the coefficients that cuda_panel_pairs takes.
#define CLOP_PAIRS                                                                                                          \
  "Tensor groups, int n_left, Tensor? temperature, float scale, float scale_rest, bool is_tf32, bool normalize"
  m.def("cuda_pair_softmax(Tensor zhat, " CLOP_PAIRS ") -> Tensor");
  m.def("cuda_pair_coefficients(Tensor zhat, Tensor given, " CLOP_PAIRS ") -> Tensor");
  m.def("cuda_pair_gradient(Tensor zhat, Tensor given, " CLOP_PAIRS ") -> Tensor");
  // Wide rows: what comes between the library's products, clop_kernels/backends/cuda.py.
  m.def(
      "cuda_panel_softmax(Tensor products, int first_row, int first_column, Tensor(a!) statistics, Tensor normalized, "
      "bool pairs_alone, " CLOP_LOSS ") -> ()");
  m.def(
      "cuda_panel_loss(Tensor statistics, Tensor distances, Tensor normalized, " CLOP_LOSS
      ") -> (Tensor loss, Tensor shift, Tensor inverse_total, Tensor negative, Tensor counts)");
  m.def("cuda_coefficients(" CLOP_BACKWARD ") -> (Tensor coefficients, Tensor n_finished)");
  m.def(
      "cuda_panel_pairs(Tensor products, int first_row, int first_column, Tensor coefficients, Tensor normalized, " CLOP_LOSS
      ") -> Tensor");
  m.def(
      "cuda_panel_finish(Tensor(a!) sums, Tensor(b!) n_finished, " CLOP_BACKWARD
      ") -> (Tensor grad_embeddings, Tensor grad_temperature)");
#undef CLOP_LOSS
#undef CLOP_BACKWARD
#undef CLOP_PAIRS
#endif
}

// Operators without tensor arguments, on any device.
STABLE_TORCH_LIBRARY_IMPL(clop_native, CompositeExplicitAutograd, m) {
  m.impl("build_info", TORCH_BOX(&build_info));
#ifdef CLOP_CUDA_VERSION
  m.impl("cuda_obstacle", TORCH_BOX(&clop::cuda::obstacle));
#endif
}

STABLE_TORCH_LIBRARY_IMPL(clop_native, CPU, m) {
  m.impl("cpu_forward", TORCH_BOX(&clop::cpu::forward));
  m.impl("cpu_backward", TORCH_BOX(&clop::cpu::backward));
  m.impl("cpu_pair_softmax", TORCH_BOX(&clop::cpu::pair_softmax));
  m.impl("cpu_pair_gradient", TORCH_BOX(&clop::cpu::pair_gradient));
  m.impl("cpu_exp2", TORCH_BOX(&clop::cpu::exp2));
}

#ifdef CLOP_CUDA_VERSION
STABLE_TORCH_LIBRARY_IMPL(clop_native, CUDA, m) {
  m.impl("cuda_prologue", TORCH_BOX(&clop::cuda::prologue));
  m.impl("cuda_groups", TORCH_BOX(&clop::cuda::groups));
  m.impl("cuda_forward", TORCH_BOX(&clop::cuda::forward));
  m.impl("cuda_backward", TORCH_BOX(&clop::cuda::backward));
  m.impl("cuda_prototype_gradient", TORCH_BOX(&clop::cuda::prototype_gradient));
  m.impl("cuda_pair_softmax", TORCH_BOX(&clop::cuda::pair_softmax));
  m.impl("cuda_pair_coefficients", TORCH_BOX(&clop::cuda::pair_coefficients));
  m.impl("cuda_pair_gradient", TORCH_BOX(&clop::cuda::pair_gradient));
  m.impl("cuda_panel_softmax", TORCH_BOX(&clop::cuda::panel_softmax));
  m.impl("cuda_panel_loss", TORCH_BOX(&clop::cuda::panel_loss));
  m.impl("cuda_coefficients", TORCH_BOX(&clop::cuda::coefficients));
  m.impl("cuda_panel_pairs", TORCH_BOX(&clop::cuda::panel_pairs));
  m.impl("cuda_panel_finish", TORCH_BOX(&clop::cuda::panel_finish));
}
#endif

// An empty module: that it is imported is what registers the operators. PyMODINIT_FUNC exports it from a library that
// otherwise exports nothing.
PyMODINIT_FUNC PyInit__native(void) {
  static PyModuleDef definition = {
      PyModuleDef_HEAD_INIT, "_native", "The operators of clop_kernels.", 0, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModuleDef_Init(&definition);
}
