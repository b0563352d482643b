#include "dense_match.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "dense_match_axis.hpp"
#include "dispatch.hpp"
#include "memory.hpp"

namespace lift_fast {
namespace {

void require(bool holds, const std::string& what) {
  if (!holds) throw std::invalid_argument("dense_match: " + what);
}

}  // namespace

void check_axis(const DenseMatchAxis& axis, const std::string& name) {
  constexpr std::int64_t limit = std::numeric_limits<std::int32_t>::max();
  require(axis.cells > 0 && axis.pixels > 0 && axis.strips > 0, name + " needs cells, pixels and strips");
  require(axis.cells <= limit && axis.pixels <= limit && axis.strips <= axis.pixels, name + " is too large");
  require(axis.low != nullptr && axis.high != nullptr && axis.first != nullptr && axis.weight != nullptr,
          name + " must not be null");
  require(axis.first[0] == 0 && axis.first[axis.strips] == axis.pixels, name + " strips must cover the pixels");
  for (std::int64_t s = 0; s < axis.strips; ++s) {
    require(axis.first[s] < axis.first[s + 1], name + " strips must ascend");
    require(axis.low[s] >= 0 && axis.low[s] < axis.cells && axis.high[s] >= 0 && axis.high[s] < axis.cells,
            name + " names a cell that does not exist");
  }
}

namespace {

DenseMatchScratch layout(const DenseMatchCall& call) {
  const std::int64_t patches = call.y.strips * call.strips_padded;
  DenseMatchScratch at{};
  at.rows = (call.y.cells * call.x.cells + 16 + 15) / 16 * 16;
  at.bounds = at.rows + call.y.cells * call.strips_padded;
  at.weights = at.bounds + patches;
  at.best = at.weights + 7 * dense_match_block;
  at.index = at.best + dense_match_block;
  at.end = at.index + dense_match_block;
  return at;
}

}  // namespace

void dense_match_run(DenseMatchCall call, CpuIsa isa) {
  require(call.threads >= 1, "threads must be at least 1");
  require(call.groups >= 0 && call.rows >= 0, "sizes must not be negative");
  if (call.groups == 0) return;
  check_axis(call.y, "y");
  check_axis(call.x, "x");
  // Cells, patches and pixels are numbered in 32 bits inside the kernel.
  constexpr std::int64_t limit = std::numeric_limits<std::int32_t>::max();
  require(call.y.pixels <= limit / call.x.pixels && call.y.cells <= limit / call.x.cells &&
              call.y.strips <= limit / (call.x.strips + 16),
          "the key image must have fewer than 2^31 pixels");
  require(call.table != nullptr && call.corners != nullptr && call.start != nullptr && call.weights != nullptr &&
              call.similarity != nullptr && call.index != nullptr,
          "table, corners, start, weights, similarity and index must not be null");
  require((call.scale != nullptr) == (call.gram != nullptr), "scale and gram go together");
  require(call.start[0] == 0, "groups must start with the first point");
  for (std::int64_t g = 0; g < call.groups; ++g) {
    require(call.start[g] <= call.start[g + 1], "groups must ascend");
    for (int i = 0; i < 4; ++i) {
      require(call.corners[4 * g + i] >= 0 && call.corners[4 * g + i] < call.rows,
              "a group names a row that does not exist");
    }
  }

  // A key cell that is not finite is not finite in any row.
  const std::int64_t cells = call.y.cells * call.x.cells;
  std::optional<JoinedAxis> joined_y, joined_x;
  if (std::all_of(call.table, call.table + cells, [](float value) { return std::isfinite(value); })) {
    joined_y.emplace(call.y);
    joined_x.emplace(call.x);
  }

  // The widest vectors of all instruction sets.
  constexpr std::int64_t lanes = 16;
  const DenseMatchAxis &x = call.x, &y = call.y;
  call.strips_padded = (x.strips + lanes - 1) / lanes * lanes;
  std::int64_t widest = 0;
  for (std::int64_t s = 0; s < x.strips; ++s) widest = std::max<std::int64_t>(widest, x.first[s + 1] - x.first[s]);
  call.width_padded = (widest + lanes - 1) / lanes * lanes;
  const Memory<float> weights = allocate<float>(x.strips * call.width_padded);
  for (std::int64_t s = 0; s < x.strips; ++s) {
    for (std::int64_t i = 0; i < call.width_padded; ++i) {
      const std::int64_t pixel = x.first[s] + i;
      weights.get()[s * call.width_padded + i] = pixel < x.first[s + 1] ? x.weight[pixel] : std::nanf("");
    }
  }
  call.strip_weights = weights.get();

  call.scale_largest = 1.0f;
  Memory<float> scale, high, low, cell_scale, spans, window_spans;
  if (call.scale != nullptr) {
    const std::int64_t pixels = y.pixels * x.pixels, padded = call.strips_padded;
    // A strip is read in whole vectors; its unused padding may lie beyond the last pixel.
    scale = allocate<float>(pixels + call.width_padded);
    high = allocate<float>(y.strips * padded);
    low = allocate<float>(y.strips * padded);
    spans = allocate<float>(y.strips * padded * span_words);
    window_spans = allocate<float>(14 * y.strips * padded);
    cell_scale = allocate<float>(cells);
    std::memset(scale.get() + pixels, 0, static_cast<std::size_t>(call.width_padded) * 4);
    const CellProducts<const double> gram(call.gram, y.cells, x.cells);
    for (std::int64_t i = 0; i < cells; ++i) cell_scale[i] = static_cast<float>(1 / std::sqrt(gram.own[i]));
    const auto prepare = [&](std::int64_t sy) {
      float *most = high.get() + sy * padded, *least = low.get() + sy * padded;
      for (std::int64_t sx = 0; sx < padded; ++sx) {
        most[sx] = 0.0f;
        least[sx] = sx < x.strips ? std::numeric_limits<float>::infinity() : 0.0f;
      }
      for (std::int64_t row = y.first[sy]; row < y.first[sy + 1]; ++row) {
        const float* from = call.scale + row * x.pixels;
        std::memcpy(scale.get() + row * x.pixels, from, static_cast<std::size_t>(x.pixels) * 4);
        for (std::int64_t sx = 0; sx < x.strips; ++sx) {
          // Not NaN, because NaN marks pixels that take no part.
          float row_high = 0.0f, row_low = least[sx];
          for (std::int64_t column = x.first[sx]; column < x.first[sx + 1]; ++column) {
            const float value = from[column];
            if (value > row_high) row_high = value;
            if (value < row_low) row_low = value;
          }
          most[sx] = std::max(most[sx], row_high);
          least[sx] = row_low;
        }
      }
      for (std::int64_t sx = 0; sx < x.strips; ++sx) {
        double corners[4][4];
        corner_products(call.gram, y.cells, x.cells, {y.low[sy], y.high[sy]}, {x.low[sx], x.high[sx]}, corners);
        const PatchSpan span = span_of(corners, most[sx]);
        const std::int64_t patch = sy * padded + sx;
        std::memcpy(spans.get() + patch * span_words, &span, sizeof span);
        for (int i = 0; i < 14; ++i) window_spans[i * y.strips * padded + patch] = spans[patch * span_words + i];
      }
    };
#pragma omp parallel for num_threads(call.threads) schedule(dynamic, 1)
    for (std::int64_t sy = 0; sy < y.strips; ++sy) prepare(sy);
    call.scale_largest = *std::max_element(high.get(), high.get() + y.strips * padded);
    call.padded_scale = scale.get();
    call.scale_high = high.get();
    call.scale_low = low.get();
    call.cell_scale = cell_scale.get();
    call.spans = spans.get();
    call.window_spans = window_spans.get();
  }

  std::vector<std::int32_t> y_strip, x_strip;
  std::vector<DenseMatchRow> row(static_cast<std::size_t>(call.rows));
  for (auto [strip, axis] : {std::pair{&y_strip, &y}, std::pair{&x_strip, &x}}) {
    strip->assign(static_cast<std::size_t>(axis->cells), -1);
    for (std::int64_t s = 0; s < axis->strips; ++s) (*strip)[axis->high[s]] = static_cast<std::int32_t>(s);
    for (std::int64_t s = 0; s < axis->strips; ++s) (*strip)[axis->low[s]] = static_cast<std::int32_t>(s);
  }
  call.y_strip = y_strip.data();
  call.x_strip = x_strip.data();
  call.row = row.data();

  if (call.groups < call.threads) call.threads = static_cast<int>(call.groups);
  call.layout = layout(call);
  const Memory<float> scratch = allocate<float>(call.layout.end * call.threads);
  call.scratch = scratch.get();
  Kernels<DenseMatchKernel>::of(isa).run(call);
}

}  // namespace lift_fast
