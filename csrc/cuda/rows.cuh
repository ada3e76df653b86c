// What kernels share that give a row of a tensor to a block: its packs of 16 bytes (or single elements) in registers.
#pragma once
#include <initializer_list>
#include <utility>

#include "cuda/prim.cuh"

namespace hebatron::cuda {

constexpr int kMaxRowThreads = 512;         // 1,024 leave 64 registers a thread: the norm's backward spills
constexpr int64_t kMaxRowBlocks = 1 << 20;  // blocks stride over the rows beyond

template <int kCount>
constexpr int kPacks = kCount == 1 ? 16 : 4;  // what a thread keeps of a row

template <class T>
HEBATRON_DEVICE float rounded(float v) {
  T stored;
  narrow(v, stored);
  return widen(stored);
}

HEBATRON_DEVICE float sigmoid(float v) { return 1.0f / (1.0f + exp_approx(-v)); }

template <int kCount>
constexpr int kAtOnce = kCount == 1 ? 1 : 4;  // packs read together: all of them; single elements by twos and fours spill

// A thread's packs of a row from number `first` on as they lie in memory, zeros past the row's columns. They are read before
// one is used: behind a store, which for all nvcc knows is of what comes next, every pack would wait for DRAM on its own.
template <class T, int kCount>
struct RowPacks {
  static constexpr int kWords = kCount * int(sizeof(T)) < 4 ? 1 : kCount * int(sizeof(T)) / 4;
  uint32_t word[kAtOnce<kCount>][kWords] = {};

  HEBATRON_DEVICE void read(const T* row, int64_t columns, int first) {
#pragma unroll
    for (int p = 0; p < kAtOnce<kCount>; p++) {
      const int64_t column = (int64_t(first + p) * blockDim.x + threadIdx.x) * kCount;
      if (column >= columns) continue;
      if constexpr (kWords >= 4) {
#pragma unroll
        for (int i = 0; i < kWords; i += 4) {
          const uint4 v = *reinterpret_cast<const uint4*>(row + column + i * kCount / kWords);
          word[p][i] = v.x, word[p][i + 1] = v.y, word[p][i + 2] = v.z, word[p][i + 3] = v.w;
        }
      } else if constexpr (kWords == 2) {
        const uint2 v = *reinterpret_cast<const uint2*>(row + column);
        word[p][0] = v.x, word[p][1] = v.y;
      } else if constexpr (sizeof(T) == 4) {
        word[p][0] = *reinterpret_cast<const uint32_t*>(row + column);
      } else {
        word[p][0] = *reinterpret_cast<const uint16_t*>(row + column);
      }
    }
  }
  HEBATRON_DEVICE float operator()(int p, int i) const {
    if constexpr (sizeof(T) == 2) {
      return unpack_bf16(word[p][i / 2], i % 2);
    } else {
      float v;
      memcpy(&v, &word[p][i], sizeof v);
      return v;
    }
  }
};

// Threads of a block for rows of so many columns.
template <int kCount>
int threads_for_row(const char* op, const char* what, int64_t columns) {
  const int64_t packs = (columns + kCount - 1) / kCount;
  check(packs <= int64_t(kMaxRowThreads) * kPacks<kCount>, op, what, columns);
  const int64_t wanted = ((packs + kPacks<kCount> - 1) / kPacks<kCount> + kWarp - 1) / kWarp * kWarp;
  return int(wanted < kWarp ? kWarp : wanted);
}

// The addresses, or-ed: a multiple of 16 where all are. Null is one.
inline uintptr_t addresses_of(std::initializer_list<const void*> pointers) {
  uintptr_t all = 0;
  for (const void* p : pointers) all |= reinterpret_cast<uintptr_t>(p);
  return all;
}

inline void check_pointers(const char* op, std::initializer_list<std::pair<const char*, const void*>> pointers, const Exec& exec) {
  for (const auto& [name, p] : pointers)
    if (p) check_pointer(op, name, p, exec);
}

// run<T, W, elements per pack>(args, exec): T by `dtype`, W by `weight_dtype`; packs(count) says whether every row starts
// on a pack of so many elements.
#define HEBATRON_BY_WEIGHT(run, T, count, packs, weight_dtype, args, exec)                       \
  const bool pack = packs(count);                                                                \
  if ((weight_dtype) == DType::f32)                                                              \
    return pack ? run<T, float, count>(args, exec) : run<T, float, 1>(args, exec);               \
  return pack ? run<T, __nv_bfloat16, count>(args, exec) : run<T, __nv_bfloat16, 1>(args, exec);

#define HEBATRON_BY_DTYPES(run, packs, dtype, weight_dtype, args, exec)          \
  if ((dtype) == DType::f32) {                                                   \
    HEBATRON_BY_WEIGHT(run, float, 4, packs, weight_dtype, args, exec)           \
  }                                                                              \
  HEBATRON_BY_WEIGHT(run, __nv_bfloat16, 8, packs, weight_dtype, args, exec)

}  // namespace hebatron::cuda
