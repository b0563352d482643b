#include "map_products.hpp"

#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <stdexcept>

namespace lift_fast {
namespace {

struct Free {
  void operator()(void* data) const { std::free(data); }
};
using Floats = std::unique_ptr<float, Free>;

Floats allocate(std::int64_t words) {
  void* data = std::aligned_alloc(64, (static_cast<std::size_t>(words) * 4 + 127) / 64 * 64);
  if (data == nullptr) throw std::bad_alloc();
  return Floats(static_cast<float*>(data));
}

void require(bool holds, const char* what) {
  if (!holds) throw std::invalid_argument(std::string("map_products: ") + what);
}

MapProductsTiling tiling(CpuIsa isa) {
#if defined(__x86_64__)
  if (isa == CpuIsa::avx512) return map_products_tiling_avx512();
  if (isa == CpuIsa::avx2) return map_products_tiling_avx2();
#endif
  (void)isa;
  return map_products_tiling_baseline();
}

}  // namespace

void map_products_run(const MapProductsCall& call, CpuIsa isa) {
  require(call.count >= 0 && call.c >= 0 && call.cells >= 0, "sizes must not be negative");
  constexpr std::int64_t limit = std::int64_t{1} << 31;
  require(call.count < limit && call.c < limit && call.cells < limit, "at most 2^31 - 1 of each");
  require(call.threads >= 1, "threads must be at least 1");
  if (call.count == 0 || call.cells == 0) return;
  require(call.table != nullptr && (call.c == 0 || (call.descriptors != nullptr && call.map != nullptr)),
          "descriptors, map and table must not be null");
  if (call.c == 0) {
    std::memset(call.table, 0, static_cast<std::size_t>(call.count * call.cells) * 4);
    return;
  }
  MapProductsCall inner = call;
  // The stride of a dimension of one element says nothing: the layout of columns takes any distance of the other.
  if (call.c == 1) inner.channel_stride = call.cells;
  if (call.cells == 1) inner.cell_stride = 1;
  const std::int64_t channel = inner.channel_stride, cell = inner.cell_stride;
  require(channel >= 1 && cell >= 1 && channel < limit && cell < limit, "strides must be positive");
  const bool rows = channel == 1 && cell >= call.c, columns = cell == 1 && channel >= call.cells;
  require(rows || columns || call.c == 1, "one stride must be 1, the other no smaller than the rows");
  const MapProductsTiling cut = tiling(isa);
  Floats gathered;
  if (call.c == 1 && cell != 1) {
    gathered = allocate(call.cells);
    for (std::int64_t i = 0; i < call.cells; ++i) gathered.get()[i] = call.map[i * cell];
    inner.map = gathered.get();
    inner.cell_stride = 1;
  }
  MapProductsWork work{};
  work.padded_channels = (call.c + cut.lanes - 1) / cut.lanes * cut.lanes;
  const Floats padded = allocate(call.count * work.padded_channels);
  for (std::int64_t p = 0; p < call.count; ++p) {
    float* row = padded.get() + p * work.padded_channels;
    std::memcpy(row, call.descriptors + p * call.c, static_cast<std::size_t>(call.c) * 4);
    std::memset(row + call.c, 0, static_cast<std::size_t>(work.padded_channels - call.c) * 4);
  }
  work.padded = padded.get();
  work.scratch_words = (call.c * cut.cells + 15) / 16 * 16;
  const Floats scratch = allocate(work.scratch_words * call.threads);
  work.scratch = scratch.get();
  switch (isa) {
#if defined(__x86_64__)
    case CpuIsa::avx512: map_products_kernel_avx512(inner, work); return;
    case CpuIsa::avx2: map_products_kernel_avx2(inner, work); return;
#endif
    default: map_products_kernel_baseline(inner, work); return;
  }
}

}  // namespace lift_fast
