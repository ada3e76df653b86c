// What      s = sigmoid(logits); ids = the best top_k of s + bias, inside the best groups; weights = scale s / sum s; tokens
//           per expert; and the backward to the logits.
// Grid      a warp a token, eight a block, at most 8 blocks an SM; lane l has experts l, l + 32, ... as sortable keys in
//           registers; 18 KB of static shared memory; 64 registers up to 128 experts, 154 at most, no spill (nvcc 13.0, sm_90a).
// Traffic   the logits once; 12 bytes a choice written; the backward reads the logits again and writes their gradient.
// Roofline  DRAM, with fp64 close behind: 65,536 tokens x 128 fp32 logits, 38 MB, 13 us at 3.0 TB/s (H100); one fp64
//           exponential and one division a logit, about 60 operations, are 15 us at 34 TFLOP/s.
// Measured  never run on hardware.
// Limits    fp32 and bf16 logits; at most 512 experts and 32 choices, a lane each.
// Why so    a token's choice must not depend on where it was made: the sigmoid is taken in fp64 and rounded once, as on the
//           CPU, so equal logits tie and both choose the same experts. A key holds the rated score, ordered as integers with
//           NaN first, above the complement of the index: the best expert is one maximum, and equals go to the lowest.
#include <cmath>

#include "cuda/rows.cuh"
#include "hebatron/ops.h"

namespace hebatron::cuda {
namespace {

constexpr const char* kOp = "moe_route[cuda]";
constexpr int kWarps = 8;
constexpr int kMaxExperts = 512;
constexpr int kBlocksPerSm = 8;
constexpr uint32_t kNan = 0xffffffffu;

// The order of the scores as that of integers: NaN before every number, -0 equal to 0. Never 0.
HEBATRON_DEVICE uint32_t sortable(float v) {
  if (v != v) return kNan;
  v += 0.0f;
  uint32_t bits;
  memcpy(&bits, &v, sizeof bits);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}
HEBATRON_DEVICE float sorted_value(uint32_t key) {
  const uint32_t bits = key & 0x80000000u ? key & 0x7fffffffu : ~key;  // kNan becomes a NaN
  float v;
  memcpy(&v, &bits, sizeof v);
  return v;
}

// Greater is better, equals by the lower index; 0 is no candidate.
HEBATRON_DEVICE uint64_t candidate(uint32_t key, int index) { return uint64_t(key) << 32 | uint32_t(~index); }
HEBATRON_DEVICE int index_of(uint64_t candidate) { return int(~uint32_t(candidate)); }

// The best of all lanes' candidates, the same in every lane.
template <int kSlots>
HEBATRON_DEVICE uint64_t best_of(const uint64_t (&candidates)[kSlots]) {
  uint64_t best = 0;
#pragma unroll
  for (int i = 0; i < kSlots; i++) best = candidates[i] > best ? candidates[i] : best;
#pragma unroll
  for (int mask = kWarp / 2; mask; mask /= 2) {
    const uint64_t other = shfl_xor(best, mask);
    best = other > best ? other : best;
  }
  return best;
}

// A token's experts in a warp; slot i of lane l is expert 32 i + l.
template <class T, int kSlots>
struct Token {
  double score[kSlots];
  uint64_t rated[kSlots];

  HEBATRON_DEVICE void read(const MoeRouteArgs& a, int64_t t) {
    const T* logits = static_cast<const T*>(a.logits) + t * a.logits_stride;
#pragma unroll
    for (int i = 0; i < kSlots; i++) {
      const int e = i * kWarp + lane_id();
      score[i] = 0.0;
      rated[i] = 0;
      if (e >= a.experts) continue;
      score[i] = 1.0 / (1.0 + exp(-double(widen(logits[e]))));
      rated[i] = candidate(sortable(float(score[i]) + a.bias[e]), e);
    }
  }

  // Takes the experts outside the best groups off the list. `keys` is the warp's own: a group may lie in any lanes.
  HEBATRON_DEVICE void keep_best_groups(const MoeRouteArgs& a, uint32_t* keys) {
    const int experts = int(a.experts), groups = int(a.groups), size = experts / groups;
#pragma unroll
    for (int i = 0; i < kSlots; i++)
      if (i * kWarp + lane_id() < experts) keys[i * kWarp + lane_id()] = uint32_t(rated[i] >> 32);
    warp_sync();
    uint64_t total[kSlots];
#pragma unroll
    for (int i = 0; i < kSlots; i++) {
      const int g = i * kWarp + lane_id();
      total[i] = 0;
      if (g >= groups) continue;
      uint32_t first = 0, second = 0;
      for (int e = g * size; e < (g + 1) * size; e++) {
        const uint32_t key = keys[e];
        second = key > first ? first : key > second ? key : second;
        first = key > first ? key : first;
      }
      total[i] = candidate(sortable(sorted_value(first) + sorted_value(second)), g);
    }
    warp_sync();  // the next token's keys may be written
    uint32_t kept = 0;
    for (int round = 0; round < a.kept_groups; round++) {
      const uint64_t best = best_of(total);
      const int begin = index_of(best) * size;
#pragma unroll
      for (int i = 0; i < kSlots; i++) {
        const int e = i * kWarp + lane_id();
        if (total[i] == best) total[i] = 0;
        if (e >= begin && e < begin + size) kept |= 1u << i;
      }
    }
#pragma unroll
    for (int i = 0; i < kSlots; i++)
      if (!(kept >> i & 1)) rated[i] = 0;
  }

  // The best expert left and its score, the same in every lane; it is taken off the list.
  HEBATRON_DEVICE int next(double& chosen) {
    const uint64_t best = best_of(rated);
    chosen = 0.0;
#pragma unroll
    for (int i = 0; i < kSlots; i++) {
      if (rated[i] != best) continue;
      chosen = score[i];
      rated[i] = 0;
    }
    const int e = index_of(best);
    chosen = shfl(chosen, e % kWarp);
    return e;
  }
};

// A token's choices, one a lane, and the sum of their scores.
struct Choice {
  int id = 0;
  double score = 0.0, total = 0.0;
};
template <class T, int kSlots>
HEBATRON_DEVICE Choice choose(const MoeRouteArgs& a, int64_t t, uint32_t* keys) {
  Token<T, kSlots> token;
  token.read(a, t);
  if (a.groups > 1) token.keep_best_groups(a, keys);
  Choice choice;
  for (int k = 0; k < a.top_k; k++) {
    double score;
    const int e = token.next(score);
    choice.total += score;
    if (lane_id() == k) choice.id = e, choice.score = score;
  }
  choice.total = a.normalize ? choice.total + 1e-20 : 1.0;
  return choice;
}

template <class T, int kSlots>
__global__ void __launch_bounds__(kWarps* kWarp) forward(const MoeRouteArgs a) {
  HEBATRON_SHARED(int, tally, kMaxExperts);
  HEBATRON_SHARED(uint32_t, keys, kWarps * kMaxExperts);
  const int warp = threadIdx.x / kWarp;
  for (int e = threadIdx.x; e < a.experts; e += blockDim.x) tally[e] = 0;
  block_sync();
  for (int64_t t = int64_t(blockIdx.x) * kWarps + warp; t < a.tokens; t += int64_t(gridDim.x) * kWarps) {
    const Choice choice = choose<T, kSlots>(a, t, keys + warp * kMaxExperts);
    if (lane_id() >= a.top_k) continue;
    const int64_t slot = t * a.top_k + lane_id();
    a.weights[slot] = float(choice.score * (a.scale / choice.total));
    a.ids[slot] = choice.id;
    atomic_add(&tally[choice.id], 1);
  }
  block_sync();
  for (int e = threadIdx.x; e < a.experts; e += blockDim.x)
    if (tally[e]) atomic_add(reinterpret_cast<unsigned long long*>(a.counts) + e, static_cast<unsigned long long>(tally[e]));
}

// With w_k = scale s_k / S and S = sum s: dlogit_k = scale / S (g_k - sum_j g_j s_j / S) s_k (1 - s_k).
template <class T, int kSlots>
__global__ void __launch_bounds__(kWarps* kWarp) backward(const MoeRouteBwdArgs b) {
  HEBATRON_SHARED(uint32_t, keys, kWarps * kMaxExperts);
  const MoeRouteArgs& a = b.forward;
  const int warp = threadIdx.x / kWarp;
  for (int64_t t = int64_t(blockIdx.x) * kWarps + warp; t < a.tokens; t += int64_t(gridDim.x) * kWarps) {
    const Choice choice = choose<T, kSlots>(a, t, keys + warp * kMaxExperts);
    const bool chosen = lane_id() < a.top_k;
    const double upstream = chosen ? b.grad_weights[t * a.top_k + lane_id()] : 0.0;
    double mean = a.normalize ? upstream * choice.score / choice.total : 0.0;
#pragma unroll
    for (int mask = kWarp / 2; mask; mask /= 2) mean += shfl_xor(mean, mask);
    T* grad = static_cast<T*>(b.grad_logits) + t * a.experts;
    for (int e = lane_id(); e < a.experts; e += kWarp) narrow(0.0f, grad[e]);
    warp_sync();
    const double s = choice.score;
    if (chosen) narrow(float(a.scale / choice.total * (upstream - mean) * s * (1.0 - s)), grad[choice.id]);
    warp_sync();
  }
}

void check_args(const MoeRouteArgs& a) {
  check(a.tokens >= 0, kOp, "tokens must be >= 0", a.tokens);
  check(a.experts > 0 && a.experts <= kMaxExperts, kOp, "experts must be between 1 and 512", a.experts);
  check(a.groups > 0 && a.experts % a.groups == 0, kOp, "groups must divide the experts", a.groups);
  check(a.groups == 1 || a.experts >= 2 * a.groups, kOp, "groups must have at least 2 experts, groups", a.groups);
  check(a.kept_groups > 0 && a.kept_groups <= a.groups, kOp, "kept_groups must be between 1 and the groups", a.kept_groups);
  check(a.top_k > 0 && a.top_k <= a.experts / a.groups * a.kept_groups, kOp, "top_k must be between 1 and the experts kept", a.top_k);
  check(a.top_k <= kWarp, kOp, "top_k must be at most 32", a.top_k);
}

LaunchShape shape_for(const MoeRouteArgs& a, const Exec& exec) {
  const int64_t wanted = (a.tokens + kWarps - 1) / kWarps, most = int64_t(kBlocksPerSm) * sm_count(exec);
  return {dim3(unsigned(wanted < most ? wanted : most)), dim3(kWarps * kWarp)};
}

template <class T, int kSlots>
void run(const MoeRouteArgs& a, const Exec& exec) {
  launch(kOp, forward<T, kSlots>, shape_for(a, exec), exec, a);
}
template <class T, int kSlots>
void run(const MoeRouteBwdArgs& b, const Exec& exec) {
  launch(kOp, backward<T, kSlots>, shape_for(b.forward, exec), exec, b);
}

template <class T, class Args>
void run_for(int64_t experts, const Args& args, const Exec& exec) {
  if (experts <= 1 * kWarp) return run<T, 1>(args, exec);
  if (experts <= 4 * kWarp) return run<T, 4>(args, exec);
  return run<T, 16>(args, exec);
}
template <class Args>
void run_for(const MoeRouteArgs& a, const Args& args, const Exec& exec) {
  a.dtype == DType::f32 ? run_for<float>(a.experts, args, exec) : run_for<__nv_bfloat16>(a.experts, args, exec);
}

}  // namespace

int64_t moe_route_fwd_workspace(const MoeRouteArgs&) { return 0; }

void moe_route_fwd(const MoeRouteArgs& a, const Exec& exec) {
  check_args(a);
  const DeviceGuard guard(exec);
  check_pointer(kOp, "counts", a.counts, exec);
  fill_zero(kOp, a.counts, size_t(a.experts) * sizeof(int64_t), exec);
  if (a.tokens == 0) return;
  check_pointers(kOp, {{"logits", a.logits}, {"bias", a.bias}, {"weights", a.weights}, {"ids", a.ids}}, exec);
  run_for(a, a, exec);
}

int64_t moe_route_bwd_workspace(const MoeRouteBwdArgs&) { return 0; }

void moe_route_bwd(const MoeRouteBwdArgs& b, const Exec& exec) {
  const MoeRouteArgs& a = b.forward;
  check_args(a);
  if (a.tokens == 0) return;
  const DeviceGuard guard(exec);
  check_pointers(kOp, {{"logits", a.logits}, {"bias", a.bias}, {"grad_weights", b.grad_weights}, {"grad_logits", b.grad_logits}}, exec);
  run_for(a, b, exec);
}

}  // namespace hebatron::cuda
