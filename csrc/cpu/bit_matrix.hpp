// A symmetric matrix of bits: the pairs whose similarity is above a threshold, and its product with a vector.
#pragma once

#include <cstdint>

#include "isa.hpp"

namespace lift_fast {

// Sets rows `start .. start + rows - 1` of an n x n matrix. It is stored as [64 words][words] words, words = ceil(n /
// 64); column j of a row is bit j % 64 of word j / 64. Bits (i, j) and (j, i) become similarity > tau for j <= i <
// start + rows; the others stay. Throws std::invalid_argument for sizes out of range or a start that is not a multiple
// of 64.
void bit_matrix_set_rows(const float* similarity,  // [rows, start + rows]
                         std::int64_t start, std::int64_t rows, std::int64_t n, float tau, std::uint64_t* bits,
                         int threads);

struct BitMultiplyCall {
  const std::uint64_t* bits;  // [64 words][words]; zeros beyond n
  std::int64_t n, words;
  const double* vector;       // [64 words], zeros beyond n
  double* out;                // [n]
  int threads;
};

// out = bits * vector of n finite numbers. Throws std::invalid_argument, std::bad_alloc.
void bit_matrix_multiply(const std::uint64_t* bits, std::int64_t n, const double* vector, double* out, int threads,
                         CpuIsa isa);

struct BitMultiplyKernel {
  void (*run)(const BitMultiplyCall& call);
};

}  // namespace lift_fast
