#include "cpu/bit_matrix.hpp"

#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>

#include "pointer.hpp"

namespace py = pybind11;

namespace lift_fast {
namespace {

void set_rows(std::uintptr_t similarity, std::int64_t start, std::int64_t rows, std::int64_t n, float tau,
              std::uintptr_t bits, int threads) {
  py::gil_scoped_release release;
  bit_matrix_set_rows(pointer<const float>(similarity), start, rows, n, tau, pointer<std::uint64_t>(bits), threads);
}

void multiply(std::uintptr_t bits, std::int64_t n, std::uintptr_t vector, std::uintptr_t out, int threads,
              const std::string& isa) {
  const CpuIsa target = cpu_isa(isa);
  py::gil_scoped_release release;
  bit_matrix_multiply(pointer<const std::uint64_t>(bits), n, pointer<const double>(vector), pointer<double>(out),
                      threads, target);
}

}  // namespace

void bind_bit_matrix(py::module_& m) {
  m.def(
      "bit_matrix_set_rows_f32", &set_rows, py::arg("similarity"), py::arg("start"), py::arg("rows"), py::arg("n"),
      py::arg("tau"), py::arg("bits"), py::arg("threads"),
      "Sets bits (i, j) and (j, i) of a symmetric n x n matrix to similarity > tau for rows i = start .. start + rows - 1 "
      "and j <= i. Addresses: similarity of contiguous float32 [rows, start + rows], bits of uint64 [64 w, w], w = "
      "ceil(n / 64); start is a multiple of 64.");
  m.def("bit_matrix_multiply_f64", &multiply, py::arg("bits"), py::arg("n"), py::arg("vector"), py::arg("out"),
        py::arg("threads"), py::arg("isa") = "auto",
        "Writes to out [n] float64 the product of such a matrix with vector [n], finite float64 numbers.");
}

}  // namespace lift_fast
