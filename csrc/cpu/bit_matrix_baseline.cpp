#include "bit_lookup_kernel.hpp"

namespace lift_fast {
void bit_multiply_kernel_baseline(const BitMultiplyCall& call) { run_bit_lookup(call); }
}  // namespace lift_fast
