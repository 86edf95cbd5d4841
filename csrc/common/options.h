// The options of a loss, declared once. They are the fields of LossOptions in clop_kernels/backends/contract.py, in the same
// order.
//
// From these lists come the schemas and parameters of all operators, the structs that passes receive, and the code that fills
// those structs. A new option takes one line here, one field there, and its use in a kernel. A test in tests/cpu/ checks that the
// two lists agree.
//
// Each entry is X(kind, name). The kind decides the type in a schema, in an operator's parameters and in a struct:
//
//     kind             schema        parameter     field of a struct
//     Number           float         double        a number that training may change: a double on the CPU; in CUDA a float or a
//                                                  pointer to GPU memory, which the host does not read
//     Count            int           int64_t       int64_t
//     Flag             bool          bool          bool
//     Dtype            ScalarType    ScalarType    Dtype
//     Positives, ...   int           int64_t       the enumeration of types.h
#pragma once

#include <cstdint>

#include "types.h"

#define CLOP_NUMBERS(X)  \
  X(Number, temperature) \
  X(Number, prototype_weight)

#define CLOP_OPTIONS(X)   \
  CLOP_NUMBERS(X)         \
  X(Count, n_views)       \
  X(Positives, positives) \
  X(Distance, distance)   \
  X(Reduction, reduction) \
  X(Dtype, compute_dtype) \
  X(Flag, normalize)      \
  X(Count, n_left)        \
  X(Flag, negatives_only)

// Settings that change how a loss is computed, not the loss itself.
#define CLOP_CPU_SETTINGS(X) \
  X(Count, tile_rows)        \
  X(Count, n_threads)

#define CLOP_CUDA_SETTINGS(X) X(Flag, is_tf32)

namespace clop {

using Count = int64_t;
using Flag = bool;

}  // namespace clop

// Declares a field of a struct.
#define CLOP_FIELD(kind, name) kind name;

// An argument in a schema. It begins with a comma, because every operator has an argument before it.
#define CLOP_SCHEMA(kind, name) ", " CLOP_SCHEMA_OF_##kind " " #name
#define CLOP_SCHEMA_OF_Number "float"
#define CLOP_SCHEMA_OF_Count "int"
#define CLOP_SCHEMA_OF_Flag "bool"
#define CLOP_SCHEMA_OF_Positives "int"
#define CLOP_SCHEMA_OF_Distance "int"
#define CLOP_SCHEMA_OF_Reduction "int"
#define CLOP_SCHEMA_OF_Dtype "ScalarType"
#define CLOP_TENSOR_SCHEMA(kind, name) ", Tensor? " #name "_tensor"

// A parameter of the function behind an operator.
#define CLOP_PARAMETER(kind, name) , CLOP_PARAMETER_OF_##kind name
#define CLOP_PARAMETER_OF_Number double
#define CLOP_PARAMETER_OF_Count int64_t
#define CLOP_PARAMETER_OF_Flag bool
#define CLOP_PARAMETER_OF_Positives int64_t
#define CLOP_PARAMETER_OF_Distance int64_t
#define CLOP_PARAMETER_OF_Reduction int64_t
#define CLOP_PARAMETER_OF_Dtype torch::headeronly::ScalarType
#define CLOP_TENSOR_PARAMETER(kind, name) , const std::optional<torch::stable::Tensor>& name##_tensor

// The arguments that a backend's operators take after their tensors. In CUDA a number may also come as a tensor, which then
// replaces the plain number.
#define CLOP_CPU_OPTIONS_SCHEMA CLOP_OPTIONS(CLOP_SCHEMA) CLOP_CPU_SETTINGS(CLOP_SCHEMA)
#define CLOP_CPU_OPTIONS_PARAMETERS CLOP_OPTIONS(CLOP_PARAMETER) CLOP_CPU_SETTINGS(CLOP_PARAMETER)
#define CLOP_CUDA_OPTIONS_SCHEMA CLOP_OPTIONS(CLOP_SCHEMA) CLOP_NUMBERS(CLOP_TENSOR_SCHEMA) CLOP_CUDA_SETTINGS(CLOP_SCHEMA)
#define CLOP_CUDA_OPTIONS_PARAMETERS \
  CLOP_OPTIONS(CLOP_PARAMETER) CLOP_NUMBERS(CLOP_TENSOR_PARAMETER) CLOP_CUDA_SETTINGS(CLOP_PARAMETER)
