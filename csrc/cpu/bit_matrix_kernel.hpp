// The product of a bit matrix with a vector. BitMultiplyIsa of the including translation unit says how vectors of
// `lanes` doubles are added where bits are set.
#include "bit_matrix.hpp"

namespace lift_fast {
namespace {

// Rows that share each load of the vector.
constexpr std::int64_t kRows = 4;

template <int kCount>
void multiply_rows(const BitMultiplyCall& call, std::int64_t row) {
  using Vec = BitMultiplyIsa::Vec;
  constexpr int lanes = BitMultiplyIsa::lanes;
  const std::uint64_t* bits = call.bits + row * call.words;
  Vec sums[kCount] = {};
  for (std::int64_t w = 0; w < call.words; ++w) {
    std::uint64_t word[kCount];
    for (int r = 0; r < kCount; ++r) word[r] = bits[r * call.words + w];
    const double* from = call.vector + 64 * w;
#pragma GCC unroll 8
    for (int i = 0; i < 64; i += lanes) {
      const Vec values = BitMultiplyIsa::load(from + i);
#pragma GCC unroll 4
      for (int r = 0; r < kCount; ++r) sums[r] = BitMultiplyIsa::add_where(sums[r], word[r] >> i, values);
    }
  }
  for (int r = 0; r < kCount; ++r) {
    double sum = 0.0;
    for (int i = 0; i < lanes; ++i) sum += sums[r][i];
    call.out[row + r] = sum;
  }
}

void run_bit_multiply(const BitMultiplyCall& call) {
  const std::int64_t whole = call.n / kRows;
#pragma omp parallel for num_threads(call.threads) schedule(static)
  for (std::int64_t i = 0; i < whole; ++i) multiply_rows<kRows>(call, i * kRows);
  for (std::int64_t row = whole * kRows; row < call.n; ++row) multiply_rows<1>(call, row);
}

}  // namespace
}  // namespace lift_fast
