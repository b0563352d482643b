// A Vision Transformer's blocks: rows of tokens stay in a thread's L2 cache from one attention to the next.
#include "gemm.hpp"
#include "scratch.hpp"
#include "simd/simd.hpp"
#include "threads.hpp"
#include "vit.hpp"

namespace lift_fast {
namespace {

// Of an item's MLP: half of the L2 cache of processors with these vectors.
constexpr std::int64_t kHiddenWords = by_lanes(64, 64, 128) * 1024;
constexpr std::int64_t kMostRows = 8 * kRows;
constexpr std::int64_t kKeyBlocks = 1024 / kBlock;  // of a chunk of keys
constexpr std::int64_t kGroupWords = std::int64_t{12} << 20;

// 2^x for x <= 0, to 8e-8 (8e-5 where the result becomes bfloat16); NaN is kept.
inline Vec power_of_two(Vec x) {
  x = Isa::larger(splat(-126.f), x);
  const Vec whole = Isa::nearest(x), f = x - whole;
  Vec p;
  if constexpr (kPairs) {
    p = splat(0.05517154559493065f);
    p = Isa::multiply_add(p, f, splat(0.2426111102104187f));
    p = Isa::multiply_add(p, f, splat(0.6932610273361206f));
    p = Isa::multiply_add(p, f, splat(0.9999280571937561f));
  } else {
    p = splat(0.0013276457320898771f);
    p = Isa::multiply_add(p, f, splat(0.009675540961325169f));
    p = Isa::multiply_add(p, f, splat(0.05550713464617729f));
    p = Isa::multiply_add(p, f, splat(0.24022120237350464f));
    p = Isa::multiply_add(p, f, splat(0.6931469440460205f));
    p = Isa::multiply_add(p, f, splat(1.0000001192092896f));
  }
  return Isa::scale(p, whole);
}

// x (1 + erf(x / sqrt 2)) / 2 with a rational erf, to 2e-7 |x|.
inline Vec gelu(Vec x) {
  const Vec limit = splat(5.5437174f);
  Vec c = x > limit ? limit : x;
  c = c < -limit ? -limit : c;
  const Vec t = c * c;
  Vec p = splat(4.4963734e-08f);
  p = Isa::multiply_add(p, t, splat(1.2704507e-05f));
  p = Isa::multiply_add(p, t, splat(0.00034187545f));
  p = Isa::multiply_add(p, t, splat(0.009379613f));
  p = Isa::multiply_add(p, t, splat(0.06814863f));
  p = Isa::multiply_add(p, t, splat(0.79788446f));
  Vec q = splat(1.1897222e-06f);
  q = Isa::multiply_add(q, t, splat(7.42505e-05f));
  q = Isa::multiply_add(q, t, splat(0.001896425f));
  q = Isa::multiply_add(q, t, splat(0.028770063f));
  q = Isa::multiply_add(q, t, splat(0.2520775f));
  q = Isa::multiply_add(q, t, splat(1.f));
  const Vec half = splat(.5f) * x;
  const Vec out = Isa::multiply_add(half, c * p / q, half);
  return x < -limit ? x * Vec{} : out;
}

constexpr int kSums = kVitUnit / kLanes;
inline float sum_of(const Vec (&parts)[kSums]) {
  Vec all = parts[0];
  for (int i = 1; i < kSums; ++i) all += parts[i];
  return Isa::sum(all);
}

inline void store_rows(float* to, const float* from, std::int64_t count) {
  __builtin_memcpy(to, from, count * sizeof(float));
}

template <class T>
class Transformer {
 public:
  static void run(const VitCall& call) {
    Transformer transformer(call);
    transformer.execute();
  }

 private:
  explicit Transformer(const VitCall& call)
      : call_(call),
        n_(call.sizes),
        width_(n_.width),
        dim_(vit_padded_dim(n_)),
        inner_(n_.heads * dim_),
        patch_words_(call.x ? 0 : ceil_div(3 * call.images.patch * call.images.patch, kBlock) * kBlock) {
    for (int rows = 0; rows <= kRows; ++rows) kernels_[rows] = MicroTable<kRows>::get(rows);
    const std::int64_t hidden_words = n_.hidden / kBlock * kWords;
    std::int64_t most = kHiddenWords / hidden_words / kRows * kRows;
    most = larger<std::int64_t>(kRows, smaller(most, kMostRows));
    key_panels_ = ceil_div(call.tokens, kPanel);
    key_blocks_ = ceil_div(call.tokens, kBlock);

    image_words_ = call.tokens * (width_ + inner_ / kBlock * kWords) +
                   2 * n_.heads * (key_panels_ * kPanel * dim_ / kBlock * kWords + key_blocks_ * kWords * dim_);
    image_words_ = round_up(image_words_, kPageWords);
    group_ = larger<std::int64_t>(1, smaller(call.batch, kGroupWords / image_words_));
    // An equal number of items for each thread.
    items_ = ceil_div(call.tokens, most);
    const std::int64_t even = ceil_div(items_ * group_, call.threads) * call.threads;
    if (even % group_ == 0) items_ = even / group_;
    items_ = larger<std::int64_t>(1, smaller(items_, ceil_div(call.tokens, kRows)));
    workers_ = static_cast<int>(smaller<std::int64_t>(call.threads, items_ * group_));
    rows_ = 0;
    for (std::int64_t item = 0; item < items_; ++item) rows_ = larger(rows_, row(item + 1) - row(item));

    const std::int64_t chunk = round_up(smaller(kKeyBlocks, key_blocks_) * kBlock, kPanel);
    const std::int64_t mixed = rows_ * (chunk + dim_ + inner_ / kBlock * kWords) + rows_ * 3 * kLanes;
    const std::int64_t deep = larger(hidden_words, patch_words_ / kBlock * kWords);
    scratch_words_ = rows_ * width_ / kBlock * kWords + larger(mixed, rows_ * deep) + kRows * kPanel + patch_words_;
    scratch_words_ = round_up(scratch_words_ + 8 * kWords, kPageWords);
  }

  static constexpr std::int64_t kPageWords = 1024;

  // First row of an item; even, because bfloat16 values of two neighbouring tokens share a word.
  std::int64_t row(std::int64_t item) const {
    return item == items_ ? call_.tokens : call_.tokens * item / items_ / 2 * 2;
  }

  void execute() {
    const std::int64_t shared = group_ * image_words_;
    shared_ = static_cast<float*>(
        kept_scratch(static_cast<std::size_t>(shared + workers_ * scratch_words_) * sizeof(float)));
    for (std::int64_t first = 0; first < call_.batch; first += group_) {
      first_ = first;
      const std::int64_t images = smaller(group_, call_.batch - first);
#pragma omp parallel num_threads(workers_)
      {
        Item item;
        item.scratch = shared_ + shared + thread_index() * scratch_words_;
        for (std::int64_t layer = -1; layer < call_.depth; ++layer) {
#pragma omp for schedule(dynamic, 1)
          for (std::int64_t i = 0; i < images * items_; ++i) {
            if (stopped(call_.stop)) continue;
            item.image = i / items_;
            item.first = row(i % items_);
            item.rows = row(i % items_ + 1) - item.first;
            item.x = image(item.image) + item.first * width_;
            if (layer < 0) {
              begin(item);
            } else {
              attend(item, layer);
              transform(item, layer);
            }
            if (layer + 1 < call_.depth) {
              project(item, layer + 1);
            } else {
              finish(item);
            }
          }
        }
      }
    }
  }

  // Some rows of one image, and a thread's scratch: A operand | queries' attention or hidden layer | a tile | a patch.
  struct Item {
    std::int64_t image, first, rows;
    float* x;
    float* scratch;
  };

  float* image(std::int64_t i) const { return shared_ + i * image_words_; }
  // Queries of an item: [head][K block][row][word].
  Word* queries(const Item& item) const {
    return image(item.image) + call_.tokens * width_ + item.first * (inner_ / kBlock * kWords);
  }
  std::int64_t key_words() const { return key_panels_ * kPanel * (dim_ / kBlock * kWords); }
  std::int64_t value_words() const { return key_blocks_ * kWords * dim_; }
  // Keys of a head: [panel of tokens][K word of channels][token]. Those of two layers: one is read, one written.
  Word* keys(std::int64_t i, std::int64_t layer, std::int64_t head) const {
    return image(i) + call_.tokens * (width_ + inner_ / kBlock * kWords) +
           ((layer & 1) * n_.heads + head) * (key_words() + value_words());
  }
  // Values of a head: [panel of channels][K word of tokens][channel].
  Word* values(std::int64_t i, std::int64_t layer, std::int64_t head) const {
    return keys(i, layer, head) + key_words();
  }
  Word* operand(const Item& item) const { return item.scratch; }
  float* inner(const Item& item) const { return item.scratch + rows_ * width_ / kBlock * kWords; }
  float* tile(const Item& item) const { return item.scratch + scratch_words_ - kRows * kPanel - patch_words_; }

  // Calls body(panel, row, rows) with tile(item) full for each panel of `a` times the panels at `b`.
  template <class Body>
  void multiply(const Item& item, const Word* a, std::int64_t blocks, const Word* b, std::int64_t panels,
                Body body) const {
    Ranges all;
    all.add(0, blocks);
    float* out = tile(item);
    for (std::int64_t panel = 0; panel < panels; ++panel, b += blocks * kWords * kPanel) {
      for_row_pieces(item.rows, kernels_, [&](std::int64_t first, std::int64_t count, Micro kernel) {
        kernel(a + first * kWords, item.rows * kWords, all, b, out, {});
        body(panel, first, count);
      });
    }
  }

  void begin(const Item& item) const {
    if (call_.x) {
      const T* from = static_cast<const T*>(call_.x) + ((first_ + item.image) * call_.tokens + item.first) * width_;
      for (std::int64_t i = 0; i < item.rows * width_; i += kLanes) store(item.x + i, load(from + i));
      return;
    }
    Item patches = item;
    const std::int64_t start = larger<std::int64_t>(0, call_.prefix - item.first);
    for (std::int64_t r = 0; r < smaller(start, item.rows); ++r) {
      store_rows(item.x + r * width_, call_.images.prefix + (item.first + r) * width_, width_);
    }
    if (start >= item.rows) return;
    patches.rows -= start;
    patches.x += start * width_;
    embed(patches, item.first + start - call_.prefix);
  }

  // Patches from `first` on to tokens.
  void embed(const Item& item, std::int64_t first) const {
    const VitImages& from = call_.images;
    const std::int64_t p = from.patch, blocks = patch_words_ / kBlock, values = 3 * p * p;
    float* patch = tile(item) + kRows * kPanel;
    Word* a = inner(item);
    for (std::int64_t k = values; k < patch_words_; ++k) patch[k] = 0;
    for (std::int64_t r = 0; r < item.rows; ++r) {
      const std::int64_t y = (first + r) / from.columns * from.stride, x = (first + r) % from.columns * from.stride;
      float* to = patch;
      for (std::int64_t channel = 0; channel < 3; ++channel) {
        const T* line = static_cast<const T*>(from.data) +
                        (((first_ + item.image) * 3 + channel) * from.height + y) * from.width + x;
        for (std::int64_t dy = 0; dy < p; ++dy, line += from.width) {
          for (std::int64_t dx = 0; dx < p; ++dx) *to++ = scalar(line[dx]);
        }
      }
      pack_row(patch, blocks, a + r * kWords, item.rows);
    }
    const float* bias = call_.head + call_.head_layout.bias;
    multiply(item, a, blocks, call_.head + call_.head_layout.matrix, width_ / kPanel,
             [&](std::int64_t panel, std::int64_t row, std::int64_t count) {
               const std::int64_t at = panel * kPanel;
               for (std::int64_t r = 0; r < count; ++r) {
                 const float* position = from.position + (first + row + r) * width_ + at;
                 for (int half = 0; half < kPanel; half += kLanes) {
                   store(item.x + (row + r) * width_ + at + half,
                         (load(tile(item) + r * kPanel + half) + load(bias + at + half)) + load(position + half));
                 }
               }
             });
  }

  static float scalar(float value) { return value; }
  static float scalar(Bfloat16 value) { return as_float(std::uint32_t{value.bits} << 16); }

  static void pack_row(const float* from, std::int64_t blocks, Word* to, std::int64_t rows) {
    for (std::int64_t k = 0; k < blocks; ++k, from += kBlock, to += rows * kWords) {
      Vec v[kVecs];
      for (int i = 0; i < kVecs; ++i) v[i] = load(from + i * kLanes);
      store_block(to, v);
    }
  }

  // LayerNorm of the item's rows as an A operand.
  void normalise(const Item& item, const float* weights, float epsilon, Word* to) const {
    const std::int64_t blocks = width_ / kBlock;
    const float* biases = weights + width_;
    for (std::int64_t r = 0; r < item.rows; ++r) {
      const float* x = item.x + r * width_;
      // Several sums, so that no addition waits for the one before.
      Vec total[kSums] = {};
      for (std::int64_t k = 0; k < width_; k += kSums * kLanes) {
#pragma GCC unroll 8
        for (int i = 0; i < kSums; ++i) total[i] += load(x + k + i * kLanes);
      }
      const float mean = sum_of(total) / static_cast<float>(width_);
      Vec squares[kSums] = {};
      for (std::int64_t k = 0; k < width_; k += kSums * kLanes) {
#pragma GCC unroll 8
        for (int i = 0; i < kSums; ++i) {
          const Vec centred = load(x + k + i * kLanes) - splat(mean);
          squares[i] = Isa::multiply_add(centred, centred, squares[i]);
        }
      }
      const float variance = sum_of(squares) / static_cast<float>(width_);
      const Vec factor = splat(1.f / __builtin_sqrtf(variance + epsilon)), shift = splat(mean);
      for (std::int64_t k = 0; k < blocks; ++k) {
        Vec v[kVecs];
        for (int i = 0; i < kVecs; ++i) {
          const std::int64_t at = k * kBlock + i * kLanes;
          v[i] = Isa::multiply_add((load(x + at) - shift) * factor, load(weights + at), load(biases + at));
        }
        store_block(to + (k * item.rows + r) * kWords, v);
      }
    }
  }

  // Queries, keys and values of block `layer` for the item's rows.
  void project(const Item& item, std::int64_t layer) const {
    const float* packed = call_.blocks[layer];
    const VitBlockLayout& at = call_.layout;
    normalise(item, packed + at.norm1, packed[at.epsilon1], operand(item));
    const std::int64_t section = inner_ / kPanel, of_head = dim_ / kPanel;
    const float* in = tile(item);
    multiply(item, operand(item), width_ / kBlock, packed + at.qkv, 3 * section,
             [&](std::int64_t panel, std::int64_t row, std::int64_t count) {
               const std::int64_t column = panel * kPanel;
               const Vec gain[2] = {load(packed + at.qkv_gain + column), load(packed + at.qkv_gain + column + kLanes)};
               const Vec bias[2] = {load(packed + at.qkv_bias + column), load(packed + at.qkv_bias + column + kLanes)};
               const std::int64_t part = panel / section, head = panel % section / of_head,
                                  channel = panel % of_head * kPanel;
               const auto vec = [&](std::int64_t r, int half) {
                 return Isa::multiply_add(load(in + r * kPanel + half * kLanes), gain[half], bias[half]);
               };
               if (part == 0) {
                 Word* to = queries(item) + (head * dim_ + channel) / kBlock * item.rows * kWords;
                 for (std::int64_t r = 0; r < count; ++r) {
                   for (int half = 0; half < 2; ++half) {
                     const std::int64_t k = channel % kBlock + half * kLanes;
                     store_part(to + (k / kBlock * item.rows + row + r) * kWords, k % kBlock, vec(r, half));
                   }
                 }
               } else if (part == 1) {
                 write_keys(keys(item.image, layer, head), item.first + row, count, channel, vec);
               } else {
                 write_values(values(item.image, layer, head) + channel * key_blocks_ * kWords, item.first + row, count,
                              vec);
               }
             });
    if (item.first + item.rows == call_.tokens) clear_values(item.image, layer);
  }

  template <class Row>
  void write_keys(Word* to, std::int64_t token, std::int64_t count, std::int64_t channel, Row vec) const {
    constexpr int words = kPanel / (kBlock / kWords);
    const std::int64_t depth = dim_ / kBlock * kWords;
    to += channel / (kBlock / kWords) * kPanel;
    for (std::int64_t r = 0; r < count; ++r) {
      alignas(64) Word row[kPanel];
      for (int half = 0; half < 2; ++half) store_part(row, half * kLanes, vec(r, half));
      Word* column = to + (token + r) / kPanel * depth * kPanel + (token + r) % kPanel;
#pragma GCC unroll 8
      for (int k = 0; k < words; ++k) column[k * kPanel] = row[k];
    }
  }

  template <class Row>
  static void write_values(Word* to, std::int64_t token, std::int64_t count, Row vec) {
    for (std::int64_t r = 0; r < count; ++r) {
      for (int half = 0; half < 2; ++half) {
        if constexpr (kPairs) {
          // The even token is written first.
          alignas(64) Word pair[kLanes] = {};
          store_part(pair, 0, vec(r, half));
          HalfVec bits;
          __builtin_memcpy(&bits, pair, sizeof bits);
          BitsVec word = __builtin_convertvector(bits, BitsVec);
          Word* at = to + (token + r) / 2 * kPanel + half * kLanes;
          if ((token + r) % 2 == 1) {
            BitsVec other;
            __builtin_memcpy(&other, at, sizeof other);
            word = word << 16 | (other & 0xffff);
          }
          __builtin_memcpy(at, &word, sizeof word);
        } else {
          store(to + (token + r) * kPanel + half * kLanes, vec(r, half));
        }
      }
    }
  }

  // Tokens after the last one have no weight, but must not be NaN.
  void clear_values(std::int64_t i, std::int64_t layer) const {
    const std::int64_t used = ceil_div(call_.tokens, kBlock / kWords), words = key_blocks_ * kWords;
    for (std::int64_t head = 0; head < n_.heads; ++head) {
      for (std::int64_t panel = 0; panel < dim_ / kPanel; ++panel) {
        Word* to = values(i, layer, head) + (panel * words + used) * kPanel;
        __builtin_memset(to, 0, (words - used) * kPanel * sizeof(Word));
      }
    }
  }

  // Attention of the item's queries, its projection and the sum with x.
  void attend(const Item& item, std::int64_t layer) const {
    const float* packed = call_.blocks[layer];
    const VitBlockLayout& at = call_.layout;
    Word* mixed = inner(item);
    for (std::int64_t head = 0; head < n_.heads; ++head) {
      mix(item, layer, head, mixed + head * dim_ / kBlock * item.rows * kWords,
          mixed + item.rows * (inner_ / kBlock * kWords));
    }
    add_product(item, mixed, inner_ / kBlock, packed + at.proj, packed + at.proj_gain, packed + at.proj_bias);
  }

  // softmax(queries keys^T) values of one head as an A operand, over chunks of keys with a running maximum.
  void mix(const Item& item, std::int64_t layer, std::int64_t head, Word* to, float* scratch) const {
    const std::int64_t rows = item.rows, depth = dim_ / kBlock * kWords;
    float* sums = scratch;  // a vector for each row
    float* tops = sums + rows_ * kLanes;
    float* factors = tops + rows_ * kLanes;
    float* outs = factors + rows_ * kLanes;  // [16 channels][row][channel]
    float* scores = outs + rows_ * dim_;     // [16 keys][row][key], and their powers as an A operand
    const Word* from = queries(item) + head * dim_ / kBlock * rows * kWords;
    Ranges all;
    all.add(0, dim_ / kBlock);
    const Place spread{kWords, kPanel > kWords ? rows * kWords : std::int64_t{kLanes}};
    for (std::int64_t first = 0; first < key_blocks_; first += kKeyBlocks) {
      const std::int64_t blocks = smaller(kKeyBlocks, key_blocks_ - first);
      const std::int64_t valid = smaller(call_.tokens - first * kBlock, blocks * kBlock);
      const Word* key = keys(item.image, layer, head) + first * kBlock * depth;
      for (std::int64_t panel = 0; panel < ceil_div(valid, kPanel); ++panel, key += depth * kPanel) {
        const std::int64_t column = panel * kPanel;
        float* out = scores + column / kWords * rows * kWords + column % kWords;
        for_row_pieces(rows, kernels_, [&](std::int64_t row, std::int64_t, Micro kernel) {
          kernel(from + row * kWords, rows * kWords, all, key, out + row * kWords, spread);
        });
      }
      raise_scores(scores, rows, blocks, valid, first == 0, sums, tops, factors);

      Ranges chunk;
      chunk.add(0, blocks);
      for (std::int64_t channel = 0; channel < dim_; channel += kPanel) {
        const Word* value = values(item.image, layer, head) + (channel * key_blocks_ + first * kPanel) * kWords;
        float* room = tile(item);
        for_row_pieces(rows, kernels_, [&](std::int64_t row, std::int64_t count, Micro kernel) {
          kernel(scores + row * kWords, rows * kWords, chunk, value, room, {});
          for (std::int64_t r = 0; r < count; ++r) {
            for (int half = 0; half < kPanel; half += kLanes) {
              const std::int64_t k = channel + half;
              float* out = outs + (k / kWords * rows + row + r) * kWords + k % kWords;
              const Vec added = load(room + r * kPanel + half);
              const float factor = factors[(row + r) * kLanes];
              store(out, first == 0 ? added : Isa::multiply_add(load(out), splat(factor), added));
            }
          }
        });
      }
    }
    for (std::int64_t r = 0; r < rows; ++r) {
      const Vec inverse = splat(1.f / Isa::sum(load(sums + r * kLanes)));
      for (std::int64_t k = 0; k < dim_; k += kLanes) {
        store_part(to + (k / kBlock * rows + r) * kWords, k % kBlock,
                   load(outs + (k / kWords * rows + r) * kWords + k % kWords) * inverse);
      }
    }
  }

  // Scores in units of log 2 to powers of two below the running maximum, in place, with the factor of what was summed
  // before.
  void raise_scores(float* scores, std::int64_t rows, std::int64_t blocks, std::int64_t valid, bool fresh, float* sums,
                    float* tops, float* factors) const {
    const std::int64_t lines = ceil_div(valid, kWords), last = valid - (lines - 1) * kWords;
    const Vec lowest = splat(-kInfinity);
    // Columns after the last key, in its line.
    for (std::int64_t r = 0; r < rows && last < kWords; ++r) {
      float* line = scores + ((lines - 1) * rows + r) * kWords;
      for (std::int64_t k = last; k < kWords; ++k) line[k] = -kInfinity;
    }
    for (std::int64_t r = 0; r < rows; ++r) store(factors + r * kLanes, lowest);
    for (std::int64_t line = 0; line < lines; ++line) {
      for (std::int64_t r = 0; r < rows; ++r) {
        Vec top = load(factors + r * kLanes);
        for (int k = 0; k < kWords; k += kLanes) {
          const Vec v = load(scores + (line * rows + r) * kWords + k);
          // Passes over NaN, which the power keeps.
          top = Isa::larger(v, top);
        }
        store(factors + r * kLanes, top);
      }
    }
    for (std::int64_t r = 0; r < rows; ++r) {
      float top = fresh ? -kInfinity : tops[r * kLanes];
      for (int k = 0; k < kLanes; ++k) top = larger(top, factors[r * kLanes + k]);
      if (fresh) {
        store(sums + r * kLanes, Vec{});
      } else {
        const Vec factor = power_of_two(splat(tops[r * kLanes]) - splat(top));
        store(factors + r * kLanes, factor);
        store(sums + r * kLanes, load(sums + r * kLanes) * factor);
      }
      store(tops + r * kLanes, splat(top));
    }
    constexpr int step = kBlock / kWords;
    for (std::int64_t block = 0; block < blocks; ++block) {
      for (std::int64_t r = 0; r < rows; ++r) {
        const Vec top = load(tops + r * kLanes);
        Vec sum = load(sums + r * kLanes), v[kVecs];
        for (int i = 0; i < kVecs; ++i) {
          const std::int64_t line = block * step + i * kLanes / kWords;
          if (line < lines) {
            v[i] = power_of_two(load(scores + (line * rows + r) * kWords + i * kLanes % kWords) - top);
            sum += v[i];
          } else {
            v[i] = Vec{};
          }
        }
        store(sums + r * kLanes, sum);
        // A block of pairs lies where an earlier line of this row was.
        store_block(scores + (block * rows + r) * kWords, v);
      }
    }
  }

  // The MLP and its sum with x.
  void transform(const Item& item, std::int64_t layer) const {
    const float* packed = call_.blocks[layer];
    const VitBlockLayout& at = call_.layout;
    normalise(item, packed + at.norm2, packed[at.epsilon2], operand(item));
    Word* hidden = inner(item);
    const float* in = tile(item);
    multiply(item, operand(item), width_ / kBlock, packed + at.fc1, n_.hidden / kPanel,
             [&](std::int64_t panel, std::int64_t row, std::int64_t count) {
               for (int half = 0; half < kPanel; half += kLanes) {
                 const std::int64_t k = panel * kPanel + half;
                 const Vec bias = load(packed + at.fc1_bias + k);
                 Word* to = hidden + (k / kBlock * item.rows + row) * kWords;
                 for (std::int64_t r = 0; r < count; ++r) {
                   store_part(to + r * kWords, k % kBlock, gelu(load(in + r * kPanel + half) + bias));
                 }
               }
             });
    add_product(item, hidden, n_.hidden / kBlock, packed + at.fc2, packed + at.fc2_gain, packed + at.fc2_bias);
  }

  void add_product(const Item& item, const Word* a, std::int64_t blocks, const Word* b, const float* gains,
                   const float* biases) const {
    const float* in = tile(item);
    multiply(item, a, blocks, b, width_ / kPanel, [&](std::int64_t panel, std::int64_t row, std::int64_t count) {
      for (int half = 0; half < kPanel; half += kLanes) {
        const std::int64_t at = panel * kPanel + half;
        const Vec gain = load(gains + at), bias = load(biases + at);
        for (std::int64_t r = 0; r < count; ++r) {
          float* x = item.x + (row + r) * width_ + at;
          store(x, load(x) + Isa::multiply_add(load(in + r * kPanel + half), gain, bias));
        }
      }
    });
  }

  // The result's rows.
  void finish(Item item) const {
    const std::int64_t start = larger<std::int64_t>(0, call_.skipped - item.first);
    if (start >= item.rows) return;
    item.first += start;
    item.rows -= start;
    item.x += start * width_;
    const std::int64_t out_width = call_.tail ? call_.tail_width : width_;
    T* y = static_cast<T*>(call_.y) +
           ((first_ + item.image) * (call_.tokens - call_.skipped) + item.first - call_.skipped) * out_width;
    if (!call_.tail) {
      for (std::int64_t i = 0; i < item.rows * width_; i += kLanes) store(y + i, load(item.x + i));
      return;
    }
    const VitLinearLayout& at = call_.tail_layout;
    normalise(item, call_.tail + at.norm, call_.tail[at.epsilon], operand(item));
    const float* in = tile(item);
    multiply(item, operand(item), width_ / kBlock, call_.tail + at.matrix, out_width / kPanel,
             [&](std::int64_t panel, std::int64_t row, std::int64_t count) {
               for (int half = 0; half < kPanel; half += kLanes) {
                 const std::int64_t k = panel * kPanel + half;
                 const Vec bias = load(call_.tail + at.bias + k);
                 for (std::int64_t r = 0; r < count; ++r) {
                   store(y + (row + r) * out_width + k, load(in + r * kPanel + half) + bias);
                 }
               }
             });
  }

  const VitCall& call_;
  const VitSizes& n_;
  const std::int64_t width_;
  const std::int64_t dim_;    // of a head, padded
  const std::int64_t inner_;  // of all heads
  const std::int64_t patch_words_;
  std::int64_t key_panels_, key_blocks_;
  std::int64_t image_words_;     // of one image: tokens, queries, and keys and values of two layers
  std::int64_t group_;           // images taken through all blocks together
  std::int64_t items_, rows_;    // of an image, and the most rows of an item
  std::int64_t scratch_words_;   // of a thread
  int workers_;
  Micro kernels_[kRows + 1];
  float* shared_ = nullptr;
  std::int64_t first_ = 0;
};

inline void run_vit(const VitCall& call) {
  if (call.type == VitType::bfloat16) {
    Transformer<Bfloat16>::run(call);
  } else if constexpr (!kPairs) {
    Transformer<float>::run(call);
  }
}

}  // namespace

template <>
const VitKernel Compiled<VitKernel, kIsa>::kernel = {run_vit};

}  // namespace lift_fast
