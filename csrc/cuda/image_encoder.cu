#include "image_encoder.cuh"

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

namespace lift_fast {
namespace {

void succeed(cudaError_t error, const char* step) {
  if (error == cudaSuccess) return;
  // Clears the error, so that the next user of the runtime does not meet it.
  (void)cudaGetLastError();
  throw std::runtime_error(std::string("image_encoder: ") + step + ": " + cudaGetErrorString(error));
}

// Makes a device current, and the previous one again at the end.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    succeed(cudaGetDevice(&previous_), "the current device");
    if (device != previous_) {
      succeed(cudaSetDevice(device), "the device cannot be chosen");
      changed_ = true;
    }
  }
  ~DeviceGuard() {
    if (changed_) (void)cudaSetDevice(previous_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int previous_ = 0;
  bool changed_ = false;
};

int attribute(cudaDeviceAttr name, int device) {
  int value = 0;
  succeed(cudaDeviceGetAttribute(&value, name, device), "a device attribute");
  return value;
}

template <class T, bool kPool>
void launch(const ImageEncoderCall& call, int device, cudaStream_t stream) {
  const EncoderDevice about{attribute(cudaDevAttrMultiProcessorCount, device),
                            attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device),
                            attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor, device)};
  const EncoderTiling tiling =
      encoder_tiling(call, about, kEncoderMaxWarps, T::kBlocks,
                     [](int warps) { return std::int64_t{EncoderLayout<T, kPool>::total(warps)}; });
  const auto kernel = image_encoder_kernel<T, kPool>;
  const int shared = static_cast<int>(tiling.shared);
  succeed(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared), "shared memory");
  const auto blocks = static_cast<unsigned>(call.batch * tiling.column_blocks * tiling.row_blocks);
  kernel<<<blocks, 32 * tiling.warps, shared, stream>>>(encoder_params(call, tiling));
  succeed(cudaGetLastError(), "the launch");
}

}  // namespace

void image_encoder_run(const ImageEncoderCall& call, int device, void* stream) {
  check_encoder_call(call);
  if (call.batch == 0 || call.h == 0 || call.w == 0) return;
  const DeviceGuard guard(device);
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
