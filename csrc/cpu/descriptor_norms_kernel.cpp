#include "descriptor_norms.hpp"
#include "simd/simd.hpp"
#include "threads.hpp"

namespace lift_fast {
namespace {

// Partial sums, which the compiler keeps in vectors.
constexpr int kSums = 8;

inline double product(const double* a, const double* b, std::int64_t c) {
  double sums[kSums] = {};
  std::int64_t k = 0;
  for (; k + kSums <= c; k += kSums) {
    for (int i = 0; i < kSums; ++i) sums[i] += a[k + i] * b[k + i];
  }
  for (; k < c; ++k) sums[0] += a[k] * b[k];
  return ((sums[0] + sums[1]) + (sums[2] + sums[3])) + ((sums[4] + sums[5]) + (sums[6] + sums[7]));
}

// A row of cells in float64, channels side by side.
inline void widen(const DescriptorNormsCall& call, std::int64_t row, double* to) {
  const std::int64_t width = call.x.cells;
  const float* from = call.map + row * width * call.cell_stride;
  if (call.channel_stride == 1) {
    for (std::int64_t i = 0; i < width; ++i) {
      for (std::int64_t k = 0; k < call.c; ++k) to[i * call.c + k] = from[i * call.cell_stride + k];
    }
    return;
  }
  for (std::int64_t k = 0; k < call.c; ++k) {
    for (std::int64_t i = 0; i < width; ++i) to[i * call.c + k] = from[i * call.cell_stride + k * call.channel_stride];
  }
}

// Squared norms between two cells, from their squares and twice their product; at weight 0 the near one alone.
inline double between(double weight, double near, double product, double far) {
  const double rest = 1.0 - weight;
  const double square = rest * rest * near + rest * weight * product + weight * weight * far;
  return weight == 0.0 ? near : square;
}

inline void run_descriptor_norms(const DescriptorNormsCall& call, const DescriptorNormsWork& work) {
  const DenseMatchAxis &y = call.y, &x = call.x;
  const CellProducts gram(call.gram, y.cells, x.cells);
#pragma omp parallel num_threads(call.threads)
  {
    double* near = work.rows + 2 * x.cells * call.c * thread_index();
    double* far = near + x.cells * call.c;
    std::int64_t held = -1;
#pragma omp for schedule(static)
    for (std::int64_t row = 0; row < y.cells; ++row) {
      const std::int64_t below = row + 1 < y.cells ? row + 1 : row;
      // The last row's far row is this one's near row.
      if (held == row) {
        double* const other = near;
        near = far;
        far = other;
      } else {
        widen(call, row, near);
      }
      if (below != row) widen(call, below, far);
      held = below;
      const double* low = below != row ? far : near;
      for (std::int64_t i = 0; i < x.cells; ++i) {
        const std::int64_t next = i + 1 < x.cells ? i + 1 : i, last = i > 0 ? i - 1 : i, at = row * x.cells + i;
        const double* cell = near + i * call.c;
        gram.own[at] = product(cell, cell, call.c);
        gram.right[at] = product(cell, near + next * call.c, call.c);
        gram.down[at] = product(cell, low + i * call.c, call.c);
        gram.diagonal[at] = product(cell, low + next * call.c, call.c);
        gram.back[at] = product(cell, low + last * call.c, call.c);
      }
    }
    double* top = work.sums + 3 * x.pixels * thread_index();
    double *mixed = top + x.pixels, *bottom = mixed + x.pixels;
#pragma omp for schedule(dynamic, 1)
    for (std::int64_t s = 0; s < y.strips; ++s) {
      const std::int64_t high_row = y.low[s] * x.cells, low_row = y.high[s] * x.cells;
      for (std::int64_t sx = 0; sx < x.strips; ++sx) {
        const std::int64_t left = x.low[sx], right = x.high[sx];
        // Beyond the border the neighbour is the cell itself; so it is within a strip of a single cell.
        const bool across = left != right;
        const auto row_products = [&](std::int64_t row) {
          return across ? 2 * gram.right[row + left] : 2 * gram.own[row + left];
        };
        const double top_mixed = row_products(high_row), bottom_mixed = row_products(low_row);
        const double straight = gram.down[high_row + left], other = gram.down[high_row + right];
        const double crossed = across ? gram.diagonal[high_row + left] + gram.back[high_row + right] : 2 * straight;
        for (std::int64_t i = x.first[sx]; i < x.first[sx + 1]; ++i) {
          const double weight = x.weight[i];
          top[i] = between(weight, gram.own[high_row + left], top_mixed, gram.own[high_row + right]);
          mixed[i] = between(weight, straight, crossed, other);
          bottom[i] = between(weight, gram.own[low_row + left], bottom_mixed, gram.own[low_row + right]);
        }
      }
      for (std::int64_t row = y.first[s]; row < y.first[s + 1]; ++row) {
        const double weight = y.weight[row], rest = 1.0 - weight, least = call.least;
        const double shares[3] = {rest * rest, 2 * rest * weight, weight * weight};
        float* to = call.inverse + row * x.pixels;
        for (std::int64_t i = 0; i < x.pixels; ++i) {
          // At weight 0 the far cells do not count, whatever they hold.
          const double square = weight == 0.0 ? top[i]
                                              : shares[0] * top[i] + shares[1] * mixed[i] + shares[2] * bottom[i];
          to[i] = static_cast<float>(1.0 / (square < least * least ? least : __builtin_sqrt(square)));
        }
      }
    }
  }
}

}  // namespace

template <>
const DescriptorNormsKernel Compiled<DescriptorNormsKernel, kIsa>::kernel = {run_descriptor_norms};

}  // namespace lift_fast
