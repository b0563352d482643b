// What the image encoder's kernels are launched with, and where everything lies in a block's shared memory.
#pragma once

#include <cstdint>

#include "image_encoder_operands.cuh"
#include "image_encoder_tiling.hpp"

namespace lift_fast {

constexpr int kEncoderChannels = 32;
constexpr int kEncoderMaxWarps = 8;
constexpr int kStripPixels = 64;
constexpr int kStepRows = 9;  // image rows under a step's new rows of the first convolution; the first one twice
constexpr int kBiases = 96;
constexpr std::uint32_t kSameBytes = 0x3210;  // selects the bytes of its first word as they are
constexpr int kLines = 3 * kStepRows;
constexpr int kPart = 4 * 32 * 8;  // values of one tap's weights

struct EncoderParams {
  const void* imgs;
  std::int64_t stride[4];  // in elements
  const void* packed;
  const float* bias;
  void* f;
  void* g;
  int h, w;
  int columns_first, columns;  // f columns that the first, and each further, block of a row owns
  int column_blocks, row_blocks;
  int rows;           // g rows of a block
  int strips, steps;  // of a block; steps only with spread
  std::uint32_t same;  // kSameBytes
  bool aligned;        // 8 pixels of a row can be copied as they lie
};

inline EncoderParams encoder_params(const ImageEncoderCall& call, const EncoderTiling& tiling) {
  EncoderParams params{};
  params.imgs = call.imgs;
  for (int i = 0; i < 4; ++i) params.stride[i] = call.stride[i];
  params.packed = call.packed;
  params.bias = call.bias;
  params.f = call.f;
  params.g = call.g;
  params.h = static_cast<int>(call.h);
  params.w = static_cast<int>(call.w);
  params.columns_first = tiling.columns_first;
  params.columns = tiling.columns;
  params.column_blocks = static_cast<int>(tiling.column_blocks);
  params.row_blocks = static_cast<int>(tiling.row_blocks);
  params.rows = static_cast<int>(tiling.rows);
  params.strips = tiling.strips;
  params.steps = tiling.steps;
  params.same = kSameBytes;
  params.aligned = encoder_rows_aligned(call);
  return params;
}

// Where everything lies in a block's shared memory, in bytes.
template <class T, bool kPool, bool kSpread>
struct EncoderLayout {
  static constexpr int kScale = kPool ? 8 : 4;                 // image columns per f column
  static constexpr int kStripColumns = kStripPixels / kScale;  // f columns of a strip
  static constexpr int kPerStep = kPool ? 1 : 2;               // f rows of a step
  static constexpr int kRing = kPool ? 4 : 5;                  // f rows of a step and of the windows behind it
  static constexpr int kChunk = 8 * T::kItem;  // 8 pixels, or a lane's share of one position's channels
  static constexpr int kParts = kSpread ? 18 : 9;  // taps whose weights lie here
  static constexpr int kLinesBefore = 6;  // image lines before the first step's

  __host__ __device__ static constexpr int warps(int strips, int steps) { return kSpread ? strips * steps : strips; }
  __host__ __device__ static constexpr int chunks(int strips) { return 1 + strips * kStripPixels / 8; }
  // Distance of image lines: 8 more than a multiple of 32 words, so that four lines lie in different banks.
  __host__ __device__ static constexpr int pitch(int strips) {
    return chunks(strips) * kChunk + (T::kItem == 2 ? 16 : 0);
  }
  __host__ __device__ static constexpr int ring_row(int strips) { return strips * kStripColumns * 4 * kChunk; }
  __host__ __device__ static constexpr int ring_rows(int steps) { return kSpread ? kPerStep * steps : kRing; }
  // With spread all image rows, else those of two steps in turn.
  __host__ __device__ static constexpr int lines(int steps) {
    return kSpread ? kLinesBefore + 3 + 24 * steps : 2 * kLines;
  }

  __host__ __device__ static constexpr int bias() { return kParts * kPart * T::kItem; }
  __host__ __device__ static constexpr int halo() { return bias() + kBiases * 4; }
  __host__ __device__ static constexpr int ring(int strips, int steps) {
    return halo() + warps(strips, steps) * 8 * 4 * kChunk;
  }
  __host__ __device__ static constexpr int image_lines(int strips, int steps) {
    return ring(strips, steps) + ring_rows(steps) * ring_row(strips);
  }
  __host__ __device__ static constexpr int total(int strips, int steps) {
    return image_lines(strips, steps) + lines(steps) * pitch(strips);
  }
};

// Bytes of shared memory that a block of some tiling needs.
template <class T>
std::int64_t encoder_shared(bool pool, const EncoderTiling& tiling) {
  const bool spread = tiling.cut == EncoderCut::spread;
  const auto total = pool ? (spread ? EncoderLayout<T, true, true>::total : EncoderLayout<T, true, false>::total)
                          : (spread ? EncoderLayout<T, false, true>::total : EncoderLayout<T, false, false>::total);
  return total(tiling.strips, tiling.steps);
}

inline EncoderTiling encoder_tiling_of(const ImageEncoderCall& call, const EncoderDevice& device) {
  const bool wide = call.type == EncoderType::tf32;
  const int blocks = wide ? Tf32Operands::kBlocks : Bfloat16Operands::kBlocks;
  return encoder_tiling(call, device, kEncoderMaxWarps, blocks, [&](const EncoderTiling& tiling) {
    return wide ? encoder_shared<Tf32Operands>(call.pool, tiling) : encoder_shared<Bfloat16Operands>(call.pool, tiling);
  });
}

}  // namespace lift_fast
