// cp.async, the matrix fragments of a warp, and mbarrier phases.
#pragma once
#include "harness.h"

namespace hebatron::conformance {

// 128 threads copy 16 bytes each into four stages: two groups waited for one by one, one by wait_all, one through an mbarrier.
// Threads 0, 5, 10, ... (or 0, 3, 6, ...) ask for zeros, the former from nowhere.
__global__ void async_copies(const uint4* in, uint4* out) {
  HEBATRON_SHARED(uint4, stage, 512);
  HEBATRON_SHARED(uint64_t, barrier, 1);
  const int t = threadIdx.x, other = 127 - t;
  for (int s = 0; s < 4; s++) stage[s * 128 + t] = make_uint4(~0u, ~0u, ~0u, ~0u);
  if (t == 0) {
    mbarrier_init(barrier, 128);
    mbarrier_fence_init();
  }
  block_sync();
  cp_async_16(smem_address(stage + t), t % 5 ? in + t : nullptr, t % 5 != 0);  // where nothing is copied nothing is read
  cp_async_commit();
  cp_async_16(smem_address(stage + 128 + t), in + 128 + (t * 3) % 128, t % 3 != 0);
  cp_async_commit();
  cp_async_wait<1>();
  block_sync();
  out[t] = stage[other];
  cp_async_wait<0>();
  block_sync();
  out[128 + t] = stage[128 + other];
  cp_async_16(smem_address(stage + 256 + t), in + 256 + t, true);
  cp_async_wait_all();
  block_sync();
  out[256 + t] = stage[256 + other];
  cp_async_16(smem_address(stage + 384 + t), in + 384 + t, t != 9);
  cp_async_arrive(barrier);
  mbarrier_wait(barrier, 0);
  out[384 + t] = stage[384 + other];
}
inline Bytes run_async_copies() {
  const Buffer<uint32_t> in(noise_words(20, 512 * 4));
  const Buffer<uint32_t> out(512 * 4);
  run(async_copies, shape_of(1, 128), reinterpret_cast<const uint4*>(in.get()), reinterpret_cast<uint4*>(out.get()));
  return out.read();
}

// Rows of 16 bytes lie kPitch apart, so that a wrong address shows. Lane l gives the address of row l.
constexpr int kPitch = 48;

__global__ void ldmatrix(const uint32_t* in, uint32_t* out) {
  HEBATRON_SHARED(uint4, rows, kWarp * kPitch / 16);
  uint32_t* words = reinterpret_cast<uint32_t*>(rows);
  const int lane = lane_id();
  for (int i = lane; i < kWarp * kPitch / 4; i += kWarp) words[i] = in[i];
  warp_sync();
  const uint32_t address = smem_address(rows) + lane * kPitch;
  uint32_t four[4], two[2];
  ldmatrix_x4(four, address);
#pragma unroll
  for (int i = 0; i < 4; i++) out[i * kWarp + lane] = four[i];
  ldmatrix_x4_trans(four, address);
#pragma unroll
  for (int i = 0; i < 4; i++) out[(4 + i) * kWarp + lane] = four[i];
  ldmatrix_x2(two, address);
#pragma unroll
  for (int i = 0; i < 2; i++) out[(8 + i) * kWarp + lane] = two[i];
  ldmatrix_x2_trans(two, address);
#pragma unroll
  for (int i = 0; i < 2; i++) out[(10 + i) * kWarp + lane] = two[i];
}
inline Bytes run_ldmatrix() {
  const Buffer<uint32_t> in(noise_words(21, kWarp * kPitch / 4));
  const Buffer<uint32_t> out(12 * kWarp);
  run(ldmatrix, shape_of(1, kWarp), in.get(), out.get());
  return out.read();
}

__global__ void stmatrix(const uint32_t* in, uint32_t* out) {
  HEBATRON_SHARED(uint4, rows, kWarp * kPitch / 16);
  uint32_t* words = reinterpret_cast<uint32_t*>(rows);
  const int lane = lane_id();
  const uint32_t address = smem_address(rows) + lane * kPitch;
  for (int transposed = 0; transposed < 2; transposed++) {
    for (int i = lane; i < kWarp * kPitch / 4; i += kWarp) words[i] = ~0u;
    warp_sync();
    uint32_t four[4];
#pragma unroll
    for (int i = 0; i < 4; i++) four[i] = in[i * kWarp + lane];
    if (transposed)
      stmatrix_x4_trans(address, four);
    else
      stmatrix_x4(address, four);
    warp_sync();
    for (int i = lane; i < kWarp * kPitch / 4; i += kWarp) out[transposed * kWarp * kPitch / 4 + i] = words[i];
    warp_sync();
  }
}
inline Bytes run_stmatrix() {
  const Buffer<uint32_t> in(noise_words(22, 4 * kWarp));
  const Buffer<uint32_t> out(2 * kWarp * kPitch / 4);
  run(stmatrix, shape_of(1, kWarp), in.get(), out.get());
  return out.read();
}

// Four products into one accumulator that starts with integers.
__global__ void mma(const uint32_t* a, const uint32_t* b, const float* c, float* out) {
  const int lane = lane_id();
  float d[4];
#pragma unroll
  for (int i = 0; i < 4; i++) d[i] = c[i * kWarp + lane];
  for (int step = 0; step < 4; step++) {
    uint32_t fragment_a[4], fragment_b[2];
#pragma unroll
    for (int i = 0; i < 4; i++) fragment_a[i] = a[(step * 4 + i) * kWarp + lane];
#pragma unroll
    for (int i = 0; i < 2; i++) fragment_b[i] = b[(step * 2 + i) * kWarp + lane];
    mma_m16n8k16(d, fragment_a, fragment_b);
  }
#pragma unroll
  for (int i = 0; i < 4; i++) out[i * kWarp + lane] = d[i];
}
inline Bytes run_mma() {
  const Buffer<uint16_t> a(small_bf16(23, 4 * 4 * kWarp * 2)), b(small_bf16(24, 4 * 2 * kWarp * 2));
  const Buffer<float> c(small_floats(25, 4 * kWarp)), out(4 * kWarp);
  run(mma, shape_of(1, kWarp), reinterpret_cast<const uint32_t*>(a.get()), reinterpret_cast<const uint32_t*>(b.get()), c.get(), out.get());
  return out.read();
}

// What mbarrier_test says after each step of three phases: arrivals, arrivals and bytes, bytes announced apart.
__global__ void mbarrier_phases(const uint8_t* in, uint32_t* out) {
  HEBATRON_SHARED(uint4, landing, 16);
  HEBATRON_SHARED(uint64_t, barrier, 1);
  if (threadIdx.x != 0) return;
  int n = 0;
  const auto note = [&](uint32_t parity) { out[n++] = mbarrier_test(barrier, parity); };
  mbarrier_init(barrier, 2);
  mbarrier_fence_init();
  note(0);
  note(1);  // the phase before the first counts as done
  mbarrier_arrive(barrier);
  note(0);
  mbarrier_arrive(barrier);
  note(0);
  note(1);
  mbarrier_arrive_expect(barrier, 64);
  mbarrier_arrive(barrier);
  note(1);  // both arrived, 64 bytes are missing
  tma_load_1d(landing, in, 64, barrier);
  mbarrier_wait(barrier, 1);
  note(1);
  note(0);
  mbarrier_expect(barrier, 128);
  mbarrier_arrive(barrier);
  tma_load_1d(landing + 4, in + 64, 128, barrier);
  note(0);  // one arrival is missing, wherever the bytes are
  mbarrier_arrive(barrier);
  mbarrier_wait(barrier, 0);
  note(0);
  const uint32_t* words = reinterpret_cast<const uint32_t*>(landing);
  for (int i = 0; i < 48; i++) out[n++] = words[i];
}
inline Bytes run_mbarrier_phases() {
  const Buffer<uint32_t> in(noise_words(26, 64));
  const Buffer<uint32_t> out(10 + 48);
  run(mbarrier_phases, shape_of(1, kWarp), reinterpret_cast<const uint8_t*>(in.get()), out.get());
  return out.read();
}

inline void add_async_cases(Cases& cases) {
  cases.push_back({"async_copies", run_async_copies});
  cases.push_back({"ldmatrix", run_ldmatrix});
  cases.push_back({"stmatrix", run_stmatrix});
  cases.push_back({"mma", run_mma});
  cases.push_back({"mbarrier_phases", run_mbarrier_phases});
}

}  // namespace hebatron::conformance
