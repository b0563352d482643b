// Which instruction sets this CPU can run.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <string>
#include <vector>

namespace lift_fast {

// The later, the better. The last two multiply short numbers and serve operators that have a kernel for them.
enum class CpuIsa : std::int32_t { baseline, avx2, avx512, avx512_int16, avx512_bf16 };
// The type that a kernel multiplies.
enum class Numbers : std::int32_t { float32, int16, bfloat16 };

const char* cpu_isa_name(CpuIsa isa);
// The sets among baseline, avx2, avx512 and `more` that this CPU can run, best first.
std::vector<CpuIsa> cpu_isas(std::initializer_list<CpuIsa> more = {});
// "auto" is the best of them. Throws std::invalid_argument for any other name.
CpuIsa cpu_isa(const std::string& name, std::initializer_list<CpuIsa> more = {});

}  // namespace lift_fast
