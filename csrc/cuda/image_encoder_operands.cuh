// What a lane of the image encoder holds: operands of each dtype for the tensor cores, windows of the image, products.
#pragma once

#include <cstdint>

#include "device.cuh"

namespace lift_fast {

// What each dtype's operands look like: kWords 32-bit words are a lane's 8 values.
struct Bfloat16Operands {
  static constexpr int kItem = 2, kWords = 4, kBlocks = 2;
  static constexpr std::uint32_t kOnes = 0x3f803f80u;
  static __device__ __forceinline__ void mma(float (&d)[4], const std::uint32_t (&a)[4], std::uint32_t b0,
                                             std::uint32_t b1, const float (&c)[4]) {
    mma_bf16(d, a, b0, b1, c);
  }
  static __device__ __forceinline__ void relu(std::uint32_t* words, float low, float high) {
    words[0] = relu_bf16x2(low, high);
  }
  static __device__ __forceinline__ std::uint32_t operand(std::uint32_t word) { return word; }
};

struct Float16Operands {
  static constexpr int kItem = 2, kWords = 4, kBlocks = 2;
  static constexpr std::uint32_t kOnes = 0x3c003c00u;
  static __device__ __forceinline__ void mma(float (&d)[4], const std::uint32_t (&a)[4], std::uint32_t b0,
                                             std::uint32_t b1, const float (&c)[4]) {
    mma_f16(d, a, b0, b1, c);
  }
  static __device__ __forceinline__ void relu(std::uint32_t* words, float low, float high) {
    words[0] = relu_f16x2(low, high);
  }
  static __device__ __forceinline__ std::uint32_t operand(std::uint32_t word) { return word; }
};

struct Tf32Operands {
  static constexpr int kItem = 4, kWords = 8, kBlocks = 1;
  static constexpr std::uint32_t kOnes = 0x3f800000u;
  static __device__ __forceinline__ void mma(float (&d)[4], const std::uint32_t (&a)[4], std::uint32_t b0,
                                             std::uint32_t b1, const float (&c)[4]) {
    mma_tf32(d, a, b0, b1, c);
  }
  static __device__ __forceinline__ void relu(std::uint32_t* words, float low, float high) {
    words[0] = float_bits(max_nan(low, 0.0f));
    words[1] = float_bits(max_nan(high, 0.0f));
  }
  static __device__ __forceinline__ std::uint32_t operand(std::uint32_t word) { return round_tf32(word); }
};

template <int words>
__device__ __forceinline__ void load_words(std::uint32_t* to, const void* from) {
#pragma unroll
  for (int i = 0; i < words / 4; ++i) {
    const uint4 quad = static_cast<const uint4*>(from)[i];
    to[4 * i] = quad.x;
    to[4 * i + 1] = quad.y;
    to[4 * i + 2] = quad.z;
    to[4 * i + 3] = quad.w;
  }
}

template <int words>
__device__ __forceinline__ void store_words(void* to, const std::uint32_t* from) {
#pragma unroll
  for (int i = 0; i < words / 4; ++i) {
    static_cast<uint4*>(to)[i] = make_uint4(from[4 * i], from[4 * i + 1], from[4 * i + 2], from[4 * i + 3]);
  }
}

// One row of the first convolution over a strip, as operands of the second.
template <class T>
struct FirstRow {
  std::uint32_t even[2][T::kWords];  // columns 4g and 4g + 2: under the second convolution's columns 2g and 2g + 1
  std::uint32_t odd[2][T::kWords];  // columns 4g + 1 and 4g + 3
};

// Pixels 8i to 8i + 7 of three lines, and the last pixel before them.
template <class T>
struct Chunks {
  std::uint32_t line[3][T::kWords], before[3];
};

// A lane's 8 of the 32 window values of the first convolution's column m of a chunk. With i = 3 row + channel a line of
// the window: lines t and t + 4 (middle and right pixel each), their left pixels; line 8 is shared by lanes 0 and 1,
// and lanes 2 and 3 hold ones, whose weights are the bias in three parts.
template <class T>
__device__ __forceinline__ void window(std::uint32_t (&value)[T::kWords], const Chunks<T>& c, int m, int t,
                                       std::uint32_t same) {
  if constexpr (T::kItem == 2) {
    std::uint32_t left[3];
#pragma unroll
    for (int i = 0; i < 3; ++i) left[i] = m == 0 ? c.before[i] : c.line[i][m - 1];
    // In effect a move, but one that happens once: the compiler repeats plain moves for each of the four products.
    value[0] = select_bytes(c.line[0][m], 0, same);
    value[1] = select_bytes(c.line[1][m], 0, same);
    value[2] = select_bytes(left[0], left[1], 0x7632);
    const std::uint32_t ninth = select_bytes(c.line[2][m], left[2], t == 0 ? 0x3210 : 0x7676);
    value[3] = (ninth & (t == 0 ? 0xffffffffu : t == 1 ? 0xffffu : 0u)) | (t < 2 ? 0u : T::kOnes);
  } else {
    std::uint32_t left[3];
#pragma unroll
    for (int i = 0; i < 3; ++i) left[i] = m == 0 ? c.before[i] : c.line[i][2 * m - 1];
    value[0] = T::operand(c.line[0][2 * m]);
    value[1] = T::operand(c.line[0][2 * m + 1]);
    value[2] = T::operand(c.line[1][2 * m]);
    value[3] = T::operand(c.line[1][2 * m + 1]);
    value[4] = T::operand(left[0]);
    value[5] = T::operand(left[1]);
    value[6] = t == 0 ? T::operand(c.line[2][2 * m]) : t == 1 ? T::operand(left[2]) : T::kOnes;
    value[7] = t == 0 ? T::operand(c.line[2][2 * m + 1]) : t == 1 ? 0u : T::kOnes;
  }
}

// sum[octet] += (16 positions x 32 channels) x weights; `upper` and `lower` are rows g and g + 8 of the operand.
template <class T>
__device__ __forceinline__ void multiply(float (&sum)[4][4], const std::uint32_t (&upper)[T::kWords],
                                         const std::uint32_t (&lower)[T::kWords],
                                         const std::uint32_t (&weight)[4][T::kWords]) {
#pragma unroll
  for (int s = 0; s < T::kWords; s += 2) {
    const std::uint32_t a[4] = {upper[s], lower[s], upper[s + 1], lower[s + 1]};
#pragma unroll
    for (int octet = 0; octet < 4; ++octet) T::mma(sum[octet], a, weight[octet][s], weight[octet][s + 1], sum[octet]);
  }
}

// ReLU, and the rounding of operands.
template <class T>
__device__ __forceinline__ void activate(std::uint32_t (&word)[T::kWords], const float (&sum)[4][4], int half) {
  constexpr int kPair = T::kWords / 4;
#pragma unroll
  for (int octet = 0; octet < 4; ++octet) {
    T::relu(&word[octet * kPair], sum[octet][2 * half], sum[octet][2 * half + 1]);
#pragma unroll
    for (int i = 0; i < kPair; ++i) word[octet * kPair + i] = T::operand(word[octet * kPair + i]);
  }
}

}  // namespace lift_fast
