// The enumerations and constants that C++ shares with Python, and the CPU with CUDA; tests/test_native.py holds them equal.
#pragma once

// What is compiled for a GPU as well. Everywhere else it has internal linkage: a copy that one SIMD level has compiled must not be
// linked into another.
#ifdef __CUDACC__
#define CLOP_INLINE __host__ __device__ static inline
#else
#define CLOP_INLINE static inline
#endif

namespace clop {

enum class Dtype { float64, float32, float16, bfloat16 };

// POSITIVES, DISTANCES and REDUCTIONS of clop_kernels/backends/contract.py, in their order.
#define CLOP_POSITIVES(X) X(instance) X(label)
#define CLOP_DISTANCES(X) X(cosine) X(euclidean) X(manhattan)
#define CLOP_REDUCTIONS(X) X(mean) X(sum) X(none)

#define CLOP_ENUMERATOR(name) name,
enum class Positives { CLOP_POSITIVES(CLOP_ENUMERATOR) };
enum class Distance { CLOP_DISTANCES(CLOP_ENUMERATOR) };
enum class Reduction { CLOP_REDUCTIONS(CLOP_ENUMERATOR) };
#undef CLOP_ENUMERATOR

constexpr double kLog2E = 1.4426950408889634;

// The smallest norm that a row is divided by; EPS in clop_kernels/backends/contract.py.
template <class T>
constexpr T kEps = T(1e-12);

// 1 / kEps is beyond float16. The gradient of a row of zeros is cut to this, not an infinity that would cost every step; any other
// row's overflow stays infinite, for a gradient scaler to see.
template <class T>
constexpr T kLargestFloat16 = T(65504);

// What CUDA and Triton multiply M by, which is at most 2, before they round it to float16, whose normal numbers begin at 6e-5 and end at
// 65504; FLOAT16_SCALE in clop_kernels/backends/cuda.py.
constexpr float kFloat16Scale = 16384;

}  // namespace clop
