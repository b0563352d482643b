// What a search and its mutual check do with a patch: its corners, the bilinear function between them, its pixels.
#pragma once

#include "dense_match_parameters.cuh"

namespace lift_fast {

// Larger than every pixel's number.
constexpr int kNoPixel = 0x7fffffff;
constexpr int kNoSeed = -0x7fffffff - 1;
// Rounding may lift a value above its corners: three interpolations, a scale, and the bound's own.
constexpr float kMatchSlack = 16 * 1.1920929e-7f;
constexpr float kMatchLargest = 3.4028235e38f;

__device__ __forceinline__ bool runs(const MatchWhen& when) {
  return when.flag == nullptr || (*when.flag != 0) == when.wanted;
}
__device__ __forceinline__ float magnitude(float value) { return value < 0.0f ? -value : value; }
__device__ __forceinline__ float larger(float a, float b) { return a > b ? a : b; }
// Zero, or NaN if the value is not finite.
__device__ __forceinline__ float zero_if_finite(float value) { return value - value; }
// An integer that is ordered as the number is, with one zero; and the number of such an integer.
__device__ __forceinline__ int ordered(int bits) { return bits ^ ((bits >> 31) & 0x7fffffff); }
__device__ __forceinline__ int rank_of(float value) { return ordered(as_int(value + 0.0f)); }
__device__ __forceinline__ float ranked(int rank) { return as_float(ordered(rank)); }

// A bilinear function of the shares (right, down), from its values at the four corners. Exact where these are equal,
// and bitwise the same wherever it is computed.
struct Bilinear {
  float near, right, down, both;
  __device__ __forceinline__ Bilinear(float top_left, float top_right, float low_left, float low_right)
      : near(top_left),
        right(top_right - top_left),
        down(low_left - top_left),
        both((low_right - low_left) - (top_right - top_left)) {}
  __device__ __forceinline__ float operator()(float share_x, float share_y) const {
    return multiply_add(multiply_add(both, share_y, right), share_x, multiply_add(down, share_y, near));
  }
};

// The better of two matches, the lower pixel among equals; an infinite value takes no part.
__device__ __forceinline__ void improve(float value, int pixel, float& best, int& index) {
  const bool better = (value > best || (value == best && pixel < index)) && magnitude(value) <= kMatchLargest;
  best = better ? value : best;
  index = better ? pixel : index;
}

// A patch's four cells.
struct Corners {
  int top_left, top_right, low_left, low_right;
  __device__ __forceinline__ Corners(const AxisParams& y, const AxisParams& x, int strip_y, int strip_x) {
    const int top = y.low[strip_y] * x.cells, low = y.high[strip_y] * x.cells;
    const int left = x.low[strip_x], right = x.high[strip_x];
    top_left = top + left;
    top_right = top + right;
    low_left = low + left;
    low_right = low + right;
  }
};

// The bound times the patch's scales, with room for rounding; `slack` without scales.
template <bool kScale>
__device__ __forceinline__ float scaled_bound(const ImageParams& p, int patch, float bound, float slack) {
  if constexpr (!kScale) return bound + slack;
  const float high = p.scale_high[patch];
  return multiply_add(slack, high, bound * (bound > 0.0f ? high : p.scale_low[patch]));
}

// Below this the squares of values would leave the range of float32.
constexpr float kLeastLength = 1e-15f;

// Whether a cosine of the patch can exceed `bar`, by the query's projection onto the span of its corners (PatchSpan).
// `of` are the values that its pixels are computed from; `bar` leaves room for their rounding.
__device__ __forceinline__ bool reaches(const ImageParams& p, int patch, const Bilinear& of, float bar) {
  const float4* const span = reinterpret_cast<const float4*>(p.spans) + std::int64_t{4} * patch;
  const float4 a = span[0], b = span[1], c = span[2], d = span[3];
  const float first = a.x * of.near;
  const float second = multiply_add(a.z, of.right, a.y * of.near);
  const float third = multiply_add(b.y, of.down, multiply_add(b.x, of.right, a.w * of.near));
  const float fourth = multiply_add(c.y, of.both,
                                    multiply_add(c.x, of.down, multiply_add(b.w, of.right, b.z * of.near)));
  const float square = multiply_add(fourth, fourth,
                                    multiply_add(third, third, multiply_add(second, second, first * first)));
  const float lost = multiply_add(
      d.y, magnitude(of.both),
      multiply_add(d.x, magnitude(of.down), multiply_add(c.w, magnitude(of.right), c.z * magnitude(of.near))));
  const float least = bar - lost;
  // Written so that NaN reaches.
  return !(least > kLeastLength && square * (1 + kMatchSlack) < least * least);
}

// Calls visit(value, pixel) for the pixels of a patch that may be its largest, until that returns false.
template <bool kScale, class Visit>
__device__ __forceinline__ void each_pixel(const ImageParams& p, int strip_y, int strip_x, const Bilinear& patch,
                                           Visit visit) {
  const int first_y = p.y.first[strip_y], end_y = p.y.first[strip_y + 1];
  const int first_x = p.x.first[strip_x], end_x = p.x.first[strip_x + 1];
  if constexpr (kScale) {
    for (int y = first_y; y < end_y; ++y) {
      const float share_y = p.y.weight[y];
      for (int x = first_x; x < end_x; ++x) {
        const int pixel = y * p.x.pixels + x;
        if (!visit(patch(p.x.weight[x], share_y) * p.scale[pixel], pixel)) return;
      }
    }
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int y = i < 2 ? first_y : end_y - 1, x = i % 2 == 0 ? first_x : end_x - 1;
      if (!visit(patch(p.x.weight[x], p.y.weight[y]), y * p.x.pixels + x)) return;
    }
  }
}

}  // namespace lift_fast
