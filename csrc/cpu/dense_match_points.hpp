// Dense matching of a few points, each by its own descriptor. One pass over the key map in place gives its similarities
// to the key's cells. Many points share the similarities of cells instead (dense_match.hpp).
#pragma once

#include <cstdint>

#include "dense_match.hpp"
#include "isa.hpp"

namespace lift_fast {

struct DenseMatchMap {
  const float* data;  // [c, grid_h, grid_w]; strides of a channel and of a cell, cells row-major
  std::int64_t channel_stride, cell_stride;
  std::int64_t grid_h, grid_w;
  bool normalize;  // divide each cell by max(its norm, 1e-12)
};

struct DenseMatchPointsCall {
  const std::int64_t* points;  // [count, 2], (x, y) pixels of the query image
  std::int64_t count, c;
  DenseMatchMap query, key;  // one of the key's strides is 1
  std::int64_t height, width;  // of the query image
  bool normalize;  // divide each point's descriptor by max(its norm, 1e-12)
  DenseMatchAxis y, x;  // of the key image
  const float* scale;  // as in DenseMatchCall
  const double* gram;
  float* similarity;  // [count]; -inf where there is no match
  std::int64_t* index;  // [count] row-major key pixel, the lowest among equals; -1 where there is no match
  std::int64_t table_bytes;  // of similarities kept at one time, beyond those of one point
  int threads;
  Stop* stop;  // or null
};

// Throws std::invalid_argument for invalid sizes, strides or addresses and for points outside the image,
// std::bad_alloc.
void dense_match_points_run(const DenseMatchPointsCall& call, CpuIsa isa);

}  // namespace lift_fast
