#include "image_encoder.cuh"
#include "launch.hpp"

namespace lift_fast {
namespace {

constexpr const char* kName = "image_encoder";

template <class T, bool kPool>
void launch(const ImageEncoderCall& call, int device, cudaStream_t stream) {
  const EncoderDevice about{device_attribute(cudaDevAttrMultiProcessorCount, device, kName),
                            device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device, kName),
                            device_attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor, device, kName)};
  const EncoderTiling tiling =
      encoder_tiling(call, about, kEncoderMaxWarps, T::kBlocks,
                     [](int warps) { return std::int64_t{EncoderLayout<T, kPool>::total(warps)}; });
  const auto kernel = image_encoder_kernel<T, kPool>;
  const int shared = static_cast<int>(tiling.shared);
  succeed(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared), kName,
          "shared memory");
  const auto blocks = static_cast<unsigned>(call.batch * tiling.column_blocks * tiling.row_blocks);
  kernel<<<blocks, 32 * tiling.warps, shared, stream>>>(encoder_params(call, tiling));
  succeed(cudaGetLastError(), kName, "the launch");
}

}  // namespace

void image_encoder_run(const ImageEncoderCall& call, int device, void* stream) {
  check_encoder_call(call);
  if (call.batch == 0 || call.h == 0 || call.w == 0) return;
  const DeviceGuard guard(device, kName);
  const auto queue = static_cast<cudaStream_t>(stream);
  switch (call.type) {
    case EncoderType::bfloat16:
      return call.pool ? launch<Bfloat16Operands, true>(call, device, queue)
                       : launch<Bfloat16Operands, false>(call, device, queue);
    case EncoderType::float16:
      return call.pool ? launch<Float16Operands, true>(call, device, queue)
                       : launch<Float16Operands, false>(call, device, queue);
    case EncoderType::tf32:
      return call.pool ? launch<Tf32Operands, true>(call, device, queue)
                       : launch<Tf32Operands, false>(call, device, queue);
  }
}

}  // namespace lift_fast
