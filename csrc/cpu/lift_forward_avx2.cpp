#include <immintrin.h>

namespace lift_fast {
namespace {

struct Isa {
  typedef float Vec __attribute__((vector_size(32)));
  static constexpr int width = 8;
  static constexpr int rows = 6;
  static constexpr bool pairs = false;
  static constexpr int prefetch_words = 1024;
  static constexpr int cache_words = 100 * 1024;

  static Vec zero() { return _mm256_setzero_ps(); }
  static Vec splat(float value) { return _mm256_set1_ps(value); }
  static Vec broadcast(const float* p) { return _mm256_broadcast_ss(p); }
  static Vec dot(Vec sum, Vec a, Vec b) { return _mm256_fmadd_ps(a, b, sum); }
  static void store_block(float* to, const Vec* v) {
    _mm256_storeu_ps(to, v[0]);
    _mm256_storeu_ps(to + 8, v[1]);
  }
  static void store_part(float* to, long long channel, Vec v) { _mm256_storeu_ps(to + channel, v); }
};

}  // namespace
}  // namespace lift_fast

#include "lift_forward_kernel.hpp"

namespace lift_fast {
void lift_forward_run_avx2(const LiftForwardCall& call) { run_lift_forward(call); }
}  // namespace lift_fast
