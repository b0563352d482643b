// For one instruction set. Each including translation unit defines, in an anonymous namespace, `struct Isa` and is
// compiled with that set's flags; nothing here may call a standard library template, whose out-of-line copy could be
// shared with code for older CPUs.
#pragma once

#include "map_products.hpp"
#include "threads.hpp"

namespace lift_fast {
namespace {

using Vec = Isa::Vec;
constexpr int kLanes = Isa::lanes;
constexpr int kRows = Isa::rows;        // descriptors of a tile
constexpr int kVectors = Isa::vectors;  // vectors of cells of a tile where cells lie side by side
constexpr int kCells = kLanes * kVectors;
constexpr int kRowCells = 4;            // cells of a tile where channels lie side by side

inline Vec load(const float* p) {
  Vec v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
inline void store(float* p, Vec v) { __builtin_memcpy(p, &v, sizeof v); }
inline std::int64_t smaller(std::int64_t a, std::int64_t b) { return a < b ? a : b; }

// What a cell's products are multiplied by, from the sum of its squares. Squares that leave the range of float32 are
// taken again in float64, and with them the cell's products.
inline float inverse_norm(const MapProductsCall& call, const MapProductsWork& work, std::int64_t cell, float square) {
  if (square > 1e-20f && square < 1e36f) return 1.0f / __builtin_sqrtf(square);
  const float* at = call.map + cell * call.cell_stride;
  double sum = 0;
  for (std::int64_t k = 0; k < call.c; ++k) {
    const double value = at[k * call.channel_stride];
    sum += value * value;
  }
  const double norm = __builtin_sqrt(sum), inverse = 1.0 / (norm > 1e-12 || norm != norm ? norm : 1e-12);
  for (std::int64_t p = 0; p < call.count; ++p) {
    const float* row = work.padded + p * work.padded_channels;
    double product = 0;
    for (std::int64_t k = 0; k < call.c; ++k) product += static_cast<double>(row[k]) * at[k * call.channel_stride];
    call.table[p * call.cells + cell] = static_cast<float>(product * inverse);
  }
  return 1.0f;
}

// Descriptors [first, first + kRows) and kCells cells that lie side by side, rows of channels `stride` apart.
template <bool kSquares>
inline void column_tile(const float* const* rows, const float* cells, std::int64_t stride, std::int64_t c, Vec* squares,
                        Vec (*sums)[kVectors]) {
  for (int v = 0; v < kVectors; ++v) {
    if (kSquares) squares[v] = Vec{};
    for (int r = 0; r < kRows; ++r) sums[r][v] = Vec{};
  }
  for (std::int64_t k = 0; k < c; ++k) {
    Vec cell[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      cell[v] = load(cells + k * stride + v * kLanes);
      if (kSquares) squares[v] = Isa::multiply_add(cell[v], cell[v], squares[v]);
    }
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const Vec value = Isa::broadcast(rows[r] + k);
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) sums[r][v] = Isa::multiply_add(value, cell[v], sums[r][v]);
    }
  }
}

// Cells [first, first + kCells), fewer at the end of the map.
inline void columns(const MapProductsCall& call, const MapProductsWork& work, std::int64_t first, float* scratch) {
  const std::int64_t width = smaller(kCells, call.cells - first);
  const float* cells = call.map + first;
  std::int64_t stride = call.channel_stride;
  if (width < kCells) {
    for (std::int64_t k = 0; k < call.c; ++k) {
      for (int i = 0; i < kCells; ++i) scratch[k * kCells + i] = i < width ? cells[k * stride + i] : 0.0f;
    }
    cells = scratch;
    stride = kCells;
  }
  Vec squares[kVectors] = {}, sums[kRows][kVectors];
  for (std::int64_t p = 0; p < call.count; p += kRows) {
    const float* rows[kRows];
    // Beyond the last descriptor the last one again, whose result is not kept.
    for (int r = 0; r < kRows; ++r) rows[r] = work.padded + smaller(p + r, call.count - 1) * work.padded_channels;
    if (p == 0) {
      column_tile<true>(rows, cells, stride, call.c, squares, sums);
    } else {
      column_tile<false>(rows, cells, stride, call.c, squares, sums);
    }
    for (int r = 0; r < kRows && p + r < call.count; ++r) {
      float* out = call.table + (p + r) * call.cells + first;
      for (int v = 0; v < kVectors; ++v) {
        if (width == kCells) {
          store(out + v * kLanes, sums[r][v]);
        } else {
          for (int i = 0; i < kLanes && v * kLanes + i < width; ++i) out[v * kLanes + i] = sums[r][v][i];
        }
      }
    }
  }
  if (!call.normalize) return;
  float inverse[kCells];
  for (int v = 0; v < kVectors; ++v) store(inverse + v * kLanes, squares[v]);
  for (std::int64_t i = 0; i < width; ++i) inverse[i] = inverse_norm(call, work, first + i, inverse[i]);
  for (std::int64_t p = 0; p < call.count; ++p) {
    float* out = call.table + p * call.cells + first;
    for (std::int64_t i = 0; i < width; ++i) out[i] *= inverse[i];
  }
}

inline Vec load_part(const float* p, std::int64_t count) {
  if (count >= kLanes) return load(p);
  Vec v = {};
  __builtin_memcpy(&v, p, static_cast<unsigned long>(count) * 4);
  return v;
}

// Cells [first, first + kRowCells), each with its channels side by side.
inline void rows_of_channels(const MapProductsCall& call, const MapProductsWork& work, std::int64_t first) {
  const float* cells[kRowCells];
  // Beyond the last cell the last one again, whose result is not kept.
  for (int i = 0; i < kRowCells; ++i) cells[i] = call.map + smaller(first + i, call.cells - 1) * call.cell_stride;
  float inverse[kRowCells];
  for (int i = 0; i < kRowCells; ++i) inverse[i] = 1.0f;
  for (std::int64_t p = 0; p < call.count; p += kRows) {
    const float* rows[kRows];
    for (int r = 0; r < kRows; ++r) rows[r] = work.padded + smaller(p + r, call.count - 1) * work.padded_channels;
    Vec sums[kRows][kRowCells] = {};
    for (std::int64_t k = 0; k < call.c; k += kLanes) {
      Vec cell[kRowCells];
#pragma GCC unroll 4
      for (int i = 0; i < kRowCells; ++i) cell[i] = load_part(cells[i] + k, call.c - k);
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        const Vec row = load(rows[r] + k);
#pragma GCC unroll 4
        for (int i = 0; i < kRowCells; ++i) sums[r][i] = Isa::multiply_add(row, cell[i], sums[r][i]);
      }
    }
    for (int r = 0; r < kRows && p + r < call.count; ++r) {
      for (int i = 0; i < kRowCells && first + i < call.cells; ++i) {
        call.table[(p + r) * call.cells + first + i] = Isa::sum(sums[r][i]);
      }
    }
  }
  if (!call.normalize) return;
  for (int i = 0; i < kRowCells && first + i < call.cells; ++i) {
    Vec square = {};
    for (std::int64_t k = 0; k < call.c; k += kLanes) {
      const Vec cell = load_part(cells[i] + k, call.c - k);
      square = Isa::multiply_add(cell, cell, square);
    }
    inverse[i] = inverse_norm(call, work, first + i, Isa::sum(square));
    for (std::int64_t p = 0; p < call.count; ++p) call.table[p * call.cells + first + i] *= inverse[i];
  }
}

void run_map_products(const MapProductsCall& call, const MapProductsWork& work) {
#pragma omp parallel num_threads(call.threads)
  {
    float* scratch = work.scratch + thread_index() * work.scratch_words;
    if (call.channel_stride == 1 && call.c > 1) {
#pragma omp for schedule(static)
      for (std::int64_t first = 0; first < call.cells; first += kRowCells) rows_of_channels(call, work, first);
    } else {
#pragma omp for schedule(static)
      for (std::int64_t first = 0; first < call.cells; first += kCells) columns(call, work, first, scratch);
    }
  }
}

}  // namespace
}  // namespace lift_fast
