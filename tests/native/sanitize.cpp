// Runs an operator with every instruction set of this CPU, from two threads at once under ThreadSanitizer.
#include "sanitize.hpp"

#include <thread>

using namespace lift_fast;

int main() {
#if defined(__SANITIZE_THREAD__)
  constexpr int calls = 2;
#else
  constexpr int calls = 1;
#endif
  for (const CpuIsa isa : cpu_isas({LIFT_FAST_MORE_ISAS})) {
    std::vector<std::thread> threads;
    for (int i = 0; i < calls; ++i) threads.emplace_back(sanitize, isa);
    for (std::thread& thread : threads) thread.join();
    std::printf("%s ok\n", cpu_isa_name(isa));
  }
}
