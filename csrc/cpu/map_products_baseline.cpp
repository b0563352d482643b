namespace lift_fast {
namespace {

// For every CPU: four-float vectors in the compiler's own notation.
struct Isa {
  typedef float Vec __attribute__((vector_size(16)));
  static constexpr int lanes = 4, rows = 2, vectors = 2, panels = 4, row_cells = 4;
  static Vec broadcast(const float* p) { return Vec{} + *p; }
  static Vec multiply_add(Vec a, Vec b, Vec sum) { return sum + a * b; }
  static float sum(Vec v) { return (v[0] + v[1]) + (v[2] + v[3]); }
};

}  // namespace
}  // namespace lift_fast

#include "map_products_kernel.hpp"

namespace lift_fast {
MapProductsTiling map_products_tiling_baseline() { return {kBlock, kLanes}; }
void map_products_kernel_baseline(const MapProductsCall& call, const MapProductsWork& work) { run_map_products(call, work); }
}  // namespace lift_fast
