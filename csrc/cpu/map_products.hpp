// Similarities of a few descriptors to all cells of a map, in one pass over the map in place. A general matrix product
// would need a normalised copy.
#pragma once

#include <cstdint>
#include <string>

#include "isa.hpp"

namespace lift_fast {

struct MapProductsCall {
  const float* descriptors;  // [count, c]
  const float* map;          // [c, cells] with either stride 1
  std::int64_t channel_stride, cell_stride;
  std::int64_t count, c, cells;
  bool normalize;            // divide by max(norm of the cell, 1e-12)
  float* table;              // [count, cells]
  int threads;
};

// Descriptors of points of the image over which a map is stretched, bilinearly interpolated (align_corners=False).
struct MapSampleCall {
  const std::int64_t* points;  // [count, 2], (x, y) pixels
  const float* map;            // [c, grid_h, grid_w]; strides of a channel and of a cell, cells row-major
  std::int64_t channel_stride, cell_stride;
  std::int64_t count, c;
  std::int64_t grid_h, grid_w;
  std::int64_t height, width;  // of the image
  bool normalize_cells;        // divide each cell by max(its norm, 1e-12) first
  bool normalize_result;       // and the descriptor by max(its own, 1e-12)
  float* descriptors;          // [count, c]
  int threads;
};

// Throws std::invalid_argument for invalid sizes or addresses and for points outside the image.
void map_sample_run(const MapSampleCall& call);

// Throws std::invalid_argument for invalid sizes, strides or addresses, std::bad_alloc.
void map_products_run(const MapProductsCall& call, CpuIsa isa);

// `scratch` holds scratch_words floats for each thread, `padded` the descriptors with rows of padded_channels.
struct MapProductsWork {
  const float* padded;
  std::int64_t padded_channels;
  float* scratch;
  std::int64_t scratch_words;
};
// Cells that it takes at one time, and the multiple to which it pads channels.
struct MapProductsKernel {
  std::int64_t cells, lanes;
  void (*run)(const MapProductsCall& call, const MapProductsWork& work);
};

}  // namespace lift_fast
