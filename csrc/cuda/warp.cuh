// What the lanes of a warp tell each other, and other short names. The tests put their own definitions of the same
// names in place of these to run a kernel on the CPU.
#pragma once

namespace lift_fast {

// All 32 lanes take part in each.
__device__ __forceinline__ int warp_max(int value) { return __reduce_max_sync(0xffffffffu, value); }
__device__ __forceinline__ int warp_min(int value) { return __reduce_min_sync(0xffffffffu, value); }
__device__ __forceinline__ unsigned ballot(bool holds) { return __ballot_sync(0xffffffffu, holds); }
__device__ __forceinline__ int shuffle(int value, int lane) { return __shfl_sync(0xffffffffu, value, lane); }

// The lowest bit that is set, of at least one.
__device__ __forceinline__ int lowest_bit(unsigned bits) { return __ffs(static_cast<int>(bits)) - 1; }

__device__ __forceinline__ int count_bits(unsigned bits) { return __popc(bits); }

// What was there before.
__device__ __forceinline__ int atomic_add(int* to, int value) { return atomicAdd(to, value); }

__device__ __forceinline__ int as_int(float value) { return __float_as_int(value); }
__device__ __forceinline__ float as_float(int bits) { return __int_as_float(bits); }
__device__ __forceinline__ float multiply_add(float a, float b, float c) { return __fmaf_rn(a, b, c); }

}  // namespace lift_fast
