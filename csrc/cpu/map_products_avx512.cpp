#include <immintrin.h>

namespace lift_fast {
namespace {

// 20 accumulators, 4 vectors of cells and a broadcast descriptor of 32 registers.
struct Isa {
  typedef float Vec __attribute__((vector_size(64)));
  static constexpr int lanes = 16, rows = 5, vectors = 4, panels = 2, row_cells = 4;
  static Vec broadcast(const float* p) { return _mm512_set1_ps(*p); }
  static Vec multiply_add(Vec a, Vec b, Vec sum) { return _mm512_fmadd_ps(a, b, sum); }
  static float sum(Vec v) {
    // By halves: the library's own reduction makes compilers warn of what it leaves undefined on purpose.
    typedef float Half __attribute__((vector_size(32)));
    typedef float Quarter __attribute__((vector_size(16)));
    Half low, high;
    __builtin_memcpy(&low, &v, sizeof low);
    __builtin_memcpy(&high, reinterpret_cast<const char*>(&v) + sizeof low, sizeof high);
    low += high;
    Quarter first, second;
    __builtin_memcpy(&first, &low, sizeof first);
    __builtin_memcpy(&second, reinterpret_cast<const char*>(&low) + sizeof first, sizeof second);
    first += second;
    return (first[0] + first[1]) + (first[2] + first[3]);
  }
};

}  // namespace
}  // namespace lift_fast

#include "map_products_kernel.hpp"

namespace lift_fast {
MapProductsTiling map_products_tiling_avx512() { return {kBlock, kLanes}; }
void map_products_kernel_avx512(const MapProductsCall& call, const MapProductsWork& work) { run_map_products(call, work); }
}  // namespace lift_fast
