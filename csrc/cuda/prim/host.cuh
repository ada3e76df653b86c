// What the host side of a kernel asks of CUDA: checks, launches, tensor maps, device properties. libcuda is never linked: its
// functions come through the runtime's driver entry point, so the module loads on a machine with no driver.
#pragma once
#include <cuda.h>
#include <cuda_runtime.h>

#include <stdexcept>

#include "hebatron/types.h"

namespace hebatron::cuda {

inline void check_cuda(cudaError_t status, const char* op) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // a launch error is reported once, here, and not again by the next call
  throw std::runtime_error(std::string(op) + ": CUDA error: " + cudaGetErrorString(status));
}

// A function of libcuda, by the toolkit version that its interface is of.
template <class Function>
Function driver_function(const char* op, const char* name, unsigned version) {
  void* entry = nullptr;
  cudaDriverEntryPointQueryResult found;
#if CUDART_VERSION >= 12050  // the older call, gone in CUDA 13, is all that 12.4 has
  check_cuda(cudaGetDriverEntryPointByVersion(name, &entry, version, cudaEnableDefault, &found), op);
#else
  check_cuda(cudaGetDriverEntryPoint(name, &entry, cudaEnableDefault, &found), op);
#endif
  if (found != cudaDriverEntryPointSuccess) throw std::runtime_error(std::string(op) + ": the driver has no " + name + " (needs CUDA 12)");
  return reinterpret_cast<Function>(entry);
}

// Whether the calling thread has a context. The runtime makes one current when it needs it; functions of libcuda find none in
// a thread that has called nothing else yet, as torch's thread for the backward on device 0 may not have.
inline bool has_context() {
  static const auto get_current = driver_function<decltype(&cuCtxGetCurrent)>("device", "cuCtxGetCurrent", 4000);
  CUcontext current = nullptr;
  return get_current(&current) == CUDA_SUCCESS && current;
}

// Makes exec.device current for the life of one operator call, with its context, and gives the previous one back.
class DeviceGuard {
 public:
  explicit DeviceGuard(const Exec& exec) {
    check_cuda(cudaGetDevice(&before_), "device");
    changed_ = exec.device != before_;
    if (changed_ || !has_context()) check_cuda(cudaSetDevice(exec.device), "device");
  }
  ~DeviceGuard() {
    if (changed_) cudaSetDevice(before_);  // not otherwise: it would open a context on a device that nobody uses
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int before_ = 0;
  bool changed_ = false;
};

// A pointer the kernel will follow must be memory of exec.device: a host pointer would fault, and take the context with it.
inline void check_pointer(const char* op, const char* name, const void* p, const Exec& exec) {
  cudaPointerAttributes found{};
  check_cuda(cudaPointerGetAttributes(&found, p), op);
  const bool device_memory = found.type == cudaMemoryTypeDevice || found.type == cudaMemoryTypeManaged;
  if (!device_memory) fail(std::string(op) + ": " + name + " must be device memory, got a host pointer");
  if (found.device != exec.device)
    fail(std::string(op) + ": " + name + " must be on device " + std::to_string(exec.device) + ", got device " + std::to_string(found.device));
}

inline int device_attribute(cudaDeviceAttr attribute, const Exec& exec) {
  int value = 0;
  check_cuda(cudaDeviceGetAttribute(&value, attribute, exec.device), "device");
  return value;
}
inline int sm_count(const Exec& exec) { return device_attribute(cudaDevAttrMultiProcessorCount, exec); }
inline int compute_capability(const Exec& exec) {  // 90 for sm_90
  return 10 * device_attribute(cudaDevAttrComputeCapabilityMajor, exec) + device_attribute(cudaDevAttrComputeCapabilityMinor, exec);
}
inline int bytes_shared_per_block(const Exec& exec) { return device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, exec); }

struct LaunchShape {
  dim3 grid, block;
  int bytes_shared = 0;    // dynamic
  unsigned cluster = 1;    // blocks of a cluster, along x
  bool dependent = false;  // may start before the kernel ahead of it ends: it calls grid_dependency_wait()
};

template <class... Params, class... Args>
void launch(const char* op, void (*kernel)(Params...), const LaunchShape& shape, const Exec& exec, const Args&... args) {
  if (shape.bytes_shared > 0)  // static and dynamic together may pass 48 KB
    check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shape.bytes_shared), op);
  cudaLaunchConfig_t config{};
  config.gridDim = shape.grid;
  config.blockDim = shape.block;
  config.dynamicSmemBytes = size_t(shape.bytes_shared);
  config.stream = static_cast<cudaStream_t>(exec.stream);
  cudaLaunchAttribute attributes[2];
  config.attrs = attributes;
  if (shape.cluster > 1) {
    cudaLaunchAttribute& a = attributes[config.numAttrs++];
    a.id = cudaLaunchAttributeClusterDimension;
    a.val.clusterDim.x = shape.cluster;
    a.val.clusterDim.y = a.val.clusterDim.z = 1;
  }
  if (shape.dependent) {
    cudaLaunchAttribute& a = attributes[config.numAttrs++];
    a.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    a.val.programmaticStreamSerializationAllowed = 1;
  }
  check_cuda(cudaLaunchKernelEx(&config, kernel, Params(args)...), op);
}

inline void fill_zero(const char* op, void* p, size_t bytes, const Exec& exec) {
  check_cuda(cudaMemsetAsync(p, 0, bytes, static_cast<cudaStream_t>(exec.stream)), op);
}

inline CUtensorMap tensor_map(const char* op, const void* base, const TensorMapShape& shape) {
  static const auto encode = driver_function<decltype(&cuTensorMapEncodeTiled)>(op, "cuTensorMapEncodeTiled", 12000);
  CUtensorMap map;
  const cuuint32_t step[3] = {1, 1, 1};
  const CUresult status = encode(
      &map, shape.dtype == DType::f32 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT32 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, cuuint32_t(shape.rank),
      const_cast<void*>(base), shape.dim, shape.stride, shape.box, step, CU_TENSOR_MAP_INTERLEAVE_NONE,
      shape.swizzle == Swizzle::k128 ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_NONE, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
      CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (status != CUDA_SUCCESS) throw std::runtime_error(std::string(op) + ": cuTensorMapEncodeTiled refused the tensor, error " + std::to_string(int(status)));
  return map;
}

}  // namespace hebatron::cuda
