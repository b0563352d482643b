// Checks an image's axes, and cuts them into fewer strips.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "dense_match.hpp"

namespace lift_fast {

// Throws std::invalid_argument for an axis that does not hold together.
void check_axis(const DenseMatchAxis& axis, const std::string& name);

// Joins strips of a single cell (at its centre, or beyond the outermost centres) to the strip that begins there: fewer
// patches. The far cell has no weight at such pixels, so nothing changes if all cells are finite.
struct JoinedAxis {
  std::vector<std::int32_t> low, high, first;

  explicit JoinedAxis(DenseMatchAxis& axis) {
    for (std::int64_t s = 0; s < axis.strips; ++s) {
      const bool joins = s > 0 && axis.low[s] == low.back() && axis.low[s] == high.back();
      if (joins) {
        high.back() = axis.high[s];
        continue;
      }
      low.push_back(axis.low[s]);
      high.push_back(axis.high[s]);
      first.push_back(axis.first[s]);
    }
    first.push_back(axis.first[axis.strips]);
    axis.strips = static_cast<std::int64_t>(low.size());
    axis.low = low.data();
    axis.high = high.data();
    axis.first = first.data();
  }
};

}  // namespace lift_fast
