// The AVX-512 instructions of nearest for avx512_int16 in plain C++, so that its very source runs on any CPU. Compiled
// instead of the compiler's own header; semantics as in Intel's manual.
#pragma once

#include <cstdint>
#include <cstring>

typedef float __m512 __attribute__((vector_size(64), may_alias));
typedef int __m512i __attribute__((vector_size(64), may_alias));
typedef std::uint16_t __mmask16;
enum { _CMP_GT_OQ = 0x1e };

static inline __m512 _mm512_set1_ps(float value) {
  // Lane by lane: arithmetic would change the bits of integers that look like NaN.
  __m512 all;
  for (int i = 0; i < 16; ++i) std::memcpy(reinterpret_cast<char*>(&all) + 4 * i, &value, 4);
  return all;
}
static inline __m512 _mm512_fmadd_ps(__m512 a, __m512 b, __m512 c) {
  for (int i = 0; i < 16; ++i) c[i] = __builtin_fmaf(a[i], b[i], c[i]);
  return c;
}
static inline __m512i _mm512_castps_si512(__m512 value) { return (__m512i)value; }
// Sums of two products of 16-bit integers each, which wrap around as the instruction's do.
static inline __m512i _mm512_dpwssd_epi32(__m512i sum, __m512i a, __m512i b) {
  std::int16_t x[32], y[32];
  std::memcpy(x, &a, sizeof x);
  std::memcpy(y, &b, sizeof y);
  for (int i = 0; i < 16; ++i) {
    const std::int64_t wide = std::int64_t{sum[i]} + std::int32_t{x[2 * i]} * y[2 * i] +
                              std::int64_t{std::int32_t{x[2 * i + 1]} * y[2 * i + 1]};
    // An overflow would be a fault of the packing: it has to keep every sum in range.
    if (wide != static_cast<std::int32_t>(wide)) __builtin_trap();
    sum[i] = static_cast<std::int32_t>(wide);
  }
  return sum;
}
static inline __mmask16 _mm512_cmp_ps_mask(__m512 a, __m512 b, int) {
  __mmask16 mask = 0;
  for (int i = 0; i < 16; ++i) mask = static_cast<__mmask16>(mask | (a[i] > b[i]) << i);
  return mask;
}
static inline __mmask16 _mm512_movepi32_mask(__m512i value) {
  __mmask16 mask = 0;
  for (int i = 0; i < 16; ++i) mask = static_cast<__mmask16>(mask | (value[i] < 0) << i);
  return mask;
}
// What the kernel's vectors offer to other operators.
static inline void _mm512_stream_ps(float* to, __m512 value) { std::memcpy(to, &value, sizeof value); }
static inline void _mm_sfence() {}
static inline __m512 _mm512_maskz_max_ps(__mmask16, __m512 a, __m512 b) { return a > b ? a : b; }
static inline __m512 _mm512_maskz_roundscale_ps(__mmask16, __m512 a, int) {
  for (int i = 0; i < 16; ++i) a[i] = __builtin_nearbyintf(a[i]);
  return a;
}
static inline __m512 _mm512_maskz_scalef_ps(__mmask16, __m512 a, __m512 b) {
  for (int i = 0; i < 16; ++i) a[i] = __builtin_ldexpf(a[i], static_cast<int>(b[i]));
  return a;
}
#define _mm512_setr_epi32(...) (__m512i{__VA_ARGS__})
static inline __m512 _mm512_permutex2var_ps(__m512 a, __m512i from, __m512 b) {
  __m512 mixed;
  for (int i = 0; i < 16; ++i) mixed[i] = (from[i] & 16 ? b : a)[from[i] & 15];
  return mixed;
}
