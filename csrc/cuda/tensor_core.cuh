// Instructions that CUDA C++ does not offer: tensor-core products, conversions with ReLU, asynchronous copies.
// The tests replace them with definitions of the same names to run a kernel on the CPU.
#pragma once

#include <cstdint>

#define LIFT_FAST_DYNAMIC_SHARED(name) extern __shared__ __align__(16) unsigned char name[]
#define LIFT_FAST_GRID_CONSTANT __grid_constant__

namespace lift_fast {

// d = a b + c: rows g and g + 8 of a (16 x 16) in a0, a2 and a1, a3; lane = 4 g + t holds k = 2t, 2t + 1 (+ 8).
__device__ __forceinline__ void mma_bf16(float (&d)[4], const std::uint32_t (&a)[4], std::uint32_t b0, std::uint32_t b1,
                                         const float (&c)[4]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%10, %11, %12, %13};"
      : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "f"(c[0]), "f"(c[1]), "f"(c[2]), "f"(c[3]));
}

__device__ __forceinline__ void mma_f16(float (&d)[4], const std::uint32_t (&a)[4], std::uint32_t b0, std::uint32_t b1,
                                        const float (&c)[4]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%10, %11, %12, %13};"
      : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "f"(c[0]), "f"(c[1]), "f"(c[2]), "f"(c[3]));
}

// a (16 x 8): lane = 4 g + t holds k = t in a0, a1 and k = t + 4 in a2, a3.
__device__ __forceinline__ void mma_tf32(float (&d)[4], const std::uint32_t (&a)[4], std::uint32_t b0, std::uint32_t b1,
                                         const float (&c)[4]) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%10, %11, %12, %13};"
      : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "f"(c[0]), "f"(c[1]), "f"(c[2]), "f"(c[3]));
}

// max(x, 0) of two numbers, rounded to nearest; the first in the low half. NaN stays NaN.
__device__ __forceinline__ std::uint32_t relu_bf16x2(float low, float high) {
  std::uint32_t word;
  asm("cvt.rn.relu.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  return word;
}

__device__ __forceinline__ std::uint32_t relu_f16x2(float low, float high) {
  std::uint32_t word;
  asm("cvt.rn.relu.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  return word;
}

// float32 bits rounded to the nearest TF32; the tensor core alone would cut them off.
__device__ __forceinline__ std::uint32_t round_tf32(std::uint32_t bits) {
  std::uint32_t word;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(word) : "f"(__uint_as_float(bits)));
  return word;
}

// The larger of two; NaN if one is NaN.
__device__ __forceinline__ float max_nan(float a, float b) {
  float larger;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(larger) : "f"(a), "f"(b));
  return larger;
}

__device__ __forceinline__ std::uint32_t float_bits(float value) { return __float_as_uint(value); }

__device__ __forceinline__ float bits_float(std::uint32_t bits) { return __uint_as_float(bits); }

__device__ __forceinline__ std::uint32_t select_bytes(std::uint32_t low, std::uint32_t high, std::uint32_t selector) {
  return __byte_perm(low, high, selector);
}

__device__ __forceinline__ std::uint32_t shuffle_up(std::uint32_t value, unsigned lanes) {
  return __shfl_up_sync(0xffffffffu, value, lanes);
}

// 16 bytes from global to shared memory in the background; zeros where `valid` is false, and nothing is read then.
__device__ __forceinline__ void copy_async(void* shared, const void* global, bool valid) {
  const auto target = static_cast<std::uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(target), "l"(global), "r"(valid ? 16 : 0)
               : "memory");
}

__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits for all but the latest `pending` groups of this thread's copies.
template <int pending>
__device__ __forceinline__ void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
}

}  // namespace lift_fast
