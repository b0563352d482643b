#include "cpu/nearest.hpp"
#include "sanitize.hpp"

namespace lift_fast {
namespace {

// Stops the call after this many checks.
struct Countdown : Stop {
  int left;
  explicit Countdown(int looks) : Stop{&count, 0}, left(looks) {}
  static void count(Stop* stop) {
    if (--static_cast<Countdown*>(stop)->left < 0) __atomic_store_n(&stop->flag, 1, __ATOMIC_RELAXED);
  }
};

// Runs to the end if `looks` is negative.
void run(CpuIsa isa, std::int64_t batch, std::int64_t n, std::int64_t m, std::int64_t c, int looks = -1) {
  const auto query = rows(batch * n * c), key = rows(batch * m * c);
  for (int outputs = 0; outputs < 4; ++outputs) {
    for (int threads : {1, 3}) {
      const std::int64_t k = outputs & 1 ? 1 : 5 + 40 * (n % 2);
      std::unique_ptr<float[]> similarity(new float[batch * n * k]);
      std::unique_ptr<std::int64_t[]> index(new std::int64_t[batch * n * k]), back(new std::int64_t[batch * n]);
      NearestCall call{};
      call.query = query.get();
      call.key = key.get();
      call.batch = batch;
      call.n = n;
      call.m = m;
      call.c = c;
      call.normalize = threads == 1;
      call.rescore = m % 3 != 0;
      call.k = k;
      call.similarity = similarity.get();
      call.index = index.get();
      call.back = outputs & 2 ? back.get() : nullptr;
      call.threads = threads;
      Countdown stop(looks);
      if (looks >= 0) call.stop = &stop;
      nearest_run(call, isa);
    }
  }
}

}  // namespace

void sanitize(CpuIsa isa) {
  const std::int64_t counts[] = {0, 1, 2, 7, 13, 16, 33, 97, 300}, channels[] = {0, 1, 3, 8, 17};
  for (std::int64_t n : counts) {
    for (std::int64_t m : counts) {
      for (std::int64_t c : channels) run(isa, 1 + (n + m) % 2, n, m, c);
    }
  }
  for (int looks : {0, 1, 2, 3, 5, 9, 17}) run(isa, 2, 600, 560, 3, looks);
}

}  // namespace lift_fast
