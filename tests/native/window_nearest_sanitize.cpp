#include "cpu/window_nearest.hpp"
#include "sanitize.hpp"

namespace lift_fast {
namespace {

struct Grid {
  std::int64_t frames, h, w;
  std::int64_t cells() const { return frames * h * w; }
};

void run(CpuIsa isa, Grid query, Grid key, std::int64_t c, std::int64_t k, std::int64_t radius) {
  const std::int64_t batch = 1 + (query.w + key.w) % 2, matches = batch * query.cells() * k;
  const auto queries = rows(batch * query.cells() * c), keys = rows(batch * key.cells() * c);
  std::unique_ptr<float[]> similarity(new float[matches]);
  std::unique_ptr<std::int64_t[]> index(new std::int64_t[matches]);
  WindowNearestCall call{};
  call.query = queries.get();
  call.key = keys.get();
  call.batch = batch;
  call.query_frames = query.frames;
  call.query_h = query.h;
  call.query_w = query.w;
  call.key_frames = key.frames;
  call.key_h = key.h;
  call.key_w = key.w;
  call.c = c;
  call.k = k;
  call.reach_y = 2 * radius * query.h;
  call.reach_x = 2 * radius * query.w;
  call.normalize = k > 1;
  call.similarity = similarity.get();
  call.index = index.get();
  call.threads = 3;
  window_nearest_run(call, isa);
  for (std::int64_t i = 0; i < matches; ++i) {
    if (index[i] < -1 || index[i] >= key.cells()) std::abort();
  }
}

}  // namespace

void sanitize(CpuIsa isa) {
  const Grid grids[] = {{1, 1, 1}, {2, 1, 9}, {1, 7, 1}, {3, 3, 5}, {1, 4, 33}, {2, 5, 16}, {0, 2, 3}};
  for (const Grid& query : grids) {
    for (const Grid& key : grids) {
      for (std::int64_t c : {0, 1, 17, 64}) {
        for (std::int64_t k : {1, 5}) {
          for (std::int64_t radius : {0, 3, 40}) run(isa, query, key, c, k, radius);
        }
      }
    }
  }
}

}  // namespace lift_fast
