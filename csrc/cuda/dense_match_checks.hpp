// Checks of a dense match on a CUDA device that need no device.
#pragma once

#include <cstdint>
#include <limits>
#include <stdexcept>
#include <string>

#include "dense_match.hpp"

namespace lift_fast {

[[noreturn]] inline void refuse_match(const std::string& what) { throw std::invalid_argument("dense_match: " + what); }

inline void check_match_pointer(const void* pointer, const std::string& name, std::uintptr_t alignment) {
  if (pointer == nullptr) refuse_match(name + " is null");
  if (reinterpret_cast<std::uintptr_t>(pointer) % alignment != 0) {
    refuse_match(name + " must be aligned to " + std::to_string(alignment) + " bytes");
  }
}

inline void check_match_axes(const MatchAxis& y, const MatchAxis& x, const std::string& name) {
  // Cells, strips and pixels are numbered in 32 bits; cells leave room for steps beyond the last one.
  constexpr std::int64_t kMost = std::numeric_limits<std::int32_t>::max() - 1, kMostCells = std::int64_t{1} << 30;
  for (const MatchAxis* axis : {&y, &x}) {
    if (axis->cells < 1 || axis->pixels < 1 || axis->strips < 1 || axis->longest < 1) {
      refuse_match(name + " needs cells, pixels and strips, got " + std::to_string(axis->cells) + ", " +
                   std::to_string(axis->pixels) + " and " + std::to_string(axis->strips));
    }
    if (axis->cells > kMostCells || axis->pixels > kMost) refuse_match(name + " is too large");
    // At most one strip between every two cells and one at each.
    if (axis->strips > axis->pixels || axis->strips > 2 * axis->cells - 1 || axis->longest > axis->pixels) {
      refuse_match(name + " cannot have " + std::to_string(axis->strips) + " strips of up to " +
                   std::to_string(axis->longest) + " pixels");
    }
    check_match_pointer(axis->low, name + " low", 4);
    check_match_pointer(axis->high, name + " high", 4);
    check_match_pointer(axis->first, name + " first", 4);
    check_match_pointer(axis->weight, name + " weight", 4);
  }
  if (y.pixels > kMost / x.pixels || y.cells > kMostCells / x.cells) {
    refuse_match(name + " must have at most 2^31 - 2 pixels and 2^30 cells");
  }
}

inline void check_match_image(const MatchImage& image, const std::string& name) {
  check_match_axes(image.y, image.x, name);
  if (image.scale == nullptr && image.scale_high == nullptr && image.scale_low == nullptr &&
      image.scale_rows == nullptr && image.spans == nullptr) {
    return;
  }
  check_match_pointer(image.scale, name + " scale", 4);
  check_match_pointer(image.scale_high, name + " scale_high", 4);
  check_match_pointer(image.scale_low, name + " scale_low", 4);
  check_match_pointer(image.scale_rows, name + " scale_rows", 4);
  check_match_pointer(image.spans, name + " spans", 16);
}

inline void check_match_when(const MatchWhen& when) {
  if (when.flag != nullptr) check_match_pointer(when.flag, "flag", 4);
}

// Throw std::invalid_argument if a pointer or a size is impossible.
inline void check_spans(const MatchSpansCall& call) {
  check_match_axes(call.y, call.x, "key");
  check_match_pointer(call.gram, "gram", 8);
  check_match_pointer(call.scale_high, "key scale_high", 4);
  check_match_pointer(call.spans, "key spans", 16);
}

inline void check_groups(const GroupMatchCall& call) {
  check_match_image(call.key, "key");
  check_match_axes(call.query_y, call.query_x, "query");
  const MatchBand& band = call.band;
  if (band.first_y < 0 || band.end_y <= band.first_y || band.end_y > call.query_y.strips || band.first_x < 0 ||
      band.end_x <= band.first_x || band.end_x > call.query_x.strips) {
    refuse_match("the band's strips [" + std::to_string(band.first_y) + ", " + std::to_string(band.end_y) + ") x [" +
                 std::to_string(band.first_x) + ", " + std::to_string(band.end_x) + ") are not in the query image");
  }
  if (band.top < 0 || band.left < 0 || band.width < 1 || band.left + band.width > call.query_x.cells ||
      band.top >= call.query_y.cells) {
    refuse_match("the band's cells are not in the query image");
  }
  if (call.rows < band.width || call.rows % band.width != 0 || call.rows / band.width > call.query_y.cells - band.top) {
    refuse_match("a table of " + std::to_string(call.rows) + " rows does not hold rows of " +
                 std::to_string(band.width) + " cells of the query image");
  }
  check_match_pointer(call.table, "table", 4);
  check_match_pointer(call.similarity, "similarity", 4);
  check_match_pointer(call.index, "index", 8);
  check_match_when(call.when);
}

inline void check_points(const PointMatchCall& call) {
  check_match_image(call.key, "key");
  if (call.points < 0 || call.points > std::numeric_limits<std::int32_t>::max()) {
    refuse_match("expected 0 to 2^31 - 1 points, got " + std::to_string(call.points));
  }
  if (call.points == 0) return;
  check_match_pointer(call.table, "table", 4);
  check_match_pointer(call.similarity, "similarity", 4);
  check_match_pointer(call.index, "index", 8);
  check_match_when(call.when);
}

// Words that a mutual check needs for its candidates: with scales any pixel, else the four outermost of each group.
inline std::int64_t match_scratch_words(const MutualMatchCall& call) {
  const std::int64_t most = call.query.scale != nullptr ? call.query.y.pixels * call.query.x.pixels
                                                        : 4 * call.query.y.strips * call.query.x.strips;
  return kCandidateWords * (most + 1);
}

inline void check_mutual(const MutualMatchCall& call) {
  check_match_image(call.query, "query");
  check_match_axes(call.key_y, call.key_x, "key");
  if (call.query.y.longest * call.query.x.longest > kMostMutualGroup) {
    refuse_match("groups of " + std::to_string(call.query.y.longest * call.query.x.longest) +
                 " query pixels are too large for the mutual check");
  }
  if (call.key_y.cells * call.key_x.cells > kMostMutualCells) {
    refuse_match("at most " + std::to_string(kMostMutualCells) + " key cells fit the mutual check, got " +
                 std::to_string(call.key_y.cells * call.key_x.cells));
  }
  if (call.scratch_words != match_scratch_words(call)) {
    refuse_match("scratch must have " + std::to_string(match_scratch_words(call)) + " words, got " +
                 std::to_string(call.scratch_words));
  }
  check_match_pointer(call.table, "table", 4);
  check_match_pointer(call.index, "index", 8);
  check_match_pointer(call.valid, "valid", 1);
  check_match_pointer(call.scratch, "scratch", 16);
  check_match_when(call.when);
}

// Rows of the table can be read four cells at a time.
inline bool rows_aligned(const GroupMatchCall& call) {
  return reinterpret_cast<std::uintptr_t>(call.table) % 16 == 0 && call.key.y.cells * call.key.x.cells % 4 == 0;
}

}  // namespace lift_fast
