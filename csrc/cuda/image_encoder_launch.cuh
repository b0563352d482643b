// Launches of the image encoder's kernels; each source that includes this compiles the kernels of one cut.
#pragma once

#include "image_encoder.cuh"
#include "launch.hpp"

namespace lift_fast {

constexpr const char* kEncoderName = "image_encoder";

template <EncoderCut kCut>
ReadyKernels& encoder_kernels() {
  static ReadyKernels ready(
      kEncoderName, image_encoder_kernel<Bfloat16Operands, true, kCut>,
      image_encoder_kernel<Bfloat16Operands, false, kCut>, image_encoder_kernel<Float16Operands, true, kCut>,
      image_encoder_kernel<Float16Operands, false, kCut>, image_encoder_kernel<Tf32Operands, true, kCut>,
      image_encoder_kernel<Tf32Operands, false, kCut>);
  return ready;
}

template <class T, EncoderCut kCut>
void encoder_launch_type(const ImageEncoderCall& call, const EncoderTiling& tiling, cudaStream_t stream) {
  const auto kernel = call.pool ? image_encoder_kernel<T, true, kCut> : image_encoder_kernel<T, false, kCut>;
  const auto blocks = static_cast<unsigned>(call.batch * tiling.column_blocks * tiling.row_blocks);
  kernel<<<blocks, 32 * tiling.warps, static_cast<std::size_t>(tiling.shared), stream>>>(encoder_params(call, tiling));
  succeed(cudaGetLastError(), kEncoderName, "the launch");
}

// The device must be current, and its kernels ready.
template <EncoderCut kCut>
void encoder_launch(const ImageEncoderCall& call, const EncoderTiling& tiling, cudaStream_t stream) {
  switch (call.type) {
    case EncoderType::bfloat16: return encoder_launch_type<Bfloat16Operands, kCut>(call, tiling, stream);
    case EncoderType::float16: return encoder_launch_type<Float16Operands, kCut>(call, tiling, stream);
    case EncoderType::tf32: return encoder_launch_type<Tf32Operands, kCut>(call, tiling, stream);
  }
}

// Each in a source of its own, so that they compile at the same time.
void stream_encoder_prepare(int device);
void stream_encoder_launch(const ImageEncoderCall& call, const EncoderTiling& tiling, cudaStream_t stream);
void spread_encoder_prepare(int device);
void spread_encoder_launch(const ImageEncoderCall& call, const EncoderTiling& tiling, cudaStream_t stream);

}  // namespace lift_fast
