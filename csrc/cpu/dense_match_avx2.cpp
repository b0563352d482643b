#include <immintrin.h>

namespace lift_fast {
namespace {

struct DenseMatchIsa {
  static constexpr int lanes = 8;
  template <class Vec>
  static Vec multiply_add(Vec a, Vec b, Vec sum) {
    return _mm256_fmadd_ps(a, b, sum);
  }
  template <class Mask>
  static bool any(Mask mask) {
    return _mm256_movemask_epi8((__m256i)mask) != 0;
  }
};

}  // namespace
}  // namespace lift_fast

#include "dense_match_kernel.hpp"

namespace lift_fast {
void dense_match_kernel_avx2(const DenseMatchCall& call) { run_dense_match(call); }
}  // namespace lift_fast
