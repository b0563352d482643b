#include "map_products.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <stdexcept>

#include "dispatch.hpp"
#include "memory.hpp"
#include "threads.hpp"

namespace lift_fast {
namespace {

void require(bool holds, const char* what) {
  if (!holds) throw std::invalid_argument(std::string("map_products: ") + what);
}

struct Neighbours {
  std::int64_t low, high;
  float weight;  // of the higher one
};

// Multiplied by 2 * pixels, so in whole numbers: these show exactly where a pixel lies at a cell's centre, where the
// other cell has weight zero and must not count.
Neighbours neighbours(std::int64_t pixel, std::int64_t cells, std::int64_t pixels) {
  const std::int64_t whole = 2 * pixels;
  const std::int64_t source = std::clamp<std::int64_t>((2 * pixel + 1) * cells - pixels, 0, whole * (cells - 1));
  const std::int64_t low = source / whole, rest = source % whole;
  return {low, rest > 0 ? low + 1 : low, static_cast<float>(static_cast<double>(rest) / static_cast<double>(whole))};
}

// 1 / max(norm, 1e-12), the norm in float64 so that it cannot overflow; NaN for a cell that is not finite.
double inverse_norm(const float* values, std::int64_t count) {
  double sums[4] = {};
  std::int64_t k = 0;
  for (; k + 4 <= count; k += 4) {
    for (int i = 0; i < 4; ++i) sums[i] += static_cast<double>(values[k + i]) * values[k + i];
  }
  for (; k < count; ++k) sums[0] += static_cast<double>(values[k]) * values[k];
  const double sum = (sums[0] + sums[1]) + (sums[2] + sums[3]);
  if (!(sum < std::numeric_limits<double>::infinity())) return std::numeric_limits<double>::quiet_NaN();
  return 1.0 / std::fmax(std::sqrt(sum), 1e-12);
}

// `room` holds four cells.
void sample_point(const MapSampleCall& call, std::int64_t point, float* room) {
  const Neighbours x = neighbours(call.points[2 * point], call.grid_w, call.width);
  const Neighbours y = neighbours(call.points[2 * point + 1], call.grid_h, call.height);
  const std::int64_t cells[4] = {y.low * call.grid_w + x.low, y.low * call.grid_w + x.high,
                                 y.high * call.grid_w + x.low, y.high * call.grid_w + x.high};
  const double weights[4] = {(1.0 - y.weight) * (1.0 - x.weight), (1.0 - y.weight) * x.weight,
                             y.weight * (1.0 - x.weight), static_cast<double>(y.weight) * x.weight};
  float* from[4];
  for (int i = 0; i < 4; ++i) from[i] = room + i * call.c;
  // Channels may lie a page apart: all four cells at once, so that their memory latencies overlap.
  for (std::int64_t k = 0; k < call.c; ++k) {
    const float* channel = call.map + k * call.channel_stride;
    for (int i = 0; i < 4; ++i) from[i][k] = channel[cells[i] * call.cell_stride];
  }
  double factors[4];
  // A cell of weight zero is replaced by the other one: a value that is not finite spoils only points in which it
  // counts.
  for (int i = 0; i < 4; ++i) factors[i] = weights[i] * (call.normalize_cells ? inverse_norm(from[i], call.c) : 1.0);
  float* to = call.descriptors + point * call.c;
  for (std::int64_t k = 0; k < call.c; ++k) {
    to[k] = static_cast<float>((factors[0] * from[0][k] + factors[1] * from[1][k]) +
                               (factors[2] * from[2][k] + factors[3] * from[3][k]));
  }
  if (!call.normalize_result) return;
  const double inverse = inverse_norm(to, call.c);
  for (std::int64_t k = 0; k < call.c; ++k) to[k] = static_cast<float>(to[k] * inverse);
}

}  // namespace

void map_sample_run(const MapSampleCall& call) {
  constexpr std::int64_t limit = std::int64_t{1} << 31;
  require(call.count >= 0 && call.c >= 0, "sizes must not be negative");
  require(call.count < limit && call.c < limit, "at most 2^31 - 1 of each");
  require(call.grid_h > 0 && call.grid_w > 0 && call.height > 0 && call.width > 0, "a map and an image have sides");
  require(call.grid_h < limit / call.grid_w && call.height < limit && call.width < limit, "the map is too large");
  // Room for the products of sides in 64 bits.
  constexpr std::int64_t most = std::int64_t{1} << 60;
  require(call.grid_h < most / call.height && call.grid_w < most / call.width, "map and image are too large");
  require(call.threads >= 1, "threads must be at least 1");
  if (call.count == 0 || call.c == 0) return;
  require(call.points != nullptr && call.map != nullptr && call.descriptors != nullptr,
          "points, map and descriptors must not be null");
  require(call.channel_stride >= 0 && call.cell_stride >= 0 && call.channel_stride < limit && call.cell_stride < limit,
          "strides must not be negative");
  for (std::int64_t p = 0; p < call.count; ++p) {
    const std::int64_t x = call.points[2 * p], y = call.points[2 * p + 1];
    require(x >= 0 && x < call.width && y >= 0 && y < call.height, "points must lie inside the image");
  }
  const int threads = call.threads < call.count ? call.threads : static_cast<int>(call.count);
  const Memory<float> rooms = allocate<float>(4 * call.c * threads);
#pragma omp parallel num_threads(threads)
  {
    float* room = rooms.get() + 4 * call.c * thread_index();
#pragma omp for schedule(static)
    for (std::int64_t p = 0; p < call.count; ++p) sample_point(call, p, room);
  }
}

void map_products_run(const MapProductsCall& call, CpuIsa isa) {
  require(call.count >= 0 && call.c >= 0 && call.cells >= 0, "sizes must not be negative");
  constexpr std::int64_t limit = std::int64_t{1} << 31;
  require(call.count < limit && call.c < limit && call.cells < limit, "at most 2^31 - 1 of each");
  require(call.threads >= 1, "threads must be at least 1");
  if (call.count == 0 || call.cells == 0) return;
  require(call.table != nullptr && (call.c == 0 || (call.descriptors != nullptr && call.map != nullptr)),
          "descriptors, map and table must not be null");
  if (call.c == 0) {
    std::memset(call.table, 0, static_cast<std::size_t>(call.count * call.cells) * 4);
    return;
  }
  MapProductsCall inner = call;
  // The stride of a dimension of one element does not matter: the layout of columns takes any distance of the other.
  if (call.c == 1) inner.channel_stride = call.cells;
  if (call.cells == 1) inner.cell_stride = 1;
  const std::int64_t channel = inner.channel_stride, cell = inner.cell_stride;
  require(channel >= 1 && cell >= 1 && channel < limit && cell < limit, "strides must be positive");
  const bool rows = channel == 1 && cell >= call.c, columns = cell == 1 && channel >= call.cells;
  require(rows || columns || call.c == 1, "one stride must be 1, the other no smaller than the rows");
  const MapProductsKernel& kernel = Kernels<MapProductsKernel>::of(isa);
  Memory<float> gathered;
  if (call.c == 1 && cell != 1) {
    gathered = allocate<float>(call.cells);
    for (std::int64_t i = 0; i < call.cells; ++i) gathered.get()[i] = call.map[i * cell];
    inner.map = gathered.get();
    inner.cell_stride = 1;
  }
  MapProductsWork work{};
  work.padded_channels = (call.c + kernel.lanes - 1) / kernel.lanes * kernel.lanes;
  const Memory<float> padded = allocate<float>(call.count * work.padded_channels);
  for (std::int64_t p = 0; p < call.count; ++p) {
    float* row = padded.get() + p * work.padded_channels;
    std::memcpy(row, call.descriptors + p * call.c, static_cast<std::size_t>(call.c) * 4);
    std::memset(row + call.c, 0, static_cast<std::size_t>(work.padded_channels - call.c) * 4);
  }
  work.padded = padded.get();
  work.scratch_words = (call.c * kernel.cells + 15) / 16 * 16;
  const Memory<float> scratch = allocate<float>(work.scratch_words * call.threads);
  work.scratch = scratch.get();
  kernel.run(inner, work);
}

}  // namespace lift_fast
