// Runs a kernel to learn whether the CUDA part of this binary works on a device.
#pragma once

#include <string>

namespace lift_fast {

struct CudaProbe {
  bool works;
  std::string reason;
};

// Version of the CUDA runtime this binary carries, as CUDA writes it (13000 is 13.0).
int cuda_runtime_version();
// Initialises CUDA on `device` and loads the kernels there. Never throws, and works while a stream is captured.
CudaProbe probe_cuda(int device);

}  // namespace lift_fast
