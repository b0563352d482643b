// AVX-512 F, BW, DQ and VL.
#pragma once

#include <immintrin.h>

namespace lift_fast {
namespace {
namespace simd {

struct avx512 {
  static constexpr int lanes = 16;
  typedef float Vec __attribute__((vector_size(64)));
  typedef std::int32_t IntVec __attribute__((vector_size(64)));

  static Vec broadcast(const float* p) { return _mm512_set1_ps(*p); }
  static Vec multiply_add(Vec a, Vec b, Vec sum) { return _mm512_fmadd_ps(a, b, sum); }
  static float sum(Vec v) {
    // By halves: the library's own reduction uses undefined values on purpose, and compilers warn of them.
    typedef float Half __attribute__((vector_size(32)));
    typedef float Quarter __attribute__((vector_size(16)));
    Half low, high;
    __builtin_memcpy(&low, &v, sizeof low);
    __builtin_memcpy(&high, reinterpret_cast<const char*>(&v) + sizeof low, sizeof high);
    low += high;
    Quarter first, second;
    __builtin_memcpy(&first, &low, sizeof first);
    __builtin_memcpy(&second, reinterpret_cast<const char*>(&low) + sizeof first, sizeof second);
    first += second;
    return (first[0] + first[1]) + (first[2] + first[3]);
  }
  static bool any(IntVec mask) { return bits(mask) != 0; }
  static unsigned bits(IntVec mask) { return _mm512_movepi32_mask((__m512i)mask); }
  static unsigned above(Vec v, float limit) { return _mm512_cmp_ps_mask(v, _mm512_set1_ps(limit), _CMP_GT_OQ); }
  static Vec zip_low(Vec a, Vec b) {
    return _mm512_permutex2var_ps(a, _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23), b);
  }
  static Vec zip_high(Vec a, Vec b) {
    return _mm512_permutex2var_ps(a, _mm512_setr_epi32(8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31),
                                  b);
  }
  // With a mask of all lanes, because the plain forms use undefined values on purpose, too.
  static Vec larger(Vec a, Vec b) { return _mm512_maskz_max_ps(0xffff, a, b); }
  static Vec nearest(Vec v) { return _mm512_maskz_roundscale_ps(0xffff, v, 0); }
  static Vec scale(Vec v, Vec n) { return _mm512_maskz_scalef_ps(0xffff, v, n); }
  static void stream(float* p, Vec v) { _mm512_stream_ps(p, v); }
  static void fence() { _mm_sfence(); }

  static constexpr Numbers numbers = Numbers::float32;
  typedef Vec Sum;
  static Sum dot(Vec a, Vec b, Sum sum) { return multiply_add(a, b, sum); }
};

}  // namespace simd
}  // namespace
}  // namespace lift_fast
