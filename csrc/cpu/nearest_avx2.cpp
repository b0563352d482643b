#include <immintrin.h>

namespace lift_fast {
namespace {

// 12 accumulators, 2 vectors of keys and a broadcast query of 16 registers.
struct NearestIsa {
  static constexpr int lanes = 8, query_rows = 6, key_vectors = 2, query_panels = 16;
  template <class Vec>
  static Vec broadcast(const float* p) {
    return _mm256_broadcast_ss(p);
  }
  template <class Vec>
  static Vec multiply_add(Vec a, Vec b, Vec sum) {
    return _mm256_fmadd_ps(a, b, sum);
  }
};

}  // namespace
}  // namespace lift_fast

#include "nearest_kernel.hpp"

namespace lift_fast {
NearestTiling nearest_tiling_avx2() { return {kQueries, kKeys, kQueryPanels}; }
void nearest_kernel_avx2(const NearestCall& call) { run_nearest(call); }
}  // namespace lift_fast
