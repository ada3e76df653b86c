#include "cuda/device.h"

#include "cuda/prim.cuh"

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

}  // namespace hebatron::cuda
