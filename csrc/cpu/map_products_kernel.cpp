#include "map_products.hpp"
#include "simd/simd.hpp"
#include "threads.hpp"

namespace lift_fast {
namespace {

// 20 accumulators, 4 vectors of cells and a broadcast descriptor in the 32 registers of AVX-512.
constexpr int kRows = by_lanes(2, 6, 5);     // descriptors of a tile
constexpr int kVectors = by_lanes(2, 2, 4);  // vectors of cells of a tile if cells lie side by side
constexpr int kCells = kLanes * kVectors;
constexpr int kPanels = by_lanes(4, 4, 2);   // tiles that are copied together
constexpr int kBlock = kCells * kPanels;
constexpr int kRowCells = by_lanes(4, 2, 4);  // cells of a tile if channels lie side by side
constexpr std::int64_t kFewest = 8;   // least descriptors for which cells with contiguous channels are copied
constexpr std::int64_t kAhead = 16;   // channels that are prefetched while a block is copied

// The factor of a cell's products, from the sum of its squares. If the squares leave the range of float32, they and the
// cell's products are computed again in float64.
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

// kRows descriptors times one panel [c][kCells], as [kRows][kCells]. Taking the address of a sum would store it in
// every step, so the sums are copied at the end.
inline void panel_tile(const float* const* rows, const float* panel, std::int64_t c, float* products) {
  Vec sums[kRows][kVectors];
  for (int r = 0; r < kRows; ++r) {
    for (int v = 0; v < kVectors; ++v) sums[r][v] = Vec{};
  }
  for (std::int64_t k = 0; k < c; ++k) {
    Vec cell[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) cell[v] = load(panel + k * kCells + v * kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const Vec value = Isa::broadcast(rows[r] + k);
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) sums[r][v] = Isa::multiply_add(value, cell[v], sums[r][v]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) store(products + r * kCells + v * kLanes, sums[r][v]);
  }
}

// Copies a block of cells to panels [kPanels][c][kCells] and sums their squares. In a map of one row for each channel,
// every channel is on a page of its own, which each descriptor would look up again.
inline void pack_channels(const float* cells, std::int64_t stride, std::int64_t c, float* panels, float* squares) {
  Vec sums[kPanels * kVectors] = {};
  for (std::int64_t k = 0; k < c; ++k) {
    if (k + kAhead < c) {
      for (int i = 0; i < kBlock; i += 16) __builtin_prefetch(cells + (k + kAhead) * stride + i);
    }
#pragma GCC unroll 16
    for (int i = 0; i < kPanels * kVectors; ++i) {
      const Vec cell = load(cells + k * stride + i * kLanes);
      sums[i] = Isa::multiply_add(cell, cell, sums[i]);
      store(panels + (i / kVectors * c + k) * kCells + i % kVectors * kLanes, cell);
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < kPanels * kVectors; ++i) store(squares + i * kLanes, sums[i]);
}

// The same from a map of one row for each cell.
inline void pack_cells(const float* cells, std::int64_t stride, std::int64_t c, float* panels, float* squares) {
  for (int first = 0; first < kBlock; first += kLanes) {
    const float* from = cells + first * stride;
    float* to = panels + first / kCells * c * kCells + first % kCells;
    Vec sums[2] = {};
    std::int64_t k = 0;
    for (; k + kLanes <= c; k += kLanes) {
      Vec block[kLanes];
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) block[i] = load(from + i * stride + k);
      transpose(block);
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) {
        sums[i % 2] = Isa::multiply_add(block[i], block[i], sums[i % 2]);
        store(to + (k + i) * kCells, block[i]);
      }
    }
    Vec sum = sums[0] + sums[1];
    for (; k < c; ++k) {
      Vec cell;
      for (int i = 0; i < kLanes; ++i) cell[i] = from[i * stride + k];
      sum = Isa::multiply_add(cell, cell, sum);
      store(to + k * kCells, cell);
    }
    store(squares + first, sum);
  }
}

// The same for fewer cells; the others are zero.
inline void pack_part(const float* cells, std::int64_t width, const MapProductsCall& call, float* panels,
                      float* squares) {
  const std::int64_t channel = call.channel_stride, cell = call.cell_stride, c = call.c;
  for (int i = 0; i < kBlock; ++i) squares[i] = 0;
  for (std::int64_t start = 0; start < width; start += kCells) {
    const std::int64_t filled = smaller<std::int64_t>(kCells, width - start);
    for (std::int64_t k = 0; k < c; ++k) {
      const float* from = cells + k * channel + start * cell;
      float* to = panels + (start / kCells * c + k) * kCells;
      for (std::int64_t i = 0; i < filled; ++i) to[i] = from[i * cell];
      for (std::int64_t i = filled; i < kCells; ++i) to[i] = 0.0f;
      for (std::int64_t i = 0; i < kCells; ++i) squares[start + i] += to[i] * to[i];
    }
  }
}

// Cells [first, first + kBlock), fewer at the end of the map.
inline void block_of_cells(const MapProductsCall& call, const MapProductsWork& work, std::int64_t first,
                           float* scratch) {
  const std::int64_t width = smaller<std::int64_t>(kBlock, call.cells - first);
  float inverse[kBlock];
  const float* cells = call.map + first * call.cell_stride;
  if (width < kBlock) {
    pack_part(cells, width, call, scratch, inverse);
  } else if (call.cell_stride == 1) {
    pack_channels(cells, call.channel_stride, call.c, scratch, inverse);
  } else {
    pack_cells(cells, call.cell_stride, call.c, scratch, inverse);
  }
  for (std::int64_t start = 0; start < width; start += kCells) {
    const float* panel = scratch + start * call.c;
    const std::int64_t filled = smaller<std::int64_t>(kCells, width - start);
    for (std::int64_t p = 0; p < call.count; p += kRows) {
      const float* rows[kRows];
      // Beyond the last descriptor: the last one again; the result is not kept.
      for (int r = 0; r < kRows; ++r) rows[r] = work.padded + smaller(p + r, call.count - 1) * work.padded_channels;
      float products[kRows * kCells];
      panel_tile(rows, panel, call.c, products);
      for (int r = 0; r < kRows && p + r < call.count; ++r) {
        float* out = call.table + (p + r) * call.cells + first + start;
        for (std::int64_t i = 0; i < filled; ++i) out[i] = products[r * kCells + i];
      }
    }
  }
  if (!call.normalize) return;
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

// kRows descriptors times kRowCells cells, channels side by side in both.
inline void row_tile(const float* const* rows, const float* const* cells, std::int64_t c,
                     float (*products)[kRowCells]) {
  Vec sums[kRows][kRowCells] = {};
  const auto step = [&](std::int64_t k, auto load_cell) {
    Vec cell[kRowCells];
#pragma GCC unroll 4
    for (int i = 0; i < kRowCells; ++i) cell[i] = load_cell(cells[i] + k);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const Vec row = load(rows[r] + k);
#pragma GCC unroll 4
      for (int i = 0; i < kRowCells; ++i) sums[r][i] = Isa::multiply_add(row, cell[i], sums[r][i]);
    }
  };
  std::int64_t k = 0;
  for (; k + kLanes <= c; k += kLanes) step(k, [](const float* p) { return load(p); });
  if (k < c) step(k, [&](const float* p) { return load_part(p, c - k); });
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int i = 0; i < kRowCells; ++i) products[r][i] = Isa::sum(sums[r][i]);
  }
}

// Cells [first, first + kRowCells), each with its channels side by side.
inline void rows_of_channels(const MapProductsCall& call, const MapProductsWork& work, std::int64_t first) {
  const float* cells[kRowCells];
  // Beyond the last cell: the last one again; the result is not kept.
  for (int i = 0; i < kRowCells; ++i) cells[i] = call.map + smaller(first + i, call.cells - 1) * call.cell_stride;
  float inverse[kRowCells];
  for (int i = 0; i < kRowCells; ++i) inverse[i] = 1.0f;
  for (std::int64_t p = 0; p < call.count; p += kRows) {
    const float* rows[kRows];
    for (int r = 0; r < kRows; ++r) rows[r] = work.padded + smaller(p + r, call.count - 1) * work.padded_channels;
    float products[kRows][kRowCells];
    row_tile(rows, cells, call.c, products);
    for (int r = 0; r < kRows && p + r < call.count; ++r) {
      for (int i = 0; i < kRowCells && first + i < call.cells; ++i) {
        call.table[(p + r) * call.cells + first + i] = products[r][i];
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
    if (call.channel_stride == 1 && call.c > 1 && call.count < kFewest) {
#pragma omp for schedule(static)
      for (std::int64_t first = 0; first < call.cells; first += kRowCells) rows_of_channels(call, work, first);
    } else {
#pragma omp for schedule(static)
      for (std::int64_t first = 0; first < call.cells; first += kBlock) block_of_cells(call, work, first, scratch);
    }
  }
}

}  // namespace

template <>
const MapProductsKernel Compiled<MapProductsKernel, kIsa>::kernel = {kBlock, kLanes, run_map_products};

}  // namespace lift_fast
