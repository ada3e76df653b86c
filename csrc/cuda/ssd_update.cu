// What      one token of the state-space recurrence: state = exp(dt A) state + dt x B^T, y = state C + D x.
// Grid      (16 rows of a state, heads, sequences), 128 threads, a warp four rows of state_dim values: at one sequence of 64
//           heads of 64 x 128 that is 256 blocks, all 2.1 MB in flight at once. No shared memory; 80 registers (nvcc 13.0).
// Traffic   8 bytes a value of the state, read and written in place; x, B, C and y are small beside it.
// Roofline  DRAM. 64 heads x 64 x 128: 1.4 us a sequence, 64 sequences 268 MB, 90 us at 3.0 TB/s (H100); to reach: 110 us.
// Measured  never run on hardware.
// Limits    state fp32; x, B, C fp32 or bf16; any head_dim and state_dim, at most 65,535 heads; int64 offsets. Packs of four
//           values where state_dim, strides and addresses allow them, single ones elsewhere.
// Why so    four rows a warp are read before the first is written: a store may be of what the next load reads, for all the
//           compiler knows, and would wait a trip to DRAM a row. A row's sum over the state is one warp's, in one order.
#include "cuda/ssd.cuh"

namespace hebatron::cuda {
namespace {

constexpr const char* kOp = "ssd_update[cuda]";
constexpr int kThreads = 128;
constexpr int kRows = 4;                               // of a warp
constexpr int kBlockRows = kThreads / kWarp * kRows;
constexpr int64_t kMaxGridSequences = 65535;  // blocks stride over the sequences beyond

template <class T, int kCount>
__global__ void __launch_bounds__(kThreads) update(const SsdUpdateArgs a) {
  const int head = blockIdx.y, group = head / int(a.heads / a.groups), lane = lane_id();
  const int row = int(blockIdx.x) * kBlockRows + threadIdx.x / kWarp * kRows, head_dim = int(a.head_dim), state_dim = int(a.state_dim);
  if (row >= head_dim) return;
  for (int64_t q = blockIdx.z; q < a.sequences; q += gridDim.z) {
    const T* B = static_cast<const T*>(a.B) + q * a.B_stride + int64_t(group) * state_dim;
    const T* C = static_cast<const T*>(a.C) + q * a.C_stride + int64_t(group) * state_dim;
    const T* x = static_cast<const T*>(a.x) + q * a.x_stride + int64_t(head) * head_dim + row;
    float* state = a.state + ((q * a.heads + head) * head_dim + row) * state_dim;
    const float bias = a.dt_bias ? a.dt_bias[head] : 0.0f;
    const float dt = step_of(a.dt[q * a.heads + head] + bias, float(a.dt_min), float(a.dt_max)), decay = expf(dt * a.A[head]);
    float input[kRows], dot[kRows];
#pragma unroll
    for (int r = 0; r < kRows; r++) {
      input[r] = row + r < head_dim ? widen(x[r]) : 0.0f;
      dot[r] = 0.0f;
    }
    for (int s = lane * kCount; s < state_dim; s += kWarp * kCount) {
      float h[kRows][kCount], b[kCount], c[kCount];
#pragma unroll
      for (int r = 0; r < kRows; r++)
        if (row + r < head_dim) load<kCount>(state + int64_t(r) * state_dim + s, h[r]);
      load<kCount>(B + s, b);
      load<kCount>(C + s, c);
#pragma unroll
      for (int r = 0; r < kRows; r++) {
        if (row + r >= head_dim) continue;
#pragma unroll
        for (int i = 0; i < kCount; i++) {
          h[r][i] = decay * h[r][i] + dt * input[r] * b[i];
          dot[r] += h[r][i] * c[i];
        }
        store_whole(state + int64_t(r) * state_dim + s, h[r]);
      }
    }
#pragma unroll
    for (int r = 0; r < kRows; r++) {
      const float sum = warp_sum(dot[r]);
      if (lane == r && row + r < head_dim)
        narrow(a.D ? sum + a.D[head] * input[r] : sum, static_cast<T*>(a.y)[(q * a.heads + head) * head_dim + row + r]);
    }
  }
}

template <class T, int kCount>
void run(const SsdUpdateArgs& a, const Exec& exec) {
  const int64_t deep = a.sequences < kMaxGridSequences ? a.sequences : kMaxGridSequences;
  const dim3 grid(unsigned((a.head_dim + kBlockRows - 1) / kBlockRows), unsigned(a.heads), unsigned(deep));
  launch(kOp, update<T, kCount>, LaunchShape{grid, dim3(kThreads)}, exec, a);
}

}  // namespace

int64_t ssd_update_workspace(const SsdUpdateArgs&) { return 0; }

void ssd_update(const SsdUpdateArgs& a, const Exec& exec) {
  check_ssd_sizes(kOp, a.sequences, a.heads, a.head_dim, a.groups, a.state_dim);
  if (a.sequences == 0) return;
  const DeviceGuard guard(exec);
  check(a.state && a.x && a.dt && a.A && a.B && a.C && a.y, kOp, "all but D and dt_bias must be given, sequences", a.sequences);
  check_pointers(kOp, {{"state", a.state}, {"x", a.x}, {"dt", a.dt}, {"A", a.A}, {"B", a.B}, {"C", a.C}, {"D", a.D},
                 {"dt_bias", a.dt_bias}, {"y", a.y}}, exec);
  const bool packs = addresses_of({a.state, a.B, a.C}) % 16 == 0 && (a.state_dim | a.B_stride | a.C_stride) % 4 == 0;
  if (a.dtype == DType::f32) return packs ? run<float, 4>(a, exec) : run<float, 1>(a, exec);
  return packs ? run<__nv_bfloat16, 4>(a, exec) : run<__nv_bfloat16, 1>(a, exec);
}

}  // namespace hebatron::cuda
