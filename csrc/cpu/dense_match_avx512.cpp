#include <immintrin.h>

namespace lift_fast {
namespace {

struct DenseMatchIsa {
  static constexpr int lanes = 16;
  template <class Vec>
  static Vec multiply_add(Vec a, Vec b, Vec sum) {
    return _mm512_fmadd_ps(a, b, sum);
  }
  template <class Mask>
  static bool any(Mask mask) {
    return _mm512_movepi32_mask((__m512i)mask) != 0;
  }
};

}  // namespace
}  // namespace lift_fast

#include "dense_match_kernel.hpp"

namespace lift_fast {
void dense_match_kernel_avx512(const DenseMatchCall& call) { run_dense_match(call); }
}  // namespace lift_fast
