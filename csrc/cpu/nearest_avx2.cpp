#include <immintrin.h>

namespace lift_fast {
namespace {

// 12 accumulators, 2 vectors of keys and a broadcast query of 16 registers.
struct Isa {
  typedef float Vec __attribute__((vector_size(32)));
  typedef Vec Sum;
  static constexpr bool integers = false;
  static constexpr int lanes = 8, query_rows = 6, key_vectors = 2, channels_per_word = 1;
  static Vec broadcast(const float* p) { return _mm256_broadcast_ss(p); }
  static Vec multiply_add(Vec a, Vec b, Vec sum) { return _mm256_fmadd_ps(a, b, sum); }
  static Vec dot(Vec a, Vec b, Vec sum) { return multiply_add(a, b, sum); }
  static unsigned above(Vec v, float limit) {
    return static_cast<unsigned>(_mm256_movemask_ps(_mm256_cmp_ps(v, _mm256_set1_ps(limit), _CMP_GT_OQ)));
  }
};

}  // namespace
}  // namespace lift_fast

#include "nearest_kernel.hpp"

namespace lift_fast {
NearestTiling nearest_tiling_avx2() { return {kQueries, kKeys, kChannels}; }
void nearest_kernel_avx2(const NearestCall& call, const NearestWork& work) { run_nearest(call, work); }
}  // namespace lift_fast
