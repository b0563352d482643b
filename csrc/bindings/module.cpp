// lift_fast._C: plain functions on addresses and sizes. Python checks every argument before an address leaves it.
#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>

#include "cpu/nearest.hpp"
#include "interruptible.hpp"
#if LIFT_FAST_CUDA
#include "cuda/probe.hpp"
#endif
#if defined(_OPENMP)
#include <omp.h>
#endif

namespace py = pybind11;

namespace lift_fast {

void bind_bit_matrix(py::module_& m);
void bind_cosine_loss(py::module_& m);
void bind_dense_match(py::module_& m);
void bind_dense_match_cuda(py::module_& m);
void bind_image_encoder(py::module_& m);
void bind_lift_decoder(py::module_& m);
void bind_window_nearest(py::module_& m);

namespace {

template <class T>
T* pointer(std::uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

void nearest(std::uintptr_t query, std::uintptr_t key, std::int64_t batch, std::int64_t n, std::int64_t m,
             std::int64_t c, bool normalize, bool rescore, std::int64_t k, std::uintptr_t similarity,
             std::uintptr_t index, std::uintptr_t back, int threads, const std::string& isa) {
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
  const NearestIsa target = nearest_isa(isa);
  Interruptible stop;
  call.stop = &stop;
  {
    py::gil_scoped_release release;
    nearest_run(call, target);
  }
  stop.raise();
}

std::string nearest_isa_in_use(const std::string& isa) { return nearest_isa_name(nearest_isa(isa)); }

py::dict build_info() {
  py::dict info;
  info["compiler"] = __VERSION__;
#if defined(_OPENMP)
  info["openmp"] = true;
#else
  info["openmp"] = false;
#endif
  info["cuda_architectures"] = LIFT_FAST_CUDA_ARCHITECTURES;
#if LIFT_FAST_CUDA
  info["cuda_runtime"] = cuda_runtime_version();
#else
  info["cuda_runtime"] = py::none();
#endif
  return info;
}

py::list cpu_isas() {
  py::list names;
  for (CpuIsa isa : {CpuIsa::avx512, CpuIsa::avx2, CpuIsa::baseline}) {
    if (cpu_has(isa)) names.append(cpu_isa_name(isa));
  }
  return names;
}

py::tuple cuda_probe(int device) {
#if LIFT_FAST_CUDA
  py::gil_scoped_release release;
  const CudaProbe result = probe_cuda(device);
  py::gil_scoped_acquire acquire;
  return py::make_tuple(result.works, result.reason);
#else
  (void)device;
  return py::make_tuple(false, "built without CUDA: " LIFT_FAST_CUDA_REASON);
#endif
}

}  // namespace
}  // namespace lift_fast

PYBIND11_MODULE(_C, m) {
  m.doc() = "Native core of lift_fast";
  m.def("build_info", &lift_fast::build_info, "What this binary was built from and for.");
  m.def("cpu_isas", &lift_fast::cpu_isas, "Instruction sets that this CPU can run the kernels with, best first.");
  m.def("cuda_probe", &lift_fast::cuda_probe, py::arg("device"),
        "(works, reason): whether this binary's kernels run on a CUDA device.");
  m.def("nearest_f32", &lift_fast::nearest, py::arg("query"), py::arg("key"), py::arg("batch"), py::arg("n"),
        py::arg("m"), py::arg("c"), py::arg("normalize"), py::arg("rescore"), py::arg("k"), py::arg("similarity"),
        py::arg("index"), py::arg("back"), py::arg("threads"), py::arg("isa") = "auto",
        "For each row of query [batch, n, c] the k most similar rows of key [batch, m, c]; addresses of contiguous "
        "float32 arrays. Writes similarity [batch, n, k] float32, descending, index [batch, n, k] int64 and, where not "
        "0, back [batch, n] int64, the query that is most similar to the first of these keys. Equal similarities go to "
        "the lowest index. A row with NaN or infinity takes no part; where matches are missing, index is -1 and "
        "similarity -inf. Without rescore, similarities and order are those of the search.");
  m.def("nearest_isa", &lift_fast::nearest_isa_in_use, py::arg("isa") = "auto",
        "Which kernel nearest_f32 runs for a name.");
  m.attr("most_neighbours") = lift_fast::kMostNeighbours;
  lift_fast::bind_bit_matrix(m);
  lift_fast::bind_cosine_loss(m);
  lift_fast::bind_dense_match(m);
  lift_fast::bind_dense_match_cuda(m);
  lift_fast::bind_image_encoder(m);
  lift_fast::bind_lift_decoder(m);
  lift_fast::bind_window_nearest(m);
}
