// Products of operands that the test lays out: the images of tiles in shared memory with their descriptors, or registers.
#include "cases.h"

namespace hebatron::cases {
namespace {

struct Product {
  int n, mn_major_a, mn_major_b;
  const uint8_t *a, *b;  // images of 64 K; a is null where A comes from registers
  int bytes_a, bytes_b;
  const uint32_t* a_registers;  // of each of the four steps of 16 K, 128 threads, four registers
  const uint64_t *descriptors_a, *descriptors_b;  // of each step, relative to the tile
  float* d;                                       // 128 threads, n / 2 registers
};

// Calls the emulator below wgmma_ss and wgmma_rs, so that N need not be a template's argument.
__global__ void product(const Product p) {
  HEBATRON_DYNAMIC_SHARED(smem);
  const int t = threadIdx.x;
  uint8_t* const tile_b = smem + (p.bytes_a + 1023) / 1024 * 1024;
  for (int i = t; i < p.bytes_a; i += kWarpgroup) smem[i] = p.a[i];
  for (int i = t; i < p.bytes_b; i += kWarpgroup) tile_b[i] = p.b[i];
  fence_proxy_async();
  block_sync();
  float d[128];
  wgmma_fence();
  for (int step = 0; step < 4; step++) {
    const uint64_t a = p.a ? p.descriptors_a[step] + (smem_address(smem) >> 4) : 0;
    const uint64_t b = p.descriptors_b[step] + (smem_address(tile_b) >> 4);
    emulator::wgmma(d, p.a ? nullptr : p.a_registers + (step * kWarpgroup + t) * 4, a, b, p.n, p.mn_major_a, p.mn_major_b, step > 0);
  }
  wgmma_commit();
  wgmma_wait<0>();
  for (int i = 0; i < p.n / 2; i++) p.d[t * p.n / 2 + i] = d[i];
}

__global__ void small_product(const uint32_t* a, const uint32_t* b, float* d) {
  uint32_t fragment_a[4], fragment_b[2];
  float fragment_d[4] = {};
  const int lane = lane_id();
  for (int i = 0; i < 4; i++) fragment_a[i] = a[lane * 4 + i];
  for (int i = 0; i < 2; i++) fragment_b[i] = b[lane * 2 + i];
  mma_m16n8k16(fragment_d, fragment_a, fragment_b);
  for (int i = 0; i < 4; i++) d[lane * 4 + i] = fragment_d[i];
}

std::string problem;
const char* guarded(const std::function<void()>& work) {
  emulator::options() = {};
  emulator::forget_memory();
  try {
    work();
    return nullptr;
  } catch (const std::exception& error) {
    problem = error.what();
    return problem.c_str();
  }
}

}  // namespace

#define EXPORTED extern "C" __attribute__((visibility("default")))

EXPORTED const char* layout_wgmma(const Product* p) {
  return guarded([&] { run(product, 1, kWarpgroup, (p->bytes_a + 1023) / 1024 * 1024 + p->bytes_b, 1, *p); });
}
EXPORTED const char* layout_mma(const uint32_t* a, const uint32_t* b, float* d) {
  return guarded([&] { run(small_product, 1, kWarp, 0, 1, a, b, d); });
}

}  // namespace hebatron::cases
