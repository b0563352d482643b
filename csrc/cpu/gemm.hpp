// Matrix products of networks. Activations lie as [K block][row][16 words]: a micro-kernel reads its rows of one K block
// at constant distances, and what writes them writes whole cache lines. Weights lie as [panel][K word][panel columns]. A
// word is a float or two bfloat16 of neighbouring channels.
#pragma once

#include "simd/simd.hpp"

namespace lift_fast {
namespace {

using Word = float;
// GEMM operands in bfloat16, sums in float32; everything between GEMMs in float32.
constexpr bool kPairs = Isa::numbers == Numbers::bfloat16;
constexpr int kWords = 16;
constexpr int kRows = by_lanes(6, 6, 14);
constexpr int kPrefetchWords = by_lanes(512, 1024, 2048);
constexpr int kPanel = 2 * kLanes;
constexpr int kBlock = kPairs ? 32 : 16;
constexpr int kVecs = kBlock / kLanes;

typedef std::uint16_t HalfVec __attribute__((vector_size(2 * kLanes)));
typedef std::uint32_t BitsVec __attribute__((vector_size(4 * kLanes)));

// NaN is not below zero and is kept.
inline Vec relu(Vec v) { return v < Vec{} ? Vec{} : v; }

// Templates, so that a set without these instructions compiles.
template <class Set = Isa>
Vec dot(Vec a, Vec b, Vec sum) {
  if constexpr (kPairs) {
    return Set::dot(a, b, sum);
  } else {
    return Set::multiply_add(a, b, sum);
  }
}

// One K block's words of a pixel.
template <class Set = Isa>
void store_block(Word* to, const Vec* v) {
  if constexpr (kPairs) {
    Set::narrow(to, v[0], v[1]);
  } else {
    for (int i = 0; i < kVecs; ++i) store(to + i * kLanes, v[i]);
  }
}
// One vector of them, the first that of channel `channel`.
template <class Set = Isa>
void store_part(Word* to, std::int64_t channel, Vec v) {
  if constexpr (kPairs) {
    Set::narrow(to + channel / 2, v);
  } else {
    store(to + channel, v);
  }
}

struct Bfloat16 {
  std::uint16_t bits;
};

inline Vec load(const Bfloat16* p) {
  HalfVec half;
  __builtin_memcpy(&half, p, sizeof half);
  const BitsVec bits = __builtin_convertvector(half, BitsVec) << 16;
  Vec v;
  __builtin_memcpy(&v, &bits, sizeof v);
  return v;
}
inline void store(Bfloat16* p, Vec v) {
  BitsVec bits;
  __builtin_memcpy(&bits, &v, sizeof bits);
  const BitsVec nearest = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const HalfVec half = __builtin_convertvector(v == v ? nearest : ((bits >> 16) | 0x40), HalfVec);
  __builtin_memcpy(p, &half, sizeof half);
}

inline std::int64_t round_up(std::int64_t a, std::int64_t b) { return ceil_div(a, b) * b; }

// K blocks [first, first + count) of an activation matrix; a GEMM reads up to five such ranges, in the weights' order.
struct Range {
  std::int64_t first, count;
};
struct Ranges {
  Range range[5];
  int count = 0;
  void add(std::int64_t first, std::int64_t blocks) {
    if (blocks == 0) return;
    if (count > 0 && range[count - 1].first + range[count - 1].count == first) {
      range[count - 1].count += blocks;
    } else {
      range[count++] = {first, blocks};
    }
  }
};

// Where a micro-kernel stores element (row, column) of its panel: at row * `row` + column / kLanes * `half` + column %
// kLanes.
struct Place {
  std::int64_t row = kPanel, half = kLanes;
};

// out[r][0 .. panel) = sum over the K blocks of a[r] * b. Each row's sum runs in the same order for every R, so results
// do not depend on how rows are grouped.
template <int R>
__attribute__((noinline)) void micro(const Word* a, std::int64_t block_stride, const Ranges& ranges, const Word* b,
                                     float* out, Place place) {
  Vec acc[R][2];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) acc[r][0] = acc[r][1] = Vec{};
  for (int i = 0; i < ranges.count; ++i) {
    const Word* from = a + ranges.range[i].first * block_stride;
    const Word* const last = from + ranges.range[i].count * block_stride;
    for (; from != last; from += block_stride) {
#pragma GCC unroll 4
      for (int k = 0; k < kWords; ++k) {
        __builtin_prefetch(b + kPrefetchWords, 0, 3);
        if (kPanel > 16) __builtin_prefetch(b + kPrefetchWords + 16, 0, 3);
        const Vec b0 = load(b), b1 = load(b + kLanes);
        b += kPanel;
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) {
          const Vec value = Isa::broadcast(from + r * kWords + k);
          acc[r][0] = dot(value, b0, acc[r][0]);
          acc[r][1] = dot(value, b1, acc[r][1]);
        }
      }
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
    store(out + r * place.row, acc[r][0]);
    store(out + r * place.row + place.half, acc[r][1]);
  }
}

using Micro = void (*)(const Word*, std::int64_t, const Ranges&, const Word*, float*, Place);

template <int R>
struct MicroTable {
  static Micro get(int rows) { return rows == R ? &micro<R> : MicroTable<R - 1>::get(rows); }
};
template <>
struct MicroTable<0> {
  static Micro get(int) { return nullptr; }
};

// Calls body(first row, rows, kernel) for pieces of nearly equal height.
template <class Body>
inline void for_row_pieces(std::int64_t rows, const Micro* kernels, Body body) {
  const std::int64_t pieces = ceil_div(rows, kRows);
  for (std::int64_t i = 0; i < pieces; ++i) {
    const std::int64_t first = rows * i / pieces, last = rows * (i + 1) / pieces;
    body(first, last - first, kernels[last - first]);
  }
}

}  // namespace
}  // namespace lift_fast
