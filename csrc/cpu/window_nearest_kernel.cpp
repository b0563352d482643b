// The windowed matcher. A tile of neighbouring queries of one grid row meets one row of keys at a time. The keys of a
// row lie side by side for each channel, so vectors may start at any cell and cover the union of the tile's windows
// with little waste. Keys come in ascending order, so the lowest index stays first among equal similarities. A dot
// product is accumulated over c in order, in one register lane, wherever the pair lies: equal rows give bitwise equal
// similarities, and the result does not depend on tiles or threads. A tile that is abandoned early holds no match.
#include "simd/simd.hpp"
#include "threads.hpp"
#include "window_nearest.hpp"

namespace lift_fast {
namespace {

// 12 accumulators, 2 vectors of keys and a broadcast query in 16 registers; 24, 3 and 1 in AVX-512's 32. With few
// queries in a tile the union of their windows is little wider than one window.
constexpr int kQueries = by_lanes(6, 6, 8);
constexpr int kVectors = by_lanes(2, 2, 3);
// Queries of a tile that are packed at one time.
constexpr int kQueryWidth = kQueries <= kLanes ? kQueries : kQueries / 2;
static_assert(kQueryWidth <= kLanes && kQueries % kQueryWidth == 0, "a tile is packed in equal parts");
static_assert(kVectors == 2 || kVectors == 3, "steps of one, two and three vectors");
constexpr unsigned kAllLanes = (1u << kLanes) - 1;

inline IntVec ramp() {
  IntVec v;
  for (int i = 0; i < kLanes; ++i) v[i] = i;
  return v;
}

inline double squared_norm(const float* row, std::int64_t begin, std::int64_t end) {
  // Explicit vectors: compilers do not vectorise the same sum of scalars.
  typedef double Doubles __attribute__((vector_size(4 * kLanes)));
  typedef float Floats __attribute__((vector_size(2 * kLanes)));
  constexpr int half = kLanes / 2;
  Doubles sums[2] = {};
  std::int64_t i = begin;
  for (; i + kLanes <= end; i += kLanes) {
    for (int j = 0; j < 2; ++j) {
      Floats values;
      __builtin_memcpy(&values, row + i + j * half, sizeof values);
      const Doubles wide = __builtin_convertvector(values, Doubles);
      sums[j] += wide * wide;
    }
  }
  double sum = 0.0;
  for (; i < end; ++i) sum += static_cast<double>(row[i]) * row[i];
  for (int j = 0; j < half; ++j) sum += sums[0][j] + sums[1][j];
  return sum;
}

// A row's factor, NaN for a row that takes no part, and a bound for the channels after each section: the product of two
// rows' bounds is at least the rest of their dot product plus its rounding.
struct RowScale {
  double scale;
  float rest[window_nearest_sections];
  RowScale(const float* row, const WindowNearestCall& call) {
    double left[window_nearest_sections], sum = 0.0;
    for (std::int64_t s = call.sections - 1; s >= 0; --s) {
      left[s] = sum;
      sum += squared_norm(row, s == 0 ? 0 : call.section_end[s - 1], call.section_end[s]);
    }
    scale = 1.0;
    const double norm = __builtin_sqrt(sum);
    if (call.normalize) scale = 1.0 / (norm > 1e-12 ? norm : 1e-12);
    // Squares of finite floats never overflow a double.
    if (!(sum < __builtin_inf())) scale = __builtin_nan("");
    // A sum of c products, each step rounded twice, errs by less than 2 c 2^-24 |q| |k|; twice that for the bound's own
    // rounding. Each factor holds the square root of it. Products that underflow are negligible beside 1e-19^2.
    const double slack = __builtin_sqrt(static_cast<double>(call.c + 16) * 0x1p-22);
    for (std::int64_t s = 0; s < call.sections; ++s) {
      rest[s] = static_cast<float>((__builtin_sqrt(left[s]) + slack * norm) * scale * (1 + 1e-6) + 1e-19);
    }
  }
};

// Packs `count` scaled rows as [c][stride], followed by their bounds; zeros beyond the rows. kWidth columns at a time;
// `stride` is a multiple of it.
template <int kWidth>
void pack(const float* rows, std::int64_t count, std::int64_t stride, const WindowNearestCall& call, float* packed) {
  static_assert(kWidth <= kLanes, "the rows of a block are columns of one vector");
  const std::int64_t c = call.c;
  for (std::int64_t first = 0; first < stride; first += kWidth) {
    const int filled = static_cast<int>(larger<std::int64_t>(smaller<std::int64_t>(kWidth, count - first), 0));
    float scale[kWidth] = {}, before[kWidth] = {};
    for (int r = 0; r < kWidth; ++r) {
      float rest[window_nearest_sections] = {};
      if (r < filled) {
        const RowScale by(rows + (first + r) * c, call);
        // As a float the reciprocal of a norm above 1e38 would be subnormal, with few digits left.
        before[r] = by.scale < 0x1p-100 ? 0x1p-64f : 1.0f;
        scale[r] = static_cast<float>(by.scale / before[r]);
        for (std::int64_t s = 0; s + 1 < call.sections; ++s) rest[s] = by.rest[s];
      }
      for (std::int64_t s = 0; s + 1 < call.sections; ++s) packed[(c + s) * stride + first + r] = rest[s];
    }
    const float* from = rows + first * c;
    float* to = packed + first;
    std::int64_t i = 0;
    for (; i + kLanes <= c; i += kLanes) {
      Vec block[kLanes];
#pragma GCC unroll 16
      for (int r = 0; r < kLanes; ++r) {
        block[r] = r < kWidth && r < filled ? load(from + r * c + i) * splat(before[r]) * splat(scale[r]) : Vec{};
      }
      transpose(block);
#pragma GCC unroll 16
      for (int r = 0; r < kLanes; ++r) __builtin_memcpy(to + (i + r) * stride, &block[r], 4 * kWidth);
    }
    for (; i < c; ++i) {
      for (int r = 0; r < kWidth; ++r) {
        to[i * stride + r] = r < filled ? from[r * c + i] * before[r] * scale[r] : 0.0f;
      }
    }
  }
}

// A tile of queries: row `row` (over all query grids), from column `column` on.
struct Tile {
  std::int64_t row, column, count;
  std::int32_t row_low, row_high;  // key rows of its windows
  std::int32_t column_low, column_high;  // union of its windows' key columns
};

class WindowMatcher {
 public:
  WindowMatcher(const WindowNearestCall& call, std::int64_t batch)
      : call_(call),
        tiles_per_row_((call.query_w + kQueries - 1) / kQueries),
        similarity_(call.similarity + batch * queries() * call.k),
        index_(call.index + batch * queries() * call.k) {}

  std::int64_t queries() const { return call_.query_frames * call_.query_h * call_.query_w; }
  std::int64_t tiles() const { return call_.query_frames * call_.query_h * tiles_per_row_; }

  Tile tile(std::int64_t number) const {
    Tile t;
    t.row = number / tiles_per_row_;
    t.column = number % tiles_per_row_ * kQueries;
    t.count = smaller<std::int64_t>(kQueries, call_.query_w - t.column);
    t.row_low = call_.row_low[t.row % call_.query_h];
    t.row_high = call_.row_high[t.row % call_.query_h];
    // Both ends ascend with the column.
    t.column_low = call_.column_low[t.column];
    t.column_high = call_.column_high[t.column + t.count - 1];
    return t;
  }

  // The tile against row `key_row` of one key grid; `keys` [c][row_stride], `first_key` the index of the row's first.
  void meet(const Tile& t, const float* queries, const float* keys, std::int64_t first_key) const {
    std::int32_t column = t.column_low;
    std::int64_t vectors = (static_cast<std::int64_t>(t.column_high) - column + kLanes) / kLanes;
    while (vectors > 0) {
      // Two medium steps: a long one and one of a single vector would leave the multipliers idle.
      const std::int64_t step = vectors == kVectors + 1 ? (vectors + 1) / 2 : smaller<std::int64_t>(vectors, kVectors);
      switch (step) {
        case 1: multiply<1>(t, queries, keys, first_key, column); break;
        case 2: multiply<2>(t, queries, keys, first_key, column); break;
        default: multiply<kVectors>(t, queries, keys, first_key, column); break;
      }
      column += static_cast<std::int32_t>(step) * kLanes;
      vectors -= step;
    }
  }

 private:
  template <int kCount>
  void multiply(const Tile& t, const float* queries, const float* keys, std::int64_t first_key,
                std::int32_t column) const {
    Vec sums[kQueries][kCount];
    for (int q = 0; q < kQueries; ++q) {
      for (int v = 0; v < kCount; ++v) sums[q][v] = Vec{};
    }
    const float *at = keys + column, *from = queries;
    const std::int64_t stride = call_.row_stride;
    std::int64_t i = 0;
    for (std::int64_t s = 0;; ++s) {
      const std::int64_t end = call_.section_end[s];
      for (; i < end; ++i, at += stride, from += kQueries) {
        Vec key[kCount];
#pragma GCC unroll 4
        for (int v = 0; v < kCount; ++v) key[v] = load(at + v * kLanes);
#pragma GCC unroll 16
        for (int q = 0; q < kQueries; ++q) {
          const Vec query = Isa::broadcast(from + q);
#pragma GCC unroll 4
          for (int v = 0; v < kCount; ++v) sums[q][v] = Isa::multiply_add(query, key[v], sums[q][v]);
        }
      }
      if (s + 1 == call_.sections) break;
      const float* key_rest = keys + (call_.c + s) * call_.row_stride + column;
      const float* query_rest = queries + (call_.c + s) * kQueries;
      // Lanes that are proven to lose; not lanes of NaN, which fail every comparison.
      IntVec lost = splat(-1);
#pragma GCC unroll 16
      for (int q = 0; q < kQueries; ++q) {
        const Vec worst = splat(q < t.count ? worst_of(t, q) : kInfinity);
#pragma GCC unroll 4
        for (int v = 0; v < kCount; ++v) {
          const Vec most = Isa::multiply_add(Isa::broadcast(query_rest + q), load(key_rest + v * kLanes), sums[q][v]);
          lost &= most <= worst;
        }
      }
      if (Isa::bits(lost) == kAllLanes) return;
    }
#pragma GCC unroll 16
    for (int q = 0; q < kQueries; ++q) {
      // A constant bound keeps the sums in registers.
      if (q < t.count) {
        const std::int64_t query = t.row * call_.query_w + t.column + q;
        float* best = similarity_ + query * call_.k;
        const IntVec low = splat(call_.column_low[t.column + q]), high = splat(call_.column_high[t.column + q]);
#pragma GCC unroll 4
        for (int v = 0; v < kCount; ++v) {
          const IntVec x = splat(column + v * kLanes) + ramp();
          // A comparison with NaN is false, so such pairs never win. Infinite products are excluded too.
          const IntVec wins = (sums[q][v] > splat(best[call_.k - 1])) & (sums[q][v] <= splat(kLargest)) & (x >= low) &
                              (x <= high);
          const unsigned bits = Isa::bits(wins);
          if (__builtin_expect(bits != 0, 0)) insert(best, query, sums[q][v], bits, first_key + column + v * kLanes);
        }
      }
    }
  }

  // The similarity that a match of query `q` of the tile must exceed.
  float worst_of(const Tile& t, int q) const {
    return similarity_[(t.row * call_.query_w + t.column + q) * call_.k + call_.k - 1];
  }

  __attribute__((noinline)) void insert(float* best, std::int64_t query, Vec values, unsigned bits,
                                        std::int64_t first_key) const {
    std::int64_t* index = index_ + query * call_.k;
    for (; bits != 0; bits &= bits - 1) {
      const int lane = __builtin_ctz(bits);
      const float value = values[lane];
      std::int64_t place = call_.k - 1;
      if (!(value > best[place])) continue;
      for (; place > 0 && value > best[place - 1]; --place) {
        best[place] = best[place - 1];
        index[place] = index[place - 1];
      }
      best[place] = value;
      index[place] = first_key + lane;
    }
  }

  const WindowNearestCall& call_;
  std::int64_t tiles_per_row_;
  float* similarity_;
  std::int64_t* index_;
};

void run_window_nearest(const WindowNearestCall& call) {
  const std::int64_t packed = call.c + call.sections - 1;
  const std::int64_t packed_row = packed * call.row_stride, packed_tile = packed * kQueries;
  const std::int64_t cells = call.key_h * call.key_w;
#pragma omp parallel num_threads(call.threads)
  {
    float* own_queries = call.packed_queries + thread_index() * call.tiles_per_task * packed_tile;
    for (std::int64_t b = 0; b < call.batch; ++b) {
      const WindowMatcher matcher(call, b);
      const float* queries = call.query + b * matcher.queries() * call.c;
      const std::int64_t tiles = matcher.tiles(), tasks = (tiles + call.tiles_per_task - 1) / call.tiles_per_task;
#pragma omp for schedule(static)
      for (std::int64_t i = b * matcher.queries() * call.k; i < (b + 1) * matcher.queries() * call.k; ++i) {
        call.similarity[i] = -kInfinity;
        call.index[i] = -1;
      }
      const auto pack_tile = [&](std::int64_t number, float* packed_queries) {
        const Tile t = matcher.tile(number);
        pack<kQueryWidth>(queries + (t.row * call.query_w + t.column) * call.c, t.count, kQueries, call,
                          packed_queries);
      };
      if (call.pack_queries_once) {
#pragma omp for schedule(static)
        for (std::int64_t i = 0; i < tiles; ++i) pack_tile(i, call.packed_queries + i * packed_tile);
      }
      for (std::int64_t stage = 0; stage < call.key_frames; stage += call.stage_frames) {
        const std::int64_t frames = smaller(call.stage_frames, call.key_frames - stage);
#pragma omp for schedule(static)
        for (std::int64_t r = 0; r < frames * call.key_h; ++r) {
          const std::int64_t first = (b * call.key_frames + stage) * cells + r * call.key_w;
          pack<kLanes>(call.key + first * call.c, call.key_w, call.row_stride, call, call.packed_keys + r * packed_row);
        }
#pragma omp for schedule(dynamic, 1)
        for (std::int64_t task = 0; task < tasks; ++task) {
          if (stopped(call.stop)) continue;
          const std::int64_t begin = task * call.tiles_per_task, end = smaller(begin + call.tiles_per_task, tiles);
          const float* packed_queries = call.pack_queries_once ? call.packed_queries + begin * packed_tile
                                                               : own_queries;
          std::int32_t low = static_cast<std::int32_t>(call.key_h), high = -1;
          for (std::int64_t i = begin; i < end; ++i) {
            const Tile t = matcher.tile(i);
            if (!call.pack_queries_once) pack_tile(i, own_queries + (i - begin) * packed_tile);
            low = smaller(low, t.row_low);
            high = larger(high, t.row_high);
          }
          // A row of keys meets all tiles of the task while it is in the cache.
          for (std::int64_t f = 0; f < frames; ++f) {
            for (std::int32_t y = low; y <= high; ++y) {
              const float* keys = call.packed_keys + (f * call.key_h + y) * packed_row;
              const std::int64_t first_key = (stage + f) * cells + y * call.key_w;
              for (std::int64_t i = begin; i < end; ++i) {
                const Tile t = matcher.tile(i);
                if (y < t.row_low || y > t.row_high) continue;
                matcher.meet(t, packed_queries + (i - begin) * packed_tile, keys, first_key);
              }
            }
          }
        }
      }
    }
  }
}

}  // namespace

template <>
const WindowNearestKernel Compiled<WindowNearestKernel, kIsa>::kernel = {kQueries, kLanes, run_window_nearest};

}  // namespace lift_fast
