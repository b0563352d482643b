// What the dense matcher's kernels are launched with: blocks, threads, shared memory and parameters of a call.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>

#include "dense_match_checks.hpp"
#include "device.cuh"

namespace lift_fast {

constexpr int kMatchMaxWarps = 8;
constexpr int kGroupPixels = 64;  // of a group that are matched together: two to a lane
constexpr int kSeeds = 4;         // one for each query cell of a group
// Of a block for a point, for four groups or for as many patches; and for rows of the table.
constexpr int kMatchThreads = 128;
constexpr int kCheckThreads = 256;

// How a call is cut into blocks.
struct MatchLaunch {
  std::int64_t blocks;
  int warps;
  std::int64_t shared;  // bytes of shared memory
  int portions;         // blocks that share a group's pixels
  bool staged;          // the bounds of the key's cells fit into shared memory
};

// Where everything lies in the shared memory of a block that matches groups, in bytes.
struct GroupLayout {
  int values, indices, seeds, seed_cells, largest, total;
  __host__ __device__ GroupLayout(int cells, int warps) {
    values = 4 * cells;  // after the bounds of the key's cells
    indices = values + 4 * warps * kGroupPixels;
    seeds = indices + 4 * warps * kGroupPixels;
    seed_cells = seeds + 4 * warps * kSeeds;
    largest = seed_cells + 4 * warps * kSeeds;
    total = largest + 4 * warps;
  }
};

// `shared_block`: bytes of shared memory that one block may use.
inline MatchLaunch group_launch(const GroupMatchCall& call, std::int64_t shared_block) {
  const std::int64_t cells = call.key.y.cells * call.key.x.cells;
  MatchLaunch launch{};
  // Large maps leave room for few blocks on a multiprocessor: more warps in each.
  launch.warps = cells <= 8192 ? 4 : kMatchMaxWarps;
  launch.staged = 4 * cells + GroupLayout(0, launch.warps).total <= shared_block;
  launch.shared = GroupLayout(launch.staged ? static_cast<int>(cells) : 0, launch.warps).total;
  const MatchBand& band = call.band;
  const std::int64_t groups = (band.end_y - band.first_y) * (band.end_x - band.first_x);
  // The outermost groups are larger than the others. Where there are few groups, many blocks share the pixels of one.
  const std::int64_t portions = (call.query_y.longest * call.query_x.longest + kGroupPixels - 1) / kGroupPixels;
  launch.portions = static_cast<int>(std::min(portions, std::max<std::int64_t>(2, 4096 / groups)));
  launch.blocks = groups * launch.portions;
  if (launch.blocks > std::numeric_limits<std::int32_t>::max()) refuse_match("too large for one launch");
  return launch;
}

struct AxisParams {
  int cells, pixels, strips;
  const std::int32_t *low, *high, *first;
  const float* weight;
};

struct ImageParams {
  AxisParams y, x;
  const float *scale, *scale_high, *scale_low, *scale_rows, *spans;
};

struct SpanParams {
  const double* gram;
  AxisParams y, x;
  const float* scale_high;
  float* spans;
};

struct Candidate;

struct GroupParams {
  const float* table;
  ImageParams key;
  AxisParams query_y, query_x;
  int first_y, first_x, across, top, left, width;  // of the band; `across` strips in a row
  int portions;
  bool aligned;
  float* similarity;
  std::int64_t* index;
  MatchWhen when;
};

struct PointParams {
  const float* table;
  ImageParams key;
  float* similarity;
  std::int64_t* index;
  MatchWhen when;
};

struct MutualParams {
  const float* table;
  ImageParams query;
  AxisParams key_y, key_x;
  const std::int64_t* index;
  bool* valid;
  int* count;  // of the candidates
  Candidate* candidates;
  int rows;  // of the table that a block checks
  MatchWhen when;
};

inline AxisParams axis_params(const MatchAxis& axis) {
  return {static_cast<int>(axis.cells),
          static_cast<int>(axis.pixels),
          static_cast<int>(axis.strips),
          axis.low,
          axis.high,
          axis.first,
          axis.weight};
}

inline ImageParams image_params(const MatchImage& image) {
  return {axis_params(image.y), axis_params(image.x), image.scale, image.scale_high,
          image.scale_low,      image.scale_rows,     image.spans};
}

inline SpanParams span_params(const MatchSpansCall& call) {
  return {call.gram, axis_params(call.y), axis_params(call.x), call.scale_high, call.spans};
}

inline GroupParams group_params(const GroupMatchCall& call, const MatchLaunch& launch) {
  const MatchBand& band = call.band;
  GroupParams params{};
  params.table = call.table;
  params.key = image_params(call.key);
  params.query_y = axis_params(call.query_y);
  params.query_x = axis_params(call.query_x);
  params.first_y = static_cast<int>(band.first_y);
  params.first_x = static_cast<int>(band.first_x);
  params.across = static_cast<int>(band.end_x - band.first_x);
  params.top = static_cast<int>(band.top);
  params.left = static_cast<int>(band.left);
  params.width = static_cast<int>(band.width);
  params.portions = launch.portions;
  params.aligned = rows_aligned(call);
  params.similarity = call.similarity;
  params.index = call.index;
  params.when = call.when;
  return params;
}

inline PointParams point_params(const PointMatchCall& call) {
  return {call.table, image_params(call.key), call.similarity, call.index, call.when};
}

inline MutualParams mutual_params(const MutualMatchCall& call) {
  MutualParams params{};
  params.table = call.table;
  params.query = image_params(call.query);
  params.key_y = axis_params(call.key_y);
  params.key_x = axis_params(call.key_x);
  params.index = call.index;
  params.valid = call.valid;
  // The first record's place is the count's.
  params.count = call.scratch;
  params.candidates = reinterpret_cast<Candidate*>(call.scratch + kCandidateWords);
  const std::int64_t cells = call.key_y.cells * call.key_x.cells;
  params.rows = cells <= 4096 ? 4 : cells <= 8192 ? 2 : 1;
  params.when = call.when;
  return params;
}

inline MatchLaunch span_launch(const MatchSpansCall& call) {
  const std::int64_t patches = call.y.strips * call.x.strips;
  return {(patches + kMatchThreads - 1) / kMatchThreads, kMatchThreads / 32, 0, 1, false};
}

inline MatchLaunch point_launch(const PointMatchCall& call) {
  constexpr int kWarps = kMatchThreads / 32;
  return {call.points, kWarps, 2 * 4 * kWarps, 1, false};
}

inline MatchLaunch find_launch(const MutualMatchCall& call) {
  constexpr int kWarps = kMatchThreads / 32;
  return {(call.query.y.strips * call.query.x.strips + kWarps - 1) / kWarps, kWarps, 0, 1, false};
}

inline MatchLaunch check_launch(const MutualMatchCall& call) {
  const std::int64_t query_cells = call.query.y.cells * call.query.x.cells;
  const std::int64_t key_cells = call.key_y.cells * call.key_x.cells, rows = mutual_params(call).rows;
  return {(query_cells + rows - 1) / rows, kCheckThreads / 32, 4 * rows * (key_cells + 2), 1, true};
}

}  // namespace lift_fast
