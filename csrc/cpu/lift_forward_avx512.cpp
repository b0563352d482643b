#include <immintrin.h>

namespace lift_fast {
namespace {

struct Isa {
  typedef float Vec __attribute__((vector_size(64)));
  static constexpr int width = 16;
  static constexpr int rows = 14;
  static constexpr bool pairs = false;
  static constexpr int prefetch_words = 2048;
  static constexpr int cache_words = 240 * 1024;

  static Vec zero() { return _mm512_setzero_ps(); }
  static Vec splat(float value) { return _mm512_set1_ps(value); }
  static Vec broadcast(const float* p) { return _mm512_set1_ps(*p); }
  static Vec dot(Vec sum, Vec a, Vec b) { return _mm512_fmadd_ps(a, b, sum); }
  static void store_block(float* to, const Vec* v) { _mm512_storeu_ps(to, v[0]); }
  static void store_part(float* to, long long channel, Vec v) { _mm512_storeu_ps(to + channel, v); }
};

}  // namespace
}  // namespace lift_fast

#include "lift_forward_kernel.hpp"

namespace lift_fast {
void lift_forward_run_avx512(const LiftForwardCall& call) { run_lift_forward(call); }
}  // namespace lift_fast
