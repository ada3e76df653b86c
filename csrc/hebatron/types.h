// The plain types that cross the boundary: no torch, no Python, no CUDA headers.
#pragma once
#include <cstddef>
#include <cstdint>
#include <stdexcept>
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

[[noreturn]] inline void fail(const std::string& message) { throw std::invalid_argument(message); }

inline void check(bool ok, const char* op, const char* what, int64_t got) {
  if (!ok) fail(std::string(op) + ": " + what + ", got " + std::to_string(got));
}

}  // namespace hebatron
