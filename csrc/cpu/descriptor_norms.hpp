// Norms of the bilinearly interpolated descriptors of an image's pixels, from the products of neighbouring cells: the
// square of a norm is a quadratic form of them. In float64, for cells that nearly cancel.
#pragma once

#include <cstdint>

#include "dense_match.hpp"
#include "isa.hpp"

namespace lift_fast {

struct DescriptorNormsCall {
  const float* map;  // [c, y.cells, x.cells]; strides of a channel and of a cell, cells row-major
  std::int64_t channel_stride, cell_stride, c;
  DenseMatchAxis y, x;
  double least;    // what a smaller norm counts as
  double* gram;    // [5, cells], see CellProducts
  float* inverse;  // [y.pixels, x.pixels]: 1 / norm
  int threads;
};

// Throws std::invalid_argument for invalid sizes, strides or addresses, std::bad_alloc.
void descriptor_norms_run(const DescriptorNormsCall& call, CpuIsa isa);

// `rows` holds two rows of cells for each thread, `sums` three rows of pixels.
struct DescriptorNormsWork {
  double *rows, *sums;
};
struct DescriptorNormsKernel {
  void (*run)(const DescriptorNormsCall& call, const DescriptorNormsWork& work);
};

}  // namespace lift_fast
