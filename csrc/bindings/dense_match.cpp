#include "cpu/dense_match.hpp"

#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>
#include <utility>

#include "cpu/dense_match_points.hpp"
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

void run(const py::handle& table, std::int64_t rows, std::int64_t groups, const py::handle& corners,
         const py::handle& start, const py::handle& weights, const py::tuple& y, const py::tuple& x,
         const py::handle& scale, const py::handle& similarity, const py::handle& index, int threads,
         const std::string& isa) {
  DenseMatchCall call{};
  call.table = pointer<const float>(table);
  call.rows = rows;
  call.groups = groups;
  call.corners = pointer<const std::int32_t>(corners);
  call.start = pointer<const std::int64_t>(start);
  call.weights = pointer<const float>(weights);
  call.y = axis(y);
  call.x = axis(x);
  call.scale = pointer<const float>(scale);
  call.similarity = pointer<float>(similarity);
  call.index = pointer<std::int64_t>(index);
  call.threads = threads;
  const CpuIsa target = cpu_isa(isa);
  run_interruptibly(dense_match_run, call, target);
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
                  const py::tuple& y, const py::tuple& x, const py::handle& scale, const py::handle& similarity,
                  const py::handle& index, std::int64_t table_bytes, int threads, const std::string& isa) {
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
      "dense_match_f32", &run, py::arg("table"), py::arg("rows"), py::arg("groups"), py::arg("corners"),
      py::arg("start"), py::arg("weights"), py::arg("y"), py::arg("x"), py::arg("scale"), py::arg("similarity"),
      py::arg("index"), py::arg("threads"), py::arg("isa") = "auto",
      "For each query pixel the key pixel of the largest bilinearly interpolated similarity, the lowest row-major one "
      "among equals. Addresses of contiguous arrays: table [rows, y cells * x cells] float32, similarities of query to "
      "key cells; corners [groups, 4] int32 rows of the table, start [groups + 1] int64, weights [points, 2] float32 "
      "(x, y): query pixels grouped by the four cells around them; scale [y pixels, x pixels] float32, a positive "
      "factor of each key pixel, or 0. y and x are (cells, pixels, strips, low, high, first, weight): int32 low and "
      "high [strips], first [strips + 1], float32 weight [pixels]. Writes similarity [points] float32 and index "
      "[points] int64; -inf and -1 where every value is NaN or infinite.");
  m.def("dense_match_points_f32", &match_points, py::arg("points"), py::arg("count"), py::arg("c"), py::arg("query"),
        py::arg("key"), py::arg("size"), py::arg("normalize"), py::arg("y"), py::arg("x"), py::arg("scale"),
        py::arg("similarity"), py::arg("index"), py::arg("table_bytes"), py::arg("threads"), py::arg("isa") = "auto",
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
