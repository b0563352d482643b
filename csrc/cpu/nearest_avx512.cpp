#include <immintrin.h>

namespace lift_fast {
namespace {

// 24 accumulators, 2 vectors of keys and a broadcast query of 32 registers.
struct Isa {
  typedef float Vec __attribute__((vector_size(64)));
  typedef Vec Sum;
  static constexpr bool integers = false;
  static constexpr int lanes = 16, query_rows = 12, key_vectors = 2, channels_per_word = 1;
  static Vec broadcast(const float* p) { return _mm512_set1_ps(*p); }
  static Vec multiply_add(Vec a, Vec b, Vec sum) { return _mm512_fmadd_ps(a, b, sum); }
  static Vec dot(Vec a, Vec b, Vec sum) { return multiply_add(a, b, sum); }
  static unsigned above(Vec v, float limit) { return _mm512_cmp_ps_mask(v, _mm512_set1_ps(limit), _CMP_GT_OQ); }
};

}  // namespace
}  // namespace lift_fast

#include "nearest_kernel.hpp"

namespace lift_fast {
NearestTiling nearest_tiling_avx512() { return {kQueries, kKeys, kChannels}; }
void nearest_kernel_avx512(const NearestCall& call, const NearestWork& work) { run_nearest(call, work); }
}  // namespace lift_fast
