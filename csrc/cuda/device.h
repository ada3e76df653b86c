// What the bindings ask of CUDA besides the operators.
#pragma once
#include <map>
#include <string>

namespace hebatron::cuda {
int device_count();  // 0 without a driver
std::string compiled_archs();

// Each kernel file this module was compiled from ("norm"), its digest and the architectures: {"digest": .., "archs": ..}.
using KernelTable = std::map<std::string, std::map<std::string, std::string>>;
KernelTable kernels();
int toolkit();  // major version of nvcc
}  // namespace hebatron::cuda
