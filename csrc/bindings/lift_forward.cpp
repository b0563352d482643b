#include "cpu/lift_forward.hpp"

#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>

#include "pointer.hpp"

namespace py = pybind11;

namespace lift_fast {
namespace {

std::int64_t packed_size(std::int64_t C, std::int64_t c, std::int64_t G, std::int64_t F, const std::string& dtype,
                         const std::string& isa) {
  const LiftForwardType type = lift_forward_type(dtype);
  return lift_forward_packed_size({C, c, G, F}, type, lift_forward_isa(isa, type));
}

void pack(std::uintptr_t phase, std::uintptr_t fine, std::uintptr_t edge_bias, std::uintptr_t conv,
          std::uintptr_t conv_bias, std::uintptr_t out, std::uintptr_t out_bias, std::int64_t C, std::int64_t c,
          std::int64_t G, std::int64_t F, const std::string& dtype, std::uintptr_t packed, std::int64_t packed_bytes,
          const std::string& isa) {
  const LiftForwardType type = lift_forward_type(dtype);
  const LiftForwardWeights weights{pointer<const double>(phase),     pointer<const double>(fine),
                                   pointer<const double>(edge_bias), pointer<const double>(conv),
                                   pointer<const double>(conv_bias), pointer<const double>(out),
                                   pointer<const double>(out_bias)};
  const CpuIsa target = lift_forward_isa(isa, type);
  py::gil_scoped_release release;
  lift_forward_pack(weights, {C, c, G, F}, type, target, pointer<void>(packed), packed_bytes);
}

void run(std::uintptr_t x, std::uintptr_t g, std::uintptr_t f, std::uintptr_t packed, std::int64_t packed_bytes,
         std::uintptr_t y, std::int64_t batch, std::int64_t h, std::int64_t w, std::int64_t C, std::int64_t c,
         std::int64_t G, std::int64_t F, const std::string& dtype, int threads, const std::string& isa) {
  LiftForwardCall call{};
  call.x = pointer<const void>(x);
  call.g = pointer<const void>(g);
  call.f = pointer<const void>(f);
  call.y = pointer<void>(y);
  call.batch = batch;
  call.height = h;
  call.width = w;
  call.channels = {C, c, G, F};
  call.type = lift_forward_type(dtype);
  call.threads = threads;
  const CpuIsa target = lift_forward_isa(isa, call.type);
  py::gil_scoped_release release;
  lift_forward_run(call, pointer<const void>(packed), packed_bytes, target);
}

py::list isas(const std::string& dtype) {
  py::list names;
  for (CpuIsa isa : lift_forward_isas(lift_forward_type(dtype))) names.append(cpu_isa_name(isa));
  return names;
}

}  // namespace

void bind_lift_forward(py::module_& m) {
  m.def("lift_forward_isas", &isas, py::arg("dtype"),
        "Instruction sets for the decoder on this CPU, best first; isa='auto' takes the first.");
  m.def("lift_forward_packed_size", &packed_size, py::arg("C"), py::arg("c"), py::arg("G"), py::arg("F"),
        py::arg("dtype"), py::arg("isa") = "auto", "Bytes that lift_forward_pack fills.");
  m.def("lift_forward_pack", &pack, py::arg("phase"), py::arg("fine"), py::arg("edge_bias"), py::arg("conv"),
        py::arg("conv_bias"), py::arg("out"), py::arg("out_bias"), py::arg("C"), py::arg("c"), py::arg("G"),
        py::arg("F"), py::arg("dtype"), py::arg("packed"), py::arg("packed_bytes"), py::arg("isa") = "auto",
        "Transform and pack the plan's weights. Addresses of contiguous float64 arrays: phase [2, 2, 2, 2, C + G, c], "
        "fine [3, 3, F, c], edge_bias [3, 3, c], conv [3, 3, c, c], conv_bias [c], out [c, C], out_bias [C].");
  m.def("lift_forward", &run, py::arg("x"), py::arg("g"), py::arg("f"), py::arg("packed"), py::arg("packed_bytes"),
        py::arg("y"), py::arg("batch"), py::arg("h"), py::arg("w"), py::arg("C"), py::arg("c"), py::arg("G"),
        py::arg("F"), py::arg("dtype"), py::arg("threads"), py::arg("isa") = "auto",
        "y [batch, 2h, 2w, C] from x [batch, h, w, C], g [batch, h, w, G] and f [batch, 2h, 2w, F]; addresses of "
        "contiguous arrays of `dtype`; g and f are ignored if they have no channels. The result does not depend on "
        "`threads`. A NaN or infinity spreads over the tiles that read it.");
}

}  // namespace lift_fast
