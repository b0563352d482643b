#include <immintrin.h>

namespace lift_fast {
namespace {

struct Isa {
  typedef float Vec __attribute__((vector_size(32)));
  static constexpr int lanes = 8, rows = 6, vectors = 2, panels = 4, row_cells = 2;
  static Vec broadcast(const float* p) { return _mm256_broadcast_ss(p); }
  static Vec multiply_add(Vec a, Vec b, Vec sum) { return _mm256_fmadd_ps(a, b, sum); }
  static float sum(Vec v) { return ((v[0] + v[1]) + (v[2] + v[3])) + ((v[4] + v[5]) + (v[6] + v[7])); }
};

}  // namespace
}  // namespace lift_fast

#include "map_products_kernel.hpp"

namespace lift_fast {
MapProductsTiling map_products_tiling_avx2() { return {kBlock, kLanes}; }
void map_products_kernel_avx2(const MapProductsCall& call, const MapProductsWork& work) { run_map_products(call, work); }
}  // namespace lift_fast
