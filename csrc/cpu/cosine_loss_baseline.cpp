#include <cstdint>

namespace lift_fast {
namespace {

// For every CPU: four-float vectors in the compiler's own notation, half precision in integer arithmetic.
struct Isa {
  typedef float Vec __attribute__((vector_size(16)));
  static constexpr int lanes = 4;
  static void stream(float* p, Vec v) { __builtin_memcpy(p, &v, sizeof v); }
  static void fence() {}

  static float from_half(std::uint16_t half) {
    const std::uint32_t sign = static_cast<std::uint32_t>(half & 0x8000u) << 16, rest = half & 0x7fffu;
    if (rest >= 0x7c00u) return from_bits(sign | 0x7f800000u | ((rest & 0x3ffu) << 13));
    // Subnormal or not: the exponent is shifted by a product, which is exact.
    return from_bits(sign | (rest << 13)) * 5.192296858534828e33f;
  }

  static std::uint16_t to_half(float value) {
    const std::uint32_t bits = to_bits(value), sign = (bits >> 16) & 0x8000u, rest = bits & 0x7fffffffu;
    if (rest > 0x7f800000u) return static_cast<std::uint16_t>(sign | 0x7e00u | ((rest >> 13) & 0x3ffu));
    // From 65520 on the nearest is infinity.
    if (rest >= 0x477ff000u) return static_cast<std::uint16_t>(sign | 0x7c00u);
    if (rest < 0x38800000u) {
      // Subnormal: adding 0.5 leaves the digits that count at the end of the significand, rounded to nearest even.
      return static_cast<std::uint16_t>(sign | (to_bits(from_bits(rest) + 0.5f) - 0x3f000000u));
    }
    return static_cast<std::uint16_t>(sign | ((rest - 0x38000000u + 0xfffu + ((rest >> 13) & 1u)) >> 13));
  }

 private:
  static float from_bits(std::uint32_t bits) {
    float value;
    __builtin_memcpy(&value, &bits, sizeof value);
    return value;
  }
  static std::uint32_t to_bits(float value) {
    std::uint32_t bits;
    __builtin_memcpy(&bits, &value, sizeof bits);
    return bits;
  }
};

}  // namespace
}  // namespace lift_fast

#include "cosine_loss_kernel.hpp"

namespace lift_fast {
void cosine_loss_kernel_baseline(const CosineLossCall& call, const CosineLossWork& work) { run_cosine_loss(call, work); }
}  // namespace lift_fast
