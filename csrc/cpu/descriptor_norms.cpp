#include "descriptor_norms.hpp"

#include <limits>
#include <stdexcept>
#include <string>

#include "dense_match_axis.hpp"
#include "dispatch.hpp"
#include "memory.hpp"

namespace lift_fast {
namespace {

void require(bool holds, const std::string& what) {
  if (!holds) throw std::invalid_argument("descriptor_norms: " + what);
}

}  // namespace

void descriptor_norms_run(const DescriptorNormsCall& call, CpuIsa isa) {
  constexpr std::int64_t limit = std::numeric_limits<std::int32_t>::max();
  check_axis(call.y, "y");
  check_axis(call.x, "x");
  require(call.c >= 0 && call.c <= limit, "0 to 2^31 - 1 channels");
  require(call.y.cells <= limit / call.x.cells && call.y.pixels <= limit / call.x.pixels, "the map is too large");
  require(call.threads >= 1, "threads must be at least 1");
  require(call.map != nullptr && call.gram != nullptr && call.inverse != nullptr,
          "map, gram and inverse must not be null");
  require(
      call.channel_stride >= 0 && call.cell_stride >= 0 && call.channel_stride <= limit && call.cell_stride <= limit,
      "strides must not be negative");
  const Memory<double> rows = allocate<double>(2 * call.x.cells * call.c * call.threads);
  const Memory<double> sums = allocate<double>(3 * call.x.pixels * call.threads);
  Kernels<DescriptorNormsKernel>::of(isa).run(call, {rows.get(), sums.get()});
}

}  // namespace lift_fast
