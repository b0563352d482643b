// 1 - cosine of two vectors at each position, and its gradient, in one pass over memory: a tile of positions is read
// once and stays in the cache for the second sweep, which writes the gradient.
#pragma once

#include <cstdint>

#include "isa.hpp"

namespace lift_fast {

enum class CosineLossType : std::int32_t { float32 = 0, bfloat16 = 1, float16 = 2 };

// Strides in elements, of the dimensions outer, channel and inner.
struct CosineLossLayout {
  std::int64_t outer, channel, inner;
};

struct CosineLossCall {
  const void* prediction;  // [outer, c, inner]
  const void* target;      // [outer, c, inner]
  CosineLossType type;     // of prediction, target and gradient
  CosineLossLayout prediction_layout, target_layout, gradient_layout;
  std::int64_t outer, c, inner;
  float weight;    // the gradient's factor
  const float* upstream;  // [outer, inner], another factor of each position's gradient, or null
  float* loss;     // [outer, inner]
  void* gradient;  // [outer, c, inner], or null
  int threads;
};

// Throws std::invalid_argument for invalid sizes or addresses, std::bad_alloc.
void cosine_loss_run(const CosineLossCall& call, CpuIsa isa);

// `scratch` holds `scratch_words` floats for each thread.
struct CosineLossWork {
  float* scratch;
  std::int64_t scratch_words;
  std::int64_t positions;  // that a kernel takes at one time if they lie side by side
  bool stream;             // write the gradient past the caches
};
struct CosineLossKernel {
  void (*run)(const CosineLossCall& call, const CosineLossWork& work);
};

}  // namespace lift_fast
