#include <immintrin.h>

namespace lift_fast {
namespace {

// GEMM operands in bfloat16, sums in float32; everything between GEMMs in float32.
struct Isa {
  typedef float Vec __attribute__((vector_size(64)));
  static constexpr int width = 16;
  static constexpr int rows = 14;
  static constexpr bool pairs = true;
  static constexpr int prefetch_words = 2048;
  static constexpr int cache_words = 240 * 1024;

  static Vec zero() { return _mm512_setzero_ps(); }
  static Vec splat(float value) { return _mm512_set1_ps(value); }
  static Vec broadcast(const float* p) { return _mm512_set1_ps(*p); }
  static Vec dot(Vec sum, Vec a, Vec b) {
    return _mm512_dpbf16_ps(sum, (__m512bh)_mm512_castps_si512(a), (__m512bh)_mm512_castps_si512(b));
  }
  static void store_block(float* to, const Vec* v) {
    _mm512_storeu_si512(to, (__m512i)_mm512_cvtne2ps_pbh(v[1], v[0]));
  }
  static void store_part(float* to, long long channel, Vec v) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + channel / 2), (__m256i)_mm512_cvtneps_pbh(v));
  }
};

}  // namespace
}  // namespace lift_fast

#include "lift_forward_kernel.hpp"

namespace lift_fast {
void lift_forward_run_avx512_bf16(const LiftForwardCall& call) { run_lift_forward(call); }
}  // namespace lift_fast
