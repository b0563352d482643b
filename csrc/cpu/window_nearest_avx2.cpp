#include <immintrin.h>

namespace lift_fast {
namespace {

// 12 accumulators, 2 vectors of keys and a broadcast query of 16 registers.
struct WindowNearestIsa {
  static constexpr int lanes = 8, queries = 6, key_vectors = 2;
  template <class Vec>
  static Vec broadcast(const float* p) {
    return _mm256_broadcast_ss(p);
  }
  template <class Vec>
  static Vec multiply_add(Vec a, Vec b, Vec sum) {
    return _mm256_fmadd_ps(a, b, sum);
  }
  // Bit i: lane i of the mask is set.
  template <class Mask>
  static unsigned bits(Mask mask) {
    return static_cast<unsigned>(_mm256_movemask_ps((__m256)mask));
  }
};

}  // namespace
}  // namespace lift_fast

#include "window_nearest_kernel.hpp"

namespace lift_fast {
WindowNearestTiling window_nearest_tiling_avx2() { return {kQueries, kLanes}; }
void window_nearest_kernel_avx2(const WindowNearestCall& call) { run_window_nearest(call); }
}  // namespace lift_fast
