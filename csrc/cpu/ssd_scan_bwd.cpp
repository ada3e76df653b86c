// What      gradients of ssd_scan: to x, dt, A, B, C, D, dt_bias and the initial states, from those of y and the last states.
// Grid      one task per (sequence, group, part of its heads). It walks the chunks forward for the states that enter them,
//           then backward with the gradient of the state; every product is register tiles over one chunk.
// Traffic   x, B, C, dt, grad_y read and their gradients written once; the entering states of 64 chunks at a time are
//           computed again and kept (8 heads of 64 x 128: 8 MB in bf16, 16 in fp32), for longer sequences once more.
// Roofline  compute: per token and head 2 P S for each of five products and 2 P chunk for two; vdpbf16ps, fp32 FMA elsewhere.
// Measured  2026-11-28, Zen 4, 2 threads, 64 x 64 heads, 8 groups, state 128, 4,096 tokens: bf16 108.7 ms, 50 % of peak, 10.0x
//           the torch form's autograd; fp32 43 %, 4.8x. bench/bench_ssd.py.
// Limits    as the forward; gradients of B and C are summed over the heads of a group in fp32, before they are rounded.
// Why so    the state is held as P x S here, so that grad_C = grad_y h and grad_B = x grad_h need no transposed copy. The
//           gradient of a log decay is a sum over the pairs of tokens that it stands between, which nothing cancels; the
//           difference of row sums and column sums would lose it behind one large step. Tasks do not depend on the number
//           of threads, nor does any sum.
#include "cpu/ssd_states.h"

namespace hebatron::HEBATRON_ISA_NAMESPACE {
namespace {

// What the parts of one head's backward leave for the gradients of its steps, by token.
struct StepGrads {
  alignas(64) float read[kChunk] = {};    // grad_y times what was read of the entering state
  alignas(64) float kept[kChunk] = {};    // gradient of the leaving state times what the token added to it
  double within[kChunk] = {};             // of the log decay, from the pairs of tokens that it stands between
  alignas(64) float direct[kChunk] = {};  // of dt as the factor of x
  float carried, D = 0.0f;                // of the total decay; of D
};

// sums[i] += scale[i] rows_i . state, and dots[i] = what was added times factors_i: grad_C and grad_B through the state.
template <class T>
static void through_state(const SsdScanArgs& a, const Scratch<T>& w, float* sums, const T* rows, const T* packed, const float* scale,
                          const T* factors, float* dots, int64_t n) {
  for (int64_t s = 0; s < panels_of(a.state_dim); s++, packed += w.panel) {
    multiply(w.rows, kTileColumns, n, 0.0f, along_rows(rows, 0, a.head_dim, packed));
    for (int64_t i = 0; i < n; i++) {
      const int64_t at = i * w.width_S + s * kTileColumns;
      Vec dot = set1(0.0f);
      for (int64_t j = 0; j < kTileColumns; j += kLanes) {
        const Vec added = set1(scale[i]) * load(w.rows + i * kTileColumns + j);
        store(sums + at + j, load(sums + at + j) + added);
        dot = fma(added, load(factors + at + j), dot);
      }
      dots[i] += sum(dot);
    }
  }
}

// Panels over j of squares[i][j] (times factors[i][j]), the steps of k over i; only j <= i is ever read.
template <class T>
static void pack_square(const Scratch<T>& w, const float* squares, const float* factors, int64_t n) {
  const auto row = [&](int64_t i, int64_t j) {
    if (i >= n) return set1(0.0f);
    const Vec v = load(squares + i * kChunk + j);
    return factors ? v * load(factors + i * kChunk + j) : v;
  };
  for (int64_t j = 0; j < n; j += kLanes)
    for (int64_t i = j / kTileColumns * kTileColumns; i < n; i += kUnit<T>)
      store_step(w.weights + j / kTileColumns * w.steps + (i / kUnit<T> * kTileColumns + j % kTileColumns) * kUnit<T>, row(i, j),
                 row(i + 1, j));
}

template <class T>
static void prepare(const SsdScanBwdArgs& b, const Scratch<T>& w, const Chunk& c, const Steps& steps, int64_t slot) {
  const SsdScanArgs& a = b.forward;
  const int64_t head = c.first + slot, dy_stride = a.heads * a.head_dim;
  const T* x = (const T*)a.x + c.begin * a.x_stride + head * a.head_dim;
  const T* dy = (const T*)b.grad_y + c.begin * dy_stride + head * a.head_dim;
  const float* grad_state = w.grad_state + slot * w.head_state;
  steps.decay_matrix(c.n, w.decays);
  pack_square(w, w.scores, w.decays, c.n);
  copy_rows(w.x_rows, x, a.x_stride, c.n, a.head_dim);
  copy_rows(w.dy_rows, dy, dy_stride, c.n, a.head_dim);
  if (slot + 1 < c.heads) {
    prefetch_rows(x + a.head_dim, a.x_stride, c.n, a.head_dim);
    prefetch_rows(dy + a.head_dim, dy_stride, c.n, a.head_dim);
  }
  pack_transposed(w.x_columns, w.x_rows, w.width_P, c.n, a.head_dim);
  pack_scaled<T>(w.dy_steps, nullptr, w.dy_from_start, steps.from_start, w.dy_rows, w.width_P, c.n, a.head_dim);
  pack_state(w.grad_packed, grad_state, w.head_state);
  for (int64_t p = 0; p < a.head_dim; p += kTileColumns)
    for (int64_t s = 0; s < a.state_dim; s += kTileColumns)
      pack_columns<T>(w.grad_columns + p / kTileColumns * panel_elements<T>(a.state_dim) + s * kTileColumns,
                      grad_state + s / kTileColumns * w.panel + p * kTileColumns, kTileColumns,
                      std::min<int64_t>(kTileColumns, a.state_dim - s), std::min<int64_t>(kTileColumns, a.head_dim - p));
}

// grad_x = dt (to_end B grad_h + weights^T grad_y) + D grad_y.
template <class T>
static void input_grads(const SsdScanBwdArgs& b, const Scratch<T>& w, const Chunk& c, const Steps& steps, int64_t head, StepGrads& g) {
  const SsdScanArgs& a = b.forward;
  const Vec direct = set1(a.D ? a.D[head] : 0.0f);
  Vec grad_D = set1(0.0f);
  for (int64_t p = 0; p < a.head_dim; p += kTileColumns) {
    const int64_t panel = p / kTileColumns;
    for (int64_t t = 0; t < c.n; t += kDecayBlock)  // later tokens alone have weights
      multiply(w.rows + t * kTileColumns, kTileColumns, std::min(kDecayBlock, c.n - t), 0.0f,
               along_rows(w.B_rows, t, a.state_dim, w.grad_columns + panel * panel_elements<T>(a.state_dim)), steps.to_end + t,
               over_tokens(w.weights + t / kTileColumns * w.steps, t % kTileColumns, w.dy_steps + panel * w.steps, c.n, t));
    for (int64_t t = 0; t < c.n; t++) {
      Vec dot = set1(0.0f);
      T* grad_x = (T*)b.grad_x + ((c.begin + t) * a.heads + head) * a.head_dim + p;
      for_lanes(std::min<int64_t>(kTileColumns, a.head_dim - p), [&](int64_t column, int n) {
        const int64_t at = t * w.width_P + p + column;  // zeros behind the last column
        const Vec x = load(w.x_rows + at), dy = load(w.dy_rows + at), v = load(w.rows + t * kTileColumns + column);
        dot = fma(x, v, dot);
        grad_D = fma(x, dy, grad_D);
        store_lanes(grad_x + column, fma(direct, dy, set1(steps.dt[t]) * v), n);
      });
      g.direct[t] += sum(dot);
    }
  }
  g.D = sum(grad_D);
}

// The gradient of the weights, grad_y (dt x)^T: its part of grad_scores, and that of the log decays.
template <class T>
static void weight_grads(const SsdScanArgs& a, const Scratch<T>& w, const Steps& steps, int64_t n, StepGrads& g) {
  for (int64_t begin = 0; begin < n; begin += kTileColumns) {
    multiply(w.rows, kTileColumns, n - begin, 0.0f, along_rows(w.dy_rows, begin, a.head_dim, w.x_columns + begin / kTileColumns * w.panel));
    for (int64_t i = begin; i < n; i++)
      for (int64_t j = begin; j <= i && j < begin + kTileColumns; j += kLanes) {
        const int64_t at = i * kChunk + j;
        const Vec decayed = load(w.rows + (i - begin) * kTileColumns + j - begin) * load(steps.dt + j) * load(w.decays + at);
        store(w.grad_scores + at, load(w.grad_scores + at) + decayed);
        store(w.decays + at, decayed * load(w.scores + at));
      }
  }
  alignas(64) double below[kChunk] = {};  // by column, the sum of the rows from i on; torch sums these in fp64 as well
  for (int64_t i = n - 1; i >= 0; i--) {
    double lanes[8] = {};
    const float* row = w.decays + i * kChunk;
    for (int64_t j = 0; j <= i; j++) below[j] += double(row[j]);
    for (int64_t j = 0; j + 8 <= i; j += 8)
      for (int64_t lane = 0; lane < 8; lane++) lanes[lane] += below[j + lane];
    for (int64_t j = i / 8 * 8; j < i; j++) lanes[0] += below[j];
    for (double lane : lanes) g.within[i] += lane;
  }
}

// From the parts to grad_dt, and to this chunk's part of the gradients of A, D and dt_bias in sums.
static void step_grads(const SsdScanBwdArgs& b, const Chunk& c, const Steps& steps, int64_t head, const StepGrads& g, double* sums) {
  const SsdScanArgs& a = b.forward;
  double read[kChunk], kept = 0.0;
  alignas(64) float slope[kChunk];
  for (int64_t t = 0; t < c.n; t += kLanes) store(slope + t, sigmoid(load(steps.raw + t)));
  for (int64_t t = c.n - 1; t >= 0; t--) read[t] = double(g.read[t]) + (t + 1 < c.n ? read[t + 1] : 0.0);
  for (int64_t t = 0; t < c.n; t++) {
    const double log_decay = g.within[t] + read[t] + kept + double(g.carried);
    kept += double(g.kept[t]);
    const bool open = steps.open[t] >= float(a.dt_min) && steps.open[t] <= float(a.dt_max);
    const double grad = open ? (double(g.direct[t]) + log_decay * double(a.A[head])) * double(slope[t]) : 0.0;
    b.grad_dt[(c.begin + t) * a.heads + head] = float(grad);
    sums[0] += log_decay * double(steps.dt[t]);
    sums[2] += grad;
  }
  sums[1] += double(g.D);
}

// Adds what the scores give to grad_B and grad_C and writes both: to the results, or to this part's sums in `partial`.
template <class T>
static void group_grads(const SsdScanBwdArgs& b, const Scratch<T>& w, const Chunk& c, float* partial) {
  const SsdScanArgs& a = b.forward;
  const int64_t width = a.groups * a.state_dim;
  for (int64_t i = 0; i < c.n * kChunk; i += kLanes) store(w.score_rows + i, load(w.grad_scores + i));
  pack_square(w, w.grad_scores, nullptr, c.n);
  for (int64_t s = 0; s < a.state_dim; s += kTileColumns)
    for (int64_t t = 0; t < c.n; t += kDecayBlock) {
      const T *B_panel = w.B_steps + s / kTileColumns * w.steps, *C_panel = w.C_steps + s / kTileColumns * w.steps;
      const int64_t at = t * w.width_S + s, rows = std::min(kDecayBlock, c.n - t);
      multiply(w.grad_C + at, w.width_S, rows, 1.0f, Factors<T>{w.score_rows + t * kChunk, kChunk, kUnit<T>, B_panel, units_of<T>(t + rows)});
      multiply(w.grad_B + at, w.width_S, rows, 1.0f,
               over_tokens(w.weights + t / kTileColumns * w.steps, t % kTileColumns, C_panel, c.n, t));
    }
  for (int is_C = 0; is_C < 2; is_C++)
    for (int64_t t = 0; t < c.n; t++) {
      const float* sums = (is_C ? w.grad_C : w.grad_B) + t * w.width_S;
      const int64_t at = (c.begin + t) * width + c.group * a.state_dim;
      for_lanes(a.state_dim, [&](int64_t s, int n) {
        if (partial)
          store_lanes(partial + (c.part * 2 + is_C) * a.tokens * width + at + s, load(sums + s), n);
        else
          store_lanes((T*)(is_C ? b.grad_C : b.grad_B) + at + s, load(sums + s), n);
      });
    }
}

template <class T>
static void backward_chunk(const SsdScanBwdArgs& b, const Scratch<T>& w, const Chunk& c, const T* entering, double* sums, float* partial) {
  const SsdScanArgs& a = b.forward;
  const T* B = (const T*)a.B + c.begin * a.B_stride + c.group * a.state_dim;
  const T* C = (const T*)a.C + c.begin * a.C_stride + c.group * a.state_dim;
  copy_rows(w.B_rows, B, a.B_stride, c.n, a.state_dim);
  copy_rows(w.C_rows, C, a.C_stride, c.n, a.state_dim);
  pack_transposed(w.B_columns, B, a.B_stride, c.n, a.state_dim);
  pack_steps(w.B_steps, B, a.B_stride, c.n, a.state_dim);
  pack_steps(w.C_steps, C, a.C_stride, c.n, a.state_dim);
  lower_scores(w.scores, w.C_rows, w.B_columns, c.n, a.state_dim);
  std::memset(w.grad_scores, 0, size_t(c.n * kChunk) * sizeof(float));
  for (float* grads : {w.grad_B, w.grad_C}) std::memset(grads, 0, size_t(c.n * w.width_S) * sizeof(float));
  for (int64_t slot = 0; slot < c.heads; slot++, entering += w.head_state) {
    const int64_t head = c.first + slot;
    const Steps steps(a, head, c.begin, c.n);
    float* grad_state = w.grad_state + slot * w.head_state;
    StepGrads g;
    prepare(b, w, c, steps, slot);
    g.carried = steps.total * dot_with_packed(grad_state, entering, w.head_state);
    through_state(a, w, w.grad_C, w.dy_rows, entering, steps.from_start, w.C_rows, g.read, c.n);
    through_state(a, w, w.grad_B, w.x_rows, w.grad_packed, steps.dt_to_end, w.B_rows, g.kept, c.n);
    input_grads(b, w, c, steps, head, g);
    weight_grads(a, w, steps, c.n, g);
    step_grads(b, c, steps, head, g, sums + slot * 3);
    update_state(a, w, grad_state, steps.total, w.dy_from_start, w.C_steps, c.n);
  }
  group_grads(b, w, c, partial);
}

template <class T>
static void backward_sequence(const SsdScanBwdArgs& b, const Scratch<T>& w, Chunk c, int64_t q, double* sums, float* partial) {
  const SsdScanArgs& a = b.forward;
  const int64_t first_token = a.cu_seqlens[q], tokens = a.cu_seqlens[q + 1] - first_token;
  const int64_t chunks = (tokens + a.chunk - 1) / a.chunk, segments = (chunks + kSegment - 1) / kSegment;
  const int64_t states = c.heads * w.head_state, offset = (q * a.heads + c.first) * a.head_dim * a.state_dim;
  const auto chunk = [&](int64_t k) {
    c.begin = first_token + k * a.chunk, c.n = std::min(a.chunk, tokens - k * a.chunk);
    return c;
  };
  for (int64_t slot = 0; slot < c.heads; slot++) {
    const int64_t at = offset + slot * a.head_dim * a.state_dim;
    load_state(a, w, w.state + slot * w.head_state, a.initial ? a.initial + at : nullptr);
    load_state(a, w, w.grad_state + slot * w.head_state, b.grad_last + at);
  }
  for (int64_t segment = 0; segment < segments; segment++) {
    std::memcpy(w.bounds + segment * states, w.state, size_t(states) * sizeof(float));
    for (int64_t k = segment * kSegment; segment + 1 < segments && k < (segment + 1) * kSegment; k++) advance_states(a, w, chunk(k));
  }
  for (int64_t segment = segments - 1; segment >= 0; segment--) {
    const int64_t begin = segment * kSegment, end = std::min(chunks, begin + kSegment);
    std::memcpy(w.state, w.bounds + segment * states, size_t(states) * sizeof(float));
    for (int64_t k = begin; k < end; k++) {
      pack_state(w.entering + (k - begin) * states, w.state, states);
      if (k + 1 < end) advance_states(a, w, chunk(k));
    }
    for (int64_t k = end - 1; k >= begin; k--) backward_chunk(b, w, chunk(k), w.entering + (k - begin) * states, sums, partial);
  }
  for (int64_t slot = 0; b.grad_initial && slot < c.heads; slot++)
    store_state(a, w, w.grad_state + slot * w.head_state, b.grad_initial + offset + slot * a.head_dim * a.state_dim);
}

// The workspace: the sums of A, D and dt_bias by sequence and head, grad_B and grad_C by part, each worker's scratch.
template <class T>
struct Workspace {
  double* sums;
  float* partial;  // null where a group's heads are one part
  char* scratch;
  int64_t bytes_scratch, bytes;

  Workspace(const SsdScanArgs& a, char* base) {
    Carver carve{base};
    const int64_t parts = head_parts(a);
    sums = carve.take<double>(a.sequences * a.heads * 3);
    partial = parts > 1 ? carve.take<float>(parts * 2 * a.tokens * a.groups * a.state_dim) : nullptr;
    bytes_scratch = Scratch<T>(a, nullptr).bytes;
    scratch = carve.take<char>(a.workers * bytes_scratch);
    bytes = carve.bytes;
  }
};

template <class T>
static void backward(const SsdScanBwdArgs& b, const Exec& exec) {
  const SsdScanArgs& a = b.forward;
  const Workspace<T> workspace(a, (char*)exec.workspace);
  const int64_t parts = head_parts(a), group_heads = a.heads / a.groups, width = a.groups * a.state_dim;
  const int threads = int(std::min<int64_t>(exec.threads, a.workers));
#pragma omp parallel num_threads(threads)
  {
    const Scratch<T> w(a, workspace.scratch + this_worker() * workspace.bytes_scratch);
#pragma omp for schedule(dynamic, 1)
    for (int64_t task = 0; task < a.sequences * a.groups * parts; task++) {
      const int64_t q = task / (a.groups * parts), group = task / parts % a.groups, part = task % parts;
      const int64_t first = group * group_heads + group_heads * part / parts;
      const int64_t heads = group * group_heads + group_heads * (part + 1) / parts - first;
      double* sums = workspace.sums + (q * a.heads + first) * 3;
      std::fill(sums, sums + heads * 3, 0.0);
      backward_sequence(b, w, Chunk{group, part, first, heads, 0, 0}, q, sums, workspace.partial);
    }
    if (workspace.partial)
#pragma omp for schedule(static)
      for (int64_t row = 0; row < 2 * a.tokens; row++) {
        const bool is_C = row >= a.tokens;
        T* to = (T*)(is_C ? b.grad_C : b.grad_B) + (row - is_C * a.tokens) * width;
        for_lanes(width, [&](int64_t i, int n) {
          Vec total = load_lanes(workspace.partial + row * width + i, n);
          for (int64_t part = 1; part < parts; part++)
            total = total + load_lanes(workspace.partial + (part * 2 * a.tokens + row) * width + i, n);
          store_lanes(to + i, total, n);
        });
      }
  }
  for (int64_t head = 0; head < a.heads; head++) {
    double totals[3] = {};
    for (int64_t q = 0; q < a.sequences; q++)
      for (int k = 0; k < 3; k++) totals[k] += workspace.sums[(q * a.heads + head) * 3 + k];
    b.grad_A[head] = float(totals[0]), b.grad_D[head] = float(totals[1]), b.grad_dt_bias[head] = float(totals[2]);
  }
}

}  // namespace

int64_t ssd_scan_bwd_workspace(const SsdScanBwdArgs& b) {
  check_scan(b.forward);
  return b.forward.dtype == DType::f32 ? Workspace<float>(b.forward, nullptr).bytes : Workspace<bf16>(b.forward, nullptr).bytes;
}

void ssd_scan_bwd(const SsdScanBwdArgs& b, const Exec& exec) {
  check(exec.bytes_workspace >= ssd_scan_bwd_workspace(b), "ssd_scan", "workspace is too small", exec.bytes_workspace);
  b.forward.dtype == DType::f32 ? backward<float>(b, exec) : backward<bf16>(b, exec);
}

}  // namespace hebatron::HEBATRON_ISA_NAMESPACE
