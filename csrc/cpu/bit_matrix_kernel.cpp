// The product of a bit matrix with a vector.
#include "bit_matrix.hpp"
#include "simd/simd.hpp"
#include "threads.hpp"

namespace lift_fast {
namespace {

#if defined(__AVX512F__)

constexpr int kDoubles = 8;  // of a vector
// Rows that share each load of the vector.
constexpr std::int64_t kRows = 4;

template <int kCount>
void multiply_rows(const BitMultiplyCall& call, std::int64_t row) {
  const std::uint64_t* bits = call.bits + row * call.words;
  __m512d sums[kCount] = {};
  for (std::int64_t w = 0; w < call.words; ++w) {
    std::uint64_t word[kCount];
    for (int r = 0; r < kCount; ++r) word[r] = bits[r * call.words + w];
    const double* from = call.vector + 64 * w;
#pragma GCC unroll 8
    for (int i = 0; i < 64; i += kDoubles) {
      const __m512d values = _mm512_loadu_pd(from + i);
#pragma GCC unroll 4
      for (int r = 0; r < kCount; ++r) {
        sums[r] = _mm512_mask_add_pd(sums[r], static_cast<__mmask8>(word[r] >> i), sums[r], values);
      }
    }
  }
  for (int r = 0; r < kCount; ++r) {
    double sum = 0.0;
    for (int i = 0; i < kDoubles; ++i) sum += sums[r][i];
    call.out[row + r] = sum;
  }
}

void run_bit_multiply(const BitMultiplyCall& call) {
  const std::int64_t whole = call.n / kRows;
#pragma omp parallel for num_threads(call.threads) schedule(static)
  for (std::int64_t i = 0; i < whole; ++i) multiply_rows<kRows>(call, i * kRows);
  for (std::int64_t row = whole * kRows; row < call.n; ++row) multiply_rows<1>(call, row);
}

#else

// For processors without masked additions: a table holds the sums of all subsets of eight neighbouring values, and each
// byte of a row looks up its sum.
constexpr int kBytes = 8;  // of a word; its 16 KiB of tables stay in the L1 cache while all rows pass

inline void tabulate(const double* values, double (*tables)[256]) {
  for (int b = 0; b < kBytes; ++b) {
    double* table = tables[b];
    table[0] = 0.0;
    for (int bit = 0; bit < 8; ++bit) {
      const double value = values[8 * b + bit];
      for (int subset = 0; subset < 1 << bit; ++subset) table[(1 << bit) + subset] = table[subset] + value;
    }
  }
}

void run_bit_multiply(const BitMultiplyCall& call) {
#pragma omp parallel num_threads(call.threads)
  {
    const std::int64_t threads = thread_count(), thread = thread_index();
    const std::int64_t first = call.n * thread / threads, end = call.n * (thread + 1) / threads;
    double tables[kBytes][256];
    for (std::int64_t row = first; row < end; ++row) call.out[row] = 0.0;
    for (std::int64_t w = 0; w < call.words; ++w) {
      tabulate(call.vector + 64 * w, tables);
      for (std::int64_t row = first; row < end; ++row) {
        const std::uint64_t word = call.bits[row * call.words + w];
        double sums[kBytes];
#pragma GCC unroll 8
        for (int b = 0; b < kBytes; ++b) sums[b] = tables[b][word >> 8 * b & 0xff];
        call.out[row] += ((sums[0] + sums[1]) + (sums[2] + sums[3])) + ((sums[4] + sums[5]) + (sums[6] + sums[7]));
      }
    }
  }
}

#endif

}  // namespace

template <>
const BitMultiplyKernel Compiled<BitMultiplyKernel, kIsa>::kernel = {run_bit_multiply};

}  // namespace lift_fast
