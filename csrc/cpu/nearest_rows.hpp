// The matcher's work on rows: norms, similarities of two rows, and rows packed for the search.
#pragma once

#include "nearest.hpp"
#include "simd/simd.hpp"

namespace lift_fast {
namespace {

constexpr bool kIntegers = Isa::numbers == Numbers::int16;
constexpr int kChannels = Isa::numbers == Numbers::float32 ? 1 : 2;  // of a word

// NaN for a row that takes no part.
inline double row_norm(const float* row, std::int64_t c) {
  double sums[8] = {};
  std::int64_t i = 0;
  for (; i + 8 <= c; i += 8) {
    for (int j = 0; j < 8; ++j) sums[j] += static_cast<double>(row[i + j]) * row[i + j];
  }
  for (; i < c; ++i) sums[0] += static_cast<double>(row[i]) * row[i];
  const double sum = ((sums[0] + sums[1]) + (sums[2] + sums[3])) + ((sums[4] + sums[5]) + (sums[6] + sums[7]));
  // Squares of finite floats never overflow a double.
  return sum < __builtin_inf() ? __builtin_sqrt(sum) : __builtin_nan("");
}

// The factor of a row's similarities.
inline double unit_factor(double norm, bool normalize) { return normalize ? 1.0 / (norm > 1e-12 ? norm : 1e-12) : 1.0; }

// Norms of rows that can be multiplied in float32 without overflow or underflow.
inline bool moderate(double norm) { return norm >= 1e-18 && norm <= 1e18; }

// The similarity of two rows of the call, float32. Infinite if it exceeds the range of float32.
// Not inlined: every caller must run the same instructions, or ties would depend on the caller.
__attribute__((noinline)) float rescored_similarity(const NearestCall& call, const float* query, double query_norm,
                                                    const float* key, double key_norm) {
  const double query_factor = unit_factor(query_norm, call.normalize);
  const double key_factor = unit_factor(key_norm, call.normalize);
  const std::int64_t c = call.c;
  if (!moderate(query_norm) || !moderate(key_norm)) {
    double sum = 0;
    for (std::int64_t i = 0; i < c; ++i) sum += static_cast<double>(query[i]) * key[i];
    return static_cast<float>(sum * query_factor * key_factor);
  }
  const float scale = static_cast<float>(query_factor);
  Vec sums[4] = {};
  std::int64_t i = 0;
  for (; i + 4 * kLanes <= c; i += 4 * kLanes) {
    for (int j = 0; j < 4; ++j) {
      const std::int64_t at = i + j * kLanes;
      sums[j] = Isa::multiply_add(load(query + at) * splat(scale), load(key + at), sums[j]);
    }
  }
  for (; i + kLanes <= c; i += kLanes) {
    sums[0] = Isa::multiply_add(load(query + i) * splat(scale), load(key + i), sums[0]);
  }
  const Vec all = (sums[0] + sums[1]) + (sums[2] + sums[3]);
  float sum = 0;
  for (; i < c; ++i) sum += query[i] * scale * key[i];
  for (int lane = 0; lane < kLanes; ++lane) sum += all[lane];
  return sum * static_cast<float>(key_factor);
}

// To the nearest bfloat16, ties to even; finite values only.
inline std::uint32_t to_bfloat16(float value) {
  const std::uint32_t bits = as_bits(value);
  return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

struct PackedRow {
  double length;  // of the row that the search multiplies, before rounding
  double moved;   // how far rounding moved it
  double along;   // its product with the other side's centre, before subtracting the row's own
  float step;     // the value of one unit of a packed number
};

// Integer rows of this length: none exceeds 16 bits, and by Cauchy and Schwarz no sum of products exceeds 32.
constexpr float kIntegerLength = 32000;

// Packs one row, times `factor` minus its side's centre, into column `r` of a panel [words][width].
inline PackedRow pack_row(const float* row, std::int64_t c, double factor, const float* centre, const float* other,
                          int width, int r, float* panel) {
  const float scale = static_cast<float>(factor);
  // As a float the reciprocal of a norm above 1e38 would be subnormal, that of one below 1e-38 infinite.
  const bool plain = moderate(factor);
  const auto value_of = [&](std::int64_t i) { return plain ? row[i] * scale : static_cast<float>(row[i] * factor); };
  double length[2] = {}, moved[2] = {}, along[2] = {};
  const auto take = [&](std::int64_t i) {
    const float value = value_of(i), left = value - centre[i];
    along[i & 1] += static_cast<double>(value) * other[i];
    length[i & 1] += left * left;
    return left;
  };
  if (kIntegers) {
    for (std::int64_t i = 0; i < c; ++i) take(i);
    const double whole = __builtin_sqrt(length[0] + length[1]);
    // A row that nearly equals its centre is left out of the products; squares below 1e-38 would be lost.
    const float step = whole > 1e-15 ? static_cast<float>(whole) / kIntegerLength : 0.0f;
    const float numbers = step > 0 ? 1.0f / step : 0.0f;
    const auto round = [&](std::int64_t i) {
      const float left = value_of(i) - centre[i], number = __builtin_rintf(left * numbers);
      const double by = left - static_cast<double>(number) * step;
      moved[i & 1] += by * by;
      return static_cast<std::uint32_t>(static_cast<std::int32_t>(number)) & 0xffff;
    };
    for (std::int64_t i = 0; i < c; i += 2) {
      const std::uint32_t low = round(i), high = i + 1 < c ? round(i + 1) : 0;
      panel[i / 2 * width + r] = as_float(low | high << 16);
    }
    return {whole, __builtin_sqrt(moved[0] + moved[1]), along[0] + along[1], step};
  }
  if (kChannels == 1) {
    for (std::int64_t i = 0; i < c; ++i) panel[i * width + r] = take(i);
  } else {
    for (std::int64_t i = 0; i < c; i += 2) {
      const float low = take(i), high = i + 1 < c ? take(i + 1) : 0.0f;
      const std::uint32_t a = to_bfloat16(low), b = to_bfloat16(high);
      panel[i / 2 * width + r] = as_float(a | b << 16);
      const float low_moved = low - as_float(a << 16), high_moved = high - as_float(b << 16);
      moved[0] += low_moved * low_moved;
      moved[1] += high_moved * high_moved;
    }
  }
  return {__builtin_sqrt(length[0] + length[1]), __builtin_sqrt(moved[0] + moved[1]), along[0] + along[1], 1.0f};
}

inline void clear_row(std::int64_t words, int width, int r, float* panel) {
  for (std::int64_t w = 0; w < words; ++w) panel[w * width + r] = 0;
}

// The search divides rows by their norm or a power of two, so that norms are at most one.
inline double power_of_two(double norm) {
  if (!(norm > 0)) return 1.0;
  int exponent;
  __builtin_frexp(norm, &exponent);
  return __builtin_ldexp(1.0, exponent);
}

// The mean of some hundred rows, scaled for the search: by their norm, by `unit`, or by their own power of two.
inline void centre_of(const NearestCall& call, const float* rows, const double* norms, std::int64_t count, double unit,
                      float* centre) {
  const std::int64_t step = 1 + count / 512;
  std::int64_t taken = 0;
  for (std::int64_t i = 0; i < call.c; ++i) centre[i] = 0;
  for (std::int64_t row = 0; row < count; row += step) {
    if (norms[row] != norms[row]) continue;
    const double factor = call.normalize ? unit_factor(norms[row], true)
                                         : 1.0 / (unit > 0 ? unit : power_of_two(norms[row]));
    for (std::int64_t i = 0; i < call.c; ++i) centre[i] += static_cast<float>(rows[row * call.c + i] * factor);
    ++taken;
  }
  for (std::int64_t i = 0; i < call.c && taken > 0; ++i) centre[i] /= static_cast<float>(taken);
}

}  // namespace
}  // namespace lift_fast
