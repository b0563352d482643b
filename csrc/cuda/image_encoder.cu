#include "image_encoder_launch.cuh"

namespace lift_fast {
namespace {

const DeviceFacts& ready(int device) {
  stream_encoder_prepare(device);
  spread_encoder_prepare(device);
  return encoder_kernels<EncoderCut::walk>().on(device);
}

// A call's tiling, kept for equal calls that follow: finding it takes longer than the launch.
const EncoderTiling& tiling_of(const ImageEncoderCall& call, int device, const DeviceFacts& facts) {
  struct Found {
    int device = -1;
    ImageEncoderCall call{};
    EncoderTiling tiling{};
  };
  thread_local Found latest;
  const ImageEncoderCall& last = latest.call;
  if (device != latest.device || call.batch != last.batch || call.h != last.h || call.w != last.w ||
      call.pool != last.pool || call.type != last.type || call.cut != last.cut) {
    latest.device = -1;
    latest.tiling = encoder_tiling_of(call, {facts.multiprocessors, facts.shared_block, facts.shared_multiprocessor});
    latest.call = call;
    latest.device = device;
  }
  return latest.tiling;
}

}  // namespace

void image_encoder_prepare(int device) {
  const DeviceGuard guard(device, kEncoderName);
  ready(device);
}

void image_encoder_run(const ImageEncoderCall& call, int device, void* stream) {
  check_encoder_call(call);
  if (call.batch == 0 || call.h == 0 || call.w == 0) return;
  const DeviceGuard guard(device, kEncoderName);
  const DeviceFacts& facts = ready(device);
  const EncoderTiling& tiling = tiling_of(call, device, facts);
  const auto queue = static_cast<cudaStream_t>(stream);
  switch (call.cut) {
    case EncoderCut::walk: return encoder_launch<EncoderCut::walk>(call, tiling, queue);
    case EncoderCut::stream: return stream_encoder_launch(call, tiling, queue);
    case EncoderCut::spread: return spread_encoder_launch(call, tiling, queue);
  }
}

}  // namespace lift_fast
