#include "nearest.hpp"

#include <limits>
#include <stdexcept>

#include "dispatch.hpp"
#include "memory.hpp"

namespace lift_fast {
namespace {

// Panels of queries that share the second-level cache with a panel of keys.
constexpr std::int64_t kTaskPanels = 16;
constexpr std::int64_t kGroupBytes = std::int64_t{16} << 20;

using NearestKernels = Kernels<NearestKernel, CpuIsa::avx512_int16, CpuIsa::avx512_bf16>;

NearestScratch layout(std::int64_t task_rows, std::int64_t words, std::int64_t k) {
  NearestScratch at{};
  at.room = 4 * k + 60;
  const auto take = [&at](std::int64_t count) {
    const std::int64_t start = at.end;
    at.end += (4 * count + 63) / 64 * 64;
    return start;
  };
  at.packed = take(task_rows * words);
  at.thresholds = take(task_rows);
  at.factors = take(task_rows);
  at.shifts = take(task_rows);
  at.bounds = take(task_rows);
  at.steps = take(task_rows);
  at.counts = take(task_rows * 3);
  at.top = take(task_rows * k);
  at.place = take(task_rows * k);
  at.found = take(task_rows * at.room);
  at.key = take(task_rows * at.room);
  at.best = take(task_rows * k);
  at.where = take(task_rows * k);
  return at;
}

}  // namespace

CpuIsa nearest_isa(const std::string& name) { return NearestKernels::isa(name); }

Numbers nearest_search(CpuIsa isa) { return NearestKernels::of(isa).search; }

void nearest_run(NearestCall call, CpuIsa isa) {
  if (call.batch < 0 || call.n < 0 || call.m < 0 || call.c < 0) {
    throw std::invalid_argument("nearest: sizes must not be negative");
  }
  // Rows are numbered in 32 bits inside the kernel.
  constexpr std::int64_t limit = std::numeric_limits<std::int32_t>::max() - 1024;
  if (call.n > limit || call.m > limit) {
    throw std::invalid_argument("nearest: at most 2^31 - 1025 rows each, got " + std::to_string(call.n) + " and " +
                                std::to_string(call.m));
  }
  // Far below the range of an address, so that neither bytes nor their sums overflow.
  if (call.c > limit || (call.n > call.m ? call.n : call.m) * call.c > std::int64_t{1} << 56) {
    throw std::invalid_argument("nearest: the arrays are too large, with rows of " + std::to_string(call.c));
  }
  if (call.k < 1 || call.k > kMostNeighbours) {
    throw std::invalid_argument("nearest: k must be 1 to " + std::to_string(kMostNeighbours) + ", got " +
                                std::to_string(call.k));
  }
  if (call.threads < 1) throw std::invalid_argument("nearest: threads must be at least 1");
  const std::int64_t queries = call.batch * call.n, keys = call.batch * call.m;
  if ((queries > 0 && (call.similarity == nullptr || call.index == nullptr)) ||
      (call.c > 0 && ((queries > 0 && call.query == nullptr) || (keys > 0 && call.key == nullptr)))) {
    throw std::invalid_argument("nearest: query, key, similarity and index must not be null");
  }
  if (queries == 0) return;

  const NearestKernel& kernel = NearestKernels::of(isa);
  const std::int64_t panels = (call.n + kernel.query_rows - 1) / kernel.query_rows;
  const std::int64_t words = (call.c + kernel.channels_per_word - 1) / kernel.channels_per_word;
  NearestWork work{};
  work.padded_keys = (call.m + kernel.key_rows - 1) / kernel.key_rows * kernel.key_rows;
  if (panels < call.threads) call.threads = static_cast<int>(panels);
  // Few panels: smaller tasks, so that every thread gets some.
  for (work.task_panels = 1; work.task_panels < kTaskPanels && 8 * work.task_panels * call.threads <= panels;) {
    work.task_panels *= 2;
  }
  const auto groups = [&] { return (panels + work.group_panels - 1) / work.group_panels; };
  work.group_panels = 1;
  if (call.back != nullptr) {
    while (groups() * work.padded_keys * 4 > kGroupBytes && groups() > 4 * call.threads) work.group_panels *= 2;
  }

  work.layout = layout(work.task_panels * kernel.query_rows, words, call.k);
  const auto packed = allocate<float>(work.padded_keys * words);
  const auto each = allocate<char>(work.layout.end * call.threads);
  const auto query_norms = allocate<double>(call.n), key_norms = allocate<double>(call.m);
  const auto centres = allocate<float>(2 * call.c), of_keys = allocate<float>(2 * work.padded_keys);
  work.packed_keys = packed.get();
  work.query_centre = centres.get();
  work.key_centre = work.query_centre + call.c;
  work.key_bias = of_keys.get();
  work.key_steps = work.key_bias + work.padded_keys;
  work.query_norms = query_norms.get();
  work.key_norms = key_norms.get();
  work.scratch = each.get();
  Memory<float> group_best, wanted;
  Memory<std::int64_t> key_back;
  if (call.back != nullptr) {
    group_best = allocate<float>(groups() * work.padded_keys);
    wanted = allocate<float>(call.m);
    key_back = allocate<std::int64_t>(call.m);
    work.group_best = group_best.get();
    work.wanted = wanted.get();
    work.key_back = key_back.get();
  }
  kernel.run(call, work);
}

}  // namespace lift_fast
