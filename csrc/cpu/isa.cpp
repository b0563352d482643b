#include "isa.hpp"

#include <stdexcept>

namespace lift_fast {

const char* cpu_isa_name(CpuIsa isa) {
  switch (isa) {
    case CpuIsa::avx512: return "avx512";
    case CpuIsa::avx2: return "avx2";
    case CpuIsa::baseline: break;
  }
  return "baseline";
}

bool cpu_has(CpuIsa isa) {
#if defined(__x86_64__)
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  switch (isa) {
    case CpuIsa::avx512:
      return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    case CpuIsa::avx2: return avx2;
    case CpuIsa::baseline: break;
  }
#endif
  return isa == CpuIsa::baseline;
}

CpuIsa cpu_isa(const std::string& name) {
  for (CpuIsa isa : {CpuIsa::avx512, CpuIsa::avx2, CpuIsa::baseline}) {
    if (name == "auto" ? cpu_has(isa) : name == cpu_isa_name(isa)) {
      if (!cpu_has(isa)) throw std::invalid_argument("this CPU cannot run " + name + "; use isa=\"auto\"");
      return isa;
    }
  }
  throw std::invalid_argument("isa must be auto, avx512, avx2 or baseline, got " + name);
}

}  // namespace lift_fast
