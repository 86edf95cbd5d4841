// The constants that C++ shares with Python, and the CPU with CUDA: those of clop_kernels/backends/contract.py, which says more of them.
// tests/test_native.py holds them equal.
#pragma once

namespace clop {

constexpr double kLog2E = 1.4426950408889634;

// The smallest norm that a row is divided by.
template <class T>
constexpr T kEps = T(1e-12);

// Up to which |s_ij| the CPU takes exp s_ij without a shift: there must be room for sums over 2^38 rows, and exp(60) 2^38 is below
// exp(88), the end of float; double ends at exp(709). CUDA's bound is kLargestUnshiftedBits in cuda/pairs.cuh, which says why it is less.
template <class T>
constexpr T kLargestUnshiftedLogit = sizeof(T) == 8 ? T(600) : T(60);

// What M, at most 2, is multiplied by before CUDA rounds it to float16, which ends at 6e-8 and 65504.
constexpr float kFloat16Scale = 16384;

// 1 / kEps is beyond float16. The gradient of a row of zeros is cut to this, not an infinity that would cost every step; any other
// row's overflow stays infinite, for a gradient scaler to see.
template <class T>
constexpr T kLargestFloat16 = T(65504);

}  // namespace clop
