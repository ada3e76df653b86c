// What      one token of a whole layer for every sequence: y = x + mixer(rms_norm(x)), mixer Mamba-2, attention or experts.
// Grid      that of the operators it calls one after another; what lies between them is a row or two of the width.
// Traffic   the layer's weights once, the states once.
// Roofline  DRAM bound.
// Measured  as part of a token: decode_step.cpp. bench/bench_model.py.
// Limits    fp32 and bf16; every matrix packed by moe_pack in the dtype of x (the router's in fp32).
// Why so    from Python a call costs 20 us and more, as long as a small layer takes: a token of 10 layers was 75 calls. The
//           operators themselves run here, so the result is theirs to the bit. One row goes through decode_step.
#include "cpu/gemm.h"
#include "cpu/team.h"

namespace hebatron::HEBATRON_ISA_NAMESPACE {

HEBATRON_CPU_OPS(HEBATRON_DECLARE)

namespace {

// Runs operators one after another, each with what is left of the caller's workspace; or, `measuring`, only counts the bytes.
struct Runner {
  const Exec& exec;
  bool measuring;
  Workspace space;
  int64_t most = 0;  // bytes that one of the operators needs

  Runner(const Exec& e, bool measure) : exec(e), measuring(measure), space{measure ? (char*)64 : (char*)e.workspace} {}
  int64_t workers() const { return exec.threads; }

  template <class Args>
  void run(void (*op)(const Args&, const Exec&), int64_t (*size)(const Args&), const Args& args) {
    if (measuring) {
      most = std::max(most, (size(args) + 63) / 64 * 64);
      return;
    }
    Exec inner = exec;
    inner.workspace = space.base + space.bytes;
    inner.bytes_workspace = exec.bytes_workspace - space.bytes;
    op(args, inner);
  }
  // to[i] = f(a[i], b[i]), rounded to S.
  template <class S, class T, class F>
  void each(S* to, const T* a, const T* b, int64_t count, const F& f) const {
    if (!measuring)
      for_lanes(count, [&](int64_t i, int n) { store_lanes(to + i, f(load_lanes(a + i, n), load_lanes(b + i, n)), n); });
  }
};
#define HEBATRON_RUN(runner, op, args) (runner).run(op, op##_workspace, args)

template <class T>
constexpr DType kDType = std::is_same_v<T, float> ? DType::f32 : DType::bf16;

template <class T>
static void normalise(Runner& r, const T* x, int64_t x_stride, int64_t rows, int64_t width, int64_t group, const float* weight,
                      double eps, const T* gate, int64_t gate_stride, T* y) {
  RmsNormArgs a{};
  a.rows = rows, a.width = width, a.group = group, a.eps = eps, a.dtype = kDType<T>, a.weight_dtype = DType::f32;
  a.x = x, a.x_stride = x_stride, a.gate = gate, a.gate_stride = gate_stride, a.weight = weight, a.y = y;
  HEBATRON_RUN(r, rms_norm_fwd, a);
}

template <class T>
static void project(Runner& r, const T* x, int64_t rows, int64_t k, const void* packed, int64_t n, T* y) {
  LinearArgs a{};
  a.rows = rows, a.n = n, a.k = k, a.workers = r.workers(), a.dtype = a.weight_dtype = a.out_dtype = kDType<T>;
  a.a = x, a.a_stride = k, a.b = packed, a.b_k_major = a.packed = true, a.out = y;
  HEBATRON_RUN(r, linear_fwd, a);
}

static inline Vec sum_of(Vec a, Vec b) { return a + b; }

template <class T>
static void mamba(const MambaStepArgs& a, Runner& r) {
  const int64_t Q = a.sequences, inner = a.heads * a.head_dim, states = a.groups * a.state_dim, channels = inner + 2 * states;
  const int64_t wide = inner + channels + a.heads;
  T* normed = r.space.take<T>(Q * a.width);
  T* wide_row = r.space.take<T>(Q * wide);
  T* convolved = r.space.take<T>(Q * channels);
  float* dt = r.space.take<float>(Q * a.heads);
  T *scanned = r.space.take<T>(Q * inner), *gated = r.space.take<T>(Q * inner);
  normalise(r, (const T*)a.x, a.width, Q, a.width, a.width, a.norm, a.eps, (const T*)nullptr, 0, normed);
  project(r, normed, Q, a.width, a.in_proj, wide, wide_row);
  ConvUpdateArgs c{};
  c.sequences = Q, c.channels = channels, c.taps = a.taps, c.silu = true, c.dtype = kDType<T>;
  c.x = wide_row + inner, c.x_stride = wide, c.state = a.conv_state, c.weight = a.conv_weight, c.bias = a.conv_bias, c.y = convolved;
  HEBATRON_RUN(r, causal_conv1d_update, c);
  if (!r.measuring)
    for (int64_t q = 0; q < Q; q++)
      for (int64_t h = 0; h < a.heads; h++) dt[q * a.heads + h] = to_float(wide_row[q * wide + inner + channels + h]);
  SsdUpdateArgs s{};
  s.sequences = Q, s.heads = a.heads, s.head_dim = a.head_dim, s.groups = a.groups, s.state_dim = a.state_dim;
  s.dt_min = a.dt_min, s.dt_max = a.dt_max, s.dtype = kDType<T>, s.state = a.state, s.dt = dt, s.A = a.A, s.D = a.D, s.dt_bias = a.dt_bias;
  s.x = convolved, s.B = convolved + inner, s.C = convolved + inner + states, s.x_stride = s.B_stride = s.C_stride = channels, s.y = scanned;
  HEBATRON_RUN(r, ssd_update, s);
  normalise(r, scanned, inner, Q, inner, inner / a.groups, a.gate_norm, a.eps, wide_row, wide, gated);
  project(r, gated, Q, inner, a.out_proj, a.width, normed);
  r.each((T*)a.y, (const T*)a.x, normed, Q * a.width, sum_of);
}

template <class T>
static void experts(const MoeStepArgs& a, Runner& r) {
  const int64_t count = a.tokens * a.width;
  T *normed = r.space.take<T>(count), *routed = r.space.take<T>(count), *shared = r.space.take<T>(count);
  T* hidden = r.space.take<T>(a.tokens * a.shared_width);
  float *wide = r.space.take<float>(count), *logits = r.space.take<float>(a.tokens * a.experts);
  float* weights = r.space.take<float>(a.tokens * a.top_k);
  int64_t *ids = r.space.take<int64_t>(a.tokens * a.top_k), *counts = r.space.take<int64_t>(a.experts);
  normalise(r, (const T*)a.x, a.width, a.tokens, a.width, a.width, a.norm, a.eps, (const T*)nullptr, 0, normed);
  r.each(wide, normed, normed, count, [](Vec v, Vec) { return v; });
  project(r, wide, a.tokens, a.width, a.router, a.experts, logits);
  MoeRouteArgs route{};
  route.tokens = a.tokens, route.experts = a.experts, route.top_k = a.top_k, route.groups = a.groups, route.kept_groups = a.kept_groups;
  route.workers = r.workers(), route.normalize = a.normalize, route.scale = a.scale, route.dtype = DType::f32;
  route.logits = logits, route.logits_stride = a.experts, route.bias = a.bias, route.weights = weights, route.ids = ids, route.counts = counts;
  HEBATRON_RUN(r, moe_route_fwd, route);
  MoeMlpArgs mlp{};
  mlp.tokens = a.tokens, mlp.top_k = a.top_k, mlp.experts = a.experts, mlp.width = a.width, mlp.expert_width = a.expert_width;
  mlp.workers = r.workers(), mlp.dtype = mlp.weight_dtype = kDType<T>, mlp.packed = true;
  mlp.x = normed, mlp.x_stride = a.width, mlp.ids = ids, mlp.weights = weights, mlp.up = a.up, mlp.down = a.down, mlp.y = routed;
  HEBATRON_RUN(r, moe_mlp_fwd, mlp);
  project(r, normed, a.tokens, a.width, a.shared_up, a.shared_width, hidden);
  r.each(hidden, hidden, hidden, a.tokens * a.shared_width, [](Vec v, Vec) { return max(set1(0.0f), v) * max(set1(0.0f), v); });
  project(r, hidden, a.tokens, a.shared_width, a.shared_down, a.width, shared);
  r.each(routed, routed, shared, count, sum_of);
  r.each((T*)a.y, (const T*)a.x, routed, count, sum_of);
}

template <class T>
static void attend(const AttentionStepArgs& a, Runner& r) {
  AttentionDecodeArgs d = a.decode;
  const int64_t Q = d.sequences, wide = d.heads * d.head_dim, narrow = d.kv_heads * d.head_dim;
  T *normed = r.space.take<T>(Q * a.width), *q = r.space.take<T>(Q * wide), *o = r.space.take<T>(Q * wide);
  T *k = r.space.take<T>(Q * narrow), *v = r.space.take<T>(Q * narrow);
  normalise(r, (const T*)a.x, a.width, Q, a.width, a.width, a.norm, a.eps, (const T*)nullptr, 0, normed);
  project(r, normed, Q, a.width, a.q_proj, wide, q);
  project(r, normed, Q, a.width, a.k_proj, narrow, k);
  project(r, normed, Q, a.width, a.v_proj, narrow, v);
  d.workers = r.workers();
  d.q = q, d.q_stride = wide, d.k_new = k, d.v_new = v, d.k_new_stride = d.v_new_stride = narrow, d.o = o;
  d.q_head_stride = d.k_new_head_stride = d.v_new_head_stride = d.head_dim;
  HEBATRON_RUN(r, attention_decode, d);
  project(r, o, Q, wide, a.o_proj, a.width, normed);
  r.each((T*)a.y, (const T*)a.x, normed, Q * a.width, sum_of);
}

}  // namespace

// A single row of a layer goes the way of the whole token. The workspace is the same whatever the threads.
static DecodeStepArgs alone(const LayerStepArgs& layer, int64_t width, DType dtype, const void* x, void* y) {
  DecodeStepArgs a{};
  a.count = 1, a.layers = &layer, a.rows = 1, a.width = width, a.dtype = dtype, a.x = x, a.hidden = y;
  return a;
}
#define HEBATRON_STEP(name, Args, kind, field, rows, dtype_of, function)                                          \
  int64_t name##_workspace(const Args& a) {                                                                       \
    if (rows == 1) {                                                                                              \
      LayerStepArgs layer{kind, {}, {}, {}};                                                                      \
      layer.field = a;                                                                                            \
      return decode_step_workspace(alone(layer, a.width, dtype_of, a.x, a.y));                                    \
    }                                                                                                             \
    Exec any{};                                                                                                   \
    any.threads = int(most_threads());                                                                            \
    Runner r(any, true);                                                                                          \
    dtype_of == DType::f32 ? function<float>(a, r) : function<bf16>(a, r);                                        \
    return r.space.bytes + r.most;                                                                                \
  }                                                                                                               \
  void name(const Args& a, const Exec& exec) {                                                                    \
    if (rows == 1) {                                                                                              \
      LayerStepArgs layer{kind, {}, {}, {}};                                                                      \
      layer.field = a;                                                                                            \
      return decode_step(alone(layer, a.width, dtype_of, a.x, a.y), exec);                                        \
    }                                                                                                             \
    check(exec.bytes_workspace >= name##_workspace(a), #name, "workspace is too small", exec.bytes_workspace);    \
    Runner r(exec, false);                                                                                        \
    dtype_of == DType::f32 ? function<float>(a, r) : function<bf16>(a, r);                                        \
  }
HEBATRON_STEP(mamba_step, MambaStepArgs, LayerKind::mamba, mamba, a.sequences, a.dtype, mamba)
HEBATRON_STEP(moe_step, MoeStepArgs, LayerKind::experts, experts, a.tokens, a.dtype, experts)
HEBATRON_STEP(attention_step, AttentionStepArgs, LayerKind::attention, attention, a.decode.sequences, a.decode.dtype, attend)

}  // namespace hebatron::HEBATRON_ISA_NAMESPACE
