// The enumerations that C++ shares with Python, and the CPU kernels with the CUDA kernels; a test in tests/cpu/ checks that they
// agree.
#pragma once

// Marks functions that are also compiled for a GPU. Everywhere else they have internal linkage: the linker must not use a copy
// that was compiled for one SIMD level in the code of another.
#ifdef __CUDACC__
#define CLOP_INLINE __host__ __device__ static inline
#else
#define CLOP_INLINE static inline
#endif

namespace clop {

enum class Dtype { float64, float32, float16, bfloat16 };

// POSITIVES, DISTANCES and REDUCTIONS of clop_kernels/backends/contract.py, in the same order.
#define CLOP_POSITIVES(X) X(instance) X(label)
#define CLOP_DISTANCES(X) X(cosine) X(euclidean) X(manhattan)
#define CLOP_REDUCTIONS(X) X(mean) X(sum) X(none)

#define CLOP_ENUMERATOR(name) name,
enum class Positives { CLOP_POSITIVES(CLOP_ENUMERATOR) };
enum class Distance { CLOP_DISTANCES(CLOP_ENUMERATOR) };
enum class Reduction { CLOP_REDUCTIONS(CLOP_ENUMERATOR) };
#undef CLOP_ENUMERATOR

}  // namespace clop
