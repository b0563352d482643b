// Which instruction sets this CPU can run. The kernels of each set are compiled in their own translation unit.
#pragma once

#include <cstdint>
#include <string>

namespace lift_fast {

enum class CpuIsa : std::int32_t { baseline = 0, avx2 = 1, avx512 = 2 };

const char* cpu_isa_name(CpuIsa isa);
bool cpu_has(CpuIsa isa);
// "auto" is the best one; throws std::invalid_argument for an unknown name or a set that this CPU lacks.
CpuIsa cpu_isa(const std::string& name);

}  // namespace lift_fast
