#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>
#include <utility>

#include "cpu/dense_match_image.hpp"
#include "cpu/dense_match_points.hpp"
#include "cpu/descriptor_norms.hpp"
#include "cpu/map_products.hpp"
#include "interruptible.hpp"
#include "pointer.hpp"

namespace py = pybind11;

namespace lift_fast {
namespace {

// (cells, pixels, strips, low, high, first, weight)
DenseMatchAxis axis(const py::tuple& t) {
  if (t.size() != 7) throw py::value_error("dense_match: an axis is (cells, pixels, strips, low, high, first, weight)");
  return {t[0].cast<std::int64_t>(),         t[1].cast<std::int64_t>(),         t[2].cast<std::int64_t>(),
          pointer<const std::int32_t>(t[3]), pointer<const std::int32_t>(t[4]), pointer<const std::int32_t>(t[5]),
          pointer<const float>(t[6])};
}

void run(const py::handle& table, std::int64_t rows, std::int64_t top, std::int64_t end, const py::tuple& query_y,
         const py::tuple& query_x, const py::handle& points, std::int64_t count, const py::handle& floor,
         const py::tuple& y, const py::tuple& x, const py::handle& scale, const py::handle& gram,
         const py::handle& query_inverse, const py::handle& query_gram, const py::handle& similarity,
         const py::handle& index, int threads, const std::string& isa) {
  DenseMatchImageCall call{};
  call.table = pointer<const float>(table);
  call.rows = rows;
  call.top = top;
  call.end = end;
  call.query_y = axis(query_y);
  call.query_x = axis(query_x);
  call.points = pointer<const std::int64_t>(points);
  call.count = count;
  call.floor = pointer<const float>(floor);
  call.y = axis(y);
  call.x = axis(x);
  call.scale = pointer<const float>(scale);
  call.gram = pointer<const double>(gram);
  call.query_inverse = pointer<const float>(query_inverse);
  call.query_gram = pointer<const double>(query_gram);
  call.similarity = pointer<float>(similarity);
  call.index = pointer<std::int64_t>(index);
  call.threads = threads;
  const CpuIsa target = cpu_isa(isa);
  run_interruptibly(dense_match_image_run, call, target);
}

void norms(const py::handle& map, std::int64_t channel_stride, std::int64_t cell_stride, std::int64_t c,
           const py::tuple& y, const py::tuple& x, double least, const py::handle& gram, const py::handle& inverse,
           int threads, const std::string& isa) {
  DescriptorNormsCall call{};
  call.map = pointer<const float>(map);
  call.channel_stride = channel_stride;
  call.cell_stride = cell_stride;
  call.c = c;
  call.y = axis(y);
  call.x = axis(x);
  call.least = least;
  call.gram = pointer<double>(gram);
  call.inverse = pointer<float>(inverse);
  call.threads = threads;
  const CpuIsa target = cpu_isa(isa);
  py::gil_scoped_release release;
  descriptor_norms_run(call, target);
}

// (address, channel stride, cell stride, (h, w), whether to normalise cells)
DenseMatchMap map_of(const py::tuple& t) {
  if (t.size() != 5)
    throw py::value_error("dense_match: a map is (address, channel stride, cell stride, (h, w), normalize)");
  const auto grid = t[3].cast<std::pair<std::int64_t, std::int64_t>>();
  return {pointer<const float>(t[0]), t[1].cast<std::int64_t>(), t[2].cast<std::int64_t>(), grid.first, grid.second,
          t[4].cast<bool>()};
}

void match_points(const py::handle& points, std::int64_t count, std::int64_t c, const py::tuple& query,
                  const py::tuple& key, const std::pair<std::int64_t, std::int64_t>& size, bool normalize,
                  const py::tuple& y, const py::tuple& x, const py::handle& scale, const py::handle& gram,
                  const py::handle& similarity, const py::handle& index, std::int64_t table_bytes, int threads,
                  const std::string& isa) {
  DenseMatchPointsCall call{};
  call.points = pointer<const std::int64_t>(points);
  call.count = count;
  call.c = c;
  call.query = map_of(query);
  call.key = map_of(key);
  call.height = size.first;
  call.width = size.second;
  call.normalize = normalize;
  call.y = axis(y);
  call.x = axis(x);
  call.scale = pointer<const float>(scale);
  call.gram = pointer<const double>(gram);
  call.similarity = pointer<float>(similarity);
  call.index = pointer<std::int64_t>(index);
  call.table_bytes = table_bytes;
  call.threads = threads;
  const CpuIsa target = cpu_isa(isa);
  run_interruptibly(dense_match_points_run, call, target);
}

void map_products(const py::handle& descriptors, const py::handle& map, std::int64_t channel_stride,
                  std::int64_t cell_stride, std::int64_t count, std::int64_t c, std::int64_t cells, bool normalize,
                  const py::handle& table, int threads, const std::string& isa) {
  MapProductsCall call{};
  call.descriptors = pointer<const float>(descriptors);
  call.map = pointer<const float>(map);
  call.channel_stride = channel_stride;
  call.cell_stride = cell_stride;
  call.count = count;
  call.c = c;
  call.cells = cells;
  call.normalize = normalize;
  call.table = pointer<float>(table);
  call.threads = threads;
  const CpuIsa target = cpu_isa(isa);
  py::gil_scoped_release release;
  map_products_run(call, target);
}

void map_sample(const py::handle& points, const py::handle& map, std::int64_t channel_stride, std::int64_t cell_stride,
                std::int64_t count, std::int64_t c, const std::pair<std::int64_t, std::int64_t>& grid,
                const std::pair<std::int64_t, std::int64_t>& size, bool normalize_cells, bool normalize_result,
                const py::handle& descriptors, int threads) {
  MapSampleCall call{};
  call.points = pointer<const std::int64_t>(points);
  call.map = pointer<const float>(map);
  call.channel_stride = channel_stride;
  call.cell_stride = cell_stride;
  call.count = count;
  call.c = c;
  call.grid_h = grid.first;
  call.grid_w = grid.second;
  call.height = size.first;
  call.width = size.second;
  call.normalize_cells = normalize_cells;
  call.normalize_result = normalize_result;
  call.descriptors = pointer<float>(descriptors);
  call.threads = threads;
  py::gil_scoped_release release;
  map_sample_run(call);
}

}  // namespace

void bind_dense_match(py::module_& m) {
  m.def(
      "dense_match_f32", &run, py::arg("table"), py::arg("rows"), py::arg("top"), py::arg("end"), py::arg("query_y"),
      py::arg("query_x"), py::arg("points"), py::arg("count"), py::arg("floor"), py::arg("y"), py::arg("x"),
      py::arg("scale"), py::arg("gram"), py::arg("query_inverse"), py::arg("query_gram"), py::arg("similarity"),
      py::arg("index"), py::arg("threads"), py::arg("isa") = "auto",
      "For query pixels the key pixel of the largest bilinearly interpolated similarity, the lowest row-major one "
      "among equals. Addresses of contiguous arrays: table [rows * query cells along x, key cells] float32, "
      "similarities of query to key cells for `rows` rows of query cells from row `top` on; points [count, 2] int64 "
      "(x, y) pixels of the query image, or 0 for every one; only points whose upper cell lies in rows top to end - "
      "1 are matched. floor [count] float32: a similarity that the match surely reaches, or 0. scale [y pixels, x "
      "pixels] float32 and gram [5, key cells] float64 as descriptor_norms_f32 writes them, or both 0; query_inverse and query_gram the same of "
      "the query, or both 0: then the search is slower. Axes are "
      "(cells, pixels, strips, low, high, first, weight): int32 low and high [strips], first [strips + 1], float32 "
      "weight [pixels]. Writes similarity [count] float32 and index [count] int64; -inf and -1 where every value is "
      "NaN or infinite.");
  m.def("descriptor_norms_f32", &norms, py::arg("map"), py::arg("channel_stride"), py::arg("cell_stride"), py::arg("c"),
        py::arg("y"), py::arg("x"), py::arg("least"), py::arg("gram"), py::arg("inverse"), py::arg("threads"),
        py::arg("isa") = "auto",
        "Inverse norms [y pixels, x pixels] float32 of the bilinearly interpolated descriptors of a map [c, h, w] "
        "float32, norms below `least` counting as that; and gram [5, h, w] float64, the products of each cell with "
        "itself and the cells to the right, below, below to the right and below to the left. Axes as in "
        "dense_match_f32.");
  m.def("dense_match_points_f32", &match_points, py::arg("points"), py::arg("count"), py::arg("c"), py::arg("query"),
        py::arg("key"), py::arg("size"), py::arg("normalize"), py::arg("y"), py::arg("x"), py::arg("scale"),
        py::arg("gram"), py::arg("similarity"), py::arg("index"), py::arg("table_bytes"), py::arg("threads"),
        py::arg("isa") = "auto",
        "For points [count, 2] int64 (x, y) of a query image of size (H, W) the key pixel as in dense_match_f32, each "
        "by its own descriptor, divided by its norm with normalize. Maps are (address, channel stride, cell stride, "
        "(h, w), whether to divide cells by their norms), [c, h, w] float32; one of the key's strides is 1. "
        "map_sample_f32 and map_products_f32 are its first two steps.");
  m.def("map_sample_f32", &map_sample, py::arg("points"), py::arg("map"), py::arg("channel_stride"),
        py::arg("cell_stride"), py::arg("count"), py::arg("c"), py::arg("grid"), py::arg("size"),
        py::arg("normalize_cells"), py::arg("normalize_result"), py::arg("descriptors"), py::arg("threads"),
        "Bilinear interpolation of a map [c, h, w] of grid (h, w), stretched over an image of size (H, W), at points "
        "[count, 2] int64 (x, y): writes descriptors [count, c]. Addresses; all but the points are float32.");
  m.def("map_products_f32", &map_products, py::arg("descriptors"), py::arg("map"), py::arg("channel_stride"),
        py::arg("cell_stride"), py::arg("count"), py::arg("c"), py::arg("cells"), py::arg("normalize"),
        py::arg("table"), py::arg("threads"), py::arg("isa") = "auto",
        "Products of descriptors [count, c] with the cells of a map [c, cells] that has a stride of 1: writes table "
        "[count, cells], with normalize divided by max(norm of the cell, 1e-12). Addresses of float32 arrays.");
}

}  // namespace lift_fast
