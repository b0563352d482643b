#include "cosine_loss.hpp"

#include <stdexcept>
#include <string>

#include "dispatch.hpp"
#include "memory.hpp"

namespace lift_fast {
namespace {

// A gradient larger than the caches is written past them: reading its lines first would cost a third more.
constexpr std::int64_t kStreamBytes = std::int64_t{4} << 20;
// Bytes of the last cache for all threads' tiles of both inputs. Larger tiles read memory in longer pieces: short
// pieces, a page apart, are read at half the speed.
constexpr std::int64_t kTileBytes = std::int64_t{12} << 20;
constexpr std::int64_t kFewestPositions = 128;

// Tiles of nearly equal size, in whole cache lines, several for each thread.
std::int64_t tile_positions(const CosineLossCall& call) {
  const std::int64_t bytes = call.type == CosineLossType::float32 ? 4 : 2;
  const std::int64_t most = kTileBytes / (2 * bytes * (call.c > 0 ? call.c : 1) * call.threads);
  const std::int64_t limit = most > kFewestPositions ? most : kFewestPositions;
  const auto split = [](std::int64_t a, std::int64_t b) { return (a + b - 1) / b; };
  std::int64_t tiles = split(2 * call.threads, call.outer);
  if (tiles > split(call.inner, kFewestPositions)) tiles = split(call.inner, kFewestPositions);
  if (tiles < split(call.inner, limit)) tiles = split(call.inner, limit);
  return split(split(call.inner, tiles), 32) * 32;
}

void require(bool holds, const char* what) {
  if (!holds) throw std::invalid_argument(std::string("cosine_loss: ") + what);
}

}  // namespace

void cosine_loss_run(const CosineLossCall& call, CpuIsa isa) {
  constexpr std::int64_t limit = std::int64_t{1} << 40;
  require(call.outer >= 0 && call.c >= 0 && call.inner >= 0, "sizes must not be negative");
  require(call.outer < limit && call.c < (std::int64_t{1} << 31) && call.inner < limit, "sizes are too large");
  require(call.outer == 0 || call.inner < (std::int64_t{1} << 60) / call.outer, "sizes are too large");
  require(call.threads >= 1, "threads must be at least 1");
  require(call.type == CosineLossType::float32 || call.type == CosineLossType::bfloat16 ||
              call.type == CosineLossType::float16,
          "unknown element type");
  for (const CosineLossLayout& layout : {call.prediction_layout, call.target_layout, call.gradient_layout}) {
    require(layout.outer >= 0 && layout.channel >= 0 && layout.inner >= 0, "strides must not be negative");
  }
  if (call.outer == 0 || call.inner == 0) return;
  require(call.loss != nullptr, "loss must not be null");
  require(call.c == 0 || (call.prediction != nullptr && call.target != nullptr),
          "prediction and target must not be null");
  CosineLossWork work{};
  const std::int64_t elements = call.outer * call.c * call.inner;
  work.stream = call.gradient != nullptr && call.type == CosineLossType::float32 && elements * 4 >= kStreamBytes;
  work.positions = tile_positions(call);
  // A row of both inputs and of the gradient, or twelve rows of a tile.
  const bool rows = call.prediction_layout.channel == 1 && call.target_layout.channel == 1;
  const std::int64_t words = rows ? 3 * call.c : 12 * work.positions;
  work.scratch_words = (words + 31) / 16 * 16;
  const Memory<float> scratch = allocate<float>(work.scratch_words * call.threads);
  work.scratch = scratch.get();
  Kernels<CosineLossKernel>::of(isa).run(call, work);
}

}  // namespace lift_fast
