// nearest's AVX-512 kernel for integers against the baseline, on a CPU that need not have it.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <random>

#include "cpu/nearest.hpp"

using namespace lift_fast;

namespace {

struct Result {
  std::unique_ptr<float[]> similarity;
  std::unique_ptr<std::int64_t[]> index, back;
};

Result run(CpuIsa isa, const float* query, const float* key, std::int64_t n, std::int64_t m, std::int64_t c,
           std::int64_t k, bool normalize) {
  Result result{std::unique_ptr<float[]>(new float[n * k]), std::unique_ptr<std::int64_t[]>(new std::int64_t[n * k]),
                std::unique_ptr<std::int64_t[]>(new std::int64_t[n])};
  NearestCall call{};
  call.query = query;
  call.key = key;
  call.batch = 1;
  call.n = n;
  call.m = m;
  call.c = c;
  call.normalize = normalize;
  call.rescore = true;
  call.k = k;
  call.similarity = result.similarity.get();
  call.index = result.index.get();
  call.back = result.back.get();
  call.threads = 2;
  nearest_run(call, isa);
  return result;
}

}  // namespace

int main() {
  std::mt19937 random(1);
  std::normal_distribution<float> normal;
  int checked = 0;
  for (std::int64_t n : {1, 11, 12, 13, 40}) {
    for (std::int64_t m : {1, 31, 32, 33, 200}) {
      for (std::int64_t c : {1, 2, 7, 64, 385}) {
        for (int kind = 0; kind < 3; ++kind) {
          // Plain noise; a large common part; norms far apart.
          std::unique_ptr<float[]> query(new float[n * c]), key(new float[m * c]);
          const auto fill = [&](float* rows, std::int64_t count) {
            for (std::int64_t i = 0; i < count; ++i) {
              const float length = kind == 2 ? std::pow(10.0f, static_cast<float>(i % 9) - 4.0f) : 1.0f;
              for (std::int64_t j = 0; j < c; ++j)
                rows[i * c + j] = length * ((kind == 1) + normal(random) * (kind == 1 ? 0.1f : 1.0f));
            }
          };
          fill(query.get(), n);
          fill(key.get(), m);
          const std::int64_t k = m < 5 ? m : 5;
          const bool normalize = (n + m) % 2 == 0;
          const Result ours = run(CpuIsa::avx512_int16, query.get(), key.get(), n, m, c, k, normalize);
          const Result other = run(CpuIsa::baseline, query.get(), key.get(), n, m, c, k, normalize);
          double scale = 0;
          for (std::int64_t i = 0; i < n * k; ++i) scale = std::fmax(scale, std::fabs(other.similarity[i]));
          for (std::int64_t i = 0; i < n * k; ++i) {
            // The rescored similarity is computed by each kernel in float32.
            const double difference = std::fabs(static_cast<double>(ours.similarity[i]) - other.similarity[i]);
            const bool same = ours.index[i] == other.index[i] || difference <= 2e-6 * scale;
            if (!same || !(difference <= 2e-6 * scale + 1e-30) || ours.index[i] < 0 || ours.index[i] >= m) {
              std::printf("n %d m %d c %d kind %d at %d: %g of %d, expected %g of %d\n", (int)n, (int)m, (int)c, kind,
                          (int)i, ours.similarity[i], (int)ours.index[i], other.similarity[i], (int)other.index[i]);
              return 1;
            }
            ++checked;
          }
          for (std::int64_t i = 0; i < n; ++i) {
            if (ours.back[i] < 0 || ours.back[i] >= n) {
              std::printf("n %d m %d c %d kind %d at %d: back %d, expected %d\n", (int)n, (int)m, (int)c, kind, (int)i,
                          (int)ours.back[i], (int)other.back[i]);
              return 1;
            }
          }
        }
      }
    }
  }
  std::printf("%d matches ok\n", checked);
}
