#include "window_nearest.hpp"

#include <algorithm>
#include <cstring>
#include <initializer_list>
#include <stdexcept>
#include <string>
#include <vector>

#include "dispatch.hpp"
#include "memory.hpp"

namespace lift_fast {
namespace {

// Bytes of a stage's packed keys; of a task's queries, which share the L2 cache with a row of keys; of queries that are
// packed once for all stages.
constexpr std::int64_t kStageBytes = 8 << 20, kTaskBytes = 256 << 10, kQueryBytes = 8 << 20;

void require(bool holds, const std::string& what) {
  if (!holds) throw std::invalid_argument("window_nearest: " + what);
}

std::int64_t product(std::initializer_list<std::int64_t> sizes) {
  std::int64_t all = 1;
  for (const std::int64_t size : sizes) {
    // Far below the range of an address, so that neither bytes nor their sums overflow.
    require(size == 0 || all <= (std::int64_t{1} << 56) / size, "the arrays are too large");
    all *= size;
  }
  return all;
}

std::int64_t floor_div(std::int64_t a, std::int64_t b) { return a / b - (a % b < 0 ? 1 : 0); }

// Along one axis: the keys within reach of each query, [low, high].
void within_reach(std::int64_t queries, std::int64_t keys, std::int64_t reach, std::vector<std::int32_t>& low,
                  std::vector<std::int32_t>& high) {
  // The far corners are within reach of each other; larger reaches change nothing.
  reach = std::min(reach, 2 * queries * keys);
  for (std::int64_t q = 0; q < queries; ++q) {
    const std::int64_t centre = (2 * q + 1) * keys - queries;
    const std::int64_t first = -floor_div(reach - centre, 2 * queries), last = floor_div(centre + reach, 2 * queries);
    low.push_back(static_cast<std::int32_t>(std::clamp<std::int64_t>(first, 0, keys)));
    high.push_back(static_cast<std::int32_t>(std::clamp<std::int64_t>(last, -1, keys - 1)));
  }
}

}  // namespace

void window_nearest_run(WindowNearestCall call, CpuIsa isa) {
  // Columns and rows are numbered in 32 bits, and compared in 64 after a product of two of them.
  constexpr std::int64_t limit = std::int64_t{1} << 30;
  for (const std::int64_t side : {call.query_h, call.query_w, call.key_h, call.key_w}) {
    require(side >= 1 && side <= limit, "sides of grids must lie in 1 .. 2^30, got " + std::to_string(side));
  }
  require(call.batch >= 0 && call.query_frames >= 0 && call.key_frames >= 0 && call.c >= 0,
          "sizes must not be negative");
  require(call.k >= 1, "k must be at least 1, got " + std::to_string(call.k));
  require(call.reach_y >= 0 && call.reach_x >= 0, "reach_y and reach_x must not be negative");
  require(call.threads >= 1, "threads must be at least 1, got " + std::to_string(call.threads));
  const std::int64_t queries = product({call.batch, call.query_frames, call.query_h, call.query_w});
  const std::int64_t keys = product({call.batch, call.key_frames, call.key_h, call.key_w});
  product({queries, std::max<std::int64_t>(call.c, 1)});
  product({keys, std::max<std::int64_t>(call.c, 1)});
  product({queries, call.k});
  if (queries == 0) return;
  require(call.similarity != nullptr && call.index != nullptr, "similarity and index must not be null");
  require(call.c == 0 || (call.query != nullptr && (keys == 0 || call.key != nullptr)),
          "query and key must not be null");
  // Rows without channels become rows of one zero.
  Memory<float> zeros;
  if (call.c == 0) {
    zeros = allocate<float>(std::max(queries, keys));
    std::memset(zeros.get(), 0, static_cast<std::size_t>(std::max(queries, keys)) * 4);
    call.query = call.key = zeros.get();
    call.c = 1;
  }

  std::vector<std::int32_t> row_low, row_high, column_low, column_high;
  within_reach(call.query_h, call.key_h, call.reach_y, row_low, row_high);
  within_reach(call.query_w, call.key_w, call.reach_x, column_low, column_high);
  call.row_low = row_low.data();
  call.row_high = row_high.data();
  call.column_low = column_low.data();
  call.column_high = column_high.data();

  // When half of a unit vector's squared length is left, the bound is down to half; before that it only excludes pairs
  // that are far from similar.
  const std::int64_t ends[] = {call.c / 4, call.c / 2, call.c};
  call.sections = call.c < 64 ? 1 : window_nearest_sections;
  for (std::int64_t s = 0; s < call.sections; ++s) {
    call.section_end[s] = ends[window_nearest_sections - call.sections + s];
  }

  const WindowNearestKernel& kernel = Kernels<WindowNearestKernel>::of(isa);
  const std::int64_t packed = call.c + call.sections - 1;
  // A vector may start at the last cell. An odd number of cache lines, so that channels do not fall on the same sets.
  call.row_stride = ((call.key_w + kernel.lanes - 1 + 15) / 16 | 1) * 16;
  const std::int64_t frame = keys == 0 ? 0 : product({call.key_h, packed, call.row_stride});
  call.stage_frames = std::clamp<std::int64_t>(kStageBytes / (4 * frame + 1), 1,
                                               std::max<std::int64_t>(call.key_frames, 1));
  const std::int64_t tiles = call.query_frames * call.query_h * ((call.query_w + kernel.queries - 1) / kernel.queries),
                     tile = packed * kernel.queries;
  if (tiles < call.threads) call.threads = static_cast<int>(tiles);
  // Few tiles: smaller tasks, so that every thread gets some.
  call.tiles_per_task = std::max<std::int64_t>(1, std::min(kTaskBytes / (4 * tile), tiles / (4 * call.threads)));
  const Memory<float> packed_keys = allocate<float>(call.stage_frames * frame);
  call.pack_queries_once = call.stage_frames < call.key_frames && tiles <= kQueryBytes / (4 * tile);
  const Memory<float> packed_queries = allocate<float>(
      call.pack_queries_once ? product({tiles, tile}) : product({call.threads, call.tiles_per_task, tile}));
  call.packed_keys = packed_keys.get();
  call.packed_queries = packed_queries.get();
  kernel.run(call);
}

}  // namespace lift_fast
