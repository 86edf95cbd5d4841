// Reading, converting and rounding numbers of any dtype, and resetting counters.
#pragma once

#include "../common/positions.h"
#include "device.cuh"
#include "loss.h"

namespace clop::cuda {

// An option that is either a number or in GPU memory.
__device__ inline float read(const Number& number) { return number.tensor != nullptr ? *number.tensor : number.value; }

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(__half x) { return __half2float(x); }
__device__ inline float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

__device__ inline void round_to(float& rounded, float x) { rounded = x; }
__device__ inline void round_to(__half& rounded, float x) { rounded = __float2half_rn(x); }
__device__ inline void round_to(__nv_bfloat16& rounded, float x) { rounded = __float2bfloat16_rn(x); }

// Sets counter `index` of n_finished to zero, for the launch that follows. Threads beyond the counters do nothing.
__device__ inline void reset_counter(unsigned* n_finished, int64_t n_rows, unsigned index) {
  if (n_finished != nullptr && index < n_rows / kBlockRows + kMoreCounters) n_finished[index] = 0;
}

}  // namespace clop::cuda
