// A grid of CUDA threads on a CPU. A C++ compiler that knows nothing of CUDA compiles the kernels with this header, which defines
// everything that they need of CUDA.
//
// Every thread of a block is a fiber with its own stack; blocks run one after the other. A fiber runs until it waits for others:
// at a barrier for its block, at an instruction of a whole warp for its warp. The scheduler chooses the next fiber (Order), and
// is unkind on purpose: one warp runs as far as it can before the next warp starts, beginning with the first warp, with the last,
// or in an order that changes at random. If a barrier is missing, one of these orders reads data that is not there yet. Blocks
// run in the same order, so a test also notices if a sum depends on which block ends first.
//
// The simulation must not forgive what a GPU would not forgive:
//  - Shared memory begins as NaN, and ends where the launch says (AddressSanitizer sees the end).
//  - cp.async writes NaN at once, and its data only when the issuing thread waits for its group.
//  - These are errors: lanes of a warp in different instructions, a barrier that some threads of the block never reach, a warp
//    that waits for a lane that has left.
//  - ThreadSanitizer takes fibers for threads that only barriers order, and reports every race of a run.
//
// An mma cuts its sums off as an A100 does (simt.cpp). Not modelled: the error of ex2.approx, memory order between blocks, and
// warps that progress independently.
#pragma once

#include <math.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <functional>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)

// ---- the runtime, simt.cpp ---------------------------------------------------------------------------------------------

namespace simt {

enum class Order { forward, reverse, shuffled };

// Sets the order in which later launches run their threads and blocks.
void set_order(Order order, uint64_t seed);

// If false, launches return at once without running a kernel. What remains of a call is the host's work.
extern bool launches;

// A hook: a program that specialises it for a type of parameters sees every launch with such parameters.
template <class Params>
struct Observer {
  static void see(const Params&, unsigned) {}
};

// Calls kernel() as every thread of the grid. Throws std::runtime_error if the kernel breaks a rule.
void launch(unsigned n_blocks, unsigned n_threads, size_t shared_bytes, const std::function<void()>& kernel);

struct Index {
  unsigned x;
};
Index thread_index();
Index block_index();
Index grid_size();
unsigned char* shared_memory();

[[noreturn]] void fail(const char* what);
void synchronize_block();

// Instructions of a whole warp. Each lane brings words and takes words.
enum class Op { synchronize, shuffle_xor, load_matrices, load_matrices_transposed, mma_bf16, mma_f16, mma_tf32 };
void exchange(Op op, const uint32_t* in, int n_in, uint32_t* out, int n_out);

// An asynchronous copy of this thread that has not landed.
struct Copy {
  unsigned char* to;
  const unsigned char* from;
  int bytes;
};
void begin_copy(const Copy& copy);
void commit_copies();
bool next_landed_copy(int groups_left, Copy& copy);  // the next copy outside the last groups_left groups, if there is one

bool is_shared(const void* address);
void acquire_release(void* address);  // for ThreadSanitizer

}  // namespace simt

#define threadIdx (simt::thread_index())
#define blockIdx (simt::block_index())
#define gridDim (simt::grid_size())

// ---- CUDA's names --------------------------------------------------------------------------------------------------------

struct CUstream_st;
using cudaStream_t = CUstream_st*;
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1 };

inline void __syncthreads() { simt::synchronize_block(); }
inline void __syncwarp() { simt::exchange(simt::Op::synchronize, nullptr, 0, nullptr, 0); }
inline void __threadfence() {}

inline float __shfl_xor_sync(unsigned mask, float x, int lane_mask) {
  if (mask != 0xffffffffu) simt::fail("a shuffle of a part of a warp");
  uint32_t in[2] = {0, uint32_t(lane_mask)}, out;
  std::memcpy(in, &x, 4);
  simt::exchange(simt::Op::shuffle_xor, in, 2, &out, 1);
  std::memcpy(&x, &out, 4);
  return x;
}

inline unsigned atomicAdd(unsigned* address, unsigned value) {
  simt::acquire_release(address);
  return __atomic_fetch_add(address, value, __ATOMIC_ACQ_REL);
}

inline int __float_as_int(float x) {
  int bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}
inline float __int_as_float(int bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}
inline unsigned __float_as_uint(float x) { return unsigned(__float_as_int(x)); }
inline float __uint_as_float(unsigned bits) { return __int_as_float(int(bits)); }
inline float fdividef(float a, float b) { return a / b; }
using std::max;
using std::min;

struct __half {
  uint16_t bits;
};
struct __nv_bfloat16 {
  uint16_t bits;
};

inline float __bfloat162float(__nv_bfloat16 x) { return __uint_as_float(unsigned(x.bits) << 16); }
inline __nv_bfloat16 __float2bfloat16_rn(float x) {
  const unsigned bits = __float_as_uint(x);
  if (x != x) return {0x7fff};
  return {uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}
inline float __half2float(__half x) {
  _Float16 half;
  std::memcpy(&half, &x, 2);
  return float(half);
}
inline __half __float2half_rn(float x) {
  const _Float16 half = _Float16(x);
  __half result;
  std::memcpy(&result, &half, 2);
  return result;
}

// ---- the instructions of csrc/cuda/device.cuh -----------------------------------------------------------------------------

namespace clop::cuda {

inline unsigned char* shared_memory() { return simt::shared_memory(); }

inline unsigned read_block_index() { return blockIdx.x; }

inline float exp2_approx(float x) {
  const float y = ::exp2f(x);
  return y < 1.17549435e-38f ? 0.0f : y;  // .ftz; a NaN stays one
}

inline float load_from_l2(const float* pointer) { return *pointer; }
inline void load_from_l2(float (&x)[4], const float* pointer) {
  if (reinterpret_cast<uintptr_t>(pointer) % 16) simt::fail("a load of 16 bytes at an address that is not a multiple of 16");
  for (int i = 0; i < 4; ++i) x[i] = pointer[i];
}
inline void store(float* pointer, const float (&x)[4]) {
  if (reinterpret_cast<uintptr_t>(pointer) % 16) simt::fail("a store of 16 bytes at an address that is not a multiple of 16");
  for (int i = 0; i < 4; ++i) pointer[i] = x[i];
}

#define device_assert(condition, message) \
  if (!(condition)) simt::fail(message)

inline uint32_t round_to_tf32(float x) {  // to nearest, ties away from zero
  const uint32_t bits = __float_as_uint(x);
  return x - x == 0.0f ? (bits + 0x1000u) & ~0x1fffu : bits;
}

inline uint32_t pack_bf16(float low, float high) {
  return __float2bfloat16_rn(low).bits | uint32_t(__float2bfloat16_rn(high).bits) << 16;
}
inline uint32_t pack_f16(float low, float high) { return __float2half_rn(low).bits | uint32_t(__float2half_rn(high).bits) << 16; }

// Moves byte by byte, so that the sanitizers see accesses of this thread.
inline void move_bytes(unsigned char* to, const unsigned char* from, int bytes) {
  for (int i = 0; i < bytes; ++i) to[i] = from[i];
}

inline void copy_async(void* shared, const void* global, int bytes) {
  if (reinterpret_cast<uintptr_t>(shared) % 16 || (bytes > 0 && reinterpret_cast<uintptr_t>(global) % 16))
    simt::fail("cp.async of 16 bytes at an address that is not a multiple of 16");
  if (!simt::is_shared(shared)) simt::fail("cp.async to an address that is not in shared memory");
  if (bytes < 0 || bytes > 16) simt::fail("cp.async of more than 16 bytes");
  auto* const to = static_cast<unsigned char*>(shared);
  for (int i = 0; i < 16; ++i) to[i] = 0xff;
  simt::begin_copy({to, static_cast<const unsigned char*>(global), bytes});
}

inline void commit_copies() { simt::commit_copies(); }

template <int kGroupsLeft>
void wait_for_copies() {
  simt::Copy copy;
  while (simt::next_landed_copy(kGroupsLeft, copy)) {
    move_bytes(copy.to, copy.from, copy.bytes);
    for (int i = copy.bytes; i < 16; ++i) copy.to[i] = 0;
  }
}

inline void load_matrices(simt::Op op, uint32_t (&r)[4], const void* row) {
  if (reinterpret_cast<uintptr_t>(row) % 16) simt::fail("ldmatrix of a row at an address that is not a multiple of 16");
  if (!simt::is_shared(row)) simt::fail("ldmatrix of a row that is not in shared memory");
  uint32_t in[4];
  for (int i = 0; i < 4; ++i) in[i] = static_cast<const uint32_t*>(row)[i];
  simt::exchange(op, in, 4, r, 4);
}
inline void load_matrices(uint32_t (&r)[4], const void* row) { load_matrices(simt::Op::load_matrices, r, row); }
inline void load_matrices_transposed(uint32_t (&r)[4], const void* row) {
  load_matrices(simt::Op::load_matrices_transposed, r, row);
}

inline void mma(simt::Op op, float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  uint32_t in[10] = {a[0], a[1], a[2], a[3], b0, b1}, out[4];
  std::memcpy(in + 6, c, 16);
  simt::exchange(op, in, 10, out, 4);
  std::memcpy(c, out, 16);
}
inline void mma_bf16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) { mma(simt::Op::mma_bf16, c, a, b0, b1); }
inline void mma_f16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) { mma(simt::Op::mma_f16, c, a, b0, b1); }
inline void mma_tf32(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) { mma(simt::Op::mma_tf32, c, a, b0, b1); }

inline cudaError_t set_to_zero(unsigned* numbers, int64_t n, cudaStream_t) {
  if (simt::launches) std::fill_n(numbers, n, 0u);
  return cudaSuccess;
}

template <class Params>
cudaError_t find(void (*)(Params)) {
  return cudaSuccess;
}

template <class Params>
cudaError_t launch(void (*kernel)(Params), unsigned n_blocks, unsigned n_threads, size_t shared_bytes, cudaStream_t,
                   const Params& params) {
  if (!simt::launches) return cudaSuccess;
  simt::Observer<Params>::see(params, n_blocks);
  simt::launch(n_blocks, n_threads, shared_bytes, [&] { kernel(params); });
  return cudaSuccess;
}

}  // namespace clop::cuda
