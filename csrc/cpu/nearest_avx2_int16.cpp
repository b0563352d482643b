#include <immintrin.h>

namespace lift_fast {
namespace {

// The search in integers of 16 bits: words hold pairs of channels. A product of vectors does twice the work of float32's
// and its sum goes to other units of the processor. 12 accumulators, 2 vectors of keys, a query and a product of 16
// registers.
struct Isa {
  typedef float Vec __attribute__((vector_size(32)));
  typedef int Sum __attribute__((vector_size(32)));
  static constexpr bool integers = true;
  static constexpr int lanes = 8, query_rows = 6, key_vectors = 2, channels_per_word = 2;
  static Vec broadcast(const float* p) { return _mm256_broadcast_ss(p); }
  static Vec multiply_add(Vec a, Vec b, Vec sum) { return _mm256_fmadd_ps(a, b, sum); }
  static Sum dot(Vec a, Vec b, Sum sum) {
    return sum + (Sum)_mm256_madd_epi16(_mm256_castps_si256(a), _mm256_castps_si256(b));
  }
  static unsigned above(Vec v, float limit) {
    return static_cast<unsigned>(_mm256_movemask_ps(_mm256_cmp_ps(v, _mm256_set1_ps(limit), _CMP_GT_OQ)));
  }
};

}  // namespace
}  // namespace lift_fast

#include "nearest_kernel.hpp"

namespace lift_fast {
NearestTiling nearest_tiling_avx2_int16() { return {kQueries, kKeys, kChannels}; }
void nearest_kernel_avx2_int16(const NearestCall& call, const NearestWork& work) { run_nearest(call, work); }
}  // namespace lift_fast
