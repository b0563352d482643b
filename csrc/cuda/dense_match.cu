#include "dense_match.cuh"
#include "launch.hpp"

namespace lift_fast {
namespace {

constexpr const char* kName = "dense_match";

template <class Kernel, class Params>
void launch(Kernel kernel, const Params& params, std::int64_t blocks, int threads, std::int64_t shared, void* stream) {
  succeed(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared)), kName,
          "shared memory");
  kernel<<<static_cast<unsigned>(blocks), threads, static_cast<std::size_t>(shared),
           static_cast<cudaStream_t>(stream)>>>(params);
  succeed(cudaGetLastError(), kName, "the launch");
}

}  // namespace

void match_groups_run(const GroupMatchCall& call, int device, void* stream) {
  check_groups(call);
  const DeviceGuard guard(device, kName);
  const MatchLaunch cut =
      group_launch(call, device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device, kName));
  const auto kernel = call.key.scale != nullptr
                          ? (cut.staged ? match_groups_kernel<true, true> : match_groups_kernel<true, false>)
                          : (cut.staged ? match_groups_kernel<false, true> : match_groups_kernel<false, false>);
  launch(kernel, group_params(call, cut), cut.blocks, 32 * cut.warps, cut.shared, stream);
}

void match_points_run(const PointMatchCall& call, int device, void* stream) {
  check_points(call);
  if (call.points == 0) return;
  const DeviceGuard guard(device, kName);
  const auto kernel = call.key.scale != nullptr ? match_points_kernel<true> : match_points_kernel<false>;
  launch(kernel, point_params(call), call.points, kMatchThreads, kPointShared, stream);
}

void match_mutual_run(const MutualMatchCall& call, int device, void* stream) {
  check_mutual(call);
  const DeviceGuard guard(device, kName);
  const auto kernel = call.query.scale != nullptr ? match_mutual_kernel<true> : match_mutual_kernel<false>;
  launch(kernel, mutual_params(call), call.query.y.strips * call.query.x.strips, kMatchThreads, kMutualShared, stream);
}

}  // namespace lift_fast
