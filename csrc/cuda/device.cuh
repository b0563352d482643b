// The instructions that kernels use: the device's, or the tests' replacements, which run a kernel's source on the CPU.
#pragma once

#if defined(LIFT_FAST_EMULATED_DEVICE)
#include "emulated_device.hpp"
#else
#include "tensor_core.cuh"
#include "warp.cuh"
#endif
