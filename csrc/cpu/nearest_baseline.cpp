namespace lift_fast {
namespace {

// For every CPU: four-float vectors in the compiler's own notation.
struct NearestIsa {
  static constexpr int lanes = 4, query_rows = 6, key_vectors = 2, query_panels = 16;
  template <class Vec>
  static Vec broadcast(const float* p) {
    return Vec{} + *p;
  }
  template <class Vec>
  static Vec multiply_add(Vec a, Vec b, Vec sum) {
    return sum + a * b;
  }
};

}  // namespace
}  // namespace lift_fast

#include "nearest_kernel.hpp"

namespace lift_fast {
NearestTiling nearest_tiling_baseline() { return {kQueries, kKeys, kQueryPanels}; }
void nearest_kernel_baseline(const NearestCall& call) { run_nearest(call); }
}  // namespace lift_fast
