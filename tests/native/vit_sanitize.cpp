#include <algorithm>
#include <utility>

#include "cpu/vit.hpp"
#include "sanitize.hpp"

namespace lift_fast {
namespace {

struct Case {
  VitSizes sizes;
  std::int64_t depth, batch, prefix, patch, stride, rows, columns, tail;
};

void run(const Case& c, VitType type, CpuIsa isa) {
  const VitSizes& n = c.sizes;
  const std::int64_t inner = n.heads * n.head_dim, values = 3 * c.patch * c.patch,
                     width = type == VitType::float32 ? 4 : 2;
  const auto norm = rows(n.width), qkv = rows(3 * inner * n.width), qkv_bias = rows(3 * inner);
  const auto proj = rows(n.width * inner), fc1 = rows(n.hidden * n.width), fc1_bias = rows(n.hidden);
  const auto fc2 = rows(n.width * n.hidden), patch = rows(n.width * values), last = rows(c.tail * n.width);
  const auto prefix = rows(c.prefix * n.width), position = rows(c.rows * c.columns * n.width);
  std::vector<std::unique_ptr<char[]>> kept;
  const auto keep = [&](std::int64_t bytes) {
    kept.emplace_back(new char[bytes]());
    return kept.back().get();
  };
  std::vector<VitPacked> blocks;
  for (std::int64_t i = 0; i < c.depth; ++i) {
    const std::int64_t bytes = vit_block_bytes(n, isa);
    char* packed = keep(bytes);
    vit_pack_block({norm.get(), norm.get(), qkv.get(), qkv_bias.get(), proj.get(), norm.get(), i ? norm.get() : nullptr,
                    nullptr, nullptr, fc1.get(), fc1_bias.get(), fc2.get(), nullptr, nullptr, 1e-6f, 1e-5f},
                   n, isa, packed, bytes);
    blocks.push_back({packed, bytes});
  }
  const auto linear = [&](const float* weight, std::int64_t inputs, std::int64_t outputs) {
    const std::int64_t bytes = vit_linear_bytes(inputs, outputs, isa);
    char* packed = keep(bytes);
    vit_pack_linear({nullptr, nullptr, weight, nullptr, 1e-6f}, inputs, outputs, isa, packed, bytes);
    return VitPacked{packed, bytes};
  };
  const VitPacked head = linear(patch.get(), values, n.width);
  const VitPacked tail = c.tail ? linear(last.get(), n.width, c.tail) : VitPacked{nullptr, 0};

  VitCall call{};
  call.sizes = n;
  call.type = type;
  call.batch = c.batch;
  call.prefix = call.skipped = c.prefix;
  call.tokens = c.prefix + c.rows * c.columns;
  call.tail_width = c.tail;
  const std::int64_t height = c.patch + (c.rows - 1) * c.stride, across = c.patch + (c.columns - 1) * c.stride;
  call.images = {keep(c.batch * 3 * height * across * width),
                 height,
                 across,
                 c.patch,
                 c.stride,
                 c.rows,
                 c.columns,
                 prefix.get(),
                 position.get()};
  call.y = keep(c.batch * c.rows * c.columns * (c.tail ? c.tail : n.width) * width);
  for (int threads : {1, 3}) {
    call.threads = threads;
    vit_run(call, head, blocks, tail, isa);
  }
  call.x = keep(c.batch * call.tokens * n.width * width);
  vit_run(call, head, blocks, tail, isa);
}

}  // namespace

void sanitize(CpuIsa isa) {
  const Case cases[] = {{{32, 1, 32, 32}, 1, 1, 1, 1, 1, 1, 1, 0},  {{64, 2, 32, 96}, 2, 2, 1, 2, 2, 3, 5, 64},
                        {{32, 3, 20, 64}, 1, 3, 0, 5, 3, 7, 1, 32}, {{96, 2, 48, 32}, 0, 1, 5, 3, 1, 2, 2, 32},
                        {{32, 1, 7, 32}, 1, 1, 2, 1, 1, 5, 211, 0}, {{32, 2, 16, 32}, 2, 9, 1, 2, 1, 4, 7, 0}};
  for (VitType type : {VitType::float32, VitType::bfloat16}) {
    const std::vector<CpuIsa> isas = vit_isas(type);
    if (std::find(isas.begin(), isas.end(), isa) == isas.end()) continue;
    for (const Case& c : cases) run(c, type, isa);
  }
}

}  // namespace lift_fast
