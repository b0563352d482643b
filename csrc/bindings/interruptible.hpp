// Ctrl-C during a native call: the calling thread runs Python's signal handlers, and the call ends if one raises.
#pragma once

#include <pybind11/pybind11.h>

#include <chrono>
#include <type_traits>

#include "cpu/stop.hpp"

namespace lift_fast {

// Construct it with the GIL held. It must outlive the call, which runs without the GIL; query it with the GIL
// afterwards.
class Interruptible : public Stop {
 public:
  Interruptible() : Stop{&ask, 0}, next_(Clock::now() + kInterval) {}
  // Throws what the handler raised, usually KeyboardInterrupt.
  void raise() const {
    if (flag != 0) throw pybind11::error_already_set();
  }

 private:
  using Clock = std::chrono::steady_clock;
  // Taking the GIL costs microseconds, or milliseconds while other threads run Python.
  static constexpr std::chrono::milliseconds kInterval{50};

  static void ask(Stop* stop) {
    Interruptible* self = static_cast<Interruptible*>(stop);
    if (self->flag != 0 || Clock::now() < self->next_) return;
    const PyGILState_STATE state = PyGILState_Ensure();
    // Python runs handlers in its main thread only; in other threads this does nothing.
    if (PyErr_CheckSignals() != 0) __atomic_store_n(&self->flag, 1, __ATOMIC_RELAXED);
    PyGILState_Release(state);
    self->next_ = Clock::now() + kInterval;
  }

  Clock::time_point next_;
};

// Runs without the GIL until it is done or Ctrl-C ends it.
template <class Call, class Target>
void run_interruptibly(void (*run)(Call, Target), typename std::decay<Call>::type& call, Target target) {
  Interruptible stop;
  call.stop = &stop;
  {
    pybind11::gil_scoped_release release;
    run(call, target);
  }
  stop.raise();
}

}  // namespace lift_fast
