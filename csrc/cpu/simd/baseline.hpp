// For every CPU: four-float vectors in the compiler's own notation.
#pragma once

namespace lift_fast {
namespace {
namespace simd {

struct baseline {
  static constexpr int lanes = 4;
  typedef float Vec __attribute__((vector_size(16)));
  typedef std::int32_t IntVec __attribute__((vector_size(16)));

  static Vec broadcast(const float* p) { return Vec{*p, *p, *p, *p}; }
  static Vec multiply_add(Vec a, Vec b, Vec sum) { return sum + a * b; }
  static float sum(Vec v) { return (v[0] + v[1]) + (v[2] + v[3]); }
  static bool any(IntVec mask) { return (mask[0] | mask[1] | mask[2] | mask[3]) != 0; }
  static unsigned bits(IntVec mask) {
    unsigned set = 0;
    for (int i = 0; i < lanes; ++i) set |= (mask[i] & 1u) << i;
    return set;
  }
  static unsigned above(Vec v, float limit) {
    unsigned set = 0;
    for (int i = 0; i < lanes; ++i) set |= static_cast<unsigned>(v[i] > limit) << i;
    return set;
  }
  static Vec zip_low(Vec a, Vec b) { return Vec{a[0], b[0], a[1], b[1]}; }
  static Vec zip_high(Vec a, Vec b) { return Vec{a[2], b[2], a[3], b[3]}; }
  static Vec larger(Vec a, Vec b) { return a > b ? a : b; }
  static Vec nearest(Vec v) {
    // Adding it leaves no digits after the point.
    const Vec magic = Vec{} + 12582912.f;
    return (v + magic) - magic;
  }
  static Vec scale(Vec v, Vec n) {
    const IntVec bits = (__builtin_convertvector(n, IntVec) + 127) << 23;
    Vec factor;
    __builtin_memcpy(&factor, &bits, sizeof factor);
    return v * factor;
  }
  static void stream(float* p, Vec v) { __builtin_memcpy(p, &v, sizeof v); }
  static void fence() {}

  static constexpr Numbers numbers = Numbers::float32;
  typedef Vec Sum;
  static Sum dot(Vec a, Vec b, Sum sum) { return multiply_add(a, b, sum); }
};

}  // namespace simd
}  // namespace
}  // namespace lift_fast
