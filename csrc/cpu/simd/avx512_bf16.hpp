// AVX-512 with BF16.
#pragma once

#include "avx512.hpp"

namespace lift_fast {
namespace {
namespace simd {

struct avx512_bf16 : avx512 {
  static constexpr Numbers numbers = Numbers::bfloat16;
  static Sum dot(Vec a, Vec b, Sum sum) {
    return _mm512_dpbf16_ps(sum, (__m512bh)_mm512_castps_si512(a), (__m512bh)_mm512_castps_si512(b));
  }
  // Floats as the nearest bfloat16: of one vector, of two side by side.
  static void narrow(float* to, Vec v) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), (__m256i)_mm512_cvtneps_pbh(v));
  }
  static void narrow(float* to, Vec first, Vec second) {
    _mm512_storeu_si512(to, (__m512i)_mm512_cvtne2ps_pbh(second, first));
  }
};

}  // namespace simd
}  // namespace
}  // namespace lift_fast
