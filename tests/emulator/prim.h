// The second body of csrc/cuda/prim.cuh: the CUDA language as far as kernels use it, in C++ for g++, and every primitive as
// a call of the emulator.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstring>
#include <stdexcept>
#include <tuple>

#include "emulator.h"
#include "hebatron/types.h"

#define __global__ static
#define __device__
#define __host__
#define __launch_bounds__(...)
#define HEBATRON_DEVICE inline __attribute__((always_inline))
#define HEBATRON_GRID_CONSTANT(T) const T&
#define HEBATRON_SHARED(T, name, count)                                                                       \
  static const char name##_tag = 0;                                                                           \
  T* const name = static_cast<T*>(::emulator::shared_array(&name##_tag, sizeof(T) * (count), alignof(T)))
#define HEBATRON_DYNAMIC_SHARED(name) uint8_t* const name = static_cast<uint8_t*>(::emulator::dynamic_shared())
#define threadIdx (::emulator::place->thread)
#define blockIdx (::emulator::place->block)
#define blockDim (::emulator::place->threads_of_block)
#define gridDim (::emulator::place->blocks_of_grid)

// The vector and bfloat16 types of the CUDA headers.
struct dim3 : emulator::Dim {
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : Dim{x_, y_, z_} {}
};
#define HEBATRON_VECTOR(T, S)                                               \
  struct alignas(2 * sizeof(S)) T##2 {                                      \
    S x, y;                                                                 \
  };                                                                        \
  struct alignas(4 * sizeof(S)) T##4 {                                      \
    S x, y, z, w;                                                           \
  };                                                                        \
  inline T##2 make_##T##2(S x, S y) { return {x, y}; }                      \
  inline T##4 make_##T##4(S x, S y, S z, S w) { return {x, y, z, w}; }
HEBATRON_VECTOR(float, float)
HEBATRON_VECTOR(int, int)
HEBATRON_VECTOR(uint, unsigned)
#undef HEBATRON_VECTOR
struct __nv_bfloat16 {
  uint16_t bits;
};
struct alignas(4) __nv_bfloat162 {
  __nv_bfloat16 x, y;
};
inline float __bfloat162float(__nv_bfloat16 v) {
  const uint32_t bits = uint32_t(v.bits) << 16;
  float f;
  memcpy(&f, &bits, 4);
  return f;
}
inline __nv_bfloat16 __float2bfloat16_rn(float f) {
  uint32_t bits;
  memcpy(&bits, &f, 4);
  if ((bits & 0x7fffffff) > 0x7f800000) return {0x7fff};
  return {uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}
inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) { return {__float2bfloat16_rn(x), __float2bfloat16_rn(y)}; }

namespace hebatron::cuda {

using TensorMap = emulator::TensorMap;

HEBATRON_DEVICE int lane_id() { return threadIdx.x % 32; }
template <class T>
HEBATRON_DEVICE T shfl(T v, int lane) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8);
  uint64_t bits = 0;
  memcpy(&bits, &v, sizeof(T));
  bits = emulator::shuffle(bits, lane);
  memcpy(&v, &bits, sizeof(T));
  return v;
}
template <class T>
HEBATRON_DEVICE T shfl_xor(T v, int mask) {
  return shfl(v, lane_id() ^ mask);
}
template <class T>
HEBATRON_DEVICE T shfl_up(T v, int delta) {
  return shfl(v, lane_id() >= delta ? lane_id() - delta : lane_id());
}
template <class T>
HEBATRON_DEVICE T shfl_down(T v, int delta) {
  return shfl(v, lane_id() + delta < 32 ? lane_id() + delta : lane_id());
}
HEBATRON_DEVICE uint32_t ballot(bool p) { return emulator::ballot(p); }
HEBATRON_DEVICE int population_count(uint32_t bits) { return __builtin_popcount(bits); }
HEBATRON_DEVICE bool any(bool p) { return emulator::ballot(p) != 0; }
HEBATRON_DEVICE bool all(bool p) { return emulator::ballot(p) == 0xffffffffu; }
HEBATRON_DEVICE void warp_sync() { emulator::warp_sync(); }
HEBATRON_DEVICE bool elect_one() { return emulator::elect_one(); }
HEBATRON_DEVICE void block_sync() { emulator::block_sync(); }
HEBATRON_DEVICE void named_barrier_sync(int id, int threads) { emulator::named_barrier(id, threads, true); }
HEBATRON_DEVICE void named_barrier_arrive(int id, int threads) { emulator::named_barrier(id, threads, false); }
HEBATRON_DEVICE uint32_t cluster_rank() { return emulator::cluster_rank(); }
HEBATRON_DEVICE uint32_t cluster_size() { return emulator::cluster_size(); }
HEBATRON_DEVICE void cluster_arrive() { emulator::cluster_arrive(); }
HEBATRON_DEVICE void cluster_wait() { emulator::cluster_wait(); }

HEBATRON_DEVICE void fence_block() {}  // blocks are one memory order here; only fence_gpu publishes to other blocks
HEBATRON_DEVICE void fence_gpu() { emulator::fence_gpu(); }
template <class T>
HEBATRON_DEVICE T atomic_add(T* p, T v) {
  T old;
  emulator::atomic(p, sizeof(T), &old, [v](void* at) { *static_cast<T*>(at) += v; });
  return old;
}
HEBATRON_DEVICE uint32_t atomic_max(uint32_t* p, uint32_t v) {
  uint32_t old;
  emulator::atomic(p, 4, &old, [v](void* at) { *static_cast<uint32_t*>(at) = std::max(*static_cast<uint32_t*>(at), v); });
  return old;
}
HEBATRON_DEVICE uint32_t atomic_exchange(uint32_t* p, uint32_t v) {
  uint32_t old;
  emulator::atomic(p, 4, &old, [v](void* at) { *static_cast<uint32_t*>(at) = v; });
  return old;
}
HEBATRON_DEVICE uint32_t load_acquire(const uint32_t* p) { return emulator::load_acquire(p); }
HEBATRON_DEVICE void store_release(uint32_t* p, uint32_t v) { emulator::store_release(p, v); }
HEBATRON_DEVICE uint4 load_streaming(const void* p) { return *static_cast<const uint4*>(p); }
HEBATRON_DEVICE void store_streaming(void* p, uint4 v) { *static_cast<uint4*>(p) = v; }
HEBATRON_DEVICE void store_streaming(void* p, uint2 v) { *static_cast<uint2*>(p) = v; }
HEBATRON_DEVICE void store_vector(void* p, uint4 v) { *static_cast<uint4*>(p) = v; }
HEBATRON_DEVICE void store_vector(void* p, uint2 v) { *static_cast<uint2*>(p) = v; }

HEBATRON_DEVICE uint32_t smem_address(const void* p) { return emulator::shared_address(p); }
HEBATRON_DEVICE uint32_t map_to_rank(uint32_t address, uint32_t rank) { return emulator::map_to_rank(address, rank); }
HEBATRON_DEVICE uint32_t load_cluster(uint32_t address) { return emulator::load_cluster(address); }
HEBATRON_DEVICE void store_cluster(uint32_t address, uint32_t v) { emulator::store_cluster(address, v); }

HEBATRON_DEVICE void cp_async_16(uint32_t dst, const void* src, bool valid) { emulator::cp_async_16(dst, src, valid); }
HEBATRON_DEVICE void cp_async_commit() { emulator::cp_async_commit(); }
template <int kPending>
HEBATRON_DEVICE void cp_async_wait() {
  emulator::cp_async_wait(kPending);
}
HEBATRON_DEVICE void cp_async_wait_all() { emulator::cp_async_wait_all(); }
HEBATRON_DEVICE void cp_async_arrive(uint64_t* barrier) { emulator::cp_async_arrive(barrier); }

HEBATRON_DEVICE void ldmatrix_x4(uint32_t (&r)[4], uint32_t row) { emulator::ldmatrix(r, row, 4, false); }
HEBATRON_DEVICE void ldmatrix_x4_trans(uint32_t (&r)[4], uint32_t row) { emulator::ldmatrix(r, row, 4, true); }
HEBATRON_DEVICE void ldmatrix_x2(uint32_t (&r)[2], uint32_t row) { emulator::ldmatrix(r, row, 2, false); }
HEBATRON_DEVICE void ldmatrix_x2_trans(uint32_t (&r)[2], uint32_t row) { emulator::ldmatrix(r, row, 2, true); }
HEBATRON_DEVICE void stmatrix_x4(uint32_t row, const uint32_t (&r)[4]) { emulator::stmatrix(row, r, 4, false); }
HEBATRON_DEVICE void stmatrix_x4_trans(uint32_t row, const uint32_t (&r)[4]) { emulator::stmatrix(row, r, 4, true); }
HEBATRON_DEVICE void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) { emulator::mma_m16n8k16(d, a, b); }

HEBATRON_DEVICE void mbarrier_init(uint64_t* b, uint32_t arrivals) { emulator::mbarrier_init(b, arrivals); }
HEBATRON_DEVICE void mbarrier_fence_init() { emulator::fence_proxy_async(); }
HEBATRON_DEVICE void mbarrier_arrive(uint64_t* b) { emulator::mbarrier_arrive(b, 0, true); }
HEBATRON_DEVICE void mbarrier_arrive_expect(uint64_t* b, uint32_t bytes) { emulator::mbarrier_arrive(b, bytes, true); }
HEBATRON_DEVICE void mbarrier_expect(uint64_t* b, uint32_t bytes) { emulator::mbarrier_arrive(b, bytes, false); }
HEBATRON_DEVICE void mbarrier_arrive_rank(uint64_t* b, uint32_t rank) { emulator::mbarrier_arrive_rank(b, rank); }
HEBATRON_DEVICE bool mbarrier_test(uint64_t* b, uint32_t parity) { return emulator::mbarrier_test(b, parity); }
HEBATRON_DEVICE void mbarrier_wait(uint64_t* b, uint32_t parity) { emulator::mbarrier_wait(b, parity); }

HEBATRON_DEVICE void fence_proxy_async() { emulator::fence_proxy_async(); }
HEBATRON_DEVICE void fence_proxy_async_global() { emulator::fence_proxy_async(); }
HEBATRON_DEVICE void tma_prefetch(const TensorMap*) {}
HEBATRON_DEVICE void tma_load_1d(void* dst, const void* src, uint32_t bytes, uint64_t* b) { emulator::tma_load_1d(dst, src, bytes, b); }
HEBATRON_DEVICE void tma_load_2d_multicast(void* dst, const TensorMap* map, uint64_t* b, int x, int y, uint16_t ranks) {
  const int at[3] = {x, y, 0};
  emulator::tma_load(dst, map, b, at, ranks);
}
HEBATRON_DEVICE void tma_load_3d_multicast(void* dst, const TensorMap* map, uint64_t* b, int x, int y, int z, uint16_t ranks) {
  const int at[3] = {x, y, z};
  emulator::tma_load(dst, map, b, at, ranks);
}
HEBATRON_DEVICE void tma_load_2d(void* dst, const TensorMap* map, uint64_t* b, int x, int y) {
  tma_load_2d_multicast(dst, map, b, x, y, 0);
}
HEBATRON_DEVICE void tma_load_3d(void* dst, const TensorMap* map, uint64_t* b, int x, int y, int z) {
  tma_load_3d_multicast(dst, map, b, x, y, z, 0);
}
HEBATRON_DEVICE void tma_store_1d(void* dst, const void* src, uint32_t bytes) { emulator::tma_store_1d(dst, src, bytes, false); }
HEBATRON_DEVICE void tma_store_2d(const TensorMap* map, const void* src, int x, int y) {
  const int at[3] = {x, y, 0};
  emulator::tma_store(map, src, at, false);
}
HEBATRON_DEVICE void tma_store_3d(const TensorMap* map, const void* src, int x, int y, int z) {
  const int at[3] = {x, y, z};
  emulator::tma_store(map, src, at, false);
}
HEBATRON_DEVICE void tma_reduce_add_1d(float* dst, const float* src, uint32_t bytes) { emulator::tma_store_1d(dst, src, bytes, true); }
HEBATRON_DEVICE void tma_reduce_add_2d(const TensorMap* map, const void* src, int x, int y) {
  const int at[3] = {x, y, 0};
  emulator::tma_store(map, src, at, true);
}
HEBATRON_DEVICE void tma_commit() { emulator::tma_commit(); }
template <int kPending>
HEBATRON_DEVICE void tma_wait() {
  emulator::tma_wait(kPending, false);
}
template <int kPending>
HEBATRON_DEVICE void tma_wait_read() {
  emulator::tma_wait(kPending, true);
}

HEBATRON_DEVICE void wgmma_fence() { emulator::wgmma_fence(); }
HEBATRON_DEVICE void wgmma_commit() { emulator::wgmma_commit(); }
template <int kPending>
HEBATRON_DEVICE void wgmma_wait() {
  emulator::wgmma_wait(kPending);
}
template <class T, int kCount>
HEBATRON_DEVICE void wgmma_hold(T (&)[kCount]) {}
template <int kTransA, int kTransB, int kRegisters>
HEBATRON_DEVICE void wgmma_ss(float (&d)[kRegisters], uint64_t a, uint64_t b, bool accumulate) {
  emulator::wgmma(d, nullptr, a, b, 2 * kRegisters, kTransA, kTransB, accumulate);
}
template <int kTransB, int kRegisters>
HEBATRON_DEVICE void wgmma_rs(float (&d)[kRegisters], const uint32_t (&a)[4], uint64_t b, bool accumulate) {
  emulator::wgmma(d, a, 0, b, 2 * kRegisters, false, kTransB, accumulate);
}

template <int kCount>
HEBATRON_DEVICE void registers_decrease() {
  emulator::set_registers(kCount, false);
}
template <int kCount>
HEBATRON_DEVICE void registers_increase() {
  emulator::set_registers(kCount, true);
}
HEBATRON_DEVICE void grid_dependency_wait() {}  // launches run one after another
HEBATRON_DEVICE void grid_dependency_launch() {}
HEBATRON_DEVICE float exp2_approx(float v) {  // .ftz: no denormal comes out
  const float r = exp2f(v);
  return r < 0x1p-126f ? 0.0f : r;
}
HEBATRON_DEVICE float exp_approx(float v) { return expf(v); }
HEBATRON_DEVICE float sqrt_approx(float v) { return sqrtf(v); }
HEBATRON_DEVICE float rsqrt_approx(float v) { return 1.0f / sqrtf(v); }

// The host side (csrc/cuda/prim/host.cuh).
class DeviceGuard {
 public:
  explicit DeviceGuard(const Exec&) {}
};
inline void check_pointer(const char* op, const char* name, const void* p, const Exec&) {
  if (!emulator::memory_known(p)) fail(std::string(op) + ": " + name + " must be memory of the call's tensors, got another pointer");
}
inline int sm_count(const Exec&) { return emulator::options().sms; }
inline int compute_capability(const Exec&) { return emulator::options().compute_capability; }
inline int bytes_shared_per_block(const Exec&) { return emulator::options().bytes_shared; }
struct LaunchShape {
  dim3 grid, block;
  int bytes_shared = 0;
  unsigned cluster = 1;
  bool dependent = false;
};
template <class... Params, class... Args>
void launch(const char* op, void (*kernel)(Params...), const LaunchShape& shape, const Exec&, const Args&... args) {
  const std::tuple<std::decay_t<Params>...> parameters(args...);
  emulator::launch(op, shape.grid, shape.block, shape.cluster, shape.bytes_shared, [&] { std::apply(kernel, parameters); });
}
inline void fill_zero(const char*, void* p, size_t bytes, const Exec&) { memset(p, 0, bytes); }
inline TensorMap tensor_map(const char* op, const void* base, const TensorMapShape& s) {
  TensorMap map;
  map.base = static_cast<const char*>(base);
  map.rank = s.rank;
  map.f32 = s.dtype == DType::f32;
  map.bytes_element = map.f32 ? 4 : 2;
  map.swizzle = s.swizzle == Swizzle::k128 ? 128 : 0;
  bool ok = reinterpret_cast<uintptr_t>(base) % 16 == 0 && (s.rank == 2 || s.rank == 3);
  for (int i = 0; i < s.rank; i++) {
    map.dim[i] = s.dim[i];
    map.box[i] = s.box[i];
    ok = ok && s.dim[i] >= 1 && s.dim[i] <= (1ull << 32) && s.box[i] >= 1 && s.box[i] <= 256;
    if (i == 0) continue;
    map.stride[i - 1] = s.stride[i - 1];
    ok = ok && s.stride[i - 1] % 16 == 0 && s.stride[i - 1] < (1ull << 40);
  }
  const uint32_t bytes_inner = s.box[0] * map.bytes_element;
  // cuTensorMapEncodeTiled's own rules: what it refuses must not pass here. In the swizzle it takes narrower boxes; prim.cuh does not.
  ok = ok && bytes_inner % 16 == 0 && (!map.swizzle || bytes_inner == 128);
  if (!ok) throw std::runtime_error(std::string(op) + ": cuTensorMapEncodeTiled refuses the tensor (alignment, strides or box)");
  return map;
}

}  // namespace hebatron::cuda
