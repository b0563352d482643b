// Nearest neighbours within a square window on a grid: for each query cell the k most similar key cells near it, in
// several key grids (frames) of one size, without a matrix of similarities.
#pragma once

#include <cstdint>

#include "isa.hpp"
#include "stop.hpp"

namespace lift_fast {

constexpr int window_nearest_sections = 3;

struct WindowNearestCall {
  const float* query;  // [batch, query_frames, query_h, query_w, c]
  const float* key;    // [batch, key_frames, key_h, key_w, c]
  std::int64_t batch, query_frames, query_h, query_w, key_frames, key_h, key_w, c, k;
  // A pair is in the window where |(2 y' + 1) query_h - (2 y + 1) key_h| <= reach_y, y of the query and y' of the key,
  // and likewise in x: the distance of the cells' centres, in units that make it an integer. A radius of r key cells is
  // 2 r query_h and 2 r query_w; exchanging queries and keys gives the same numbers.
  std::int64_t reach_y, reach_x;
  bool normalize;
  float* similarity;    // [batch, queries, k], descending; -inf where there is no match
  std::int64_t* index;  // [batch, queries, k] keys, numbered over all frames, the lowest first among equals; or -1
  int threads;
  Stop* stop;           // or null; after a stop the outputs are undefined
  // Set by window_nearest_run.
  const std::int32_t* row_low;   // [query_h] key rows in the window of a query row, both ends included; may be empty
  const std::int32_t* row_high;
  const std::int32_t* column_low;  // [query_w]
  const std::int32_t* column_high;
  std::int64_t row_stride;      // floats between two channels of a packed row of keys
  // After each section of channels but the last a tile may be abandoned: the product of the remaining channels never
  // exceeds the product of their norms, which follow the channels of packed rows and tiles.
  std::int64_t sections, section_end[window_nearest_sections];
  std::int64_t stage_frames;    // key grids that are packed at one time
  std::int64_t tiles_per_task;
  float* packed_keys;           // [stage_frames, key_h, c + sections - 1, row_stride]
  bool pack_queries_once;       // all of a batch's queries at its beginning, instead of a task's for each stage
  float* packed_queries;        // [tiles, c + sections - 1, query tile], or of each thread [tiles_per_task, ...]
};

struct WindowNearestKernel {
  std::int64_t queries;  // neighbouring queries of one grid row that it takes together
  std::int64_t lanes;    // keys of a vector
  void (*run)(const WindowNearestCall& call);
};

// Working memory: a bounded number of packed key grids (at least one), and queries up to 8 MiB or 256 KiB for each
// thread (at least one tile).
// Throws std::invalid_argument for sizes out of range, std::bad_alloc.
void window_nearest_run(WindowNearestCall call, CpuIsa isa);

}  // namespace lift_fast
