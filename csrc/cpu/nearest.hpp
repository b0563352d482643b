// Fused cosine similarity and argmax: for each query row its most similar key row, without the matrix of similarities.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#include "isa.hpp"

namespace lift_fast {

struct NearestCall {
  const float* query;  // [batch, n, c]
  const float* key;    // [batch, m, c]
  std::int64_t batch, n, m, c;
  bool normalize;
  float* similarity;           // [batch, n]
  std::int64_t* index;         // [batch, n]
  float* second;               // [batch, n] or null
  float* reverse_similarity;   // [batch, m] or null
  std::int64_t* reverse_index; // [batch, m], with reverse_similarity
  int threads;
  // Working memory, set by nearest_run: the packed keys of the whole batch, and one stretch for each thread.
  float* packed_keys;
  char* scratch;
  std::int64_t scratch_bytes;  // of each thread
};

// How an instruction set's kernel cuts the work up; the sizes of its working memory follow from it.
struct NearestTiling {
  std::int64_t query_rows;    // queries of a micro-kernel
  std::int64_t key_rows;      // keys of a micro-kernel
  std::int64_t query_panels;  // micro-kernel panels of queries that one task keeps in the L2 cache
};

// Working memory is O((n + m) * c) at most. Throws std::invalid_argument for sizes out of range, std::bad_alloc.
void nearest_run(NearestCall call, CpuIsa isa);

// One per translation unit.
NearestTiling nearest_tiling_baseline();
NearestTiling nearest_tiling_avx2();
NearestTiling nearest_tiling_avx512();
void nearest_kernel_baseline(const NearestCall& call);
void nearest_kernel_avx2(const NearestCall& call);
void nearest_kernel_avx512(const NearestCall& call);

// One thread's working memory, shared between its sizing and its use. Byte offsets, multiples of 64.
struct NearestScratch {
  std::int64_t packed_queries, best, second, group, reverse_best, reverse_index, end;
  NearestScratch(const NearestTiling& tiling, std::int64_t lanes, std::int64_t c, std::int64_t padded_keys,
                 bool reverse) {
    const std::int64_t rows = tiling.query_rows * tiling.query_panels;
    const auto align = [](std::int64_t bytes) { return (bytes + 63) / 64 * 64; };
    packed_queries = 0;
    best = packed_queries + align(rows * c * 4);
    second = best + align(rows * lanes * 4);
    group = second + align(rows * lanes * 4);
    reverse_best = group + align(rows * lanes * 4);
    reverse_index = reverse_best + (reverse ? align(padded_keys * 4) : 0);
    end = reverse_index + (reverse ? align(padded_keys * 4) : 0);
  }
};

}  // namespace lift_fast
