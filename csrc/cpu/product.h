// The matrix products of the passes over pairs, written as products of panels that stay in the L1 cache, and the packing of
// panels.
//
// A panel is a strip of columns, a whole number of vectors wide, stored row after row. Let S be the similarities of the rows of
// block I with those of block J, and M the weights that the gradient makes of S (pairs.h). There are three products:
//
//     S   = Z_I Z_J^T    A: rows of zhat as they are       B: Z_J transposed, panels of kPairColumns rows of J, (D, columns)
//     G_I += M Z_J       A: M                              B: Z_J, panels of kWidthColumns entries of the width, (J, columns)
//     G_J += M^T Z_I     A: M, read down its columns       B: Z_I, the same panels
//
// S and M are in panels of kPairColumns too. A product keeps a block of its result in registers: kPairRows x kPairColumns or
// kGradientRows x kWidthColumns. For each k it multiplies a vector row of B by broadcast entries of A. On AVX2 that is 12
// multiply-adds for 7 or 8 loads, so the loop never waits for loads.
#pragma once

#include "simd.h"

namespace clop::cpu {
namespace CLOP_LEVEL {

#if defined(__AVX512F__)
constexpr int kPairRows = 8, kGradientRows = 12;  // 24 accumulators of 32 registers
#else
constexpr int kPairRows = 4, kGradientRows = 6;  // 12 accumulators of 16 registers
#endif
constexpr int kPairVectors = 3, kWidthVectors = 2;

template <class T>
constexpr int kPairColumns = kPairVectors * kLanes<T>;
template <class T>
constexpr int kWidthColumns = kWidthVectors * kLanes<T>;

inline int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// C[r][:] += sum_k A[r][k] B[k][:] for kRows rows and kVectors vectors. Without `accumulate` the product replaces C.
//
// k runs over n_panels panels of A, `depth` entries in each. A[r][k] is at a[r * a_row + k * a_depth], and the next panel is
// a_panel further on. B is one panel of n_panels * depth rows.
template <class T, int kRows, int kVectors>
inline __attribute__((always_inline)) void multiply(int64_t n_panels, int64_t depth, const T* a, int64_t a_row, int64_t a_depth,
                                                    int64_t a_panel, const T* b, T* c, int64_t c_row, bool accumulate) {
  constexpr int kL = kLanes<T>;
  Vec<T> sum[kRows][kVectors];
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      sum[r][v] = Vec<T>{};
      __builtin_prefetch(c + r * c_row + v * kL, /*for writing=*/1);  // these lines are needed at the end, and lie far apart
    }
  for (int64_t panel = 0; panel < n_panels; ++panel) {
    const T* a_k = a + panel * a_panel;
    if (a_depth == 1) {
      // Prefetch the rows of A that the next block of the result reads. Each is too short for the hardware to detect the stream.
#pragma GCC unroll 16
      for (int r = 0; r < kRows; ++r)
        for (int64_t k = 0; k < depth; k += 64 / sizeof(T)) __builtin_prefetch(a_k + (kRows + r) * a_row + k);
    }
#pragma GCC unroll 4
    for (int64_t k = 0; k < depth; ++k) {
      Vec<T> b_k[kVectors];
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) b_k[v] = load(b + v * kL);
#pragma GCC unroll 16
      for (int r = 0; r < kRows; ++r) {
        const Vec<T> a_rk = broadcast(a_k[r * a_row]);
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) sum[r][v] += a_rk * b_k[v];
      }
      a_k += a_depth;
      b += kVectors * kL;
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      T* to = c + r * c_row + v * kL;
      store(to, accumulate ? load(to) + sum[r][v] : sum[r][v]);
    }
}

// The largest depth whose panel of B leaves room for A in a 32 KB cache.
constexpr int64_t kLargestDepth = 256;

// Computes a panel of S: the similarities of n_rows rows of zhat, (n_rows, width), with the kPairColumns rows of a transposed
// panel.
template <class T>
void similarities(int64_t n_rows, int64_t width, const T* rows, const T* transposed, T* s) {
  constexpr int kP = kPairColumns<T>;
  for (int64_t begin = 0; begin < width; begin += kLargestDepth) {
    const int64_t depth = width - begin < kLargestDepth ? width - begin : kLargestDepth;
    const T* b = transposed + begin * kP;
    int64_t i = 0;
    for (; i + kPairRows <= n_rows; i += kPairRows)
      multiply<T, kPairRows, kPairVectors>(1, depth, rows + i * width + begin, width, 1, 0, b, s + i * kP, kP, begin > 0);
    for (; i < n_rows; ++i)
      multiply<T, 1, kPairVectors>(1, depth, rows + i * width + begin, width, 1, 0, b, s + i * kP, kP, begin > 0);
  }
}

// G_I += M Z_J for n_rows rows of I and the panels of J. grad: (n_rows, padded_width).
template <class T>
void add_to_rows(int64_t n_rows, int64_t n_panels, int64_t m_panel, const T* m, int64_t padded_width, int64_t z_panel, const T* z,
                 T* grad) {
  constexpr int kP = kPairColumns<T>, kW = kWidthColumns<T>;
  for (int64_t column = 0; column < padded_width; column += kW, z += z_panel) {
    int64_t i = 0;
    for (; i + kGradientRows <= n_rows; i += kGradientRows)
      multiply<T, kGradientRows, kWidthVectors>(n_panels, kP, m + i * kP, kP, 1, m_panel, z, grad + i * padded_width + column,
                                                padded_width, true);
    for (; i < n_rows; ++i)
      multiply<T, 1, kWidthVectors>(n_panels, kP, m + i * kP, kP, 1, m_panel, z, grad + i * padded_width + column, padded_width,
                                    true);
  }
}

// G_J += M^T Z_I for the n_columns rows of J in the panels of M, and the n_rows rows of I.
template <class T>
void add_to_columns(int64_t n_rows, int64_t n_columns, int64_t m_panel, const T* m, int64_t padded_width, int64_t z_panel,
                    const T* z, T* grad) {
  constexpr int kP = kPairColumns<T>, kW = kWidthColumns<T>;
  static_assert(kP % kGradientRows == 0, "a block of rows of the gradient must not straddle panels of M");
  for (int64_t column = 0; column < padded_width; column += kW, z += z_panel) {
    int64_t j = 0;
    for (; j + kGradientRows <= n_columns; j += kGradientRows)
      multiply<T, kGradientRows, kWidthVectors>(1, n_rows, m + j / kP * m_panel + j % kP, 1, kP, 0, z,
                                                grad + j * padded_width + column, padded_width, true);
    for (; j < n_columns; ++j)
      multiply<T, 1, kWidthVectors>(1, n_rows, m + j / kP * m_panel + j % kP, 1, kP, 0, z, grad + j * padded_width + column,
                                    padded_width, true);
  }
}

// Packs rows [begin, end) of zhat, (N, width), times `factor`, into transposed panels. Zeros fill the last panel past `end`. Each
// product is rounded once: a factor that had itself been rounded to float would put an error of one sign into every similarity.
template <class T>
void pack_transposed(int64_t begin, int64_t end, int64_t width, const T* zhat, double factor, T* panels) {
  constexpr int kP = kPairColumns<T>;
  for (int64_t first = begin; first < end; first += kP, panels += kP * width) {
    const int64_t count = end - first < kP ? end - first : kP;
    for (int64_t k = 0; k < width; ++k) {
      for (int64_t j = 0; j < count; ++j) panels[k * kP + j] = T(zhat[(first + j) * width + k] * factor);
      for (int64_t j = count; j < kP; ++j) panels[k * kP + j] = 0;
    }
  }
}

// Packs rows [begin, end) of zhat into panels of kWidthColumns columns and z_panel / kWidthColumns rows. Entries past `end` and
// past the width are zero, because the zeros of M are multiplied by them.
template <class T>
void pack_panels(int64_t begin, int64_t end, int64_t width, const T* zhat, int64_t z_panel, T* panels) {
  constexpr int kW = kWidthColumns<T>;
  for (int64_t first = 0; first < width; first += kW, panels += z_panel) {
    const int64_t count = width - first < kW ? width - first : kW;
    T* to = panels;
    for (int64_t row = begin; row < end; ++row, to += kW) {
      std::memcpy(to, zhat + row * width + first, count * sizeof(T));
      for (int64_t k = count; k < kW; ++k) to[k] = 0;
    }
    std::memset(to, 0, (panels + z_panel - to) * sizeof(T));
  }
}

}  // namespace CLOP_LEVEL
}  // namespace clop::cpu
