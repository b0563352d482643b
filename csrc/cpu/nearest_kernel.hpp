// The matcher for one instruction set. Each including translation unit defines, in an anonymous namespace, `struct
// NearestIsa` and is compiled with that set's flags; nothing here may call a standard library template, whose
// out-of-line copy could be shared with code for older CPUs.
//
// A dot product is accumulated over c in order, in one register lane, wherever the pair stands: equal rows give
// bitwise equal similarities, so ties are real ties, and the result does not depend on tiles or threads.
#pragma once

#include "nearest.hpp"
#include "threads.hpp"

namespace lift_fast {
namespace {

constexpr int kLanes = NearestIsa::lanes;
constexpr int kQueries = NearestIsa::query_rows;
constexpr int kVectors = NearestIsa::key_vectors;
constexpr int kKeys = kLanes * kVectors;
constexpr int kQueryPanels = NearestIsa::query_panels;
constexpr float kInfinity = __builtin_inff();
constexpr float kNaN = __builtin_nanf("");
constexpr float kLargest = __FLT_MAX__;

typedef float Vec __attribute__((vector_size(4 * kLanes)));
typedef std::int32_t IntVec __attribute__((vector_size(4 * kLanes)));

inline Vec load(const float* p) {
  Vec v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
inline void store(float* p, Vec v) { __builtin_memcpy(p, &v, sizeof v); }
inline IntVec load(const std::int32_t* p) {
  IntVec v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
inline void store(std::int32_t* p, IntVec v) { __builtin_memcpy(p, &v, sizeof v); }
inline Vec splat(float value) { return Vec{} + value; }
inline IntVec splat(std::int32_t value) { return IntVec{} + value; }

inline std::int64_t smaller(std::int64_t a, std::int64_t b) { return a < b ? a : b; }
inline std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

// What a row is multiplied by; NaN for a row that takes no part.
inline double row_scale(const float* row, std::int64_t c, bool normalize) {
  double sums[8] = {};
  std::int64_t i = 0;
  for (; i + 8 <= c; i += 8) {
    for (int j = 0; j < 8; ++j) sums[j] += static_cast<double>(row[i + j]) * row[i + j];
  }
  for (; i < c; ++i) sums[0] += static_cast<double>(row[i]) * row[i];
  const double sum = ((sums[0] + sums[1]) + (sums[2] + sums[3])) + ((sums[4] + sums[5]) + (sums[6] + sums[7]));
  // Squares of finite floats never overflow a double.
  if (!(sum < __builtin_inf())) return __builtin_nan("");
  if (!normalize) return 1.0;
  const double norm = __builtin_sqrt(sum);
  // As a float the reciprocal of a norm above 1e38 would be subnormal, with few digits left.
  return 1.0 / (norm > 1e-12 ? norm : 1e-12);
}

// Rows [first, first + width) as [c][width], scaled; rows beyond `count` and rows that take no part become NaN.
inline void pack(const float* rows, std::int64_t first, std::int64_t count, std::int64_t c, int width, bool normalize,
                 float* packed) {
  for (int r = 0; r < width; ++r) {
    if (first + r >= count) {
      for (std::int64_t k = 0; k < c; ++k) packed[k * width + r] = kNaN;
      continue;
    }
    const float* row = rows + (first + r) * c;
    const double scale = row_scale(row, c, normalize);
    for (std::int64_t k = 0; k < c; ++k) packed[k * width + r] = static_cast<float>(row[k] * scale);
  }
}

struct Running {
  float* best;          // [query][lane]
  float* second;        // [query][lane]
  std::int32_t* group;  // [query][lane]: which vector of keys holds the best
};

template <bool kSecond, bool kReverse>
inline void tile(const float* queries, const float* keys, std::int64_t c, const Running& running,
                 std::int32_t first_group, float* reverse_best, std::int32_t* reverse_index,
                 std::int32_t first_query) {
  Vec sums[kQueries][kVectors];
  for (int q = 0; q < kQueries; ++q) {
    for (int v = 0; v < kVectors; ++v) sums[q][v] = Vec{};
  }
  for (std::int64_t k = 0; k < c; ++k) {
    Vec key[kVectors];
    for (int v = 0; v < kVectors; ++v) key[v] = load(keys + k * kKeys + v * kLanes);
#pragma GCC unroll 16
    for (int q = 0; q < kQueries; ++q) {
      const Vec query = NearestIsa::broadcast<Vec>(queries + k * kQueries + q);
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) sums[q][v] = NearestIsa::multiply_add(query, key[v], sums[q][v]);
    }
  }
#pragma GCC unroll 16
  for (int q = 0; q < kQueries; ++q) {
    Vec best = load(running.best + q * kLanes);
    IntVec group = load(running.group + q * kLanes);
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      // A comparison with NaN is false: such pairs never win. Products that overflowed are shut out too.
      const Vec value = sums[q][v] <= splat(kLargest) ? sums[q][v] : splat(-kInfinity);
      const IntVec better = value > best;
      if (kSecond) {
        const Vec second = load(running.second + q * kLanes);
        store(running.second + q * kLanes, better ? best : (value > second ? value : second));
      }
      best = better ? value : best;
      group = better ? splat(static_cast<std::int32_t>(first_group + v)) : group;
    }
    store(running.best + q * kLanes, best);
    store(running.group + q * kLanes, group);
  }
  if (kReverse) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      Vec best = load(reverse_best + v * kLanes);
      IntVec index = load(reverse_index + v * kLanes);
#pragma GCC unroll 16
      for (int q = 0; q < kQueries; ++q) {
        const Vec value = sums[q][v] <= splat(kLargest) ? sums[q][v] : splat(-kInfinity);
        const IntVec better = value > best;
        best = better ? value : best;
        index = better ? splat(first_query + q) : index;
      }
      store(reverse_best + v * kLanes, best);
      store(reverse_index + v * kLanes, index);
    }
  }
}

// The best of a query's lanes, the lowest key among equals, and the second largest of all lanes.
inline void reduce(const Running& running, int q, float* similarity, std::int64_t* index, float* second) {
  float best = -kInfinity;
  std::int64_t where = -1;
  int winner = -1;
  for (int lane = 0; lane < kLanes; ++lane) {
    const float value = running.best[q * kLanes + lane];
    if (value == -kInfinity) continue;
    const std::int64_t key = static_cast<std::int64_t>(running.group[q * kLanes + lane]) * kLanes + lane;
    if (value > best || (value == best && key < where)) {
      best = value;
      where = key;
      winner = lane;
    }
  }
  *similarity = best;
  *index = where;
  if (second == nullptr) return;
  float runner_up = -kInfinity;
  for (int lane = 0; lane < kLanes; ++lane) {
    const float* row = lane == winner ? running.second : running.best;
    const float value = row[q * kLanes + lane];
    if (value > runner_up) runner_up = value;
  }
  *second = runner_up;
}

template <bool kSecond, bool kReverse>
void match(const NearestCall& call) {
  const std::int64_t key_panels = ceil_div(call.m, kKeys), query_panels = ceil_div(call.n, kQueries);
  const std::int64_t padded_keys = key_panels * kKeys;
  const NearestTiling tiling{kQueries, kKeys, kQueryPanels};
  const NearestScratch at(tiling, kLanes, call.c, padded_keys, kReverse);
  // Few panels: smaller tasks, so that every thread has some.
  std::int64_t per_task = query_panels / (4 * call.threads);
  per_task = per_task < 1 ? 1 : smaller(per_task, kQueryPanels);
  const std::int64_t tasks = ceil_div(query_panels, per_task);

#pragma omp parallel num_threads(call.threads)
  {
    char* scratch = call.scratch + thread_index() * call.scratch_bytes;
    float* packed = reinterpret_cast<float*>(scratch + at.packed_queries);
    float* best = reinterpret_cast<float*>(scratch + at.best);
    float* second = reinterpret_cast<float*>(scratch + at.second);
    std::int32_t* group = reinterpret_cast<std::int32_t*>(scratch + at.group);
    float* reverse_best = reinterpret_cast<float*>(scratch + at.reverse_best);
    std::int32_t* reverse_index = reinterpret_cast<std::int32_t*>(scratch + at.reverse_index);

    for (std::int64_t b = 0; b < call.batch; ++b) {
      const float* keys = call.key + b * call.m * call.c;
      const float* queries = call.query + b * call.n * call.c;
#pragma omp for schedule(static)
      for (std::int64_t p = 0; p < key_panels; ++p) {
        pack(keys, p * kKeys, call.m, call.c, kKeys, call.normalize, call.packed_keys + p * kKeys * call.c);
      }
      if (kReverse) {
        for (std::int64_t i = 0; i < padded_keys; ++i) {
          reverse_best[i] = -kInfinity;
          reverse_index[i] = -1;
        }
      }
// Each thread must meet its tasks in order, or the reverse direction would not keep the lowest query.
#pragma omp for schedule(monotonic : dynamic, 1)
      for (std::int64_t task = 0; task < tasks; ++task) {
        const std::int64_t first = task * per_task, panels = smaller(per_task, query_panels - first);
        for (std::int64_t p = 0; p < panels; ++p) {
          pack(queries, (first + p) * kQueries, call.n, call.c, kQueries, call.normalize,
               packed + p * kQueries * call.c);
        }
        for (std::int64_t i = 0; i < panels * kQueries * kLanes; ++i) {
          best[i] = second[i] = -kInfinity;
          group[i] = 0;
        }
        // A panel of keys meets all query panels of the task while it is in the cache.
        for (std::int64_t k = 0; k < key_panels; ++k) {
          for (std::int64_t p = 0; p < panels; ++p) {
            const std::int64_t lane = p * kQueries * kLanes;
            tile<kSecond, kReverse>(packed + p * kQueries * call.c, call.packed_keys + k * kKeys * call.c, call.c,
                                    Running{best + lane, second + lane, group + lane},
                                    static_cast<std::int32_t>(k * kVectors), reverse_best + k * kKeys,
                                    reverse_index + k * kKeys, static_cast<std::int32_t>((first + p) * kQueries));
          }
        }
        for (std::int64_t p = 0; p < panels; ++p) {
          const std::int64_t lane = p * kQueries * kLanes;
          const Running running{best + lane, second + lane, group + lane};
          for (int q = 0; q < kQueries; ++q) {
            const std::int64_t row = (first + p) * kQueries + q;
            if (row >= call.n) break;
            const std::int64_t out = b * call.n + row;
            reduce(running, q, call.similarity + out, call.index + out, kSecond ? call.second + out : nullptr);
          }
        }
      }
      if (kReverse) {
        // Every thread saw its own tasks: the largest wins, the lowest query among equals.
#pragma omp for schedule(static)
        for (std::int64_t i = 0; i < call.m; ++i) {
          float value = -kInfinity;
          std::int64_t index = -1;
          for (int t = 0; t < thread_count(); ++t) {
            const char* other = call.scratch + t * call.scratch_bytes;
            const float theirs = reinterpret_cast<const float*>(other + at.reverse_best)[i];
            const std::int64_t row = reinterpret_cast<const std::int32_t*>(other + at.reverse_index)[i];
            if (row >= 0 && (theirs > value || (theirs == value && row < index))) {
              value = theirs;
              index = row;
            }
          }
          call.reverse_similarity[b * call.m + i] = value;
          call.reverse_index[b * call.m + i] = index;
        }
      }
    }
  }
}

void run_nearest(const NearestCall& call) {
  const bool second = call.second != nullptr, reverse = call.reverse_similarity != nullptr;
  if (second && reverse) {
    match<true, true>(call);
  } else if (second) {
    match<true, false>(call);
  } else if (reverse) {
    match<false, true>(call);
  } else {
    match<false, false>(call);
  }
}

}  // namespace
}  // namespace lift_fast
