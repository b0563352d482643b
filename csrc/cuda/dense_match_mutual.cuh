// Which matches lead back. A query pixel is a candidate if it is the best one for its key pixel in its own patch and in
// the patches around it. Few are: a first kernel finds them, a second one checks them against all query pixels.
#pragma once

#include <cstdint>

#include "dense_match_patch.cuh"

namespace lift_fast {

// One key pixel between its four cells, as columns of the table.
struct KeyPixel {
  int cell, step_right, step_low;  // the first of them, and from there to those right and below
  float right, down;
  __device__ __forceinline__ KeyPixel() {}
  __device__ __forceinline__ KeyPixel(const AxisParams& y, const AxisParams& x, int pixel) {
    const int row = pixel / x.pixels, column = pixel % x.pixels;
    const int strip_y = strip_before(y.first, y.strips, row), strip_x = strip_before(x.first, x.strips, column);
    const Corners at(y, x, strip_y, strip_x);
    cell = at.top_left;
    step_right = at.top_right - at.top_left;
    step_low = at.low_left - at.top_left;
    right = x.weight[column];
    down = y.weight[row];
  }
  // Its similarity to the query cell of a row of the table; NaN if one of the four values is not finite.
  __device__ __forceinline__ float similarity(const float* row) const {
    const float a = row[cell], b = row[cell + step_right];
    const float c = row[cell + step_low], d = row[cell + step_low + step_right];
    return Bilinear(a, b, c, d)(right, down) +
           ((zero_if_finite(a) + zero_if_finite(b)) + (zero_if_finite(c) + zero_if_finite(d)));
  }
  // The last of ascending numbers that is not above `most`, or the first.
  static __device__ __forceinline__ int strip_before(const std::int32_t* ascending, int count, int most) {
    int from = 0, to = count;
    while (to - from > 1) {
      const int middle = (from + to) / 2;
      (ascending[middle] <= most ? from : to) = middle;
    }
    return from;
  }
};

// A match to check: the query pixel, the patch that it lies in, the key pixel and their similarity.
struct alignas(16) Candidate {
  KeyPixel key;
  float value;
  int query, patch;
};
static_assert(sizeof(Candidate) == 4 * kCandidateWords, "the caller allocates these");

// A query patch as a key pixel sees it.
__device__ __forceinline__ Bilinear seen_from(const MutualParams& p, const KeyPixel& key, const Corners& at) {
  const std::int64_t cells = p.key_y.cells * p.key_x.cells;
  return {key.similarity(p.table + at.top_left * cells), key.similarity(p.table + at.top_right * cells),
          key.similarity(p.table + at.low_left * cells), key.similarity(p.table + at.low_right * cells)};
}

// Whether a query pixel of this patch is more similar than the candidate's, or as similar and lower. With scales few
// patches can hold one, by the key's projection onto them.
template <bool kScale>
__device__ __forceinline__ bool beaten_in(const MutualParams& p, const Candidate& candidate, int strip_y, int strip_x) {
  const Bilinear patch = seen_from(p, candidate.key, Corners(p.query.y, p.query.x, strip_y, strip_x));
  if constexpr (kScale) {
    const int number = strip_y * p.query.x.strips + strip_x;
    const float size = magnitude(patch.near) + magnitude(patch.right) + magnitude(patch.down) + magnitude(patch.both);
    const float slack = kMatchSlack * size * p.query.scale_high[number];
    if (!reaches(p.query, number, patch, candidate.value - slack)) return false;
  }
  bool beaten = false;
  // If a corner of a patch is not finite, none of its pixels is.
  each_pixel<kScale>(p.query, strip_y, strip_x, patch, [&](float value, int pixel) {
    beaten = (value > candidate.value || (value == candidate.value && pixel < candidate.query)) &&
             magnitude(value) <= kMatchLargest;
    return !beaten;
  });
  return beaten;
}

// Finds the candidates. One warp for each group of query pixels. Without scales only the four outermost pixels of a
// group can be the best.
template <bool kScale>
__global__ void __launch_bounds__(kMatchThreads, 8) find_mutual_kernel(const LIFT_FAST_GRID_CONSTANT MutualParams p) {
  if (!runs(p.when)) return;
  const AxisParams &y = p.query.y, &x = p.query.x;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int group = static_cast<int>(blockIdx.x) * (kMatchThreads / 32) + static_cast<int>(threadIdx.x) / 32;
  if (group >= y.strips * x.strips) return;
  const int strip_y = group / x.strips, strip_x = group % x.strips;
  const int start_y = y.first[strip_y], start_x = x.first[strip_x];
  const int across = x.first[strip_x + 1] - start_x, down = y.first[strip_y + 1] - start_y, count = across * down;
  for (int own = lane; own < count; own += 32) {
    p.valid[(start_y + own / across) * x.pixels + start_x + own % across] = false;
  }
  __syncwarp();
  const int limit = kScale ? count : 4;
  for (int base = 0; base < limit; base += 32) {
    Candidate mine;
    mine.query = -1;
    mine.patch = group;
    const int own = base + lane;
    if (own < limit) {
      const int row = start_y + (kScale ? own / across : (own / 2) * (down - 1));
      const int column = start_x + (kScale ? own % across : (own % 2) * (across - 1));
      const int query = row * x.pixels + column;
      // Strips of one pixel have fewer outermost pixels.
      const bool once = kScale || ((own % 2 == 0 || across > 1) && (own / 2 == 0 || down > 1));
      const int found = once ? static_cast<int>(p.index[query]) : -1;
      if (found >= 0) {
        mine.key = KeyPixel(p.key_y, p.key_x, found);
        mine.value = seen_from(p, mine.key, Corners(y, x, strip_y, strip_x))(x.weight[column], y.weight[row]);
        if constexpr (kScale) mine.value *= p.query.scale[query];
        mine.query = query;
        if (beaten_in<kScale>(p, mine, strip_y, strip_x)) mine.query = -1;
      }
    }
    // Four at a time, eight neighbours each.
    unsigned open = ballot(mine.query >= 0);
    while (open != 0) {
      int source = -1;
      for (int i = 0; i < 4 && open != 0; ++i, open &= open - 1) {
        if (lane / 8 == i) source = lowest_bit(open);
      }
      const int from = source < 0 ? 0 : source;
      Candidate checked;
      checked.key.cell = shuffle(mine.key.cell, from);
      checked.key.step_right = shuffle(mine.key.step_right, from);
      checked.key.step_low = shuffle(mine.key.step_low, from);
      checked.key.right = as_float(shuffle(as_int(mine.key.right), from));
      checked.key.down = as_float(shuffle(as_int(mine.key.down), from));
      checked.value = as_float(shuffle(as_int(mine.value), from));
      checked.query = shuffle(mine.query, from);
      checked.patch = group;
      const int side = lane % 8 < 4 ? lane % 8 : lane % 8 + 1;
      const int near_y = strip_y + side / 3 - 1, near_x = strip_x + side % 3 - 1;
      const bool beaten = source >= 0 && near_y >= 0 && near_y < y.strips && near_x >= 0 && near_x < x.strips &&
                          beaten_in<kScale>(p, checked, near_y, near_x);
      const unsigned lost = ballot(beaten);
      const bool stays = source >= 0 && lane % 8 == 0 && ((lost >> (lane / 8 * 8)) & 0xffu) == 0;
      const unsigned staying = ballot(stays);
      if (staying == 0) continue;
      int slot = 0;
      if (lane == 0) slot = atomic_add(p.count, count_bits(staying));
      slot = shuffle(slot, 0) + count_bits(staying & ((1u << lane) - 1u));
      if (stays) {
        p.candidates[slot] = checked;
        p.valid[checked.query] = true;
      }
    }
  }
}

// Checks the candidates against all query pixels. A block keeps the table's rows of some query cells in shared memory.
// It looks at the patches around a cell if that cell exceeds a candidate's value.
template <bool kScale>
__global__ void __launch_bounds__(kCheckThreads, 4) check_mutual_kernel(const LIFT_FAST_GRID_CONSTANT MutualParams p) {
  LIFT_FAST_DYNAMIC_SHARED(shared);
  if (!runs(p.when)) return;
  const AxisParams &y = p.query.y, &x = p.query.x;
  float* const rows = reinterpret_cast<float*>(shared);
  const int thread = static_cast<int>(threadIdx.x);
  const int key_cells = p.key_y.cells * p.key_x.cells, query_cells = y.cells * x.cells;
  const int first = static_cast<int>(blockIdx.x) * p.rows;
  const int here = query_cells - first < p.rows ? query_cells - first : p.rows;
  float* const range = rows + p.rows * key_cells;  // largest and smallest scale around each cell
  const float* const from = p.table + std::int64_t{first} * key_cells;
  for (int i = thread; i < here * key_cells; i += kCheckThreads) rows[i] = from[i];
  // The strips that begin or end at a cell, or both, are among this one and the two before.
  const auto last_y = [&](int cell) { return KeyPixel::strip_before(y.low, y.strips, cell / x.cells); };
  const auto last_x = [&](int cell) { return KeyPixel::strip_before(x.low, x.strips, cell % x.cells); };
  const auto touches = [](const AxisParams& axis, int strip, int cell) {
    return strip >= 0 && (axis.low[strip] == cell || axis.high[strip] == cell);
  };
  if constexpr (kScale) {
    if (thread < here) {
      const int cell = first + thread, strip_y = last_y(cell), strip_x = last_x(cell);
      float high = 0.0f, low = as_float(0x7f800000);
      for (int i = 0; i < 9; ++i) {
        const int near_y = strip_y - i / 3, near_x = strip_x - i % 3;
        if (!touches(y, near_y, cell / x.cells) || !touches(x, near_x, cell % x.cells)) continue;
        // NaN, from a patch that takes no part, changes neither.
        high = larger(p.query.scale_high[near_y * x.strips + near_x], high);
        low = -larger(-p.query.scale_low[near_y * x.strips + near_x], -low);
      }
      range[2 * thread] = high;
      range[2 * thread + 1] = low;
    }
  }
  __syncthreads();
  const int count = *p.count;
  for (int number = thread; number < count; number += kCheckThreads) {
    const Candidate candidate = p.candidates[number];
    const float bar = candidate.value - kMatchSlack * magnitude(candidate.value);
    for (int i = 0; i < here; ++i) {
      float bound = candidate.key.similarity(rows + i * key_cells);
      if constexpr (kScale) bound *= bound > 0.0f ? range[2 * i] : range[2 * i + 1];
      // A comparison with NaN is false.
      if (!(bound >= bar)) continue;
      const int cell = first + i, strip_y = last_y(cell), strip_x = last_x(cell);
      const int own_y = candidate.patch / x.strips, own_x = candidate.patch % x.strips;
      for (int k = 0; k < 9; ++k) {
        const int near_y = strip_y - k / 3, near_x = strip_x - k % 3;
        if (!touches(y, near_y, cell / x.cells) || !touches(x, near_x, cell % x.cells)) continue;
        // The first kernel has looked at the patches around the candidate's own.
        const int off_y = near_y - own_y, off_x = near_x - own_x;
        if (off_y >= -1 && off_y <= 1 && off_x >= -1 && off_x <= 1) continue;
        if (beaten_in<kScale>(p, candidate, near_y, near_x)) p.valid[candidate.query] = false;
      }
    }
  }
}

}  // namespace lift_fast
