#include "image_encoder_launch.cuh"

namespace lift_fast {

void stream_encoder_prepare(int device) { encoder_kernels<EncoderCut::stream>().on(device); }

void stream_encoder_launch(const ImageEncoderCall& call, const EncoderTiling& tiling, cudaStream_t stream) {
  encoder_launch<EncoderCut::stream>(call, tiling, stream);
}

}  // namespace lift_fast
