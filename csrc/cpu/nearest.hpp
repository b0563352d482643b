// Fused cosine similarity and top-k: for each query row its most similar key rows, without the matrix of similarities.
//
// Two steps make it exact at the speed of short operands. The search multiplies all pairs, in bfloat16 or in integers
// of 16 bits if the CPU multiplies these faster, and keeps the keys within a proven rounding bound of the k-th best.
// The rescoring computes the similarities of these few pairs again from the float32 rows.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#include "isa.hpp"
#include "stop.hpp"

namespace lift_fast {

// Every query keeps this many running matches in the cache.
constexpr std::int64_t kMostNeighbours = 128;

struct NearestCall {
  const float* query;  // [batch, n, c]
  const float* key;    // [batch, m, c]
  std::int64_t batch, n, m, c;
  bool normalize;
  bool rescore;         // false: similarities and order are the search's
  std::int64_t k;
  float* similarity;    // [batch, n, k], descending
  std::int64_t* index;  // [batch, n, k]
  std::int64_t* back;   // [batch, n] or null: the query that is most similar to the best key
  int threads;
  Stop* stop;           // or null
};

// The kernel of an instruction set; "auto" searches in the shortest numbers that this CPU multiplies faster than
// float32. Throws std::invalid_argument for an unknown name or a set that this CPU does not have.
CpuIsa nearest_isa(const std::string& name);
// The type that a set's kernel searches in.
Numbers nearest_search(CpuIsa isa);

// Working memory: a copy of one batch's keys in the search's type, and at most 16 MiB for the reverse direction. Throws
// std::invalid_argument for sizes out of range, std::bad_alloc. If it is stopped, the outputs are undefined.
void nearest_run(NearestCall call, CpuIsa isa);

// A query row's running matches.
struct NearestCandidates {
  float* top;           // [k] largest similarities of the search, descending
  std::int32_t* place;  // [k] their keys
  float* found;         // [room] similarities of the search that may belong to the k best
  std::int32_t* key;    // [room] their keys, ascending
  float* best;          // [k] rescored similarities, descending
  std::int32_t* where;  // [k] their keys
};

// Layout of a thread's working memory; byte offsets, multiples of 64.
struct NearestScratch {
  std::int64_t room;  // candidates of one query before they are rescored
  std::int64_t packed, thresholds, factors, shifts, bounds, steps, counts, top, place, found, key, best, where, end;
};

// What nearest_run prepares for a kernel in addition to the call.
struct NearestWork {
  std::int64_t task_panels;   // panels of queries that a thread keeps in its L2 cache
  std::int64_t group_panels;  // panels of queries that share one maximum per key; a divisor or multiple of the above
  std::int64_t padded_keys;
  float* packed_keys;  // words of the search's type
  float* query_centre;  // [c]
  float* key_centre;  // [c]
  float* key_bias;  // [padded_keys]
  float* key_steps;  // [padded_keys]: the value of one unit of a packed key
  double* query_norms;  // [n], NaN for a row that takes no part
  double* key_norms;  // [m]
  float* group_best;  // [groups, padded_keys] or null
  float* wanted;  // [m]: similarity of the best query that chose the key so far; with back
  std::int64_t* key_back;  // [m], with back
  NearestScratch layout;
  char* scratch;  // layout.end bytes for each thread
};

// How it cuts the work, which gives the sizes of its working memory, and the type that it searches in.
struct NearestKernel {
  std::int64_t query_rows;  // queries of a micro-kernel
  std::int64_t key_rows;  // keys of a micro-kernel
  std::int64_t channels_per_word;
  Numbers search;
  void (*run)(const NearestCall& call, const NearestWork& work);
};

}  // namespace lift_fast
