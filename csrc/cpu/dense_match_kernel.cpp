// The dense matcher.
#include "dense_match.hpp"
#include "simd/simd.hpp"
#include "threads.hpp"

namespace lift_fast {
namespace {

constexpr std::int64_t kBlock = dense_match_block;
// Rounding may lift a value above its corners: three interpolations, a scale, and the bound's own.
constexpr float kSlack = 16 * __FLT_EPSILON__;

// Zero, or NaN if the value is not finite.
template <class T>
T zero_if_finite(T value) {
  return value - value;
}
// The larger of two values that are finite or NaN; NaN if either is.
template <class T>
T larger_or_nan(T a, T b) {
  return larger(a, b) + (zero_if_finite(a) + zero_if_finite(b));
}
inline float lane_max(Vec v) {
  float best = v[0];
  for (int i = 1; i < kLanes; ++i) best = larger(best, v[i]);
  return best;
}
inline float lane_min(Vec v) {
  float least = v[0];
  for (int i = 1; i < kLanes; ++i) least = v[i] < least ? v[i] : least;
  return least;
}

class Matcher {
 public:
  Matcher(const DenseMatchCall& call, float* scratch)
      : call_(call),
        cells_(call.y.cells * call.x.cells),
        upper_(scratch + call.layout.upper),
        rows_(scratch + call.layout.rows),
        bounds_(scratch + call.layout.bounds),
        weight_x_(scratch + call.layout.weights),
        weight_y_(weight_x_ + kBlock),
        weight_xy_(weight_y_ + kBlock),
        best_(scratch + call.layout.best),
        index_(reinterpret_cast<std::int32_t*>(scratch + call.layout.index)) {
    // Consecutive strips between neighbouring cells can be read as vectors.
    const DenseMatchAxis& x = call.x;
    regular_first_ = 0;
    while (regular_first_ < x.strips && x.high[regular_first_] != x.low[regular_first_] + 1) ++regular_first_;
    regular_end_ = regular_first_;
    while (regular_end_ < x.strips && x.high[regular_end_] == x.low[regular_end_] + 1 &&
           x.low[regular_end_] == x.low[regular_first_] + (regular_end_ - regular_first_)) {
      ++regular_end_;
    }
  }

  void match(std::int64_t group) {
    for (int i = 0; i < 4; ++i) row_[i] = call_.table + call_.corners[4 * group + i] * cells_;
    bound_cells();
    bound_patches();
    seed(group);
    for (std::int64_t point = call_.start[group]; point < call_.start[group + 1]; point += kBlock) {
      const std::int64_t rest = call_.start[group + 1] - point;
      match_block(point, rest < kBlock ? rest : kBlock);
    }
  }

 private:
  // The largest similarity of the group's corners to each key cell; NaN if one is not finite.
  void bound_cells() {
    Vec magnitude{};
    std::int64_t k = 0;
    for (; k + kLanes <= cells_; k += kLanes) {
      const Vec a = load(row_[0] + k), b = load(row_[1] + k), c = load(row_[2] + k), d = load(row_[3] + k);
      const Vec most = larger(larger(a, b), larger(c, d)), least = larger(larger(-a, -b), larger(-c, -d));
      const Vec zero = (zero_if_finite(a) + zero_if_finite(b)) + (zero_if_finite(c) + zero_if_finite(d));
      store(upper_ + k, most + zero);
      magnitude = larger(larger(most, least) + zero, magnitude);
    }
    largest_ = lane_max(magnitude);
    for (; k < cells_; ++k) {
      const float a = row_[0][k], b = row_[1][k], c = row_[2][k], d = row_[3][k];
      const float most = larger(larger(a, b), larger(c, d)), least = larger(larger(-a, -b), larger(-c, -d));
      const float zero = (zero_if_finite(a) + zero_if_finite(b)) + (zero_if_finite(c) + zero_if_finite(d));
      upper_[k] = most + zero;
      largest_ = larger(larger(most, least) + zero, largest_);
    }
  }

  // The same for each patch, with the scales.
  void bound_patches() {
    const DenseMatchAxis &x = call_.x, &y = call_.y;
    const std::int64_t padded = call_.strips_padded;
    for (std::int64_t cell = 0; cell < y.cells; ++cell) {
      const float* upper = upper_ + cell * x.cells;
      float* row = rows_ + cell * padded;
      const auto one = [&](std::int64_t s) { row[s] = larger_or_nan(upper[x.low[s]], upper[x.high[s]]); };
      std::int64_t s = 0;
      for (; s < regular_first_; ++s) one(s);
      for (const float* from = upper + (regular_first_ < x.strips ? x.low[regular_first_] : 0) - regular_first_;
           s + kLanes <= regular_end_; s += kLanes) {
        store(row + s, larger_or_nan(load(from + s), load(from + s + 1)));
      }
      for (; s < x.strips; ++s) one(s);
      for (; s < padded; ++s) row[s] = __builtin_nanf("");
    }
    for (std::int64_t s = 0; s < y.strips; ++s) {
      const float *near = rows_ + y.low[s] * padded, *far = rows_ + y.high[s] * padded;
      float* bounds = bounds_ + s * padded;
      for (std::int64_t i = 0; i < padded; i += kLanes) {
        Vec bound = larger_or_nan(load(near + i), load(far + i));
        if (call_.scale != nullptr) {
          const Vec high = load(call_.scale_high + s * padded + i), low = load(call_.scale_low + s * padded + i);
          bound *= bound > 0 ? high : low;
        }
        store(bounds + i, bound);
      }
    }
    slack_ = kSlack * largest_ * call_.scale_largest;
  }

  // Patches with good matches of the group's corners, and so of the pixels between them: a high threshold from the
  // start.
  void seed(std::int64_t group) {
    seeds_ = 0;
    for (int i = 0; i < 4; ++i) {
      const std::int32_t cell = call_.row_best[call_.corners[4 * group + i]];
      if (cell < 0) continue;
      const std::int64_t near_y = call_.y_strip[cell / call_.x.cells], near_x = call_.x_strip[cell % call_.x.cells];
      float best = -kInfinity;
      std::int64_t patch = -1;
      for (std::int64_t y = near_y - 1; y <= near_y; ++y) {
        for (std::int64_t x = near_x - 1; x <= near_x; ++x) {
          if (y < 0 || x < 0 || !(bounds_[y * call_.strips_padded + x] > best)) continue;
          patch = y * call_.strips_padded + x;
          best = bounds_[patch];
        }
      }
      bool known = patch < 0;
      for (int k = 0; k < seeds_; ++k) known |= seed_[k] == patch;
      if (!known) seed_[seeds_++] = static_cast<std::int32_t>(patch);
    }
  }

  void match_block(std::int64_t point, std::int64_t count) {
    count_ = count;
    for (std::int64_t i = 0; i < kBlock; ++i) {
      // Lanes beyond the block have a best value that no bound reaches.
      weight_x_[i] = i < count ? call_.weights[2 * (point + i)] : 0.0f;
      weight_y_[i] = i < count ? call_.weights[2 * (point + i) + 1] : 0.0f;
      weight_xy_[i] = weight_x_[i] * weight_y_[i];
      best_[i] = i < count ? -kInfinity : kInfinity;
      index_[i] = -1;
    }
    for (int k = 0; k < seeds_; ++k) visit(seed_[k]);
    float worst = worst_best();
    const std::int64_t patches = call_.y.strips * call_.strips_padded;
    for (std::int64_t i = 0; i < patches; i += kLanes) {
      const Vec bound = load(bounds_ + i) + slack_;
      if (!Isa::any(bound >= splat(worst))) continue;
      for (int lane = 0; lane < kLanes; ++lane) {
        // NaN marks patches that take no part.
        if (!(bound[lane] >= worst)) continue;
        visit(static_cast<std::int32_t>(i + lane));
        worst = worst_best();
      }
    }
    for (std::int64_t i = 0; i < count; ++i) {
      call_.similarity[point + i] = best_[i];
      call_.index[point + i] = index_[i];
    }
  }

  float worst_best() const {
    Vec least = load(best_);
    for (std::int64_t i = kLanes; i < kBlock; i += kLanes) {
      const Vec other = load(best_ + i);
      least = least < other ? least : other;
    }
    return lane_min(least);
  }

  // A bilinear function of the weights (right, down), from its values at the four corners.
  template <class T>
  struct Bilinear {
    T near, right, down, both;
    Bilinear(T top_left, T top_right, T low_left, T low_right)
        : near(top_left),
          right(top_right - top_left),
          down(low_left - top_left),
          both((low_right - low_left) - (top_right - top_left)) {}
  };

  // Looks for better matches of the block's points in one patch.
  void visit(std::int32_t patch) {
    const DenseMatchAxis &x = call_.x, &y = call_.y;
    const std::int64_t strip_y = patch / call_.strips_padded, strip_x = patch % call_.strips_padded;
    const std::int64_t top = y.low[strip_y] * x.cells, low = y.high[strip_y] * x.cells;
    const std::int64_t left = x.low[strip_x], right = x.high[strip_x];
    const std::int64_t cell[4] = {top + left, top + right, low + left, low + right};
    const auto corner = [&](int i) {
      return Bilinear<float>(row_[0][cell[i]], row_[1][cell[i]], row_[2][cell[i]], row_[3][cell[i]]);
    };
    const Bilinear<float> corners[4] = {corner(0), corner(1), corner(2), corner(3)};
    for (std::int64_t i = 0; i < count_; i += kLanes) {
      const Vec weight_x = load(weight_x_ + i), weight_y = load(weight_y_ + i), weight_xy = load(weight_xy_ + i);
      Vec value[4];
      for (int k = 0; k < 4; ++k) {
        value[k] = Isa::multiply_add(splat(corners[k].right), weight_x, splat(corners[k].near));
        value[k] = Isa::multiply_add(splat(corners[k].down), weight_y, value[k]);
        value[k] = Isa::multiply_add(splat(corners[k].both), weight_xy, value[k]);
      }
      Vec bound = larger(larger(value[0], value[1]), larger(value[2], value[3]));
      if (call_.scale != nullptr) bound *= bound > 0 ? splat(call_.scale_high[patch]) : splat(call_.scale_low[patch]);
      const IntVec open = bound + slack_ >= load(best_ + i);
      if (!Isa::any(open)) continue;
      const Bilinear<Vec> patch_values(value[0], value[1], value[2], value[3]);
      if (call_.scale == nullptr) {
        compare_extremes(i, strip_y, strip_x, patch_values);
        continue;
      }
      for (int lane = 0; lane < kLanes; ++lane) {
        if (!open[lane]) continue;
        const Bilinear<float> own(value[0][lane], value[1][lane], value[2][lane], value[3][lane]);
        evaluate(i + lane, strip_y, strip_x, own);
      }
    }
  }

  // Without scales a patch is linear in each direction, so its largest value is at one of its four outermost pixels.
  // Visits these for a vector of points.
  void compare_extremes(std::int64_t point, std::int64_t strip_y, std::int64_t strip_x, const Bilinear<Vec>& patch) {
    const DenseMatchAxis &x = call_.x, &y = call_.y;
    const std::int32_t rows[2] = {y.first[strip_y], y.first[strip_y + 1] - 1};
    const std::int32_t columns[2] = {x.first[strip_x], x.first[strip_x + 1] - 1};
    Vec best = load(best_ + point);
    IntVec index = load(index_ + point);
    for (const std::int32_t row : rows) {
      const Vec down = splat(y.weight[row]);
      const Vec start = Isa::multiply_add(patch.down, down, patch.near),
                slope = Isa::multiply_add(patch.both, down, patch.right);
      for (const std::int32_t column : columns) {
        const Vec value = Isa::multiply_add(slope, splat(x.weight[column]), start);
        const IntVec pixel = IntVec{} + static_cast<std::int32_t>(row * x.pixels + column);
        // An infinite value takes no part.
        const IntVec better = ((value > best) | ((value == best) & (pixel < index))) & (value <= kLargest);
        best = better ? value : best;
        index = better ? pixel : index;
      }
    }
    store(best_ + point, best);
    store(index_ + point, index);
  }

  // All pixels of one patch for one point, each with its scale.
  void evaluate(std::int64_t point, std::int64_t strip_y, std::int64_t strip_x, const Bilinear<float>& patch) {
    const DenseMatchAxis &x = call_.x, &y = call_.y;
    const float* weights = call_.strip_weights + strip_x * call_.width_padded;
    const std::int64_t first_x = x.first[strip_x], width = x.first[strip_x + 1] - first_x;
    const std::int64_t first_y = y.first[strip_y], last_y = y.first[strip_y + 1];
    const auto values = [&](std::int64_t row, std::int64_t column) {
      const Vec down = splat(y.weight[row]);
      const Vec start = Isa::multiply_add(splat(patch.down), down, splat(patch.near));
      const Vec slope = Isa::multiply_add(splat(patch.both), down, splat(patch.right));
      const Vec value = Isa::multiply_add(slope, load(weights + column), start);
      return value * load(call_.padded_scale + row * x.pixels + first_x + column);
    };
    Vec most = splat(-kInfinity);
    for (std::int64_t row = first_y; row < last_y; ++row) {
      for (std::int64_t column = 0; column < width; column += kLanes) {
        const Vec value = values(row, column);
        // Padding is NaN and never larger; an infinite value takes no part.
        most = (value > most) & (value <= kLargest) ? value : most;
      }
    }
    const float best = lane_max(most);
    if (!(best >= best_[point]) || best == -kInfinity) return;
    for (std::int64_t row = first_y; row < last_y; ++row) {
      for (std::int64_t column = 0; column < width; column += kLanes) {
        const IntVec equal = values(row, column) == splat(best);
        if (!Isa::any(equal)) continue;
        int lane = 0;
        while (!equal[lane]) ++lane;
        const auto found = static_cast<std::int32_t>(row * x.pixels + first_x + column + lane);
        if (best > best_[point] || found < index_[point]) {
          best_[point] = best;
          index_[point] = found;
        }
        return;
      }
    }
  }

  const DenseMatchCall& call_;
  const std::int64_t cells_;
  float *upper_, *rows_, *bounds_, *weight_x_, *weight_y_, *weight_xy_, *best_;
  std::int32_t* index_;
  std::int64_t regular_first_, regular_end_, count_ = 0;
  const float* row_[4] = {};
  float largest_ = 0.0f, slack_ = 0.0f;
  std::int32_t seed_[4] = {};
  int seeds_ = 0;
};

// The most similar key cell of one query cell; -1 if no similarity is finite.
inline std::int32_t best_cell(const float* row, std::int64_t cells) {
  Vec best = splat(-kInfinity);
  IntVec index = IntVec{} - 1, at;
  for (int lane = 0; lane < kLanes; ++lane) at[lane] = lane;
  std::int64_t k = 0;
  for (; k + kLanes <= cells; k += kLanes, at += kLanes) {
    const Vec value = load(row + k);
    const IntVec better = (value > best) & (value <= kLargest);
    best = better ? value : best;
    index = better ? at : index;
  }
  float most = -kInfinity;
  std::int32_t found = -1;
  for (int lane = 0; lane < kLanes; ++lane) {
    if (best[lane] > most) {
      most = best[lane];
      found = index[lane];
    }
  }
  for (; k < cells; ++k) {
    if (row[k] > most && row[k] <= kLargest) {
      most = row[k];
      found = static_cast<std::int32_t>(k);
    }
  }
  return found;
}

inline void run_dense_match(const DenseMatchCall& call) {
#pragma omp parallel num_threads(call.threads)
  {
    const std::int64_t cells = call.y.cells * call.x.cells;
#pragma omp for schedule(static)
    for (std::int64_t row = 0; row < call.rows; ++row) call.row_best[row] = best_cell(call.table + row * cells, cells);
    Matcher matcher(call, call.scratch + thread_index() * call.layout.end);
#pragma omp for schedule(dynamic, 4)
    for (std::int64_t group = 0; group < call.groups; ++group) {
      if (!stopped(call.stop)) matcher.match(group);
    }
  }
}

}  // namespace

template <>
const DenseMatchKernel Compiled<DenseMatchKernel, kIsa>::kernel = {run_dense_match};

}  // namespace lift_fast
