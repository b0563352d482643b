// Dense matching of many points of an image, or of all its pixels. Points between the same four query cells form a group
// that searches together (dense_match.hpp).
#pragma once

#include <cstdint>

#include "dense_match.hpp"
#include "isa.hpp"

namespace lift_fast {

struct DenseMatchImageCall {
  const float* table;  // [rows * query_x.cells, y.cells * x.cells] similarities of rows of query cells to key cells
  std::int64_t rows;
  std::int64_t top, end;  // the table's first row of cells; points below row `end` are left out, as those above `top`
  DenseMatchAxis query_y, query_x;
  const std::int64_t* points;  // [count, 2], (x, y) pixels of the query image, or null for every one
  std::int64_t count;
  const float* floor;  // [count] a similarity that each point's match surely reaches, or null
  DenseMatchAxis y, x;
  const float* scale;  // as in DenseMatchCall
  const double* gram;
  const float*
      query_inverse;  // with scale: 1 / norm of each query pixel's descriptor, [query_y.pixels, query_x.pixels]
  const double* query_gram;  // and products of the query's cells; or both null
  float* similarity;  // [count]; -inf where there is no match
  std::int64_t* index;  // [count] row-major key pixel, the lowest among equals; -1 where there is no match
  int threads;
  Stop* stop;  // or null
};

// Throws std::invalid_argument for sizes, indices or points out of range, std::bad_alloc. If it is stopped, the outputs
// are undefined.
void dense_match_image_run(const DenseMatchImageCall& call, CpuIsa isa);

}  // namespace lift_fast
