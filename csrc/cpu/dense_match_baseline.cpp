namespace lift_fast {
namespace {

// For every CPU: four-float vectors in the compiler's own notation.
struct DenseMatchIsa {
  static constexpr int lanes = 4;
  template <class Vec>
  static Vec multiply_add(Vec a, Vec b, Vec sum) {
    return sum + a * b;
  }
  template <class Mask>
  static bool any(Mask mask) {
    return (mask[0] | mask[1] | mask[2] | mask[3]) != 0;
  }
};

}  // namespace
}  // namespace lift_fast

#include "dense_match_kernel.hpp"

namespace lift_fast {
void dense_match_kernel_baseline(const DenseMatchCall& call) { run_dense_match(call); }
}  // namespace lift_fast
