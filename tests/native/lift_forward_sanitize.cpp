#include <algorithm>

#include "cpu/lift_forward.hpp"
#include "sanitize.hpp"

namespace lift_fast {
namespace {

std::unique_ptr<double[]> weights(std::int64_t count) {
  std::unique_ptr<double[]> values(new double[count]);
  for (std::int64_t i = 0; i < count; ++i) values[i] = 0.01 * static_cast<double>(i % 17 - 8);
  return values;
}

void run(const LiftForwardChannels& n, LiftForwardType type, CpuIsa isa, std::int64_t batch, std::int64_t h,
         std::int64_t w) {
  const std::int64_t k = n.tokens + n.coarse, c = n.hidden, width = type == LiftForwardType::float32 ? 4 : 2;
  const auto phase = weights(16 * k * c), fine = weights(9 * n.fine * c), edge = weights(9 * c);
  const auto conv = weights(9 * c * c), conv_bias = weights(c), out = weights(c * n.tokens), bias = weights(n.tokens);
  const std::int64_t bytes = lift_forward_packed_size(n, type, isa);
  std::unique_ptr<char[]> packed(new char[bytes]);
  lift_forward_pack({phase.get(), fine.get(), edge.get(), conv.get(), conv_bias.get(), out.get(), bias.get()}, n, type,
                    isa, packed.get(), bytes);
  std::vector<std::unique_ptr<char[]>> blocks;
  const auto block = [&](std::int64_t values) {
    blocks.emplace_back(new char[values * width]());
    return blocks.back().get();
  };
  LiftForwardCall call{};
  call.x = block(batch * h * w * n.tokens);
  call.g = block(batch * h * w * n.coarse);
  call.f = block(4 * batch * h * w * n.fine);
  call.y = block(4 * batch * h * w * n.tokens);
  call.batch = batch;
  call.height = h;
  call.width = w;
  call.channels = n;
  call.type = type;
  for (int threads : {1, 3}) {
    call.threads = threads;
    lift_forward_run(call, packed.get(), bytes, isa);
  }
}

}  // namespace

void sanitize(CpuIsa isa) {
  const LiftForwardChannels channels[] = {{33, 16, 5, 3}, {2, 1, 0, 0}, {48, 24, 16, 32}, {65, 32, 1, 17}};
  const std::int64_t grids[][3] = {{1, 1, 1}, {2, 1, 5}, {1, 2, 3}, {2, 7, 4}, {1, 13, 11}};
  for (LiftForwardType type : {LiftForwardType::float32, LiftForwardType::bfloat16}) {
    const std::vector<CpuIsa> isas = lift_forward_isas(type);
    if (std::find(isas.begin(), isas.end(), isa) == isas.end()) continue;
    for (const auto& n : channels) {
      for (const auto& grid : grids) run(n, type, isa, grid[0], grid[1], grid[2]);
    }
  }
}

}  // namespace lift_fast
