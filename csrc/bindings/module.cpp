// lift_fast._C: plain functions on addresses and sizes. Python checks every argument before it passes an address.
#include <pybind11/pybind11.h>
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "cpu/isa.hpp"
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
void bind_lift_forward(py::module_& m);
void bind_nearest(py::module_& m);
void bind_vit(py::module_& m);
void bind_window_nearest(py::module_& m);

namespace {

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

py::list isas() {
  py::list names;
  for (const CpuIsa isa : cpu_isas()) names.append(cpu_isa_name(isa));
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

// A large table is written once and read a few times: by pages of 4 KB its first touch costs as much as its values.
void advise_huge_pages(std::uintptr_t address, std::uintptr_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr std::uintptr_t page = 4096;
  const std::uintptr_t begin = (address + page - 1) / page * page, end = (address + bytes) / page * page;
  // Only advice: where it does not help it does no harm.
  if (begin < end) (void)madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)address;
  (void)bytes;
#endif
}

}  // namespace
}  // namespace lift_fast

PYBIND11_MODULE(_C, m) {
  // lift_fast/_native.py has the same number; a change of what the core takes raises both.
  m.attr("interface") = 4;
  m.doc() = "Native core of lift_fast";
  m.def("build_info", &lift_fast::build_info, "How this binary was built.");
  m.def("cpu_isas", &lift_fast::isas, "Instruction sets for the kernels on this CPU, best first.");
  m.def("cuda_probe", &lift_fast::cuda_probe, py::arg("device"),
        "(works, reason): whether this binary's kernels run on a CUDA device.");
  m.def("advise_huge_pages", &lift_fast::advise_huge_pages, py::arg("address"), py::arg("bytes"),
        "Ask the system for large pages for memory that is not yet touched.");
  lift_fast::bind_bit_matrix(m);
  lift_fast::bind_cosine_loss(m);
  lift_fast::bind_dense_match(m);
  lift_fast::bind_dense_match_cuda(m);
  lift_fast::bind_image_encoder(m);
  lift_fast::bind_lift_forward(m);
  lift_fast::bind_nearest(m);
  lift_fast::bind_vit(m);
  lift_fast::bind_window_nearest(m);
}
