// An operator's kernel is a struct of functions and sizes, one for each instruction set. csrc/cpu/X_kernel.cpp,
// compiled for a set, defines Compiled<XKernel, set>::kernel. It is constant, so that no code of a set runs before it
// is chosen.
#pragma once

#include "isa.hpp"

namespace lift_fast {

template <class Kernel, CpuIsa isa>
struct Compiled {
  static const Kernel kernel;
};

// An operator's kernels: baseline, avx2, avx512 and the sets in `more`, as setup.py compiles them.
template <class Kernel, CpuIsa... more>
struct Kernels {
  static std::vector<CpuIsa> isas() { return cpu_isas({more...}); }
  static CpuIsa isa(const std::string& name) { return cpu_isa(name, {more...}); }

  static const Kernel& of(CpuIsa isa) {
    const Kernel* kernel = &Compiled<Kernel, CpuIsa::baseline>::kernel;
#if defined(__x86_64__)
    const auto offer = [&](CpuIsa set, const Kernel& compiled) {
      if (set == isa) kernel = &compiled;
    };
    offer(CpuIsa::avx2, Compiled<Kernel, CpuIsa::avx2>::kernel);
    offer(CpuIsa::avx512, Compiled<Kernel, CpuIsa::avx512>::kernel);
    (offer(more, Compiled<Kernel, more>::kernel), ...);
#endif
    (void)isa;
    return *kernel;
  }
};

}  // namespace lift_fast
