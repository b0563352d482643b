// What the operators' sanitizer runs share: each calls its operator on exactly sized heap blocks, so that a sanitizer
// sees every byte read or written outside.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <vector>

#include "cpu/isa.hpp"

namespace lift_fast {

// Numbers, with a few values that take no part and a few whose product overflows.
inline std::unique_ptr<float[]> rows(std::int64_t count) {
  std::unique_ptr<float[]> values(new float[count]);
  for (std::int64_t i = 0; i < count; ++i) {
    const std::int64_t kind = i % 211;
    values[i] = kind == 5 ? NAN : kind == 71 ? INFINITY : kind == 131 ? 3e38f : 0.01f * static_cast<float>(i % 37 - 18);
  }
  return values;
}

// Defined by X_sanitize.cpp: the operator with one instruction set.
void sanitize(CpuIsa isa);

}  // namespace lift_fast
