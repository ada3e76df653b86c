// What      the experts' weights as the panels that moe_mlp multiplies by, and back.
// Grid      tasks of (expert, 64 columns) over the threads.
// Traffic   the weights once, the panels once.
// Roofline  DRAM bound.
// Measured  never on its own; python bench/bench_moe.py times it inside its callers.
// Limits    fp32 and bf16; fp32 weights are rounded to bf16 panels as moe_mlp rounds them.
// Why so    the panels are the ones that moe_mlp packs for itself, so that packing ahead changes no bit of a result.
#include "cpu/gemm.h"

namespace hebatron::HEBATRON_ISA_NAMESPACE {
namespace {

template <class T>
static void pack(const MoePackArgs& a, const Exec& exec) {
  const PackedHeader header = packed_header<T>(a.experts, a.k, a.n);
  std::memcpy(a.packed, &header, sizeof header);
  T* panels = (T*)((char*)a.packed + sizeof header);
  const Weights weights{a.weight_dtype, a.weights, a.expert_stride, a.stride, a.k, a.n, true};
  const int64_t per_expert = panels_of(a.n), stride = packed_stride<T>(a.k, a.n);
  const int64_t used = units_of<T>(a.k) * kUnit<T> * ((a.n + kLanes - 1) / kLanes * kLanes);
#pragma omp parallel for num_threads(exec.threads) schedule(static)
  for (int64_t task = 0; task < a.experts * per_expert; task++) {
    const int64_t e = task / per_expert, p = task % per_expert;
    panel_of(weights, e, p, panels + e * stride + p * panel_elements<T>(a.k));
    if (p == 0) std::memset((void*)(panels + e * stride + used), 0, size_t(stride - used) * sizeof(T));
  }
}

template <class T>
static void unpack(const MoePackArgs& a, const Exec& exec) {
  check_packed<T>("moe_pack", a.packed, a.experts, a.k, a.n);
  const T* panels = (const T*)((const char*)a.packed + sizeof(PackedHeader));
  const int64_t stride = packed_stride<T>(a.k, a.n);
#pragma omp parallel for num_threads(exec.threads) schedule(static)
  for (int64_t row = 0; row < a.experts * a.n; row++) {
    const int64_t e = row / a.n, n = row % a.n, column = n / kTileColumns * kTileColumns;
    const int64_t step = vectors_of(a.n - column) * kLanes * kUnit<T>;
    const T* from = panels + e * stride + n / kTileColumns * panel_elements<T>(a.k) + (n - column) * kUnit<T>;
    T* to = (T*)a.unpacked + row * a.k;
    for (int64_t k = 0; k < a.k; k++) to[k] = from[k / kUnit<T> * step + k % kUnit<T>];
  }
}

}  // namespace

int64_t moe_pack_workspace(const MoePackArgs&) { return 0; }

void moe_pack(const MoePackArgs& a, const Exec& exec) {
  check(a.experts > 0, "moe_pack", "experts must be > 0", a.experts);
  check(a.n > 0, "moe_pack", "n must be > 0", a.n);
  check(a.k > 0, "moe_pack", "k must be > 0", a.k);
  check(a.unpack || a.dtype == DType::bf16 || a.weight_dtype == DType::f32, "moe_pack", "fp32 panels must come from fp32 weights, dtype", int(a.weight_dtype));
  if (a.dtype == DType::f32) return a.unpack ? unpack<float>(a, exec) : pack<float>(a, exec);
  return a.unpack ? unpack<bf16>(a, exec) : pack<bf16>(a, exec);
}

}  // namespace hebatron::HEBATRON_ISA_NAMESPACE
