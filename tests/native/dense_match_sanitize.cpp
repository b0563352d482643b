#include "cpu/dense_match.hpp"
#include "cpu/map_products.hpp"
#include "sanitize.hpp"

namespace lift_fast {
namespace {

template <class T>
std::unique_ptr<T[]> exactly(const std::vector<T>& values) {
  std::unique_ptr<T[]> copy(new T[values.size()]);
  for (std::size_t i = 0; i < values.size(); ++i) copy[i] = values[i];
  return copy;
}

// The rule of bilinear interpolation along one axis.
struct Axis {
  std::vector<std::int32_t> low, high, first;
  std::vector<float> weight;
  Axis(int cells, int pixels) {
    for (int i = 0; i < pixels; ++i) {
      const double source = std::fmin(std::fmax((i + 0.5) * cells / pixels - 0.5, 0.0), cells - 1.0);
      const int cell = static_cast<int>(source);
      weight.push_back(static_cast<float>(source - cell));
      if (!low.empty() && low.back() == cell) continue;
      low.push_back(cell);
      high.push_back(cell + 1 < cells ? cell + 1 : cell);
      first.push_back(i);
    }
    first.push_back(pixels);
  }
};

void run(CpuIsa isa, int h, int w, int height, int width, int points, bool scaled) {
  const Axis y(h, height), x(w, width);
  const auto y_low = exactly(y.low), y_high = exactly(y.high), y_first = exactly(y.first);
  const auto x_low = exactly(x.low), x_high = exactly(x.high), x_first = exactly(x.first);
  const auto y_weight = exactly(y.weight), x_weight = exactly(x.weight);
  const int rows = 5, cells = h * w;
  std::unique_ptr<float[]> table(new float[rows * cells]), weights(new float[2 * points]);
  for (int i = 0; i < rows * cells; ++i) {
    table[i] = i % 97 == 11 ? NAN : i % 89 == 7 ? INFINITY : 0.01f * static_cast<float>((i * 37) % 101 - 50);
  }
  for (int i = 0; i < 2 * points; ++i) weights[i] = static_cast<float>(i % 8) / 8;
  const auto corners = exactly<std::int32_t>({0, 1, 2, 3, 4, 4, 4, 4, 1, 1, 3, 3});
  const auto start = exactly<std::int64_t>({0, points / 3, points / 3, points});
  std::unique_ptr<float[]> scale(new float[height * width]), similarity(new float[points]);
  for (int i = 0; i < height * width; ++i) scale[i] = 0.5f + static_cast<float>(i % 5);
  std::unique_ptr<std::int64_t[]> index(new std::int64_t[points]);
  DenseMatchCall call{};
  call.table = table.get();
  call.rows = rows;
  call.groups = 3;
  call.corners = corners.get();
  call.start = start.get();
  call.weights = weights.get();
  call.y = {
      h, height, static_cast<std::int64_t>(y.low.size()), y_low.get(), y_high.get(), y_first.get(), y_weight.get()};
  call.x = {
      w, width, static_cast<std::int64_t>(x.low.size()), x_low.get(), x_high.get(), x_first.get(), x_weight.get()};
  call.scale = scaled ? scale.get() : nullptr;
  call.similarity = similarity.get();
  call.index = index.get();
  call.threads = 3;
  dense_match_run(call, isa);
  for (int i = 0; i < points; ++i) {
    if (index[i] < -1 || index[i] >= static_cast<std::int64_t>(height) * width) std::abort();
  }
}

void products(CpuIsa isa, int count, int c, int cells, bool rows, bool normalize) {
  std::unique_ptr<float[]> descriptors(new float[count * c]), map(new float[c * cells]),
      table(new float[count * cells]);
  for (int i = 0; i < count * c; ++i) descriptors[i] = 0.1f * static_cast<float>(i % 19 - 9);
  for (int i = 0; i < c * cells; ++i) {
    const int kind = i % 301;
    map[i] = kind == 11 ? NAN : kind == 7 ? INFINITY : kind == 100 ? 3e38f : 0.01f * static_cast<float>(i % 37 - 18);
  }
  MapProductsCall call{};
  call.descriptors = descriptors.get();
  call.map = map.get();
  call.channel_stride = rows ? 1 : cells;
  call.cell_stride = rows ? c : 1;
  call.count = count;
  call.c = c;
  call.cells = cells;
  call.normalize = normalize;
  call.table = table.get();
  call.threads = 3;
  map_products_run(call, isa);
}

void sample(int count, int c, int h, int w, int height, int width, bool rows) {
  std::unique_ptr<float[]> map(new float[c * h * w]), descriptors(new float[count * c]);
  for (int i = 0; i < c * h * w; ++i) map[i] = i % 301 == 11 ? NAN : 0.01f * static_cast<float>(i % 37 - 18);
  std::unique_ptr<std::int64_t[]> points(new std::int64_t[2 * count]);
  for (int i = 0; i < count; ++i) {
    points[2 * i] = (i * 7) % width;
    points[2 * i + 1] = i == 0 ? height - 1 : (i * 5) % height;
  }
  MapSampleCall call{};
  call.points = points.get();
  call.map = map.get();
  call.channel_stride = rows ? 1 : h * w;
  call.cell_stride = rows ? c : 1;
  call.count = count;
  call.c = c;
  call.grid_h = h;
  call.grid_w = w;
  call.height = height;
  call.width = width;
  call.normalize_cells = rows;
  call.normalize_result = count % 2 == 0;
  call.descriptors = descriptors.get();
  call.threads = 3;
  map_sample_run(call);
}

}  // namespace

void sanitize(CpuIsa isa) {
  for (bool rows : {false, true}) {
    sample(1, 5, 1, 1, 3, 4, rows);
    sample(40, 7, 3, 5, 20, 31, rows);
    sample(9, 1, 6, 2, 3, 1, rows);
  }
  for (int count : {1, 6, 11}) {
    for (int c : {1, 3, 16, 37, 50}) {
      for (int cells : {1, 3, 64, 131, 260}) {
        for (bool normalize : {false, true}) {
          products(isa, count, c, cells, false, normalize);
          products(isa, count, c, cells, true, normalize);
        }
      }
    }
  }
  const int grids[][2] = {{1, 1}, {1, 9}, {7, 1}, {3, 5}, {17, 16}, {8, 33}};
  const int sizes[][2] = {{1, 1}, {3, 50}, {40, 2}, {61, 67}};
  for (const auto& grid : grids) {
    for (const auto& size : sizes) {
      for (int points : {0, 1, 7, 64, 201}) {
        for (bool scaled : {false, true}) run(isa, grid[0], grid[1], size[0], size[1], points, scaled);
      }
    }
  }
}

}  // namespace lift_fast
