#include "dense_match_mutual.cuh"
#include "dense_match_search.cuh"
#include "launch.hpp"

namespace lift_fast {
namespace {

constexpr const char* kName = "dense_match";

ReadyKernels& kernels() {
  static ReadyKernels ready(kName, match_spans_kernel, match_groups_kernel<true, true>,
                            match_groups_kernel<true, false>, match_groups_kernel<false, true>,
                            match_groups_kernel<false, false>, match_points_kernel<true>, match_points_kernel<false>,
                            find_mutual_kernel<true>, find_mutual_kernel<false>, check_mutual_kernel<true>,
                            check_mutual_kernel<false>);
  return ready;
}

template <class Kernel, class Params>
void launch(Kernel kernel, const Params& params, const MatchLaunch& cut, void* stream) {
  kernel<<<static_cast<unsigned>(cut.blocks), 32 * cut.warps, static_cast<std::size_t>(cut.shared),
           static_cast<cudaStream_t>(stream)>>>(params);
  succeed(cudaGetLastError(), kName, "the launch");
}

}  // namespace

void dense_match_prepare(int device) {
  const DeviceGuard guard(device, kName);
  kernels().on(device);
}

void match_spans_run(const MatchSpansCall& call, int device, void* stream) {
  check_spans(call);
  const DeviceGuard guard(device, kName);
  kernels().on(device);
  launch(match_spans_kernel, span_params(call), span_launch(call), stream);
}

void match_groups_run(const GroupMatchCall& call, int device, void* stream) {
  check_groups(call);
  const DeviceGuard guard(device, kName);
  const MatchLaunch cut = group_launch(call, kernels().on(device).shared_block);
  launch(groups_kernel(call, cut), group_params(call, cut), cut, stream);
}

void match_points_run(const PointMatchCall& call, int device, void* stream) {
  check_points(call);
  if (call.points == 0) return;
  const DeviceGuard guard(device, kName);
  kernels().on(device);
  const auto kernel = call.key.scale != nullptr ? match_points_kernel<true> : match_points_kernel<false>;
  launch(kernel, point_params(call), point_launch(call), stream);
}

void match_mutual_run(const MutualMatchCall& call, int device, void* stream) {
  check_mutual(call);
  const DeviceGuard guard(device, kName);
  kernels().on(device);
  const MutualParams params = mutual_params(call);
  const MatchLaunch find = find_launch(call), check = check_launch(call);
  const bool scale = call.query.scale != nullptr;
  launch(scale ? find_mutual_kernel<true> : find_mutual_kernel<false>, params, find, stream);
  launch(scale ? check_mutual_kernel<true> : check_mutual_kernel<false>, params, check, stream);
}

}  // namespace lift_fast
