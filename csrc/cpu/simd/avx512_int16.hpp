// AVX-512 with VNNI, for processors without bfloat16.
#pragma once

#include "avx512.hpp"

namespace lift_fast {
namespace {
namespace simd {

struct avx512_int16 : avx512 {
  static constexpr Numbers numbers = Numbers::int16;
  typedef IntVec Sum;
  static Sum dot(Vec a, Vec b, Sum sum) {
    return (Sum)_mm512_dpwssd_epi32((__m512i)sum, _mm512_castps_si512(a), _mm512_castps_si512(b));
  }
};

}  // namespace simd
}  // namespace
}  // namespace lift_fast
