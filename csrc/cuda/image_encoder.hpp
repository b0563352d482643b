// LiFT's image encoders in one pass over the image: f on the fine and g on the coarse grid.
#pragma once

#include <cstdint>

namespace lift_fast {

enum class EncoderType { bfloat16, float16, tf32 };

// How a block's warps share its work: each walks down a strip of the image, two rows of the second convolution at a
// time or (stream) one after the other in shorter code; or (spread) each makes one step of such a walk.
enum class EncoderCut { walk, stream, spread };

struct ImageEncoderCall {
  const void* imgs;        // [batch, 3, s h, s w], s = 16 with pool, else 8; elements of `type`, of any strides
  std::int64_t stride[4];  // in elements: image, channel, row, column
  const void* packed;      // kEncoderWeights elements of `type`
  const float* bias;       // [3, 32]
  void* f;                 // [batch, 2h, 2w, 32]
  void* g;                 // [batch, h, w, 32]
  std::int64_t batch, h, w;
  bool pool;
  EncoderType type;
  EncoderCut cut;
};

// The three convolutions' weights in the order in which a warp's lanes hold them as operands of the tensor cores:
// [1 + 9 + 9 parts][4 output octets][32 lanes][8 values]; lift_fast/ops/lift_forward/image_encoder_cuda.py fills it.
constexpr std::int64_t kEncoderWeights = (1 + 9 + 9) * 4 * 32 * 8;

// How a call is cut into blocks.
struct EncoderTiling {
  EncoderCut cut;
  int strips, steps;     // of a block, side by side; one step except with spread
  std::int64_t all_steps;
  int warps;             // one for each strip and step
  int columns_first;     // f columns that the first block of a row owns
  int columns;           // f columns that each further block owns
  std::int64_t column_blocks, row_blocks;
  std::int64_t rows;     // g rows of a block
  std::int64_t shared;   // bytes of shared memory
};

// What the tiling depends on.
struct EncoderDevice {
  std::int64_t multiprocessors;
  std::int64_t shared_block, shared_multiprocessor;  // bytes of one block at most, and of all together
};

// Loads the kernels on a device; otherwise the first call does. Throws std::runtime_error if CUDA refuses.
void image_encoder_prepare(int device);

// Launches on `stream` of `device` and returns. Throws std::invalid_argument for impossible calls and
// std::runtime_error if CUDA refuses. Allocates nothing, waits for nothing, and keeps the current device.
void image_encoder_run(const ImageEncoderCall& call, int device, void* stream);

}  // namespace lift_fast
