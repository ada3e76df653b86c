// wgmma: every N, A from shared memory or registers, each operand K-major or MN-major, on raw tiles in the 128-byte swizzle.
#pragma once
#include "harness.h"

namespace hebatron::conformance {

constexpr int kSteps = 4;          // a product of K = 64: four instructions of 16
constexpr int kBytesA = 64 * 128;  // 64 x 64 bf16 in either order
template <int kN, int kTransB>
constexpr int kBytesB = kTransB ? (kN + 63) / 64 * 64 * 128 : kN * 128;
// The descriptor of step k. K-major: 32 bytes along the rows. MN-major: two atoms of 8 rows down, the next 64 columns
// one group of 8,192 bytes on.
template <int kTrans>
HEBATRON_DEVICE uint64_t step_descriptor(const uint8_t* tile, int k) {
  const uint32_t address = smem_address(tile);
  return kTrans ? wgmma_descriptor(address + k * 2048, 1024, 8192) : wgmma_descriptor(address + k * 32);
}

// `fresh`: the first instruction starts from zero and not from the accumulator's integers.
// The tiles begin kBase bytes into the shared memory, all of whose 227 KB the kernels use.
template <int kN, int kTransA, int kTransB, int kBase = 0>
__global__ void __launch_bounds__(kWarpgroup) product(const uint4* a, const uint4* b, const float* c, bool fresh, float* out) {
  HEBATRON_DYNAMIC_SHARED(bytes);
  uint8_t* smem = bytes + kBase;
  uint4* words = reinterpret_cast<uint4*>(smem);
  const int t = threadIdx.x;
  for (int i = t; i < kBytesA / 16; i += kWarpgroup) words[i] = a[i];
  for (int i = t; i < kBytesB<kN, kTransB> / 16; i += kWarpgroup) words[kBytesA / 16 + i] = b[i];
  fence_proxy_async();
  block_sync();
  float d[kN / 2];
#pragma unroll
  for (int i = 0; i < kN / 2; i++) d[i] = c[i * kWarpgroup + t];
  wgmma_fence();
#pragma unroll
  for (int k = 0; k < kSteps; k++)
    wgmma_ss<kTransA, kTransB>(d, step_descriptor<kTransA>(smem, k), step_descriptor<kTransB>(smem + kBytesA, k), !(fresh && k == 0));
  wgmma_commit();
  wgmma_wait<0>();
  wgmma_hold(d);
#pragma unroll
  for (int i = 0; i < kN / 2; i++) out[i * kWarpgroup + t] = d[i];
}

// A from registers: words[k][i] of each thread, the fragment of mma_m16n8k16 of its warp's 16 rows.
template <int kN, int kTransB>
__global__ void __launch_bounds__(kWarpgroup) product_registers(const uint32_t* a, const uint4* b, const float* c, bool fresh, float* out) {
  HEBATRON_DYNAMIC_SHARED(smem);
  uint4* words = reinterpret_cast<uint4*>(smem);
  const int t = threadIdx.x;
  for (int i = t; i < kBytesB<kN, kTransB> / 16; i += kWarpgroup) words[i] = b[i];
  fence_proxy_async();
  block_sync();
  uint32_t fragment[kSteps][4];
#pragma unroll
  for (int k = 0; k < kSteps; k++)
#pragma unroll
    for (int i = 0; i < 4; i++) fragment[k][i] = a[(k * 4 + i) * kWarpgroup + t];
  float d[kN / 2];
#pragma unroll
  for (int i = 0; i < kN / 2; i++) d[i] = c[i * kWarpgroup + t];
  wgmma_fence();
#pragma unroll
  for (int k = 0; k < kSteps; k++) wgmma_rs<kTransB>(d, fragment[k], step_descriptor<kTransB>(smem, k), !(fresh && k == 0));
  wgmma_commit();
  wgmma_wait<0>();
  wgmma_hold(d);
#pragma unroll
  for (int i = 0; i < kN / 2; i++) out[i * kWarpgroup + t] = d[i];
}

// Two groups in flight: the first result is read while the second may still run.
__global__ void __launch_bounds__(kWarpgroup) two_groups(const uint4* a, const uint4* b, const float* c, float* out) {
  HEBATRON_DYNAMIC_SHARED(smem);
  uint4* words = reinterpret_cast<uint4*>(smem);
  const int t = threadIdx.x;
  for (int i = t; i < kBytesA / 16; i += kWarpgroup) words[i] = a[i];
  for (int i = t; i < kBytesB<64, 0> / 16; i += kWarpgroup) words[kBytesA / 16 + i] = b[i];
  fence_proxy_async();
  block_sync();
  float first[32], second[32];
#pragma unroll
  for (int i = 0; i < 32; i++) {  // loaded, not set: the compiler sinks constants below the fence
    first[i] = c[i * kWarpgroup + t];
    second[i] = c[(32 + i) * kWarpgroup + t];
  }
  wgmma_fence();
#pragma unroll
  for (int k = 0; k < kSteps; k++) wgmma_ss<0, 0>(first, step_descriptor<0>(smem, k), step_descriptor<0>(smem + kBytesA, k), true);
  wgmma_commit();
#pragma unroll
  for (int k = 0; k < 2; k++) wgmma_ss<0, 0>(second, step_descriptor<0>(smem, k), step_descriptor<0>(smem + kBytesA, k), true);
  wgmma_commit();
  wgmma_wait<1>();
  wgmma_hold(first);
#pragma unroll
  for (int i = 0; i < 32; i++) out[i * kWarpgroup + t] = first[i];
  wgmma_wait<0>();
  wgmma_hold(second);
#pragma unroll
  for (int i = 0; i < 32; i++) out[(32 + i) * kWarpgroup + t] = second[i];
}

// The whole way of the gathered kernels, over and over: a ring of stages that a producer warpgroup fills, A's tiles by cp.async
// and B's by the copy engine on one mbarrier, and that a consumer warpgroup multiplies behind fence_proxy_async. Were that
// fence, the noinc arrival or the release of a stage not what they are taken for, a round would be of old or mixed tiles.
constexpr int kRounds = 48, kRing = 3;

__global__ void __launch_bounds__(2 * kWarpgroup, 1) gathered_ring(const uint4* a, const uint4* b, float* out) {
  HEBATRON_DYNAMIC_SHARED(smem);
  HEBATRON_SHARED(uint64_t, full, kRing);
  HEBATRON_SHARED(uint64_t, empty, kRing);
  const int t = threadIdx.x % kWarpgroup;
  if (threadIdx.x == 0) {
    for (int s = 0; s < kRing; s++) {
      mbarrier_init(full + s, 1 + kWarpgroup);
      mbarrier_init(empty + s, kWarpgroup / kWarp);
    }
    mbarrier_fence_init();
  }
  block_sync();
  if (threadIdx.x < kWarpgroup) {
    for (int round = 0; round < kRounds; round++) {
      const int stage = round % kRing;
      uint8_t* tile = smem + stage * 2 * kBytesA;
      mbarrier_wait(empty + stage, round / kRing % 2 ^ 1);
      if (t == 0) {
        mbarrier_arrive_expect(full + stage, kBytesA);
        tma_load_1d(tile + kBytesA, b + round * (kBytesA / 16), kBytesA, full + stage);
      }
      for (int i = t; i < kBytesA / 16; i += kWarpgroup) cp_async_16(smem_address(tile) + i * 16, a + round * (kBytesA / 16) + i, true);
      cp_async_arrive(full + stage);
    }
  } else {
    float d[32];
    for (int round = 0; round < kRounds; round++) {
      const int stage = round % kRing;
      const uint8_t* tile = smem + stage * 2 * kBytesA;
      mbarrier_wait(full + stage, round / kRing % 2);
      fence_proxy_async();
      wgmma_fence();
#pragma unroll
      for (int k = 0; k < kSteps; k++) wgmma_ss<0, 0>(d, step_descriptor<0>(tile, k), step_descriptor<0>(tile + kBytesA, k), round + k > 0);
      wgmma_commit();
      wgmma_wait<1>();
      if (round > 0 && t % kWarp == 0) mbarrier_arrive(empty + (round - 1) % kRing);
    }
    wgmma_wait<0>();
    wgmma_hold(d);
#pragma unroll
    for (int i = 0; i < 32; i++) out[(blockIdx.x * 32 + i) * kWarpgroup + t] = d[i];
  }
}
inline Bytes run_gathered_ring() {
  constexpr int kBlocks = 2;
  const Buffer<uint16_t> a(small_bf16(80, kRounds * kBytesA / 2)), b(small_bf16(81, kRounds * kBytesA / 2));
  const Buffer<float> out(kBlocks * 32 * kWarpgroup);
  run(gathered_ring, shape_of(kBlocks, 2 * kWarpgroup, kRing * 2 * kBytesA), reinterpret_cast<const uint4*>(a.get()),
      reinterpret_cast<const uint4*>(b.get()), out.get());
  return out.read();
}

// Each run starts once from integers and once from zero.
template <class Launch>
Bytes both_starts(int n, const Launch& launch_with) {
  Bytes found;
  for (const bool fresh : {false, true}) {
    const Buffer<float> out(n / 2 * kWarpgroup);
    launch_with(fresh, out.get());
    const Bytes result = out.read();
    found.insert(found.end(), result.begin(), result.end());
  }
  return found;
}
template <int kN, int kTransA, int kTransB, int kBase = 0>
Bytes run_product() {
  const int bytes = kBytesB<kN, kTransB>;
  const Buffer<uint16_t> a(small_bf16(70, kBytesA / 2)), b(small_bf16(71, bytes / 2));
  const Buffer<float> c(small_floats(72, kN / 2 * kWarpgroup));
  return both_starts(kN, [&](bool fresh, float* out) {
    run(product<kN, kTransA, kTransB, kBase>, shape_of(1, kWarpgroup, kBase + kBytesA + bytes), reinterpret_cast<const uint4*>(a.get()),
        reinterpret_cast<const uint4*>(b.get()), c.get(), fresh, out);
  });
}
template <int kN, int kTransB>
Bytes run_product_registers() {
  const int bytes = kBytesB<kN, kTransB>;
  const Buffer<uint16_t> a(small_bf16(73, kSteps * 4 * kWarpgroup * 2)), b(small_bf16(74, bytes / 2));
  const Buffer<float> c(small_floats(75, kN / 2 * kWarpgroup));
  return both_starts(kN, [&](bool fresh, float* out) {
    run(product_registers<kN, kTransB>, shape_of(1, kWarpgroup, bytes), reinterpret_cast<const uint32_t*>(a.get()),
        reinterpret_cast<const uint4*>(b.get()), c.get(), fresh, out);
  });
}
inline Bytes run_two_groups() {
  const Buffer<uint16_t> a(small_bf16(76, kBytesA / 2)), b(small_bf16(77, kBytesB<64, 0> / 2));
  const Buffer<float> c(small_floats(78, 64 * kWarpgroup)), out(64 * kWarpgroup);
  run(two_groups, shape_of(1, kWarpgroup, kBytesA + kBytesB<64, 0>), reinterpret_cast<const uint4*>(a.get()),
      reinterpret_cast<const uint4*>(b.get()), c.get(), out.get());
  return out.read();
}

template <int kN>
void add_products(Cases& cases) {
  const std::string n = std::to_string(kN);
  cases.push_back({"wgmma_ss_" + n + "_kk", run_product<kN, 0, 0>});
  cases.push_back({"wgmma_ss_" + n + "_kn", run_product<kN, 0, 1>});
  cases.push_back({"wgmma_ss_" + n + "_mk", run_product<kN, 1, 0>});
  cases.push_back({"wgmma_ss_" + n + "_mn", run_product<kN, 1, 1>});
  cases.push_back({"wgmma_rs_" + n + "_k", run_product_registers<kN, 0>});
  cases.push_back({"wgmma_rs_" + n + "_n", run_product_registers<kN, 1>});
}
inline void add_wgmma_cases(Cases& cases) {
  add_products<8>(cases);
  add_products<16>(cases);
  add_products<32>(cases);
  add_products<64>(cases);
  add_products<96>(cases);
  add_products<104>(cases);
  add_products<112>(cases);
  add_products<128>(cases);
  add_products<160>(cases);
  add_products<176>(cases);
  add_products<192>(cases);
  add_products<208>(cases);
  add_products<224>(cases);
  add_products<232>(cases);
  add_products<256>(cases);
  cases.push_back({"wgmma_two_groups", run_two_groups});
  cases.push_back({"wgmma_high", run_product<64, 0, 0, 211 * 1024>});
  cases.push_back({"wgmma_gathered_ring", run_gathered_ring});
}

}  // namespace hebatron::conformance
