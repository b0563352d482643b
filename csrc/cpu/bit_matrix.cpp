#include "bit_matrix.hpp"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>

#include "dispatch.hpp"
#include "memory.hpp"

namespace lift_fast {
namespace {

// One thread's least work.
constexpr std::int64_t kThreadWords = 1 << 18;

void require(bool holds, const std::string& what) {
  if (!holds) throw std::invalid_argument("bit_matrix: " + what);
}

void check(std::int64_t n, int threads) {
  // A matrix of 2^30 rows has 2^57 bytes: its addresses do not overflow.
  require(n >= 1 && n <= std::int64_t{1} << 30, "the number of nodes must lie in 1 .. 2^30, got " + std::to_string(n));
  require(threads >= 1, "threads must be at least 1, got " + std::to_string(threads));
}

// Transposes: bit j of word i becomes bit i of word j, by exchanging ever smaller quarters.
void transpose(std::uint64_t block[64]) {
  std::uint64_t mask = 0x00000000ffffffffull;
  for (int half = 32; half != 0; half >>= 1, mask ^= mask << half) {
    for (int i = 0; i < 64; i = ((i | half) + 1) & ~half) {
      const std::uint64_t swapped = ((block[i] >> half) ^ block[i | half]) & mask;
      block[i] ^= swapped << half;
      block[i | half] ^= swapped;
    }
  }
}

}  // namespace

void bit_matrix_set_rows(const float* similarity, std::int64_t start, std::int64_t rows, std::int64_t n, float tau,
                         std::uint64_t* bits, int threads) {
  check(n, threads);
  require(start >= 0 && start % 64 == 0 && rows >= 1 && rows <= n - start,
          "rows " + std::to_string(start) + " + " + std::to_string(rows) + " of " + std::to_string(n) +
              "; expected a start that is a multiple of 64");
  require(similarity != nullptr && bits != nullptr, "similarity and bits must not be null");
  const std::int64_t words = (n + 63) / 64, stop = start + rows, tile_rows = (rows + 63) / 64, stride = stop;
  // Tiles share no words of the upper triangle.
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1)
  for (std::int64_t tile_row = 0; tile_row < tile_rows; ++tile_row) {
    const std::int64_t first = start + 64 * tile_row, count = std::min<std::int64_t>(64, stop - first);
    for (std::int64_t tile = 0; 64 * tile <= first; ++tile) {
      std::uint64_t block[64] = {};
      const bool diagonal = 64 * tile == first;
      for (std::int64_t i = 0; i < count; ++i) {
        const float* values = similarity + (first - start + i) * stride + 64 * tile;
        const std::int64_t columns = diagonal ? i + 1 : 64;
        std::uint64_t word = 0;
        for (std::int64_t j = 0; j < columns; ++j) word |= static_cast<std::uint64_t>(values[j] > tau) << j;
        block[i] = word;
      }
      if (diagonal) {
        std::uint64_t mirrored[64];
        std::memcpy(mirrored, block, sizeof block);
        transpose(mirrored);
        for (std::int64_t i = 0; i < 64; ++i) bits[(first + i) * words + tile] = block[i] | mirrored[i];
      } else {
        for (std::int64_t i = 0; i < 64; ++i) bits[(first + i) * words + tile] = block[i];
        transpose(block);
        for (std::int64_t i = 0; i < 64; ++i) bits[(64 * tile + i) * words + first / 64] = block[i];
      }
    }
  }
}

void bit_matrix_multiply(const std::uint64_t* bits, std::int64_t n, const double* vector, double* out, int threads,
                         CpuIsa isa) {
  check(n, threads);
  require(bits != nullptr && vector != nullptr && out != nullptr, "bits, vector and out must not be null");
  BitMultiplyCall call{};
  call.bits = bits;
  call.n = n;
  call.words = (n + 63) / 64;
  const Memory<double> padded = allocate<double>(64 * call.words);
  std::memcpy(padded.get(), vector, static_cast<std::size_t>(n) * sizeof(double));
  std::fill(padded.get() + n, padded.get() + 64 * call.words, 0.0);
  call.vector = padded.get();
  call.out = out;
  // For work of a millisecond, waiting for a second thread costs more than that thread saves.
  call.threads = static_cast<int>(std::min<std::int64_t>(threads, 1 + n / 64 * n / kThreadWords));
  Kernels<BitMultiplyKernel>::of(isa).run(call);
}

}  // namespace lift_fast
