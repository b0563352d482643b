#include "cpu/vit.hpp"

#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "interruptible.hpp"
#include "pointer.hpp"

namespace py = pybind11;

namespace lift_fast {
namespace {

using Sizes = std::vector<std::int64_t>;
using Addresses = std::vector<std::uintptr_t>;

std::vector<std::int64_t> listed(const py::sequence& values, std::size_t count, const char* name) {
  std::vector<std::int64_t> all;
  for (const auto& value : values) all.push_back(py::cast<std::int64_t>(value));
  if (all.size() != count) {
    throw std::invalid_argument(std::string("vit: ") + name + " must be " + std::to_string(count) + " integers, got " +
                                std::to_string(all.size()));
  }
  return all;
}

std::vector<const float*> arrays(const py::sequence& addresses, std::size_t count) {
  std::vector<const float*> all;
  for (const auto& address : addresses) all.push_back(pointer<const float>(py::cast<std::uintptr_t>(address)));
  if (all.size() != count) {
    throw std::invalid_argument("vit: expected the addresses of " + std::to_string(count) + " arrays, got " +
                                std::to_string(all.size()));
  }
  return all;
}

VitSizes as_sizes(const py::sequence& sizes) {
  const auto n = listed(sizes, 4, "sizes");
  return {n[0], n[1], n[2], n[3]};
}

VitPacked as_packed(const py::handle& pair) {
  const auto both = py::cast<std::pair<std::uintptr_t, std::int64_t>>(pair);
  return {pointer<const void>(both.first), both.second};
}

std::int64_t block_bytes(const py::sequence& sizes, const std::string& dtype, const std::string& isa) {
  return vit_block_bytes(as_sizes(sizes), vit_isa(isa, vit_type(dtype)));
}

void pack_block(const py::sequence& weights, const py::sequence& epsilons, const py::sequence& sizes,
                const std::string& dtype, std::uintptr_t packed, std::int64_t bytes, const std::string& isa) {
  const auto w = arrays(weights, 14);
  if (py::len(epsilons) != 2) throw std::invalid_argument("vit: epsilons must be two numbers");
  const VitBlockWeights all{w[0],
                            w[1],
                            w[2],
                            w[3],
                            w[4],
                            w[5],
                            w[6],
                            w[7],
                            w[8],
                            w[9],
                            w[10],
                            w[11],
                            w[12],
                            w[13],
                            py::cast<float>(epsilons[0]),
                            py::cast<float>(epsilons[1])};
  const VitSizes n = as_sizes(sizes);
  const CpuIsa target = vit_isa(isa, vit_type(dtype));
  py::gil_scoped_release release;
  vit_pack_block(all, n, target, pointer<void>(packed), bytes);
}

std::int64_t linear_bytes(std::int64_t inputs, std::int64_t outputs, const std::string& dtype, const std::string& isa) {
  return vit_linear_bytes(inputs, outputs, vit_isa(isa, vit_type(dtype)));
}

void pack_linear(const py::sequence& weights, float epsilon, std::int64_t inputs, std::int64_t outputs,
                 const std::string& dtype, std::uintptr_t packed, std::int64_t bytes, const std::string& isa) {
  const auto w = arrays(weights, 4);
  const CpuIsa target = vit_isa(isa, vit_type(dtype));
  py::gil_scoped_release release;
  vit_pack_linear({w[0], w[1], w[2], w[3], epsilon}, inputs, outputs, target, pointer<void>(packed), bytes);
}

struct Run {
  VitCall call;
  VitPacked head, tail;
  std::vector<VitPacked> blocks;
  Stop* stop;
};

void run_with(Run run, CpuIsa isa) {
  run.call.stop = run.stop;
  vit_run(run.call, run.head, run.blocks, run.tail, isa);
}

void run(std::uintptr_t x, const py::object& images, const py::handle& head, const py::sequence& blocks,
         const py::handle& tail, std::int64_t tail_width, std::uintptr_t y, std::int64_t batch, std::int64_t tokens,
         std::int64_t skipped, const py::sequence& sizes, const std::string& dtype, int threads,
         const std::string& isa) {
  Run all{};
  all.call.x = pointer<const void>(x);
  if (!images.is_none()) {
    const auto n = listed(images, 10, "images");
    const auto at = [&](int i) { return static_cast<std::uintptr_t>(n[i]); };
    all.call.images = {pointer<const void>(at(0)), n[1], n[2], n[3], n[4], n[5], n[6], pointer<const float>(at(7)),
                       pointer<const float>(at(8))};
    all.call.prefix = n[9];
  }
  all.call.y = pointer<void>(y);
  all.call.batch = batch;
  all.call.tokens = tokens;
  all.call.skipped = skipped;
  all.call.tail_width = tail_width;
  all.call.sizes = as_sizes(sizes);
  all.call.type = vit_type(dtype);
  all.call.threads = threads;
  all.head = as_packed(head);
  all.tail = as_packed(tail);
  for (const auto& block : blocks) all.blocks.push_back(as_packed(block));
  run_interruptibly(run_with, all, vit_isa(isa, all.call.type));
}

py::list isas(const std::string& dtype) {
  py::list names;
  for (CpuIsa isa : vit_isas(vit_type(dtype))) names.append(cpu_isa_name(isa));
  return names;
}

}  // namespace

void bind_vit(py::module_& m) {
  m.def("vit_isas", &isas, py::arg("dtype"),
        "Instruction sets for a Vision Transformer on this CPU, best first; isa='auto' takes the first.");
  m.def("vit_block_bytes", &block_bytes, py::arg("sizes"), py::arg("dtype"), py::arg("isa") = "auto",
        "Bytes that vit_pack_block fills. sizes: C, heads, channels of a head, channels of the MLP.");
  m.def("vit_pack_block", &pack_block, py::arg("weights"), py::arg("epsilons"), py::arg("sizes"), py::arg("dtype"),
        py::arg("packed"), py::arg("bytes"), py::arg("isa") = "auto",
        "Pack a block. Addresses of contiguous float32 arrays, matrices [outputs, inputs]: weight and bias of norm1, "
        "qkv and proj, LayerScale; the same of norm2, fc1 and fc2. Biases, norms and scales may be 0.");
  m.def("vit_linear_bytes", &linear_bytes, py::arg("inputs"), py::arg("outputs"), py::arg("dtype"),
        py::arg("isa") = "auto", "Bytes that vit_pack_linear fills.");
  m.def("vit_pack_linear", &pack_linear, py::arg("weights"), py::arg("epsilon"), py::arg("inputs"), py::arg("outputs"),
        py::arg("dtype"), py::arg("packed"), py::arg("bytes"), py::arg("isa") = "auto",
        "Pack a LayerNorm (which may be 0, 0) and a matrix with its bias: the patch embedding or the last projection.");
  m.def("vit", &run, py::arg("x"), py::arg("images"), py::arg("head"), py::arg("blocks"), py::arg("tail"),
        py::arg("tail_width"), py::arg("y"), py::arg("batch"), py::arg("tokens"), py::arg("skipped"), py::arg("sizes"),
        py::arg("dtype"), py::arg("threads"), py::arg("isa") = "auto",
        "y [batch, tokens - skipped, C or tail_width] from tokens x [batch, tokens, C], or, with x = 0, from images: "
        "(address [batch, 3, height, width], height, width, patch, stride, rows, columns, address of the prefix "
        "[n, C] and of the position [rows * columns, C] in float32, n). head, blocks and tail: (address, bytes) of "
        "packed buffers; head and tail may be (0, 0). The result depends neither on `threads` nor on the batch.");
}

}  // namespace lift_fast
