// The instructions that kernels are written in: the device's, or those that the tests put in their place to run a kernel's
// own source on the CPU.
#pragma once

#if defined(LIFT_FAST_EMULATED_DEVICE)
#include "emulated_device.hpp"
#else
#include "tensor_core.cuh"
#include "warp.cuh"
#endif
