namespace lift_fast {
namespace {

// For every CPU: four-float vectors in the compiler's own notation.
struct WindowNearestIsa {
  static constexpr int lanes = 4, queries = 6, key_vectors = 2;
  template <class Vec>
  static Vec broadcast(const float* p) {
    return Vec{} + *p;
  }
  template <class Vec>
  static Vec multiply_add(Vec a, Vec b, Vec sum) {
    return sum + a * b;
  }
  // Bit i: lane i of the mask is set.
  template <class Mask>
  static unsigned bits(Mask mask) {
    unsigned set = 0;
    for (int i = 0; i < lanes; ++i) set |= (mask[i] & 1u) << i;
    return set;
  }
};

}  // namespace
}  // namespace lift_fast

#include "window_nearest_kernel.hpp"

namespace lift_fast {
WindowNearestTiling window_nearest_tiling_baseline() { return {kQueries, kLanes}; }
void window_nearest_kernel_baseline(const WindowNearestCall& call) { run_window_nearest(call); }
}  // namespace lift_fast
