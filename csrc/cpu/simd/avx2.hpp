// AVX2, FMA and F16C.
#pragma once

#include <immintrin.h>

namespace lift_fast {
namespace {
namespace simd {

struct avx2 {
  static constexpr int lanes = 8;
  typedef float Vec __attribute__((vector_size(32)));
  typedef std::int32_t IntVec __attribute__((vector_size(32)));

  static Vec broadcast(const float* p) { return _mm256_broadcast_ss(p); }
  static Vec multiply_add(Vec a, Vec b, Vec sum) { return _mm256_fmadd_ps(a, b, sum); }
  static float sum(Vec v) { return ((v[0] + v[1]) + (v[2] + v[3])) + ((v[4] + v[5]) + (v[6] + v[7])); }
  static bool any(IntVec mask) { return bits(mask) != 0; }
  static unsigned bits(IntVec mask) { return static_cast<unsigned>(_mm256_movemask_ps((__m256)mask)); }
  static unsigned above(Vec v, float limit) {
    return static_cast<unsigned>(_mm256_movemask_ps(_mm256_cmp_ps(v, _mm256_set1_ps(limit), _CMP_GT_OQ)));
  }
  static Vec zip_low(Vec a, Vec b) {
    return _mm256_permute2f128_ps(_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b), 0x20);
  }
  static Vec zip_high(Vec a, Vec b) {
    return _mm256_permute2f128_ps(_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b), 0x31);
  }
  static Vec larger(Vec a, Vec b) { return _mm256_max_ps(a, b); }
  static Vec nearest(Vec v) { return _mm256_round_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  static Vec scale(Vec v, Vec n) {
    return v *
           _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23));
  }
  static void stream(float* p, Vec v) { _mm256_stream_ps(p, v); }
  static void fence() { _mm_sfence(); }

  // Twice as many products as float32, and other units of the processor add them.
  static constexpr Numbers numbers = Numbers::int16;
  typedef IntVec Sum;
  static Sum dot(Vec a, Vec b, Sum sum) {
    return sum + (Sum)_mm256_madd_epi16(_mm256_castps_si256(a), _mm256_castps_si256(b));
  }
};

}  // namespace simd
}  // namespace
}  // namespace lift_fast
