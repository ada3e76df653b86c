// What      losses[r] = logsumexp(z_r) - z_r[target_r] of rows of logits; and in their place upstream[r] (softmax(z_r) -
//           onehot(target_r)), for the columns of z that some entries of the vocabulary are.
// Grid      a block a row, 32 to 512 threads, packs of 16 bytes of logits; 128 bytes of static shared memory; 40 registers
//           at most, no spill (nvcc 13.0, sm_80 and sm_90a).
// Traffic   forward: the logits once. backward: the logits once, half of them written in bf16.
// Roofline  DRAM. 4,096 rows of 131,072 fp32 logits: 2.15 GB, 716 us forward and 3.22 GB, 1.07 ms backward at 3.0 TB/s (H100). The
//           products around them are 2.9 TF each, 3.6 ms at 800 TFLOP/s.
// Measured  never run on hardware.
// Limits    fp32 logits; a gradient in fp32 or bf16; any number of entries, packs where every row starts on one. A target that
//           is neither an entry nor ignore_index makes its loss NaN, and no entry the target in the gradient.
// Why so    logits are fp32 because a bf16 one of 20 is off by up to 0.06. The bf16 gradient lies in the first half of its row's
//           own memory: no second buffer, and a block that walks its row upwards writes only where it has read.
#include <cmath>

#include "cuda/rows.cuh"
#include "hebatron/ops.h"

namespace hebatron::cuda {
namespace {

constexpr const char* kOp = "cross_entropy[cuda]";
constexpr int kThreads = 512;
constexpr int kAhead = 4;  // packs whose loads are in flight together
constexpr float kLog2E = 1.4426950408889634f;

// The largest over a block, the same in every thread; NaN loses to every number. As block_sum.
HEBATRON_DEVICE float block_max(float v, float* slots) {
  const int warps = blockDim.x / kWarp, lane = lane_id();
#pragma unroll
  for (int mask = kWarp / 2; mask; mask /= 2) v = fmaxf(v, shfl_xor(v, mask));
  if (warps == 1) return v;
  if (lane == 0) slots[threadIdx.x / kWarp] = v;
  block_sync();
  v = slots[lane < warps ? lane : 0];
#pragma unroll
  for (int mask = kWarp / 2; mask; mask /= 2) v = fmaxf(v, shfl_xor(v, mask));
  block_sync();
  return v;
}

// A sum of exponentials kept against the largest of its terms.
struct Total {
  float largest = -INFINITY, sum = 0.0f;

  template <int kCount>
  HEBATRON_DEVICE void add(const float (&z)[kCount]) {
    float top = largest;
#pragma unroll
    for (int i = 0; i < kCount; i++) top = fmaxf(top, z[i]);
    if (top > largest) {
      sum *= exp2_approx((largest - top) * kLog2E);
      largest = top;
    }
#pragma unroll
    for (int i = 0; i < kCount; i++) sum += z[i] == -INFINITY ? 0.0f : exp2_approx((z[i] - largest) * kLog2E);
  }
};

template <int kCount>
__global__ void __launch_bounds__(kThreads) forward(const CrossEntropyArgs a) {
  HEBATRON_SHARED(float, slots, kWarp);
  for (int64_t row = blockIdx.x; row < a.rows; row += gridDim.x) {
    const int64_t target = a.targets[row * a.targets_stride], step = int64_t(blockDim.x) * kCount;
    const float* z = a.logits + row * a.logits_stride;
    if (target == a.ignore_index) {
      if (threadIdx.x == 0) a.losses[row] = a.lse[row] = 0.0f;
      continue;
    }
    Total total;
    for (int64_t at = int64_t(threadIdx.x) * kCount; at < a.entries; at += kAhead * step) {
      float value[kAhead][kCount];
#pragma unroll
      for (int j = 0; j < kAhead; j++)
        if (at + j * step < a.entries) load<kCount>(z + at + j * step, value[j]);
#pragma unroll
      for (int j = 0; j < kAhead; j++)
        if (at + j * step < a.entries) total.add(value[j]);
    }
    const float largest = block_max(total.largest, slots);
    const bool none = total.largest == -INFINITY;  // then the sum is 0, or NaN where every logit is one or -inf
    const float mine = none ? total.sum : total.sum * exp2_approx((total.largest - largest) * kLog2E);
    const float rest = logf(block_sum(mine, slots));
    if (threadIdx.x != 0) continue;
    a.lse[row] = largest + rest;
    a.losses[row] = target >= 0 && target < a.entries ? largest - z[target] + rest : NAN;  // of large logits the difference is exact
  }
}

// Rows of T lie in the memory of rows of fp32: element i of one is in bytes 2 i of bf16, 4 i of fp32.
template <class T, int kCount>
__global__ void __launch_bounds__(kThreads) backward(const CrossEntropyBwdArgs a) {
  for (int64_t row = blockIdx.x; row < a.rows; row += gridDim.x) {
    const int64_t target = a.targets[row * a.targets_stride], step = int64_t(blockDim.x) * kCount;
    const bool ignored = target == a.ignore_index;
    const float lse = a.lse[row], upstream = a.upstream[row];
    const float* z = a.logits + row * a.logits_stride;
    T* grad = reinterpret_cast<T*>(a.logits + row * a.logits_stride);
    for (int64_t begin = 0; begin < a.entries; begin += step) {
      const int64_t at = begin + int64_t(threadIdx.x) * kCount;
      float value[kCount] = {};
      if (at < a.entries && !ignored) load<kCount>(z + at, value);
      if constexpr (sizeof(T) < sizeof(float)) block_sync();  // what is written now lies below what any thread reads next
      if (at >= a.entries) continue;
#pragma unroll
      for (int i = 0; i < kCount; i++) {
        const float p = exp2_approx((value[i] - lse) * kLog2E) - (a.first + at + i == target ? 1.0f : 0.0f);
        value[i] = ignored ? 0.0f : upstream * p;
      }
      store<kCount>(grad + at, value);
    }
  }
}

template <int kCount>
LaunchShape shape_for(int64_t rows, int64_t entries) {
  const int64_t packs = (entries + kCount - 1) / kCount, threads = (packs + kWarp - 1) / kWarp * kWarp;
  return {dim3(unsigned(rows < kMaxRowBlocks ? rows : kMaxRowBlocks)), dim3(unsigned(threads < kThreads ? threads : kThreads))};
}

template <int kCount>
void run(const CrossEntropyArgs& a, const Exec& exec) {
  launch(kOp, forward<kCount>, shape_for<kCount>(a.rows, a.entries), exec, a);
}
template <class T, int kCount>
void run(const CrossEntropyBwdArgs& a, const Exec& exec) {
  launch(kOp, backward<T, kCount>, shape_for<kCount>(a.rows, a.entries), exec, a);
}

template <class Args>
void check_args(const Args& a) {
  check(a.rows >= 0, kOp, "rows must be >= 0", a.rows);
  check(a.entries > 0, kOp, "entries must be > 0", a.entries);
  check(a.logits_stride >= a.entries, kOp, "logits_stride must be at least the entries", a.logits_stride);
}

bool packs(const void* logits, int64_t stride, int64_t entries, int64_t count) {
  return addresses_of({logits}) % 16 == 0 && stride % 4 == 0 && entries % count == 0;
}

}  // namespace

int64_t cross_entropy_fwd_workspace(const CrossEntropyArgs&) { return 0; }

void cross_entropy_fwd(const CrossEntropyArgs& a, const Exec& exec) {
  check_args(a);
  if (a.rows == 0) return;
  const DeviceGuard guard(exec);
  check_pointers(kOp, {{"logits", a.logits}, {"targets", a.targets}, {"losses", a.losses}, {"lse", a.lse}}, exec);
  packs(a.logits, a.logits_stride, a.entries, 4) ? run<4>(a, exec) : run<1>(a, exec);
}

int64_t cross_entropy_bwd_workspace(const CrossEntropyBwdArgs&) { return 0; }

void cross_entropy_bwd(const CrossEntropyBwdArgs& a, const Exec& exec) {
  check_args(a);
  if (a.rows == 0) return;
  const DeviceGuard guard(exec);
  check_pointers(kOp, {{"logits", a.logits}, {"targets", a.targets}, {"lse", a.lse}, {"upstream", a.upstream}}, exec);
  if (a.dtype == DType::f32)
    return packs(a.logits, a.logits_stride, a.entries, 4) ? run<float, 4>(a, exec) : run<float, 1>(a, exec);
  packs(a.logits, a.logits_stride, a.entries, 8) ? run<__nv_bfloat16, 8>(a, exec) : run<__nv_bfloat16, 1>(a, exec);
}

}  // namespace hebatron::cuda
