// What      one token of a list of layers, then hidden = rms_norm(x) and logits = hidden head^T.
// Grid      one row: a single parallel region whose threads go through the layers together, each with its share of every matrix's
//           panels; norms, routing and sums of a row are computed by every thread for itself. More rows: the layers' steps.
// Traffic   the chosen weights, the states and the keys once.
// Roofline  DRAM bound.
// Measured  2026-11-30, Zen 3 (AVX2, no AVX-512), 2 threads, scaled_570m in bf16, from Python: 2.3 times the operators' steps one
//           after another, 75 % of a plain read's rate at context 512, 67 % at 8,192; of the call's own time 95 %. bench/bench_model.py.
// Limits    fp32 and bf16; every matrix packed by moe_pack in the dtype of x (the router's in fp32).
// Why so    what lies between two matrices is short, but a parallel region for each, started cold, left DRAM idle for a third of
//           the token. A thread that waits at a barrier reads the beginning of its next share.
#include "cpu/decode_plan.h"

namespace hebatron::HEBATRON_ISA_NAMESPACE {

namespace {

constexpr int64_t kSoonPanels = 4;  // 200 KB: what was asked for earlier may have left the L2 again
template <class T>
static Span span(const T* at, int64_t count) { return {(const char*)at, count * int64_t(sizeof(T))}; }

template <class T>
static auto write_to(T* out) {
  return [=](int64_t column, int64_t columns, const float* sums) {
    for_lanes(columns, [&](int64_t c, int n) { store_lanes(out + column + c, load_lanes(sums + c, n), n); });
  };
}

// What a layer reads first.
struct Next {
  Span norm, matrix;
};

// One thread's way through the layers.
template <class T>
struct Walk {
  const DecodeStepArgs& a;
  Member& team;
  const Own<T>& own;
  Exec alone{};  // operators that this thread calls for itself

  void normalise(const T* x, int64_t width, int64_t group, const float* weight, double eps, const T* gate, T* y) {
    RmsNormArgs n{};
    n.rows = 1, n.width = width, n.group = group, n.eps = eps, n.dtype = kDType<T>, n.weight_dtype = DType::f32;
    n.x = x, n.gate = gate, n.weight = weight, n.y = y;
    rms_norm_fwd(n, alone);
  }
  template <class S>
  Span mine(const Panels<S>& p) const { return p.from(0, team.begin(p.panels)); }
  // This thread's panels of a row for each slot, times the matrix of the slot's expert: finish(slot, column, columns, sums).
  // `soon`: what is read behind the next barrier, asked for beside the last panels; there each line would cost a miss.
  template <class S, class RowOf, class Finish>
  void multiply(const Panels<S>& p, int64_t slots, const int64_t* experts, const RowOf& row_of, const Finish& finish,
                std::initializer_list<Span> soon) {
    const int64_t end = team.end(slots * p.panels);
    for (int64_t n = team.begin(slots * p.panels); n < end; n++) {
      const int64_t slot = n / p.panels, asked = kSoonPanels - (end - n);
      if (asked >= 0)
        for (const Span& span : soon) prefetch(span, asked * span.bytes / kSoonPanels, (asked + 1) * span.bytes / kSoonPanels);
      p.row(row_of(slot), experts[slot], n % p.panels,
            [&](int64_t column, int64_t columns, const float* sums) { finish(slot, column, columns, sums); });
    }
  }
  template <class S, class Finish>
  void project(const S* x, const Panels<S>& p, const Finish& finish, std::initializer_list<Span> soon = {}) {
    const int64_t only = 0;
    multiply(p, 1, &only, [&](int64_t) { return x; },
             [&](int64_t, int64_t column, int64_t columns, const float* sums) { finish(column, columns, sums); }, soon);
  }
  static void prefetch(const Span& span, int64_t begin, int64_t end) {
    for (int64_t at = begin / 64 * 64; at < end; at += 64) __builtin_prefetch(span.at + at, 0, 2);
  }
  void add_to_x(const T* out) {
    for_lanes(a.width, [&](int64_t i, int n) { store_lanes(own.x + i, load_lanes(own.x + i, n) + load_lanes(out + i, n), n); });
  }

  void mamba(const MambaStepArgs& m, const Shared<T>& s, const Next& next) {
    const int64_t inner = m.heads * m.head_dim, states = m.groups * m.state_dim, channels = inner + 2 * states;
    const Panels<T> in(m.in_proj, a.width, inner + channels + m.heads), out(m.out_proj, inner, a.width);
    normalise(own.x, a.width, a.width, m.norm, m.eps, nullptr, own.normed);
    const int64_t vectors = (channels + kLanes - 1) / kLanes, begin = team.begin(vectors) * kLanes;
    const int64_t mine_of = std::min(channels, team.end(vectors) * kLanes) - begin, first = team.begin(m.heads), last = team.end(m.heads);
    const Span states_ahead = span(m.state + first * m.head_dim * m.state_dim, (last - first) * m.head_dim * m.state_dim);
    project(own.normed, in, write_to(s.wide),
            {span(m.conv_weight + begin * m.taps, mine_of * m.taps), span((T*)m.conv_state + begin * (m.taps - 1), mine_of * (m.taps - 1)),
             span(m.conv_bias ? m.conv_bias + begin : nullptr, m.conv_bias ? mine_of : 0), span(m.gate_norm, inner)});
    team.wait(states_ahead);

    ConvUpdateArgs c{};
    c.sequences = 1, c.channels = mine_of, c.taps = m.taps, c.silu = true, c.dtype = kDType<T>;
    c.x = s.wide + inner + begin, c.state = (T*)m.conv_state + begin * (m.taps - 1), c.weight = m.conv_weight + begin * m.taps;
    c.bias = m.conv_bias ? m.conv_bias + begin : nullptr, c.y = s.convolved + begin;
    causal_conv1d_update(c, alone);
    for (int64_t h = first; h < last; h++) s.dt[h] = to_float(s.wide[inner + channels + h]);
    team.wait();

    const int64_t heads_a_group = m.heads / m.groups;
    for (int64_t h = first, end; h < last; h = end) {
      const int64_t group = h / heads_a_group;
      end = std::min(last, (group + 1) * heads_a_group);
      SsdUpdateArgs u{};
      u.sequences = 1, u.heads = end - h, u.head_dim = m.head_dim, u.groups = 1, u.state_dim = m.state_dim;
      u.dt_min = m.dt_min, u.dt_max = m.dt_max, u.dtype = kDType<T>, u.state = m.state + h * m.head_dim * m.state_dim;
      u.dt = s.dt + h, u.A = m.A + h, u.D = m.D + h, u.dt_bias = m.dt_bias + h;
      u.x = s.convolved + h * m.head_dim, u.y = s.scanned + h * m.head_dim;
      u.B = s.convolved + inner + group * m.state_dim, u.C = s.convolved + inner + states + group * m.state_dim;
      ssd_update(u, alone);
    }
    team.wait(mine(out));

    const int64_t wide = inner / m.groups, groups = team.end(m.groups) - team.begin(m.groups), at = team.begin(m.groups) * wide;
    if (groups) normalise(s.scanned + at, groups * wide, wide, m.gate_norm + at, m.eps, s.wide + at, s.gated + at);
    team.wait(mine(out));

    project(s.gated, out, write_to(s.out), {next.norm});
    team.wait(next.matrix);
    add_to_x(s.out);
  }

  void experts(const MoeStepArgs& m, const Shared<T>& s, const Next& next) {
    const Panels<float> router(m.router, a.width, m.experts);
    const Panels<T> shared_up(m.shared_up, a.width, m.shared_width), shared_down(m.shared_down, m.shared_width, a.width);
    const Panels<T> up(m.up, a.width, m.expert_width), down(m.down, m.expert_width, a.width);
    normalise(own.x, a.width, a.width, m.norm, m.eps, nullptr, own.normed);
    for_lanes(a.width, [&](int64_t i, int n) { store_lanes(own.wide + i, load_lanes(own.normed + i, n), n); });
    project(own.wide, router, write_to(s.logits));
    project(own.normed, shared_up, [&](int64_t column, int64_t columns, const float* sums) {
      for_lanes(columns, [&](int64_t c, int n) {
        T* at = s.hidden + column + c;
        store_lanes(at, load_lanes(sums + c, n), n);
        const Vec v = max(set1(0.0f), load_lanes(at, n));
        store_lanes(at, v * v, n);
      });
    });
    team.wait(mine(shared_down));

    MoeRouteArgs route = route_args(m);
    route.logits = s.logits, route.weights = own.weights, route.ids = own.ids, route.counts = own.counts;
    Exec with = alone;
    with.workspace = own.route, with.bytes_workspace = moe_route_fwd_workspace(route);
    moe_route_fwd(route, with);
    project(s.hidden, shared_down, write_to(s.shared));
    multiply(up, m.top_k, own.ids, [&](int64_t) { return own.normed; },
             [&](int64_t slot, int64_t column, int64_t columns, const float* sums) {
               const Vec weight = set1(own.weights[slot]);
               for_lanes(columns, [&](int64_t c, int n) {
                 const Vec v = max(set1(0.0f), load_lanes(sums + c, n));
                 store_lanes(s.active + slot * m.expert_width + column + c, v * v * weight, n);
               });
             }, {});
    const int64_t begin = team.begin(m.top_k * down.panels);
    team.wait(down.from(own.ids[begin / down.panels], begin % down.panels));

    multiply(down, m.top_k, own.ids, [&](int64_t slot) { return s.active + slot * m.expert_width; },
             [&](int64_t slot, int64_t column, int64_t columns, const float* sums) {
               write_to(s.rows + slot * a.width)(column, columns, sums);
             }, {next.norm});
    team.wait(next.matrix);
    for_lanes(a.width, [&](int64_t i, int n) {
      Vec total = set1(0.0f);
      for (int64_t k = 0; k < m.top_k; k++) total = total + load_lanes(s.rows + k * a.width + i, n);
      store_lanes(own.routed + i, total, n);
      store_lanes(own.routed + i, load_lanes(own.routed + i, n) + load_lanes(s.shared + i, n), n);
    });
    add_to_x(own.routed);
  }

  void attention(const AttentionStepArgs& m, const Shared<T>& s, const Next& next) {
    AttentionDecodeArgs d = m.decode;
    const int64_t wide = d.heads * d.head_dim, narrow = d.kv_heads * d.head_dim;
    const Panels<T> q(m.q_proj, a.width, wide), k(m.k_proj, a.width, narrow), v(m.v_proj, a.width, narrow), out(m.o_proj, wide, a.width);
    d.q = s.q, d.q_stride = wide, d.k_new = s.k, d.v_new = s.v, d.k_new_stride = d.v_new_stride = narrow;
    d.o = s.o, d.q_head_stride = d.k_new_head_stride = d.v_new_head_stride = d.head_dim;
    normalise(own.x, a.width, a.width, m.norm, m.eps, nullptr, own.normed);
    project(own.normed, q, write_to(s.q));
    project(own.normed, k, write_to(s.k));
    project(own.normed, v, write_to(s.v));
    for (const auto phase : {AttentionDecodePhase::write, AttentionDecodePhase::parts, AttentionDecodePhase::join}) {
      team.wait(phase == AttentionDecodePhase::join ? mine(out) : Span{});
      attention_decode_member(d, s.attention, phase, team.id, team.count);
    }
    team.wait(mine(out));
    project(s.o, out, write_to(s.out), {next.norm});
    team.wait(next.matrix);
    add_to_x(s.out);
  }

  Next first_of(int64_t layer) const {
    if (layer == a.count) return {span(a.norm, a.norm ? a.width : 0), a.head ? mine(Panels<T>(a.head, a.width, a.entries)) : Span{}};
    const LayerStepArgs& l = a.layers[layer];
    if (l.kind == LayerKind::experts) return {span(l.experts.norm, a.width), mine(Panels<float>(l.experts.router, a.width, l.experts.experts))};
    if (l.kind == LayerKind::attention) {
      const AttentionDecodeArgs& d = l.attention.decode;
      return {span(l.attention.norm, a.width), mine(Panels<T>(l.attention.q_proj, a.width, d.heads * d.head_dim))};
    }
    const MambaStepArgs& m = l.mamba;
    return {span(m.norm, a.width), mine(Panels<T>(m.in_proj, a.width, 2 * m.heads * m.head_dim + 2 * m.groups * m.state_dim + m.heads))};
  }

  void run(const Plan<T>& plan) {
    std::memcpy((void*)own.x, row_of(a, 0), size_t(a.width) * sizeof(T));
    for (int64_t n = 0; n < a.count; n++) {
      const LayerStepArgs& layer = a.layers[n];
      const Shared<T> s = plan.shared(a, n);
      const Next next = first_of(n + 1);
      if (layer.kind == LayerKind::mamba) mamba(layer.mamba, s, next);
      if (layer.kind == LayerKind::experts) experts(layer.experts, s, next);
      if (layer.kind == LayerKind::attention) attention(attention_of(a, layer, team.count), s, next);
    }
    const T* hidden = own.x;
    if (a.norm) normalise(own.x, a.width, a.width, a.norm, a.eps, nullptr, own.normed), hidden = own.normed;
    if (team.id == 0) std::memcpy(a.hidden, (const void*)hidden, size_t(a.width) * sizeof(T));
    if (a.head)
      project(hidden, Panels<T>(a.head, a.width, a.entries), [&](int64_t column, int64_t columns, const float* sums) {
        T rounded[kTileColumns];
        write_to(rounded)(0, columns, sums);
        for_lanes(columns, [&](int64_t c, int n) { store_lanes(a.logits + column + c, load_lanes(rounded + c, n), n); });
      });
  }
};

// More rows: the steps of the layers one after another, then the operators.
struct Rows {
  void *x[2], *rounded;
  char* rest;
  int64_t bytes_rest;

  Rows(const DecodeStepArgs& a, Workspace& w) {
    const int64_t bytes = a.dtype == DType::f32 ? 4 : 2;
    for (void*& row : x) row = w.take<char>(a.rows * a.width * bytes);
    rounded = w.take<char>(a.head ? a.rows * a.entries * bytes : 0);
    bytes_rest = a.head ? linear_fwd_workspace(head(a)) : 0;
    for (int64_t n = 0; n < a.count; n++) bytes_rest = std::max(bytes_rest, step(a, n, x[1], x[0], nullptr));
    rest = w.take<char>(bytes_rest);
  }
  LinearArgs head(const DecodeStepArgs& a) const {
    LinearArgs l{};
    l.rows = a.rows, l.n = a.entries, l.k = l.a_stride = a.width, l.workers = most_threads(), l.dtype = l.weight_dtype = l.out_dtype = a.dtype;
    l.a = a.hidden, l.b = a.head, l.b_k_major = l.packed = true, l.out = rounded;
    return l;
  }
  // y = layer n of x; without exec only the bytes of its workspace.
  static int64_t step(const DecodeStepArgs& a, int64_t n, const void* from, void* to, const Exec* exec) {
    LayerStepArgs layer = a.layers[n];
    layer.mamba.sequences = layer.experts.tokens = a.rows;
    layer.attention = attention_of(a, layer, most_threads());
    layer.mamba.x = layer.experts.x = layer.attention.x = from;
    layer.mamba.y = layer.experts.y = layer.attention.y = to;
    const auto run = [&](auto op, auto size, const auto& args) -> int64_t { return exec ? (op(args, *exec), 0) : size(args); };
    if (layer.kind == LayerKind::mamba) return run(mamba_step, mamba_step_workspace, layer.mamba);
    if (layer.kind == LayerKind::experts) return run(moe_step, moe_step_workspace, layer.experts);
    return run(attention_step, attention_step_workspace, layer.attention);
  }
};

template <class T>
static void rows(const DecodeStepArgs& a, const Exec& exec) {
  Workspace space{(char*)exec.workspace};
  const Rows buffers(a, space);
  Exec inner = exec;
  inner.workspace = buffers.rest, inner.bytes_workspace = buffers.bytes_rest;
  for (int64_t row = 0; row < a.rows; row++)
    std::memcpy((T*)buffers.x[1] + row * a.width, row_of(a, row), size_t(a.width) * sizeof(T));
  const void* x = buffers.x[1];
  for (int64_t n = 0; n < a.count; n++) {
    void* y = buffers.x[n % 2];
    Rows::step(a, n, x, y, &inner);
    x = y;
  }
  if (!a.norm) {
    std::memcpy(a.hidden, x, size_t(a.rows * a.width) * sizeof(T));
    return;
  }
  RmsNormArgs norm{};
  norm.rows = a.rows, norm.width = norm.group = norm.x_stride = a.width, norm.eps = a.eps, norm.dtype = a.dtype, norm.weight_dtype = DType::f32;
  norm.x = x, norm.weight = a.norm, norm.y = a.hidden;
  rms_norm_fwd(norm, inner);
  if (!a.head) return;
  linear_fwd(buffers.head(a), inner);
  const T* rounded = (const T*)buffers.rounded;
  for_lanes(a.rows * a.entries, [&](int64_t i, int n) { store_lanes(a.logits + i, load_lanes(rounded + i, n), n); });
}

static void check_args(const DecodeStepArgs& a) {
  const char* op = "decode_step";
  check(a.rows >= 0, op, "rows must be >= 0", a.rows);
  check(a.width > 0, op, "width must be > 0", a.width);
  check(!a.head || (a.norm && a.entries > 0), op, "a head must have entries, and a norm before it; entries", a.entries);
  for (int64_t row = 0; a.ids && row < a.rows; row++)
    check(a.ids[row] >= 0 && a.ids[row] < a.entries, op, "ids must be rows of the table", a.ids[row]);
  for (int64_t n = 0; a.lengths && n < a.count; n++) {
    if (a.layers[n].kind != LayerKind::attention) continue;
    const AttentionDecodeArgs& d = a.layers[n].attention.decode;
    for (int64_t row = 0; row < a.rows; row++) {
      check(a.lengths[row] >= 0 && a.lengths[row] < a.max_blocks * d.block_size, op, "lengths must lie in the blocks", a.lengths[row]);
      for (int64_t i = 0; i <= a.lengths[row] / d.block_size; i++) {
        const int32_t block = a.block_table[row * a.max_blocks + i];
        check(block >= 0 && block < a.blocks, op, "block_table must name blocks of the cache", block);
      }
    }
  }
}

template <class T>
static void check_layer(const DecodeStepArgs& a, const LayerStepArgs& layer) {
  const auto same = [&](int64_t width, DType dtype) {
    check(width == a.width, "decode_step", "layers must have the width of x, one has", width);
    check(dtype == a.dtype, "decode_step", "layers must have the dtype of x, one has", int64_t(dtype));
  };
  const auto matrix = [&](const void* packed, int64_t k, int64_t columns) { check_packed<T>("linear", packed, 1, k, columns); };
  if (layer.kind == LayerKind::mamba) {
    const MambaStepArgs& m = layer.mamba;
    same(m.width, m.dtype);
    check(m.head_dim > 0 && m.state_dim > 0, "mamba_step", "head_dim and state_dim must be > 0, head_dim", m.head_dim);
    check(m.groups > 0 && m.heads % m.groups == 0, "mamba_step", "groups must divide the heads", m.groups);
    const int64_t inner = m.heads * m.head_dim;
    matrix(m.in_proj, a.width, 2 * inner + 2 * m.groups * m.state_dim + m.heads);
    matrix(m.out_proj, inner, a.width);
  } else if (layer.kind == LayerKind::experts) {
    const MoeStepArgs& m = layer.experts;
    same(m.width, m.dtype);
    check_packed<float>("linear", m.router, 1, a.width, m.experts);
    check_packed<T>("moe_mlp", m.up, m.experts, a.width, m.expert_width);
    check_packed<T>("moe_mlp", m.down, m.experts, m.expert_width, a.width);
    matrix(m.shared_up, a.width, m.shared_width);
    matrix(m.shared_down, m.shared_width, a.width);
  } else {
    const AttentionDecodeArgs& d = layer.attention.decode;
    same(layer.attention.width, d.dtype);
    matrix(layer.attention.q_proj, a.width, d.heads * d.head_dim);
    matrix(layer.attention.k_proj, a.width, d.kv_heads * d.head_dim);
    matrix(layer.attention.v_proj, a.width, d.kv_heads * d.head_dim);
    matrix(layer.attention.o_proj, d.heads * d.head_dim, a.width);
  }
}

template <class T>
static void one_row(const DecodeStepArgs& a, const Exec& exec) {
  for (int64_t n = 0; n < a.count; n++) check_layer<T>(a, a.layers[n]);
  if (a.head) check_packed<T>("linear", a.head, 1, a.width, a.entries);
  const Plan<T> plan(a, most_threads(), exec.workspace);
  *plan.arrived() = 0;
#pragma omp parallel num_threads(int(std::min<int64_t>(exec.threads, plan.threads)))
  {
    Member team{plan.arrived(), worker(), workers()};
    const Own<T> own = plan.own(a, team.id);
    Walk<T>{a, team, own}.run(plan);
  }
}

}  // namespace

int64_t decode_step_workspace(const DecodeStepArgs& a) {
  check_args(a);
  if (a.rows == 1) return a.dtype == DType::f32 ? Plan<float>(a, most_threads(), nullptr).bytes : Plan<bf16>(a, most_threads(), nullptr).bytes;
  Workspace counted{nullptr};
  Rows buffers(a, counted);
  return counted.bytes;
}
void decode_step(const DecodeStepArgs& a, const Exec& exec) {
  check(exec.bytes_workspace >= decode_step_workspace(a), "decode_step", "workspace is too small", exec.bytes_workspace);
  if (a.rows == 1) return a.dtype == DType::f32 ? one_row<float>(a, exec) : one_row<bf16>(a, exec);
  a.dtype == DType::f32 ? rows<float>(a, exec) : rows<bf16>(a, exec);
}

}  // namespace hebatron::HEBATRON_ISA_NAMESPACE
