// What every launch of a CUDA kernel needs: errors as exceptions, the right current device, and loaded kernels.
#pragma once

#include <cuda_runtime.h>

#include <array>
#include <atomic>
#include <mutex>
#include <stdexcept>
#include <string>

namespace lift_fast {

// `what` is the kernel's name, for the message.
inline void succeed(cudaError_t error, const char* what, const char* step) {
  if (error == cudaSuccess) return;
  // Clears the error, so that the runtime's next user does not see it.
  (void)cudaGetLastError();
  throw std::runtime_error(std::string(what) + ": " + step + ": " + cudaGetErrorString(error));
}

// Makes a device current, and the previous one again at the end.
class DeviceGuard {
 public:
  DeviceGuard(int device, const char* what) {
    succeed(cudaGetDevice(&previous_), what, "cannot query the current device");
    if (device != previous_) {
      succeed(cudaSetDevice(device), what, "cannot select the device");
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

// In this scope the thread may load kernels even while one of its streams is being captured into a graph.
class CaptureTolerated {
 public:
  CaptureTolerated() { known_ = cudaThreadExchangeStreamCaptureMode(&mode_) == cudaSuccess; }
  ~CaptureTolerated() {
    if (known_) (void)cudaThreadExchangeStreamCaptureMode(&mode_);
  }
  CaptureTolerated(const CaptureTolerated&) = delete;
  CaptureTolerated& operator=(const CaptureTolerated&) = delete;

 private:
  cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;
  bool known_ = false;
};

struct DeviceFacts {
  int multiprocessors;
  int shared_block, shared_multiprocessor;  // bytes of one block at most, and of all together
};

// The kernels of one source. Each device prepares them once: it loads them and allows them all the shared memory that a
// block may have. A launch then needs no other CUDA call, and no thread changes a limit during another's launch.
class ReadyKernels {
 public:
  template <class... Kernels>
  explicit ReadyKernels(const char* what, Kernels*... kernels)
      : what_(what), kernels_{reinterpret_cast<const void*>(kernels)...} {
    static_assert(sizeof...(Kernels) <= kMost, "too many kernels");
  }

  // The device must be current.
  const DeviceFacts& on(int device) {
    if (device < 0 || device >= kDevices) {
      throw std::runtime_error(std::string(what_) + ": at most " + std::to_string(kDevices) + " devices, got device " +
                               std::to_string(device));
    }
    Device& known = devices_[static_cast<std::size_t>(device)];
    if (known.ready.load(std::memory_order_acquire)) return known.facts;
    const std::lock_guard<std::mutex> lock(mutex_);
    if (known.ready.load(std::memory_order_relaxed)) return known.facts;
    const CaptureTolerated tolerated;
    const auto ask = [&](cudaDeviceAttr name) {
      int value = 0;
      succeed(cudaDeviceGetAttribute(&value, name, device), what_, "cannot query a device attribute");
      return value;
    };
    known.facts = {ask(cudaDevAttrMultiProcessorCount), ask(cudaDevAttrMaxSharedMemoryPerBlockOptin),
                   ask(cudaDevAttrMaxSharedMemoryPerMultiprocessor)};
    for (const void* kernel : kernels_) {
      if (kernel == nullptr) break;
      succeed(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, known.facts.shared_block),
              what_, "shared memory");
    }
    known.ready.store(true, std::memory_order_release);
    return known.facts;
  }

 private:
  static constexpr int kDevices = 64, kMost = 16;
  struct Device {
    std::atomic<bool> ready{false};
    DeviceFacts facts{};
  };
  const char* const what_;
  const std::array<const void*, kMost> kernels_;
  std::array<Device, kDevices> devices_;
  std::mutex mutex_;
};

}  // namespace lift_fast
