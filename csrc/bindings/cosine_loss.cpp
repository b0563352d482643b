#include "cpu/cosine_loss.hpp"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "pointer.hpp"

namespace py = pybind11;

namespace lift_fast {
namespace {

using Triple = std::array<std::int64_t, 3>;

CosineLossLayout layout(const Triple& strides) { return {strides[0], strides[1], strides[2]}; }

CosineLossType type(const std::string& name) {
  if (name == "float32") return CosineLossType::float32;
  if (name == "bfloat16") return CosineLossType::bfloat16;
  if (name == "float16") return CosineLossType::float16;
  throw std::invalid_argument("cosine_loss: dtype must be float32, bfloat16 or float16, got " + name);
}

void run(std::uintptr_t prediction, std::uintptr_t target, const std::string& dtype, const Triple& shape,
         const Triple& prediction_strides, const Triple& target_strides, const Triple& gradient_strides, float weight,
         std::uintptr_t loss, std::uintptr_t gradient, int threads, const std::string& isa, std::uintptr_t upstream) {
  CosineLossCall call{};
  call.prediction = pointer<const void>(prediction);
  call.target = pointer<const void>(target);
  call.type = type(dtype);
  call.prediction_layout = layout(prediction_strides);
  call.target_layout = layout(target_strides);
  call.gradient_layout = layout(gradient_strides);
  call.outer = shape[0];
  call.c = shape[1];
  call.inner = shape[2];
  call.weight = weight;
  call.upstream = pointer<const float>(upstream);
  call.loss = pointer<float>(loss);
  call.gradient = pointer<void>(gradient);
  call.threads = threads;
  const CpuIsa target_isa = cpu_isa(isa);
  py::gil_scoped_release release;
  cosine_loss_run(call, target_isa);
}

}  // namespace

void bind_cosine_loss(py::module_& m) {
  m.def("cosine_loss", &run, py::arg("prediction"), py::arg("target"), py::arg("dtype"), py::arg("shape"),
        py::arg("prediction_strides"), py::arg("target_strides"), py::arg("gradient_strides"), py::arg("weight"),
        py::arg("loss"), py::arg("gradient"), py::arg("threads"), py::arg("isa") = "auto", py::arg("upstream") = 0,
        "1 - cosine of prediction and target [outer, c, inner] along c. Writes loss [outer, inner] float32 and, if its "
        "address is not 0, weight times the gradient for prediction in the inputs' dtype, also times upstream [outer, "
        "inner] float32 if given. Strides in elements.");
}

}  // namespace lift_fast
