// What the bindings ask of CUDA besides the operators.
#pragma once
#include <string>

namespace hebatron::cuda {
int device_count();  // 0 without a driver
std::string compiled_archs();
}  // namespace hebatron::cuda
