// The dense matcher.
#include "dense_match_values.hpp"
#include "threads.hpp"

namespace lift_fast {
namespace {

constexpr std::int64_t kBlock = dense_match_block;
// Rounding may lift a value above its corners: interpolation on both sides, a scale, and the bound's own.
constexpr float kSlack = 32 * __FLT_EPSILON__;

// The index of a point without a match, above every pixel.
constexpr std::int32_t kNone = 0x7fffffff;

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
        shares_(weight_xy_ + kBlock),
        inverse_(shares_ + 3 * kBlock),
        best_(scratch + call.layout.best),
        index_(reinterpret_cast<std::int32_t*>(scratch + call.layout.index)) {
    for (std::int64_t row = 0; row < call.rows; ++row) finite_ &= call.row[row].finite;
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
    if (finite_) {
      bound_cells<true>();
      bound_patches<true>();
    } else {
      bound_cells<false>();
      bound_patches<false>();
    }
    seed(group);
    if (call_.corner_gram != nullptr) {
      gram_ = call_.corner_gram + 10 * group;
      norm_ = __builtin_sqrtf(larger(larger(gram_[0], gram_[2]), larger(gram_[5], gram_[9])));
    }
    for (std::int64_t point = call_.start[group]; point < call_.start[group + 1]; point += kBlock) {
      const std::int64_t rest = call_.start[group + 1] - point;
      match_block(point, rest < kBlock ? rest : kBlock);
    }
  }

 private:
  // The largest similarity of the group's corners to each key cell; NaN if one is not finite.
  template <bool kFinite>
  void bound_cells() {
    std::int64_t k = 0;
    for (; k + kLanes <= cells_; k += kLanes) {
      const auto two = [&](int i) { return larger_or_nan<kFinite>(load(row_[i] + k), load(row_[i + 1] + k)); };
      store(upper_ + k, larger_or_nan<kFinite>(two(0), two(2)));
    }
    for (; k < cells_; ++k) {
      const auto two = [&](int i) { return larger_or_nan<kFinite>(row_[i][k], row_[i + 1][k]); };
      upper_[k] = larger_or_nan<kFinite>(two(0), two(2));
    }
  }

  // The same for each patch, with the scales.
  template <bool kFinite>
  void bound_patches() {
    const DenseMatchAxis &x = call_.x, &y = call_.y;
    const std::int64_t padded = call_.strips_padded;
    for (std::int64_t cell = 0; cell < y.cells; ++cell) {
      const float* upper = upper_ + cell * x.cells;
      float* row = rows_ + cell * padded;
      const auto one = [&](std::int64_t s) { row[s] = larger_or_nan<kFinite>(upper[x.low[s]], upper[x.high[s]]); };
      std::int64_t s = 0;
      for (; s < regular_first_; ++s) one(s);
      for (const float* from = upper + (regular_first_ < x.strips ? x.low[regular_first_] : 0) - regular_first_;
           s + kLanes <= regular_end_; s += kLanes) {
        store(row + s, larger_or_nan<kFinite>(load(from + s), load(from + s + 1)));
      }
      for (; s < x.strips; ++s) one(s);
      for (; s < padded; ++s) row[s] = __builtin_nanf("");
    }
    for (std::int64_t s = 0; s < y.strips; ++s) {
      const float *near = rows_ + y.low[s] * padded, *far = rows_ + y.high[s] * padded;
      float* bounds = bounds_ + s * padded;
      for (std::int64_t i = 0; i < padded; i += kLanes) {
        Vec bound = larger_or_nan<kFinite>(load(near + i), load(far + i));
        if (call_.scale != nullptr) {
          const Vec high = load(call_.scale_high + s * padded + i), low = load(call_.scale_low + s * padded + i);
          bound *= bound > 0 ? high : low;
        }
        store(bounds + i, bound);
      }
    }
    float largest = 0.0f;
    for (const float* row : row_) largest = larger(call_.row[(row - call_.table) / cells_].largest, largest);
    slack_ = kSlack * largest * call_.scale_largest;
  }

  // Patches with good matches of the group's corners, and so of the pixels between them: a high threshold from the
  // start.
  void seed(std::int64_t group) {
    seeds_ = 0;
    for (int i = 0; i < 4; ++i) {
      const std::int32_t cell = call_.row[call_.corners[4 * group + i]].best;
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

  // Where the result of a point lies.
  std::int64_t place(std::int64_t point) const { return call_.order != nullptr ? call_.order[point] : point; }

  void match_block(std::int64_t point, std::int64_t count) {
    count_ = count;
    for (std::int64_t i = 0; i < kBlock; ++i) {
      weight_x_[i] = i < count ? call_.weights[2 * (point + i)] : 0.0f;
      weight_y_[i] = i < count ? call_.weights[2 * (point + i) + 1] : 0.0f;
      weight_xy_[i] = weight_x_[i] * weight_y_[i];
      shares_[i] = 1.0f - weight_x_[i] - weight_y_[i] + weight_xy_[i];
      shares_[kBlock + i] = weight_x_[i] - weight_xy_[i];
      shares_[2 * kBlock + i] = weight_y_[i] - weight_xy_[i];
      if (call_.corner_gram != nullptr) inverse_[i] = i < count ? call_.inverse[point + i] : 1.0f;
    }
    search(point, call_.floor);
    bool missed = false;
    for (std::int64_t i = 0; i < count; ++i) missed |= index_[i] == kNone;
    if (missed && call_.floor != nullptr) search(point, nullptr);
    for (std::int64_t i = 0; i < count; ++i) {
      const std::int64_t to = place(point + i);
      const bool found = index_[i] != kNone;
      call_.similarity[to] = found ? best_[i] : -kInfinity;
      call_.index[to] = found ? index_[i] : -1;
    }
  }

  void search(std::int64_t point, const float* floor) {
    for (std::int64_t i = 0; i < kBlock; ++i) {
      // Lanes beyond the block have a best value that no bound reaches.
      best_[i] = i < count_ ? (floor != nullptr ? floor[place(point + i)] : -kInfinity) : kInfinity;
      index_[i] = kNone;
    }
    improved_ = true;
    for (int k = 0; k < seeds_; ++k) {
      visit(seed_[k] / call_.strips_padded, seed_[k] % call_.strips_padded);
    }
    for (std::int64_t strip_y = 0; strip_y < call_.y.strips; ++strip_y) {
      for (std::int64_t s = 0; s < regular_first_; ++s) visit_one(strip_y, s);
      std::int64_t done = regular_first_;
      while (done + kLanes <= regular_end_) {
        visit_window(strip_y, done, ~0u);
        done += kLanes;
      }
      const std::int64_t last = regular_end_ - kLanes;
      // Once more over some that are done, without them.
      if (done < regular_end_ && last >= regular_first_) {
        visit_window(strip_y, last, ~0u << (done - last));
        done = regular_end_;
      }
      for (; done < call_.x.strips; ++done) visit_one(strip_y, done);
    }
  }

  void visit_one(std::int64_t strip_y, std::int64_t strip_x) {
    // NaN marks patches that take no part.
    if (bounds_[strip_y * call_.strips_padded + strip_x] + slack_ >= worst()) visit(strip_y, strip_x);
  }

  // Consecutive strips between neighbouring cells, those of them that `mask` has.
  void visit_window(std::int64_t strip_y, std::int64_t first, unsigned mask) {
    const Vec bound = load(bounds_ + strip_y * call_.strips_padded + first) + slack_;
    unsigned open = Isa::bits(bound >= splat(worst())) & mask;
    if (open != 0 && call_.corner_gram != nullptr) open &= projects(strip_y, first);
    for (; open != 0; open &= open - 1) {
      visit(strip_y, first + __builtin_ctz(open));
      if (improved_) open &= Isa::bits(bound >= splat(worst())) | (open & -open);
    }
  }

  // The patches of a window onto whose span (PatchSpan) some descriptor of the group may project for longer than
  // `cosine_` times its own length. The square of both is a quadratic form of the weights of the four query cells, which
  // are positive and sum to 1: so their difference is at most the largest entry of the difference of the forms.
  unsigned projects(std::int64_t strip_y, std::int64_t first) {
    const DenseMatchAxis &x = call_.x, &y = call_.y;
    if (!(cosine_ > 0.0f)) return ~0u;
    const std::int64_t patches = y.strips * call_.strips_padded;
    const float* span = call_.window_spans + strip_y * call_.strips_padded + first;
    const std::int64_t top = y.low[strip_y] * x.cells + x.low[first], low = y.high[strip_y] * x.cells + x.low[first];
    Vec part[4][4], size[4] = {};
#pragma GCC unroll 4
    for (int q = 0; q < 4; ++q) {
      const Vec near = load(row_[q] + top), right = load(row_[q] + top + 1) - near;
      const Vec down = load(row_[q] + low), below = load(row_[q] + low + 1) - down;
      const Vec value[4] = {near, right, down - near, below - right};
      size[0] = larger(larger(near, -near), size[0]);
      size[1] = larger(larger(right, -right), size[1]);
      size[2] = larger(larger(value[2], -value[2]), size[2]);
      size[3] = larger(larger(right, -right) + larger(below, -below), size[3]);
#pragma GCC unroll 4
      for (int i = 0, at = 0; i < 4; ++i) {
        part[q][i] = load(span + at++ * patches) * value[0];
#pragma GCC unroll 4
        for (int k = 1; k <= i; ++k) part[q][i] = Isa::multiply_add(load(span + at++ * patches), value[k], part[q][i]);
      }
    }
    Vec lost{};
#pragma GCC unroll 4
    for (int k = 0; k < 4; ++k) lost = Isa::multiply_add(load(span + (10 + k) * patches), size[k], lost);
    const auto product = [&](int p, int q) {
      Vec sum = part[p][0] * part[q][0];
      for (int i = 1; i < 4; ++i) sum = Isa::multiply_add(part[p][i], part[q][i], sum);
      return sum;
    };
    Vec longest{}, excess = splat(-kInfinity);
#pragma GCC unroll 4
    for (int p = 0, at = 0; p < 4; ++p) {
#pragma GCC unroll 4
      for (int q = 0; q <= p; ++q, ++at) {
        const Vec square = product(p, q);
        if (p == q) longest = larger(square, longest);
        excess = larger(square - splat(least_square_[at]), excess);
      }
    }
    // What rounding may hide in a product of two parts: 2 a b <= a (b b / c + c) for any c.
    const Vec room = lost * (lost + longest * (1 / norm_) + norm_) + kSlack * (longest + norm_ * norm_);
    // Written so that NaN stays open.
    return ~Isa::bits(excess + room < 0.0f);
  }

  // The smallest similarity of the block's matches so far.
  float worst() {
    if (!improved_) return worst_;
    improved_ = false;
    worst_ = worst_best();
    if (call_.corner_gram == nullptr) return worst_;
    Vec least = splat(kInfinity);
    for (std::int64_t i = 0; i < count_; i += kLanes) {
      const Vec cosine = (load(best_ + i) - slack_) * load(inverse_ + i);
      least = cosine < least ? cosine : least;
    }
    cosine_ = lane_min(least);
    for (int i = 0; i < 10; ++i) least_square_[i] = cosine_ * cosine_ * gram_[i];
    return worst_;
  }

  float worst_best() const {
    Vec least = load(best_);
    for (std::int64_t i = kLanes; i < kBlock; i += kLanes) {
      const Vec other = load(best_ + i);
      least = least < other ? least : other;
    }
    return lane_min(least);
  }

  // A number for each of the group's query cells, and between them for a vector of points. Rounds otherwise than
  // Bilinear, so it serves bounds only.
  Vec between(const Quad& cells, std::int64_t point) const {
    Vec sum = splat(cells[0]) * load(shares_ + point);
    sum = Isa::multiply_add(splat(cells[1]), load(shares_ + kBlock + point), sum);
    sum = Isa::multiply_add(splat(cells[2]), load(shares_ + 2 * kBlock + point), sum);
    return Isa::multiply_add(splat(cells[3]), load(weight_xy_ + point), sum);
  }

  // Looks for better matches of the block's points in one patch. Three bounds, each dearer than the one before it.
  void visit(std::int64_t strip_y, std::int64_t strip_x) {
    const DenseMatchAxis &x = call_.x, &y = call_.y;
    const std::int64_t patch = strip_y * call_.strips_padded + strip_x;
    const std::int64_t top = y.low[strip_y] * x.cells, low = y.high[strip_y] * x.cells;
    const std::int64_t left = x.low[strip_x], right = x.high[strip_x];
    const std::int64_t cell[4] = {top + left, top + right, low + left, low + right};
    Quad corner[4];
    for (int k = 0; k < 4; ++k)
      corner[k] = Quad{row_[0][cell[k]], row_[1][cell[k]], row_[2][cell[k]], row_[3][cell[k]]};
    const bool scaled = call_.scale != nullptr;
    const float high = scaled ? call_.scale_high[patch] : 1.0f, least = scaled ? call_.scale_low[patch] : 1.0f;
    Quad most = larger(larger(corner[0], corner[1]), larger(corner[2], corner[3]));
    if (scaled) most *= most > 0 ? Quad{} + high : Quad{} + least;
    Projection projection;
    bool projected = false;
    for (std::int64_t i = 0; i < count_; i += kLanes) {
      const Vec threshold = load(best_ + i) - slack_;
      if (!Isa::any(between(most, i) >= threshold)) continue;
      if (scaled) {
        if (!projected) projection = Projection(call_.spans + patch * span_words, corner);
        projected = true;
        if (!Isa::any(reaches(projection, i, threshold))) continue;
      }
      visit_vector(i, strip_y, strip_x, corner);
    }
  }

  // The projections of the group's query cells onto the span of a patch's corners (PatchSpan).
  struct Projection {
    Quad part[4];
    float rounding;
    Projection() {}
    Projection(const float* span, const Quad (&corner)[4]) {
      const Quad right = corner[1] - corner[0], below = corner[3] - corner[2];
      const Quad value[4] = {corner[0], right, corner[2] - corner[0], below - right};
      const Quad size[4] = {magnitude(corner[0]), magnitude(right), magnitude(value[2]),
                            magnitude(right) + magnitude(below)};
      Quad length{}, lost{};
      for (int i = 0; i < 4; ++i) {
        part[i] = Quad{};
        for (int k = 0; k <= i; ++k) part[i] += *span++ * value[k];
        length += part[i] * part[i];
      }
      for (int i = 0; i < 4; ++i) lost += *span++ * size[i];
      rounding = quad_max(lost) + kSlack * __builtin_sqrtf(quad_max(length));
    }
  };

  IntVec reaches(const Projection& projection, std::int64_t point, Vec threshold) const {
    Vec length{};
    for (const Quad& cells : projection.part) {
      const Vec part = between(cells, point);
      length = Isa::multiply_add(part, part, length);
    }
    threshold -= projection.rounding;
    // Written so that NaN reaches.
    return ~((threshold > 0.0f) & (length * (1 + kSlack) < threshold * threshold));
  }

  // Compares the patch's pixels for a vector of points.
  void visit_vector(std::int64_t i, std::int64_t strip_y, std::int64_t strip_x, const Quad (&corner)[4]) {
    const std::int64_t patch = strip_y * call_.strips_padded + strip_x;
    const Vec weight_x = load(weight_x_ + i), weight_y = load(weight_y_ + i), weight_xy = load(weight_xy_ + i);
    Vec value[4];
    for (int k = 0; k < 4; ++k) {
      const Bilinear<float> of(corner[k][0], corner[k][1], corner[k][2], corner[k][3]);
      value[k] = Isa::multiply_add(splat(of.right), weight_x, splat(of.near));
      value[k] = Isa::multiply_add(splat(of.down), weight_y, value[k]);
      value[k] = Isa::multiply_add(splat(of.both), weight_xy, value[k]);
    }
    const Bilinear<Vec> patch_values(value[0], value[1], value[2], value[3]);
    if (call_.scale == nullptr) {
      compare_extremes(i, strip_y, strip_x, patch_values);
      return;
    }
    Vec bound = larger(larger(value[0], value[1]), larger(value[2], value[3]));
    bound *= bound > 0 ? splat(call_.scale_high[patch]) : splat(call_.scale_low[patch]);
    unsigned lanes = Isa::bits(bound + slack_ >= load(best_ + i));
    // One point at a time costs less than all up to three.
    const unsigned more = lanes & (lanes - 1), still_more = more & (more - 1);
    if ((still_more & (still_more - 1)) != 0) {
      evaluate_all(i, strip_y, strip_x, patch_values);
      return;
    }
    for (; lanes != 0; lanes &= lanes - 1) {
      const int lane = __builtin_ctz(lanes);
      evaluate(i + lane, strip_y, strip_x, Bilinear<float>(patch_values, lane));
    }
  }

  // Without scales a patch is linear in each direction, so its largest value is at one of its four outermost pixels.
  // Visits these for a vector of points.
  void compare_extremes(std::int64_t point, std::int64_t strip_y, std::int64_t strip_x, const Bilinear<Vec>& patch) {
    const DenseMatchAxis &x = call_.x, &y = call_.y;
    const std::int32_t rows[2] = {y.first[strip_y], y.first[strip_y + 1] - 1};
    const std::int32_t columns[2] = {x.first[strip_x], x.first[strip_x + 1] - 1};
    const Vec before = load(best_ + point);
    Vec best = before;
    IntVec index = load(index_ + point);
    for (const std::int32_t row : rows) {
      const Vec down = splat(y.weight[row]);
      const Vec start = Isa::multiply_add(patch.down, down, patch.near),
                slope = Isa::multiply_add(patch.both, down, patch.right);
      for (const std::int32_t column : columns) {
        const Vec value = Isa::multiply_add(slope, splat(x.weight[column]), start);
        const IntVec pixel = IntVec{} + static_cast<std::int32_t>(row * x.pixels + column);
        // An infinite value takes no part.
        const IntVec better = ((value > best) | ((value == best) & (pixel < index))) & (value <= kLargest) &
                              (value >= -kLargest);
        best = better ? value : best;
        index = better ? pixel : index;
      }
    }
    improved_ |= Isa::any(best > before);
    store(best_ + point, best);
    store(index_ + point, index);
  }

  // All pixels of one patch for a vector of points, each with its scale.
  void evaluate_all(std::int64_t point, std::int64_t strip_y, std::int64_t strip_x, const Bilinear<Vec>& patch) {
    const DenseMatchAxis &x = call_.x, &y = call_.y;
    const std::int64_t first_x = x.first[strip_x], end_x = x.first[strip_x + 1];
    const std::int64_t first_y = y.first[strip_y], end_y = y.first[strip_y + 1];
    Vec most = splat(-kInfinity);
    for (std::int64_t row = first_y; row < end_y; ++row) {
      const ScaledRow values(call_, patch, row);
      // NaN is never larger.
      for (std::int64_t column = first_x; column < end_x; ++column) most = larger(values[column], most);
    }
    const Vec best = load(best_ + point);
    const IntVec index = load(index_ + point);
    if (!Isa::any((most >= best) & (most > -kInfinity))) return;
    // From the last to the first, so that the lowest pixel remains.
    IntVec at = IntVec{} + kNone;
    for (std::int64_t row = end_y - 1; row >= first_y; --row) {
      const ScaledRow values(call_, patch, row);
      for (std::int64_t column = end_x - 1; column >= first_x; --column) {
        at = values[column] == most ? IntVec{} + static_cast<std::int32_t>(row * x.pixels + column) : at;
      }
    }
    const IntVec better = ((most > best) | ((most == best) & (at < index))) & (most <= kLargest);
    improved_ |= Isa::any(better);
    store(best_ + point, better ? most : best);
    store(index_ + point, better ? at : index);
    // Infinite values take no part, but the others of the patch do.
    for (unsigned lanes = Isa::bits(most > kLargest); lanes != 0; lanes &= lanes - 1) {
      const int lane = __builtin_ctz(lanes);
      evaluate(point + lane, strip_y, strip_x, Bilinear<float>(patch, lane));
    }
  }

  // The same for one point.
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
          improved_ = true;
        }
        return;
      }
    }
  }

  const DenseMatchCall& call_;
  const std::int64_t cells_;
  float *upper_, *rows_, *bounds_, *weight_x_, *weight_y_, *weight_xy_, *shares_, *inverse_, *best_;
  std::int32_t* index_;
  std::int64_t regular_first_, regular_end_, count_ = 0;
  const float* row_[4] = {};
  float slack_ = 0.0f;
  bool finite_ = true;
  std::int32_t seed_[4] = {};
  int seeds_ = 0;
  bool improved_ = false;  // since worst() was computed
  float worst_ = 0.0f, cosine_ = 0.0f, norm_ = 0.0f, least_square_[10] = {};
  const float* gram_ = nullptr;
};

inline void run_dense_match(const DenseMatchCall& call) {
#pragma omp parallel num_threads(call.threads)
  {
    const std::int64_t cells = call.y.cells * call.x.cells;
#pragma omp for schedule(static)
    for (std::int64_t row = 0; row < call.rows; ++row) {
      call.row[row] = row_of(call.table + row * cells, call.cell_scale, cells);
    }
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
