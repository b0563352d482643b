#include <immintrin.h>

namespace lift_fast {
namespace {

// Up to 24 accumulators, 3 vectors of keys and a broadcast query of 32 registers. With few queries to a tile the union
// of their windows is little wider than one of them.
struct WindowNearestIsa {
  static constexpr int lanes = 16, queries = 8, key_vectors = 3;
  template <class Vec>
  static Vec broadcast(const float* p) {
    return _mm512_set1_ps(*p);
  }
  template <class Vec>
  static Vec multiply_add(Vec a, Vec b, Vec sum) {
    return _mm512_fmadd_ps(a, b, sum);
  }
  // Bit i: lane i of the mask is set.
  template <class Mask>
  static unsigned bits(Mask mask) {
    return _mm512_movepi32_mask((__m512i)mask);
  }
};

}  // namespace
}  // namespace lift_fast

#include "window_nearest_kernel.hpp"

namespace lift_fast {
WindowNearestTiling window_nearest_tiling_avx512() { return {kQueries, kLanes}; }
void window_nearest_kernel_avx512(const WindowNearestCall& call) { run_window_nearest(call); }
}  // namespace lift_fast
