// The instructions that kernels are made of. On a GPU they are PTX for sm_80 and newer. A C++ compiler that knows nothing of CUDA
// takes the same functions from tests/host/simt.h, which runs the kernels on a CPU.
#pragma once

#ifndef __CUDACC__
#include "simt.h"
#else

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>

#include <cassert>
#include <cstdint>

namespace clop::cuda {

// The shared memory that the launch gave the block.
__device__ inline unsigned char* shared_memory() {
  extern __shared__ __align__(128) unsigned char memory[];
  return memory;
}

__device__ inline uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// Reads blockIdx.x anew. Numbers that are derived from it twice, before a loop and after it, then take no registers in between.
__device__ inline unsigned read_block_index() {
  unsigned index;
  asm volatile("mov.u32 %0, %%ctaid.x;" : "=r"(index));
  return index;
}

// 2^x to 2 ulp; 0 if the result is not a normal number.
__device__ inline float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Loads that bypass L1, which does not see what other blocks write. An array of four numbers begins at a multiple of 16 bytes.
__device__ inline float load_from_l2(const float* pointer) { return __ldcg(pointer); }
__device__ inline void load_from_l2(float (&x)[4], const float* pointer) {
  const float4 four = __ldcg(reinterpret_cast<const float4*>(pointer));
  x[0] = four.x, x[1] = four.y, x[2] = four.z, x[3] = four.w;
}
__device__ inline void store(float* pointer, const float (&x)[4]) {
  *reinterpret_cast<float4*>(pointer) = make_float4(x[0], x[1], x[2], x[3]);
}

#define device_assert(condition, message) assert((condition) && message)

// Rounds to the nearest TF32 number, in the bits of a float.
__device__ inline uint32_t round_to_tf32(float x) {
  uint32_t y;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(y) : "f"(x));
  return y;
}

// Rounds two numbers into one word, the first into its low half.
__device__ inline uint32_t pack_bf16(float low, float high) {
  uint32_t word;
  asm("cvt.rn.bf16x2.f32 %0, %2, %1;" : "=r"(word) : "f"(low), "f"(high));
  return word;
}
__device__ inline uint32_t pack_f16(float low, float high) {
  uint32_t word;
  asm("cvt.rn.f16x2.f32 %0, %2, %1;" : "=r"(word) : "f"(low), "f"(high));
  return word;
}

// Begins to copy 16 bytes. Only the first `bytes` of them are read; the rest become zero. Both addresses are multiples of 16. If
// the compiler knows that `bytes` is 16 or 0, a copy takes five instructions less.
__device__ inline void copy_async(void* shared, const void* global, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global), "r"(bytes) : "memory");
}

// Ends a group of copies. Every thread must call it equally often, with or without copies, because groups are counted.
__device__ inline void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits for this thread's copies, except those of its last kGroupsLeft groups. A barrier makes other threads' copies visible.
template <int kGroupsLeft>
__device__ inline void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kGroupsLeft) : "memory");
}

// Loads four 8 x 8 matrices of 16-bit numbers, or 8 x 4 of 32-bit numbers. Lanes 8 m to 8 m + 7 name the rows of matrix m, 16
// bytes each. With g = lane / 4 and t = lane % 4, a lane gets word t of row g of each matrix.
__device__ inline void load_matrices(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

// The same for 16-bit numbers, transposed: a lane gets number g of rows 2 t and 2 t + 1.
__device__ inline void load_matrices_transposed(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

#define CLOP_MMA(name, instruction)                                                              \
  __device__ inline void name(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) { \
    asm(instruction " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"           \
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])                                         \
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));                         \
  }

// c += a b, where c is 16 x 8 and the depth is 16, or 8 for TF32. For the layouts see multiply() in tests/host/simt.cpp, or the
// PTX ISA.
CLOP_MMA(mma_bf16, "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32")
CLOP_MMA(mma_f16, "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32")
CLOP_MMA(mma_tf32, "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32")
#undef CLOP_MMA

// Sets counters to zero, in the order of the stream.
inline cudaError_t set_to_zero(unsigned* numbers, int64_t n, cudaStream_t stream) {
  return cudaMemsetAsync(numbers, 0, n * sizeof *numbers, stream);
}

// Why a kernel has no code for the current device, or cudaSuccess if it has.
template <class Params>
cudaError_t find(void (*kernel)(Params)) {
  cudaFuncAttributes attributes;
  return cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(kernel));
}

// Launches a kernel with its only argument, a struct of parameters.
template <class Params>
cudaError_t launch(void (*kernel)(Params), unsigned n_blocks, unsigned n_threads, size_t shared_bytes, cudaStream_t stream,
                   const Params& params) {
  const void* const function = reinterpret_cast<const void*>(kernel);
  constexpr size_t kNeedsNoPermission = 48 * 1024;
  if (shared_bytes > kNeedsNoPermission) {
    const cudaError_t error =
        cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes));
    if (error != cudaSuccess) return error;
  }
  void* arguments[] = {const_cast<Params*>(&params)};
  return cudaLaunchKernel(function, dim3(n_blocks), dim3(n_threads), arguments, shared_bytes, stream);
}

}  // namespace clop::cuda

#endif
