// What the conformance cases share: memory the kernels use, inputs that Python can make again, and the record of results.
// Host memory is the only thing that differs between the hardware build (nvcc) and the emulator build (g++).
#pragma once
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include "cuda/prim.cuh"

namespace hebatron::conformance {

using namespace hebatron::cuda;
using Bytes = std::vector<uint8_t>;

constexpr const char* kOp = "conformance";
constexpr uint8_t kUnwritten = 0xcd;  // what every output holds before a kernel runs

#ifdef HEBATRON_EMULATOR
inline void* allocate(size_t bytes) {
  void* p = std::aligned_alloc(1024, (bytes + 1023) / 1024 * 1024);
  if (!p) throw std::runtime_error("conformance: out of memory");
  emulator::allow_memory(p, bytes, "a buffer");
  return p;
}
inline void release(void* p) { std::free(p); }
inline void upload(void* device, const void* host, size_t bytes) { std::memcpy(device, host, bytes); }
inline void download(void* host, const void* device, size_t bytes) { std::memcpy(host, device, bytes); }
#else
inline void* allocate(size_t bytes) {
  void* p = nullptr;
  check_cuda(cudaMalloc(&p, bytes), kOp);
  return p;
}
inline void release(void* p) { cudaFree(p); }
inline void upload(void* device, const void* host, size_t bytes) { check_cuda(cudaMemcpy(device, host, bytes, cudaMemcpyHostToDevice), kOp); }
// Waits for the kernels: a fault inside one is reported here.
inline void download(void* host, const void* device, size_t bytes) { check_cuda(cudaMemcpy(host, device, bytes, cudaMemcpyDeviceToHost), kOp); }
#endif

// `count` elements that kernels can reach. The constructor from values uploads them.
template <class T>
class Buffer {
 public:
  explicit Buffer(size_t count) : count_(count), p_(static_cast<T*>(allocate(bytes()))) {
    const Bytes unwritten(bytes(), kUnwritten);
    upload(p_, unwritten.data(), bytes());
  }
  explicit Buffer(const std::vector<T>& values) : count_(values.size()), p_(static_cast<T*>(allocate(bytes()))) {
    upload(p_, values.data(), bytes());
  }
  ~Buffer() { release(p_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  T* get() const { return p_; }
  size_t bytes() const { return count_ * sizeof(T); }
  Bytes read() const {
    Bytes found(bytes());
    download(found.data(), p_, bytes());
    return found;
  }

 private:
  size_t count_;
  T* p_;
};

// Word i of the stream `seed`: an integer hash, the same in expected.py.
inline uint32_t noise(uint32_t seed, uint32_t i) {
  uint32_t h = i * 2654435761u + seed * 40503u + 1u;
  h ^= h >> 15;
  h *= 2246822519u;
  h ^= h >> 13;
  return h;
}
inline std::vector<uint32_t> noise_words(uint32_t seed, size_t count) {
  std::vector<uint32_t> words(count);
  for (size_t i = 0; i < count; i++) words[i] = noise(seed, uint32_t(i));
  return words;
}
// Integers from -4 to 4: products and sums of them are exact in bf16 inputs and fp32 accumulators, in every order.
inline float small(uint32_t seed, uint32_t i) { return float(int(noise(seed, i) % 9) - 4); }
inline std::vector<float> small_floats(uint32_t seed, size_t count) {
  std::vector<float> values(count);
  for (size_t i = 0; i < count; i++) values[i] = small(seed, uint32_t(i));
  return values;
}
inline std::vector<uint16_t> small_bf16(uint32_t seed, size_t count) {
  std::vector<uint16_t> values(count);
  for (size_t i = 0; i < count; i++) {
    const float v = small(seed, uint32_t(i));
    uint32_t word;
    std::memcpy(&word, &v, 4);
    values[i] = uint16_t(word >> 16);
  }
  return values;
}

HEBATRON_DEVICE uint32_t bits(float v) { return reinterpret_cast<const uint32_t&>(v); }

inline Exec on_device() {
  Exec exec;
  exec.device = 0;
  return exec;
}
template <class... Params, class... Args>
void run(void (*kernel)(Params...), const LaunchShape& shape, const Args&... args) {
  launch(kOp, kernel, shape, on_device(), args...);
}
inline LaunchShape shape_of(unsigned blocks, unsigned threads, int bytes_shared = 0, unsigned cluster = 1) {
  LaunchShape shape;
  shape.grid = dim3(blocks);
  shape.block = dim3(threads);
  shape.bytes_shared = bytes_shared;
  shape.cluster = cluster;
  return shape;
}

struct Case {
  std::string name;
  Bytes (*run)();
  unsigned ulps = 0;  // 0: compared bit by bit; otherwise fp32 results that may differ by this many units in the last place
};
using Cases = std::vector<Case>;

}  // namespace hebatron::conformance
