#include <cstdint>

namespace lift_fast {
namespace {

// For every CPU: two-double vectors in the compiler's own notation.
struct BitMultiplyIsa {
  typedef double Vec __attribute__((vector_size(16)));
  typedef long long IntVec __attribute__((vector_size(16)));
  static constexpr int lanes = 2;
  static Vec load(const double* p) {
    Vec values;
    __builtin_memcpy(&values, p, sizeof values);
    return values;
  }
  // sum + values in the lanes whose bit of the lowest two is set.
  static Vec add_where(Vec sum, std::uint64_t bits, Vec values) {
    const IntVec set = {-static_cast<long long>(bits & 1), -static_cast<long long>(bits >> 1 & 1)};
    return sum + (Vec)(set & (IntVec)values);
  }
};

}  // namespace
}  // namespace lift_fast

#include "bit_matrix_kernel.hpp"

namespace lift_fast {
void bit_multiply_kernel_baseline(const BitMultiplyCall& call) { run_bit_multiply(call); }
}  // namespace lift_fast
