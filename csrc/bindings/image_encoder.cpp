#include <pybind11/pybind11.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#include "cuda/image_encoder_tiling.hpp"
#include "pointer.hpp"

namespace py = pybind11;

namespace lift_fast {
namespace {

void expect(const char* name, std::int64_t elements, std::int64_t expected) {
  if (elements != expected) {
    throw py::value_error(std::string("image_encoder: ") + name + " must have " + std::to_string(expected) +
                          " elements, got " + std::to_string(elements));
  }
}

void run(std::uintptr_t imgs, const py::sequence& strides, std::uintptr_t packed, std::int64_t packed_elements,
         std::uintptr_t bias, std::uintptr_t f, std::int64_t f_elements, std::uintptr_t g, std::int64_t g_elements,
         std::int64_t batch, std::int64_t h, std::int64_t w, bool pool, const std::string& dtype, int device,
         std::uintptr_t stream, const std::string& cut) {
  ImageEncoderCall call{};
  if (strides.size() != 4) {
    throw py::value_error("image_encoder: imgs has 4 strides, got " + std::to_string(strides.size()));
  }
  for (std::size_t i = 0; i < 4; ++i) call.stride[i] = strides[i].cast<std::int64_t>();
  call.imgs = pointer<const void>(imgs);
  call.packed = pointer<const void>(packed);
  call.bias = pointer<const float>(bias);
  call.f = pointer<void>(f);
  call.g = pointer<void>(g);
  call.batch = batch;
  call.h = h;
  call.w = w;
  call.pool = pool;
  call.type = encoder_type(dtype);
  call.cut = encoder_cut(cut);
  check_encoder_call(call);
  expect("packed", packed_elements, kEncoderWeights);
  expect("f", f_elements, 128 * batch * h * w);
  expect("g", g_elements, 32 * batch * h * w);
  if (device < 0) throw py::value_error("image_encoder: device " + std::to_string(device) + " does not exist");
#if LIFT_FAST_CUDA
  py::gil_scoped_release release;
  image_encoder_run(call, device, pointer<void>(stream));
#else
  (void)stream;
  throw std::runtime_error("image_encoder: built without CUDA: " LIFT_FAST_CUDA_REASON);
#endif
}

}  // namespace

void bind_image_encoder(py::module_& m) {
  m.def(
      "image_encoder", &run, py::arg("imgs"), py::arg("strides"), py::arg("packed"), py::arg("packed_elements"),
      py::arg("bias"), py::arg("f"), py::arg("f_elements"), py::arg("g"), py::arg("g_elements"), py::arg("batch"),
      py::arg("h"), py::arg("w"), py::arg("pool"), py::arg("dtype"), py::arg("device"), py::arg("stream"),
      py::arg("cut") = "walk",
      "LiFT's image encoders, 32 channels wide, on a CUDA device: f [batch, 2h, 2w, 32] and g [batch, h, w, 32], "
      "contiguous, from imgs [batch, 3, s h, s w] of any strides (in elements), s = 16 with pool, else 8. Addresses "
      "on the device of `dtype` elements (float32 is computed as TF32), bias [3, 32] float32; packed is what "
      "lift_fast.ops.lift_forward.image_encoder_cuda.pack_encoder makes. cut: each warp walks down a strip of the image "
      "(\"walk\"), row by row in shorter code (\"stream\"), or makes one step of it (\"spread\", for few images). "
      "Launches on `stream` and returns.");
}

}  // namespace lift_fast
