// LiFT's decoder: the transforms of minimal filtering around matrix products.
#include "gemm.hpp"
#include "lift_forward.hpp"
#include "scratch.hpp"
#include "simd/simd.hpp"
#include "threads.hpp"

namespace lift_fast {
namespace {

constexpr int kCacheWords = by_lanes(100, 100, 240) * 1024;
constexpr int kConvTile = kPairs ? 2 : 4;
constexpr int kConvSide = kConvTile + 2;
constexpr int kConvPoints = kConvSide * kConvSide;
constexpr int kConvPixels = kConvTile * kConvTile;
constexpr int kPhaseTile = 3;
constexpr int kPhaseSide = kPhaseTile + 1;
constexpr int kPhasePoints = kPhaseSide * kPhaseSide;

// One K block's vectors of a pixel, zero-filled from channel `valid` on.
template <class T>
inline void load_block(const T* p, std::int64_t valid, Vec* v) {
  if (valid >= kBlock) {
    for (int i = 0; i < kVecs; ++i) v[i] = load(p + i * kLanes);
    return;
  }
  T padded[kBlock] = {};
  for (std::int64_t i = 0; i < valid; ++i) padded[i] = p[i];
  for (int i = 0; i < kVecs; ++i) v[i] = load(padded + i * kLanes);
}

template <class T>
class Decoder {
 public:
  static void run(const LiftForwardCall& call) {
    Decoder decoder(call);
    decoder.execute();
  }

 private:
  explicit Decoder(const LiftForwardCall& call) : call_(call), layout_(call.layout), n_(call.channels) {
    height_ = 2 * call.height;
    width_ = 2 * call.width;
    phase_rows_ = call.height / kPhaseTile + 1;
    phase_columns_ = call.width / kPhaseTile + 1;
    conv_rows_ = ceil_div(height_, kConvTile);
    conv_columns_ = ceil_div(width_, kConvTile);
    u_height_ = conv_rows_ * kConvTile + 2;
    u_width_ = conv_columns_ * kConvTile + 2;
    u_image_ = u_height_ * u_width_ * layout_.hidden_width;
    group_ = larger<std::int64_t>(
        1, smaller<std::int64_t>(call.batch, kGroupBytes / (u_image_ * std::int64_t{sizeof(float)})));
    for (int rows = 0; rows <= kRows; ++rows) kernels_[rows] = MicroTable<kRows>::get(rows);

    const std::int64_t phase_words = kPhasePoints * (layout_.phase_blocks * kWords + kPanel);
    const std::int64_t conv_words = kConvPoints * (layout_.hidden_blocks * kWords + kPanel) +
                                    kConvPixels * layout_.hidden_blocks * kWords;
    const std::int64_t phase_tiles = group_ * phase_rows_ * phase_columns_;
    const std::int64_t phase_blocks = ceil_div(phase_tiles, most_tiles(phase_words));
    if (phase_blocks >= 4 * call_.threads) {
      phase_block_ = even_block(phase_tiles, phase_blocks, call_.threads);
      phase_parts_ = 1;
    } else {
      // Few blocks: threads share their panels. Smaller blocks would stream all weights more often.
      phase_block_ = even_block(phase_tiles, phase_blocks, 1);
      phase_parts_ = call_.threads;
      while (phase_parts_ % 2 == 0 && phase_blocks * (phase_parts_ / 2) % call_.threads == 0) phase_parts_ /= 2;
      phase_parts_ = smaller<std::int64_t>(phase_parts_, 4 * layout_.hidden_panels);
    }
    const std::int64_t conv_tiles = group_ * conv_rows_ * conv_columns_;
    conv_block_ = even_block(conv_tiles, ceil_div(conv_tiles, most_tiles(conv_words)), call_.threads);
    const std::int64_t items = larger<std::int64_t>(ceil_div(phase_tiles, phase_block_) * phase_parts_,
                                                    ceil_div(conv_tiles, conv_block_));
    workers_ = static_cast<int>(smaller<std::int64_t>(call_.threads, items));
    const std::int64_t rows_words = kRows * kPanel;
    scratch_words_ = larger<std::int64_t>(phase_block_ * phase_words, conv_block_ * conv_words + rows_words);
    scratch_words_ = round_up(scratch_words_, kPageWords);
  }

  // As many images are taken together as keep their u within a last-level cache.
  static constexpr std::int64_t kGroupBytes = std::int64_t{24} << 20;
  static constexpr std::int64_t kPageWords = 1024;

  static std::int64_t most_tiles(std::int64_t words) { return larger<std::int64_t>(1, kCacheWords / words); }

  // Tiles per block: as many as the L2 cache holds, with a number of blocks that the threads share evenly.
  static std::int64_t even_block(std::int64_t tiles, std::int64_t blocks, std::int64_t threads) {
    return larger<std::int64_t>(1, ceil_div(tiles, ceil_div(blocks, threads) * threads));
  }

  void execute() {
    const std::int64_t u_words = round_up(group_ * u_image_, kPageWords);
    u_ = static_cast<float*>(
        kept_scratch(static_cast<std::size_t>(u_words + workers_ * scratch_words_) * sizeof(float)));
    scratch_ = u_ + u_words;
    for (std::int64_t first = 0; first < call_.batch; first += group_) {
      first_ = first;
      images_ = smaller<std::int64_t>(group_, call_.batch - first);
      const std::int64_t phase_tiles = images_ * phase_rows_ * phase_columns_;
      const std::int64_t conv_tiles = images_ * conv_rows_ * conv_columns_;
      const std::int64_t phase_items = ceil_div(phase_tiles, phase_block_) * phase_parts_;
      const std::int64_t panels = 4 * layout_.hidden_panels;
      const std::int64_t conv_items = ceil_div(conv_tiles, conv_block_);
#pragma omp parallel num_threads(workers_)
      {
        Word* scratch = scratch_ + thread_index() * scratch_words_;
#pragma omp for schedule(static) nowait
        for (std::int64_t row = 0; row < images_ * u_height_; ++row) clear_frame(row);
#pragma omp for schedule(dynamic, 1)
        for (std::int64_t item = 0; item < phase_items; ++item) {
          const std::int64_t tile = item / phase_parts_ * phase_block_, part = item % phase_parts_;
          phases(tile, smaller<std::int64_t>(phase_block_, phase_tiles - tile), panels * part / phase_parts_,
                 panels * (part + 1) / phase_parts_, scratch);
        }
#pragma omp for schedule(dynamic, 1)
        for (std::int64_t item = 0; item < conv_items; ++item) {
          const std::int64_t tile = item * conv_block_;
          conv_and_out(tile, smaller<std::int64_t>(conv_block_, conv_tiles - tile), scratch);
        }
      }
    }
  }

  void clear_frame(std::int64_t row) {
    float* u = u_ + row * u_width_ * layout_.hidden_width;
    const std::int64_t y = row % u_height_;
    const auto clear = [&](std::int64_t from, std::int64_t to) {
      __builtin_memset(u + from * layout_.hidden_width, 0, (to - from) * layout_.hidden_width * sizeof(float));
    };
    if (y == 0 || y > height_) {
      clear(0, u_width_);
    } else {
      clear(0, 1);
      clear(width_ + 1, u_width_);
    }
  }

  struct Tile {
    std::int64_t image, row, column;
  };
  static Tile locate(std::int64_t tile, std::int64_t rows, std::int64_t columns) {
    return {tile / (rows * columns), tile / columns % rows, tile % columns};
  }

  // Stage 1. In one dimension, the three coarse outputs 3t .. 3t + 2 of phase 0 (fine rows 6t, 6t + 2, 6t + 4) and
  // 3t - 1 .. 3t + 1 of phase 1 (fine rows 6t - 1, 6t + 1, 6t + 3) read the same coarse rows 3t - 1 .. 3t + 2, so one
  // transformed input serves all four phases: 16 products instead of 36 for each phase's 3 x 3 outputs. Sub-pixels of f
  // are channels of the coarse grid. The panels [first_panel, last_panel) run over the phases.
  void phases(std::int64_t first, std::int64_t tiles, std::int64_t first_panel, std::int64_t last_panel,
              Word* scratch) {
    const std::int64_t blocks = layout_.phase_blocks, block_stride = tiles * kWords;
    const std::int64_t point_stride = blocks * block_stride;
    float* products = scratch + kPhasePoints * point_stride;
    for (std::int64_t i = 0; i < tiles; ++i) {
      const Tile tile = locate(first + i, phase_rows_, phase_columns_);
      Word* to = scratch + i * kWords;
      const auto coarse = [&](const void* base, std::int64_t channels) {
        const T* from[kPhasePoints];
        for (int cell = 0; cell < kPhasePoints; ++cell) {
          const std::int64_t y = kPhaseTile * tile.row - 1 + cell / kPhaseSide;
          const std::int64_t x = kPhaseTile * tile.column - 1 + cell % kPhaseSide;
          const bool inside = y >= 0 && y < call_.height && x >= 0 && x < call_.width;
          from[cell] = inside ? static_cast<const T*>(base) +
                                    (((first_ + tile.image) * call_.height + y) * call_.width + x) * channels
                              : nullptr;
        }
        to = phase_inputs(from, channels, to, block_stride, point_stride);
      };
      coarse(call_.x, n_.tokens);
      coarse(call_.g, n_.coarse);
      for (int sub = 0; sub < 4; ++sub) {
        const T* from[kPhasePoints];
        for (int cell = 0; cell < kPhasePoints; ++cell) {
          const std::int64_t y = 2 * (kPhaseTile * tile.row - 1 + cell / kPhaseSide) + sub / 2;
          const std::int64_t x = 2 * (kPhaseTile * tile.column - 1 + cell % kPhaseSide) + sub % 2;
          const bool inside = y >= 0 && y < height_ && x >= 0 && x < width_;
          from[cell] = inside ? static_cast<const T*>(call_.f) +
                                    (((first_ + tile.image) * height_ + y) * width_ + x) * n_.fine
                              : nullptr;
        }
        to = phase_inputs(from, n_.fine, to, block_stride, point_stride);
      }
    }

    const std::int64_t panels = layout_.hidden_panels;
    for (std::int64_t item = first_panel; item < last_panel; ++item) {
      const int a = static_cast<int>(item / panels / 2), b = static_cast<int>(item / panels % 2);
      const float* weights = call_.packed + layout_.phase_at + item * layout_.phase_panel_words;
      for (int point = 0; point < kPhasePoints; ++point) {
        Ranges ranges;
        ranges.add(0, layout_.coarse_side_blocks);
        std::int64_t depth = layout_.coarse_side_blocks;
        for (int sub = 0; sub < 4; ++sub) {
          if (!fine_needed(a, kPhaseSide, point / kPhaseSide, sub / 2) ||
              !fine_needed(b, kPhaseSide, point % kPhaseSide, sub % 2)) {
            continue;
          }
          ranges.add(layout_.coarse_side_blocks + sub * layout_.fine_blocks, layout_.fine_blocks);
          depth += layout_.fine_blocks;
        }
        const Word* inputs = scratch + point * point_stride;
        float* out = products + point * tiles * kPanel;
        for_row_pieces(tiles, kernels_, [&](std::int64_t row, std::int64_t, Micro kernel) {
          kernel(inputs + row * kWords, block_stride, ranges, weights, out + row * kPanel, {});
        });
        weights += depth * kWords * kPanel;
      }
      phase_outputs(first, tiles, a, b, item % panels * kPanel, products);
    }
  }

  Word* phase_inputs(const T* const* from, std::int64_t channels, Word* to, std::int64_t block_stride,
                     std::int64_t point_stride) const {
    for (std::int64_t k = 0; k < channels; k += kBlock, to += block_stride) {
      Vec result[kPhasePoints][kVecs];
      for (int i = 0; i < kPhasePoints; ++i) {
        if (from[i]) {
          load_block(from[i] + k, channels - k, result[i]);
        } else {
          for (int v = 0; v < kVecs; ++v) result[i][v] = Vec{};
        }
      }
      for (int v = 0; v < kVecs; ++v) {
        Vec rows[kPhaseSide][kPhaseSide];
        for (int j = 0; j < kPhaseSide; ++j) {
          Vec d[kPhaseSide], t[kPhaseSide];
          for (int i = 0; i < kPhaseSide; ++i) d[i] = result[i * kPhaseSide + j][v];
          four_points(d, t);
          for (int i = 0; i < kPhaseSide; ++i) rows[i][j] = t[i];
        }
        for (int i = 0; i < kPhaseSide; ++i) {
          Vec t[kPhaseSide];
          four_points(rows[i], t);
          for (int j = 0; j < kPhaseSide; ++j) result[i * kPhaseSide + j][v] = t[j];
        }
      }
      for (int point = 0; point < kPhasePoints; ++point) store_block(to + point * point_stride, result[point]);
    }
    return to;
  }

  void phase_outputs(std::int64_t first, std::int64_t tiles, int a, int b, std::int64_t channel,
                     const float* products) const {
    const float* edge = call_.packed + layout_.edge_at + channel;
    for (std::int64_t i = 0; i < tiles; ++i) {
      const Tile tile = locate(first + i, phase_rows_, phase_columns_);
      const std::int64_t y0 = 2 * kPhaseTile * tile.row - a, x0 = 2 * kPhaseTile * tile.column - b;
      for (int half = 0; half < kPanel; half += kLanes) {
        Vec rows[kPhaseTile][kPhaseSide];
        for (int j = 0; j < kPhaseSide; ++j) {
          Vec m[kPhaseSide], s[kPhaseTile];
          for (int p = 0; p < kPhaseSide; ++p) {
            m[p] = load(products + ((p * kPhaseSide + j) * tiles + i) * kPanel + half);
          }
          phase_output_points(m, s);
          for (int e = 0; e < kPhaseTile; ++e) rows[e][j] = s[e];
        }
        for (int dy = 0; dy < kPhaseTile; ++dy) {
          const std::int64_t y = y0 + 2 * dy;
          if (y < 0 || y >= height_) continue;
          const int row_class = y == 0 ? 0 : y == height_ - 1 ? 2 : 1;
          Vec s[kPhaseTile];
          phase_output_points(rows[dy], s);
          for (int dx = 0; dx < kPhaseTile; ++dx) {
            const std::int64_t x = x0 + 2 * dx;
            if (x < 0 || x >= width_) continue;
            const int place = 3 * row_class + (x == 0 ? 0 : x == width_ - 1 ? 2 : 1);
            store(u_at(tile.image, y, x) + channel + half,
                  relu(s[dx] + load(edge + place * layout_.hidden_width + half)));
          }
        }
      }
    }
  }

  // Fine pixel (y, x) lies one row and one column inside the frame of zeros.
  float* u_at(std::int64_t image, std::int64_t y, std::int64_t x) const {
    return u_ + image * u_image_ + ((y + 1) * u_width_ + x + 1) * layout_.hidden_width;
  }

  // Stage 2: minimal filtering of the 3x3 convolution, then the 1x1 convolution of the same pixels.
  void conv_and_out(std::int64_t first, std::int64_t tiles, Word* scratch) {
    const std::int64_t blocks = layout_.hidden_blocks, block_stride = tiles * kWords;
    const std::int64_t point_stride = blocks * block_stride;
    Word* v = scratch + kConvPoints * point_stride;
    const std::int64_t pixel_stride = tiles * kConvPixels * kWords;
    float* products = v + blocks * pixel_stride;
    for (std::int64_t i = 0; i < tiles; ++i) {
      const Tile tile = locate(first + i, conv_rows_, conv_columns_);
      const float* corner = u_at(tile.image, tile.row * kConvTile - 1, tile.column * kConvTile - 1);
      for (std::int64_t k = 0; k < blocks; ++k) {
        conv_inputs(corner + k * kBlock, scratch + k * block_stride + i * kWords, point_stride);
      }
    }

    Ranges all;
    all.add(0, blocks);
    for (std::int64_t panel = 0; panel < layout_.hidden_panels; ++panel) {
      const float* weights = call_.packed + layout_.conv_at + panel * layout_.conv_panel_words;
      for (int point = 0; point < kConvPoints; ++point) {
        const Word* inputs = scratch + point * point_stride;
        float* out = products + point * tiles * kPanel;
        for_row_pieces(tiles, kernels_, [&](std::int64_t row, std::int64_t, Micro kernel) {
          kernel(inputs + row * kWords, block_stride, all, weights, out + row * kPanel, {});
        });
        weights += blocks * kWords * kPanel;
      }
      const float* bias = call_.packed + layout_.conv_bias_at + panel * kPanel;
      for (std::int64_t i = 0; i < tiles; ++i) {
        for (int half = 0; half < kPanel; half += kLanes) {
          const std::int64_t channel = panel * kPanel + half;
          Word* to = v + channel / kBlock * pixel_stride + i * kConvPixels * kWords;
          conv_outputs(products + i * kPanel + half, tiles * kPanel, load(bias + half), to, channel % kBlock);
        }
      }
    }

    float* rows = products;
    for (std::int64_t panel = 0; panel < layout_.token_panels; ++panel) {
      const float* weights = call_.packed + layout_.out_at + panel * layout_.out_panel_words;
      const Vec bias0 = load(call_.packed + layout_.out_bias_at + panel * kPanel);
      const Vec bias1 = load(call_.packed + layout_.out_bias_at + panel * kPanel + kLanes);
      const std::int64_t valid = smaller<std::int64_t>(kPanel, n_.tokens - panel * kPanel);
      for_row_pieces(tiles * kConvPixels, kernels_, [&](std::int64_t row, std::int64_t count, Micro kernel) {
        kernel(v + row * kWords, pixel_stride, all, weights, rows, {});
        for (std::int64_t r = 0; r < count; ++r) {
          T* y = y_at(first, row + r);
          if (!y) continue;
          y += panel * kPanel;
          const Vec y0 = load(rows + r * kPanel) + bias0, y1 = load(rows + r * kPanel + kLanes) + bias1;
          if (valid == kPanel) {
            store(y, y0);
            store(y + kLanes, y1);
          } else {
            T padded[kPanel];
            store(padded, y0);
            store(padded + kLanes, y1);
            __builtin_memcpy(y, padded, valid * sizeof(T));
          }
        }
      });
    }
  }

  // Row `row` of stage 2's pixel matrix in the output; null where the tile overhangs the image.
  T* y_at(std::int64_t first, std::int64_t row) const {
    const Tile tile = locate(first + row / kConvPixels, conv_rows_, conv_columns_);
    const int pixel = static_cast<int>(row % kConvPixels);
    const std::int64_t y = tile.row * kConvTile + pixel / kConvTile;
    const std::int64_t x = tile.column * kConvTile + pixel % kConvTile;
    if (y >= height_ || x >= width_) return nullptr;
    return static_cast<T*>(call_.y) + (((first_ + tile.image) * height_ + y) * width_ + x) * n_.tokens;
  }

  static inline void phase_output_points(const Vec* m, Vec* s) {
    const Vec sum = m[1] + m[2];
    s[0] = m[0] + sum;
    s[1] = m[1] - m[2];
    s[2] = sum - m[3];
  }

  // The points 0, 1, -1 and infinity serve both two taps with three outputs and three taps with two outputs.
  static inline void four_points(const Vec* d, Vec* t) {
    t[0] = d[0] - d[2];
    t[1] = d[1] + d[2];
    t[2] = d[2] - d[1];
    t[3] = d[1] - d[3];
  }

  static inline void input_points(const Vec* d, Vec* t) {
    if constexpr (kConvTile == 4) {
      const Vec two = splat(2.f), four = splat(4.f), five = splat(5.f);
      const Vec even = d[4] - four * d[2], odd = d[3] - four * d[1];
      const Vec even2 = d[4] - d[2], odd2 = two * (d[3] - d[1]);
      t[0] = four * d[0] - five * d[2] + d[4];
      t[1] = even + odd;
      t[2] = even - odd;
      t[3] = even2 + odd2;
      t[4] = even2 - odd2;
      t[5] = four * d[1] - five * d[3] + d[5];
    } else {
      four_points(d, t);
    }
  }

  static inline void output_points(const Vec* m, Vec* s) {
    if constexpr (kConvTile == 4) {
      const Vec two = splat(2.f), four = splat(4.f), eight = splat(8.f);
      const Vec sum1 = m[1] + m[2], difference1 = m[1] - m[2];
      const Vec sum2 = m[3] + m[4], difference2 = m[3] - m[4];
      s[0] = m[0] + sum1 + sum2;
      s[1] = difference1 + two * difference2;
      s[2] = sum1 + four * sum2;
      s[3] = difference1 + eight * difference2 + m[5];
    } else {
      s[0] = m[0] + m[1] + m[2];
      s[1] = m[1] - m[2] - m[3];
    }
  }

  void conv_inputs(const float* corner, Word* to, std::int64_t point_stride) const {
    const std::int64_t pixel = layout_.hidden_width, line = u_width_ * pixel;
    Vec result[kConvPoints][kVecs];
    for (int v = 0; v < kVecs; ++v) {
      Vec rows[kConvSide][kConvSide];
      for (int j = 0; j < kConvSide; ++j) {
        Vec d[kConvSide], t[kConvSide];
        for (int i = 0; i < kConvSide; ++i) d[i] = load(corner + i * line + j * pixel + v * kLanes);
        input_points(d, t);
        for (int i = 0; i < kConvSide; ++i) rows[i][j] = t[i];
      }
      for (int i = 0; i < kConvSide; ++i) {
        Vec t[kConvSide];
        input_points(rows[i], t);
        for (int j = 0; j < kConvSide; ++j) result[i * kConvSide + j][v] = t[j];
      }
    }
    for (int point = 0; point < kConvPoints; ++point) store_block(to + point * point_stride, result[point]);
  }

  static void conv_outputs(const float* products, std::int64_t point_stride, Vec bias, Word* to, std::int64_t channel) {
    Vec rows[kConvTile][kConvSide];
    for (int j = 0; j < kConvSide; ++j) {
      Vec m[kConvSide], s[kConvTile];
      for (int i = 0; i < kConvSide; ++i) m[i] = load(products + (i * kConvSide + j) * point_stride);
      output_points(m, s);
      for (int i = 0; i < kConvTile; ++i) rows[i][j] = s[i];
    }
    for (int i = 0; i < kConvTile; ++i) {
      Vec s[kConvTile];
      output_points(rows[i], s);
      for (int j = 0; j < kConvTile; ++j) {
        store_part(to + (i * kConvTile + j) * kWords, channel, relu(s[j] + bias));
      }
    }
  }

  const LiftForwardCall& call_;
  const LiftForwardLayout& layout_;
  const LiftForwardChannels& n_;
  std::int64_t height_, width_;                // fine grid
  std::int64_t phase_rows_, phase_columns_;    // tiles of stage 1
  std::int64_t conv_rows_, conv_columns_;      // tiles of stage 2
  std::int64_t u_height_, u_width_, u_image_;  // u with its frame of zeros
  std::int64_t group_;                         // images whose u is kept at one time
  std::int64_t phase_block_, conv_block_;      // tiles per block
  std::int64_t phase_parts_;                   // shares of a block's panels
  std::int64_t scratch_words_;                 // per thread
  int workers_;
  Micro kernels_[kRows + 1];
  float* u_ = nullptr;
  Word* scratch_ = nullptr;
  std::int64_t first_ = 0, images_ = 0;
};

inline void run_lift_forward(const LiftForwardCall& call) {
  if (call.type == LiftForwardType::bfloat16) {
    Decoder<Bfloat16>::run(call);
  } else if constexpr (!kPairs) {
    Decoder<float>::run(call);
  }
}

}  // namespace

template <>
const LiftForwardKernel Compiled<LiftForwardKernel, kIsa>::kernel = {run_lift_forward};

}  // namespace lift_fast
