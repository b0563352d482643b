#include "nearest.hpp"

#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <new>
#include <stdexcept>

namespace lift_fast {
namespace {

struct Free {
  void operator()(void* data) const { std::free(data); }
};

std::unique_ptr<void, Free> allocate(std::int64_t bytes) {
  const std::size_t rounded = (static_cast<std::size_t>(bytes) + 127) / 64 * 64;
  void* data = std::aligned_alloc(64, rounded);
  if (data == nullptr) throw std::bad_alloc();
  return std::unique_ptr<void, Free>(data);
}

NearestTiling tiling(CpuIsa isa) {
#if defined(__x86_64__)
  if (isa == CpuIsa::avx512) return nearest_tiling_avx512();
  if (isa == CpuIsa::avx2) return nearest_tiling_avx2();
#endif
  (void)isa;
  return nearest_tiling_baseline();
}

}  // namespace

void nearest_run(NearestCall call, CpuIsa isa) {
  if (call.batch < 0 || call.n < 0 || call.m < 0 || call.c < 0) {
    throw std::invalid_argument("nearest: sizes must not be negative");
  }
  // Rows are numbered in 32 bits inside the kernel.
  constexpr std::int64_t limit = std::numeric_limits<std::int32_t>::max() - 1024;
  if (call.n > limit || call.m > limit) {
    throw std::invalid_argument("nearest: at most 2^31 - 1025 rows each, got " + std::to_string(call.n) + " and " +
                                std::to_string(call.m));
  }
  if ((call.reverse_similarity == nullptr) != (call.reverse_index == nullptr)) {
    throw std::invalid_argument("nearest: reverse_similarity and reverse_index come together");
  }
  if (call.threads < 1) throw std::invalid_argument("nearest: threads must be at least 1");
  const std::int64_t queries = call.batch * call.n, all_keys = call.batch * call.m;
  if ((queries > 0 && (call.similarity == nullptr || call.index == nullptr)) ||
      (call.c > 0 && ((queries > 0 && call.query == nullptr) || (all_keys > 0 && call.key == nullptr)))) {
    throw std::invalid_argument("nearest: query, key, similarity and index must not be null");
  }
  // Padding is told from rows by its values: rows without channels become rows of one zero.
  std::unique_ptr<void, Free> zeros;
  if (call.c == 0) {
    const std::int64_t bytes = (queries > all_keys ? queries : all_keys) * 4;
    zeros = allocate(bytes);
    std::memset(zeros.get(), 0, static_cast<std::size_t>(bytes));
    call.query = call.key = static_cast<const float*>(zeros.get());
    call.c = 1;
  }

  const NearestTiling cut = tiling(isa);
  const std::int64_t padded_keys = (call.m + cut.key_rows - 1) / cut.key_rows * cut.key_rows;
  const std::int64_t query_panels = (call.n + cut.query_rows - 1) / cut.query_rows;
  if (query_panels < call.threads) call.threads = static_cast<int>(query_panels < 1 ? 1 : query_panels);
  // Both kernels run two vectors of keys side by side.
  const NearestScratch scratch(cut, cut.key_rows / 2, call.c, padded_keys, call.reverse_similarity != nullptr);
  const auto keys = allocate(padded_keys * call.c * 4);
  const auto each = allocate(scratch.end * call.threads);
  call.packed_keys = static_cast<float*>(keys.get());
  call.scratch = static_cast<char*>(each.get());
  call.scratch_bytes = scratch.end;
  switch (isa) {
#if defined(__x86_64__)
    case CpuIsa::avx512: nearest_kernel_avx512(call); return;
    case CpuIsa::avx2: nearest_kernel_avx2(call); return;
#endif
    default: nearest_kernel_baseline(call); return;
  }
}

}  // namespace lift_fast
