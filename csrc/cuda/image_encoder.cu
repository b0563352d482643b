#include "image_encoder.cuh"
#include "launch.hpp"

namespace lift_fast {
namespace {

constexpr const char* kName = "image_encoder";

ReadyKernels& kernels() {
  static ReadyKernels ready(kName, image_encoder_kernel<Bfloat16Operands, true>,
                            image_encoder_kernel<Bfloat16Operands, false>, image_encoder_kernel<Float16Operands, true>,
                            image_encoder_kernel<Float16Operands, false>, image_encoder_kernel<Tf32Operands, true>,
                            image_encoder_kernel<Tf32Operands, false>);
  return ready;
}

template <class T, bool kPool>
void launch(const ImageEncoderCall& call, const DeviceFacts& device, cudaStream_t stream) {
  const EncoderTiling tiling = encoder_tiling(
      call, {device.multiprocessors, device.shared_block, device.shared_multiprocessor}, kEncoderMaxWarps, T::kBlocks,
      [](int warps) { return std::int64_t{EncoderLayout<T, kPool>::total(warps)}; });
  const auto blocks = static_cast<unsigned>(call.batch * tiling.column_blocks * tiling.row_blocks);
  image_encoder_kernel<T, kPool><<<blocks, 32 * tiling.warps, static_cast<std::size_t>(tiling.shared), stream>>>(
      encoder_params(call, tiling));
  succeed(cudaGetLastError(), kName, "the launch");
}

}  // namespace

void image_encoder_prepare(int device) {
  const DeviceGuard guard(device, kName);
  kernels().on(device);
}

void image_encoder_run(const ImageEncoderCall& call, int device, void* stream) {
  check_encoder_call(call);
  if (call.batch == 0 || call.h == 0 || call.w == 0) return;
  const DeviceGuard guard(device, kName);
  const DeviceFacts& facts = kernels().on(device);
  const auto queue = static_cast<cudaStream_t>(stream);
  switch (call.type) {
    case EncoderType::bfloat16:
      return call.pool ? launch<Bfloat16Operands, true>(call, facts, queue)
                       : launch<Bfloat16Operands, false>(call, facts, queue);
    case EncoderType::float16:
      return call.pool ? launch<Float16Operands, true>(call, facts, queue)
                       : launch<Float16Operands, false>(call, facts, queue);
    case EncoderType::tf32:
      return call.pool ? launch<Tf32Operands, true>(call, facts, queue)
                       : launch<Tf32Operands, false>(call, facts, queue);
  }
}

}  // namespace lift_fast
