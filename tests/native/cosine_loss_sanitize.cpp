// Several layouts, every bit pattern.
#include "cpu/cosine_loss.hpp"
#include "sanitize.hpp"

namespace lift_fast {
namespace {

// Elements from the first to the last one that a layout names.
std::int64_t extent(const CosineLossLayout& layout, std::int64_t outer, std::int64_t c, std::int64_t inner) {
  if (outer == 0 || c == 0 || inner == 0) return 0;
  return 1 + (outer - 1) * layout.outer + (c - 1) * layout.channel + (inner - 1) * layout.inner;
}

std::unique_ptr<unsigned char[]> block(std::int64_t elements, CosineLossType type) {
  const std::int64_t size = type == CosineLossType::float32 ? 4 : 2;
  std::unique_ptr<unsigned char[]> bytes(new unsigned char[static_cast<std::size_t>(elements * size)]);
  // Every bit pattern comes by: infinities, NaN, subnormal numbers.
  for (std::int64_t i = 0; i < elements * size; ++i) bytes[i] = static_cast<unsigned char>(i * 37 + i / 251);
  return bytes;
}

void run(CpuIsa isa, CosineLossType type, std::int64_t outer, std::int64_t c, std::int64_t inner, int layouts) {
  const CosineLossLayout maps{c * inner, inner, 1}, tokens{c * inner, 1, c}, gaps{2 * c * inner + 1, 2 * inner, 2};
  const CosineLossLayout choice[] = {maps, tokens, gaps};
  CosineLossCall call{};
  call.type = type;
  call.prediction_layout = choice[layouts % 3];
  call.target_layout = choice[layouts / 3 % 3];
  call.gradient_layout = choice[layouts / 9 % 2];
  call.outer = outer;
  call.c = c;
  call.inner = inner;
  call.weight = 0.25f;
  call.threads = 3;
  const auto prediction = block(extent(call.prediction_layout, outer, c, inner), type);
  const auto target = block(extent(call.target_layout, outer, c, inner), type);
  const auto gradient = block(extent(call.gradient_layout, outer, c, inner), type);
  std::unique_ptr<float[]> loss(new float[static_cast<std::size_t>(outer * inner)]);
  call.prediction = prediction.get();
  call.target = target.get();
  call.gradient = layouts % 5 == 4 ? nullptr : gradient.get();
  call.loss = loss.get();
  cosine_loss_run(call, isa);
  for (std::int64_t i = 0; i < outer * inner; ++i) {
    if (loss[i] < -1e-3f || loss[i] > 2.001f) std::abort();
  }
}

}  // namespace

void sanitize(CpuIsa isa) {
  for (CosineLossType type : {CosineLossType::float32, CosineLossType::bfloat16, CosineLossType::float16}) {
    for (std::int64_t outer : {0, 1, 3}) {
      for (std::int64_t c : {0, 1, 7, 33, 64}) {
        for (std::int64_t inner : {0, 1, 5, 17, 128, 131}) {
          for (int layouts = 0; layouts < 18; ++layouts) run(isa, type, outer, c, inner, layouts);
        }
      }
    }
  }
  // Large enough to be written past the caches, from addresses of every alignment.
  for (int layouts : {0, 1, 4, 9, 10}) run(isa, CosineLossType::float32, 2, 97, 5501, layouts);
}

}  // namespace lift_fast
