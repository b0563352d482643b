#include "cpu/window_nearest.hpp"

#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>

#include "interruptible.hpp"
#include "pointer.hpp"

namespace py = pybind11;

namespace lift_fast {
namespace {

void run(std::uintptr_t query, std::uintptr_t key, std::int64_t batch, std::int64_t query_frames, std::int64_t query_h,
         std::int64_t query_w, std::int64_t key_frames, std::int64_t key_h, std::int64_t key_w, std::int64_t c,
         std::int64_t k, std::int64_t reach_y, std::int64_t reach_x, bool normalize, std::uintptr_t similarity,
         std::uintptr_t index, int threads, const std::string& isa) {
  WindowNearestCall call{};
  call.query = pointer<const float>(query);
  call.key = pointer<const float>(key);
  call.batch = batch;
  call.query_frames = query_frames;
  call.query_h = query_h;
  call.query_w = query_w;
  call.key_frames = key_frames;
  call.key_h = key_h;
  call.key_w = key_w;
  call.c = c;
  call.k = k;
  call.reach_y = reach_y;
  call.reach_x = reach_x;
  call.normalize = normalize;
  call.similarity = pointer<float>(similarity);
  call.index = pointer<std::int64_t>(index);
  call.threads = threads;
  const CpuIsa target = cpu_isa(isa);
  run_interruptibly(window_nearest_run, call, target);
}

}  // namespace

void bind_window_nearest(py::module_& m) {
  m.def("window_nearest_f32", &run, py::arg("query"), py::arg("key"), py::arg("batch"), py::arg("query_frames"),
        py::arg("query_h"), py::arg("query_w"), py::arg("key_frames"), py::arg("key_h"), py::arg("key_w"), py::arg("c"),
        py::arg("k"), py::arg("reach_y"), py::arg("reach_x"), py::arg("normalize"), py::arg("similarity"),
        py::arg("index"), py::arg("threads"), py::arg("isa") = "auto",
        "For each cell of the grids query [batch, query_frames, query_h, query_w, c] the k most similar cells of key "
        "[batch, key_frames, key_h, key_w, c] with |(2 y' + 1) query_h - (2 y + 1) key_h| <= reach_y and likewise in "
        "x; addresses of contiguous float32 arrays. Writes similarity [batch, queries, k] float32, descending, and "
        "index [batch, queries, k] int64, numbered over all key grids; -inf and -1 where there is no match. Equal "
        "similarities go to the lowest index. A cell with NaN or infinity takes no part.");
}

}  // namespace lift_fast
