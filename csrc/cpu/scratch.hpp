// Working memory that a thread keeps from one call to the next. For kernels too: no library templates.
#pragma once

#include <cstddef>

namespace lift_fast {

// Memory of the calling thread, aligned to large pages; uninitialised. Up to kScratchKept bytes are kept for its next
// call, which then has no page faults. Throws std::bad_alloc.
constexpr std::size_t kScratchKept = std::size_t{64} << 20;
void* kept_scratch(std::size_t bytes);
// At the end of a call: releases what is more than that.
void trim_scratch();

}  // namespace lift_fast
