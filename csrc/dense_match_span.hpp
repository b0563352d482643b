// Bounds of the cosines in a patch of an image, the pixels between the same four cells: what the CPU and CUDA share.
#pragma once

#include <cmath>
#include <cstdint>

#if defined(__CUDACC__)
#define LIFT_FAST_ANYWHERE __host__ __device__
#else
#define LIFT_FAST_ANYWHERE
#endif
// Host compilers warn of what they do not know.
#if defined(__CUDA_ARCH__)
#define LIFT_FAST_UNROLL _Pragma("unroll")
#else
#define LIFT_FAST_UNROLL
#endif

namespace lift_fast {

// Bounds a patch's cosines by the length of the query's projection onto the span of the four corner descriptors a, b, d,
// e. For the values (a, b - a, d - a, (e - d) - (b - a)) of a bilinear function of the similarities, y = inverse * values
// has that length; `rounding` times the magnitudes of the values bounds what float32 may hide.
constexpr std::int64_t span_words = 16;
struct alignas(16) PatchSpan {
  float inverse[10];  // lower triangle, by rows
  float rounding[4];
  float unused[2];
};
static_assert(sizeof(PatchSpan) == 4 * span_words, "callers allocate these");

// Compiled for every instruction set, so each object has its own.
namespace {

// Products of neighbouring cells of a map, [5, h, w]: each cell times itself and the cells to the right, below, below to
// the right and below to the left. Beyond the border the neighbour is the cell at the border.
template <class T>
struct CellProducts {
  T *own, *right, *down, *diagonal, *back;
  LIFT_FAST_ANYWHERE CellProducts(T* gram, std::int64_t h, std::int64_t w)
      : own(gram), right(own + h * w), down(right + h * w), diagonal(down + h * w), back(diagonal + h * w) {}
};

// Products of the four cells at two rows and two columns (y before x).
LIFT_FAST_ANYWHERE inline void corner_products(const double* gram, std::int64_t h, std::int64_t w,
                                               const std::int64_t (&row)[2], const std::int64_t (&column)[2],
                                               double (&products)[4][4]) {
  const CellProducts<const double> of(gram, h, w);
  // Of corner 2 i + j with 2 k + l, i <= k.
  const auto product = [&](int i, int j, int k, int l) {
    const std::int64_t at = row[i] * w + column[j];
    const bool across = column[j] != column[l];
    if (row[i] == row[k]) return across ? of.right[row[i] * w + column[0]] : of.own[at];
    if (!across) return of.down[at];
    return j < l ? of.diagonal[at] : of.back[at];
  };
  LIFT_FAST_UNROLL
  for (int p = 0; p < 4; ++p) {
    LIFT_FAST_UNROLL
    for (int q = p; q < 4; ++q) products[p][q] = products[q][p] = product(p / 2, p % 2, q / 2, q % 2);
  }
}

// Of the largest square of a norm: what float64 may round in products of cells, and the least part of a corner that
// counts as a direction of its own.
constexpr double kGramRounding = 0x1p-40, kLeastPivot = 0x1p-36;

// The span of a patch's corners, factored in float64, from their products.
LIFT_FAST_ANYWHERE inline PatchSpan span_of(const double (&corners)[4][4], float largest_scale) {
  // Differences are nearly at right angles where the corners are nearly parallel, so float32 suffices for their values.
  constexpr double basis[4][4] = {{1, 0, 0, 0}, {-1, 1, 0, 0}, {-1, 0, 1, 0}, {1, -1, -1, 1}};
  double g[4][4], most = corners[0][0];
  LIFT_FAST_UNROLL
  for (int i = 1; i < 4; ++i) most = most < corners[i][i] ? corners[i][i] : most;
  LIFT_FAST_UNROLL
  for (int i = 0; i < 4; ++i) {
    LIFT_FAST_UNROLL
    for (int j = 0; j <= i; ++j) {
      g[i][j] = 0;
      LIFT_FAST_UNROLL
      for (int p = 0; p < 4; ++p) {
        LIFT_FAST_UNROLL
        for (int q = 0; q < 4; ++q) g[i][j] += basis[i][p] * basis[j][q] * corners[p][q];
      }
    }
    // A shorter vector has a larger bound: room for what float64 rounds.
    g[i][i] -= kGramRounding * most;
  }
  constexpr double epsilon = 0x1p-23;  // of float32
  double factor[4][4] = {}, inverse[4][4] = {}, rounding[4] = {}, stretch = 1 + 4 * epsilon;
  LIFT_FAST_UNROLL
  for (int i = 0; i < 4; ++i) {
    double square = g[i][i];
    LIFT_FAST_UNROLL
    for (int j = 0; j < i; ++j) {
      double sum = g[i][j];
      LIFT_FAST_UNROLL
      for (int k = 0; k < j; ++k) sum -= factor[i][k] * factor[j][k];
      factor[i][j] = inverse[j][j] * sum;
      square -= factor[i][j] * factor[i][j];
    }
    // What the corners before it say of this value: minus this row.
    double row_of[4] = {};
    LIFT_FAST_UNROLL
    for (int j = 0; j < i; ++j) {
      LIFT_FAST_UNROLL
      for (int k = 0; k <= j; ++k) row_of[k] -= factor[i][j] * inverse[j][k];
    }
    row_of[i] = 1;
    const bool spans = square > kLeastPivot * most;
    const double length = spans ? std::sqrt(square) : 0;
    LIFT_FAST_UNROLL
    for (int k = 0; k <= i; ++k) {
      if (spans) inverse[i][k] = row_of[k] / length;
      // A corner that adds no direction of its own adds no more than its whole value,
      rounding[k] += spans ? 6 * epsilon * std::fabs(inverse[i][k]) : largest_scale * std::fabs(row_of[k]);
    }
    // and leaving out its own part may shorten the descriptors by as much.
    if (!spans) stretch += std::sqrt((square > 0 ? square : 0) + 2 * kGramRounding * most) * largest_scale;
  }
  PatchSpan span{};
  int at = 0;
  LIFT_FAST_UNROLL
  for (int i = 0; i < 4; ++i) {
    LIFT_FAST_UNROLL
    for (int k = 0; k <= i; ++k) span.inverse[at++] = static_cast<float>(inverse[i][k] * stretch);
    span.rounding[i] = static_cast<float>(rounding[i] * stretch);
  }
  return span;
}

}  // namespace

}  // namespace lift_fast
