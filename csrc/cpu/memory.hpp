// Working memory for kernels. Only for translation units without instruction-set flags: it uses library templates.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>

namespace lift_fast {

struct FreeMemory {
  void operator()(void* data) const { std::free(data); }
};
template <class T>
using Memory = std::unique_ptr<T[], FreeMemory>;

// Uninitialised, aligned to a cache line, with room after the end for a vector's load. Throws std::bad_alloc.
template <class T>
Memory<T> allocate(std::int64_t count) {
  void* data = std::aligned_alloc(64, (static_cast<std::size_t>(count) * sizeof(T) + 127) / 64 * 64);
  if (data == nullptr) throw std::bad_alloc();
  return Memory<T>(static_cast<T*>(data));
}

}  // namespace lift_fast
