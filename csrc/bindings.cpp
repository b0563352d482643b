// lift_fast._C: plain functions on addresses and sizes. Python checks every argument before an address leaves it.
#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>

#include "cpu/nearest.hpp"
#if LIFT_FAST_CUDA
#include "cuda/probe.hpp"
#endif
#if defined(_OPENMP)
#include <omp.h>
#endif

namespace py = pybind11;

namespace lift_fast {

void bind_dense_match(py::module_& m);
void bind_lift_decoder(py::module_& m);

namespace {

template <class T>
T* pointer(std::uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

void nearest(std::uintptr_t query, std::uintptr_t key, std::int64_t batch, std::int64_t n, std::int64_t m,
             std::int64_t c, bool normalize, std::uintptr_t similarity, std::uintptr_t index, std::uintptr_t second,
             std::uintptr_t reverse_similarity, std::uintptr_t reverse_index, int threads, const std::string& isa) {
  NearestCall call{};
  call.query = pointer<const float>(query);
  call.key = pointer<const float>(key);
  call.batch = batch;
  call.n = n;
  call.m = m;
  call.c = c;
  call.normalize = normalize;
  call.similarity = pointer<float>(similarity);
  call.index = pointer<std::int64_t>(index);
  call.second = pointer<float>(second);
  call.reverse_similarity = pointer<float>(reverse_similarity);
  call.reverse_index = pointer<std::int64_t>(reverse_index);
  call.threads = threads;
  const CpuIsa target = cpu_isa(isa);
  py::gil_scoped_release release;
  nearest_run(call, target);
}

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
        py::arg("m"), py::arg("c"), py::arg("normalize"), py::arg("similarity"), py::arg("index"), py::arg("second"),
        py::arg("reverse_similarity"), py::arg("reverse_index"), py::arg("threads"), py::arg("isa") = "auto",
        "For each row of query [batch, n, c] the most similar row of key [batch, m, c]; addresses of contiguous "
        "float32 arrays. Writes similarity [batch, n] float32 and index [batch, n] int64; where not 0, second "
        "[batch, n] float32, the runner-up's similarity, and reverse_similarity, reverse_index [batch, m], the best "
        "query of each key. Equal similarities go to the lowest index. A row with NaN or infinity takes no part: "
        "index -1, similarity -inf.");
  lift_fast::bind_dense_match(m);
  lift_fast::bind_lift_decoder(m);
}
