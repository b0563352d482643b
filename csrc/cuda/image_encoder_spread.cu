#include "image_encoder_launch.cuh"

namespace lift_fast {

void spread_encoder_prepare(int device) { encoder_kernels<EncoderCut::spread>().on(device); }

void spread_encoder_launch(const ImageEncoderCall& call, const EncoderTiling& tiling, cudaStream_t stream) {
  encoder_launch<EncoderCut::spread>(call, tiling, stream);
}

}  // namespace lift_fast
