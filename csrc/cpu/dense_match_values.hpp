// What the dense matcher computes with: rows of the table, bilinear functions, and rows of a patch's pixels.
#pragma once

#include "dense_match.hpp"
#include "simd/simd.hpp"

namespace lift_fast {
namespace {

// Zero, or NaN if the value is not finite.
template <class T>
T zero_if_finite(T value) {
  return value - value;
}
// The larger of two values, NaN if either is not finite; where all are finite, without asking.
template <bool kFinite, class T>
T larger_or_nan(T a, T b) {
  const T most = larger(a, b);
  return kFinite ? most : most + (zero_if_finite(a) + zero_if_finite(b));
}
inline float lane_max(Vec v) {
  float best = v[0];
  for (int i = 1; i < kLanes; ++i) best = larger(best, v[i]);
  return best;
}
inline float lane_min(Vec v) {
  float least = v[0];
  for (int i = 1; i < kLanes; ++i) least = v[i] < least ? v[i] : least;
  return least;
}

// A value for each of the four query cells around a group.
typedef float Quad __attribute__((vector_size(16)));
inline Quad magnitude(Quad v) { return larger(v, -v); }
inline float quad_max(Quad v) { return larger(larger(v[0], v[1]), larger(v[2], v[3])); }

// A bilinear function of the weights (right, down), from its values at the four corners.
template <class T>
struct Bilinear {
  T near, right, down, both;
  Bilinear(T top_left, T top_right, T low_left, T low_right)
      : near(top_left),
        right(top_right - top_left),
        down(low_left - top_left),
        both((low_right - low_left) - (top_right - top_left)) {}
  // One lane of vectors.
  template <class Vectors>
  Bilinear(const Vectors& of, int lane)
      : near(of.near[lane]), right(of.right[lane]), down(of.down[lane]), both(of.both[lane]) {}
};

// A row of pixels of a patch, with their scales.
struct ScaledRow {
  Vec start, slope;
  const float *weight, *scale;
  ScaledRow(const DenseMatchCall& call, const Bilinear<Vec>& patch, std::int64_t row)
      : start(Isa::multiply_add(patch.down, splat(call.y.weight[row]), patch.near)),
        slope(Isa::multiply_add(patch.both, splat(call.y.weight[row]), patch.right)),
        weight(call.x.weight),
        scale(call.padded_scale + row * call.x.pixels) {}
  Vec operator[](std::int64_t column) const {
    return Isa::multiply_add(slope, splat(weight[column]), start) * splat(scale[column]);
  }
};

inline DenseMatchRow row_of(const float* row, const float* scale, std::int64_t cells) {
  Vec best = splat(-kInfinity), size{};
  IntVec index = IntVec{} - 1, at, odd{};
  for (int lane = 0; lane < kLanes; ++lane) at[lane] = lane;
  std::int64_t k = 0;
  for (; k + kLanes <= cells; k += kLanes, at += kLanes) {
    const Vec given = load(row + k), magnitude = larger(given, -given);
    // NaN is not at most the largest number.
    const IntVec finite = magnitude <= kLargest;
    odd |= ~finite;
    size = (magnitude > size) & finite ? magnitude : size;
    const Vec value = scale != nullptr ? given * load(scale + k) : given;
    const IntVec better = (value > best) & (value <= kLargest) & finite;
    best = better ? value : best;
    index = better ? at : index;
  }
  float most = -kInfinity;
  std::int32_t found = -1;
  for (int lane = 0; lane < kLanes; ++lane) {
    if (best[lane] > most) {
      most = best[lane];
      found = index[lane];
    }
  }
  float magnitude = lane_max(size);
  bool any_odd = Isa::any(odd);
  for (; k < cells; ++k) {
    const float given = row[k], own = larger(given, -given), value = scale != nullptr ? given * scale[k] : given;
    if (!(own <= kLargest)) {
      any_odd = true;
      continue;
    }
    magnitude = larger(own, magnitude);
    if (value > most && value <= kLargest) {
      most = value;
      found = static_cast<std::int32_t>(k);
    }
  }
  return {found, magnitude, !any_odd};
}

}  // namespace
}  // namespace lift_fast
