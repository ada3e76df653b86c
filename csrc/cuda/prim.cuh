// Everything of CUDA that kernels may use: the only file with launches, warp primitives and device queries, and the only
// place for inline PTX. Kernels are written against these names.
#pragma once
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <stdexcept>

#include "hebatron/types.h"

namespace hebatron::cuda {

constexpr int kWarp = 32;

inline void check_cuda(cudaError_t status, const char* op) {
  if (status != cudaSuccess) throw std::runtime_error(std::string(op) + ": CUDA error: " + cudaGetErrorString(status));
}

// Makes exec.device current for the life of one operator call and gives the previous one back.
class DeviceGuard {
 public:
  explicit DeviceGuard(const Exec& exec) {
    check_cuda(cudaGetDevice(&before_), "device");
    if (exec.device != before_) check_cuda(cudaSetDevice(exec.device), "device");
  }
  ~DeviceGuard() { cudaSetDevice(before_); }

 private:
  int before_ = 0;
};

template <class... Params, class... Args>
void launch(const char* op, void (*kernel)(Params...), dim3 grid, dim3 block, const Exec& exec, Args... args) {
  kernel<<<grid, block, 0, static_cast<cudaStream_t>(exec.stream)>>>(args...);
  check_cuda(cudaGetLastError(), op);
}

__device__ inline float warp_sum(float v) {
#pragma unroll
  for (int offset = kWarp / 2; offset; offset /= 2) v += __shfl_xor_sync(0xffffffffu, v, offset);
  return v;
}

// The sum over a block, the same bits in every thread. Two barriers, so that `slots` may be used again at once.
__device__ inline float block_sum(float v, float* slots) {
  const int warps = blockDim.x / kWarp, lane = threadIdx.x % kWarp;
  v = warp_sum(v);
  if (warps == 1) return v;
  if (lane == 0) slots[threadIdx.x / kWarp] = v;
  __syncthreads();
  v = warp_sum(lane < warps ? slots[lane] : 0.0f);
  __syncthreads();
  return v;
}

// kCount consecutive elements as fp32, moved in accesses of up to 16 bytes; the address is aligned to those.
template <class T, int kCount>
struct alignas(sizeof(T) * kCount < 16 ? sizeof(T) * kCount : 16) Pack {
  T value[kCount];
};
__device__ inline float widen(float v) { return v; }
__device__ inline float widen(__nv_bfloat16 v) { return __bfloat162float(v); }
__device__ inline void narrow(float v, float& out) { out = v; }
__device__ inline void narrow(float v, __nv_bfloat16& out) { out = __float2bfloat16_rn(v); }

template <int kCount, class T>
__device__ inline void load(const T* p, float (&out)[kCount]) {
  const Pack<T, kCount> pack = *reinterpret_cast<const Pack<T, kCount>*>(p);
#pragma unroll
  for (int i = 0; i < kCount; i++) out[i] = widen(pack.value[i]);
}
template <int kCount, class T>
__device__ inline void store(T* p, const float (&in)[kCount]) {
  Pack<T, kCount> pack;
#pragma unroll
  for (int i = 0; i < kCount; i++) narrow(in[i], pack.value[i]);
  *reinterpret_cast<Pack<T, kCount>*>(p) = pack;
}

}  // namespace hebatron::cuda
