// Dense matching: blocks of threads search an image for the pixels that are most similar to those of another.
//
// Similarities of pixels are bilinear in both images' cells, so those of a group's four query cells to a patch's four
// corners bound every pixel of the group against every pixel of the patch. A block holds these bounds in shared memory.
// Each of its warps visits the patches of its own strips whose bound exceeds the threshold: the least of the best
// values that the group's pixels have so far. The patches around the best key cell of each query cell come first and
// raise it. Without scales a patch is linear in each direction, so its largest value is at one of its four outermost
// pixels. With scales the similarities are cosines, up to the query's norm, and few of the patches that the bound leaves
// can reach a pixel's best value by the projection of its descriptor onto the patch.
#pragma once

#include <cstdint>

#include "dense_match_patch.cuh"
#include "dense_match_span.hpp"

namespace lift_fast {

// A block's group of query pixels, 64 at a time, two to a lane: lane and lane + 32.
template <bool kScale, bool kStaged>
class GroupMatcher {
 public:
  __device__ __forceinline__ GroupMatcher(const GroupParams& params, unsigned char* shared)
      : p_(params),
        warps_(static_cast<int>(blockDim.x) / 32),
        warp_(static_cast<int>(threadIdx.x) / 32),
        lane_(static_cast<int>(threadIdx.x) % 32),
        cells_(params.key.y.cells * params.key.x.cells) {
    const GroupLayout at(kStaged ? cells_ : 0, warps_);
    upper_ = reinterpret_cast<float*>(shared);
    values_ = reinterpret_cast<float*>(shared + at.values);
    indices_ = reinterpret_cast<int*>(shared + at.indices);
    seeds_ = reinterpret_cast<int*>(shared + at.seeds);
    seed_cells_ = reinterpret_cast<int*>(shared + at.seed_cells);
    largest_ = reinterpret_cast<int*>(shared + at.largest);
  }

  __device__ __forceinline__ void match() {
    const int number = static_cast<int>(blockIdx.x) / p_.portions, portion = static_cast<int>(blockIdx.x) % p_.portions;
    const int strip_y = p_.first_y + number / p_.across, strip_x = p_.first_x + number % p_.across;
    const int start_y = p_.query_y.first[strip_y], start_x = p_.query_x.first[strip_x];
    const int across = p_.query_x.first[strip_x + 1] - start_x;
    const int count = (p_.query_y.first[strip_y + 1] - start_y) * across;
    // The last portions of short strips are empty.
    if (portion * kGroupPixels >= count) return;
    const std::int64_t top = std::int64_t{p_.query_y.low[strip_y] - p_.top} * p_.width;
    const std::int64_t low = std::int64_t{p_.query_y.high[strip_y] - p_.top} * p_.width;
    const int left = p_.query_x.low[strip_x] - p_.left, right = p_.query_x.high[strip_x] - p_.left;
    row_[0] = p_.table + (top + left) * cells_;
    row_[1] = p_.table + (top + right) * cells_;
    row_[2] = p_.table + (low + left) * cells_;
    row_[3] = p_.table + (low + right) * cells_;
    bound_cells();
    const int step = p_.portions * kGroupPixels;
    for (int base = portion * kGroupPixels, rest = count - base; rest > 0; base += step, rest -= step) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int own = base + lane_ + 32 * r;
        const bool exists = lane_ + 32 * r < rest;
        right_[r] = exists ? p_.query_x.weight[start_x + own % across] : 0.0f;
        down_[r] = exists ? p_.query_y.weight[start_y + own / across] : 0.0f;
        // Lanes without a pixel have a best value that no bound reaches.
        best_[r] = as_float(exists ? static_cast<int>(0xff800000u) : 0x7f800000);
        index_[r] = kNoPixel;
      }
      for (int seed = warp_; seed < kSeeds; seed += warps_) visit_seed(seed);
      share();
      scan();
      share();
      if (warp_ != 0) continue;
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int own = base + lane_ + 32 * r;
        if (lane_ + 32 * r >= rest) continue;
        const std::int64_t out = std::int64_t{start_y + own / across} * p_.query_x.pixels + start_x + own % across;
        p_.similarity[out] = best_[r];
        p_.index[out] = index_[r] == kNoPixel ? -1 : index_[r];
      }
    }
  }

 private:
  __device__ __forceinline__ float bound_of(float a, float b, float c, float d) const {
    return larger(larger(a, b), larger(c, d)) +
           ((zero_if_finite(a) + zero_if_finite(b)) + (zero_if_finite(c) + zero_if_finite(d)));
  }

  // The largest similarity of the group's query cells to a key cell; NaN where one is not finite.
  __device__ __forceinline__ float upper(int cell) const {
    if constexpr (kStaged) return upper_[cell];
    return bound_of(row_[0][cell], row_[1][cell], row_[2][cell], row_[3][cell]);
  }

  // `slot` counts the cells that this thread looks at.
  __device__ __forceinline__ void look(int cell, int slot, float a, float b, float c, float d, int (&seed)[kSeeds],
                                       float& most) {
    const float bound = bound_of(a, b, c, d);
    if constexpr (kStaged) upper_[cell] = bound;
    if (!(bound == bound)) return;
    most = larger(most, larger(larger(magnitude(a), magnitude(b)), larger(magnitude(c), magnitude(d))));
    // The best cells to a few digits only, with the slot in the place of the others; negative numbers in any order.
    const int tag = slot < 1023 ? slot : 1023;
    const float value[kSeeds] = {a, b, c, d};
#pragma unroll
    for (int i = 0; i < kSeeds; ++i) {
      const int key = (as_int(value[i]) & ~1023) | tag;
      seed[i] = key > seed[i] ? key : seed[i];
    }
  }

  __device__ __forceinline__ void bound_cells() {
    const int thread = static_cast<int>(threadIdx.x), threads = 32 * warps_;
    int seed[kSeeds] = {kNoSeed, kNoSeed, kNoSeed, kNoSeed};
    float most = 0.0f;
    if (p_.aligned) {
      int slot = 0;
      for (int cell = 4 * thread; cell < cells_; cell += 4 * threads, slot += 4) {
        float4 quad[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) quad[i] = *reinterpret_cast<const float4*>(row_[i] + cell);
        look(cell, slot, quad[0].x, quad[1].x, quad[2].x, quad[3].x, seed, most);
        look(cell + 1, slot + 1, quad[0].y, quad[1].y, quad[2].y, quad[3].y, seed, most);
        look(cell + 2, slot + 2, quad[0].z, quad[1].z, quad[2].z, quad[3].z, seed, most);
        look(cell + 3, slot + 3, quad[0].w, quad[1].w, quad[2].w, quad[3].w, seed, most);
      }
    } else {
      int slot = 0;
      for (int cell = thread; cell < cells_; cell += threads, ++slot) {
        look(cell, slot, row_[0][cell], row_[1][cell], row_[2][cell], row_[3][cell], seed, most);
      }
    }
#pragma unroll
    for (int i = 0; i < kSeeds; ++i) {
      const int best = warp_max(seed[i]), slot = best & 1023;
      const int owner = lowest_bit(ballot(seed[i] == best));
      if (lane_ == owner) {
        seeds_[warp_ * kSeeds + i] = best;
        seed_cells_[warp_ * kSeeds + i] = p_.aligned ? 4 * (slot / 4 * threads + thread) + slot % 4
                                                     : slot * threads + thread;
      }
    }
    const int largest = warp_max(as_int(most));
    if (lane_ == 0) largest_[warp_] = largest;
    __syncthreads();
    int whole = 0;
    for (int i = 0; i < warps_; ++i) whole = largest_[i] > whole ? largest_[i] : whole;
    slack_ = kMatchSlack * as_float(whole);
  }

  // No value of the group in this patch is larger; NaN where the patch takes no part.
  __device__ __forceinline__ float bound_patch(int top, int low, int strip_y, int strip_x) const {
    const int left = p_.key.x.low[strip_x], right = p_.key.x.high[strip_x];
    const float bound = max_nan(max_nan(upper(top + left), upper(top + right)),
                                max_nan(upper(low + left), upper(low + right)));
    return scaled_bound<kScale>(p_.key, strip_y * p_.key.x.strips + strip_x, bound, slack_);
  }

  // The strip that begins at a cell if all strips are equally long, else one near it. In addition to the strips between
  // two cells there is one beyond the first centre and one beyond the last, or one at each centre.
  static __device__ __forceinline__ int strip_at(const AxisParams& axis, int cell) {
    const int strip = static_cast<int>(std::int64_t{cell} * (axis.strips - 1) / axis.cells) + 1;
    return strip < axis.strips ? strip : axis.strips - 1;
  }

  // The most promising patch around the best key cell of a query cell.
  __device__ __forceinline__ void visit_seed(int seed) {
    int best = kNoSeed, cell = 0;
    for (int i = 0; i < warps_; ++i) {
      const int other = seeds_[i * kSeeds + seed];
      cell = other > best ? seed_cells_[i * kSeeds + seed] : cell;
      best = other > best ? other : best;
    }
    if (best == kNoSeed) return;
    const AxisParams &y = p_.key.y, &x = p_.key.x;
    const int near_y = strip_at(y, cell / x.cells), near_x = strip_at(x, cell % x.cells);
    const int strip_y = near_y - (lane_ / 2) % 2, strip_x = near_x - lane_ % 2;
    float bound = as_float(0x7fffffff);
    if (strip_y >= 0 && strip_x >= 0) {
      bound = bound_patch(y.low[strip_y] * x.cells, y.high[strip_y] * x.cells, strip_y, strip_x);
    }
    const int rank = bound == bound ? rank_of(bound) : kNoSeed;
    const int most = warp_max(rank);
    if (most == kNoSeed) return;
    const int lane = lowest_bit(ballot(rank == most));
    visit(near_y - (lane / 2) % 2, near_x - lane % 2);
  }

  // The least of the best values so far.
  __device__ __forceinline__ float bar() const {
    return ranked(warp_min(rank_of(best_[0] < best_[1] ? best_[0] : best_[1])));
  }

  __device__ __forceinline__ void scan() {
    const AxisParams &y = p_.key.y, &x = p_.key.x;
    float least = bar();
    for (int strip_y = warp_; strip_y < y.strips; strip_y += warps_) {
      const int top = y.low[strip_y] * x.cells, low = y.high[strip_y] * x.cells;
      for (int base = 0; base < x.strips; base += 32) {
        const int strip_x = base + lane_;
        const float bound = strip_x < x.strips ? bound_patch(top, low, strip_y, strip_x) : as_float(0x7fffffff);
        // A comparison with NaN is false; an equal bound may hold a lower pixel.
        unsigned open = ballot(bound >= least);
        while (open != 0) {
          const int lane = lowest_bit(open);
          open &= open - 1;
          if (!(as_float(shuffle(as_int(bound), lane)) >= least)) continue;
          if (visit(strip_y, base + lane)) least = bar();
        }
      }
    }
  }

  // Looks for better matches of the group's pixels in one patch; returns whether there may be some.
  __device__ __forceinline__ bool visit(int strip_y, int strip_x) {
    const Corners at(p_.key.y, p_.key.x, strip_y, strip_x);
    const int cell[4] = {at.top_left, at.top_right, at.low_left, at.low_right};
    float value[2][4];
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const Bilinear corner(row_[0][cell[k]], row_[1][cell[k]], row_[2][cell[k]], row_[3][cell[k]]);
#pragma unroll
      for (int r = 0; r < 2; ++r) value[r][k] = corner(right_[r], down_[r]);
    }
    bool promising = false;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float most = larger(larger(value[r][0], value[r][1]), larger(value[r][2], value[r][3]));
      const int number = strip_y * p_.key.x.strips + strip_x;
      const float bound = scaled_bound<kScale>(p_.key, number, most, slack_);
      bool open_here = !(bound < best_[r]);
      unsigned open = ballot(open_here);
      if (open == 0) continue;
      const Bilinear patch(value[r][0], value[r][1], value[r][2], value[r][3]);
      if constexpr (kScale) {
        open_here = open_here && reaches(p_.key, number, patch, best_[r] - slack_ * p_.key.scale_high[number]);
        open = ballot(open_here);
        if (open == 0) continue;
      }
      promising = true;
      if constexpr (kScale) {
        if ((open & (open - 1)) == 0) {
          visit_for(lowest_bit(open), strip_y, strip_x, value[r], best_[r], index_[r]);
        } else {
          visit_rows(strip_y, strip_x, patch, best_[r], index_[r]);
        }
      } else {
        each_pixel<kScale>(p_.key, strip_y, strip_x, patch, [&](float v, int pixel) {
          improve(v, pixel, best_[r], index_[r]);
          return true;
        });
      }
    }
    return promising;
  }

  // With scales: a row of the patch is linear, so its ends and its largest scale bound it. Most rows hold no better
  // match.
  __device__ __forceinline__ void visit_rows(int strip_y, int strip_x, const Bilinear& patch, float& best, int& index) {
    const AxisParams &y = p_.key.y, &x = p_.key.x;
    const int end_y = y.first[strip_y + 1], first_x = x.first[strip_x], end_x = x.first[strip_x + 1];
    const float near = x.weight[first_x], far = x.weight[end_x - 1];
    const float low = p_.key.scale_low[strip_y * x.strips + strip_x];
    for (int row = y.first[strip_y]; row < end_y; ++row) {
      const float share = y.weight[row], high = p_.key.scale_rows[row * x.strips + strip_x];
      const float most = larger(patch(near, share), patch(far, share));
      const float bound = multiply_add(slack_, high, most * (most > 0.0f ? high : low));
      // Written so that NaN is looked at.
      if (ballot(!(bound < best)) == 0) continue;
      for (int column = first_x; column < end_x; ++column) {
        const int pixel = row * x.pixels + column;
        improve(patch(x.weight[column], share) * p_.key.scale[pixel], pixel, best, index);
      }
    }
  }

  // For the pixel of one lane: the lanes share the patch's pixels.
  __device__ __forceinline__ void visit_for(int owner, int strip_y, int strip_x, const float (&corner)[4], float& best,
                                            int& index) {
    float value[4];
#pragma unroll
    for (int k = 0; k < 4; ++k) value[k] = as_float(shuffle(as_int(corner[k]), owner));
    const Bilinear patch(value[0], value[1], value[2], value[3]);
    const AxisParams &y = p_.key.y, &x = p_.key.x;
    const int first_y = y.first[strip_y], first_x = x.first[strip_x], across = x.first[strip_x + 1] - first_x;
    const int count = (y.first[strip_y + 1] - first_y) * across;
    float most = as_float(static_cast<int>(0xff800000u));
    int found = kNoPixel;
    for (int i = lane_; i < count; i += 32) {
      const int row = first_y + i / across, column = first_x + i % across, pixel = row * x.pixels + column;
      improve(patch(x.weight[column], y.weight[row]) * p_.key.scale[pixel], pixel, most, found);
    }
    const int rank = rank_of(most), top = warp_max(rank);
    const int lowest = warp_min(rank == top ? found : kNoPixel);
    if (lane_ == owner) improve(ranked(top), lowest, best, index);
  }

  // Every warp learns the best matches of all.
  __device__ __forceinline__ void share() {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      values_[warp_ * kGroupPixels + lane_ + 32 * r] = best_[r];
      indices_[warp_ * kGroupPixels + lane_ + 32 * r] = index_[r];
    }
    __syncthreads();
    for (int i = 0; i < warps_; ++i) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        improve(values_[i * kGroupPixels + lane_ + 32 * r], indices_[i * kGroupPixels + lane_ + 32 * r], best_[r],
                index_[r]);
      }
    }
    // Before the next exchange.
    __syncthreads();
  }

  const GroupParams& p_;
  const int warps_, warp_, lane_, cells_;
  float *upper_, *values_;
  int *indices_, *seeds_, *seed_cells_, *largest_;
  const float* row_[4];
  float slack_;
  float right_[2], down_[2], best_[2];
  int index_[2];
};

template <bool kScale, bool kStaged>
__global__ void __launch_bounds__(32 * kMatchMaxWarps, 3)
    match_groups_kernel(const LIFT_FAST_GRID_CONSTANT GroupParams params) {
  LIFT_FAST_DYNAMIC_SHARED(shared);
  if (!runs(params.when)) return;
  GroupMatcher<kScale, kStaged>(params, shared).match();
}

inline auto* groups_kernel(const GroupMatchCall& call, const MatchLaunch& cut) {
  return call.key.scale != nullptr
             ? (cut.staged ? match_groups_kernel<true, true> : match_groups_kernel<true, false>)
             : (cut.staged ? match_groups_kernel<false, true> : match_groups_kernel<false, false>);
}

// A thread for each patch.
__global__ void __launch_bounds__(kMatchThreads) match_spans_kernel(const LIFT_FAST_GRID_CONSTANT SpanParams p) {
  const int patch = static_cast<int>(blockIdx.x) * kMatchThreads + static_cast<int>(threadIdx.x);
  if (patch >= p.y.strips * p.x.strips) return;
  const int strip_y = patch / p.x.strips, strip_x = patch % p.x.strips;
  double corners[4][4];
  corner_products(p.gram, p.y.cells, p.x.cells, {p.y.low[strip_y], p.y.high[strip_y]},
                  {p.x.low[strip_x], p.x.high[strip_x]}, corners);
  reinterpret_cast<PatchSpan*>(p.spans)[patch] = span_of(corners, p.scale_high[patch]);
}

// One block for a point: its threads share the patches.
template <bool kScale>
__global__ void __launch_bounds__(kMatchThreads, 8) match_points_kernel(const LIFT_FAST_GRID_CONSTANT PointParams p) {
  LIFT_FAST_DYNAMIC_SHARED(shared);
  if (!runs(p.when)) return;
  const AxisParams &y = p.key.y, &x = p.key.x;
  const float* row = p.table + std::int64_t{static_cast<int>(blockIdx.x)} * (y.cells * x.cells);
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, patches = y.strips * x.strips;
  float best = as_float(static_cast<int>(0xff800000u));
  int index = kNoPixel;
  for (int patch = thread; patch < patches; patch += kMatchThreads) {
    const int strip_y = patch / x.strips, strip_x = patch % x.strips;
    const Corners at(y, x, strip_y, strip_x);
    const float a = row[at.top_left], b = row[at.top_right], c = row[at.low_left], d = row[at.low_right];
    if ((zero_if_finite(a) + zero_if_finite(b)) + (zero_if_finite(c) + zero_if_finite(d)) != 0.0f) continue;
    const Bilinear of(a, b, c, d);
    if constexpr (kScale) {
      const float most = larger(larger(a, b), larger(c, d));
      const float size = larger(larger(magnitude(a), magnitude(b)), larger(magnitude(c), magnitude(d)));
      const float slack = kMatchSlack * size;
      if (scaled_bound<kScale>(p.key, patch, most, slack) < best ||
          !reaches(p.key, patch, of, best - slack * p.key.scale_high[patch])) {
        continue;
      }
    }
    each_pixel<kScale>(p.key, strip_y, strip_x, of, [&](float value, int pixel) {
      improve(value, pixel, best, index);
      return true;
    });
  }
  // The lowest pixel of the lanes that hold the largest value, of each warp, then of the block.
  int* const ranks = reinterpret_cast<int*>(shared);
  int* const pixels = ranks + kMatchThreads / 32;
  const int rank = rank_of(best), most = warp_max(rank);
  const int pixel = warp_min(rank == most ? index : kNoPixel);
  if (lane == 0) {
    ranks[thread / 32] = most;
    pixels[thread / 32] = pixel;
  }
  __syncthreads();
  if (thread != 0) return;
  for (int i = 1; i < kMatchThreads / 32; ++i) improve(ranked(ranks[i]), pixels[i], best, index);
  improve(ranked(ranks[0]), pixels[0], best, index);
  p.similarity[blockIdx.x] = best;
  p.index[blockIdx.x] = index == kNoPixel ? -1 : index;
}

}  // namespace lift_fast
