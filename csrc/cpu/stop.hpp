// How a long call is stopped early. Included by the kernels' translation units: no library templates.
#pragma once

#include "threads.hpp"

namespace lift_fast {

struct Stop {
  void (*look)(Stop*);  // checks and may raise the flag; only for the calling thread
  int flag;
};

namespace {

// Between two pieces of work, in any thread of the team: whether to skip the rest. Threads need not agree, so no
// barrier may depend on it.
inline bool stopped(Stop* stop) {
  if (stop == nullptr) return false;
  // The first thread of a team is the calling one.
  if (thread_index() == 0) stop->look(stop);
  return __atomic_load_n(&stop->flag, __ATOMIC_RELAXED) != 0;
}

}  // namespace
}  // namespace lift_fast
