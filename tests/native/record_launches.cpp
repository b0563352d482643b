// A CUDA runtime that does nothing but write down what it is asked for, one line each, and the launchers of csrc/cuda/
// at work on it: compiled by nvcc, linked with this in place of the runtime.
//
// Line: scene, function, current device, and more where it matters. What would break a capture in progress, a kernel
// that is launched before it was loaded, and a launch on the legacy stream are marked so.
#include <cuda_runtime.h>

#include <cstdint>
#include <cstdio>
#include <cstring>
#include <map>
#include <set>
#include <stdexcept>
#include <string>
#include <utility>

#include "cuda/dense_match.hpp"
#include "cuda/dense_match_checks.hpp"
#include "cuda/image_encoder.hpp"
#include "cuda/probe.hpp"

namespace {

constexpr int kDevices = 2;
constexpr int kMultiprocessors[kDevices] = {132, 20}, kShared[kDevices] = {227 << 10, 99 << 10};

std::string scene;
int current = 0;
bool capturing = false;
cudaStreamCaptureMode mode = cudaStreamCaptureModeGlobal;
std::string failing;  // the function that fails
cudaError_t last = cudaSuccess;
// Filled before main, in an order that the language does not define.
std::map<const void*, std::string>& names() {
  static std::map<const void*, std::string> known;
  return known;
}
std::set<std::pair<const void*, int>> loaded;
std::map<std::pair<const void*, int>, int> allowed;
struct {
  dim3 grid, block;
  std::size_t shared;
  cudaStream_t stream;
} pushed;

void note(const std::string& what) { std::printf("%s %s\n", scene.c_str(), what.c_str()); }

cudaError_t done(const char* name, const std::string& more = "", bool unsafe = false) {
  note(std::string(name) + " device=" + std::to_string(current) + (more.empty() ? "" : " " + more) +
       (unsafe && capturing && mode != cudaStreamCaptureModeRelaxed ? " BREAKS-CAPTURE" : ""));
  return last = failing == name ? cudaErrorInvalidValue : cudaSuccess;
}

std::string stream_name(cudaStream_t stream) {
  return "stream=" + std::to_string(reinterpret_cast<std::uintptr_t>(stream));
}

}  // namespace

extern "C" {

void** __cudaRegisterFatBinary(void*) { return nullptr; }
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
char __cudaInitModule(void**) { return 1; }
void __cudaRegisterVar(void**, char*, char*, const char*, int, std::size_t, int, int) {}
void __cudaRegisterFunction(void**, const char* host, char*, const char* name, int, uint3*, uint3*, dim3*, dim3*,
                            int*) {
  names()[host] = name;
}
unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, std::size_t shared, CUstream_st* stream) {
  pushed = {grid, block, shared, stream};
  return 0;
}
cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, std::size_t* shared, void* stream) {
  *grid = pushed.grid;
  *block = pushed.block;
  *shared = pushed.shared;
  *static_cast<cudaStream_t*>(stream) = pushed.stream;
  return cudaSuccess;
}
cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* function) {
  *kernel = reinterpret_cast<cudaKernel_t>(const_cast<void*>(function));
  return cudaSuccess;
}
cudaError_t cudaLaunchKernel(const void* function, dim3 grid, dim3 block, void**, std::size_t shared,
                             cudaStream_t stream) {
  const std::pair<const void*, int> here(function, current);
  std::string more = "kernel=" + names()[function] + " blocks=" + std::to_string(grid.x) +
                     " threads=" + std::to_string(block.x) + " shared=" + std::to_string(shared) + " " +
                     stream_name(stream);
  if (!loaded.count(here)) more += " NOT-LOADED";
  if (static_cast<int>(shared) > (allowed.count(here) ? allowed[here] : 48 << 10)) more += " NOT-ALLOWED";
  if (stream == nullptr) more += " LEGACY-STREAM";
  return done("cudaLaunchKernel", more);
}
cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void** arguments, std::size_t shared,
                               cudaStream_t stream) {
  return cudaLaunchKernel(reinterpret_cast<const void*>(kernel), grid, block, arguments, shared, stream);
}
cudaError_t cudaFuncSetAttribute(const void* function, cudaFuncAttribute, int value) {
  loaded.insert({function, current});
  allowed[{function, current}] = value;
  return done("cudaFuncSetAttribute", "value=" + std::to_string(value), true);
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr name, int device) {
  *value = name == cudaDevAttrMultiProcessorCount ? kMultiprocessors[device] : kShared[device];
  return done("cudaDeviceGetAttribute", "of=" + std::to_string(device));
}
cudaError_t cudaGetDevice(int* device) {
  *device = current;
  return done("cudaGetDevice");
}
cudaError_t cudaSetDevice(int device) {
  current = device;
  return done("cudaSetDevice");
}
cudaError_t cudaGetDeviceCount(int* count) {
  *count = kDevices;
  return done("cudaGetDeviceCount");
}
cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* other) {
  std::swap(*other, mode);
  return cudaSuccess;
}
cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned flags) {
  *stream = reinterpret_cast<cudaStream_t>(std::uintptr_t{flags == cudaStreamNonBlocking ? 900u : 0u});
  return done("cudaStreamCreateWithFlags", "", true);
}
cudaError_t cudaStreamDestroy(cudaStream_t stream) { return done("cudaStreamDestroy", stream_name(stream), true); }
cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  return done("cudaStreamSynchronize", stream_name(stream), true);
}
cudaError_t cudaMemcpyFromSymbolAsync(void* to, const void*, std::size_t, std::size_t, cudaMemcpyKind,
                                      cudaStream_t stream) {
  const int architecture = 900;
  std::memcpy(to, &architecture, sizeof architecture);
  return done("cudaMemcpyFromSymbolAsync", stream_name(stream), true);
}
// No launcher may call these; a test, not the linker, must report one that does.
cudaError_t cudaMalloc(void**, std::size_t) { return done("cudaMalloc", "", true); }
cudaError_t cudaFree(void*) { return done("cudaFree", "", true); }
cudaError_t cudaMemcpy(void*, const void*, std::size_t, cudaMemcpyKind) {
  return done("cudaMemcpy", "LEGACY-STREAM", true);
}
cudaError_t cudaGetLastError() {
  const cudaError_t error = last;
  last = cudaSuccess;
  note("cudaGetLastError");
  return error;
}
const char* cudaGetErrorString(cudaError_t) { return "as if"; }

}  // extern "C"

namespace {

using namespace lift_fast;

// Addresses that are never read.
template <class T>
T* somewhere(std::uintptr_t offset = 0) {
  return reinterpret_cast<T*>((std::uintptr_t{1} << 30) + offset);
}

void* stream(std::uintptr_t number) { return reinterpret_cast<void*>(number); }

MatchAxis axis(std::int64_t cells, std::int64_t pixels) {
  return {cells,
          pixels,
          cells,
          somewhere<std::int32_t>(),
          somewhere<std::int32_t>(),
          somewhere<std::int32_t>(),
          somewhere<float>(),
          2 * pixels / cells};
}

MatchImage image(bool scale) {
  const float* const factors = scale ? somewhere<float>() : nullptr;
  return {axis(56, 448), axis(56, 448), factors, factors, factors, factors, factors};
}

void encode(int device, std::uintptr_t on, EncoderType type = EncoderType::bfloat16, bool pool = true,
            std::int64_t batch = 1, std::int64_t side = 28, EncoderCut cut = EncoderCut::walk) {
  ImageEncoderCall call{};
  const std::int64_t pixels = side * (pool ? 16 : 8);
  call.imgs = somewhere<void>();
  call.packed = somewhere<void>();
  call.bias = somewhere<float>();
  call.f = somewhere<void>();
  call.g = somewhere<void>();
  const std::int64_t strides[4] = {3 * pixels * pixels, pixels * pixels, pixels, 1};
  for (int i = 0; i < 4; ++i) call.stride[i] = strides[i];
  call.batch = batch;
  call.h = call.w = side;
  call.pool = pool;
  call.type = type;
  call.cut = cut;
  image_encoder_run(call, device, stream(on));
}

void match(int device, std::uintptr_t on, bool scale) {
  if (scale) {
    MatchSpansCall spans{};
    spans.gram = somewhere<double>();
    spans.y = spans.x = axis(56, 448);
    spans.scale_high = somewhere<float>();
    spans.spans = somewhere<float>();
    match_spans_run(spans, device, stream(on));
  }
  GroupMatchCall groups{};
  groups.table = somewhere<float>();
  groups.rows = 56 * 56;
  groups.key = image(scale);
  groups.query_y = groups.query_x = axis(56, 448);
  groups.band = {0, 56, 0, 56, 0, 0, 56};
  groups.similarity = somewhere<float>();
  groups.index = somewhere<std::int64_t>();
  match_groups_run(groups, device, stream(on));
  PointMatchCall points{};
  points.table = somewhere<float>();
  points.points = 30;
  points.key = image(scale);
  points.similarity = somewhere<float>();
  points.index = somewhere<std::int64_t>();
  match_points_run(points, device, stream(on));
  MutualMatchCall mutual{};
  mutual.table = somewhere<float>();
  mutual.query = image(scale);
  mutual.key_y = mutual.key_x = axis(56, 448);
  mutual.index = somewhere<std::int64_t>();
  mutual.valid = somewhere<bool>();
  mutual.scratch = somewhere<std::int32_t>();
  mutual.scratch_words = match_scratch_words(mutual);
  match_mutual_run(mutual, device, stream(on));
}

}  // namespace

int main() {
  scene = "first-probe-in-capture";
  capturing = true;
  const CudaProbe probed = probe_cuda(1);
  note("answer works=" + std::to_string(probed.works) + " " + probed.reason);
  scene = "capture-after-probe";
  for (bool pool : {true, false}) {
    for (EncoderType type : {EncoderType::bfloat16, EncoderType::float16, EncoderType::tf32}) encode(1, 7, type, pool);
  }
  for (bool scale : {true, false}) match(1, 7, scale);
  scene = "first-call-in-capture";
  current = 1;
  encode(0, 8, EncoderType::tf32, true, 64);
  match(0, 8, false);
  capturing = false;
  scene = "same-device";
  current = 0;
  encode(0, 9);
  scene = "large";
  encode(0, 9, EncoderType::bfloat16, true, 64, 56);
  scene = "in-turn";
  for (int i = 0; i < 2; ++i) {
    encode(0, 9);
    encode(1, 9);
    encode(0, 9, EncoderType::bfloat16, true, 64, 56);
    encode(0, 9, EncoderType::tf32, true, 64, 56);
    encode(0, 9, EncoderType::tf32, false, 64, 56);
  }
  scene = "by-name";
  for (EncoderType type : {EncoderType::bfloat16, EncoderType::float16, EncoderType::tf32}) {
    for (EncoderCut cut : {EncoderCut::walk, EncoderCut::stream, EncoderCut::spread}) {
      for (bool pool : {true, false}) encode(0, 9, type, pool, 1, 28, cut);
    }
  }
  scene = "refused";
  failing = "cudaLaunchKernel";
  try {
    encode(1, 9);
    note("no error");
  } catch (const std::runtime_error& error) {
    note(std::string("error ") + error.what());
  }
  note("after device=" + std::to_string(current) + " last=" + std::to_string(last));
  failing = "";
  scene = "no-such-device";
  const CudaProbe missing = probe_cuda(kDevices);
  note("answer works=" + std::to_string(missing.works) + " " + missing.reason);
  scene = "failing-probe";
  failing = "cudaMemcpyFromSymbolAsync";
  const CudaProbe failed = probe_cuda(1);
  note("answer works=" + std::to_string(failed.works) + " " + failed.reason);
  note("after device=" + std::to_string(current) + " last=" + std::to_string(last) +
       " mode=" + std::to_string(static_cast<int>(mode)));
}
