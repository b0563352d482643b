#include "lift_forward.hpp"

#include <cstdlib>
#include <cstring>
#include <limits>
#include <stdexcept>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "dispatch.hpp"
#include "scratch.hpp"

namespace lift_fast {
namespace {

constexpr std::int64_t kBlockWords = 16;
constexpr std::int64_t kHeaderBytes = 128;
constexpr std::uint64_t kMagic = 0x314345445446494cull;  // "LIFTDEC1"
constexpr std::int64_t kMaxChannels = std::int64_t{1} << 20;

// float32 does not use bfloat16 arithmetic.
using FloatKernels = Kernels<LiftForwardKernel>;
using HalfKernels = Kernels<LiftForwardKernel, CpuIsa::avx512_bf16>;

struct Header {
  std::uint64_t magic;
  std::int32_t isa;
  std::int32_t type;
  std::int64_t tokens, hidden, coarse, fine;
  std::int64_t bytes;
};
static_assert(sizeof(Header) <= kHeaderBytes, "the header needs more room");

std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }
std::int64_t round_up(std::int64_t a, std::int64_t b) { return ceil_div(a, b) * b; }

void check_channels(const LiftForwardChannels& n) {
  const auto bad = [](std::int64_t value, std::int64_t low) { return value < low || value > kMaxChannels; };
  if (bad(n.tokens, 1) || bad(n.hidden, 1) || bad(n.coarse, 0) || bad(n.fine, 0)) {
    throw std::invalid_argument("lift_forward: channel counts out of range: C=" + std::to_string(n.tokens) +
                                ", c=" + std::to_string(n.hidden) + ", G=" + std::to_string(n.coarse) +
                                ", F=" + std::to_string(n.fine));
  }
}

std::uint16_t to_bfloat16(double value) {
  const float single = static_cast<float>(value);
  std::uint32_t bits;
  std::memcpy(&bits, &single, sizeof bits);
  if (single != single) return static_cast<std::uint16_t>((bits >> 16) | 0x40);
  return static_cast<std::uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

// Writes weight (k, n) of the K blocks that start at `base`, in the order in which the micro-kernel reads them.
class Panel {
 public:
  Panel(float* base, const LiftForwardLayout& layout)
      : base_(base), width_(layout.panel), pairs_(layout.block == 2 * kBlockWords) {}

  void set(std::int64_t k, std::int64_t n, double value) {
    if (pairs_) {
      auto* half = reinterpret_cast<std::uint16_t*>(base_) + ((k / 2) * width_ + n) * 2 + (k & 1);
      *half = to_bfloat16(value);
    } else {
      base_[k * width_ + n] = static_cast<float>(value);
    }
  }
  void advance(std::int64_t blocks) { base_ += blocks * kBlockWords * width_; }

 private:
  float* base_;
  std::int64_t width_;
  bool pairs_;
};

// Factors of tap 0 and tap 1 at each point.
constexpr double kPhaseFilter[4][2] = {{1, 0}, {.5, .5}, {.5, -.5}, {0, 1}};

void pack_phases(const LiftForwardWeights& w, const LiftForwardChannels& n, const LiftForwardLayout& layout,
                 float* packed) {
  const std::int64_t depth = n.tokens + n.coarse;
  const int side = static_cast<int>(layout.phase_tile) + 1;
  const std::int64_t items = 4 * layout.hidden_panels;
#pragma omp parallel for schedule(static)
  for (std::int64_t item = 0; item < items; ++item) {
    const int a = static_cast<int>(item / layout.hidden_panels / 2), b = (item / layout.hidden_panels) % 2;
    const std::int64_t first = (item % layout.hidden_panels) * layout.panel;
    const std::int64_t width = n.hidden - first < layout.panel ? n.hidden - first : layout.panel;
    Panel panel(packed + layout.phase_at + item * layout.phase_panel_words, layout);
    for (int point = 0; point < side * side; ++point) {
      const int row = point / side, column = point % side;
      // weight(p, q, k, j): tap (p, q) of input channel k and the panel's output channel j.
      const auto fill = [&](std::int64_t blocks, std::int64_t channels, auto weight) {
        for (std::int64_t k = 0; k < channels; ++k) {
          for (std::int64_t j = 0; j < width; ++j) {
            double total = 0;
            for (int p = 0; p < 2; ++p) {
              for (int q = 0; q < 2; ++q) {
                total += kPhaseFilter[row][p] * kPhaseFilter[column][q] * weight(p, q, k, first + j);
              }
            }
            panel.set(k, j, total);
          }
        }
        panel.advance(blocks);
      };
      const auto coarse = [&](int p, int q, std::int64_t k, std::int64_t j) {
        return w.phase[((((a * 2 + b) * 2 + p) * 2 + q) * depth + k) * n.hidden + j];
      };
      fill(layout.token_blocks, n.tokens, coarse);
      fill(layout.coarse_blocks, n.coarse,
           [&](int p, int q, std::int64_t k, std::int64_t j) { return coarse(p, q, n.tokens + k, j); });
      for (int sub = 0; sub < 4; ++sub) {
        if (!fine_needed(a, side, row, sub / 2) || !fine_needed(b, side, column, sub % 2)) continue;
        fill(layout.fine_blocks, n.fine, [&](int p, int q, std::int64_t k, std::int64_t j) {
          const int dy = fine_row(a, p, sub / 2), dx = fine_row(b, q, sub % 2);
          const bool inside = dy >= 0 && dy < 3 && dx >= 0 && dx < 3;
          return inside ? w.fine[((dy * 3 + dx) * n.fine + k) * n.hidden + j] : 0.;
        });
      }
    }
  }
}

constexpr double kFilter4[6][3] = {{1. / 4, 0, 0},
                                   {-1. / 6, -1. / 6, -1. / 6},
                                   {-1. / 6, 1. / 6, -1. / 6},
                                   {1. / 24, 1. / 12, 1. / 6},
                                   {1. / 24, -1. / 12, 1. / 6},
                                   {0, 0, 1}};
constexpr double kFilter2[4][3] = {{1, 0, 0}, {.5, .5, .5}, {.5, -.5, .5}, {0, 0, 1}};

void pack_conv(const LiftForwardWeights& w, const LiftForwardChannels& n, const LiftForwardLayout& layout,
               float* packed) {
  const std::int64_t side = layout.conv_tile + 2;
  const double (*filter)[3] = layout.conv_tile == 4 ? kFilter4 : kFilter2;
#pragma omp parallel for schedule(static)
  for (std::int64_t item = 0; item < layout.hidden_panels; ++item) {
    const std::int64_t first = item * layout.panel;
    const std::int64_t width = n.hidden - first < layout.panel ? n.hidden - first : layout.panel;
    Panel panel(packed + layout.conv_at + item * layout.conv_panel_words, layout);
    for (std::int64_t point = 0; point < side * side; ++point) {
      const double* row = filter[point / side];
      const double* column = filter[point % side];
      for (std::int64_t k = 0; k < n.hidden; ++k) {
        for (std::int64_t j = 0; j < width; ++j) {
          double total = 0;
          for (int dy = 0; dy < 3; ++dy) {
            for (int dx = 0; dx < 3; ++dx) {
              total += row[dy] * column[dx] * w.conv[((dy * 3 + dx) * n.hidden + k) * n.hidden + first + j];
            }
          }
          panel.set(k, j, total);
        }
      }
      panel.advance(layout.hidden_blocks);
    }
  }
}

void pack_out(const LiftForwardWeights& w, const LiftForwardChannels& n, const LiftForwardLayout& layout,
              float* packed) {
  for (std::int64_t item = 0; item < layout.token_panels; ++item) {
    const std::int64_t first = item * layout.panel;
    const std::int64_t width = n.tokens - first < layout.panel ? n.tokens - first : layout.panel;
    Panel panel(packed + layout.out_at + item * layout.out_panel_words, layout);
    for (std::int64_t k = 0; k < n.hidden; ++k) {
      for (std::int64_t j = 0; j < width; ++j) panel.set(k, j, w.out[k * n.tokens + first + j]);
    }
  }
}

void pack_bias(const double* bias, std::int64_t count, float* packed) {
  for (std::int64_t i = 0; i < count; ++i) packed[i] = static_cast<float>(bias[i]);
}

Header header_for(const LiftForwardChannels& n, LiftForwardType type, CpuIsa isa) {
  Header header{};
  header.magic = kMagic;
  header.isa = static_cast<std::int32_t>(isa);
  header.type = static_cast<std::int32_t>(type);
  header.tokens = n.tokens;
  header.hidden = n.hidden;
  header.coarse = n.coarse;
  header.fine = n.fine;
  header.bytes = lift_forward_packed_size(n, type, isa);
  return header;
}

}  // namespace

LiftForwardLayout lift_forward_layout(const LiftForwardChannels& n, CpuIsa isa) {
  LiftForwardLayout l{};
  const bool pairs = isa == CpuIsa::avx512_bf16;
  l.panel = isa == CpuIsa::baseline ? 8 : isa == CpuIsa::avx2 ? 16 : 32;
  l.block = pairs ? 2 * kBlockWords : kBlockWords;
  l.phase_tile = 3;
  // F(4x4) loses too many digits in bfloat16 arithmetic.
  l.conv_tile = pairs ? 2 : 4;
  l.hidden_width = round_up(n.hidden, l.panel > l.block ? l.panel : l.block);
  l.token_blocks = ceil_div(n.tokens, l.block);
  l.coarse_blocks = ceil_div(n.coarse, l.block);
  l.fine_blocks = ceil_div(n.fine, l.block);
  l.hidden_blocks = l.hidden_width / l.block;
  l.coarse_side_blocks = l.token_blocks + l.coarse_blocks;
  l.phase_blocks = l.coarse_side_blocks + 4 * l.fine_blocks;
  l.hidden_panels = l.hidden_width / l.panel;
  l.token_panels = ceil_div(n.tokens, l.panel);
  const std::int64_t block_words = kBlockWords * l.panel;
  const std::int64_t phase_points = (l.phase_tile + 1) * (l.phase_tile + 1);
  const std::int64_t conv_points = (l.conv_tile + 2) * (l.conv_tile + 2);
  // The points of fine_needed: in each dimension one sub-pixel has both taps, the other has one tap and one point
  // fewer.
  const std::int64_t fine_pairs = 2 * l.phase_tile + 1;
  l.phase_panel_words = (phase_points * l.coarse_side_blocks + fine_pairs * fine_pairs * l.fine_blocks) * block_words;
  l.conv_panel_words = conv_points * l.hidden_blocks * block_words;
  l.out_panel_words = l.hidden_blocks * block_words;
  std::int64_t at = 0;
  const auto take = [&at](std::int64_t words) {
    const std::int64_t start = at;
    at = round_up(at + words, kBlockWords);
    return start;
  };
  l.edge_at = take(9 * l.hidden_width);
  l.conv_bias_at = take(l.hidden_width);
  l.out_bias_at = take(l.token_panels * l.panel);
  l.phase_at = take(4 * l.hidden_panels * l.phase_panel_words);
  l.conv_at = take(l.hidden_panels * l.conv_panel_words);
  l.out_at = take(l.token_panels * l.out_panel_words);
  l.end = at;
  return l;
}

std::vector<CpuIsa> lift_forward_isas(LiftForwardType type) {
  return type == LiftForwardType::bfloat16 ? HalfKernels::isas() : FloatKernels::isas();
}

CpuIsa lift_forward_isa(const std::string& name, LiftForwardType type) {
  return type == LiftForwardType::bfloat16 ? HalfKernels::isa(name) : FloatKernels::isa(name);
}

LiftForwardType lift_forward_type(const std::string& name) {
  if (name == "float32") return LiftForwardType::float32;
  if (name == "bfloat16") return LiftForwardType::bfloat16;
  throw std::invalid_argument("lift_forward: dtype must be 'float32' or 'bfloat16', got '" + name + "'");
}

std::int64_t lift_forward_packed_size(const LiftForwardChannels& n, LiftForwardType, CpuIsa isa) {
  check_channels(n);
  return kHeaderBytes + lift_forward_layout(n, isa).end * static_cast<std::int64_t>(sizeof(float));
}

void lift_forward_pack(const LiftForwardWeights& w, const LiftForwardChannels& n, LiftForwardType type, CpuIsa isa,
                       void* packed, std::int64_t packed_bytes) {
  const Header header = header_for(n, type, isa);
  if (packed == nullptr || packed_bytes < header.bytes) {
    throw std::invalid_argument("lift_forward_pack: the packed buffer needs " + std::to_string(header.bytes) +
                                " bytes, got " + std::to_string(packed_bytes));
  }
  if (reinterpret_cast<std::uintptr_t>(packed) % alignof(float) != 0) {
    throw std::invalid_argument("lift_forward_pack: the packed buffer must be aligned to 4 bytes");
  }
  if (!w.phase || (n.fine > 0 && !w.fine) || !w.edge_bias || !w.conv || !w.conv_bias || !w.out || !w.out_bias) {
    throw std::invalid_argument("lift_forward_pack: a weight address is null");
  }
#if defined(__linux__)
  // Weights are streamed once per tile block; huge pages avoid misses of the TLB. Advice only.
  const std::uintptr_t page = std::uintptr_t{2} << 20;
  const std::uintptr_t from = (reinterpret_cast<std::uintptr_t>(packed) + page - 1) / page * page;
  const std::uintptr_t to = (reinterpret_cast<std::uintptr_t>(packed) + header.bytes) / page * page;
  if (to > from) (void)madvise(reinterpret_cast<void*>(from), to - from, MADV_HUGEPAGE);
#endif
  std::memset(packed, 0, static_cast<std::size_t>(header.bytes));
  float* words = reinterpret_cast<float*>(static_cast<char*>(packed) + kHeaderBytes);
  const LiftForwardLayout layout = lift_forward_layout(n, isa);
  for (int place = 0; place < 9; ++place) {
    pack_bias(w.edge_bias + place * n.hidden, n.hidden, words + layout.edge_at + place * layout.hidden_width);
  }
  pack_bias(w.conv_bias, n.hidden, words + layout.conv_bias_at);
  pack_bias(w.out_bias, n.tokens, words + layout.out_bias_at);
  pack_phases(w, n, layout, words);
  pack_conv(w, n, layout, words);
  pack_out(w, n, layout, words);
  std::memcpy(packed, &header, sizeof header);
}

void lift_forward_run(LiftForwardCall call, const void* packed, std::int64_t packed_bytes, CpuIsa isa) {
  const LiftForwardChannels& n = call.channels;
  const Header expected = header_for(n, call.type, isa);
  if (call.batch < 0 || call.height < 1 || call.width < 1) {
    throw std::invalid_argument(
        "lift_forward: batch must be >= 0 and h, w >= 1, got batch=" + std::to_string(call.batch) +
        ", h=" + std::to_string(call.height) + ", w=" + std::to_string(call.width));
  }
  const std::int64_t widest = 4 * (n.tokens + n.hidden + n.coarse + n.fine + 64) * 8;
  const std::int64_t limit = std::numeric_limits<std::int64_t>::max() / widest;
  if (call.height > limit / call.width ||
      (call.batch > 0 && (call.height + 4) > limit / (call.width + 4) / call.batch)) {
    throw std::invalid_argument("lift_forward: the sizes overflow 64-bit addressing");
  }
  if (call.threads < 1) {
    throw std::invalid_argument("lift_forward: threads must be >= 1, got " + std::to_string(call.threads));
  }
  if (packed == nullptr || packed_bytes < expected.bytes) {
    throw std::invalid_argument("lift_forward: the packed buffer needs " + std::to_string(expected.bytes) +
                                " bytes for isa " + cpu_isa_name(isa) + ", got " + std::to_string(packed_bytes));
  }
  Header found;
  std::memcpy(&found, packed, sizeof found);
  if (std::memcmp(&found, &expected, sizeof found) != 0) {
    throw std::invalid_argument(
        std::string("lift_forward: the buffer was not packed for this call (isa ") + cpu_isa_name(isa) +
        ", C=" + std::to_string(n.tokens) + ", c=" + std::to_string(n.hidden) + ", G=" + std::to_string(n.coarse) +
        ", F=" + std::to_string(n.fine) + "); pack it again for this isa, dtype and these sizes");
  }
  if (call.batch == 0) return;
  if (!call.x || !call.y || (n.coarse > 0 && !call.g) || (n.fine > 0 && !call.f)) {
    throw std::invalid_argument("lift_forward: the address of x, g, f or y is null");
  }
  call.packed = reinterpret_cast<const float*>(static_cast<const char*>(packed) + kHeaderBytes);
  call.layout = lift_forward_layout(n, isa);
  HalfKernels::of(isa).run(call);
  trim_scratch();
}

}  // namespace lift_fast
