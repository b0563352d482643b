#include <cuda_runtime.h>

#include <stdexcept>

#include "dense_match.hpp"
#include "image_encoder.hpp"
#include "launch.hpp"
#include "probe.hpp"

namespace lift_fast {
namespace {

constexpr const char* kName = "the probe";

__device__ int reported_architecture;

__global__ void report_architecture() {
#if defined(__CUDA_ARCH__)
  reported_architecture = __CUDA_ARCH__;
#endif
}

// A stream that neither waits for another one nor makes another one wait.
class OwnStream {
 public:
  OwnStream() { succeed(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), kName, "cannot create a stream"); }
  ~OwnStream() { (void)cudaStreamDestroy(stream); }
  OwnStream(const OwnStream&) = delete;
  OwnStream& operator=(const OwnStream&) = delete;
  cudaStream_t stream = nullptr;
};

// The architecture that a kernel running on the current device was compiled for.
int architecture() {
  const OwnStream own;
  int value = -1;
  report_architecture<<<1, 1, 0, own.stream>>>();
  constexpr const char* kStep = "built for " LIFT_FAST_CUDA_ARCHITECTURES ", but a kernel fails";
  succeed(cudaGetLastError(), kName, kStep);
  succeed(cudaMemcpyFromSymbolAsync(&value, reported_architecture, sizeof value, 0, cudaMemcpyDeviceToHost, own.stream),
          kName, kStep);
  succeed(cudaStreamSynchronize(own.stream), kName, kStep);
  return value;
}

}  // namespace

int cuda_runtime_version() { return CUDART_VERSION; }

CudaProbe probe_cuda(int device) {
  try {
    int count = 0;
    succeed(cudaGetDeviceCount(&count), kName, "no CUDA device");
    if (device < 0 || device >= count) {
      return {false, "CUDA device " + std::to_string(device) + " does not exist, there are " + std::to_string(count)};
    }
    // An operator's first call may come while its stream is being captured.
    const CaptureTolerated tolerated;
    const DeviceGuard guard(device, kName);
    const int value = architecture();
    if (value < 800) return {false, "a kernel ran but wrote " + std::to_string(value) + " for its architecture"};
    // Kernels would load at their first use; this way none has to load within a capture.
    image_encoder_prepare(device);
    dense_match_prepare(device);
    return {true, "kernels compiled for compute_" + std::to_string(value / 10) + " run"};
  } catch (const std::runtime_error& error) {
    return {false, error.what()};
  }
}

}  // namespace lift_fast
