// Square blocks of floats, a row to a vector of the translation unit's own instruction set. In an anonymous namespace
// because the kernels' translation units are compiled for different sets and must not share code.
#pragma once

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace lift_fast {
namespace {

// The first halves of two vectors, their lanes in turn; and the second halves.
template <int kLanes>
struct Zip;

template <>
struct Zip<4> {
  template <class Vec>
  static Vec low(Vec a, Vec b) {
    return Vec{a[0], b[0], a[1], b[1]};
  }
  template <class Vec>
  static Vec high(Vec a, Vec b) {
    return Vec{a[2], b[2], a[3], b[3]};
  }
};

#if defined(__AVX2__)
template <>
struct Zip<8> {
  template <class Vec>
  static Vec low(Vec a, Vec b) {
    return _mm256_permute2f128_ps(_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b), 0x20);
  }
  template <class Vec>
  static Vec high(Vec a, Vec b) {
    return _mm256_permute2f128_ps(_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b), 0x31);
  }
};
#endif

#if defined(__AVX512F__)
template <>
struct Zip<16> {
  template <class Vec>
  static Vec low(Vec a, Vec b) {
    return _mm512_permutex2var_ps(a, _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23), b);
  }
  template <class Vec>
  static Vec high(Vec a, Vec b) {
    return _mm512_permutex2var_ps(a, _mm512_setr_epi32(8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31),
                                  b);
  }
};
#endif

// Rows of a square block become its columns: after each step a pair of neighbours stands for rows that were half the
// block apart.
template <int kLanes, class Vec>
inline void transpose(Vec (&block)[kLanes]) {
#pragma GCC unroll 4
  for (int step = 1; step < kLanes; step *= 2) {
    Vec mixed[kLanes];
#pragma GCC unroll 8
    for (int i = 0; i < kLanes / 2; ++i) {
      mixed[2 * i] = Zip<kLanes>::low(block[i], block[i + kLanes / 2]);
      mixed[2 * i + 1] = Zip<kLanes>::high(block[i], block[i + kLanes / 2]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) block[i] = mixed[i];
  }
}

}  // namespace
}  // namespace lift_fast
