// Everything of CUDA that kernels may use. Each hardware primitive has one name and two bodies: inline PTX for nvcc
// (prim/ptx.cuh, prim/wgmma.cuh; launches and tensor maps in prim/host.cuh), and calls of the emulator for g++
// (tests/emulator/prim.h, with -DHEBATRON_EMULATOR). What stands here is made of those names and shared by both.
//
//   HEBATRON_DEVICE             qualifies a device function
//   HEBATRON_SHARED(T, s, n)    declares T s[n] in static shared memory
//   HEBATRON_DYNAMIC_SHARED(s)  names the dynamic shared memory, 1,024-byte aligned
//   HEBATRON_GRID_CONSTANT(T)   a kernel parameter that stays in constant memory (tensor maps, large structs)
//
// Warp collectives (shfl*, ballot, any, all, elect_one, ldmatrix*, stmatrix*, mma*) need all 32 lanes; wgmma* needs the 128
// threads of a warpgroup. wgmma_ss<kTransA, kTransB> takes descriptors of shared memory tiles (0: K-major, 1: MN-major),
// wgmma_rs<kTransB> takes A from registers in the fragment of mma_m16n8k16; N is twice the accumulator's length.
// What reads an accumulator stands behind wgmma_wait and wgmma_hold(accumulator); what a thread writes into one, or into A's
// registers, ahead of wgmma_hold and wgmma_fence, and neither is touched from wgmma to wgmma_wait.
//
// cp.async and plain stores write through the generic proxy; TMA and wgmma go through the async proxy: what one writes the other
// sees only across fence_proxy_async (TMA's own mbarrier needs none). mbarrier_arrive_rank tells a neighbour that the thread's reads,
// and the wgmma it has waited for, are done; what it stored a neighbour sees across cluster_sync alone. load_streaming is for memory
// that no thread writes while the kernel runs; store_vector and store_streaming are one store to device memory.
#pragma once
#include <cstring>

#include "hebatron/types.h"

namespace hebatron::cuda {

// A bf16 or fp32 tensor of 2 or 3 dimensions as the TMA sees it: dim[0] is contiguous, stride[i] the bytes between
// neighbours along dim[i + 1], box the tile one copy moves. Swizzle::k128 needs an inner box of 128 bytes.
enum class Swizzle { none, k128 };
struct TensorMapShape {
  int rank = 2;
  uint64_t dim[3] = {1, 1, 1};
  uint64_t stride[2] = {0, 0};
  uint32_t box[3] = {1, 1, 1};
  DType dtype = DType::bf16;
  Swizzle swizzle = Swizzle::k128;
};

}  // namespace hebatron::cuda

#ifdef HEBATRON_EMULATOR
#include "prim.h"
#else
#include "cuda/prim/host.cuh"
#include "cuda/prim/ptx.cuh"
#endif

namespace hebatron::cuda {

constexpr int kWarp = 32;
constexpr int kWarpgroup = 128;

HEBATRON_DEVICE void cluster_sync() {
  cluster_arrive();
  cluster_wait();
}

HEBATRON_DEVICE float warp_sum(float v) {
#pragma unroll
  for (int offset = kWarp / 2; offset; offset /= 2) v += shfl_xor(v, offset);
  return v;
}

// The sum over a block, the same bits in every thread. Two barriers, so that `slots` may be used again at once.
HEBATRON_DEVICE float block_sum(float v, float* slots) {
  const int warps = blockDim.x / kWarp, lane = threadIdx.x % kWarp;
  v = warp_sum(v);
  if (warps == 1) return v;
  if (lane == 0) slots[threadIdx.x / kWarp] = v;
  block_sync();
  v = warp_sum(lane < warps ? slots[lane] : 0.0f);
  block_sync();
  return v;
}

// Descriptor of a shared-memory tile in the 128-byte swizzle, for wgmma. A tile is a column of 1,024-byte atoms of 8 rows x
// 128 bytes. K-major (rows are M or N, 64 elements of K a row): bytes_stride is the distance between groups of 8 rows
// (1,024 when they lie together), bytes_leading unused. MN-major (rows are K, 64 elements of M or N a row): bytes_stride is
// the distance between groups of 8 k, bytes_leading the distance between groups of 64 elements of M or N.
HEBATRON_DEVICE uint64_t wgmma_descriptor(uint32_t address, uint32_t bytes_stride = 1024, uint32_t bytes_leading = 16) {
  return uint64_t((address & 0x3ffff) >> 4) | uint64_t(bytes_leading >> 4) << 16 | uint64_t(bytes_stride >> 4) << 32 | 1ull << 62;
}

// kCount consecutive elements as fp32, moved in accesses of up to 16 bytes; the address is aligned to those.
template <class T, int kCount>
struct alignas(sizeof(T) * kCount < 16 ? sizeof(T) * kCount : 16) Pack {
  T value[kCount];
};
HEBATRON_DEVICE float widen(float v) { return v; }
HEBATRON_DEVICE float widen(__nv_bfloat16 v) { return __bfloat162float(v); }
HEBATRON_DEVICE void narrow(float v, float& out) { out = v; }
HEBATRON_DEVICE void narrow(float v, __nv_bfloat16& out) { out = __float2bfloat16_rn(v); }
// Two fp32 as the two halves of a word, x in the low one.
HEBATRON_DEVICE uint32_t pack_bf16(float x, float y) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(x, y);
  uint32_t word;
  memcpy(&word, &pair, sizeof word);
  return word;
}
HEBATRON_DEVICE float unpack_bf16(uint32_t word, int half) {
  const uint32_t bits = half ? word & 0xffff0000u : word << 16;
  float v;
  memcpy(&v, &bits, sizeof v);
  return v;
}

template <int kCount, class T>
HEBATRON_DEVICE void load(const T* p, float (&out)[kCount]) {
  const Pack<T, kCount> pack = *reinterpret_cast<const Pack<T, kCount>*>(p);
#pragma unroll
  for (int i = 0; i < kCount; i++) out[i] = widen(pack.value[i]);
}
// To device memory. Whole packs go by store_vector: nvcc 13 takes stores in C++, also those of a uint4, apart into words where
// the values come through a branch, as a residual that may be missing: four times the requests of a kernel bound by them.
template <int kCount, class T>
HEBATRON_DEVICE void store(T* p, const float (&in)[kCount]) {
  constexpr int kWords = kCount * int(sizeof(T)) / 4;
  if constexpr (kWords < 2) {
    Pack<T, kCount> pack;
#pragma unroll
    for (int i = 0; i < kCount; i++) narrow(in[i], pack.value[i]);
    *reinterpret_cast<Pack<T, kCount>*>(p) = pack;
  } else {
    uint32_t words[kWords];
    if constexpr (sizeof(T) == 4)
      memcpy(words, in, sizeof words);
    else
#pragma unroll
      for (int i = 0; i < kWords; i++) words[i] = pack_bf16(in[2 * i], in[2 * i + 1]);
    if constexpr (kWords == 2) {
      store_vector(p, uint2{words[0], words[1]});
    } else {
#pragma unroll
      for (int i = 0; i < kWords; i += 4) store_vector(p + i * kCount / kWords, uint4{words[i], words[i + 1], words[i + 2], words[i + 3]});
    }
  }
}

}  // namespace hebatron::cuda
