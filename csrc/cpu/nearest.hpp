// Fused cosine similarity and top-k: for each query row its most similar key rows, without the matrix of similarities.
//
// Two steps make it exact at the speed of short operands. The search multiplies all pairs, in bfloat16 or in integers
// of 16 bits where the CPU multiplies these faster, and keeps the keys that come within a proven rounding bound of the
// k-th best. The verdict takes the similarity of those few pairs anew from the float32 rows.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#include "isa.hpp"
#include "stop.hpp"

namespace lift_fast {

// Every query holds so many running matches in the cache.
constexpr std::int64_t kMostNeighbours = 128;

struct NearestCall {
  const float* query;  // [batch, n, c]
  const float* key;    // [batch, m, c]
  std::int64_t batch, n, m, c;
  bool normalize;
  bool rescore;         // false: similarities and order as the search has them
  std::int64_t k;
  float* similarity;    // [batch, n, k], descending
  std::int64_t* index;  // [batch, n, k]
  std::int64_t* back;   // [batch, n] or null: the query that is most similar to the best key
  int threads;
  Stop* stop;           // or null
};

// The kernel for a CPU's instruction set: "auto" searches in the shortest numbers that the CPU multiplies faster than
// float32. Throws std::invalid_argument for an unknown name or a set that this CPU lacks.
CpuIsa nearest_isa(const std::string& name);
// What a set's kernel searches in.
Numbers nearest_search(CpuIsa isa);

// Working memory: a copy of one batch's keys in the search's type, and at most 16 MiB for the reverse direction.
// Throws std::invalid_argument for sizes out of range, std::bad_alloc. Where it is stopped the outputs hold anything.
void nearest_run(NearestCall call, CpuIsa isa);

// A query row's running matches.
struct NearestCandidates {
  float* top;           // [k] largest similarities of the search, descending
  std::int32_t* place;  // [k] their keys
  float* found;         // [room] similarities of the search that may belong to the k best
  std::int32_t* key;    // [room] their keys, ascending
  float* best;          // [k] similarities of the verdict, descending
  std::int32_t* where;  // [k] their keys
};

// Where a thread's working memory holds what; byte offsets, multiples of 64.
struct NearestScratch {
  std::int64_t room;  // candidates of one query before they are judged
  std::int64_t packed, thresholds, factors, shifts, bounds, steps, counts, top, place, found, key, best, where, end;
};

// What nearest_run prepares for a kernel beside the call.
struct NearestWork {
  std::int64_t task_panels;   // panels of queries that a thread keeps in its L2 cache
  std::int64_t
      group_panels;  // panels of queries that share one maximum per key; divides or is a multiple of the former
  std::int64_t padded_keys;
  float* packed_keys;  // words of the search's type
  float* query_centre;        // [c]
  float* key_centre;          // [c]
  float* key_bias;            // [padded_keys]
  float* key_steps;           // [padded_keys]: what a packed number of the key stands for
  double* query_norms;        // [n], NaN for a row that takes no part
  double* key_norms;          // [m]
  float* group_best;          // [groups, padded_keys] or null
  float* wanted;              // [m]: similarity of the best query that chose the key so far; with back
  std::int64_t* key_back;     // [m], with back
  NearestScratch layout;
  char* scratch;              // layout.end bytes for each thread
};

// How it cuts the work up, from which the sizes of its working memory follow, and what it searches in.
struct NearestKernel {
  std::int64_t query_rows;  // queries of a micro-kernel
  std::int64_t key_rows;    // keys of a micro-kernel
  std::int64_t channels_per_word;
  Numbers search;
  void (*run)(const NearestCall& call, const NearestWork& work);
};

}  // namespace lift_fast
