// Whether the CUDA part of this binary runs on a device, found out by running it.
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
