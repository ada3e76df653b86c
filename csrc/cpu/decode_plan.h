// What decode_step works on: packed matrices by panels, and the buffers of a token, shared and each thread's own.
#pragma once
#include "cpu/gemm.h"
#include "cpu/team.h"

namespace hebatron::HEBATRON_ISA_NAMESPACE {

HEBATRON_CPU_OPS(HEBATRON_DECLARE)

namespace {

static const void* row_of(const DecodeStepArgs& a, int64_t row) {
  const int64_t bytes = a.width * (a.dtype == DType::f32 ? 4 : 2);
  return a.ids ? (const char*)a.table + a.ids[row] * bytes : (const char*)a.x + row * bytes;
}

template <class T>
constexpr DType kDType = std::is_same_v<T, float> ? DType::f32 : DType::bf16;

// Packed weights, one matrix an expert, and the tasks of a row times some of them: (slot, panel), slot by slot.
template <class T>
struct Panels {
  Weights weights;
  int64_t panels;
  Panels(const void* packed, int64_t k, int64_t columns) : weights{kDType<T>, packed, 0, 0, k, columns, true, true}, panels(panels_of(columns)) {}

  Span from(int64_t expert, int64_t panel) const {  // to the end of the expert's weights
    const T* at = panel_of<T>(weights, expert, panel, nullptr);
    const T* end = panel_of<T>(weights, expert, 0, nullptr) + packed_stride<T>(weights.k, weights.columns);
    return {(const char*)at, (end - at) * int64_t(sizeof(T))};
  }
  // finish(first column, columns, sums) of a row times one panel.
  template <class Finish>
  void row(const T* x, int64_t expert, int64_t panel, const Finish& finish) const {
    const int64_t column = panel * kTileColumns, columns = std::min<int64_t>(kTileColumns, weights.columns - column);
    product<T>(0, 1, [&](int64_t) { return x; }, weights.k, panel_of<T>(weights, expert, panel, nullptr), columns, Ahead{},
               [&](int64_t, int, const float* sums) { finish(column, columns, sums); });
  }
};

// An attention layer of `rows` sequences with what all of them share.
static AttentionStepArgs attention_of(const DecodeStepArgs& a, const LayerStepArgs& layer, int64_t workers) {
  AttentionStepArgs m = layer.attention;
  AttentionDecodeArgs& d = m.decode;
  d.sequences = a.rows, d.workers = workers;
  if (a.lengths) d.lengths = a.lengths, d.block_table = a.block_table, d.max_blocks = a.max_blocks, d.window = d.max_blocks * d.block_size + 1;
  return m;
}

// The buffers that the threads share. A layer's results are read at the beginning of the next one, by then of other threads'
// writing: layers take turns between two halves.
template <class T>
struct Shared {
  T *wide, *convolved, *scanned, *gated;        // Mamba
  float* dt;
  float* logits;                                // experts
  T *hidden, *active, *rows, *shared;
  T *q, *k, *v, *o;                             // attention
  char* attention;
  T* out;                                       // width

  Shared(Workspace& w, const DecodeStepArgs& args, const LayerStepArgs& layer, int64_t threads) {
    const int64_t width = args.width;
    if (layer.kind == LayerKind::mamba) {
      const MambaStepArgs& a = layer.mamba;
      const int64_t inner = a.heads * a.head_dim, channels = inner + 2 * a.groups * a.state_dim;
      wide = w.take<T>(inner + channels + a.heads);
      convolved = w.take<T>(channels);
      scanned = w.take<T>(inner);
      gated = w.take<T>(inner);
      dt = w.take<float>(a.heads);
    } else if (layer.kind == LayerKind::experts) {
      const MoeStepArgs& a = layer.experts;
      logits = w.take<float>(a.experts);
      hidden = w.take<T>(a.shared_width);
      active = w.take<T>(a.top_k * a.expert_width);
      rows = w.take<T>(a.top_k * width);
      shared = w.take<T>(width);
    } else {
      const AttentionDecodeArgs d = attention_of(args, layer, threads).decode;
      q = w.take<T>(d.heads * d.head_dim);
      k = w.take<T>(d.kv_heads * d.head_dim);
      v = w.take<T>(d.kv_heads * d.head_dim);
      o = w.take<T>(d.heads * d.head_dim);
      attention = w.take<char>(attention_decode_workspace(d));
    }
    out = w.take<T>(width);
  }
};

static MoeRouteArgs route_args(const MoeStepArgs& a) {
  MoeRouteArgs r{};
  r.tokens = 1, r.experts = a.experts, r.top_k = a.top_k, r.groups = a.groups, r.kept_groups = a.kept_groups, r.workers = 1;
  r.normalize = a.normalize, r.scale = a.scale, r.dtype = DType::f32, r.logits_stride = a.experts, r.bias = a.bias;
  return r;
}

// What one thread has for itself.
template <class T>
struct Own {
  T *x, *normed, *routed;  // width
  float* wide;             // width
  float* weights;          // top_k
  int64_t *ids, *counts;   // top_k, experts
  char* route;

  Own(Workspace& w, const DecodeStepArgs& a) {
    int64_t experts = 0, top_k = 0, route_bytes = 0;
    for (int64_t n = 0; n < a.count; n++) {
      if (a.layers[n].kind != LayerKind::experts) continue;
      const MoeStepArgs& layer = a.layers[n].experts;
      experts = std::max(experts, layer.experts), top_k = std::max(top_k, layer.top_k);
      route_bytes = std::max(route_bytes, moe_route_fwd_workspace(route_args(layer)));
    }
    x = w.take<T>(a.width);
    normed = w.take<T>(a.width);
    routed = w.take<T>(a.width);
    wide = w.take<float>(a.width);
    weights = w.take<float>(top_k);
    ids = w.take<int64_t>(top_k);
    counts = w.take<int64_t>(experts);
    route = w.take<char>(route_bytes);
  }
};

template <class T>
struct Plan {
  int64_t threads, bytes_own = 0, bytes_half = 0, bytes;
  char* base;

  Plan(const DecodeStepArgs& a, int64_t threads, void* workspace) : threads(threads), base((char*)workspace) {
    Workspace own{nullptr};
    Own<T>(own, a);
    bytes_own = own.bytes;
    for (int64_t n = 0; n < a.count; n++) {
      Workspace half{nullptr};
      Shared<T>(half, a, a.layers[n], threads);
      bytes_half = std::max(bytes_half, half.bytes);
    }
    bytes = 64 + 2 * bytes_half + threads * bytes_own;
  }
  int64_t* arrived() const { return (int64_t*)base; }
  Shared<T> shared(const DecodeStepArgs& a, int64_t layer) const {
    Workspace half{base + 64 + layer % 2 * bytes_half};
    return Shared<T>(half, a, a.layers[layer], threads);
  }
  Own<T> own(const DecodeStepArgs& a, int64_t id) const {
    Workspace mine{base + 64 + 2 * bytes_half + id * bytes_own};
    return Own<T>(mine, a);
  }
};

}  // namespace
}  // namespace hebatron::HEBATRON_ISA_NAMESPACE
