// LiFT's decoder on the CPU: everything after the image encoder, BatchNorm folded. NHWC throughout.
//
//   u = relu(phases(coarse) + conv3x3(f) + edge_bias)   coarse = [x, g] on h x w, f and u on 2h x 2w
//   v = relu(conv3x3(u) + conv_bias)
//   y = v @ out + out_bias
//
// Both spatial stages run as minimal-filtering (Winograd) GEMMs on blocks of tiles whose scratch stays in the L2
// cache while the weights stream past; v never reaches memory. A NaN or infinity in an input therefore reaches every
// output of the tiles that read it, a few pixels more than in a direct convolution.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "isa.hpp"

namespace lift_fast {

enum class LiftForwardType : std::int32_t { float32 = 0, bfloat16 = 1 };

struct LiftForwardChannels {
  std::int64_t tokens;  // C: channels of x and y
  std::int64_t hidden;  // c: channels of u and v
  std::int64_t coarse;  // G: channels of g
  std::int64_t fine;    // F: channels of f
};

// Not shared between instruction sets.
namespace {

// Minimal filtering of the phases' two taps in one dimension, `tile` outputs from tile + 1 points: point 0 multiplies
// tap 0, the last point tap 1, the points between them both.
constexpr bool phase_tap(int points, int point, int tap) { return point != (tap == 0 ? points - 1 : 0); }
// Sub-row r of f meets tap p of phase a at row 2p + r - (1 - a) of the 3x3 kernel, if there is such a row.
constexpr int fine_row(int phase, int tap, int sub) { return 2 * tap + sub - (1 - phase); }
constexpr bool fine_needed(int phase, int points, int point, int sub) {
  for (int tap = 0; tap < 2; ++tap) {
    const int row = fine_row(phase, tap, sub);
    if (phase_tap(points, point, tap) && row >= 0 && row < 3) return true;
  }
  return false;
}

}  // namespace

// Layout of a packed buffer. All offsets and sizes in 32-bit words; a word holds one float32 weight or two bfloat16
// weights of neighbouring input channels. A K block is 16 words: one cache line of activations.
struct LiftForwardLayout {
  std::int64_t panel;         // output channels of a micro-kernel
  std::int64_t block;         // input channels of a K block
  std::int64_t phase_tile;    // 3: F(3x3, 2x2) for each phase
  std::int64_t conv_tile;     // 4: F(4x4, 3x3); 2: F(2x2, 3x3)
  std::int64_t hidden_width;  // c rounded up to whole panels and K blocks
  std::int64_t token_blocks, coarse_blocks, fine_blocks, hidden_blocks;
  std::int64_t coarse_side_blocks;  // tokens and coarse
  std::int64_t phase_blocks;        // and the four sub-pixels of fine
  std::int64_t hidden_panels, token_panels;
  std::int64_t phase_panel_words;  // one (phase, panel): its points one after the other
  std::int64_t conv_panel_words;
  std::int64_t out_panel_words;
  std::int64_t edge_at, phase_at, conv_bias_at, conv_at, out_bias_at, out_at, end;
};

LiftForwardLayout lift_forward_layout(const LiftForwardChannels& channels, CpuIsa isa);

struct LiftForwardWeights {
  const double* phase;      // [2, 2, 2, 2, C + G, c]
  const double* fine;       // [3, 3, F, c]
  const double* edge_bias;  // [3, 3, c]
  const double* conv;       // [3, 3, c, c]
  const double* conv_bias;  // [c]
  const double* out;        // [c, C]
  const double* out_bias;   // [C]
};

struct LiftForwardCall {
  const void* x;
  const void* g;
  const void* f;
  const float* packed;  // after the header
  void* y;
  std::int64_t batch, height, width;  // of the coarse grid
  LiftForwardChannels channels;
  LiftForwardLayout layout;
  LiftForwardType type;
  int threads;
};

// The sets that this CPU and build can run, best first; for float32 without bfloat16 arithmetic.
std::vector<CpuIsa> lift_forward_isas(LiftForwardType type);
CpuIsa lift_forward_isa(const std::string& name, LiftForwardType type);
LiftForwardType lift_forward_type(const std::string& name);

std::int64_t lift_forward_packed_size(const LiftForwardChannels& channels, LiftForwardType type, CpuIsa isa);
void lift_forward_pack(const LiftForwardWeights& weights, const LiftForwardChannels& channels, LiftForwardType type,
                       CpuIsa isa, void* packed, std::int64_t packed_bytes);
void lift_forward_run(LiftForwardCall call, const void* packed, std::int64_t packed_bytes, CpuIsa isa);

struct LiftForwardKernel {
  void (*run)(const LiftForwardCall& call);
};

}  // namespace lift_fast
