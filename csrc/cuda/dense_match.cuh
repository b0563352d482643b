// Dense matching: blocks of threads search a picture for the pixels that are most similar to those of another.
//
// Similarities of pixels are bilinear in both pictures' cells, so those of a group's four query cells to a patch's four
// corners bound every pixel of the group against every pixel of the patch. A block holds these bounds in shared memory,
// and each of its warps visits those patches of its own strips whose bound passes the least of the best values that the
// group's pixels have so far. To begin with, that bar is raised by the patches around the best key cell of each query
// cell. Without scales, and linear in each direction, a patch is largest at one of its four outermost pixels: those alone.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>

#include "dense_match_checks.hpp"
#if defined(LIFT_FAST_EMULATED_DEVICE)
#include "emulated_device.hpp"
#else
#include "tensor_core.cuh"
#include "warp.cuh"
#endif

namespace lift_fast {

constexpr int kMatchMaxWarps = 8;
constexpr int kGroupPixels = 64;  // of a group that are matched together: two to a lane
constexpr int kSeeds = 4;         // one for each query cell of a group
// Of a block for a point, for four groups, and for rows of the table.
constexpr int kMatchThreads = 128;
constexpr int kJudgeThreads = 256;

// Larger than every pixel's number.
constexpr int kNoPixel = 0x7fffffff;
constexpr int kNoSeed = -0x7fffffff - 1;
// A value may pass its corners by rounding: three interpolations, a scale, and the bound's own.
constexpr float kMatchSlack = 16 * 1.1920929e-7f;
constexpr float kMatchLargest = 3.4028235e38f;

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

// `shared_block`: bytes that a block of the device may have.
inline MatchLaunch group_launch(const GroupMatchCall& call, std::int64_t shared_block) {
  const std::int64_t cells = call.key.y.cells * call.key.x.cells;
  MatchLaunch launch{};
  // Large maps leave room for few blocks on a multiprocessor: more warps in each.
  launch.warps = cells <= 8192 ? 4 : kMatchMaxWarps;
  launch.staged = 4 * cells + GroupLayout(0, launch.warps).total <= shared_block;
  launch.shared = GroupLayout(launch.staged ? static_cast<int>(cells) : 0, launch.warps).total;
  const MatchBand& band = call.band;
  const std::int64_t groups = (band.end_y - band.first_y) * (band.end_x - band.first_x);
  // The outermost groups are larger than the rest; few groups share their pixels among many blocks.
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

struct PictureParams {
  AxisParams y, x;
  const float *scale, *scale_high, *scale_low, *scale_rows;
};

struct Candidate;

struct GroupParams {
  const float* table;
  PictureParams key;
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
  PictureParams key;
  float* similarity;
  std::int64_t* index;
  MatchWhen when;
};

struct MutualParams {
  const float* table;
  PictureParams query;
  AxisParams key_y, key_x;
  const std::int64_t* index;
  bool* valid;
  int* count;  // of the candidates
  Candidate* candidates;
  int rows;  // of the table that a block judges
  MatchWhen when;
};

inline AxisParams axis_params(const MatchAxis& axis) {
  return {static_cast<int>(axis.cells), static_cast<int>(axis.pixels), static_cast<int>(axis.strips), axis.low,
          axis.high, axis.first, axis.weight};
}

inline PictureParams picture_params(const MatchPicture& picture) {
  return {axis_params(picture.y), axis_params(picture.x), picture.scale, picture.scale_high, picture.scale_low,
          picture.scale_rows};
}

inline GroupParams group_params(const GroupMatchCall& call, const MatchLaunch& launch) {
  const MatchBand& band = call.band;
  GroupParams params{};
  params.table = call.table;
  params.key = picture_params(call.key);
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
  return {call.table, picture_params(call.key), call.similarity, call.index, call.when};
}

inline MutualParams mutual_params(const MutualMatchCall& call) {
  MutualParams params{};
  params.table = call.table;
  params.query = picture_params(call.query);
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

inline MatchLaunch point_launch(const PointMatchCall& call) {
  constexpr int kWarps = kMatchThreads / 32;
  return {call.points, kWarps, 2 * 4 * kWarps, 1, false};
}

inline MatchLaunch find_launch(const MutualMatchCall& call) {
  constexpr int kWarps = kMatchThreads / 32;
  return {(call.query.y.strips * call.query.x.strips + kWarps - 1) / kWarps, kWarps, 0, 1, false};
}

inline MatchLaunch judge_launch(const MutualMatchCall& call) {
  const std::int64_t query_cells = call.query.y.cells * call.query.x.cells;
  const std::int64_t key_cells = call.key_y.cells * call.key_x.cells, rows = mutual_params(call).rows;
  return {(query_cells + rows - 1) / rows, kJudgeThreads / 32, 4 * rows * (key_cells + 2), 1, true};
}

__device__ __forceinline__ bool runs(const MatchWhen& when) {
  return when.flag == nullptr || (*when.flag != 0) == when.wanted;
}
__device__ __forceinline__ float magnitude(float value) { return value < 0.0f ? -value : value; }
__device__ __forceinline__ float larger(float a, float b) { return a > b ? a : b; }
// Zero, or NaN if the value is not finite.
__device__ __forceinline__ float unsound(float value) { return value - value; }
// An integer that is ordered as the number is, with one zero; and the number of such an integer.
__device__ __forceinline__ int ordered(int bits) { return bits ^ ((bits >> 31) & 0x7fffffff); }
__device__ __forceinline__ int rank_of(float value) { return ordered(as_int(value + 0.0f)); }
__device__ __forceinline__ float ranked(int rank) { return as_float(ordered(rank)); }

// A bilinear function of the shares (right, down) from its values at the four corners; exact where they are equal, and
// the same wherever it is computed.
struct Bilinear {
  float near, right, down, both;
  __device__ __forceinline__ Bilinear(float top_left, float top_right, float low_left, float low_right)
      : near(top_left),
        right(top_right - top_left),
        down(low_left - top_left),
        both((low_right - low_left) - (top_right - top_left)) {}
  __device__ __forceinline__ float operator()(float share_x, float share_y) const {
    return multiply_add(multiply_add(both, share_y, right), share_x, multiply_add(down, share_y, near));
  }
};

// The better of two matches, the lower pixel among equals; what overflows takes no part.
__device__ __forceinline__ void improve(float value, int pixel, float& best, int& index) {
  const bool better = (value > best || (value == best && pixel < index)) && magnitude(value) <= kMatchLargest;
  best = better ? value : best;
  index = better ? pixel : index;
}

// A patch's four cells.
struct Corners {
  int top_left, top_right, low_left, low_right;
  __device__ __forceinline__ Corners(const AxisParams& y, const AxisParams& x, int strip_y, int strip_x) {
    const int top = y.low[strip_y] * x.cells, low = y.high[strip_y] * x.cells;
    const int left = x.low[strip_x], right = x.high[strip_x];
    top_left = top + left;
    top_right = top + right;
    low_left = low + left;
    low_right = low + right;
  }
};

// What a bound becomes by the patch's scales, rounding allowed for; `slack` without scales.
template <bool kScale>
__device__ __forceinline__ float scaled_bound(const PictureParams& p, int patch, float bound, float slack) {
  if constexpr (!kScale) return bound + slack;
  const float high = p.scale_high[patch];
  return multiply_add(slack, high, bound * (bound > 0.0f ? high : p.scale_low[patch]));
}

// Calls visit(value, pixel) for the pixels of a patch that may be its largest, until that returns false.
template <bool kScale, class Visit>
__device__ __forceinline__ void each_pixel(const PictureParams& p, int strip_y, int strip_x, const Bilinear& patch,
                                           Visit visit) {
  const int first_y = p.y.first[strip_y], end_y = p.y.first[strip_y + 1];
  const int first_x = p.x.first[strip_x], end_x = p.x.first[strip_x + 1];
  if constexpr (kScale) {
    for (int y = first_y; y < end_y; ++y) {
      const float share_y = p.y.weight[y];
      for (int x = first_x; x < end_x; ++x) {
        const int pixel = y * p.x.pixels + x;
        if (!visit(patch(p.x.weight[x], share_y) * p.scale[pixel], pixel)) return;
      }
    }
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int y = i < 2 ? first_y : end_y - 1, x = i % 2 == 0 ? first_x : end_x - 1;
      if (!visit(patch(p.x.weight[x], p.y.weight[y]), y * p.x.pixels + x)) return;
    }
  }
}

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
        // Without a pixel: a best that no bound reaches.
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
    return larger(larger(a, b), larger(c, d)) + ((unsound(a) + unsound(b)) + (unsound(c) + unsound(d)));
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
    // The best cells only to a few digits, with the slot in place of the others; negative numbers in any order.
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
        seed_cells_[warp_ * kSeeds + i] =
            p_.aligned ? 4 * (slot / 4 * threads + thread) + slot % 4 : slot * threads + thread;
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
    const float bound = max_nan(max_nan(upper(top + left), upper(top + right)), max_nan(upper(low + left), upper(low + right)));
    return scaled_bound<kScale>(p_.key, strip_y * p_.key.x.strips + strip_x, bound, slack_);
  }

  // The strip that begins at a cell, if all are as long; else one about there. Beside the strips between two cells there
  // is one of pixels beyond the first centre and one beyond the last, or one at each centre.
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
        // NaN passes nothing; an equal bound may hold a lower pixel.
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

  // Looks for better matches of the group's pixels in one patch; whether there may be some.
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
      const float bound = scaled_bound<kScale>(p_.key, strip_y * p_.key.x.strips + strip_x, most, slack_);
      unsigned open = ballot(!(bound < best_[r]));
      if (open == 0) continue;
      promising = true;
      const Bilinear patch(value[r][0], value[r][1], value[r][2], value[r][3]);
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

  // With scales: a row of the patch is linear, so that its ends and its largest scale bound it; most hold nothing.
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

  // For the pixel of one lane alone: the lanes share the patch's pixels.
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
    // Before anyone shares again.
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
    if ((unsound(a) + unsound(b)) + (unsound(c) + unsound(d)) != 0.0f) continue;
    if constexpr (kScale) {
      const float most = larger(larger(a, b), larger(c, d));
      const float size = larger(larger(magnitude(a), magnitude(b)), larger(magnitude(c), magnitude(d)));
      if (scaled_bound<kScale>(p.key, patch, most, kMatchSlack * size) < best) continue;
    }
    each_pixel<kScale>(p.key, strip_y, strip_x, Bilinear(a, b, c, d), [&](float value, int pixel) {
      improve(value, pixel, best, index);
      return true;
    });
  }
  // The lowest pixel of those lanes that hold the largest value; each warp's, then the block's.
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
  // Its similarity to the query cell that a row of the table belongs to; NaN where one of them is not finite.
  __device__ __forceinline__ float similarity(const float* row) const {
    const float a = row[cell], b = row[cell + step_right];
    const float c = row[cell + step_low], d = row[cell + step_low + step_right];
    return Bilinear(a, b, c, d)(right, down) + ((unsound(a) + unsound(b)) + (unsound(c) + unsound(d)));
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

// A match to judge: the query pixel, the patch that it lies in, the key pixel and their similarity.
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

// Whether a query pixel of this patch is more similar than the candidate's, or as similar and lower.
template <bool kScale>
__device__ __forceinline__ bool beaten_in(const MutualParams& p, const Candidate& candidate, int strip_y, int strip_x) {
  const Bilinear patch = seen_from(p, candidate.key, Corners(p.query.y, p.query.x, strip_y, strip_x));
  bool beaten = false;
  // A patch with a corner that is not finite has no pixel that is.
  each_pixel<kScale>(p.query, strip_y, strip_x, patch, [&](float value, int pixel) {
    beaten = (value > candidate.value || (value == candidate.value && pixel < candidate.query)) &&
             magnitude(value) <= kMatchLargest;
    return !beaten;
  });
  return beaten;
}

// Finds the candidates: matches whose query pixel is the best one, for the key pixel, of its own patch and of those around
// it. One warp for each group of query pixels. Without scales only its four outermost pixels can be the best.
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
      // Strips of one pixel have fewer outermost ones.
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
      Candidate judged;
      judged.key.cell = shuffle(mine.key.cell, from);
      judged.key.step_right = shuffle(mine.key.step_right, from);
      judged.key.step_low = shuffle(mine.key.step_low, from);
      judged.key.right = as_float(shuffle(as_int(mine.key.right), from));
      judged.key.down = as_float(shuffle(as_int(mine.key.down), from));
      judged.value = as_float(shuffle(as_int(mine.value), from));
      judged.query = shuffle(mine.query, from);
      judged.patch = group;
      const int side = lane % 8 < 4 ? lane % 8 : lane % 8 + 1;
      const int near_y = strip_y + side / 3 - 1, near_x = strip_x + side % 3 - 1;
      const bool beaten = source >= 0 && near_y >= 0 && near_y < y.strips && near_x >= 0 && near_x < x.strips &&
                          beaten_in<kScale>(p, judged, near_y, near_x);
      const unsigned lost = ballot(beaten);
      const bool stays = source >= 0 && lane % 8 == 0 && ((lost >> (lane / 8 * 8)) & 0xffu) == 0;
      const unsigned staying = ballot(stays);
      if (staying == 0) continue;
      int slot = 0;
      if (lane == 0) slot = atomic_add(p.count, count_bits(staying));
      slot = shuffle(slot, 0) + count_bits(staying & ((1u << lane) - 1u));
      if (stays) {
        p.candidates[slot] = judged;
        p.valid[judged.query] = true;
      }
    }
  }
}

// Judges the candidates against all query pixels: a block has rows of the table, those of some query cells, in its shared
// memory, and looks at the patches around a cell where that cell passes a candidate's value.
template <bool kScale>
__global__ void __launch_bounds__(kJudgeThreads, 4) judge_mutual_kernel(const LIFT_FAST_GRID_CONSTANT MutualParams p) {
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
  for (int i = thread; i < here * key_cells; i += kJudgeThreads) rows[i] = from[i];
  // The strips that begin or end at a cell, or both: this one and the two before, where they do.
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
        // NaN, of a patch that takes no part, leaves both as they are.
        high = larger(p.query.scale_high[near_y * x.strips + near_x], high);
        low = -larger(-p.query.scale_low[near_y * x.strips + near_x], -low);
      }
      range[2 * thread] = high;
      range[2 * thread + 1] = low;
    }
  }
  __syncthreads();
  const int count = *p.count;
  for (int number = thread; number < count; number += kJudgeThreads) {
    const Candidate candidate = p.candidates[number];
    const float bar = candidate.value - kMatchSlack * magnitude(candidate.value);
    for (int i = 0; i < here; ++i) {
      float bound = candidate.key.similarity(rows + i * key_cells);
      if constexpr (kScale) bound *= bound > 0.0f ? range[2 * i] : range[2 * i + 1];
      // NaN passes nothing.
      if (!(bound >= bar)) continue;
      const int cell = first + i, strip_y = last_y(cell), strip_x = last_x(cell);
      const int own_y = candidate.patch / x.strips, own_x = candidate.patch % x.strips;
      for (int k = 0; k < 9; ++k) {
        const int near_y = strip_y - k / 3, near_x = strip_x - k % 3;
        if (!touches(y, near_y, cell / x.cells) || !touches(x, near_x, cell % x.cells)) continue;
        // Those around the candidate's own have been looked at.
        const int off_y = near_y - own_y, off_x = near_x - own_x;
        if (off_y >= -1 && off_y <= 1 && off_x >= -1 && off_x <= 1) continue;
        if (beaten_in<kScale>(p, candidate, near_y, near_x)) p.valid[candidate.query] = false;
      }
    }
  }
}

}  // namespace lift_fast
