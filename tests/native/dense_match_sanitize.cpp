#include "cpu/dense_match_image.hpp"
#include "cpu/descriptor_norms.hpp"
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

DenseMatchAxis pointers(const Axis& axis, int cells, int pixels, std::vector<std::unique_ptr<std::int32_t[]>>& kept,
                        std::vector<std::unique_ptr<float[]>>& weights) {
  const std::int32_t* parts[3];
  int i = 0;
  for (const auto* part : {&axis.low, &axis.high, &axis.first}) {
    kept.push_back(exactly(*part));
    parts[i++] = kept.back().get();
  }
  weights.push_back(exactly(axis.weight));
  return {
      cells, pixels, static_cast<std::int64_t>(axis.low.size()), parts[0], parts[1], parts[2], weights.back().get()};
}

// The query map is half as high, and its table holds all rows of it or all but the last.
void run(CpuIsa isa, int h, int w, int height, int width, int points, bool scaled, bool floored) {
  std::vector<std::unique_ptr<std::int32_t[]>> kept;
  std::vector<std::unique_ptr<float[]>> weights;
  const int query_h = (h + 1) / 2, cells = h * w, query_cells = query_h * w;
  DenseMatchImageCall call{};
  call.y = pointers(Axis(h, height), h, height, kept, weights);
  call.x = pointers(Axis(w, width), w, width, kept, weights);
  call.query_y = pointers(Axis(query_h, width), query_h, width, kept, weights);
  call.query_x = pointers(Axis(w, height), w, height, kept, weights);
  const int count = points < 0 ? width * height : points;
  std::unique_ptr<float[]> table(new float[query_cells * cells]);
  for (int i = 0; i < query_cells * cells; ++i) {
    table[i] = i % 97 == 11 ? NAN : i % 89 == 7 ? INFINITY : 0.01f * static_cast<float>((i * 37) % 101 - 50);
  }
  std::unique_ptr<std::int64_t[]> at(new std::int64_t[2 * count]), index(new std::int64_t[count]);
  for (int i = 0; i < count; ++i) {
    at[2 * i] = (i * 7) % height;
    at[2 * i + 1] = (i * 5) % width;
  }
  std::unique_ptr<float[]> map(new float[5 * cells]), scale(new float[height * width]),
      query_scale(new float[height * width]), similarity(new float[count]), floor(new float[count]);
  std::unique_ptr<double[]> gram(new double[5 * cells]), query_gram(new double[5 * query_cells]);
  for (int i = 0; i < 5 * cells; ++i) map[i] = i % 301 == 11 ? NAN : 0.1f * static_cast<float>(i % 37 - 18);
  for (int i = 0; i < count; ++i) floor[i] = 0.1f * static_cast<float>(i % 9);
  for (const bool query : {false, true}) {
    DescriptorNormsCall norms{};
    norms.map = map.get();
    norms.channel_stride = query ? 1 : cells;
    norms.cell_stride = query ? 5 : 1;
    norms.c = 5;
    norms.y = query ? call.query_y : call.y;
    norms.x = query ? call.query_x : call.x;
    norms.least = 1e-12;
    norms.gram = query ? query_gram.get() : gram.get();
    norms.inverse = query ? query_scale.get() : scale.get();
    norms.threads = 3;
    descriptor_norms_run(norms, isa);
  }
  call.table = table.get();
  call.top = 0;
  call.end = query_h > 1 && points > 0 ? query_h - 1 : query_h;
  call.rows = query_h;
  call.points = points < 0 ? nullptr : at.get();
  call.count = count;
  call.floor = floored ? floor.get() : nullptr;
  if (scaled) {
    call.scale = scale.get();
    call.gram = gram.get();
    call.query_inverse = query_scale.get();
    call.query_gram = query_gram.get();
  }
  for (int i = 0; i < count; ++i) index[i] = -1;
  call.similarity = similarity.get();
  call.index = index.get();
  call.threads = 3;
  dense_match_image_run(call, isa);
  for (int i = 0; i < count; ++i) {
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
      for (int points : {-1, 0, 1, 7, 201}) {
        for (bool scaled : {false, true}) {
          for (bool floored : {false, true}) run(isa, grid[0], grid[1], size[0], size[1], points, scaled, floored);
        }
      }
    }
  }
}

}  // namespace lift_fast
