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
