// The enumerations that C++ shares with Python, and the CPU with CUDA; tests/test_native.py holds them equal.
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

}  // namespace clop
