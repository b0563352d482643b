#include <immintrin.h>

#include <cstdint>

namespace lift_fast {
namespace {

struct BitMultiplyIsa {
  using Vec = __m256d;
  static constexpr int lanes = 4;
  static Vec load(const double* p) { return _mm256_loadu_pd(p); }
  // sum + values in the lanes whose bit of the lowest four is set.
  static Vec add_where(Vec sum, std::uint64_t bits, Vec values) {
    const __m256i lane = _mm256_set_epi64x(8, 4, 2, 1);
    const __m256i set = _mm256_cmpeq_epi64(_mm256_and_si256(_mm256_set1_epi64x(static_cast<long long>(bits)), lane), lane);
    return _mm256_add_pd(sum, _mm256_and_pd(_mm256_castsi256_pd(set), values));
  }
};

}  // namespace
}  // namespace lift_fast

#include "bit_matrix_kernel.hpp"

namespace lift_fast {
void bit_multiply_kernel_avx2(const BitMultiplyCall& call) { run_bit_multiply(call); }
}  // namespace lift_fast
