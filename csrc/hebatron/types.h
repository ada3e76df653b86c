// The plain types that cross the boundary: no torch, no Python, no CUDA headers.
#pragma once
#include <cstddef>
#include <cstdint>
#include <string>

namespace hebatron {

enum class DType : int { f32 = 0, bf16 = 1 };

// Where and with what an operator runs. The caller allocates the workspace; nothing here is stored between calls.
struct Exec {
  int device = -1;         // CUDA device index; -1 on the CPU
  void* stream = nullptr;  // cudaStream_t; unused on the CPU
  void* workspace = nullptr;
  int64_t bytes_workspace = 0;
  int threads = 1;  // CPU threads
};

// Throws std::invalid_argument, a ValueError in Python. Defined once, outside the ISA objects: inline it would be a weak
// symbol, and the linker may keep the copy that a CPU cannot run.
[[noreturn]] void fail(const std::string& message);
void check(bool ok, const char* op, const char* what, int64_t got);

}  // namespace hebatron
