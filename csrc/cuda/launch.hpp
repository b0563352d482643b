// What every launch of a CUDA kernel needs: errors as exceptions, and its device made current.
#pragma once

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

namespace lift_fast {

// `what` is the kernel's name, for the message.
inline void succeed(cudaError_t error, const char* what, const char* step) {
  if (error == cudaSuccess) return;
  // Clears the error, so that the next user of the runtime does not meet it.
  (void)cudaGetLastError();
  throw std::runtime_error(std::string(what) + ": " + step + ": " + cudaGetErrorString(error));
}

// Makes a device current, and the previous one again at the end.
class DeviceGuard {
 public:
  DeviceGuard(int device, const char* what) {
    succeed(cudaGetDevice(&previous_), what, "the current device");
    if (device != previous_) {
      succeed(cudaSetDevice(device), what, "the device cannot be chosen");
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

inline int device_attribute(cudaDeviceAttr name, int device, const char* what) {
  int value = 0;
  succeed(cudaDeviceGetAttribute(&value, name, device), what, "a device attribute");
  return value;
}

}  // namespace lift_fast
