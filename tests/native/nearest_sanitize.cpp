// Runs the matcher on exactly sized heap blocks, so that AddressSanitizer sees every byte read or written outside.
#include <cmath>
#include <cstdio>
#include <memory>

#include "cpu/nearest.hpp"

using namespace lift_fast;

namespace {

std::unique_ptr<float[]> rows(std::int64_t count) {
  std::unique_ptr<float[]> values(new float[count]);
  for (std::int64_t i = 0; i < count; ++i) {
    // Now and then what takes no part, zeros, and values whose product overflows.
    const std::int64_t kind = i % 211;
    values[i] = kind == 5 ? NAN : kind == 71 ? INFINITY : kind == 131 ? 3e38f : 0.01f * static_cast<float>(i % 37 - 18);
  }
  return values;
}

void run(CpuIsa isa, std::int64_t batch, std::int64_t n, std::int64_t m, std::int64_t c) {
  const auto query = rows(batch * n * c), key = rows(batch * m * c);
  for (int outputs = 0; outputs < 4; ++outputs) {
    for (int threads : {1, 3}) {
      std::unique_ptr<float[]> similarity(new float[batch * n]), second(new float[batch * n]);
      std::unique_ptr<float[]> reverse_similarity(new float[batch * m]);
      std::unique_ptr<std::int64_t[]> index(new std::int64_t[batch * n]), reverse_index(new std::int64_t[batch * m]);
      NearestCall call{};
      call.query = query.get();
      call.key = key.get();
      call.batch = batch;
      call.n = n;
      call.m = m;
      call.c = c;
      call.normalize = threads == 1;
      call.similarity = similarity.get();
      call.index = index.get();
      call.second = outputs & 1 ? second.get() : nullptr;
      call.reverse_similarity = outputs & 2 ? reverse_similarity.get() : nullptr;
      call.reverse_index = outputs & 2 ? reverse_index.get() : nullptr;
      call.threads = threads;
      nearest_run(call, isa);
    }
  }
}

}  // namespace

int main() {
  const std::int64_t counts[] = {0, 1, 2, 7, 13, 16, 33, 97, 300}, channels[] = {0, 1, 3, 8, 17};
  for (CpuIsa isa : {CpuIsa::baseline, CpuIsa::avx2, CpuIsa::avx512}) {
    if (!cpu_has(isa)) continue;
    for (std::int64_t n : counts) {
      for (std::int64_t m : counts) {
        for (std::int64_t c : channels) run(isa, 1 + (n + m) % 2, n, m, c);
      }
    }
    std::printf("%s ok\n", cpu_isa_name(isa));
  }
}
