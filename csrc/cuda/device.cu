#include "cuda/device.h"

#include "cuda/prim.cuh"
#include "kernel_table.h"

namespace hebatron::cuda {

int device_count() {
  int count = 0;
  if (cudaGetDeviceCount(&count) != cudaSuccess) {
    cudaGetLastError();  // a machine without a driver: clear the error, report none
    return 0;
  }
  return count;
}

std::string compiled_archs() { return HEBATRON_CUDA_ARCHS; }

KernelTable kernels() {
  KernelTable table;
#define HEBATRON_ROW(kernel, digest, archs) table[kernel] = {{"digest", digest}, {"archs", archs}};
  HEBATRON_KERNELS(HEBATRON_ROW)
  return table;
}

int toolkit() { return __CUDACC_VER_MAJOR__; }

}  // namespace hebatron::cuda
