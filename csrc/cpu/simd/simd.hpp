// Vectors of the instruction set that a kernel is compiled for, LIFT_FAST_ISA.
//
// setup.py compiles each csrc/cpu/*_kernel.cpp once for every set. All code compiled for a set lies in anonymous
// namespaces and must not use templates of the standard library. If several translation units emit a function, the
// linker keeps one of them; if that one held AVX-512 instructions, other CPUs would crash. A test looks for such
// functions in the objects.
#pragma once

#include <cstdint>

#include "../dispatch.hpp"

// Each header defines a struct of its set's name, `simd::avx2` and so on:
//   lanes        of Vec (float) and of IntVec (its comparisons' results: -1 or 0 in each lane)
//   sum          of the lanes
//   any, bits    of a comparison's result: whether a lane holds; bit i for lane i
//   above        the same bits of v > limit
//   zip_low      the first halves of two vectors, their lanes in turn; zip_high the second halves
//   larger       of a and b, b where one of them is NaN
//   nearest      whole numbers, for |v| < 2^22
//   scale        v * 2^n for whole n from -126 to 127; NaN in n makes any value
//   stream       an aligned store past the caches; fence: before its result is read or written again
//   numbers      the shortest type that the set multiplies faster than float32; a word of Vec holds one float32 or two
//                of another type
//   dot          sum + the products of the words of a and b, in that type
#define LIFT_FAST_QUOTED(name) #name
#define LIFT_FAST_HEADER(set) LIFT_FAST_QUOTED(set.hpp)
#include LIFT_FAST_HEADER(LIFT_FAST_ISA)

namespace lift_fast {
namespace {

using Isa = simd::LIFT_FAST_ISA;
constexpr CpuIsa kIsa = CpuIsa::LIFT_FAST_ISA;
using Vec = Isa::Vec;
using IntVec = Isa::IntVec;
constexpr int kLanes = Isa::lanes;
constexpr float kInfinity = __builtin_inff();
constexpr float kLargest = __FLT_MAX__;

// The choice for vectors of 4, 8 and 16 lanes.
constexpr int by_lanes(int four, int eight, int sixteen) { return kLanes == 4 ? four : kLanes == 8 ? eight : sixteen; }

inline Vec load(const float* p) {
  Vec v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
inline IntVec load(const std::int32_t* p) {
  IntVec v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
inline void store(float* p, Vec v) { __builtin_memcpy(p, &v, sizeof v); }
inline void store(std::int32_t* p, IntVec v) { __builtin_memcpy(p, &v, sizeof v); }
inline Vec splat(float value) { return Isa::broadcast(&value); }
inline IntVec splat(std::int32_t value) { return IntVec{} + value; }

template <class T>
T smaller(T a, T b) {
  return a < b ? a : b;
}
template <class T>
T larger(T a, T b) {
  return a > b ? a : b;
}
inline std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

inline std::uint32_t as_bits(float value) {
  std::uint32_t bits;
  __builtin_memcpy(&bits, &value, sizeof bits);
  return bits;
}
inline float as_float(std::uint32_t bits) {
  float value;
  __builtin_memcpy(&value, &bits, sizeof value);
  return value;
}

// Transposes a square block: each step makes neighbours of rows that were half the block apart.
inline void transpose(Vec (&block)[kLanes]) {
#pragma GCC unroll 4
  for (int step = 1; step < kLanes; step *= 2) {
    Vec mixed[kLanes];
#pragma GCC unroll 8
    for (int i = 0; i < kLanes / 2; ++i) {
      mixed[2 * i] = Isa::zip_low(block[i], block[i + kLanes / 2]);
      mixed[2 * i + 1] = Isa::zip_high(block[i], block[i + kLanes / 2]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) block[i] = mixed[i];
  }
}

}  // namespace
}  // namespace lift_fast
