// The constants that C++ shares with Python, and the CPU kernels with the CUDA kernels. clop_kernels/backends/contract.py
// explains them; a test in tests/cpu/ checks that both languages agree.
#pragma once

namespace clop {

constexpr double kLog2E = 1.4426950408889634;

// The smallest number that a row is divided by when it is normalised.
template <class T>
constexpr T kEps = T(1e-12);

// The largest |s_ij| for which the CPU kernels compute exp s_ij without a shift. Sums over 2^38 rows must fit: exp(60) 2^38 is
// below exp(88), where float ends; double ends at exp(709). CUDA's bound is smaller: kLargestUnshiftedBits in cuda/pairs.cuh says
// why.
template <class T>
constexpr T kLargestUnshiftedLogit = sizeof(T) == 8 ? T(600) : T(60);

// CUDA multiplies M, which is at most 2, by this factor before it rounds M to float16, whose positive numbers range from 6e-8 to
// 65504.
constexpr float kFloat16Scale = 16384;

// 1 / kEps overflows float16. The gradient of a row of zeros is therefore clipped to this value: an infinity would spoil every
// training step. Any other row's overflow stays infinite, so that a gradient scaler sees it.
template <class T>
constexpr T kLargestFloat16 = T(65504);

}  // namespace clop
