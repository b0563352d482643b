#include "nearest.hpp"

#include <limits>
#include <stdexcept>

#include "memory.hpp"

namespace lift_fast {
namespace {

// Panels of queries that share the second-level cache with a panel of keys.
constexpr std::int64_t kTaskPanels = 16;
constexpr std::int64_t kGroupBytes = std::int64_t{16} << 20;

NearestTiling tiling(NearestIsa isa) {
  switch (isa) {
#if defined(__x86_64__)
    case NearestIsa::avx512_bf16: return nearest_tiling_avx512_bf16();
    case NearestIsa::avx512_int16: return nearest_tiling_avx512_int16();
    case NearestIsa::avx512: return nearest_tiling_avx512();
    case NearestIsa::avx2_int16: return nearest_tiling_avx2_int16();
    case NearestIsa::avx2: return nearest_tiling_avx2();
#endif
    default: return nearest_tiling_baseline();
  }
}

bool supported(NearestIsa isa) {
#if defined(__x86_64__)
  switch (isa) {
    case NearestIsa::avx512_bf16: return cpu_has(CpuIsa::avx512) && __builtin_cpu_supports("avx512bf16");
    case NearestIsa::avx512_int16: return cpu_has(CpuIsa::avx512) && __builtin_cpu_supports("avx512vnni");
    case NearestIsa::avx512: return cpu_has(CpuIsa::avx512);
    case NearestIsa::avx2_int16:
    case NearestIsa::avx2: return cpu_has(CpuIsa::avx2);
    case NearestIsa::baseline: break;
  }
#endif
  return isa == NearestIsa::baseline;
}

}  // namespace

const char* nearest_isa_name(NearestIsa isa) {
  switch (isa) {
    case NearestIsa::avx512_bf16: return "avx512_bf16";
    case NearestIsa::avx512_int16: return "avx512_int16";
    case NearestIsa::avx512: return "avx512";
    case NearestIsa::avx2_int16: return "avx2_int16";
    case NearestIsa::avx2: return "avx2";
    case NearestIsa::baseline: break;
  }
  return "baseline";
}

NearestIsa nearest_isa(const std::string& name) {
  for (NearestIsa isa : {NearestIsa::avx512_bf16, NearestIsa::avx512_int16, NearestIsa::avx512, NearestIsa::avx2_int16,
                         NearestIsa::avx2, NearestIsa::baseline}) {
    if (name == "auto" ? supported(isa) : name == nearest_isa_name(isa)) {
      if (!supported(isa)) throw std::invalid_argument("this CPU cannot run " + name + "; use isa=\"auto\"");
      return isa;
    }
  }
  throw std::invalid_argument("isa must be auto, avx512_bf16, avx512_int16, avx512, avx2_int16, avx2 or "
                              "baseline, got " + name);
}

void nearest_run(NearestCall call, NearestIsa isa) {
  if (call.batch < 0 || call.n < 0 || call.m < 0 || call.c < 0) {
    throw std::invalid_argument("nearest: sizes must not be negative");
  }
  // Rows are numbered in 32 bits inside the kernel.
  constexpr std::int64_t limit = std::numeric_limits<std::int32_t>::max() - 1024;
  if (call.n > limit || call.m > limit) {
    throw std::invalid_argument("nearest: at most 2^31 - 1025 rows each, got " + std::to_string(call.n) + " and " +
                                std::to_string(call.m));
  }
  // Far below the range of an address, so that bytes and their sums do not overflow either.
  if (call.c > limit || (call.n > call.m ? call.n : call.m) * call.c > std::int64_t{1} << 56) {
    throw std::invalid_argument("nearest: arrays of that size cannot exist, rows of " + std::to_string(call.c));
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

  const NearestTiling cut = tiling(isa);
  const std::int64_t panels = (call.n + cut.query_rows - 1) / cut.query_rows;
  const std::int64_t words = (call.c + cut.channels_per_word - 1) / cut.channels_per_word;
  NearestWork work{};
  work.padded_keys = (call.m + cut.key_rows - 1) / cut.key_rows * cut.key_rows;
  if (panels < call.threads) call.threads = static_cast<int>(panels);
  // Few panels: smaller tasks, so that every thread has some.
  for (work.task_panels = 1; work.task_panels < kTaskPanels && 8 * work.task_panels * call.threads <= panels;) {
    work.task_panels *= 2;
  }
  const auto groups = [&] { return (panels + work.group_panels - 1) / work.group_panels; };
  work.group_panels = 1;
  if (call.back != nullptr) {
    while (groups() * work.padded_keys * 4 > kGroupBytes && groups() > 4 * call.threads) work.group_panels *= 2;
  }

  const NearestScratch scratch(work.task_panels * cut.query_rows, words, call.k);
  const auto packed = allocate<float>(work.padded_keys * words);
  const auto each = allocate<char>(scratch.end * call.threads);
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
  work.scratch_bytes = scratch.end;
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
  switch (isa) {
#if defined(__x86_64__)
    case NearestIsa::avx512_bf16: nearest_kernel_avx512_bf16(call, work); return;
    case NearestIsa::avx512_int16: nearest_kernel_avx512_int16(call, work); return;
    case NearestIsa::avx512: nearest_kernel_avx512(call, work); return;
    case NearestIsa::avx2_int16: nearest_kernel_avx2_int16(call, work); return;
    case NearestIsa::avx2: nearest_kernel_avx2(call, work); return;
#endif
    default: nearest_kernel_baseline(call, work); return;
  }
}

}  // namespace lift_fast
