#include <cuda_runtime.h>

#include "probe.hpp"

namespace lift_fast {
namespace {

__global__ void report_architecture(int* architecture) {
#if defined(__CUDA_ARCH__)
  *architecture = __CUDA_ARCH__;
#else
  *architecture = 0;
#endif
}

CudaProbe failure(const char* step, cudaError_t error) {
  // Clears the error, so that the next user of the runtime does not meet it.
  (void)cudaGetLastError();
  return {false, std::string(step) + ": " + cudaGetErrorString(error)};
}

}  // namespace

int cuda_runtime_version() { return CUDART_VERSION; }

CudaProbe probe_cuda(int device) {
  int count = 0;
  cudaError_t error = cudaGetDeviceCount(&count);
  if (error != cudaSuccess) return failure("no CUDA device", error);
  if (device < 0 || device >= count) {
    return {false, "CUDA device " + std::to_string(device) + " does not exist, there are " + std::to_string(count)};
  }
  int previous = 0;
  error = cudaGetDevice(&previous);
  if (error == cudaSuccess) error = cudaSetDevice(device);
  if (error != cudaSuccess) return failure("the device cannot be chosen", error);

  int* architecture = nullptr;
  int value = -1;
  error = cudaMalloc(&architecture, sizeof *architecture);
  if (error == cudaSuccess) {
    report_architecture<<<1, 1>>>(architecture);
    error = cudaGetLastError();
    if (error == cudaSuccess) error = cudaMemcpy(&value, architecture, sizeof value, cudaMemcpyDeviceToHost);
    cudaFree(architecture);
  }
  cudaSetDevice(previous);
  if (error != cudaSuccess) return failure("built for " LIFT_FAST_CUDA_ARCHITECTURES ", but a kernel fails", error);
  if (value < 800) return {false, "a kernel ran but wrote " + std::to_string(value) + " for its architecture"};
  return {true, "kernels compiled for compute_" + std::to_string(value / 10) + " run"};
}

}  // namespace lift_fast
