// What      one token of the state-space recurrence: state = exp(dt A) state + dt x B^T, y = state C + D x.
// Grid      one (sequence, head) per task: P rows of S state values, read, updated and written once.
// Traffic   8 bytes per state value; x, B, C and y are small beside it (64 x 128 state values, 64 + 256 others).
// Roofline  DRAM bound: at the 30B model's shape 2 x 2.1 MB per layer and sequence.
// Measured  2026-11-23, 64 heads x 64 x 128 fp32, one sequence, one thread of a Zen 4 virtual machine with other work
//           on it: 102 us a call from Python (torch form 266 us).
// Limits    state fp32; x, B, C fp32 or bf16; int64 offsets.
// Why so    the state is read and written in one pass, with its product with C taken while it is in registers.
#include "cpu/simd.h"

#include <cmath>

namespace hebatron::HEBATRON_ISA_NAMESPACE {
namespace {

static float softplus(float v) { return v > 40.0f ? v : std::log1p(std::exp(v)); }

template <class T>
static void update(const SsdUpdateArgs& a, const Exec& exec) {
  for_tasks(a.sequences * a.heads, exec.threads, [&](int64_t task) {
    const int64_t q = task / a.heads, h = task % a.heads, group = h / (a.heads / a.groups);
    const T* x = (const T*)a.x + q * a.x_stride + h * a.head_dim;
    const T* B = (const T*)a.B + q * a.B_stride + group * a.state_dim;
    const T* C = (const T*)a.C + q * a.C_stride + group * a.state_dim;
    T* y = (T*)a.y + task * a.head_dim;
    float* state = a.state + task * a.head_dim * a.state_dim;
    float dt = softplus(a.dt[task] + (a.dt_bias ? a.dt_bias[h] : 0.0f));
    dt = dt < float(a.dt_min) ? float(a.dt_min) : dt > float(a.dt_max) ? float(a.dt_max) : dt;  // NaN stays
    const Vec decay = set1(std::exp(dt * a.A[h]));
    for (int64_t p = 0; p < a.head_dim; p++, state += a.state_dim) {
      const float xp = to_float(x[p]);
      const Vec input = set1(dt * xp);
      Vec dots = set1(0.0f);
      for_lanes(a.state_dim, [&](int64_t s, int n) {
        Vec updated = fma(input, load_lanes(B + s, n), decay * load_lanes(state + s, n));
        store_lanes(state + s, updated, n);
        dots = fma(updated, load_lanes(C + s, n), dots);
      });
      from_float(a.D ? sum(dots) + a.D[h] * xp : sum(dots), y[p]);
    }
  });
}

}  // namespace

int64_t ssd_update_workspace(const SsdUpdateArgs&) { return 0; }

void ssd_update(const SsdUpdateArgs& a, const Exec& exec) {
  check(a.sequences >= 0, "ssd_update", "sequences must be >= 0", a.sequences);
  check(a.head_dim > 0, "ssd_update", "head_dim must be > 0", a.head_dim);
  check(a.state_dim > 0, "ssd_update", "state_dim must be > 0", a.state_dim);
  check(a.groups > 0 && a.heads % a.groups == 0, "ssd_update", "groups must divide the heads", a.groups);
  a.dtype == DType::f32 ? update<float>(a, exec) : update<bf16>(a, exec);
}

}  // namespace hebatron::HEBATRON_ISA_NAMESPACE
