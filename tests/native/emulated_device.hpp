// Runs a CUDA kernel's own source on the CPU: the threads of a block are fibers, the instructions of
// csrc/cuda/tensor_core.cuh plain functions with the layouts that the PTX manual gives. A warp's instruction waits for
// all its lanes, as the hardware does; warps run in an order that the test chooses, so that a missing barrier shows,
// and asynchronous copies arrive as early or as late as the program allows.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define LIFT_FAST_GRID_CONSTANT
#define LIFT_FAST_DYNAMIC_SHARED(name) unsigned char* name = ::emulated::block().shared

struct alignas(16) uint4 {
  std::uint32_t x, y, z, w;
};
struct alignas(8) uint2 {
  std::uint32_t x, y;
};
inline uint4 make_uint4(std::uint32_t x, std::uint32_t y, std::uint32_t z, std::uint32_t w) { return {x, y, z, w}; }
inline uint2 make_uint2(std::uint32_t x, std::uint32_t y) { return {x, y}; }
struct alignas(16) float4 {
  float x, y, z, w;
};
struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};

#if defined(__SANITIZE_ADDRESS__)
extern "C" void __asan_unpoison_memory_region(const volatile void*, std::size_t);
#endif

namespace emulated {

[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "emulated device: %s\n", what);
  std::abort();
}

// Early: a copy is done where it is issued. Late: where the program waits for it.
enum class Copies { early, late };
enum class Order { ascending, descending, random };

constexpr int kLanes = 32;

struct Copy {
  void* to;
  const void* from;
  bool valid;
};

struct Thread {
  ucontext_t context;
  bool done = false;
  std::vector<std::vector<Copy>> groups;  // committed copies that have not arrived, oldest first
  std::vector<Copy> open;
};

// The lanes' inputs of an instruction that a warp executes together.
struct Warp {
  int arrived = 0, kind = 0;
  long turn = 0;
  std::uint32_t in[kLanes][6];
  float c[kLanes][4];
  std::uint32_t out[kLanes];
  float d[kLanes][4];
};

struct Block {
  unsigned char* shared = nullptr;
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  ucontext_t scheduler;
  int current = 0, at_barrier = 0;
  long barriers = 0;
  Copies copies = Copies::early;
  std::function<void()> body;
};

inline Block*& block_pointer() {
  static Block* pointer = nullptr;
  return pointer;
}
inline Block& block() { return *block_pointer(); }

inline dim3 thread_index, block_index, block_size;

inline void yield() {
  Block& b = block();
  Thread& self = b.threads[static_cast<std::size_t>(b.current)];
  swapcontext(&self.context, &b.scheduler);
}

inline void enter() {
  Block& b = block();
  b.body();
  Thread& self = b.threads[static_cast<std::size_t>(b.current)];
  for (const auto& group : self.groups) {
    if (!group.empty()) fail("a thread ended before its copies arrived");
  }
  self.done = true;
  swapcontext(&self.context, &b.scheduler);
}

inline void arrive(const Copy& copy) {
  if (copy.valid) {
    std::memcpy(copy.to, copy.from, 16);
  } else {
    std::memset(copy.to, 0, 16);
  }
}

// All lanes of the warp meet here; the last one to arrive executes `together`.
template <class F>
void meet(int kind, F together) {
  Block& b = block();
  Warp& warp = b.warps[static_cast<std::size_t>(b.current / kLanes)];
  if (warp.arrived == 0) warp.kind = kind;
  if (warp.kind != kind) fail("lanes of a warp execute different instructions together");
  if (++warp.arrived == kLanes) {
    together(warp);
    warp.arrived = 0;
    ++warp.turn;
    return;
  }
  const long turn = warp.turn;
  while (warp.turn == turn) yield();
}

inline int lane() { return block().current % kLanes; }

// Runs one block of `warps` warps. Shared memory is full of NaN before, and a heap block of its exact size.
inline void run_block(int index, int warps, std::size_t shared_bytes, Copies copies, Order order, unsigned seed,
                      const std::function<void()>& body) {
  Block b;
  block_pointer() = &b;
  void* memory = nullptr;
  if (posix_memalign(&memory, 16, shared_bytes) != 0) fail("no memory");
  auto* shared = static_cast<unsigned char*>(memory);
  std::memset(shared, 0xff, shared_bytes);
  b.shared = shared;
  b.copies = copies;
  b.body = body;
  const int count = warps * kLanes;
  b.threads.resize(static_cast<std::size_t>(count));
  b.warps.resize(static_cast<std::size_t>(warps));
  block_index.x = static_cast<unsigned>(index);
  block_size.x = static_cast<unsigned>(count);
  constexpr std::size_t kStack = 128 << 10;
  // Kept for the next blocks.
  static std::vector<std::unique_ptr<char[]>> stacks;
  while (stacks.size() < b.threads.size()) stacks.emplace_back(new char[kStack]);
  for (Thread& thread : b.threads) {
    char* const stack = stacks[static_cast<std::size_t>(&thread - b.threads.data())].get();
#if defined(__SANITIZE_ADDRESS__)
    // From a thread that ended without leaving its last function.
    __asan_unpoison_memory_region(stack, kStack);
#endif
    getcontext(&thread.context);
    thread.context.uc_stack.ss_sp = stack;
    thread.context.uc_stack.ss_size = kStack;
    thread.context.uc_link = nullptr;
    makecontext(&thread.context, enter, 0);
  }
  std::vector<int> sequence(static_cast<std::size_t>(warps));
  for (int i = 0; i < warps; ++i) sequence[static_cast<std::size_t>(i)] = i;
  if (order == Order::descending) std::reverse(sequence.begin(), sequence.end());
  std::mt19937 random(seed);
  int left = count;
  while (left > 0) {
    const int before = left;
    const long barriers = b.barriers;
    if (order == Order::random) std::shuffle(sequence.begin(), sequence.end(), random);
    for (int warp : sequence) {
      // Runs this warp until it waits for the others.
      for (bool moved = true; moved;) {
        moved = false;
        const long turn = b.warps[static_cast<std::size_t>(warp)].turn;
        for (int i = 0; i < kLanes; ++i) {
          b.current = warp * kLanes + i;
          Thread& thread = b.threads[static_cast<std::size_t>(b.current)];
          if (thread.done) continue;
          thread_index.x = static_cast<unsigned>(b.current);
          swapcontext(&b.scheduler, &thread.context);
          if (thread.done) --left;
        }
        moved = b.warps[static_cast<std::size_t>(warp)].turn != turn;
      }
    }
    if (left == before && b.barriers == barriers)
      fail("the block is stuck: some lanes wait for lanes that never arrive");
  }
  std::free(shared);
}

struct Settings {
  Copies copies;
  Order order;
  std::int64_t seed;
};

// Runs a kernel's blocks one after the other.
inline void run_blocks(std::int64_t blocks, int warps, std::int64_t shared_bytes, const Settings& settings,
                       const std::function<void()>& kernel) {
  for (std::int64_t block = 0; block < blocks; ++block) {
    run_block(static_cast<int>(block), warps, static_cast<std::size_t>(shared_bytes), settings.copies, settings.order,
              static_cast<unsigned>(settings.seed + block), kernel);
  }
}

// An array of the device: a heap block of its exact size, full of NaN.
class Array {
 public:
  explicit Array(std::int64_t bytes) : bytes_(bytes), data_(std::malloc(static_cast<std::size_t>(bytes))) {
    std::memset(data_, 0xff, static_cast<std::size_t>(bytes));
  }
  ~Array() { std::free(data_); }
  Array(const Array&) = delete;
  std::int64_t bytes() const { return bytes_; }
  // Null where it is empty.
  template <class T>
  T* as() const {
    return bytes_ == 0 ? nullptr : static_cast<T*>(data_);
  }

 private:
  std::int64_t bytes_;
  void* data_;
};

inline float bf16(std::uint32_t bits) {
  const std::uint32_t wide = (bits & 0xffffu) << 16;
  float value;
  std::memcpy(&value, &wide, 4);
  return value;
}

inline std::uint32_t to_bf16(float value) {
  if (value != value) return 0x7fff;
  std::uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
}

inline float f16(std::uint32_t bits) {
  const int exponent = (bits >> 10) & 31, fraction = bits & 1023;
  const float sign = bits & 0x8000u ? -1.0f : 1.0f;
  if (exponent == 31) return fraction ? NAN : sign * INFINITY;
  return sign * (exponent ? std::ldexp(1.0f + static_cast<float>(fraction) / 1024, exponent - 15)
                          : std::ldexp(static_cast<float>(fraction), -24));
}

inline std::uint32_t to_f16(float value) {
  if (value != value) return 0x7fff;
  const std::uint32_t sign = std::signbit(value) ? 0x8000u : 0u;
  const double size = std::fabs(static_cast<double>(value));
  if (size >= 65520.0) return sign | 0x7c00u;
  int exponent = size < std::ldexp(1.0, -14) ? -14 : std::ilogb(size);
  // nearbyint rounds to nearest, ties to even.
  double steps = std::nearbyint(std::ldexp(size, 10 - exponent));
  if (steps >= 2048) {
    steps /= 2;
    ++exponent;
  }
  const auto whole = static_cast<std::uint32_t>(steps);
  return sign | (whole >= 1024 ? (static_cast<std::uint32_t>(exponent + 15) << 10) | (whole - 1024) : whole);
}

inline float as_float(std::uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

inline std::uint32_t as_bits(float value) {
  std::uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}

// One product of a warp: k values of row and column as `element(word, half)` reads them.
template <class Element>
void product(int kind, float (&d)[4], const std::uint32_t (&a)[4], std::uint32_t b0, std::uint32_t b1,
             const float (&c)[4], int per_word, Element element) {
  Block& b = block();
  Warp& warp = b.warps[static_cast<std::size_t>(b.current / kLanes)];
  const int me = lane();
  for (int i = 0; i < 4; ++i) {
    warp.in[me][i] = a[i];
    warp.c[me][i] = c[i];
  }
  warp.in[me][4] = b0;
  warp.in[me][5] = b1;
  meet(kind, [&](Warp& w) {
    const int half = 4 * per_word, depth = 2 * half;
    float x[16][16], y[8][16];
    for (int k = 0; k < depth; ++k) {
      const int t = k % half / per_word, part = k % per_word;
      for (int i = 0; i < 16; ++i) x[i][k] = element(w.in[i % 8 * 4 + t][k / half * 2 + i / 8], part);
      for (int i = 0; i < 8; ++i) y[i][k] = element(w.in[i * 4 + t][4 + k / half], part);
    }
    for (int row = 0; row < 16; ++row) {
      for (int column = 0; column < 8; ++column) {
        const int owner = row % 8 * 4 + column / 2, slot = row / 8 * 2 + column % 2;
        double sum = w.c[owner][slot];
        for (int k = 0; k < depth; ++k) sum += static_cast<double>(x[row][k]) * y[column][k];
        w.d[owner][slot] = static_cast<float>(sum);
      }
    }
  });
  for (int i = 0; i < 4; ++i) d[i] = warp.d[me][i];
}

}  // namespace emulated

#define threadIdx (::emulated::thread_index)
#define blockIdx (::emulated::block_index)
#define blockDim (::emulated::block_size)

inline void __syncwarp() {
  emulated::meet(1, [](emulated::Warp&) {});
}

inline void __syncthreads() {
  using namespace emulated;
  __syncwarp();
  Block& b = block();
  const long barrier = b.barriers;
  if (++b.at_barrier == static_cast<int>(b.threads.size())) {
    b.at_barrier = 0;
    ++b.barriers;
    return;
  }
  while (b.barriers == barrier) yield();
}

namespace lift_fast {

using std::max;
using std::min;

inline void mma_bf16(float (&d)[4], const std::uint32_t (&a)[4], std::uint32_t b0, std::uint32_t b1,
                     const float (&c)[4]) {
  emulated::product(2, d, a, b0, b1, c, 2, [](std::uint32_t w, int part) { return emulated::bf16(w >> (16 * part)); });
}

inline void mma_f16(float (&d)[4], const std::uint32_t (&a)[4], std::uint32_t b0, std::uint32_t b1,
                    const float (&c)[4]) {
  emulated::product(3, d, a, b0, b1, c, 2,
                    [](std::uint32_t w, int part) { return emulated::f16((w >> (16 * part)) & 0xffffu); });
}

// The hardware ignores the lowest 13 bits.
inline void mma_tf32(float (&d)[4], const std::uint32_t (&a)[4], std::uint32_t b0, std::uint32_t b1,
                     const float (&c)[4]) {
  emulated::product(4, d, a, b0, b1, c, 1, [](std::uint32_t w, int) { return emulated::as_float(w & 0xffffe000u); });
}

inline float max_nan(float a, float b) { return a != a || b != b ? NAN : std::max(a, b); }

inline std::uint32_t relu_bf16x2(float low, float high) {
  return emulated::to_bf16(max_nan(low, 0.0f)) | emulated::to_bf16(max_nan(high, 0.0f)) << 16;
}

inline std::uint32_t relu_f16x2(float low, float high) {
  return emulated::to_f16(max_nan(low, 0.0f)) | emulated::to_f16(max_nan(high, 0.0f)) << 16;
}

inline std::uint32_t round_tf32(std::uint32_t bits) {
  const float value = emulated::as_float(bits);
  return value != value || std::isinf(value) ? bits : (bits + 0x1000u) & 0xffffe000u;
}

inline std::uint32_t float_bits(float value) { return emulated::as_bits(value); }
inline float bits_float(std::uint32_t bits) { return emulated::as_float(bits); }

inline std::uint32_t select_bytes(std::uint32_t low, std::uint32_t high, std::uint32_t selector) {
  std::uint32_t result = 0;
  for (int i = 0; i < 4; ++i) {
    const std::uint32_t from = (selector >> (4 * i)) & 7u;
    result |= (((from < 4 ? low : high) >> (8 * (from % 4))) & 0xffu) << (8 * i);
  }
  return result;
}

inline std::uint32_t shuffle_up(std::uint32_t value, unsigned lanes) {
  using namespace emulated;
  Block& b = block();
  Warp& warp = b.warps[static_cast<std::size_t>(b.current / kLanes)];
  const int me = lane(), by = static_cast<int>(lanes);
  warp.in[me][0] = value;
  meet(5, [&](Warp& w) {
    for (int i = 0; i < kLanes; ++i) w.out[i] = w.in[i < by ? i : i - by][0];
  });
  return warp.out[me];
}

inline float as_float(int bits) { return emulated::as_float(static_cast<std::uint32_t>(bits)); }
inline int as_int(float value) { return static_cast<int>(emulated::as_bits(value)); }
inline float multiply_add(float a, float b, float c) { return std::fma(a, b, c); }
inline int count_bits(unsigned bits) { return __builtin_popcount(bits); }
inline int lowest_bit(unsigned bits) { return __builtin_ctz(bits); }

// One number for all lanes, from one of each.
template <class F>
std::uint32_t vote(int kind, std::uint32_t value, F together) {
  using namespace emulated;
  Block& b = block();
  Warp& warp = b.warps[static_cast<std::size_t>(b.current / kLanes)];
  const int me = lane();
  warp.in[me][0] = value;
  meet(kind, [&](Warp& w) {
    const std::uint32_t result = together(w);
    for (std::uint32_t& out : w.out) out = result;
  });
  return warp.out[me];
}

inline int warp_max(int value) {
  return static_cast<int>(vote(6, static_cast<std::uint32_t>(value), [](emulated::Warp& w) {
    int most = static_cast<int>(w.in[0][0]);
    for (const auto& in : w.in) most = std::max(most, static_cast<int>(in[0]));
    return static_cast<std::uint32_t>(most);
  }));
}

inline int warp_min(int value) { return ~warp_max(~value); }

inline unsigned ballot(bool holds) {
  return vote(7, holds, [](emulated::Warp& w) {
    std::uint32_t bits = 0;
    for (int i = 0; i < emulated::kLanes; ++i) bits |= w.in[i][0] << i;
    return bits;
  });
}

inline int shuffle(int value, int lane) {
  using namespace emulated;
  Block& b = block();
  Warp& warp = b.warps[static_cast<std::size_t>(b.current / kLanes)];
  const int me = emulated::lane();
  if (lane < 0 || lane >= kLanes) fail("a shuffle from a lane that does not exist");
  warp.in[me][0] = static_cast<std::uint32_t>(value);
  warp.in[me][1] = static_cast<std::uint32_t>(lane);
  meet(8, [&](Warp& w) {
    for (int i = 0; i < kLanes; ++i) w.out[i] = w.in[w.in[i][1]][0];
  });
  return static_cast<int>(warp.out[me]);
}

inline int atomic_add(int* to, int value) {
  const int before = *to;
  *to += value;
  return before;
}

inline void copy_async(void* shared, const void* global, bool valid) {
  using namespace emulated;
  if (reinterpret_cast<std::uintptr_t>(shared) % 16 || reinterpret_cast<std::uintptr_t>(global) % 16) {
    fail("an asynchronous copy is not aligned");
  }
  Block& b = block();
  if (b.copies == Copies::early) return arrive({shared, global, valid});
  b.threads[static_cast<std::size_t>(b.current)].open.push_back({shared, global, valid});
}

inline void commit_copies() {
  emulated::Thread& self = emulated::block().threads[static_cast<std::size_t>(emulated::block().current)];
  self.groups.push_back(std::move(self.open));
  self.open.clear();
}

template <int pending>
void wait_copies() {
  emulated::Thread& self = emulated::block().threads[static_cast<std::size_t>(emulated::block().current)];
  while (self.groups.size() > static_cast<std::size_t>(pending)) {
    for (const emulated::Copy& copy : self.groups.front()) emulated::arrive(copy);
    self.groups.erase(self.groups.begin());
  }
}

}  // namespace lift_fast
