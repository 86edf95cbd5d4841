// Kernels that test the harness itself: single instructions, and a kernel that is correct or has one planted bug.
#pragma once

#include <string>

#include "device.cuh"

namespace probes {

using namespace clop::cuda;

// c += a b by one instruction; the operands go through shared memory and load_matrices. a: (16, k), b: (k, 8), c: (16, 8).
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
    return is_tf32            ? __float_as_uint(x)
           : p.kind == "bf16" ? uint32_t(__float2bfloat16_rn(x).bits)
                              : uint32_t(__float2half_rn(x).bits);
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

// y = x (n,), reversed within each block of 64, by way of shared memory. `bug` names a planted bug, or is "none".
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
  // A quarter of the threads copy 16 bytes each.
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

}  // namespace probes
