// How a long call learns that it is to end early. Included by the kernels' translation units: no library templates.
#pragma once

#include "threads.hpp"

namespace lift_fast {

struct Stop {
  void (*look)(Stop*);  // asks, and may raise the flag; for the thread that made the call alone
  int flag;
};

namespace {

// Between two pieces of work, in any thread of the team: whether the rest is to be left undone. Threads need not agree,
// so nothing that all of them must come to may depend on it.
inline bool stopped(Stop* stop) {
  if (stop == nullptr) return false;
  // The first thread of a team is the one that opened it.
  if (thread_index() == 0) stop->look(stop);
  return __atomic_load_n(&stop->flag, __ATOMIC_RELAXED) != 0;
}

}  // namespace
}  // namespace lift_fast
