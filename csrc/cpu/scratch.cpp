#include "scratch.hpp"

#include <cstdlib>
#include <new>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace lift_fast {
namespace {

struct Scratch {
  void* data = nullptr;
  std::size_t bytes = 0;
  ~Scratch() { std::free(data); }
};
thread_local Scratch scratch;

}  // namespace

void* kept_scratch(std::size_t bytes) {
  if (bytes > scratch.bytes) {
    const std::size_t page = std::size_t{2} << 20;
    const std::size_t rounded = (bytes + page - 1) / page * page;
    std::free(scratch.data);
    scratch.bytes = 0;
    scratch.data = std::aligned_alloc(page, rounded);
    if (scratch.data == nullptr) throw std::bad_alloc();
    scratch.bytes = rounded;
#if defined(__linux__)
    (void)madvise(scratch.data, rounded, MADV_HUGEPAGE);
#endif
  }
  return scratch.data;
}

void trim_scratch() {
  if (scratch.bytes <= kScratchKept) return;
  std::free(scratch.data);
  scratch.data = nullptr;
  scratch.bytes = 0;
}

}  // namespace lift_fast
