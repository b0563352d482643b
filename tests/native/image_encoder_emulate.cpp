// Runs the image encoder's kernel on the CPU, on exactly sized heap blocks, so that a sanitizer sees every byte read or
// written outside. Arguments: files of cases; writes the results beside each, as <file>.out.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <string>

#define LIFT_FAST_EMULATED_DEVICE
#include "cuda/image_encoder.cuh"

using namespace lift_fast;

namespace {

// As tests/test_native_image_encoder.py writes it, before the image's bytes, the packed weights and the biases.
struct Case {
  std::int64_t type, pool, batch, h, w, stride[4], image_bytes;
  std::int64_t cut;  // of EncoderCut
  std::int64_t strips, rows;  // 0: as the launcher would choose on a device of these properties
  std::int64_t multiprocessors, shared_block, shared_multiprocessor;
  std::int64_t late_copies, order, seed;
};

template <class T>
void run(const Case& c, const ImageEncoderCall& call) {
  EncoderTiling tiling{};
  if (c.strips > 0) {
    tiling = encoder_blocks(call, static_cast<int>(c.strips), c.rows);
    tiling.shared = encoder_shared<T>(call.pool, tiling);
  } else {
    tiling = encoder_tiling_of(call, {c.multiprocessors, c.shared_block, c.shared_multiprocessor});
    if (tiling.shared > c.shared_block) emulated::fail("a block has too much shared memory");
  }
  if (tiling.warps > kEncoderMaxWarps) emulated::fail("a block has too many warps");
  const EncoderParams params = encoder_params(call, tiling);
  const auto kernel = [&] {
    switch (call.cut) {
      case EncoderCut::walk:
        return call.pool ? image_encoder_kernel<T, true, EncoderCut::walk>
                         : image_encoder_kernel<T, false, EncoderCut::walk>;
      case EncoderCut::stream:
        return call.pool ? image_encoder_kernel<T, true, EncoderCut::stream>
                         : image_encoder_kernel<T, false, EncoderCut::stream>;
      default:
        return call.pool ? image_encoder_kernel<T, true, EncoderCut::spread>
                         : image_encoder_kernel<T, false, EncoderCut::spread>;
    }
  }();
  const auto copies = c.late_copies ? emulated::Copies::late : emulated::Copies::early;
  emulated::run_blocks(c.batch * tiling.column_blocks * tiling.row_blocks, tiling.warps, tiling.shared,
                       {copies, static_cast<emulated::Order>(c.order), c.seed}, [&] { kernel(params); });
}

void run_file(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  Case c{};
  file.read(reinterpret_cast<char*>(&c), sizeof c);
  const auto type = static_cast<EncoderType>(c.type);
  const int item = encoder_itemsize(type);
  const emulated::Array imgs(c.image_bytes), packed(kEncoderWeights * item), bias(3 * 32 * 4);
  for (const emulated::Array* array : {&imgs, &packed, &bias}) file.read(array->as<char>(), array->bytes());
  if (!file) {
    std::fprintf(stderr, "%s ends early\n", path.c_str());
    std::exit(2);
  }
  const std::int64_t cells = c.batch * c.h * c.w;
  const emulated::Array f(4 * cells * 32 * item), g(cells * 32 * item);
  ImageEncoderCall call{};
  call.imgs = imgs.as<void>();
  for (int i = 0; i < 4; ++i) call.stride[i] = c.stride[i];
  call.packed = packed.as<void>();
  call.bias = bias.as<const float>();
  call.f = f.as<void>();
  call.g = g.as<void>();
  call.batch = c.batch;
  call.h = c.h;
  call.w = c.w;
  call.pool = c.pool != 0;
  call.type = type;
  call.cut = static_cast<EncoderCut>(c.cut);
  check_encoder_call(call);
  switch (type) {
    case EncoderType::bfloat16: run<Bfloat16Operands>(c, call); break;
    case EncoderType::float16: run<Float16Operands>(c, call); break;
    case EncoderType::tf32: run<Tf32Operands>(c, call); break;
  }
  std::ofstream out(path + ".out", std::ios::binary);
  for (const emulated::Array* array : {&f, &g}) out.write(array->as<char>(), array->bytes());
}

}  // namespace

int main(int count, char** names) {
  for (int i = 1; i < count; ++i) run_file(names[i]);
  std::printf("%d ok\n", count - 1);
}
