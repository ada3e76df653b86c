// Small kernels, right and wrong, that test the emulator; also the examples for whoever writes a kernel.
//
// How to add one:
//   1. Write a kernel in one of the .cu files here, or in a new one, from the names of csrc/cuda/prim.cuh alone. A kernel with
//      planted bugs is a template over an enum: its first value is the right kernel, each other one leaves out or changes
//      one thing (`if (bug != Bug::no_block_sync) block_sync();`).
//   2. Put a marker at the end of every line that a report must name: `// LINE: reverse.write`. Markers are unique here.
//   3. Write a function that launches it on tensors of `cases.h` and checks the result with `expect`, and list it in the
//      file's `add_..._cases`.
//   4. A name without a slash is a right kernel: test_right.py runs it in both builds and every mode and wants no report. A
//      name with one, `reverse/no_block_sync`, has a bug: a line in BUGS of test_bugs.py says what the report must contain.
//   5. pytest tests/emulator
//
// Kernels run in this process: printf works in them, and so does gdb (`break cases.cu:80`, one fiber per CUDA thread).
#pragma once
#include <cstdlib>
#include <cstring>
#include <functional>
#include <stdexcept>
#include <string>
#include <vector>

#include "cuda/prim.cuh"

namespace hebatron::cases {

using namespace hebatron::cuda;

// Memory that kernels may touch. Reports call it by its name.
template <class T>
class Tensor {
 public:
  Tensor(const char* name, size_t count, const std::function<T(size_t)>& value = [](size_t) { return T{}; })
      : name_(name), count_(count), p_(static_cast<T*>(std::aligned_alloc(1024, (count * sizeof(T) + 1023) / 1024 * 1024))) {
    for (size_t i = 0; i < count; i++) p_[i] = value(i);
    emulator::allow_memory(p_, count * sizeof(T), name);
  }
  ~Tensor() { std::free(p_); }
  Tensor(const Tensor&) = delete;
  Tensor& operator=(const Tensor&) = delete;

  T* get() const { return p_; }
  size_t count() const { return count_; }
  // Every element must be what `want` says of its index.
  void expect(const std::function<T(size_t)>& want) const {
    for (size_t i = 0; i < count_; i++)
      if (p_[i] != want(i))
        throw std::runtime_error("wrong: " + std::string(name_) + "[" + std::to_string(i) + "] is " + std::to_string(p_[i]) + ", must be " + std::to_string(want(i)));
  }

 private:
  const char* name_;
  size_t count_;
  T* p_;
};

template <class... Params, class... Args>
void run(void (*kernel)(Params...), unsigned blocks, unsigned threads, int bytes_shared, unsigned cluster, const Args&... args) {
  LaunchShape shape;
  shape.grid = dim3(blocks);
  shape.block = dim3(threads);
  shape.bytes_shared = bytes_shared;
  shape.cluster = cluster;
  launch("case", kernel, shape, Exec{}, args...);
}

inline __nv_bfloat16 bf16(float v) { return __float2bfloat16_rn(v); }
// Small integers in no visible order: their products and sums are exact in bf16 and fp32, whatever the order.
inline float small(size_t i) { return float(int((i * 2654435761u >> 7) % 9) - 4); }

struct Case {
  std::string name;
  std::function<void()> run;
};
using Cases = std::vector<Case>;

void add_thread_cases(Cases& cases);
void add_grid_cases(Cases& cases);
void add_copy_cases(Cases& cases);
void add_pipeline_cases(Cases& cases);
void add_matrix_cases(Cases& cases);
void add_store_cases(Cases& cases);
void add_cluster_cases(Cases& cases);
void add_offset_cases(Cases& cases);
void add_conformance_cases(Cases& cases);

inline std::vector<uint8_t> output;  // what the conformance case left, for Python to compare

}  // namespace hebatron::cases
