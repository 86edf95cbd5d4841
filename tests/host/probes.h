// Kernels that the harness itself is tested with: single instructions, and correct kernels beside ones with a planted bug.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <string>

#include "device.cuh"

namespace probes {

using Floats = pybind11::array_t<float, pybind11::array::c_style>;
using namespace clop::cuda;

// c += a b by one instruction, operands through shared memory and load_matrices. a: (16, k), b: (k, 8), c: (16, 8).
struct Mma {
  std::string kind;
  const float *a, *b;
  float* c;
};

inline void mma_kernel(const Mma p) {
  const int lane = threadIdx.x, g = lane / 4, t = lane % 4;
  const bool is_tf32 = p.kind == "tf32";
  const int depth = is_tf32 ? 8 : 16;
  const auto bits = [&](float x) {
    return is_tf32 ? __float_as_uint(x) : p.kind == "bf16" ? uint32_t(__float2bfloat16_rn(x).bits) : uint32_t(__float2half_rn(x).bits);
  };
  // A: 16 rows of 32 bytes, then B transposed, 8 rows of 32 bytes.
  unsigned char* const rows = shared_memory();
  const auto put = [&](int row, int k, float x) {
    const uint32_t word = bits(x);
    std::memcpy(rows + 32 * row + 32 / depth * k, &word, 32 / depth);
  };
  for (int i = lane; i < 16 * depth; i += 32) put(i / depth, i % depth, p.a[i]);
  for (int i = lane; i < 8 * depth; i += 32) put(16 + i % 8, i / 8, p.b[i]);
  __syncwarp();
  uint32_t a[4], b[4];
  load_matrices(a, rows + 32 * (lane % 16) + 16 * (lane / 16));
  load_matrices(b, rows + 32 * (16 + lane % 8) + 16 * (lane / 8 % 2));
  float c[4];
  for (int e = 0; e < 4; ++e) c[e] = p.c[8 * (g + 8 * (e / 2)) + 2 * t + e % 2];
  if (is_tf32)
    mma_tf32(c, a, b[0], b[1]);
  else if (p.kind == "bf16")
    mma_bf16(c, a, b[0], b[1]);
  else
    mma_f16(c, a, b[0], b[1]);
  for (int e = 0; e < 4; ++e) p.c[8 * (g + 8 * (e / 2)) + 2 * t + e % 2] = c[e];
}

// y = x (n,) in reversed order within each block of 64, by way of shared memory; with a bug, or "none".
struct Reverse {
  std::string bug;
  const float* x;
  float* y;
  int n;
};

constexpr int kReversed = 64;

inline void reverse_kernel(const Reverse p) {
  float* const shared = reinterpret_cast<float*>(shared_memory());
  const int thread = threadIdx.x, first = blockIdx.x * kReversed, index = first + thread;
  if (p.bug == "past the end of shared memory") shared[thread + 1 + kReversed] = 0.0f;
  if (p.bug == "a lane that leaves" && thread == 3) return;
  // 16 bytes a thread of the first quarter.
  if (thread < kReversed / 4) {
    const int column = first + 4 * thread, left = p.n - column, bytes = left >= 4 ? 16 : left > 0 ? 4 * left : 0;
    copy_async(shared + 4 * thread, p.x + column + (p.bug == "misaligned copy" ? 1 : 0), bytes);
  }
  commit_copies();
  if (p.bug != "no wait") wait_for_copies<0>();
  if (p.bug == "a barrier that some pass by" && thread >= 32) return;
  if (p.bug != "no barrier") __syncthreads();
  const int other = kReversed - 1 - thread + (p.bug == "mask off by one" ? -1 : 0);
  float y = shared[other < 0 ? 0 : other];
  if (p.bug == "lanes apart") {
    if (thread % 32 < 16)
      __syncwarp();
    else
      y = __shfl_xor_sync(0xffffffffu, y, 1);
  }
  if (index < p.n + (p.bug == "past the end of memory" ? 1 : 0)) p.y[index] = y;
}

inline float sum_by_shuffles(Floats x) {
  float sum = 0;
  const float* const from = x.data();
  simt::launch(1, 32, 0, [&] {
    float mine = from[threadIdx.x];
    for (int apart = 16; apart > 0; apart /= 2) mine += __shfl_xor_sync(0xffffffffu, mine, apart);
    if (threadIdx.x == 7) sum = mine;
  });
  return sum;
}

}  // namespace probes

inline void define_probes(pybind11::module_& m) {
  using namespace probes;
  m.def("mma", [](const std::string& kind, Floats a, Floats b, Floats c) {
    const Mma p = {kind, a.data(), b.data(), c.mutable_data()};
    launch(mma_kernel, 1, 32, 24 * 32, nullptr, p);
    return c;
  });
  m.def("reverse", [](const std::string& bug, Floats x) {
    // Its own allocation, for AddressSanitizer to see its end.
    const int n = int(x.size());
    std::unique_ptr<float[]> from(new float[n]), to(new float[n]);
    std::memcpy(from.get(), x.data(), 4 * n);
    std::fill(to.get(), to.get() + n, -1.0f);
    const Reverse p = {bug, from.get(), to.get(), n};
    launch(reverse_kernel, unsigned((n + kReversed - 1) / kReversed), kReversed, 4 * kReversed, nullptr, p);
    return Floats(n, to.get());
  });
  m.def("sum_by_shuffles", &sum_by_shuffles);
}
