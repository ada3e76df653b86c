// The device primitives in inline PTX, for nvcc. prim.cuh says what each one means; tests/emulator/prim.h is the other body.
// The only file, with wgmma.cuh beside it, that holds asm.
#pragma once
#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <cstdint>

#define HEBATRON_DEVICE __device__ __forceinline__
#define HEBATRON_GRID_CONSTANT(T) const __grid_constant__ T
#define HEBATRON_SHARED(T, name, count) __shared__ T name[count]
#define HEBATRON_DYNAMIC_SHARED(name) extern __shared__ __align__(1024) uint8_t name[]

namespace hebatron::cuda {

using TensorMap = CUtensorMap;

constexpr uint32_t kAllLanes = 0xffffffffu;

// Warp
HEBATRON_DEVICE int lane_id() { return threadIdx.x % 32; }
template <class T>
HEBATRON_DEVICE T shfl(T v, int lane) {
  return __shfl_sync(kAllLanes, v, lane);
}
template <class T>
HEBATRON_DEVICE T shfl_xor(T v, int mask) {
  return __shfl_xor_sync(kAllLanes, v, mask);
}
template <class T>
HEBATRON_DEVICE T shfl_up(T v, int delta) {
  return __shfl_up_sync(kAllLanes, v, delta);
}
template <class T>
HEBATRON_DEVICE T shfl_down(T v, int delta) {
  return __shfl_down_sync(kAllLanes, v, delta);
}
HEBATRON_DEVICE uint32_t ballot(bool p) { return __ballot_sync(kAllLanes, p); }
HEBATRON_DEVICE int population_count(uint32_t bits) { return __popc(bits); }
HEBATRON_DEVICE bool any(bool p) { return __any_sync(kAllLanes, p); }
HEBATRON_DEVICE bool all(bool p) { return __all_sync(kAllLanes, p); }
HEBATRON_DEVICE void warp_sync() { __syncwarp(); }
HEBATRON_DEVICE bool elect_one() {
  uint32_t chosen;
  asm volatile("{\n.reg .pred P;\nelect.sync _|P, 0xffffffff;\nselp.u32 %0, 1, 0, P;\n}" : "=r"(chosen));
  return chosen;
}

// Block and cluster
HEBATRON_DEVICE void block_sync() { __syncthreads(); }
HEBATRON_DEVICE void named_barrier_sync(int id, int threads) { asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory"); }
HEBATRON_DEVICE void named_barrier_arrive(int id, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
HEBATRON_DEVICE uint32_t cluster_rank() {
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}
HEBATRON_DEVICE uint32_t cluster_size() {
  uint32_t size;
  asm volatile("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
  return size;
}
HEBATRON_DEVICE void cluster_arrive() { asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory"); }
HEBATRON_DEVICE void cluster_wait() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }

// Memory order and atomics on global memory
HEBATRON_DEVICE void fence_block() { __threadfence_block(); }
HEBATRON_DEVICE void fence_gpu() { __threadfence(); }
template <class T>
HEBATRON_DEVICE T atomic_add(T* p, T v) {
  return atomicAdd(p, v);
}
HEBATRON_DEVICE uint32_t atomic_max(uint32_t* p, uint32_t v) { return atomicMax(p, v); }
HEBATRON_DEVICE uint32_t atomic_exchange(uint32_t* p, uint32_t v) { return atomicExch(p, v); }
HEBATRON_DEVICE uint32_t load_acquire(const uint32_t* p) {
  uint32_t v;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
  return v;
}
HEBATRON_DEVICE void store_release(uint32_t* p, uint32_t v) {
  asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(p), "r"(v) : "memory");
}

// Loads and stores with cache hints
HEBATRON_DEVICE uint4 load_streaming(const void* p) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p) : "memory");
  return v;
}
HEBATRON_DEVICE void store_streaming(void* p, uint4 v) {
  asm volatile("st.global.cs.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(p), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w) : "memory");
}
HEBATRON_DEVICE void store_streaming(void* p, uint2 v) {
  asm volatile("st.global.cs.v2.u32 [%0], {%1, %2};" ::"l"(p), "r"(v.x), "r"(v.y) : "memory");
}
HEBATRON_DEVICE void store_vector(void* p, uint4 v) {
  asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(p), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w) : "memory");
}
HEBATRON_DEVICE void store_vector(void* p, uint2 v) {
  asm volatile("st.global.v2.u32 [%0], {%1, %2};" ::"l"(p), "r"(v.x), "r"(v.y) : "memory");
}

// Shared memory addresses
HEBATRON_DEVICE uint32_t smem_address(const void* p) { return uint32_t(__cvta_generic_to_shared(p)); }
HEBATRON_DEVICE uint32_t map_to_rank(uint32_t address, uint32_t rank) {
  uint32_t mapped;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(mapped) : "r"(address), "r"(rank));
  return mapped;
}
HEBATRON_DEVICE uint32_t load_cluster(uint32_t address) {
  uint32_t v;
  asm volatile("ld.shared::cluster.u32 %0, [%1];" : "=r"(v) : "r"(address) : "memory");
  return v;
}
HEBATRON_DEVICE void store_cluster(uint32_t address, uint32_t v) {
  asm volatile("st.shared::cluster.u32 [%0], %1;" ::"r"(address), "r"(v) : "memory");
}

// cp.async
HEBATRON_DEVICE void cp_async_16(uint32_t dst, const void* src, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(dst), "l"(src), "r"(valid ? 16 : 0) : "memory");
}
HEBATRON_DEVICE void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kPending>
HEBATRON_DEVICE void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}
HEBATRON_DEVICE void cp_async_wait_all() { asm volatile("cp.async.wait_all;" ::: "memory"); }
HEBATRON_DEVICE void cp_async_arrive(uint64_t* barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(smem_address(barrier)) : "memory");
}

// Matrix fragments of a warp
HEBATRON_DEVICE void ldmatrix_x4(uint32_t (&r)[4], uint32_t row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];" : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(row) : "memory");
}
HEBATRON_DEVICE void ldmatrix_x4_trans(uint32_t (&r)[4], uint32_t row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];" : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(row) : "memory");
}
HEBATRON_DEVICE void ldmatrix_x2(uint32_t (&r)[2], uint32_t row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];" : "=r"(r[0]), "=r"(r[1]) : "r"(row) : "memory");
}
HEBATRON_DEVICE void ldmatrix_x2_trans(uint32_t (&r)[2], uint32_t row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];" : "=r"(r[0]), "=r"(r[1]) : "r"(row) : "memory");
}
HEBATRON_DEVICE void stmatrix_x4(uint32_t row, const uint32_t (&r)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(row), "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3]) : "memory");
}
HEBATRON_DEVICE void stmatrix_x4_trans(uint32_t row, const uint32_t (&r)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(row), "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3]) : "memory");
}
HEBATRON_DEVICE void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// mbarrier
HEBATRON_DEVICE void mbarrier_init(uint64_t* b, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(smem_address(b)), "r"(arrivals) : "memory");
}
HEBATRON_DEVICE void mbarrier_fence_init() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
HEBATRON_DEVICE void mbarrier_arrive(uint64_t* b) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(smem_address(b)) : "memory");
}
HEBATRON_DEVICE void mbarrier_arrive_expect(uint64_t* b, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(smem_address(b)), "r"(bytes) : "memory");
}
HEBATRON_DEVICE void mbarrier_expect(uint64_t* b, uint32_t bytes) {
  asm volatile("mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%0], %1;" ::"r"(smem_address(b)), "r"(bytes) : "memory");
}
// Not .release.cluster: that is a MEMBAR for the whole GPU before every arrival, and who frees a stage has only read it.
HEBATRON_DEVICE void mbarrier_arrive_rank(uint64_t* b, uint32_t rank) {
  asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(map_to_rank(smem_address(b), rank)) : "memory");
}
HEBATRON_DEVICE bool mbarrier_test(uint64_t* b, uint32_t parity) {
  uint32_t done;
  asm volatile("{\n.reg .pred P;\nmbarrier.try_wait.parity.shared::cta.b64 P, [%1], %2;\nselp.u32 %0, 1, 0, P;\n}"
               : "=r"(done)
               : "r"(smem_address(b)), "r"(parity)
               : "memory");
  return done;
}
HEBATRON_DEVICE void mbarrier_wait(uint64_t* b, uint32_t parity) {
  while (!mbarrier_test(b, parity)) {
  }
}

// The asynchronous proxy: TMA and wgmma
HEBATRON_DEVICE void fence_proxy_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
HEBATRON_DEVICE void fence_proxy_async_global() { asm volatile("fence.proxy.async.global;" ::: "memory"); }
HEBATRON_DEVICE void tma_prefetch(const TensorMap* map) { asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory"); }
HEBATRON_DEVICE void tma_load_1d(void* dst, const void* src, uint32_t bytes, uint64_t* b) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(smem_address(dst)), "l"(src), "r"(bytes), "r"(smem_address(b)) : "memory");
}
HEBATRON_DEVICE void tma_load_2d(void* dst, const TensorMap* map, uint64_t* b, int x, int y) {
  asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];" ::"r"(smem_address(dst)), "l"(map), "r"(smem_address(b)), "r"(x), "r"(y) : "memory");
}
HEBATRON_DEVICE void tma_load_3d(void* dst, const TensorMap* map, uint64_t* b, int x, int y, int z) {
  asm volatile("cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5}], [%2];" ::"r"(smem_address(dst)), "l"(map), "r"(smem_address(b)), "r"(x), "r"(y), "r"(z) : "memory");
}
HEBATRON_DEVICE void tma_load_2d_multicast(void* dst, const TensorMap* map, uint64_t* b, int x, int y, uint16_t ranks) {
  asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1, {%3, %4}], [%2], %5;" ::"r"(smem_address(dst)), "l"(map), "r"(smem_address(b)), "r"(x), "r"(y), "h"(ranks) : "memory");
}
HEBATRON_DEVICE void tma_load_3d_multicast(void* dst, const TensorMap* map, uint64_t* b, int x, int y, int z, uint16_t ranks) {
  asm volatile("cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1, {%3, %4, %5}], [%2], %6;" ::"r"(smem_address(dst)), "l"(map), "r"(smem_address(b)), "r"(x), "r"(y), "r"(z), "h"(ranks) : "memory");
}
HEBATRON_DEVICE void tma_store_1d(void* dst, const void* src, uint32_t bytes) {
  asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(dst), "r"(smem_address(src)), "r"(bytes) : "memory");
}
HEBATRON_DEVICE void tma_store_2d(const TensorMap* map, const void* src, int x, int y) {
  asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%2, %3}], [%1];" ::"l"(map), "r"(smem_address(src)), "r"(x), "r"(y) : "memory");
}
HEBATRON_DEVICE void tma_store_3d(const TensorMap* map, const void* src, int x, int y, int z) {
  asm volatile("cp.async.bulk.tensor.3d.global.shared::cta.bulk_group [%0, {%2, %3, %4}], [%1];" ::"l"(map), "r"(smem_address(src)), "r"(x), "r"(y), "r"(z) : "memory");
}
HEBATRON_DEVICE void tma_reduce_add_1d(float* dst, const float* src, uint32_t bytes) {
  asm volatile("cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%0], [%1], %2;" ::"l"(dst), "r"(smem_address(src)), "r"(bytes) : "memory");
}
HEBATRON_DEVICE void tma_reduce_add_2d(const TensorMap* map, const void* src, int x, int y) {
  asm volatile("cp.reduce.async.bulk.tensor.2d.global.shared::cta.add.bulk_group [%0, {%2, %3}], [%1];" ::"l"(map), "r"(smem_address(src)), "r"(x), "r"(y) : "memory");
}
HEBATRON_DEVICE void tma_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
template <int kPending>
HEBATRON_DEVICE void tma_wait() {
  asm volatile("cp.async.bulk.wait_group %0;" ::"n"(kPending) : "memory");
}
template <int kPending>
HEBATRON_DEVICE void tma_wait_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kPending) : "memory");
}

// Registers of a warpgroup, dependent launches, approximate functions
template <int kCount>
HEBATRON_DEVICE void registers_decrease() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kCount));
}
template <int kCount>
HEBATRON_DEVICE void registers_increase() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kCount));
}
HEBATRON_DEVICE void grid_dependency_wait() { asm volatile("griddepcontrol.wait;" ::: "memory"); }
HEBATRON_DEVICE void grid_dependency_launch() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }
HEBATRON_DEVICE float exp2_approx(float v) {
  float r;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(v));
  return r;
}
HEBATRON_DEVICE float exp_approx(float v) { return __expf(v); }
HEBATRON_DEVICE float sqrt_approx(float v) {  // sqrtf's slow path is a call, and calls serialise wgmma (C7510)
  float r;
  asm("sqrt.approx.f32 %0, %1;" : "=f"(r) : "f"(v));
  return r;
}
HEBATRON_DEVICE float rsqrt_approx(float v) { return rsqrtf(v); }

}  // namespace hebatron::cuda

#include "cuda/prim/wgmma.cuh"
