#include "dense_match_image.hpp"

#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "dense_match_axis.hpp"
#include "memory.hpp"

namespace lift_fast {
namespace {

// Points whose groups exist at one time, 16 bytes for each.
constexpr std::int64_t kMostPoints = std::int64_t{1} << 20;
constexpr std::int64_t kTile = 4;

void require(bool holds, const std::string& what) {
  if (!holds) throw std::invalid_argument("dense_match: " + what);
}

// The strip of each pixel of an axis.
std::vector<std::int32_t> strips_of(const DenseMatchAxis& axis) {
  std::vector<std::int32_t> strip(static_cast<std::size_t>(axis.pixels));
  for (std::int64_t s = 0; s < axis.strips; ++s) {
    for (std::int64_t i = axis.first[s]; i < axis.first[s + 1]; ++i) strip[i] = static_cast<std::int32_t>(s);
  }
  return strip;
}

// Points in the order of their groups.
class Groups {
 public:
  Groups(const DenseMatchImageCall& call, std::int64_t points)
      : call_(call),
        order_(allocate<std::int64_t>(points)),
        weights_(allocate<float>(2 * points)),
        inverse_(allocate<float>(points)) {}

  void begin(std::int64_t strip_y, std::int64_t strip_x) {
    const DenseMatchAxis &y = call_.query_y, &x = call_.query_x;
    for (const std::int64_t row : {y.low[strip_y] - call_.top, y.high[strip_y] - call_.top}) {
      for (const std::int64_t column : {x.low[strip_x], x.high[strip_x]}) {
        corners_.push_back(static_cast<std::int32_t>(row * x.cells + column));
      }
    }
    start_.push_back(count_);
    if (call_.query_gram == nullptr) return;
    double products[4][4];
    corner_products(call_.query_gram, y.cells, x.cells, {y.low[strip_y], y.high[strip_y]},
                    {x.low[strip_x], x.high[strip_x]}, products);
    for (int i = 0; i < 4; ++i) {
      for (int k = 0; k <= i; ++k) corner_gram_.push_back(static_cast<float>(products[i][k]));
    }
  }
  // `to`: where its result lies.
  void add(std::int64_t row, std::int64_t column, std::int64_t to) {
    weights_[2 * count_] = call_.query_x.weight[column];
    weights_[2 * count_ + 1] = call_.query_y.weight[row];
    if (call_.query_inverse != nullptr) inverse_[count_] = call_.query_inverse[row * call_.query_x.pixels + column];
    order_[count_++] = to;
  }

  void match(DenseMatchCall call, CpuIsa isa) {
    if (count_ == 0) return;
    start_.push_back(count_);
    call.groups = static_cast<std::int64_t>(start_.size()) - 1;
    call.corners = corners_.data();
    call.start = start_.data();
    call.weights = weights_.get();
    call.order = order_.get();
    if (call_.query_gram != nullptr) {
      call.inverse = inverse_.get();
      call.corner_gram = corner_gram_.data();
    }
    dense_match_run(call, isa);
    corners_.clear();
    corner_gram_.clear();
    start_.clear();
    count_ = 0;
  }

 private:
  const DenseMatchImageCall& call_;
  Memory<std::int64_t> order_;
  Memory<float> weights_, inverse_;
  std::vector<std::int32_t> corners_;
  std::vector<float> corner_gram_;
  std::vector<std::int64_t> start_;
  std::int64_t count_ = 0;
};

void match_every_pixel(const DenseMatchImageCall& call, const DenseMatchCall& match, CpuIsa isa) {
  const DenseMatchAxis &y = call.query_y, &x = call.query_x;
  std::int64_t widest = 0;
  for (std::int64_t s = 0; s < y.strips; ++s) widest = std::max<std::int64_t>(widest, y.first[s + 1] - y.first[s]);
  const std::int64_t rows = std::min(y.pixels, std::max(widest, kMostPoints / x.pixels));
  Groups groups(call, rows * x.pixels);
  std::int64_t filled = 0;
  for (std::int64_t sy = 0; sy < y.strips && !stopped(call.stop); ++sy) {
    if (y.low[sy] < call.top || y.low[sy] >= call.end) continue;
    const std::int64_t high = y.first[sy + 1] - y.first[sy];
    if (filled + high > rows) {
      groups.match(match, isa);
      filled = 0;
    }
    filled += high;
    for (std::int64_t sx = 0; sx < x.strips; ++sx) {
      groups.begin(sy, sx);
      // Points of a vector have similar thresholds if they lie together.
      for (std::int64_t top = y.first[sy]; top < y.first[sy + 1]; top += kTile) {
        const std::int64_t bottom = std::min<std::int64_t>(top + kTile, y.first[sy + 1]);
        for (std::int64_t left = x.first[sx]; left < x.first[sx + 1]; left += kTile) {
          const std::int64_t right = std::min<std::int64_t>(left + kTile, x.first[sx + 1]);
          for (std::int64_t row = top; row < bottom; ++row) {
            for (std::int64_t column = left; column < right; ++column) groups.add(row, column, row * x.pixels + column);
          }
        }
      }
    }
  }
  groups.match(match, isa);
}

void match_points(const DenseMatchImageCall& call, const DenseMatchCall& match, CpuIsa isa) {
  const DenseMatchAxis &y = call.query_y, &x = call.query_x;
  const std::vector<std::int32_t> strip_y = strips_of(y), strip_x = strips_of(x);
  const auto group_of = [&](std::int64_t point) -> std::int64_t {
    const std::int32_t sy = strip_y[call.points[2 * point + 1]];
    if (y.low[sy] < call.top || y.low[sy] >= call.end) return -1;
    return sy * x.strips + strip_x[call.points[2 * point]];
  };
  const std::int64_t portion = std::min(call.count, kMostPoints);
  Groups groups(call, portion);
  // Sorted by counting.
  std::vector<std::int32_t> next(static_cast<std::size_t>(y.strips * x.strips + 1));
  std::vector<std::int32_t> sorted(static_cast<std::size_t>(portion));
  for (std::int64_t first = 0; first < call.count && !stopped(call.stop); first += portion) {
    const std::int64_t end = std::min(first + portion, call.count);
    std::fill(next.begin(), next.end(), 0);
    for (std::int64_t p = first; p < end; ++p) ++next[group_of(p) + 1];
    // The first place is of the points that are left out.
    next[0] = 0;
    for (std::size_t g = 1; g < next.size(); ++g) next[g] += next[g - 1];
    for (std::int64_t p = first; p < end; ++p) {
      const std::int64_t group = group_of(p);
      if (group >= 0) sorted[next[group]++] = static_cast<std::int32_t>(p - first);
    }
    // Now next[g] is the end of group g.
    std::int32_t at = 0;
    for (std::int64_t g = 0; g < y.strips * x.strips; ++g) {
      if (at == next[g]) continue;
      groups.begin(g / x.strips, g % x.strips);
      for (; at < next[g]; ++at) {
        const std::int64_t point = first + sorted[at];
        groups.add(call.points[2 * point + 1], call.points[2 * point], point);
      }
    }
    groups.match(match, isa);
  }
}

}  // namespace

void dense_match_image_run(const DenseMatchImageCall& given, CpuIsa isa) {
  DenseMatchImageCall call = given;
  check_axis(call.query_y, "query y");
  check_axis(call.query_x, "query x");
  check_axis(call.y, "y");
  check_axis(call.x, "x");
  constexpr std::int64_t limit = std::numeric_limits<std::int32_t>::max();
  const DenseMatchAxis &y = call.query_y, &x = call.query_x;
  require(call.count >= 0, "sizes must not be negative");
  require(x.pixels <= limit / y.pixels, "the query image must have fewer than 2^31 pixels");
  require(call.points != nullptr || call.count == x.pixels * y.pixels, "every pixel needs a place for its match");
  require(call.rows >= 1 && call.rows <= y.cells && call.top >= 0 && call.top <= call.end && call.end <= y.cells &&
              call.rows <= limit / x.cells,
          "the table's rows of cells must be those of the query image");
  for (std::int64_t s = 0; s < y.strips; ++s) {
    require(y.low[s] < call.top || y.low[s] >= call.end ||
                (y.low[s] < call.top + call.rows && y.high[s] >= call.top && y.high[s] < call.top + call.rows),
            "the table lacks rows of cells");
  }
  require(call.table != nullptr, "table must not be null");
  require((call.query_inverse != nullptr) == (call.query_gram != nullptr), "the query's norms and gram go together");
  require(call.query_gram == nullptr || call.gram != nullptr, "without scales the query's norms do not matter");
  for (std::int64_t p = 0; call.points != nullptr && p < call.count; ++p) {
    const std::int64_t column = call.points[2 * p], row = call.points[2 * p + 1];
    require(column >= 0 && column < x.pixels && row >= 0 && row < y.pixels, "points must lie inside the image");
  }
  // A query cell that is not finite is not finite in any column.
  const std::int64_t key_cells = call.y.cells * call.x.cells;
  bool finite = true;
  for (std::int64_t row = 0; row < call.rows * x.cells; ++row) finite &= std::isfinite(call.table[row * key_cells]);
  std::optional<JoinedAxis> joined_y, joined_x;
  if (finite) {
    joined_y.emplace(call.query_y);
    joined_x.emplace(call.query_x);
  }
  require(y.strips < limit / x.strips, "the query image has too many groups");

  DenseMatchCall match{};
  match.table = call.table;
  match.rows = call.rows * x.cells;
  match.floor = call.floor;
  match.y = call.y;
  match.x = call.x;
  match.scale = call.scale;
  match.gram = call.gram;
  match.similarity = call.similarity;
  match.index = call.index;
  match.threads = call.threads;
  match.stop = call.stop;
  if (call.points == nullptr) {
    match_every_pixel(call, match, isa);
  } else {
    match_points(call, match, isa);
  }
}

}  // namespace lift_fast
