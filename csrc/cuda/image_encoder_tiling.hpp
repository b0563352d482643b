// What a call of the image encoder needs before a device: checks of its arguments, and its blocks.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <stdexcept>
#include <string>

#include "image_encoder.hpp"

namespace lift_fast {

inline int encoder_itemsize(EncoderType type) { return type == EncoderType::tf32 ? 4 : 2; }

inline EncoderType encoder_type(const std::string& name) {
  if (name == "bfloat16") return EncoderType::bfloat16;
  if (name == "float16") return EncoderType::float16;
  if (name == "float32") return EncoderType::tf32;
  throw std::invalid_argument("image_encoder: dtype must be bfloat16, float16 or float32, got " + name);
}

// Throws std::invalid_argument if a pointer, a size or an alignment is impossible.
inline void check_encoder_call(const ImageEncoderCall& call) {
  const auto fail = [](const std::string& what) { throw std::invalid_argument("image_encoder: " + what); };
  constexpr std::int64_t kSide = std::int64_t{1} << 24, kElements = std::int64_t{1} << 58;
  if (call.batch < 0 || call.h < 0 || call.w < 0) {
    fail("sizes must not be negative, got " + std::to_string(call.batch) + " images of " + std::to_string(call.h) +
         " x " + std::to_string(call.w) + " cells");
  }
  if (call.h > kSide || call.w > kSide || call.batch > std::numeric_limits<std::int32_t>::max()) {
    fail("too large: " + std::to_string(call.batch) + " images of " + std::to_string(call.h) + " x " +
         std::to_string(call.w) + " cells");
  }
  if (call.batch == 0 || call.h == 0 || call.w == 0) return;
  // f has the most elements.
  if (call.h * call.w > kElements / 128 / call.batch) fail("f would have more than 2^58 elements");
  const std::int64_t pixels = call.pool ? 16 : 8;
  const std::int64_t sizes[4] = {call.batch, 3, pixels * call.h, pixels * call.w};
  std::int64_t reach = 0;
  for (int i = 0; i < 4; ++i) {
    const std::int64_t stride = call.stride[i], steps = sizes[i] - 1;
    if (stride < -kElements || stride > kElements) fail("stride " + std::to_string(stride) + " is out of range");
    const std::int64_t width = stride < 0 ? -stride : stride;
    if (steps > 0 && width > (kElements - reach) / steps) fail("the strides reach beyond 2^58 elements");
    reach += steps * width;
  }
  const auto check = [&](const void* pointer, const char* name, std::uintptr_t alignment) {
    if (pointer == nullptr) fail(std::string(name) + " is null");
    if (reinterpret_cast<std::uintptr_t>(pointer) % alignment != 0) {
      fail(std::string(name) + " must be aligned to " + std::to_string(alignment) + " bytes");
    }
  };
  check(call.imgs, "imgs", static_cast<std::uintptr_t>(encoder_itemsize(call.type)));
  check(call.packed, "packed", 16);
  check(call.bias, "bias", 4);
  check(call.f, "f", 16);
  check(call.g, "g", 16);
}

// Whether 8 pixels of a row are contiguous and aligned in every row, so that they can be copied as they are.
inline bool encoder_rows_aligned(const ImageEncoderCall& call) {
  const std::int64_t pixels = 16 / encoder_itemsize(call.type);
  const bool aligned_images = call.batch == 1 || call.stride[0] % pixels == 0;
  return reinterpret_cast<std::uintptr_t>(call.imgs) % 16 == 0 && call.stride[3] == 1 && aligned_images &&
         call.stride[1] % pixels == 0 && call.stride[2] % pixels == 0;
}

inline EncoderCut encoder_cut(const std::string& name) {
  if (name == "walk") return EncoderCut::walk;
  if (name == "stream") return EncoderCut::stream;
  if (name == "spread") return EncoderCut::spread;
  throw std::invalid_argument("image_encoder: cut must be walk, stream or spread, got " + name);
}

// A call's tiling into blocks of a number of strips, each of a number of g rows.
inline EncoderTiling encoder_blocks(const ImageEncoderCall& call, int strips, std::int64_t rows) {
  const int first = (call.pool ? 8 : 16) * strips, further = first - 2;
  const std::int64_t columns = 2 * call.w;
  EncoderTiling tiling{};
  tiling.cut = call.cut;
  tiling.strips = strips;
  tiling.columns_first = first;
  tiling.columns = further;
  tiling.column_blocks = columns <= first ? 1 : 1 + (columns - first + further - 1) / further;
  tiling.row_blocks = (call.h + rows - 1) / rows;
  tiling.rows = rows;
  // With pool a step makes half of the f rows that a g row needs, else all. One more step makes the f row above the
  // block's own rows.
  tiling.all_steps = (call.pool ? 2 : 1) * rows + (tiling.row_blocks > 1 ? 1 : 0);
  tiling.steps = call.cut == EncoderCut::spread ? static_cast<int>(tiling.all_steps) : 1;
  tiling.warps = strips * tiling.steps;
  return tiling;
}

// The tiling of a cut with the least predicted time. A multiprocessor's registers hold `max_blocks` blocks, with spread
// one; `shared(tiling)` returns the bytes of shared memory that a block needs.
template <class Shared>
EncoderTiling encoder_tiling(const ImageEncoderCall& call, const EncoderDevice& device, int max_warps, int max_blocks,
                             Shared shared) {
  const bool spread = call.cut == EncoderCut::spread;
  EncoderTiling best{};
  double least = std::numeric_limits<double>::infinity();
  const auto consider = [&](EncoderTiling tiling) {
    tiling.shared = shared(tiling);
    const std::int64_t image_blocks = tiling.column_blocks * tiling.row_blocks;
    if (tiling.shared > device.shared_block || image_blocks > std::numeric_limits<std::int32_t>::max() / call.batch)
      return;
    const std::int64_t here = (call.batch * image_blocks + device.multiprocessors - 1) / device.multiprocessors;
    // CUDA keeps 1 KB of every block for itself.
    const std::int64_t fitting = device.shared_multiprocessor / (tiling.shared + 1024);
    const std::int64_t resident = std::clamp<std::int64_t>(fitting, 1, spread ? 1 : max_blocks);
    const std::int64_t together = std::min(resident, here);
    const auto turns = static_cast<double>((here + together - 1) / together);
    // A multiprocessor has four tensor cores; the half is the time that one warp waits for its own results.
    const double busy = std::max(1.0, static_cast<double>(together * tiling.warps) / 4) + 0.5;
    const auto rows = static_cast<double>(tiling.all_steps);
    // The row above a step takes a third of a step, and reading the weights takes about as long as one.
    const double steps = spread ? 2.3 : rows + 1;
    // A block copies the same amount for any number of warps.
    const double time = turns * (steps * busy + (rows + 5) / (2 * tiling.warps));
    if (time < least) {
      least = time;
      best = tiling;
    }
  };
  if (!spread) {
    for (int strips = 1; strips <= max_warps; ++strips) {
      for (std::int64_t rows = 1;; rows = std::min(rows < 16 ? rows + 1 : 2 * rows, call.h)) {
        consider(encoder_blocks(call, strips, rows));
        if (rows == call.h) break;
      }
    }
  } else {
    for (int strips = 1; strips <= max_warps; ++strips) {
      for (std::int64_t rows = 1; rows <= call.h; ++rows) {
        const EncoderTiling tiling = encoder_blocks(call, strips, rows);
        if (tiling.warps > max_warps) break;
        consider(tiling);
      }
    }
  }
  if (best.warps == 0) {
    throw std::invalid_argument("image_encoder: too large for one launch: " + std::to_string(call.batch) +
                                " images of " + std::to_string(call.h) + " x " + std::to_string(call.w) + " cells");
  }
  return best;
}

}  // namespace lift_fast
