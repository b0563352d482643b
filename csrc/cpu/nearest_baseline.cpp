namespace lift_fast {
namespace {

// For every CPU: four-float vectors in the compiler's own notation.
struct Isa {
  typedef float Vec __attribute__((vector_size(16)));
  typedef Vec Sum;
  static constexpr bool integers = false;
  static constexpr int lanes = 4, query_rows = 6, key_vectors = 2, channels_per_word = 1;
  static Vec broadcast(const float* p) { return Vec{} + *p; }
  static Vec multiply_add(Vec a, Vec b, Vec sum) { return sum + a * b; }
  static Vec dot(Vec a, Vec b, Vec sum) { return multiply_add(a, b, sum); }
  static unsigned above(Vec v, float limit) {
    unsigned bits = 0;
    for (int lane = 0; lane < lanes; ++lane) bits |= static_cast<unsigned>(v[lane] > limit) << lane;
    return bits;
  }
};

}  // namespace
}  // namespace lift_fast

#include "nearest_kernel.hpp"

namespace lift_fast {
NearestTiling nearest_tiling_baseline() { return {kQueries, kKeys, kChannels}; }
void nearest_kernel_baseline(const NearestCall& call, const NearestWork& work) { run_nearest(call, work); }
}  // namespace lift_fast
