// The product of a bit matrix with a vector where processors cannot add under a mask of bits: the sums of all subsets of
// eight neighbouring values are tabulated, and each byte of a row looks its own up.
#include "bit_matrix.hpp"
#include "threads.hpp"

namespace lift_fast {
namespace {

constexpr int kBytes = 8;  // of a word; its tables, 16 KiB, stay in the first cache while all rows pass

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

void run_bit_lookup(const BitMultiplyCall& call) {
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

}  // namespace
}  // namespace lift_fast
