// The number of this OpenMP thread and of its team, also without OpenMP. In an anonymous namespace, because the
// kernels' translation units are compiled for different instruction sets and must not share code.
#pragma once

#if defined(_OPENMP)
#include <omp.h>
#endif

namespace lift_fast {
namespace {

inline int thread_index() {
#if defined(_OPENMP)
  return omp_get_thread_num();
#else
  return 0;
#endif
}

// Threads of the running team, which may be fewer than requested.
inline int thread_count() {
#if defined(_OPENMP)
  return omp_get_num_threads();
#else
  return 1;
#endif
}

}  // namespace
}  // namespace lift_fast
