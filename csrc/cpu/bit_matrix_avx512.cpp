#include <immintrin.h>

#include <cstdint>

namespace lift_fast {
namespace {

struct BitMultiplyIsa {
  using Vec = __m512d;
  static constexpr int lanes = 8;
  static Vec load(const double* p) { return _mm512_loadu_pd(p); }
  // sum + values in the lanes whose bit of the lowest eight is set.
  static Vec add_where(Vec sum, std::uint64_t bits, Vec values) {
    return _mm512_mask_add_pd(sum, static_cast<__mmask8>(bits), sum, values);
  }
};

}  // namespace
}  // namespace lift_fast

#include "bit_matrix_kernel.hpp"

namespace lift_fast {
void bit_multiply_kernel_avx512(const BitMultiplyCall& call) { run_bit_multiply(call); }
}  // namespace lift_fast
