#include "isa.hpp"

#include <algorithm>
#include <functional>
#include <stdexcept>

namespace lift_fast {
namespace {

bool cpu_has(CpuIsa isa) {
#if defined(__x86_64__)
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  switch (isa) {
    case CpuIsa::avx512_bf16: return avx512 && __builtin_cpu_supports("avx512bf16");
    case CpuIsa::avx512_int16: return avx512 && __builtin_cpu_supports("avx512vnni");
    case CpuIsa::avx512: return avx512;
    case CpuIsa::avx2: return avx2;
    case CpuIsa::baseline: break;
  }
#endif
  return isa == CpuIsa::baseline;
}

}  // namespace

const char* cpu_isa_name(CpuIsa isa) {
  switch (isa) {
    case CpuIsa::avx512_bf16: return "avx512_bf16";
    case CpuIsa::avx512_int16: return "avx512_int16";
    case CpuIsa::avx512: return "avx512";
    case CpuIsa::avx2: return "avx2";
    case CpuIsa::baseline: break;
  }
  return "baseline";
}

std::vector<CpuIsa> cpu_isas(std::initializer_list<CpuIsa> more) {
  std::vector<CpuIsa> isas = more;
  isas.insert(isas.end(), {CpuIsa::avx512, CpuIsa::avx2, CpuIsa::baseline});
  isas.erase(std::remove_if(isas.begin(), isas.end(), [](CpuIsa isa) { return !cpu_has(isa); }), isas.end());
  std::sort(isas.begin(), isas.end(), std::greater<>());
  return isas;
}

CpuIsa cpu_isa(const std::string& name, std::initializer_list<CpuIsa> more) {
  std::string known = "auto";
  for (const CpuIsa isa : cpu_isas(more)) {
    if (name == "auto" || name == cpu_isa_name(isa)) return isa;
    known += std::string(", ") + cpu_isa_name(isa);
  }
  throw std::invalid_argument("isa must be one of " + known + " on this CPU, got '" + name + "'");
}

}  // namespace lift_fast
