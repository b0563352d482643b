// One pass over the image: f and g of LiFT's image encoders, 32 channels wide, on the tensor cores.
//
// A block owns g rows and f columns of one image. Each of its warps owns a strip, 16 columns of the second
// convolution, and walks down it two rows of the second convolution (a step) at a time. What the first convolution
// leaves in a lane's registers is what the second one takes from that lane, so its map is never stored. f goes through
// shared memory, where the third convolution finds its windows.
//
// Two other cuts of the same work are chosen by name. "stream": a step is a loop over its two rows of the second
// convolution. Each row of the first convolution is added at once to every sum that needs it, so nothing is computed
// twice and the code is a third as long. "spread": each warp makes a single step, those of a g row side by side. The
// way from the image to g is then one step long, for few images on many multiprocessors.
//
// Everywhere lane = 4 g + t, and a lane's 8 values of a position's 32 channels are 8 (v / 2) + 2 t + v % 2: the layout
// of both the tensor cores' results and their operands. f lies in shared memory in that order too.
#pragma once

#include <cstdint>
#include <type_traits>

#include "image_encoder_layout.cuh"

namespace lift_fast {

template <class T, bool kPool, EncoderCut kCut>
class ImageEncoder {
  static constexpr bool kSpread = kCut == EncoderCut::spread;
  using Layout = EncoderLayout<T, kPool, kSpread>;
  static constexpr int kWords = T::kWords, kPerStep = Layout::kPerStep;
  // The part of a row of the second convolution that comes from the row of the first one above it.
  struct Begun {
    float sum[4][4];
  };
  // What a warp keeps from one step to the next.
  using State = std::conditional_t<kCut == EncoderCut::walk, FirstRow<T>, Begun>;

 public:
  __device__ __forceinline__ ImageEncoder(const EncoderParams& params, unsigned char* memory)
      : p(params), shared(memory), warp(threadIdx.x / 32), lane(threadIdx.x % 32), warps(blockDim.x / 32) {
    g = lane / 4;
    t = lane % 4;
    strip = kSpread ? warp % p.strips : warp;
    strips = kSpread ? p.strips : warps;
    const int column_block = blockIdx.x % p.column_blocks;
    image = blockIdx.x / p.column_blocks / p.row_blocks;
    first_column = column_block == 0 ? 0 : p.columns_first + (column_block - 1) * p.columns;
    last_column = min(first_column + (column_block == 0 ? p.columns_first : p.columns), 2 * p.w);
    // g's windows reach one f column to the left; with two the strips stay on even columns.
    strips_from = column_block == 0 ? 0 : first_column - 2;
    const int row = blockIdx.x / p.column_blocks % p.row_blocks * p.rows;
    own_step = 2 * row / kPerStep;
    first_step = max(own_step - 1, 0);
    end_step = 2 * min(row + p.rows, p.h) / kPerStep;
  }

  __device__ __forceinline__ void run() {
    copy_weights(0);
    for (int i = threadIdx.x; i < kBiases; i += blockDim.x) {
      // The second convolution's pair by pair, twice each; then the third's.
      const int channel = i < 64 ? 32 + i / 4 * 2 + i % 2 : i;
      reinterpret_cast<float*>(shared + Layout::bias())[i] = p.bias[channel];
    }
#pragma unroll
    for (int octet = 0; octet < 4; ++octet) {
      const auto* packed = static_cast<const unsigned char*>(p.packed) + (octet * 32 + lane) * Layout::kChunk;
      load_words<kWords>(first_weight[octet], packed);
    }
    if constexpr (kSpread) {
      spread();
    } else {
      walk();
    }
  }

 private:
  // Every warp walks down its strip while the next step's image rows arrive.
  __device__ __forceinline__ void walk() {
    State above{};
    if (first_step > 0) stage(first_step - 1, 6, kLines);
    commit_copies();
    stage(first_step, 0, kLines);
    commit_copies();
    if (first_step > 0 || kCut == EncoderCut::stream) {
      wait_copies<1>();
      __syncthreads();
    }
    begin(above, first_step);
    for (int step = first_step; step < end_step; ++step) {
      wait_copies<0>();
      // The step's image rows and the previous step's f rows have arrived; no warp reads the previous image rows any
      // more.
      __syncthreads();
      if (step + 1 < end_step) stage(step + 1, 0, kLines);
      commit_copies();
      finish(step - 1);
      second_convolution(above, step);
    }
    __syncthreads();
    finish(end_step - 1);
  }

  // Every warp makes one step; then all of them compute g.
  __device__ __forceinline__ void spread() {
    stage(first_step - 1, 6, kLines + 24 * (end_step - first_step));
    commit_copies();
    copy_weights(9);
    commit_copies();
    wait_copies<1>();
    __syncthreads();
    const int step = first_step + warp / strips;
    if (step < end_step) {
      State above{};
      begin(above, step);
      second_convolution(above, step);
    }
    wait_copies<0>();
    __syncthreads();
    for (int done = own_step; done < end_step; ++done) finish(done);
  }

  // The row of the first convolution above a warp's first step; above the image zero, the second one's padding.
  __device__ __forceinline__ void begin(FirstRow<T>& above, int step) {
    if (step > 0) {
      left_column(step - 1, true);
      first_convolution(above.even, above.odd, step - 1, 4);
    } else if (g == 0) {
      store_words<kWords>(halo(-1, 4), above.odd[0]);
    }
  }

  __device__ __forceinline__ void begin(Begun& above, int step) {
    load_bias(above.sum);
    if (step == 0) return;
    left_column(step - 1, true);
    FirstRow<T> row;
    first_convolution(row.even, row.odd, step - 1, 4);
    std::uint32_t before[kWords];
    shift(before, row.odd, halo(step - 1, 4));
    window_row(above.sum, 0, row, before);
  }

  // Copies nine taps' weights in the background: the second convolution's begin at part 0, the third's at part 9.
  __device__ __forceinline__ void copy_weights(int part) {
    const auto* source = static_cast<const unsigned char*>(p.packed) + (1 + part) * kPart * T::kItem;
    unsigned char* const target = shared + part * kPart * T::kItem;
    for (int i = threadIdx.x; i < 9 * kPart * T::kItem / 16; i += blockDim.x) {
      copy_async(target + 16 * i, source + 16 * i, true);
    }
  }

  // Copies image lines of a step into its buffer, from row `row` to before line `end`; line = 3 row + channel.
  __device__ __forceinline__ void stage(int step, int row, int end) {
    const int left = strips_from * Layout::kScale - 8, right = left + 8 * Layout::chunks(strips);
    const auto height = static_cast<unsigned>(p.h * 2 * Layout::kScale);
    const auto width = static_cast<unsigned>(p.w * 2 * Layout::kScale);
    const int first = left + 8 * lane;
    const std::int64_t start = image * p.stride[0] + first * p.stride[3];
#pragma unroll 1
    for (int line = 3 * row + warp; line < end; line += warps) {
      const int y = 8 * step - 1 + line / 3;
      const bool inside = static_cast<unsigned>(y) < height;
      std::int64_t at = start + line % 3 * p.stride[1] + y * p.stride[2];
      unsigned char* to = image_lines(step) + line * Layout::pitch(strips) + lane * Layout::kChunk;
      if (p.aligned) {
        const unsigned char* from = static_cast<const unsigned char*>(p.imgs) + at * T::kItem;
#pragma unroll 1
        for (int x = first; x < right; x += 256) {
          const bool valid = inside && static_cast<unsigned>(x) < width;
#pragma unroll
          for (int i = 0; i < Layout::kChunk; i += 16) copy_async(to + i, from + i, valid);
          from += 256 * T::kItem;
          to += 32 * Layout::kChunk;
        }
      } else {
#pragma unroll 1
        for (int x = first; x < right; x += 256) {
          gather(to, at, inside && static_cast<unsigned>(x) < width);
          at += 256 * p.stride[3];
          to += 32 * Layout::kChunk;
        }
      }
    }
  }

  // 8 pixels of any stride, or zeros.
  __device__ __forceinline__ void gather(unsigned char* to, std::int64_t at, bool valid) const {
    std::uint32_t words[kWords] = {};
    if (valid) {
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        if constexpr (T::kItem == 2) {
          const auto* imgs = static_cast<const std::uint16_t*>(p.imgs);
          words[i / 2] |= static_cast<std::uint32_t>(imgs[at + i * p.stride[3]]) << (16 * (i % 2));
        } else {
          words[i] = static_cast<const std::uint32_t*>(p.imgs)[at + i * p.stride[3]];
        }
      }
    }
    store_words<kWords>(to, words);
  }

  // The three lines of this lane's window values, for row 1 to 4 of a step's new rows of the first convolution.
  __device__ __forceinline__ void load_chunks(Chunks<T>& c, int step, int row, int chunk) const {
    const unsigned char* from = image_lines(step) + (6 * row - 6) * Layout::pitch(strips) + chunk * Layout::kChunk;
#pragma unroll
    for (int i = 0; i < 3; ++i) load_words<kWords>(c.line[i], from + line(i));
  }

  // Byte offset of a lane's line: t, t + 4, and 8 for every lane.
  __device__ __forceinline__ int line(int i) const { return (i == 2 ? 8 : t + 4 * i) * Layout::pitch(strips); }

  // Writes the first convolution of the column to the left of the strip, rows 1 to 4, to shared memory; with
  // `only_last` row 4 alone, because only its image rows have arrived.
  __device__ __forceinline__ void left_column(int step, bool only_last) {
    Chunks<T> c;
    load_chunks(c, step, only_last ? 4 : 1 + g % 4, 8 * strip);
    std::uint32_t value[kWords], none[kWords] = {};
    window<T>(value, c, 3, t, p.same);
    float sum[4][4] = {};
    multiply<T>(sum, value, none, first_weight);
    std::uint32_t word[kWords];
    activate<T>(word, sum, 0);
    if (strips_from == 0 && strip == 0) {
      // The second convolution's padding is zero, not the first convolution of padding.
#pragma unroll
      for (int i = 0; i < kWords; ++i) word[i] = 0;
    }
    if (g < 4 && (!only_last || g == 3)) store_words<kWords>(halo(step, 1 + g), word);
    __syncwarp();
  }

  // Row 1 to 4 of a step's new rows: even columns if `even`, odd columns if `odd`.
  __device__ __forceinline__ void first_convolution(std::uint32_t (*even)[kWords], std::uint32_t (*odd)[kWords],
                                                    int step, int row) const {
    const int chunk = 1 + 8 * strip + g;
    Chunks<T> c;
    load_chunks(c, step, row, chunk);
    if (even) {
      const unsigned char* before = image_lines(step) + (6 * row - 6) * Layout::pitch(strips) + chunk * Layout::kChunk -
                                    4;
#pragma unroll
      for (int i = 0; i < 3; ++i) {
        c.before[i] = shuffle_up(c.line[i][kWords - 1], 4);
        if (g == 0) c.before[i] = *reinterpret_cast<const std::uint32_t*>(before + line(i));
      }
      first_columns(even, c, 0);
    }
    if (odd) first_columns(odd, c, 1);
  }

  __device__ __forceinline__ void first_columns(std::uint32_t (*out)[kWords], const Chunks<T>& c, int parity) const {
    std::uint32_t upper[kWords], lower[kWords];
    window<T>(upper, c, parity, t, p.same);
    window<T>(lower, c, parity + 2, t, p.same);
    // Here and below: keeps the compiler from working on several rows at a time, for which registers do not suffice.
    __syncwarp();
    float sum[4][4] = {};
    multiply<T>(sum, upper, lower, first_weight);
#pragma unroll
    for (int half = 0; half < 2; ++half) activate<T>(out[half], sum, half);
    __syncwarp();
  }

  // The odd columns shifted one to the left: 4g - 1 and 4g + 1. Lane g = 0 reads the first from left_column's result.
  __device__ __forceinline__ void shift(std::uint32_t (&out)[kWords], const std::uint32_t (*odd)[kWords],
                                        const unsigned char* left) const {
#pragma unroll
    for (int i = 0; i < kWords; ++i) {
      out[i] = shuffle_up(odd[1][i], 4);
      // Word by word: a vector would have to be moved apart.
      if (g == 0) out[i] = reinterpret_cast<const std::uint32_t*>(left)[i];
    }
  }

  // One tap of the second convolution for both rows of the step, so its weights are loaded once: rows g and g + 8 of
  // the operands belong to the upper and the lower row.
  __device__ __forceinline__ void tap(float (&sum)[2][4][4], int number, const std::uint32_t* upper_first,
                                      const std::uint32_t* upper_second, const std::uint32_t* lower_first,
                                      const std::uint32_t* lower_second) const {
    std::uint32_t weight[4][kWords];
#pragma unroll
    for (int octet = 0; octet < 4; ++octet) {
      load_words<kWords>(weight[octet], shared + ((number * 4 + octet) * 32 + lane) * Layout::kChunk);
    }
    __syncwarp();
#pragma unroll
    for (int s = 0; s < kWords; s += 2) {
      const std::uint32_t upper[4] = {upper_first[s], upper_second[s], upper_first[s + 1], upper_second[s + 1]};
      const std::uint32_t lower[4] = {lower_first[s], lower_second[s], lower_first[s + 1], lower_second[s + 1]};
#pragma unroll
      for (int octet = 0; octet < 4; ++octet) {
        T::mma(sum[0][octet], upper, weight[octet][s], weight[octet][s + 1], sum[0][octet]);
        T::mma(sum[1][octet], lower, weight[octet][s], weight[octet][s + 1], sum[1][octet]);
      }
    }
    __syncwarp();
  }

  // Taps of a window row over odd columns: the left and the right one.
  __device__ __forceinline__ void odd_taps(float (&sum)[2][4][4], int window_row, const std::uint32_t (*upper)[kWords],
                                           const unsigned char* upper_left, const std::uint32_t (*lower)[kWords],
                                           const unsigned char* lower_left) const {
    tap(sum, 3 * window_row + 2, upper[0], upper[1], lower[0], lower[1]);
    std::uint32_t upper_before[kWords], lower_before[kWords];
    shift(upper_before, upper, upper_left);
    shift(lower_before, lower, lower_left);
    tap(sum, 3 * window_row, upper_before, upper[0], lower_before, lower[0]);
  }

  __device__ __forceinline__ void even_tap(float (&sum)[2][4][4], int window_row, const std::uint32_t (*upper)[kWords],
                                           const std::uint32_t (*lower)[kWords]) const {
    tap(sum, 3 * window_row + 1, upper[0], upper[1], lower[0], lower[1]);
  }

  // What every sum of the second convolution begins with.
  __device__ __forceinline__ void load_bias(float (&sum)[4][4]) const {
#pragma unroll
    for (int octet = 0; octet < 4; ++octet) {
      std::uint32_t quad[4];
      load_words<4>(quad, shared + Layout::bias() + 16 * (4 * octet + t));
#pragma unroll
      for (int i = 0; i < 4; ++i) sum[octet][i] = bits_float(quad[i]);
    }
  }

  // Three taps of one row of the second convolution: a window row's. `before` is what shift() makes of the odd columns.
  __device__ __forceinline__ void window_row(float (&sum)[4][4], int window_row, const FirstRow<T>& row,
                                             const std::uint32_t (&before)[kWords]) const {
    const unsigned char* weights = shared + (3 * window_row * 4 * 32 + lane) * Layout::kChunk;
    tap_of_row(sum, weights + 4 * 32 * Layout::kChunk, row.even[0], row.even[1]);
    tap_of_row(sum, weights + 8 * 32 * Layout::kChunk, row.odd[0], row.odd[1]);
    tap_of_row(sum, weights, before, row.odd[0]);
  }

  __device__ __forceinline__ void tap_of_row(float (&sum)[4][4], const unsigned char* weights,
                                             const std::uint32_t (&first)[kWords],
                                             const std::uint32_t (&second)[kWords]) const {
    std::uint32_t weight[4][kWords];
#pragma unroll
    for (int octet = 0; octet < 4; ++octet) load_words<kWords>(weight[octet], weights + octet * 32 * Layout::kChunk);
    multiply<T>(sum, first, second, weight);
    __syncwarp();
  }

  // Row by row, in a loop short enough for the instruction cache of a quarter of a multiprocessor.
  __device__ __forceinline__ void second_convolution(Begun& above, int step) {
    left_column(step, false);
    float held[4][2];
#pragma unroll 1
    for (int i = 0; i < 2; ++i) {
      FirstRow<T> row;
      std::uint32_t before[kWords];
      first_convolution(row.even, row.odd, step, 2 * i + 1);
      shift(before, row.odd, halo(step, 2 * i + 1));
      window_row(above.sum, 1, row, before);
      first_convolution(row.even, row.odd, step, 2 * i + 2);
      shift(before, row.odd, halo(step, 2 * i + 2));
      window_row(above.sum, 2, row, before);
      if constexpr (kPool) {
        pool_row(above.sum, held, step, i);
      } else {
        store_row(above.sum, step, i);
      }
      load_bias(above.sum);
      window_row(above.sum, 0, row, before);
    }
  }

  // The larger of two columns; after the second row the larger of both rows goes into the ring.
  __device__ __forceinline__ void pool_row(const float (&sum)[4][4], float (&held)[4][2], int step, int i) const {
#pragma unroll
    for (int octet = 0; octet < 4; ++octet) {
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        const float largest = max_nan(sum[octet][k], sum[octet][2 + k]);
        held[octet][k] = i == 0 ? largest : max_nan(held[octet][k], largest);
      }
    }
    if (i == 0) return;
    std::uint32_t word[kWords];
#pragma unroll
    for (int octet = 0; octet < 4; ++octet) T::relu(&word[octet * (kWords / 4)], held[octet][0], held[octet][1]);
    store_words<kWords>(ring(step, 8 * strip + g) + t * Layout::kChunk, word);
  }

  // Without pooling: a row of the second convolution goes into the ring.
  __device__ __forceinline__ void store_row(const float (&sum)[4][4], int step, int i) const {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      std::uint32_t word[kWords];
#pragma unroll
      for (int octet = 0; octet < 4; ++octet) {
        T::relu(&word[octet * (kWords / 4)], sum[octet][2 * half], sum[octet][2 * half + 1]);
      }
      store_words<kWords>(ring(2 * step + i, 16 * strip + 2 * g + half) + t * Layout::kChunk, word);
    }
  }

  // Writes both rows of the step, pooled with `pool`, into the ring of f rows and advances `above`.
  __device__ __forceinline__ void second_convolution(FirstRow<T>& above, int step) {
    left_column(step, false);
    float sum[2][4][4];
    load_bias(sum[0]);
#pragma unroll
    for (int octet = 0; octet < 4; ++octet) {
#pragma unroll
      for (int i = 0; i < 4; ++i) sum[1][octet][i] = sum[0][octet][i];
    }
    {
      FirstRow<T> middle;
      first_convolution(middle.even, middle.odd, step, 2);
      even_tap(sum, 0, above.even, middle.even);
      odd_taps(sum, 0, above.odd, halo(step - 1, 4), middle.odd, halo(step, 2));
      first_convolution(above.even, above.odd, step, 4);
      even_tap(sum, 2, middle.even, above.even);
      odd_taps(sum, 2, middle.odd, halo(step, 2), above.odd, halo(step, 4));
    }
    {
      std::uint32_t upper[2][kWords], lower[2][kWords];
      first_convolution(upper, nullptr, step, 1);
      first_convolution(lower, nullptr, step, 3);
      even_tap(sum, 1, upper, lower);
      first_convolution(nullptr, upper, step, 1);
      first_convolution(nullptr, lower, step, 3);
      odd_taps(sum, 1, upper, halo(step, 1), lower, halo(step, 3));
    }

    constexpr int kPair = kWords / 4;
    if constexpr (kPool) {
      std::uint32_t word[kWords];
#pragma unroll
      for (int octet = 0; octet < 4; ++octet) {
        float largest[2];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          largest[i] = max_nan(max_nan(sum[0][octet][i], sum[0][octet][2 + i]),
                               max_nan(sum[1][octet][i], sum[1][octet][2 + i]));
        }
        T::relu(&word[octet * kPair], largest[0], largest[1]);
      }
      store_words<kWords>(ring(step, 8 * strip + g) + t * Layout::kChunk, word);
    } else {
#pragma unroll
      for (int i = 0; i < 2; ++i) store_row(sum[i], step, i);
    }
  }

  // Writes the f rows of a step, and the g row whose windows are complete with it.
  __device__ __forceinline__ void finish(int step) const {
    if (step < own_step) return;
    if constexpr (kPool) {
      write_fine(step);
      if (step % 2 == 1) third_convolution(step / 2);
    } else {
      write_fine(2 * step);
      write_fine(2 * step + 1);
      third_convolution(step);
    }
  }

  __device__ __forceinline__ void write_fine(int row) const {
    constexpr int kQuads = kEncoderChannels * T::kItem / 16;
    const std::int64_t start = ((std::int64_t{image} * 2 * p.h + row) * 2 * p.w + first_column) * kQuads;
    auto* out = static_cast<uint4*>(p.f) + start;
    for (int i = threadIdx.x; i < (last_column - first_column) * kQuads; i += blockDim.x) {
      const int quad = i % kQuads;
      const unsigned char* at = ring(row, first_column - strips_from + i / kQuads);
      std::uint32_t word[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        // From the lanes' order to the channels'.
        const int holder = T::kItem == 2 ? j : 2 * (quad % 2) + j / 2;
        const int value = T::kItem == 2 ? quad : 2 * (quad / 2) + j % 2;
        word[j] = *reinterpret_cast<const std::uint32_t*>(at + holder * Layout::kChunk + 4 * value);
      }
      out[i] = make_uint4(word[0], word[1], word[2], word[3]);
    }
  }

  __device__ __forceinline__ void third_convolution(int row) const {
    const int begin = first_column / 2, end = last_column / 2;
    const auto* weights = kSpread ? shared + 9 * kPart * T::kItem
                                  : static_cast<const unsigned char*>(p.packed) + 10 * kPart * T::kItem;
    // 16 columns and 8 channels each.
    for (int unit = warp; unit < 4 * ((end - begin + 15) / 16); unit += warps) {
      const int octet = unit % 4, column = begin + unit / 4 * 16 + g;
      float sum[3][4] = {};  // one for each window column: three chains of products instead of one
#pragma unroll 1
      for (int i = 0; i < 3; ++i) {
        const int fine_row = 2 * row + i - 1;
        if (fine_row < 0) continue;
#pragma unroll
        for (int j = 0; j < 3; ++j) {
          std::uint32_t value[2][kWords] = {}, weight[kWords];
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const int fine_column = 2 * (column + 8 * half) + j - 1;
            if (column + 8 * half < end && fine_column >= 0) {
              load_words<kWords>(value[half], ring(fine_row, fine_column - strips_from) + t * Layout::kChunk);
            }
          }
          load_words<kWords>(weight, weights + (((3 * i + j) * 4 + octet) * 32 + lane) * Layout::kChunk);
#pragma unroll
          for (int s = 0; s < kWords; s += 2) {
            const std::uint32_t a[4] = {T::operand(value[0][s]), T::operand(value[1][s]), T::operand(value[0][s + 1]),
                                        T::operand(value[1][s + 1])};
            T::mma(sum[j], a, weight[s], weight[s + 1], sum[j]);
          }
        }
      }
      const int channel = 8 * octet + 2 * t;
      const auto* bias = reinterpret_cast<const float*>(shared + Layout::bias()) + 64 + channel;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        if (column + 8 * half >= end) continue;
        float total[2];
#pragma unroll
        for (int i = 0; i < 2; ++i)
          total[i] = sum[0][2 * half + i] + sum[1][2 * half + i] + sum[2][2 * half + i] + bias[i];
        std::uint32_t word[2];
        T::relu(word, total[0], total[1]);
        const std::int64_t cell = (std::int64_t{image} * p.h + row) * p.w + column + 8 * half;
        auto* out = static_cast<unsigned char*>(p.g) + (cell * kEncoderChannels + channel) * T::kItem;
        if constexpr (T::kItem == 2) {
          *reinterpret_cast<std::uint32_t*>(out) = word[0];
        } else {
          *reinterpret_cast<uint2*>(out) = make_uint2(word[0], word[1]);
        }
      }
    }
  }

  // Where a step's image lines begin. Spread steps share the lines that two of them need.
  __device__ __forceinline__ unsigned char* image_lines(int step) const {
    const int line = kSpread ? Layout::kLinesBefore + 24 * (step - first_step) : (step & 1) * kLines;
    return shared + Layout::image_lines(strips, steps()) + line * Layout::pitch(strips);
  }

  // left_column's result for a row of a step; the previous step's is still there.
  __device__ __forceinline__ unsigned char* halo(int step, int row) const {
    return shared + Layout::halo() + ((warp * 8 + (step & 1) * 4 + row - 1) * 4 + t) * Layout::kChunk;
  }

  __device__ __forceinline__ unsigned char* ring(int row, int column) const {
    const int slot = kSpread ? row - kPerStep * first_step : row % Layout::kRing;
    return shared + Layout::ring(strips, steps()) + slot * Layout::ring_row(strips) + column * 4 * Layout::kChunk;
  }

  // A constant to the compiler where it is one.
  __device__ __forceinline__ int steps() const { return kSpread ? p.steps : 1; }

  const EncoderParams& p;
  unsigned char* shared;
  int warp, lane, warps, g, t;
  int strip, strips;  // the warp's, and how many the block has
  int image;
  int first_step, own_step, end_step;  // of the block; those before own_step only for g's windows
  int first_column, last_column;  // f columns of the block
  int strips_from;  // f column at which its first strip begins
  std::uint32_t first_weight[4][T::kWords];
};

template <class T, bool kPool, EncoderCut kCut>
__global__ void __launch_bounds__(32 * kEncoderMaxWarps, kCut == EncoderCut::spread ? 1 : T::kBlocks)
    image_encoder_kernel(LIFT_FAST_GRID_CONSTANT const EncoderParams params) {
  LIFT_FAST_DYNAMIC_SHARED(shared);
  ImageEncoder<T, kPool, kCut>(params, shared).run();
}

}  // namespace lift_fast
