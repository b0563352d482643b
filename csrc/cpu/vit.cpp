#include "vit.hpp"

#include <cmath>
#include <cstring>
#include <limits>
#include <stdexcept>

#include "dispatch.hpp"
#include "scratch.hpp"

namespace lift_fast {
namespace {

constexpr std::int64_t kHeaderBytes = 128;
constexpr std::uint64_t kMagic = 0x314b4c425449564cull;  // "LVITBLK1"
constexpr std::int64_t kLineWords = 16;
constexpr std::int64_t kMaxChannels = std::int64_t{1} << 16;
constexpr double kLog2E = 1.4426950408889634;

// float32 does not use bfloat16 arithmetic.
using FloatKernels = Kernels<VitKernel>;
using HalfKernels = Kernels<VitKernel, CpuIsa::avx512_bf16>;

struct Header {
  std::uint64_t magic;
  std::int32_t isa, linear;
  std::int64_t sizes[4];
  std::int64_t bytes;
};
static_assert(sizeof(Header) <= kHeaderBytes, "the header needs more room");

[[noreturn]] void refuse(const std::string& what) { throw std::invalid_argument("vit: " + what); }

std::int64_t panel_of(CpuIsa isa) { return isa == CpuIsa::baseline ? 8 : isa == CpuIsa::avx2 ? 16 : 32; }
bool pairs(CpuIsa isa) { return isa == CpuIsa::avx512_bf16; }
std::int64_t block_of(CpuIsa isa) { return pairs(isa) ? 32 : 16; }
std::int64_t round_up(std::int64_t a, std::int64_t b) { return (a + b - 1) / b * b; }

std::int64_t matrix_words(std::int64_t inputs, std::int64_t outputs, CpuIsa isa) {
  return round_up(inputs, block_of(isa)) * outputs / (pairs(isa) ? 2 : 1);
}

class Words {
 public:
  std::int64_t take(std::int64_t words) {
    const std::int64_t start = end_;
    end_ = round_up(end_ + words, kLineWords);
    return start;
  }

 private:
  std::int64_t end_ = 0;
};

void check_sizes(const VitSizes& n) {
  const auto bad = [](std::int64_t value, std::int64_t unit) {
    return value < 1 || value > kMaxChannels || value % unit != 0;
  };
  if (bad(n.width, kVitUnit) || bad(n.hidden, kVitUnit) || bad(n.heads, 1) || bad(n.head_dim, 1) ||
      n.heads * n.head_dim > kMaxChannels) {
    refuse("sizes out of range: C=" + std::to_string(n.width) + ", heads=" + std::to_string(n.heads) + " of " +
           std::to_string(n.head_dim) + ", hidden=" + std::to_string(n.hidden) + "; C and hidden are multiples of " +
           std::to_string(kVitUnit));
  }
}

void check_linear(std::int64_t inputs, std::int64_t outputs) {
  if (inputs < 1 || inputs > kMaxChannels || outputs < 1 || outputs > kMaxChannels || outputs % kVitUnit != 0) {
    refuse("matrix out of range: inputs=" + std::to_string(inputs) + ", outputs=" + std::to_string(outputs) +
           "; outputs is a multiple of " + std::to_string(kVitUnit));
  }
}

Header block_header(const VitSizes& n, CpuIsa isa) {
  return {kMagic, static_cast<std::int32_t>(isa), 0, {n.width, n.heads, n.head_dim, n.hidden}, vit_block_bytes(n, isa)};
}
Header linear_header(std::int64_t inputs, std::int64_t outputs, CpuIsa isa) {
  return {kMagic, static_cast<std::int32_t>(isa), 1, {inputs, outputs, 0, 0}, vit_linear_bytes(inputs, outputs, isa)};
}

void check_room(const void* packed, std::int64_t bytes, const Header& header) {
  if (packed == nullptr || bytes < header.bytes) {
    refuse("a packed buffer needs " + std::to_string(header.bytes) + " bytes, got " + std::to_string(bytes));
  }
  if (reinterpret_cast<std::uintptr_t>(packed) % alignof(float) != 0) {
    refuse("a packed buffer must be aligned to 4 bytes");
  }
}

const float* unpack(const VitPacked& packed, const Header& expected, const char* name) {
  check_room(packed.data, packed.bytes, expected);
  Header found;
  std::memcpy(&found, packed.data, sizeof found);
  if (found.magic != expected.magic || found.isa != expected.isa || found.linear != expected.linear ||
      std::memcmp(found.sizes, expected.sizes, sizeof found.sizes) != 0 || found.bytes != expected.bytes) {
    refuse(std::string("the buffer of ") + name +
           " was not packed for this call; pack it again for this instruction set, dtype and these sizes");
  }
  return reinterpret_cast<const float*>(static_cast<const char*>(packed.data) + kHeaderBytes);
}

std::uint16_t to_bfloat16(float value) {
  std::uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  if (value != value) return static_cast<std::uint16_t>((bits >> 16) | 0x40);
  return static_cast<std::uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

// weight(n, k): of output n and input k, in the order in which the micro-kernel reads them.
template <class Weight>
void pack_matrix(std::int64_t inputs, std::int64_t outputs, CpuIsa isa, float* to, Weight weight) {
  const std::int64_t panel = panel_of(isa), words = matrix_words(inputs, panel, isa);
#pragma omp parallel for schedule(static)
  for (std::int64_t first = 0; first < outputs; first += panel) {
    float* at = to + first / panel * words;
    for (std::int64_t n = 0; n < panel; ++n) {
      for (std::int64_t k = 0; k < inputs; ++k) {
        const float value = weight(first + n, k);
        if (pairs(isa)) {
          reinterpret_cast<std::uint16_t*>(at)[(k / 2 * panel + n) * 2 + k % 2] = to_bfloat16(value);
        } else {
          at[k * panel + n] = value;
        }
      }
    }
  }
}

void pack_vector(const float* from, std::int64_t count, float missing, float* to) {
  for (std::int64_t i = 0; i < count; ++i) to[i] = from ? from[i] : missing;
}

void pack_norm(const float* weight, const float* bias, std::int64_t count, float* to) {
  pack_vector(weight, count, 1.f, to);
  pack_vector(bias, count, 0.f, to + count);
}

}  // namespace

VitBlockLayout vit_block_layout(const VitSizes& n, CpuIsa isa) {
  const std::int64_t inner = n.heads * vit_padded_dim(n);
  Words words;
  VitBlockLayout l{};
  l.epsilon1 = words.take(1);
  l.epsilon2 = words.take(1);
  l.norm1 = words.take(2 * n.width);
  l.norm2 = words.take(2 * n.width);
  l.qkv_gain = words.take(3 * inner);
  l.qkv_bias = words.take(3 * inner);
  l.proj_gain = words.take(n.width);
  l.proj_bias = words.take(n.width);
  l.fc1_bias = words.take(n.hidden);
  l.fc2_gain = words.take(n.width);
  l.fc2_bias = words.take(n.width);
  l.qkv = words.take(matrix_words(n.width, 3 * inner, isa));
  l.proj = words.take(matrix_words(inner, n.width, isa));
  l.fc1 = words.take(matrix_words(n.width, n.hidden, isa));
  l.fc2 = words.take(matrix_words(n.hidden, n.width, isa));
  l.end = words.take(0);
  return l;
}

VitLinearLayout vit_linear_layout(std::int64_t inputs, std::int64_t outputs, CpuIsa isa) {
  Words words;
  VitLinearLayout l{};
  l.epsilon = words.take(1);
  l.norm = words.take(2 * inputs);
  l.bias = words.take(outputs);
  l.matrix = words.take(matrix_words(inputs, outputs, isa));
  l.end = words.take(0);
  return l;
}

std::vector<CpuIsa> vit_isas(VitType type) {
  return type == VitType::bfloat16 ? HalfKernels::isas() : FloatKernels::isas();
}

CpuIsa vit_isa(const std::string& name, VitType type) {
  return type == VitType::bfloat16 ? HalfKernels::isa(name) : FloatKernels::isa(name);
}

VitType vit_type(const std::string& name) {
  if (name == "float32") return VitType::float32;
  if (name == "bfloat16") return VitType::bfloat16;
  refuse("dtype must be 'float32' or 'bfloat16', got '" + name + "'");
}

std::int64_t vit_block_bytes(const VitSizes& n, CpuIsa isa) {
  check_sizes(n);
  return kHeaderBytes + vit_block_layout(n, isa).end * static_cast<std::int64_t>(sizeof(float));
}

std::int64_t vit_linear_bytes(std::int64_t inputs, std::int64_t outputs, CpuIsa isa) {
  check_linear(inputs, outputs);
  return kHeaderBytes + vit_linear_layout(inputs, outputs, isa).end * static_cast<std::int64_t>(sizeof(float));
}

void vit_pack_block(const VitBlockWeights& w, const VitSizes& n, CpuIsa isa, void* packed, std::int64_t bytes) {
  const Header header = block_header(n, isa);
  check_room(packed, bytes, header);
  if (!w.qkv || !w.proj || !w.fc1 || !w.fc2) refuse("a weight address is null");
  std::memset(packed, 0, static_cast<std::size_t>(header.bytes));
  float* words = reinterpret_cast<float*>(static_cast<char*>(packed) + kHeaderBytes);
  const VitBlockLayout l = vit_block_layout(n, isa);
  const std::int64_t dim = vit_padded_dim(n), inner = n.heads * dim, narrow = n.heads * n.head_dim;
  words[l.epsilon1] = w.epsilon1;
  words[l.epsilon2] = w.epsilon2;
  pack_norm(w.norm1, w.norm1_bias, n.width, words + l.norm1);
  pack_norm(w.norm2, w.norm2_bias, n.width, words + l.norm2);
  // The kernel raises 2 to the scores.
  const float scale = static_cast<float>(kLog2E / std::sqrt(static_cast<double>(n.head_dim)));
  for (std::int64_t part = 0; part < 3; ++part) {
    for (std::int64_t i = 0; i < inner; ++i) {
      const std::int64_t from = part * narrow + i / dim * n.head_dim + i % dim;
      const float gain = part == 0 ? scale : 1.f;
      words[l.qkv_gain + part * inner + i] = gain;
      words[l.qkv_bias + part * inner + i] = w.qkv_bias && i % dim < n.head_dim ? gain * w.qkv_bias[from] : 0.f;
    }
  }
  pack_matrix(n.width, 3 * inner, isa, words + l.qkv, [&](std::int64_t out, std::int64_t k) {
    const std::int64_t part = out / inner, i = out % inner;
    if (i % dim >= n.head_dim) return 0.f;
    return w.qkv[(part * narrow + i / dim * n.head_dim + i % dim) * n.width + k];
  });
  pack_matrix(inner, n.width, isa, words + l.proj, [&](std::int64_t out, std::int64_t k) {
    return k % dim < n.head_dim ? w.proj[out * narrow + k / dim * n.head_dim + k % dim] : 0.f;
  });
  pack_matrix(n.width, n.hidden, isa, words + l.fc1,
              [&](std::int64_t out, std::int64_t k) { return w.fc1[out * n.width + k]; });
  pack_matrix(n.hidden, n.width, isa, words + l.fc2,
              [&](std::int64_t out, std::int64_t k) { return w.fc2[out * n.hidden + k]; });
  pack_vector(w.fc1_bias, n.hidden, 0.f, words + l.fc1_bias);
  pack_vector(w.gain1, n.width, 1.f, words + l.proj_gain);
  pack_vector(w.gain2, n.width, 1.f, words + l.fc2_gain);
  for (std::int64_t i = 0; i < n.width; ++i) {
    words[l.proj_bias + i] = w.proj_bias ? words[l.proj_gain + i] * w.proj_bias[i] : 0.f;
    words[l.fc2_bias + i] = w.fc2_bias ? words[l.fc2_gain + i] * w.fc2_bias[i] : 0.f;
  }
  std::memcpy(packed, &header, sizeof header);
}

void vit_pack_linear(const VitLinearWeights& w, std::int64_t inputs, std::int64_t outputs, CpuIsa isa, void* packed,
                     std::int64_t bytes) {
  const Header header = linear_header(inputs, outputs, isa);
  check_room(packed, bytes, header);
  if (!w.matrix) refuse("a weight address is null");
  std::memset(packed, 0, static_cast<std::size_t>(header.bytes));
  float* words = reinterpret_cast<float*>(static_cast<char*>(packed) + kHeaderBytes);
  const VitLinearLayout l = vit_linear_layout(inputs, outputs, isa);
  words[l.epsilon] = w.epsilon;
  pack_norm(w.norm, w.norm_bias, inputs, words + l.norm);
  pack_vector(w.bias, outputs, 0.f, words + l.bias);
  pack_matrix(inputs, outputs, isa, words + l.matrix,
              [&](std::int64_t out, std::int64_t k) { return w.matrix[out * inputs + k]; });
  std::memcpy(packed, &header, sizeof header);
}

void vit_run(VitCall call, const VitPacked& head, const std::vector<VitPacked>& blocks, const VitPacked& tail,
             CpuIsa isa) {
  check_sizes(call.sizes);
  call.depth = static_cast<std::int64_t>(blocks.size());
  if (call.batch < 0 || call.tokens < 1 || call.skipped < 0 || call.skipped > call.tokens || call.threads < 1) {
    refuse("batch and skipped must be >= 0, tokens and threads >= 1, skipped <= tokens, got batch=" +
           std::to_string(call.batch) + ", tokens=" + std::to_string(call.tokens) +
           ", skipped=" + std::to_string(call.skipped) + ", threads=" + std::to_string(call.threads));
  }
  const std::int64_t widest = 64 * (call.sizes.width + 6 * call.sizes.heads * vit_padded_dim(call.sizes) +
                                    call.sizes.hidden + call.tail_width + kMaxChannels);
  if (call.tokens > std::numeric_limits<std::int64_t>::max() / widest / (call.batch + 1)) {
    refuse("the sizes overflow 64-bit addressing");
  }
  if (!call.x) {
    const VitImages& im = call.images;
    const bool small = im.patch < 1 || im.patch > 256 || im.stride < 1 || im.rows < 1 || im.columns < 1 ||
                       im.height < im.patch || im.width < im.patch;
    if (small || (im.rows - 1) > (im.height - im.patch) / im.stride ||
        (im.columns - 1) > (im.width - im.patch) / im.stride || call.prefix < 0 ||
        call.tokens != call.prefix + im.rows * im.columns) {
      refuse("a grid of " + std::to_string(im.rows) + " x " + std::to_string(im.columns) + " patches of " +
             std::to_string(im.patch) + ", " + std::to_string(im.stride) + " apart, and " +
             std::to_string(call.prefix) + " other tokens do not make " + std::to_string(call.tokens) +
             " tokens of an image of " + std::to_string(im.height) + " x " + std::to_string(im.width) + " pixels");
    }
    call.head = unpack(head, linear_header(3 * im.patch * im.patch, call.sizes.width, isa), "the patch embedding");
    call.head_layout = vit_linear_layout(3 * im.patch * im.patch, call.sizes.width, isa);
  }
  std::vector<const float*> addresses;
  for (const VitPacked& block : blocks) addresses.push_back(unpack(block, block_header(call.sizes, isa), "a block"));
  call.blocks = addresses.data();
  call.layout = vit_block_layout(call.sizes, isa);
  if (tail.data) {
    call.tail = unpack(tail, linear_header(call.sizes.width, call.tail_width, isa), "the last projection");
    call.tail_layout = vit_linear_layout(call.sizes.width, call.tail_width, isa);
  }
  if (call.batch == 0 || call.skipped == call.tokens) return;
  if (!call.y ||
      (!call.x && (!call.images.data || !call.images.position || (call.prefix > 0 && !call.images.prefix)))) {
    refuse("the address of the tokens, the images, their position or the result is null");
  }
  HalfKernels::of(isa).run(call);
  trim_scratch();
}

}  // namespace lift_fast
