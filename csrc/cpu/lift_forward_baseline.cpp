// For every CPU: four-float vectors in the compiler's own notation.
namespace lift_fast {
namespace {

struct Isa {
  typedef float Vec __attribute__((vector_size(16)));
  static constexpr int width = 4;
  static constexpr int rows = 6;
  static constexpr bool pairs = false;
  static constexpr int prefetch_words = 512;
  static constexpr int cache_words = 100 * 1024;

  static Vec zero() { return Vec{}; }
  static Vec splat(float value) { return Vec{value, value, value, value}; }
  static Vec broadcast(const float* p) { return splat(*p); }
  static Vec dot(Vec sum, Vec a, Vec b) { return sum + a * b; }
  static void store_block(float* to, const Vec* v) { __builtin_memcpy(to, v, 4 * sizeof(Vec)); }
  static void store_part(float* to, long long channel, Vec v) { __builtin_memcpy(to + channel, &v, sizeof v); }
};

}  // namespace
}  // namespace lift_fast

#include "lift_forward_kernel.hpp"

namespace lift_fast {
void lift_forward_run_baseline(const LiftForwardCall& call) { run_lift_forward(call); }
}  // namespace lift_fast
