#include "dense_match_points.hpp"

#include <algorithm>
#include <stdexcept>
#include <string>

#include "map_products.hpp"
#include "memory.hpp"

namespace lift_fast {
namespace {

void require(bool holds, const std::string& what) {
  if (!holds) throw std::invalid_argument("dense_match_points: " + what);
}

}  // namespace

void dense_match_points_run(const DenseMatchPointsCall& call, CpuIsa isa) {
  constexpr std::int64_t limit = std::int64_t{1} << 31;
  require(call.count >= 0 && call.count < limit && call.c >= 0 && call.c < limit, "0 to 2^31 - 1 points and channels");
  require(call.key.grid_h > 0 && call.key.grid_w > 0 && call.key.grid_h < limit / call.key.grid_w,
          "the key map must have 1 to 2^31 - 1 cells");
  require(call.key.grid_h == call.y.cells && call.key.grid_w == call.x.cells, "the axes must be those of the key map");
  require(call.table_bytes >= 0 && call.threads >= 1, "table_bytes must not be negative, threads at least 1");
  if (call.count == 0) return;
  require(call.points != nullptr && call.similarity != nullptr && call.index != nullptr,
          "points, similarity and index must not be null");
  const std::int64_t cells = call.key.grid_h * call.key.grid_w;
  const std::int64_t portion = std::min(std::max<std::int64_t>(call.table_bytes / (4 * std::max(cells, call.c)), 1),
                                        call.count);
  const Memory<float> descriptors = allocate<float>(portion * call.c), table = allocate<float>(portion * cells);
  // Each point is a group of its own, on its row of the table.
  const Memory<std::int32_t> corners = allocate<std::int32_t>(4 * portion);
  const Memory<std::int64_t> start = allocate<std::int64_t>(portion + 1);
  const Memory<float> weights = allocate<float>(2 * portion);
  for (std::int64_t i = 0; i <= portion; ++i) start[i] = i;
  for (std::int64_t i = 0; i < 4 * portion; ++i) corners[i] = static_cast<std::int32_t>(i / 4);
  for (std::int64_t i = 0; i < 2 * portion; ++i) weights[i] = 0.0f;

  for (std::int64_t first = 0; first < call.count && !stopped(call.stop); first += portion) {
    const std::int64_t count = std::min(portion, call.count - first);
    MapSampleCall sample{};
    sample.points = call.points + 2 * first;
    sample.map = call.query.data;
    sample.channel_stride = call.query.channel_stride;
    sample.cell_stride = call.query.cell_stride;
    sample.count = count;
    sample.c = call.c;
    sample.grid_h = call.query.grid_h;
    sample.grid_w = call.query.grid_w;
    sample.height = call.height;
    sample.width = call.width;
    sample.normalize_cells = call.query.normalize;
    sample.normalize_result = call.normalize;
    sample.descriptors = descriptors.get();
    sample.threads = call.threads;
    map_sample_run(sample);

    MapProductsCall products{};
    products.descriptors = descriptors.get();
    products.map = call.key.data;
    products.channel_stride = call.key.channel_stride;
    products.cell_stride = call.key.cell_stride;
    products.count = count;
    products.c = call.c;
    products.cells = cells;
    products.normalize = call.key.normalize;
    products.table = table.get();
    products.threads = call.threads;
    map_products_run(products, isa);

    DenseMatchCall match{};
    match.table = table.get();
    match.rows = match.groups = count;
    match.corners = corners.get();
    match.start = start.get();
    match.weights = weights.get();
    match.y = call.y;
    match.x = call.x;
    match.scale = call.scale;
    match.gram = call.gram;
    match.similarity = call.similarity + first;
    match.index = call.index + first;
    match.threads = call.threads;
    match.stop = call.stop;
    dense_match_run(match, isa);
  }
}

}  // namespace lift_fast
