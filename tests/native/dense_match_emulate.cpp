// Runs the dense matcher's CUDA kernels on the CPU, on exactly sized heap blocks, so that a sanitizer sees every byte
// read or written outside. Serves calls from its standard input, as tests/test_native_dense_match_cuda.py writes them.
#include <cstdint>
#include <cstdio>
#include <cstdlib>

#define LIFT_FAST_EMULATED_DEVICE
#include "cuda/dense_match_mutual.cuh"
#include "cuda/dense_match_search.cuh"

using namespace lift_fast;

namespace {

void read(void* to, std::int64_t bytes) {
  const auto size = static_cast<std::size_t>(bytes);
  if (size != 0 && std::fread(to, 1, size, stdin) != size) {
    std::fprintf(stderr, "a call ends early\n");
    std::exit(2);
  }
}

std::int64_t number() {
  std::int64_t value;
  read(&value, sizeof value);
  return value;
}

struct Bytes : emulated::Array {
  Bytes() : Array(number()) { read(as<void>(), bytes()); }
  void reply() const {
    const auto size = static_cast<std::size_t>(bytes());
    if (size != 0 && std::fwrite(as<void>(), 1, size, stdout) != size) std::exit(3);
  }
};

struct Axis {
  std::int64_t cells = number(), pixels = number(), strips = number(), longest = number();
  Bytes low, high, first, weight;
  operator MatchAxis() const {
    return {cells,
            pixels,
            strips,
            low.as<const std::int32_t>(),
            high.as<const std::int32_t>(),
            first.as<const std::int32_t>(),
            weight.as<const float>(),
            longest};
  }
};

struct Image {
  Axis y, x;
  Bytes scale, high, low, rows, spans;
  operator MatchImage() const {
    return {y,
            x,
            scale.as<const float>(),
            high.as<const float>(),
            low.as<const float>(),
            rows.as<const float>(),
            spans.as<const float>()};
  }
};

// A flag on the device, or none.
struct When {
  Bytes flag;
  std::int64_t wanted = number();
  operator MatchWhen() const { return {flag.as<const std::int32_t>(), wanted != 0}; }
};

struct Settings {
  std::int64_t order = number(), seed = number(), shared_block = number();
};

void run(const Settings& settings, const MatchLaunch& cut, const std::function<void()>& kernel) {
  const auto order = static_cast<emulated::Order>(settings.order);
  emulated::run_blocks(cut.blocks, cut.warps, cut.shared, {emulated::Copies::early, order, settings.seed}, kernel);
}

void spans(const Settings& settings) {
  MatchSpansCall call{};
  const Bytes gram;
  call.gram = gram.as<const double>();
  const Axis y, x;
  call.y = y;
  call.x = x;
  const Bytes high, written;
  call.scale_high = high.as<const float>();
  call.spans = written.as<float>();
  check_spans(call);
  const SpanParams params = span_params(call);
  run(settings, span_launch(call), [&] { match_spans_kernel(params); });
  written.reply();
}

void groups(const Settings& settings) {
  GroupMatchCall call{};
  const Bytes table;
  call.table = table.as<const float>();
  call.rows = number();
  const Image key;
  const Axis query_y, query_x;
  call.key = key;
  call.query_y = query_y;
  call.query_x = query_x;
  std::int64_t* const band[7] = {&call.band.first_y, &call.band.end_y, &call.band.first_x, &call.band.end_x,
                                 &call.band.top,     &call.band.left,  &call.band.width};
  for (std::int64_t* part : band) *part = number();
  // Only the band's pixels are written.
  const Bytes similarity, index;
  call.similarity = similarity.as<float>();
  call.index = index.as<std::int64_t>();
  const When when;
  call.when = when;
  check_groups(call);
  const MatchLaunch cut = group_launch(call, settings.shared_block);
  const GroupParams params = group_params(call, cut);
  run(settings, cut, [&] { groups_kernel(call, cut)(params); });
  similarity.reply();
  index.reply();
}

void points(const Settings& settings) {
  PointMatchCall call{};
  const Bytes table;
  call.table = table.as<const float>();
  call.points = number();
  const Image key;
  call.key = key;
  const Bytes similarity, index;
  call.similarity = similarity.as<float>();
  call.index = index.as<std::int64_t>();
  const When when;
  call.when = when;
  check_points(call);
  const PointParams params = point_params(call);
  const auto kernel = call.key.scale != nullptr ? match_points_kernel<true> : match_points_kernel<false>;
  run(settings, point_launch(call), [&] { kernel(params); });
  similarity.reply();
  index.reply();
}

void mutual(const Settings& settings) {
  MutualMatchCall call{};
  const Bytes table;
  call.table = table.as<const float>();
  const Image query;
  const Axis key_y, key_x;
  call.query = query;
  call.key_y = key_y;
  call.key_x = key_x;
  const Bytes index, valid;
  call.index = index.as<const std::int64_t>();
  call.valid = valid.as<bool>();
  const std::int64_t words = number();
  const emulated::Array scratch(4 * words);
  std::memset(scratch.as<void>(), 0, static_cast<std::size_t>(4 * words));
  call.scratch = scratch.as<std::int32_t>();
  call.scratch_words = words;
  const When when;
  call.when = when;
  check_mutual(call);
  const MutualParams params = mutual_params(call);
  const MatchLaunch find = find_launch(call), check = check_launch(call);
  const bool scale = call.query.scale != nullptr;
  run(settings, find, [&] { scale ? find_mutual_kernel<true>(params) : find_mutual_kernel<false>(params); });
  run(settings, check, [&] { scale ? check_mutual_kernel<true>(params) : check_mutual_kernel<false>(params); });
  valid.reply();
}

}  // namespace

int main() {
  for (int kind = std::getc(stdin); kind != EOF; kind = std::getc(stdin)) {
    const Settings settings;
    if (kind == 's') spans(settings);
    if (kind == 'g') groups(settings);
    if (kind == 'p') points(settings);
    if (kind == 'm') mutual(settings);
    std::fflush(stdout);
  }
}
