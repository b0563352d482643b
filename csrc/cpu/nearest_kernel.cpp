// The matcher. Rescoring depends on the two rows only, never on their positions: equal rows give bitwise equal
// similarities, so ties are real ties, and the result does not depend on tiles or threads.
#include "nearest.hpp"
#include "nearest_rows.hpp"
#include "simd/simd.hpp"
#include "threads.hpp"

namespace lift_fast {
namespace {

// 12 accumulators, 2 vectors of keys, a query and perhaps a product in 16 registers; 24 accumulators in AVX-512's 32.
constexpr int kQueries = by_lanes(6, 6, 12);
constexpr int kVectors = 2;
constexpr int kKeys = kLanes * kVectors;
// Panels of keys, rows, panels to pack and keys between two checks for a stop: at most milliseconds each. Small work
// never checks, which would cost time with thousands of small batches.
constexpr std::int64_t kPanelsBetween = 256, kRowsBetween = 256, kPanelsPacked = 16, kKeysBetween = 16;
static_assert(kKeys <= 32, "each key of a tile has a bit of a word");

// The values that all queries of one batch share.
//
// The search subtracts a centre from each row q, k, which leaves short rows if all have much in common:
// q.k = (q - a).(k - b) + a.k + (q - a).b. The last two terms depend on the key alone and on the query alone.
struct Batch {
  const NearestCall& call;
  const NearestWork& work;
  const float* queries;   // [n, c]
  const float* keys;      // [m, c]
  double query_unit;      // largest power of two above a query's norm, without normalize; else 1
  double key_unit;        // the same of the keys, which were divided by it
  double key_length;      // longest key, as packed
  double key_moved;       // the farthest that rounding moved a key
  double centre_product;  // a.b

  float rescore(std::int64_t query, std::int64_t key) const {
    return rescored_similarity(call, queries + query * call.c, work.query_norms[query], keys + key * call.c,
                               work.key_norms[key]);
  }
};

// One query's state in a thread's scratch.
struct Row {
  std::int64_t query;
  double unit;    // similarity = unit * similarity of the search
  double shift;   // and the search omits this part of it, in its own units
  float bound;    // most that search and rescoring differ, in units of the search
  float* threshold;
  std::int32_t* counts;  // candidates, of the top, rescored
  NearestCandidates at;
  bool rescored;    // candidates are rescored; false: the search's own values are the result
  bool trusted;   // the search's values may raise the threshold: none of them replaces an overflown similarity
};

// Keeps `values` descending, the earlier one first among equals.
inline void insert(float value, std::int32_t key, std::int64_t k, float* values, std::int32_t* keys,
                   std::int32_t* count) {
  std::int64_t at = *count;
  if (at == k) {
    if (!(value > values[k - 1])) return;
    --at;
  } else {
    ++*count;
  }
  for (; at > 0 && value > values[at - 1]; --at) {
    values[at] = values[at - 1];
    keys[at] = keys[at - 1];
  }
  values[at] = value;
  keys[at] = key;
}

inline void drop_beaten(const Row& row) {
  std::int32_t kept = 0;
  for (std::int32_t i = 0; i < row.counts[0]; ++i) {
    if (row.at.found[i] < *row.threshold) continue;
    row.at.found[kept] = row.at.found[i];
    row.at.key[kept++] = row.at.key[i];
  }
  row.counts[0] = kept;
}

inline void rescore_all(const Batch& batch, const Row& row) {
  const std::int64_t k = batch.call.k;
  for (std::int32_t i = 0; i < row.counts[0]; ++i) {
    const float value = batch.rescore(row.query, row.at.key[i]);
    if (value >= -kLargest && value <= kLargest) {
      insert(value, row.at.key[i], k, row.at.best, row.at.where, row.counts + 2);
    }
  }
  row.counts[0] = 0;
  if (row.counts[2] == k) {
    const float floor = static_cast<float>(row.at.best[k - 1] / row.unit - row.shift) - row.bound;
    if (floor > *row.threshold) *row.threshold = floor;
  }
}

// A key whose similarity in the search is above the threshold.
__attribute__((noinline)) void offer(const Batch& batch, const Row& row, std::int64_t key, float value,
                                     std::int64_t room) {
  if (!(value > *row.threshold) || key >= batch.call.m) return;
  if (batch.work.key_norms[key] != batch.work.key_norms[key]) return;
  const std::int64_t k = batch.call.k;
  if (row.rescored) {
    row.at.found[row.counts[0]] = value;
    row.at.key[row.counts[0]++] = static_cast<std::int32_t>(key);
  }
  if (row.trusted) {
    insert(value, static_cast<std::int32_t>(key), k, row.at.top, row.at.place, row.counts + 1);
    if (row.counts[1] == k) {
      const float floor = row.rescored ? row.at.top[k - 1] - 2 * row.bound : row.at.top[k - 1];
      if (floor > *row.threshold) *row.threshold = floor;
    }
  }
  if (row.counts[0] < room) return;
  drop_beaten(row);
  // Too many candidates within the bound: rescoring raises the threshold further than the search can.
  if (row.counts[0] > room / 2) rescore_all(batch, row);
}

// Similarities of the search between a panel of queries and one of keys, [kQueries][kKeys].
inline void multiply(const float* queries, const float* query_steps, const float* keys, const float* key_steps,
                     const float* bias, std::int64_t words, float* table) {
  Isa::Sum sums[kQueries][kVectors];
  for (int q = 0; q < kQueries; ++q) {
    for (int v = 0; v < kVectors; ++v) sums[q][v] = Isa::Sum{};
  }
  for (std::int64_t w = 0; w < words; ++w) {
    Vec key[kVectors];
    for (int v = 0; v < kVectors; ++v) key[v] = load(keys + w * kKeys + v * kLanes);
#pragma GCC unroll 16
    for (int q = 0; q < kQueries; ++q) {
      const Vec query = Isa::broadcast(queries + w * kQueries + q);
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) sums[q][v] = Isa::dot(query, key[v], sums[q][v]);
    }
  }
#pragma GCC unroll 16
  for (int q = 0; q < kQueries; ++q) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      Vec sum = __builtin_convertvector(sums[q][v], Vec);
      if (kIntegers) sum = sum * load(key_steps + v * kLanes) * splat(query_steps[q]);
      store(table + q * kKeys + v * kLanes, sum + load(bias + v * kLanes));
    }
  }
}

// The largest of a panel's queries for each key, on the scale that all queries share.
inline void raise_group(const float* table, const float* factors, const float* shifts, bool first, float* group) {
#pragma GCC unroll 4
  for (int v = 0; v < kVectors; ++v) {
    Vec best = first ? splat(-kInfinity) : load(group + v * kLanes);
#pragma GCC unroll 16
    for (int q = 0; q < kQueries; ++q) {
      const Vec value = (load(table + q * kKeys + v * kLanes) + splat(shifts[q])) * splat(factors[q]);
      best = value > best ? value : best;
    }
    store(group + v * kLanes, best);
  }
}

// The parts of a thread's scratch.
class Task {
 public:
  Task(const Batch& batch, char* scratch)
      : batch_(batch),
        words_(ceil_div(batch.call.c, kChannels)),
        layout_(batch.work.layout),
        packed_(at<float>(scratch, layout_.packed)),
        thresholds_(at<float>(scratch, layout_.thresholds)),
        factors_(at<float>(scratch, layout_.factors)),
        shifts_(at<float>(scratch, layout_.shifts)),
        bounds_(at<float>(scratch, layout_.bounds)),
        steps_(at<float>(scratch, layout_.steps)),
        counts_(at<std::int32_t>(scratch, layout_.counts)),
        scratch_(scratch) {}

  // Panels [first, first + panels) of queries against all keys; returns the largest bound.
  float run(std::int64_t first, std::int64_t panels) {
    const NearestCall& call = batch_.call;
    const NearestWork& work = batch_.work;
    float widest = 0;
    for (std::int64_t i = 0; i < panels * kQueries; ++i) {
      prepare(first * kQueries + i, i);
      if (bounds_[i] > widest) widest = bounds_[i];
    }
    const float* packed_keys = work.packed_keys;
    alignas(64) float table[kQueries * kKeys];
    // A panel of keys meets all query panels of the task while it is in the cache.
    for (std::int64_t k = 0; k < work.padded_keys / kKeys; ++k) {
      if (k % kPanelsBetween == kPanelsBetween - 1 && stopped(call.stop)) break;
      for (std::int64_t p = 0; p < panels; ++p) {
        multiply(packed_ + p * kQueries * words_, steps_ + p * kQueries, packed_keys + k * kKeys * words_,
                 work.key_steps + k * kKeys, work.key_bias + k * kKeys, words_, table);
#pragma GCC unroll 16
        for (int q = 0; q < kQueries; ++q) {
          std::uint32_t hits = 0;
#pragma GCC unroll 4
          for (int v = 0; v < kVectors; ++v) {
            hits |= Isa::above(load(table + q * kKeys + v * kLanes), thresholds_[p * kQueries + q]) << (v * kLanes);
          }
          if (hits != 0) take(first, p * kQueries + q, k * kKeys, hits, table + q * kKeys);
        }
        if (work.group_best != nullptr) {
          const std::int64_t panel = first + p, group = panel / work.group_panels;
          raise_group(table, factors_ + p * kQueries, shifts_ + p * kQueries, panel % work.group_panels == 0,
                      work.group_best + group * work.padded_keys + k * kKeys);
        }
      }
    }
    for (std::int64_t i = 0; i < panels * kQueries && first * kQueries + i < call.n; ++i) finish(row(first, i));
    return widest;
  }

 private:
  template <class T>
  static T* at(char* scratch, std::int64_t offset) {
    return reinterpret_cast<T*>(scratch + offset);
  }

  double unit_of(std::int64_t query) const {
    if (batch_.call.normalize) return 1.0;
    return power_of_two(batch_.work.query_norms[query]) * batch_.key_unit;
  }

  Row row(std::int64_t first, std::int64_t i) const {
    const std::int64_t k = batch_.call.k, room = layout_.room;
    Row r;
    r.query = first * kQueries + i;
    r.unit = unit_of(r.query);
    r.shift = shifts_[i];
    r.bound = bounds_[i];
    r.threshold = thresholds_ + i;
    r.counts = counts_ + 3 * i;
    r.at.top = at<float>(scratch_, layout_.top) + i * k;
    r.at.place = at<std::int32_t>(scratch_, layout_.place) + i * k;
    r.at.found = at<float>(scratch_, layout_.found) + i * room;
    r.at.key = at<std::int32_t>(scratch_, layout_.key) + i * room;
    r.at.best = at<float>(scratch_, layout_.best) + i * k;
    r.at.where = at<std::int32_t>(scratch_, layout_.where) + i * k;
    // Twice, because a sum may leave the range although the similarity does not.
    r.trusted = batch_.call.normalize || 2 * r.unit < static_cast<double>(kLargest);
    r.rescored = batch_.call.rescore || !r.trusted;
    return r;
  }

  // Packs query `query` as row `i` of the task.
  void prepare(std::int64_t query, std::int64_t i) {
    const NearestCall& call = batch_.call;
    float* panel = packed_ + i / kQueries * kQueries * words_;
    const int r = static_cast<int>(i % kQueries);
    counts_[3 * i] = counts_[3 * i + 1] = counts_[3 * i + 2] = 0;
    const double norm = query < call.n ? batch_.work.query_norms[query] : __builtin_nan("");
    if (norm != norm) {
      clear_row(words_, kQueries, r, panel);
      thresholds_[i] = kInfinity;
      // Rows that take no part must not win a column; their similarity of zero times minus infinity would be NaN.
      factors_[i] = shifts_[i] = bounds_[i] = steps_[i] = 0;
      return;
    }
    const double unit = call.normalize ? 1.0 : power_of_two(norm);
    const double factor = call.normalize ? unit_factor(norm, true) : 1.0 / unit;
    const PackedRow packed = pack_row(batch_.queries + query * call.c, call.c, factor, batch_.work.query_centre,
                                      batch_.work.key_centre, kQueries, r, panel);
    thresholds_[i] = -kInfinity;
    factors_[i] = static_cast<float>(unit / batch_.query_unit);
    shifts_[i] = static_cast<float>(packed.along - batch_.centre_product);
    bounds_[i] = static_cast<float>(bound(packed));
    steps_[i] = packed.step;
  }

  // |q.k - q'.k'| <= |q - q'| |k| + |q'| |k - k'|, plus the rounding of float32 sums.
  double bound(const PackedRow& query) const {
    constexpr double ulp = 6e-8;
    const double c = static_cast<double>(batch_.call.c);
    const double length = query.length + query.moved, key_length = batch_.key_length + batch_.key_moved;
    const double rounding = query.moved * batch_.key_length + length * batch_.key_moved;
    // Sums of integers are exact.
    const double search = ulp * (((kIntegers ? 0 : c) + 8) * length * key_length + 16);
    // Rows have a length of at most one here. In rescoring a lane sums a part of the channels, then lanes are added.
    const double rescoring = ulp * (c / (4 * kLanes) + 2 * kLanes + 16);
    return 1.001 * (rounding + search + rescoring) + 1e-30;
  }

  __attribute__((noinline)) void take(std::int64_t first, std::int64_t i, std::int64_t key, std::uint32_t hits,
                                      const float* values) {
    const Row r = row(first, i);
    for (; hits != 0; hits &= hits - 1) {
      const int lane = __builtin_ctz(hits);
      offer(batch_, r, key + lane, values[lane], layout_.room);
    }
  }

  void finish(const Row& r) {
    const NearestCall& call = batch_.call;
    std::int32_t count = r.counts[1];
    const float* values = r.at.top;
    const std::int32_t* keys = r.at.place;
    if (r.rescored) {
      drop_beaten(r);
      rescore_all(batch_, r);
      count = r.counts[2];
      values = r.at.best;
      keys = r.at.where;
    }
    // The call's outputs already point to this batch.
    for (std::int64_t j = 0; j < call.k; ++j) {
      const std::int64_t out = r.query * call.k + j;
      call.similarity[out] = j >= count   ? -kInfinity
                             : r.rescored ? values[j]
                                          : static_cast<float>((values[j] + r.shift) * r.unit);
      call.index[out] = j < count ? keys[j] : -1;
    }
  }

  const Batch& batch_;
  const std::int64_t words_;
  const NearestScratch& layout_;
  float* const packed_;
  float* const thresholds_;
  float* const factors_;
  float* const shifts_;
  float* const bounds_;
  float* const steps_;
  std::int32_t* const counts_;
  char* const scratch_;
};

// The query that is most similar to a key, the first among equals.
inline std::int64_t best_query(const Batch& batch, std::int64_t key, double slack) {
  const NearestCall& call = batch.call;
  const NearestWork& work = batch.work;
  const std::int64_t rows = work.group_panels * kQueries;
  const double unit = call.normalize ? 1.0 : batch.query_unit * batch.key_unit;
  // A query chose this key with that similarity, so its best query is at least as similar.
  const double floor = static_cast<double>(work.wanted[key]) / unit - slack;
  float best = -kInfinity;
  std::int64_t where = -1;
  for (std::int64_t group = 0; group * rows < call.n; ++group) {
    if (!(static_cast<double>(work.group_best[group * work.padded_keys + key]) >= floor)) continue;
    for (std::int64_t query = group * rows; query < smaller(call.n, (group + 1) * rows); ++query) {
      if (work.query_norms[query] != work.query_norms[query]) continue;
      const float value = batch.rescore(query, key);
      if (value > best && value <= kLargest) {
        best = value;
        where = query;
      }
    }
  }
  return where;
}

void run_nearest(const NearestCall& whole, const NearestWork& work) {
  const std::int64_t words = ceil_div(whole.c, kChannels), panels = ceil_div(whole.n, kQueries);
  // One thread's piece holds whole groups, or lies within one.
  const std::int64_t piece = work.task_panels > work.group_panels ? work.task_panels : work.group_panels;
  const bool reverse = whole.back != nullptr;
  NearestCall call = whole;
  Batch batch{call, work, whole.query, whole.key, 1.0, 1.0, 0.0, 0.0, 0.0};
  float widest = 0;
  double longest_norm[2] = {};
  bool over = false;

#pragma omp parallel num_threads(whole.threads)
  {
    char* scratch = work.scratch + thread_index() * work.layout.end;
    for (std::int64_t b = 0; b < whole.batch; ++b) {
#pragma omp barrier
#pragma omp single
      {
        batch.queries = whole.query + b * whole.n * whole.c;
        batch.keys = whole.key + b * whole.m * whole.c;
        call.similarity = whole.similarity + b * whole.n * whole.k;
        call.index = whole.index + b * whole.n * whole.k;
        call.back = reverse ? whole.back + b * whole.n : nullptr;
        longest_norm[0] = longest_norm[1] = 0;
        batch.key_length = batch.key_moved = 0;
        widest = 0;
        over = b > 0 && stopped(whole.stop);
      }
      if (over) break;
      double longest = 0;
      // After a stop, unwritten results are read as values only, never as positions.
      bool skip = false;
#pragma omp for schedule(static) nowait
      for (std::int64_t i = 0; i < whole.n; ++i) {
        if (i % kRowsBetween == kRowsBetween - 1) skip = stopped(whole.stop);
        if (skip) continue;
        work.query_norms[i] = row_norm(batch.queries + i * whole.c, whole.c);
        if (work.query_norms[i] > longest) longest = work.query_norms[i];
      }
      double longest_key = 0;
#pragma omp for schedule(static) nowait
      for (std::int64_t i = 0; i < whole.m; ++i) {
        if (i % kRowsBetween == kRowsBetween - 1) skip = stopped(whole.stop);
        if (skip) continue;
        work.key_norms[i] = row_norm(batch.keys + i * whole.c, whole.c);
        if (work.key_norms[i] > longest_key) longest_key = work.key_norms[i];
        if (reverse) work.wanted[i] = -kInfinity;
      }
#pragma omp critical(lift_fast_nearest)
      {
        if (longest > longest_norm[0]) longest_norm[0] = longest;
        if (longest_key > longest_norm[1]) longest_norm[1] = longest_key;
      }
#pragma omp barrier
#pragma omp single
      {
        batch.query_unit = whole.normalize ? 1.0 : power_of_two(longest_norm[0]);
        batch.key_unit = whole.normalize ? 1.0 : power_of_two(longest_norm[1]);
        centre_of(whole, batch.queries, work.query_norms, whole.n, 0.0, work.query_centre);
        centre_of(whole, batch.keys, work.key_norms, whole.m, batch.key_unit, work.key_centre);
        batch.centre_product = 0;
        for (std::int64_t i = 0; i < whole.c; ++i) {
          batch.centre_product += static_cast<double>(work.query_centre[i]) * work.key_centre[i];
        }
      }
      double moved = 0, length = 0;
#pragma omp for schedule(static) nowait
      for (std::int64_t p = 0; p < work.padded_keys / kKeys; ++p) {
        if (p % kPanelsPacked == kPanelsPacked - 1) skip = stopped(whole.stop);
        if (skip) continue;
        float* panel = work.packed_keys + p * kKeys * words;
        for (int r = 0; r < kKeys; ++r) {
          const std::int64_t key = p * kKeys + r;
          const double norm = key < whole.m ? work.key_norms[key] : __builtin_nan("");
          if (norm != norm) {
            clear_row(words, kKeys, r, panel);
            work.key_bias[key] = work.key_steps[key] = 0;
            continue;
          }
          const double factor = whole.normalize ? unit_factor(norm, true) : 1.0 / batch.key_unit;
          const PackedRow packed = pack_row(batch.keys + key * whole.c, whole.c, factor, work.key_centre,
                                            work.query_centre, kKeys, r, panel);
          work.key_bias[key] = static_cast<float>(packed.along);
          work.key_steps[key] = packed.step;
          if (packed.moved > moved) moved = packed.moved;
          if (packed.length > length) length = packed.length;
        }
      }
#pragma omp critical(lift_fast_nearest)
      {
        if (moved > batch.key_moved) batch.key_moved = moved;
        if (length > batch.key_length) batch.key_length = length;
      }
#pragma omp barrier
      float wide = 0;
      Task task(batch, scratch);
#pragma omp for schedule(dynamic, 1) nowait
      for (std::int64_t first = 0; first < panels; first += piece) {
        const std::int64_t end = smaller(panels, first + piece);
        if (stopped(whole.stop)) {
          // The next steps read these.
          for (std::int64_t i = first * kQueries; i < smaller(end * kQueries, whole.n); ++i)
            call.index[i * whole.k] = -1;
          continue;
        }
        for (std::int64_t from = first; from < end; from += work.task_panels) {
          const float bound = task.run(from, smaller(work.task_panels, end - from));
          if (bound > wide) wide = bound;
        }
      }
      if (!reverse) continue;
#pragma omp critical(lift_fast_nearest)
      {
        if (wide > widest) widest = wide;
      }
#pragma omp barrier
#pragma omp single
      for (std::int64_t i = 0; i < whole.n; ++i) {
        const std::int64_t key = call.index[i * whole.k];
        if (key < 0) continue;
        const float value = whole.rescore ? call.similarity[i * whole.k] : batch.rescore(i, key);
        if (value > work.wanted[key] && value <= kLargest) work.wanted[key] = value;
      }
#pragma omp for schedule(dynamic, 16)
      for (std::int64_t key = 0; key < whole.m; ++key) {
        if (key % kKeysBetween == kKeysBetween - 1) skip = stopped(whole.stop);
        if (work.wanted[key] > -kInfinity && !skip) work.key_back[key] = best_query(batch, key, widest);
      }
#pragma omp for schedule(static)
      for (std::int64_t i = 0; i < whole.n; ++i) {
        const std::int64_t key = call.index[i * whole.k];
        call.back[i] = key < 0 ? -1 : work.key_back[key];
      }
    }
  }
}

}  // namespace

template <>
const NearestKernel Compiled<NearestKernel, kIsa>::kernel = {kQueries, kKeys, kChannels, Isa::numbers, run_nearest};

}  // namespace lift_fast
