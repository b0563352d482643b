#include <immintrin.h>

#include <cstdint>

namespace lift_fast {
namespace {

struct Isa {
  typedef float Vec __attribute__((vector_size(64)));
  static constexpr int lanes = 16;
  static void stream(float* p, Vec v) { _mm512_stream_ps(p, v); }
  static void fence() { _mm_sfence(); }
  static float from_half(std::uint16_t bits) { return _cvtsh_ss(bits); }
  static std::uint16_t to_half(float value) { return _cvtss_sh(value, _MM_FROUND_TO_NEAREST_INT); }
};

}  // namespace
}  // namespace lift_fast

#include "cosine_loss_kernel.hpp"

namespace lift_fast {
void cosine_loss_kernel_avx512(const CosineLossCall& call, const CosineLossWork& work) { run_cosine_loss(call, work); }
}  // namespace lift_fast
