// What      h_t = exp(dt_t A) h_t-1 + dt_t x_t B_t^T, y_t = h_t C_t + D x_t over packed sequences, as products over chunks.
// Grid      one task per (sequence, group, part of its heads), which walks the chunks in order: C B^T once, then for each
//           head y = decay (C h) + (C B^T o decay) (dt x) and h = decay h + B^T (decay dt x) from register tiles.
// Traffic   x, B, C, dt read and y written once; at 64 x 64 heads, 8 groups, state 128 a group's states (256 KB, fp32, and
//           128 KB of bf16) and a chunk's operands stay in L2.
// Roofline  compute: per token and head 2 P S for each of two products, P chunk for the third; vdpbf16ps, fp32 FMA elsewhere.
// Measured  2026-11-28, Zen 4, 2 threads, 64 x 64 heads, 8 groups, state 128, 4,096 tokens: bf16 40.8 ms, 53 % of peak, 14.6x
//           the torch form (in nine documents 17.6x); fp32 55 %, 7.4x. bench/bench_ssd.py.
// Limits    fp32, or bf16 with bf16 factors, fp32 sums and fp32 carried state; any head_dim, state and heads per group;
//           chunks of at most 64 tokens; int64 offsets.
// Why so    the heads of a group are one task because they share C B^T and the packed B and C; they are split only where
//           there are fewer groups than threads, and no sum crosses the split.
#include "cpu/ssd_chunk.h"

namespace hebatron::HEBATRON_ISA_NAMESPACE {
namespace {

// Heads of one group in a task: enough parts that the longest sequence does not keep one thread busy alone.
static int64_t head_parts(const SsdScanArgs& a) {
  int64_t longest = 0;
  for (int64_t q = 0; q < a.sequences; q++) longest = std::max<int64_t>(longest, a.cu_seqlens[q + 1] - a.cu_seqlens[q]);
  const int64_t even_share = std::max<int64_t>(1, a.tokens * a.groups);
  return std::clamp<int64_t>((longest * a.workers + even_share - 1) / even_share, 1, a.heads / a.groups);
}

template <class T>
struct Scratch {
  int64_t state_panel, packed_panel;  // elements of one panel of a head's state, fp32 and as an operand
  T *C_rows, *B_columns, *B_steps, *weights, *x_steps, *x_to_end, *packed;
  float *scores, *decays, *rows, *state;
  int64_t bytes;

  Scratch(const SsdScanArgs& a, char* base) {
    const int64_t heads = a.heads / a.groups, panels_S = panels_of(a.state_dim), panels_P = panels_of(a.head_dim);
    const int64_t steps = panel_elements<T>(kChunk);
    state_panel = units_of<T>(a.state_dim) * kUnit<T> * kTileColumns;
    packed_panel = panel_elements<T>(a.state_dim);
    Carver carve{base};
    C_rows = carve.take<T>(kChunk * panels_S * kTileColumns);
    B_columns = carve.take<T>(panels_of(kChunk) * packed_panel);
    B_steps = carve.take<T>(panels_S * steps);
    weights = carve.take<T>(kDecayBlock * kChunk);
    x_steps = carve.take<T>(panels_P * steps);
    x_to_end = carve.take<T>(panels_P * steps);
    scores = carve.take<float>(kChunk * kChunk);
    decays = carve.take<float>(kChunk * kChunk);
    rows = carve.take<float>(kDecayBlock * kTileColumns);
    state = carve.take<float>(heads * panels_P * state_panel);
    packed = kUnit<T> == 1 ? (T*)state : carve.take<T>(heads * panels_P * packed_panel);
    bytes = carve.bytes;
  }
};

// The state is held as S x P in panels of kTileColumns columns, transposed: the operand of C h.
template <class T>
static void enter(const SsdScanArgs& a, const Scratch<T>& w, const float* initial, int64_t slot) {
  for (int64_t panel = 0; panel < panels_of(a.head_dim); panel++) {
    const int64_t index = slot * panels_of(a.head_dim) + panel, first = panel * kTileColumns;
    float* state = w.state + index * w.state_panel;
    std::memset(state, 0, size_t(w.state_panel) * sizeof(float));
    if (initial)
      pack_columns<float>(state, initial + first * a.state_dim, a.state_dim, a.state_dim,
                          std::min<int64_t>(kTileColumns, a.head_dim - first));
    pack_state(w.packed + index * w.packed_panel, state, w.state_panel);
  }
}

template <class T>
static void leave(const SsdScanArgs& a, const Scratch<T>& w, float* last, int64_t slot) {
  for (int64_t p = 0; p < a.head_dim; p += kLanes)
    for (int64_t s = 0; s < a.state_dim; s += kLanes) {
      const float* from = w.state + (slot * panels_of(a.head_dim) + p / kTileColumns) * w.state_panel + p % kTileColumns;
      Units block[kLanes];
      for (int64_t i = 0; i < kLanes; i++) block[i] = s + i < a.state_dim ? load_units(from + (s + i) * kTileColumns) : set1_units(0);
      transpose(block);
      for (int64_t i = 0; i < std::min<int64_t>(kLanes, a.head_dim - p); i++)
        store_lanes(last + (p + i) * a.state_dim + s, as_float(block[i]), int(std::min<int64_t>(kLanes, a.state_dim - s)));
    }
}

// y of the rows b .. b + count of the chunk that begins at token `begin`.
template <class T>
static void outputs(const SsdScanArgs& a, const Scratch<T>& w, const Steps& steps, int64_t head, int64_t slot, int64_t begin,
                    int64_t b, int64_t count) {
  for (int64_t i = b; i < b + count; i++)
    for (int64_t j = 0; j < b + kDecayBlock; j += kLanes)
      store(w.weights + (i - b) * kChunk + j, load(w.scores + i * kChunk + j) * load(w.decays + i * kChunk + j));
  for (int64_t p = 0; p < a.head_dim; p += kTileColumns) {
    const int64_t panel = p / kTileColumns;
    const T* state = w.packed + (slot * panels_of(a.head_dim) + panel) * w.packed_panel;
    const T* x_steps = w.x_steps + panel * panel_elements<T>(kChunk);
    multiply(w.rows, kTileColumns, count, 0.0f, along_rows(w.C_rows, b, a.state_dim, state), steps.from_start + b,
             Factors<T>{w.weights, kChunk, kUnit<T>, x_steps, units_of<T>(b + count)});
    for (int64_t i = 0; i < count; i++) {
      const T* x = (const T*)a.x + (begin + b + i) * a.x_stride + head * a.head_dim + p;
      T* y = (T*)a.y + ((begin + b + i) * a.heads + head) * a.head_dim + p;
      for_lanes(std::min<int64_t>(kTileColumns, a.head_dim - p), [&](int64_t column, int n) {
        const Vec sum = load(w.rows + i * kTileColumns + column);
        store_lanes(y + column, a.D ? fma(set1(a.D[head]), load_lanes(x + column, n), sum) : sum, n);
      });
    }
  }
}

template <class T>
static void update_state(const SsdScanArgs& a, const Scratch<T>& w, float total, int64_t slot, int64_t n) {
  const int64_t rows = w.state_panel / kTileColumns, steps = panel_elements<T>(kChunk);
  for (int64_t panel = 0; panel < panels_of(a.head_dim); panel++) {
    const int64_t index = slot * panels_of(a.head_dim) + panel;
    float* state = w.state + index * w.state_panel;
    for (int64_t s = 0; s < rows; s += kTileColumns)
      multiply(state + s * kTileColumns, kTileColumns, std::min<int64_t>(kTileColumns, rows - s), total,
               over_tokens(w.B_steps + s / kTileColumns * steps, 0, w.x_to_end + panel * steps, n));
    pack_state(w.packed + index * w.packed_panel, state, w.state_panel);
  }
}

template <class T>
static void chunk(const SsdScanArgs& a, const Scratch<T>& w, int64_t group, int64_t first, int64_t heads, int64_t begin, int64_t n,
                  int64_t after) {  // tokens of the next chunk
  const T* B = (const T*)a.B + begin * a.B_stride + group * a.state_dim;
  const T* C = (const T*)a.C + begin * a.C_stride + group * a.state_dim;
  copy_rows(w.C_rows, C, a.C_stride, n, a.state_dim);
  pack_transposed(w.B_columns, B, a.B_stride, n, a.state_dim);
  pack_steps(w.B_steps, B, a.B_stride, n, a.state_dim);
  lower_scores(w.scores, w.C_rows, w.B_columns, n, a.state_dim);
  for (int64_t slot = 0; slot < heads; slot++) {
    const int64_t head = first + slot;
    const Steps steps(a, head, begin, n);
    const T* x = (const T*)a.x + begin * a.x_stride + head * a.head_dim;
    steps.decay_matrix(n, w.decays);
    pack_scaled(w.x_steps, steps.dt, w.x_to_end, steps.dt_to_end, x, a.x_stride, n, a.head_dim);
    if (slot + 1 < heads)
      prefetch_rows(x + a.head_dim, a.x_stride, n, a.head_dim);
    else
      prefetch_rows(x + n * a.x_stride - slot * a.head_dim, a.x_stride, after, a.head_dim);
    for (int64_t b = 0; b < n; b += kDecayBlock) outputs(a, w, steps, head, slot, begin, b, std::min(kDecayBlock, n - b));
    update_state(a, w, steps.total, slot, n);
  }
}

template <class T>
static void forward(const SsdScanArgs& a, const Exec& exec) {
  const int64_t parts = head_parts(a), group_heads = a.heads / a.groups, bytes = Scratch<T>(a, nullptr).bytes;
  const int64_t state_size = a.head_dim * a.state_dim;
#pragma omp parallel num_threads(int(std::min<int64_t>(exec.threads, a.workers)))
  {
    const Scratch<T> w(a, (char*)exec.workspace + this_worker() * bytes);
#pragma omp for schedule(dynamic, 1)
    for (int64_t task = 0; task < a.sequences * a.groups * parts; task++) {
      const int64_t q = task / (a.groups * parts), group = task / parts % a.groups, part = task % parts;
      const int64_t first = group * group_heads + group_heads * part / parts;
      const int64_t heads = group * group_heads + group_heads * (part + 1) / parts - first;
      for (int64_t slot = 0; slot < heads; slot++)
        enter(a, w, a.initial ? a.initial + (q * a.heads + first + slot) * state_size : nullptr, slot);
      for (int64_t t = a.cu_seqlens[q], left = a.cu_seqlens[q + 1] - t; left > 0; t += a.chunk, left -= a.chunk)
        chunk(a, w, group, first, heads, t, std::min(a.chunk, left), std::clamp<int64_t>(left - a.chunk, 0, a.chunk));
      for (int64_t slot = 0; slot < heads; slot++) leave(a, w, a.last + (q * a.heads + first + slot) * state_size, slot);
    }
  }
}

}  // namespace

int64_t ssd_scan_fwd_workspace(const SsdScanArgs& a) {
  check_scan(a);
  return a.workers * (a.dtype == DType::f32 ? Scratch<float>(a, nullptr).bytes : Scratch<bf16>(a, nullptr).bytes);
}

void ssd_scan_fwd(const SsdScanArgs& a, const Exec& exec) {
  check(exec.bytes_workspace >= ssd_scan_fwd_workspace(a), "ssd_scan", "workspace is too small", exec.bytes_workspace);
  a.dtype == DType::f32 ? forward<float>(a, exec) : forward<bf16>(a, exec);
}

}  // namespace hebatron::HEBATRON_ISA_NAMESPACE
