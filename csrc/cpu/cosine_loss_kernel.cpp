#include "cosine_loss.hpp"
#include "simd/simd.hpp"
#include "threads.hpp"

namespace lift_fast {
namespace {

// torch.nn.CosineEmbeddingLoss adds it to both squared norms, as a float32.
constexpr double kEpsilon = 1e-12f;

// The three element types: widened to float32 on the way in, rounded to nearest even on the way out.
struct Float32 {
  using Raw = float;
  static float widen(Raw value) { return value; }
  static Raw narrow(float value) { return value; }
};

struct Bfloat16 {
  using Raw = std::uint16_t;
  static float widen(Raw value) { return as_float(static_cast<std::uint32_t>(value) << 16); }
  static Raw narrow(float value) {
    const std::uint32_t bits = as_bits(value);
    const std::uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    const std::uint32_t quiet = (bits >> 16) | 0x40u;
    return static_cast<Raw>((bits & 0x7fffffffu) > 0x7f800000u ? quiet : rounded);
  }
};

struct Float16 {
  using Raw = std::uint16_t;
#if defined(__F16C__)
  static float widen(Raw value) { return _cvtsh_ss(value); }
  static Raw narrow(float value) { return _cvtss_sh(value, _MM_FROUND_TO_NEAREST_INT); }
#else
  static float widen(Raw value) {
    const std::uint32_t sign = static_cast<std::uint32_t>(value & 0x8000u) << 16, rest = value & 0x7fffu;
    if (rest >= 0x7c00u) return as_float(sign | 0x7f800000u | ((rest & 0x3ffu) << 13));
    // Subnormal or not: a product shifts the exponent exactly.
    return as_float(sign | (rest << 13)) * 5.192296858534828e33f;
  }
  static Raw narrow(float value) {
    const std::uint32_t bits = as_bits(value), sign = (bits >> 16) & 0x8000u, rest = bits & 0x7fffffffu;
    if (rest > 0x7f800000u) return static_cast<Raw>(sign | 0x7e00u | ((rest >> 13) & 0x3ffu));
    // From 65520 on, infinity is the nearest.
    if (rest >= 0x477ff000u) return static_cast<Raw>(sign | 0x7c00u);
    // Subnormal: adding 0.5 leaves the digits that matter at the end of the significand, rounded to nearest even.
    if (rest < 0x38800000u) return static_cast<Raw>(sign | (as_bits(as_float(rest) + 0.5f) - 0x3f000000u));
    return static_cast<Raw>(sign | ((rest - 0x38000000u + 0xfffu + ((rest >> 13) & 1u)) >> 13));
  }
#endif
};

// The gradient of one position: gradient = toward * target + along * prediction.
struct Factors {
  float toward, along;
};

// In float64, because products of squared norms leave the range of float32.
template <class Number>
inline Factors factors(Number product, Number own, Number other, double weight, float* loss,
                       double exact[2] = nullptr) {
  const double own_square = static_cast<double>(own) + kEpsilon, other_square = static_cast<double>(other) + kEpsilon;
  const double length = __builtin_sqrt(own_square) * __builtin_sqrt(other_square);
  const double cosine = static_cast<double>(product) / length;
  *loss = static_cast<float>(1.0 - cosine);
  const double toward = -weight / length, along = weight * cosine / own_square;
  if (exact != nullptr) {
    exact[0] = toward;
    exact[1] = along;
  }
  return {static_cast<float>(toward), static_cast<float>(along)};
}

// Whether sums or factors of these squared norms may leave the range of float32; true for NaN.
constexpr float kModerate = 1e28f;
inline bool moderate(float own, float other) { return own <= kModerate && other <= kModerate; }

inline double weight_of(const CosineLossCall& call, std::int64_t position) {
  return call.upstream == nullptr ? call.weight : static_cast<double>(call.weight) * call.upstream[position];
}

// One position with numbers of any size, all in float64.
template <class Type>
__attribute__((noinline)) void position_in_float64(const CosineLossCall& call, std::int64_t o, std::int64_t i) {
  using Raw = typename Type::Raw;
  const CosineLossLayout &p = call.prediction_layout, &t = call.target_layout, &g = call.gradient_layout;
  const Raw* x = static_cast<const Raw*>(call.prediction) + o * p.outer + i * p.inner;
  const Raw* y = static_cast<const Raw*>(call.target) + o * t.outer + i * t.inner;
  double product = 0, own = 0, other = 0;
  for (std::int64_t k = 0; k < call.c; ++k) {
    const double a = Type::widen(x[k * p.channel]), b = Type::widen(y[k * t.channel]);
    product += a * b;
    own += a * a;
    other += b * b;
  }
  const std::int64_t at = o * call.inner + i;
  double exact[2];
  factors(product, own, other, weight_of(call, at), call.loss + at, exact);
  if (call.gradient == nullptr) return;
  Raw* to = static_cast<Raw*>(call.gradient) + o * g.outer + i * g.inner;
  for (std::int64_t k = 0; k < call.c; ++k) {
    const double a = Type::widen(x[k * p.channel]), b = Type::widen(y[k * t.channel]);
    to[k * g.channel] = Type::narrow(static_cast<float>(exact[0] * b + exact[1] * a));
  }
}

// out[i] = x[i] * a[i] + y[i] * b[i] with vectors a and b, or one value of each.
template <bool kScalar>
inline void combine(const float* x, const float* y, const float* a, const float* b, std::int64_t count, float* out,
                    bool stream) {
  std::int64_t i = 0;
  const Vec one_a = Vec{} + *a, one_b = Vec{} + *b;
  // Writes past the caches must be aligned; single elements come before the first aligned one.
  constexpr std::uintptr_t line = sizeof(Vec);
  const std::int64_t lead = stream ? static_cast<std::int64_t>((line - reinterpret_cast<std::uintptr_t>(out) % line) %
                                                               line / sizeof(float))
                                   : 0;
  for (; i < lead && i < count; ++i) out[i] = x[i] * a[kScalar ? 0 : i] + y[i] * b[kScalar ? 0 : i];
  if (stream) {
    for (; i + kLanes <= count; i += kLanes) {
      Isa::stream(out + i,
                  load(x + i) * (kScalar ? one_a : load(a + i)) + load(y + i) * (kScalar ? one_b : load(b + i)));
    }
  }
  for (; i + kLanes <= count; i += kLanes) {
    store(out + i, load(x + i) * (kScalar ? one_a : load(a + i)) + load(y + i) * (kScalar ? one_b : load(b + i)));
  }
  for (; i < count; ++i) out[i] = x[i] * a[kScalar ? 0 : i] + y[i] * b[kScalar ? 0 : i];
}

// `count` elements a stride apart as floats: in place if they are contiguous floats, else copied to `room`.
template <class Type>
inline const float* gather(const typename Type::Raw* from, std::int64_t stride, std::int64_t count, float* room) {
  if (stride == 1) {
    for (std::int64_t i = 0; i < count; ++i) room[i] = Type::widen(from[i]);
  } else {
    for (std::int64_t i = 0; i < count; ++i) room[i] = Type::widen(from[i * stride]);
  }
  return room;
}
template <>
inline const float* gather<Float32>(const float* from, std::int64_t stride, std::int64_t count, float* room) {
  if (stride == 1) return from;
  for (std::int64_t i = 0; i < count; ++i) room[i] = from[i * stride];
  return room;
}

template <class Type>
inline void scatter(const float* from, typename Type::Raw* to, std::int64_t stride, std::int64_t count) {
  if (stride == 1) {
    for (std::int64_t i = 0; i < count; ++i) to[i] = Type::narrow(from[i]);
  } else {
    for (std::int64_t i = 0; i < count; ++i) to[i * stride] = Type::narrow(from[i]);
  }
}

// A gradient that can be written in place is computed there.
template <class Type>
inline float* in_place(typename Type::Raw*, std::int64_t) {
  return nullptr;
}
template <>
inline float* in_place<Float32>(float* to, std::int64_t stride) {
  return stride == 1 ? to : nullptr;
}

// One position whose channels lie side by side. `room` holds 3 c floats.
template <class Type>
inline void row(const CosineLossCall& call, const CosineLossWork& work, std::int64_t o, std::int64_t i, float* room) {
  using Raw = typename Type::Raw;
  const CosineLossLayout &p = call.prediction_layout, &t = call.target_layout, &g = call.gradient_layout;
  const float* x = gather<Type>(static_cast<const Raw*>(call.prediction) + o * p.outer + i * p.inner, p.channel, call.c,
                                room);
  const float* y = gather<Type>(static_cast<const Raw*>(call.target) + o * t.outer + i * t.inner, t.channel, call.c,
                                room + call.c);
  Vec products[2] = {}, own[2] = {}, other[2] = {};
  std::int64_t k = 0;
  for (; k + 2 * kLanes <= call.c; k += 2 * kLanes) {
    for (int u = 0; u < 2; ++u) {
      const Vec a = load(x + k + u * kLanes), b = load(y + k + u * kLanes);
      products[u] += a * b;
      own[u] += a * a;
      other[u] += b * b;
    }
  }
  products[0] += products[1];
  own[0] += own[1];
  other[0] += other[1];
  float product = 0, own_square = 0, other_square = 0;
  for (int lane = 0; lane < kLanes; ++lane) {
    product += products[0][lane];
    own_square += own[0][lane];
    other_square += other[0][lane];
  }
  for (; k < call.c; ++k) {
    product += x[k] * y[k];
    own_square += x[k] * x[k];
    other_square += y[k] * y[k];
  }
  if (!moderate(own_square, other_square)) return position_in_float64<Type>(call, o, i);
  const std::int64_t at = o * call.inner + i;
  const Factors f = factors(product, own_square, other_square, weight_of(call, at), call.loss + at);
  if (call.gradient == nullptr) return;
  Raw* to = static_cast<Raw*>(call.gradient) + o * g.outer + i * g.inner;
  float* direct = in_place<Type>(to, g.channel);
  float* out = direct != nullptr ? direct : room + 2 * call.c;
  combine<true>(y, x, &f.toward, &f.along, call.c, out, work.stream && direct != nullptr);
  if (direct == nullptr) scatter<Type>(out, to, g.channel, call.c);
}

// Channels whose products form one chain of additions.
constexpr std::int64_t kChain = 32;

// The products of one channel, set or added.
template <bool kFirst>
inline void products_of(const float* x, const float* y, std::int64_t count, float* product, float* own, float* other) {
  std::int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    const Vec a = load(x + i), b = load(y + i);
    store(product + i, kFirst ? a * b : load(product + i) + a * b);
    store(own + i, kFirst ? a * a : load(own + i) + a * a);
    store(other + i, kFirst ? b * b : load(other + i) + b * b);
  }
  for (; i < count; ++i) {
    product[i] = kFirst ? x[i] * y[i] : product[i] + x[i] * y[i];
    own[i] = kFirst ? x[i] * x[i] : own[i] + x[i] * x[i];
    other[i] = kFirst ? y[i] * y[i] : other[i] + y[i] * y[i];
  }
}

inline void add(const float* part, std::int64_t count, float* sum) {
  std::int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) store(sum + i, load(sum + i) + load(part + i));
  for (; i < count; ++i) sum[i] += part[i];
}

// Positions [first, first + count) of one outer index, channel by channel: once for the sums, once for the gradient
// while the tile is still in the cache. `room` holds 12 rows of work.positions floats.
template <class Type>
inline void tile(const CosineLossCall& call, const CosineLossWork& work, std::int64_t o, std::int64_t first,
                 std::int64_t count, float* room) {
  using Raw = typename Type::Raw;
  const CosineLossLayout &p = call.prediction_layout, &t = call.target_layout, &g = call.gradient_layout;
  const Raw* from_x = static_cast<const Raw*>(call.prediction) + o * p.outer + first * p.inner;
  const Raw* from_y = static_cast<const Raw*>(call.target) + o * t.outer + first * t.inner;
  const std::int64_t step = work.positions;
  float *product = room, *own = room + step, *other = room + 2 * step, *out = room + 3 * step;
  float *toward = room + 4 * step, *along = room + 5 * step, *loss = room + 6 * step;
  float *room_x = room + 7 * step, *room_y = room + 8 * step;
  float* const parts[3] = {room + 9 * step, room + 10 * step, room + 11 * step};
  for (std::int64_t i = 0; i < count; ++i) product[i] = own[i] = other[i] = 0;
  // Sums of sums: one long chain of additions would round ten times as far.
  for (std::int64_t begin = 0; begin < call.c; begin += kChain) {
    const std::int64_t end = call.c - begin < kChain ? call.c : begin + kChain;
    float *some_product = begin == 0 ? product : parts[0], *some_own = begin == 0 ? own : parts[1];
    float* some_other = begin == 0 ? other : parts[2];
    for (std::int64_t k = begin; k < end; ++k) {
      const float* x = gather<Type>(from_x + k * p.channel, p.inner, count, room_x);
      const float* y = gather<Type>(from_y + k * t.channel, t.inner, count, room_y);
      if (k == begin) {
        products_of<true>(x, y, count, some_product, some_own, some_other);
      } else {
        products_of<false>(x, y, count, some_product, some_own, some_other);
      }
    }
    if (begin == 0) continue;
    add(parts[0], count, product);
    add(parts[1], count, own);
    add(parts[2], count, other);
  }
  bool all_moderate = true;
  for (std::int64_t i = 0; i < count; ++i) {
    const Factors f = factors(product[i], own[i], other[i], weight_of(call, o * call.inner + first + i), loss + i);
    toward[i] = f.toward;
    along[i] = f.along;
    all_moderate &= moderate(own[i], other[i]);
  }
  __builtin_memcpy(call.loss + o * call.inner + first, loss, static_cast<std::size_t>(count) * sizeof(float));
  if (call.gradient != nullptr) {
    Raw* to = static_cast<Raw*>(call.gradient) + o * g.outer + first * g.inner;
    for (std::int64_t k = 0; k < call.c; ++k) {
      const float* x = gather<Type>(from_x + k * p.channel, p.inner, count, room_x);
      const float* y = gather<Type>(from_y + k * t.channel, t.inner, count, room_y);
      float* direct = in_place<Type>(to + k * g.channel, g.inner);
      float* into = direct != nullptr ? direct : out;
      combine<false>(y, x, toward, along, count, into, work.stream && direct != nullptr);
      if (direct == nullptr) scatter<Type>(out, to + k * g.channel, g.inner, count);
    }
  }
  if (all_moderate) return;
  // Writes past the caches must arrive before later writes to the same memory.
  if (work.stream) Isa::fence();
  for (std::int64_t i = 0; i < count; ++i) {
    if (!moderate(own[i], other[i])) position_in_float64<Type>(call, o, first + i);
  }
}

template <class Type>
inline void run_type(const CosineLossCall& call, const CosineLossWork& work) {
  const bool rows = call.prediction_layout.channel == 1 && call.target_layout.channel == 1;
  const std::int64_t step = rows ? 1 : work.positions;
  const std::int64_t tiles = (call.inner + step - 1) / step, jobs = call.outer * tiles;
#pragma omp parallel num_threads(call.threads)
  {
    float* room = work.scratch + thread_index() * work.scratch_words;
#pragma omp for schedule(static)
    for (std::int64_t job = 0; job < jobs; ++job) {
      const std::int64_t o = job / tiles, first = job % tiles * step;
      if (rows) {
        row<Type>(call, work, o, first, room);
      } else {
        tile<Type>(call, work, o, first, call.inner - first < step ? call.inner - first : step, room);
      }
    }
    if (work.stream) Isa::fence();
  }
}

inline void run_cosine_loss(const CosineLossCall& call, const CosineLossWork& work) {
  if (call.type == CosineLossType::float32) return run_type<Float32>(call, work);
  if (call.type == CosineLossType::bfloat16) return run_type<Bfloat16>(call, work);
  run_type<Float16>(call, work);
}

}  // namespace

template <>
const CosineLossKernel Compiled<CosineLossKernel, kIsa>::kernel = {run_cosine_loss};

}  // namespace lift_fast
