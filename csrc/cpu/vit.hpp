// A plain Vision Transformer on the CPU, from pixels or tokens to the tokens or one linear projection of them.
//
//   x = [prefix, patches @ patch_weights + patch_bias + position]      unless tokens are given
//   for each block:  x += gain1 * (attention(norm1(x)) @ proj + proj_bias)
//                    x += gain2 * (gelu(norm2(x) @ fc1 + fc1_bias) @ fc2 + fc2_bias)
//   y = norm(x) @ tail + tail_bias                                     or x itself
//
// One pass over each block: a thread takes some rows of tokens through attention, projection and MLP to the next block's
// queries, keys and values, all in its L2 cache. Tokens between blocks and all sums are float32; with bfloat16 arithmetic
// the operands of products are bfloat16. Results depend neither on the number of threads nor on the batch.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "isa.hpp"
#include "stop.hpp"

namespace lift_fast {

enum class VitType : std::int32_t { float32 = 0, bfloat16 = 1 };

// Channels of operands are padded to whole K blocks and panels: all of these are multiples of it.
constexpr std::int64_t kVitUnit = 32;

struct VitSizes {
  std::int64_t width;  // C, a multiple of kVitUnit
  std::int64_t heads;
  std::int64_t head_dim;  // of one head; padded to padded_dim
  std::int64_t hidden;  // of the MLP, a multiple of kVitUnit
};
// Not shared between instruction sets.
namespace {
constexpr std::int64_t vit_padded_dim(const VitSizes& n) { return (n.head_dim + kVitUnit - 1) / kVitUnit * kVitUnit; }
}  // namespace

// Packed parts, in 32-bit words from the end of the header. A matrix is followed panel by panel, see gemm.hpp.
struct VitBlockLayout {
  std::int64_t epsilon1, epsilon2;
  std::int64_t norm1, norm2;  // weights, then biases
  std::int64_t qkv_gain, qkv_bias, qkv;
  std::int64_t proj_gain, proj_bias, proj;
  std::int64_t fc1_bias, fc1;
  std::int64_t fc2_gain, fc2_bias, fc2;
  std::int64_t end;
};
// A matrix with a bias, and the LayerNorm before it: the tail, and the patch embedding (whose norm is unused).
struct VitLinearLayout {
  std::int64_t epsilon, norm, bias, matrix, end;
};

VitBlockLayout vit_block_layout(const VitSizes& sizes, CpuIsa isa);
VitLinearLayout vit_linear_layout(std::int64_t inputs, std::int64_t outputs, CpuIsa isa);

// Addresses of contiguous float32 arrays, matrices [outputs, inputs]; biases and gains may be null.
struct VitBlockWeights {
  const float *norm1, *norm1_bias, *qkv, *qkv_bias, *proj, *proj_bias, *gain1;
  const float *norm2, *norm2_bias, *fc1, *fc1_bias, *fc2, *fc2_bias, *gain2;
  float epsilon1, epsilon2;
};
struct VitLinearWeights {
  const float *norm, *norm_bias, *matrix, *bias;
  float epsilon;
};

struct VitImages {
  const void* data;  // [batch, 3, height, width] of the call's type
  std::int64_t height, width, patch, stride, rows, columns;
  const float* prefix;  // [prefix tokens, C], with their position
  const float* position;  // [rows * columns, C]
};

struct VitCall {
  const void* x;  // [batch, tokens, C], or null with images
  VitImages images;  // unused with x
  const float* head;  // packed patch embedding
  const float* const* blocks;  // packed blocks
  const float* tail;  // packed tail, or null
  void* y;  // [batch, tokens - skipped, C or tail_width]
  std::int64_t batch, tokens;  // tokens of one image
  std::int64_t prefix;  // tokens before the patches, with images
  std::int64_t skipped;  // first tokens of each image that y lacks
  std::int64_t depth, tail_width;
  VitSizes sizes;
  VitBlockLayout layout;
  VitLinearLayout head_layout, tail_layout;
  VitType type;
  int threads;
  Stop* stop;
};

// The sets that this CPU and build can run, best first; for float32 without bfloat16 arithmetic.
std::vector<CpuIsa> vit_isas(VitType type);
CpuIsa vit_isa(const std::string& name, VitType type);
VitType vit_type(const std::string& name);

std::int64_t vit_block_bytes(const VitSizes& sizes, CpuIsa isa);
void vit_pack_block(const VitBlockWeights& weights, const VitSizes& sizes, CpuIsa isa, void* packed,
                    std::int64_t bytes);
std::int64_t vit_linear_bytes(std::int64_t inputs, std::int64_t outputs, CpuIsa isa);
void vit_pack_linear(const VitLinearWeights& weights, std::int64_t inputs, std::int64_t outputs, CpuIsa isa,
                     void* packed, std::int64_t bytes);

// A packed buffer, checked by its header before it is read.
struct VitPacked {
  const void* data;
  std::int64_t bytes;
};
void vit_run(VitCall call, const VitPacked& head, const std::vector<VitPacked>& blocks, const VitPacked& tail,
             CpuIsa isa);

struct VitKernel {
  void (*run)(const VitCall& call);
};

}  // namespace lift_fast
