// Registers the operators clop_native::* and the Python module whose import loads them. No other file registers anything.
//
// This file uses only torch's stable ABI and Python's limited API, so that one build serves every Python >= 3.10 and every torch
// >= 2.11. clop_kernels/backends/ calls the operators, below autograd and autocast. Each operator is one line of
// CLOP_CPU_OPERATORS or CLOP_CUDA_OPERATORS in the bindings.

#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <torch/csrc/stable/library.h>

#include <cstdio>
#include <string>

#include "common/constants.h"
#include "common/types.h"
#include "cpu/bindings.h"
#ifdef CLOP_CUDA_VERSION
#include "cuda/bindings.h"
#include "cuda/runtime.h"
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

// How the extension was built, and which SIMD level it uses on this CPU, as JSON.
std::string build_info() {
  return std::string("{\"cuda\": ") + kCudaVersion + ", \"cuda_archs\": " + kCudaArchs + ", \"simd\": \"" +
         clop::cpu::simd_level() + "\", \"compiler\": \"" + kCompiler + "\"}";
}

// The constants that C++ and Python share, under their Python names, as JSON.
std::string constants() {
#define CLOP_NAME(name) "\"" #name "\", "
  const auto listed = [](std::string names) { return "[" + names.substr(0, names.size() - 2) + "]"; };
  const auto number = [](double value) {
    char text[32];
    std::snprintf(text, sizeof text, "%.17g", value);
    return std::string(text);
  };
  return "{\"EPS\": " + number(clop::kEps<double>) + ", \"LOG2_E\": " + number(clop::kLog2E) +
         ", \"LARGEST_UNSHIFTED_LOGIT\": [" + number(clop::kLargestUnshiftedLogit<float>) + ", " +
         number(clop::kLargestUnshiftedLogit<double>) + "], \"FLOAT16_SCALE\": " + number(clop::kFloat16Scale) +
         ", \"POSITIVES\": " + listed(CLOP_POSITIVES(CLOP_NAME)) + ", \"DISTANCES\": " + listed(CLOP_DISTANCES(CLOP_NAME)) +
         ", \"REDUCTIONS\": " + listed(CLOP_REDUCTIONS(CLOP_NAME)) + "}";
#undef CLOP_NAME
}

}  // namespace

#define CLOP_DEFINE(name, schema, function) m.def(#name schema);
#define CLOP_IMPLEMENT_CPU(name, schema, function) m.impl(#name, TORCH_BOX(&clop::cpu::function));
#define CLOP_IMPLEMENT_CUDA(name, schema, function) m.impl(#name, TORCH_BOX(&clop::cuda::function));

STABLE_TORCH_LIBRARY(clop_native, m) {
  m.def("build_info() -> str");
  m.def("constants() -> str");
  CLOP_CPU_OPERATORS(CLOP_DEFINE)
#ifdef CLOP_CUDA_VERSION
  m.def("cuda_obstacle(int device) -> str?");
  CLOP_CUDA_OPERATORS(CLOP_DEFINE)
#endif
}

// These operators have no tensor arguments, so they run on any device.
STABLE_TORCH_LIBRARY_IMPL(clop_native, CompositeExplicitAutograd, m) {
  m.impl("build_info", TORCH_BOX(&build_info));
  m.impl("constants", TORCH_BOX(&constants));
#ifdef CLOP_CUDA_VERSION
  m.impl("cuda_obstacle", TORCH_BOX(&clop::cuda::obstacle));
#endif
}

STABLE_TORCH_LIBRARY_IMPL(clop_native, CPU, m) { CLOP_CPU_OPERATORS(CLOP_IMPLEMENT_CPU) }

#ifdef CLOP_CUDA_VERSION
STABLE_TORCH_LIBRARY_IMPL(clop_native, CUDA, m) { CLOP_CUDA_OPERATORS(CLOP_IMPLEMENT_CUDA) }
#endif

// The module is empty: importing it registers the operators. PyMODINIT_FUNC exports this function; the library exports nothing
// else.
PyMODINIT_FUNC PyInit__native(void) {
  static PyModuleDef definition = {
      PyModuleDef_HEAD_INIT, "_native", "The operators of clop_kernels.", 0, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModuleDef_Init(&definition);
}
