#include <immintrin.h>

namespace lift_fast {
namespace {

// 24 accumulators, 2 vectors of keys and a broadcast query of 32 registers.
struct NearestIsa {
  static constexpr int lanes = 16, query_rows = 12, key_vectors = 2, query_panels = 12;
  template <class Vec>
  static Vec broadcast(const float* p) {
    return _mm512_set1_ps(*p);
  }
  template <class Vec>
  static Vec multiply_add(Vec a, Vec b, Vec sum) {
    return _mm512_fmadd_ps(a, b, sum);
  }
};

}  // namespace
}  // namespace lift_fast

#include "nearest_kernel.hpp"

namespace lift_fast {
NearestTiling nearest_tiling_avx512() { return {kQueries, kKeys, kQueryPanels}; }
void nearest_kernel_avx512(const NearestCall& call) { run_nearest(call); }
}  // namespace lift_fast
