// Dense matching from similarities of coarse cells: for each query pixel the key pixel whose bilinearly interpolated
// similarity is largest. Only patches of the key image that can hold it are visited.
//
// A patch is the set of key pixels between the same four cells; no value inside exceeds its corners. Query pixels
// between the same four query cells form a group; their similarities to a key cell lie between the corners'.
#pragma once

#include <cstdint>

#include "dense_match_span.hpp"
#include "isa.hpp"
#include "stop.hpp"

namespace lift_fast {

// How one axis of the key image is cut: strips of pixels between two neighbouring cells, or at one alone.
struct DenseMatchAxis {
  std::int64_t cells, pixels, strips;
  const std::int32_t* low;    // [strips] cell on the near side
  const std::int32_t* high;   // [strips] cell on the far side; low itself if that has no weight
  const std::int32_t* first;  // [strips + 1] first pixel of each strip, ascending from 0; the last is `pixels`
  const float* weight;        // [pixels] share of the far cell
};

// Layout of a thread's working memory, in 4-byte words; multiples of 16.
struct DenseMatchScratch {
  std::int64_t upper, rows, bounds, weights, best, index, end;
};

// What is known of a row of the table.
struct DenseMatchRow {
  std::int32_t best;  // most similar key cell, -1 if no similarity is finite
  float largest;      // magnitude of those that are finite
  bool finite;        // all are
};

struct DenseMatchCall {
  const float* table;  // [rows, y.cells * x.cells] similarities of query cells to key cells
  std::int64_t rows;
  std::int64_t groups;
  const std::int32_t* corners;  // [groups, 4] rows of the table: near near, near far, far near, far far (y before x)
  const std::int64_t* start;    // [groups + 1] first point of each group, ascending from 0
  const float* weights;         // [points, 2] share of the far cells in x and in y
  const std::int64_t* order;    // [points] where each one's result and floor lie, or null: in its own place
  const float* floor;           // a similarity that each point's match surely reaches, or null
  const float* inverse;      // [points] with scale: 1 / the norm of each one's descriptor, or null
  const float* corner_gram;  // [groups, 10] with inverse: products of a group's four cells, lower triangle by rows
  DenseMatchAxis y, x;
  const float* scale;   // [y.pixels, x.pixels] factor of each key pixel, positive, or null
  const double* gram;   // with scale: products of the key's cells (CellProducts), whose norms the scale divides by
  float* similarity;    // -inf where there is no match
  std::int64_t* index;  // row-major key pixel, the lowest among equals; -1 where there is no match
  int threads;
  Stop* stop;  // or null
  // Set by dense_match_run.
  std::int64_t strips_padded, width_padded;
  const float* strip_weights;  // [x.strips, width_padded], NaN beyond the strip
  const float* padded_scale;   // scale, readable one vector beyond its end
  const float* scale_high;     // [y.strips, strips_padded]
  const float* scale_low;
  float scale_largest;
  const float* cell_scale;  // [cells], or null
  const float* spans;         // [y.strips, strips_padded, span_words], see PatchSpan
  const float* window_spans;  // [14, y.strips, strips_padded]
  const std::int32_t* y_strip;  // [y.cells] a strip that begins or ends at the cell, or -1
  const std::int32_t* x_strip;
  DenseMatchRow* row;  // [rows]
  DenseMatchScratch layout;
  float* scratch;  // layout.end words for each thread
};

constexpr std::int64_t dense_match_block = 64;  // points of a group that are matched together

// Throws std::invalid_argument for sizes or indices out of range, std::bad_alloc. If it is stopped, the outputs are
// undefined.
void dense_match_run(DenseMatchCall call, CpuIsa isa);

struct DenseMatchKernel {
  void (*run)(const DenseMatchCall& call);
};

}  // namespace lift_fast
