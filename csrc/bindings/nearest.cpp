#include "cpu/nearest.hpp"

#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>

#include "interruptible.hpp"
#include "pointer.hpp"

namespace py = pybind11;

namespace lift_fast {
namespace {

void run(std::uintptr_t query, std::uintptr_t key, std::int64_t batch, std::int64_t n, std::int64_t m, std::int64_t c,
         bool normalize, bool rescore, std::int64_t k, std::uintptr_t similarity, std::uintptr_t index,
         std::uintptr_t back, int threads, const std::string& isa) {
  NearestCall call{};
  call.query = pointer<const float>(query);
  call.key = pointer<const float>(key);
  call.batch = batch;
  call.n = n;
  call.m = m;
  call.c = c;
  call.normalize = normalize;
  call.rescore = rescore;
  call.k = k;
  call.similarity = pointer<float>(similarity);
  call.index = pointer<std::int64_t>(index);
  call.back = pointer<std::int64_t>(back);
  call.threads = threads;
  const CpuIsa target = nearest_isa(isa);
  run_interruptibly(nearest_run, call, target);
}

std::string isa_in_use(const std::string& isa) { return cpu_isa_name(nearest_isa(isa)); }

std::string search(const std::string& isa) {
  switch (nearest_search(nearest_isa(isa))) {
    case Numbers::int16: return "int16";
    case Numbers::bfloat16: return "bfloat16";
    case Numbers::float32: break;
  }
  return "float32";
}

}  // namespace

void bind_nearest(py::module_& m) {
  m.def(
      "nearest_f32", &run, py::arg("query"), py::arg("key"), py::arg("batch"), py::arg("n"), py::arg("m"), py::arg("c"),
      py::arg("normalize"), py::arg("rescore"), py::arg("k"), py::arg("similarity"), py::arg("index"), py::arg("back"),
      py::arg("threads"), py::arg("isa") = "auto",
      "For each row of query [batch, n, c] the k most similar rows of key [batch, m, c]; addresses of contiguous "
      "float32 arrays. Writes similarity [batch, n, k] float32, descending, index [batch, n, k] int64 and, if not 0, "
      "back [batch, n] int64, the query that is most similar to the first of these keys. Equal similarities go to the "
      "lowest index. A row with NaN or infinity takes no part; missing matches have index -1 and similarity -inf. "
      "Without rescore, similarities and order are those of the search.");
  m.def("nearest_isa", &isa_in_use, py::arg("isa") = "auto", "Which kernel nearest_f32 runs for a name.");
  m.def("nearest_search", &search, py::arg("isa") = "auto",
        "The type that its search multiplies: \"float32\", \"int16\" or \"bfloat16\".");
  m.attr("most_neighbours") = kMostNeighbours;
}

}  // namespace lift_fast
