#include "cpu/bit_matrix.hpp"
#include "sanitize.hpp"

namespace lift_fast {

void sanitize(CpuIsa isa) {
  for (std::int64_t n : {1, 63, 64, 65, 130, 200}) {
    const std::int64_t words = (n + 63) / 64;
    std::unique_ptr<std::uint64_t[]> bits(new std::uint64_t[64 * words * words]());
    for (std::int64_t start = 0; start < n; start += 64) {
      const std::int64_t some = n - start < 64 ? n - start : 64;
      bit_matrix_set_rows(rows(some * (start + some)).get(), start, some, n, 0.05f, bits.get(), 3);
    }
    std::unique_ptr<double[]> vector(new double[n]), out(new double[n]);
    for (std::int64_t i = 0; i < n; ++i) vector[i] = 0.5 * static_cast<double>(i % 7);
    bit_matrix_multiply(bits.get(), n, vector.get(), out.get(), 3, isa);
    for (std::int64_t i = 0; i < n; ++i) {
      if (!(out[i] >= 0.0)) std::abort();
    }
  }
}

}  // namespace lift_fast
