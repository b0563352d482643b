// Dense matching from similarities of coarse cells on a CUDA device: for each query pixel the key pixel whose
// bilinearly interpolated similarity is largest, the lowest row-major one among equals, and whether it leads back.
//
// A patch is the set of an image's pixels between the same four cells, a group the query pixels between the same four.
#pragma once

#include <cstdint>

namespace lift_fast {

// How one axis of an image is cut: strips of pixels between two neighbouring cells, or at one alone. The arrays lie on
// the device and are not checked: cells must ascend below `cells`, and strips must cover the pixels.
struct MatchAxis {
  std::int64_t cells, pixels, strips;
  const std::int32_t* low;  // [strips] cell on the near side
  const std::int32_t* high;  // [strips] cell on the far side; low itself where that has no weight
  const std::int32_t* first;  // [strips + 1] first pixel of each strip; the last is `pixels`
  const float* weight;  // [pixels] share of the far cell
  std::int64_t longest;  // pixels of the longest strip
};

struct MatchImage {
  MatchAxis y, x;
  // A positive factor of the similarities to each pixel; all null for ones.
  const float* scale;  // [y.pixels, x.pixels]
  const float* scale_high;  // [y.strips, x.strips] the largest of each patch
  const float* scale_low;
  const float* scale_rows;  // [y.pixels, x.strips] the largest of each strip's pixels in each row
  const float* spans;  // [y.strips, x.strips, span_words] of a MatchSpansCall
};

// With scales: what bounds the cosines in each patch of an image.
struct MatchSpansCall {
  const double* gram;  // products of the cells whose norms the scales divide by (CellProducts)
  MatchAxis y, x;
  const float* scale_high;  // as in MatchImage
  float* spans;  // [y.strips, x.strips, span_words], see PatchSpan
};

// The part of the query image whose cells a table holds: strips [first, end), and cells from (top, left) on.
struct MatchBand {
  std::int64_t first_y, end_y, first_x, end_x, top, left, width;
};

// Lets the device choose between two launches: the one with `wanted` == (*flag != 0) runs, the other does nothing.
struct MatchWhen {
  const std::int32_t* flag;  // on the device; null to run always
  bool wanted;
};

// Every query pixel of a band.
struct GroupMatchCall {
  const float* table;  // [rows, key cells] similarities of the band's query cells, row-major, `band.width` in a row
  std::int64_t rows;
  MatchImage key;
  MatchAxis query_y, query_x;
  MatchBand band;
  float* similarity;  // [query pixels]; -inf where there is no match
  std::int64_t* index;  // [query pixels] row-major key pixel; -1 where there is no match
  MatchWhen when;
};

// Single points, each with its own similarities.
struct PointMatchCall {
  const float* table;  // [points, key cells]
  std::int64_t points;
  MatchImage key;
  float* similarity;  // [points]
  std::int64_t* index;  // [points]
  MatchWhen when;
};

// Which matches lead back: the best query pixel of the matched key pixel is the one that was matched to it.
struct MutualMatchCall {
  const float* table;  // [query cells, key cells] similarities
  MatchImage query;  // with the scales of the query's pixels
  MatchAxis key_y, key_x;
  const std::int64_t* index;  // [query pixels] of a GroupMatchCall
  bool* valid;  // [query pixels]
  std::int32_t* scratch;  // match_scratch_words() of zeros
  std::int64_t scratch_words;
  MatchWhen when;
};

// Query pixels between the same four cells; each is compared with all of them.
constexpr std::int64_t kMostMutualGroup = 4096;
// Key cells; a row of similarities to all of them must fit into shared memory.
constexpr std::int64_t kMostMutualCells = 24000;
constexpr std::int64_t kCandidateWords = 8;

// Loads the kernels on a device; otherwise the first call does. Throws std::runtime_error if CUDA refuses.
void dense_match_prepare(int device);

// Each launches on `stream` of `device` and returns. Throws std::invalid_argument for impossible calls and
// std::runtime_error if CUDA refuses. Allocates nothing, waits for nothing, and keeps the current device.
void match_spans_run(const MatchSpansCall& call, int device, void* stream);
void match_groups_run(const GroupMatchCall& call, int device, void* stream);
void match_points_run(const PointMatchCall& call, int device, void* stream);
void match_mutual_run(const MutualMatchCall& call, int device, void* stream);

}  // namespace lift_fast
