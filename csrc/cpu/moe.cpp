// What      y_t = sum_k down[e] (weight relu(up[e] x_t)^2), e = ids[t, k], and its backward.
// Grid      rows sorted by expert, cut into blocks of at most 384; tasks of (block, 64 columns) over the threads, in three
//           passes: up with its epilogue, down, the sum over a token's rows. Backward: two such products, then the
//           gradients of the weights as tasks of (expert, 64 columns).
// Traffic   forward: each chosen expert's weights once, x once a panel (from L2), the activation and the rows of y
//           written and read once. fp32 weights are rounded while they are packed: no bf16 copy of them exists.
// Roofline  compute from about 16 rows an expert on, DRAM below.
// Measured  2026-11-28, 2 threads of a shared Zen 4 machine, as shares of limits measured between the runs (products 433 to
//           462 GFLOP/s, reading 25 to 27 GB/s): packed experts of 2,688 x 1,856 in bf16, 96 rows each 95 % (1.3x the torch
//           form), 24 rows 81 % (1.9x), 6 rows and 1 row as fast as a plain read of the weights (1.9x, 1.7x). 128 experts of
//           768 x 544, fp32 weights: 2,048 tokens forward 74 % (2.6x), with backward 63 % (2.6x); 512 tokens, bound by the
//           weights, 4.2x and 5.1x. python bench/bench_moe.py.
// Limits    fp32 and bf16 (weights also fp32 under bf16); tokens * top_k < 2^31.
// Why so    rows of A are pointers, so nothing is gathered; the weight multiplies the activation, so the second product's
//           rows are only added; a row's chain of additions does not depend on the rows beside it.
#include "cpu/wgrad.h"

namespace hebatron::HEBATRON_ISA_NAMESPACE {
namespace {

// The routed rows in the order of their experts: row r is slot[r] = t * K + k.
struct Routes {
  int64_t *begin, *next;   // experts + 1
  int32_t *slot, *row;     // rows; row[slot[r]] = r
  Block* blocks;
  int64_t count = 0;       // of blocks

  Routes(const MoeMlpArgs& a, Workspace& w) {
    const int64_t rows = a.tokens * a.top_k;
    begin = w.take<int64_t>(a.experts + 1);
    next = w.take<int64_t>(a.experts + 1);
    slot = w.take<int32_t>(rows);
    row = w.take<int32_t>(rows);
    blocks = w.take<Block>(most_blocks(rows, a.experts));
  }
  void sort(const MoeMlpArgs& a) {
    const int64_t rows = a.tokens * a.top_k;
    std::fill(begin, begin + a.experts + 1, 0);
    for (int64_t s = 0; s < rows; s++) {
      check(a.ids[s] >= 0 && a.ids[s] < a.experts, "moe_mlp", "ids_TK must be experts from 0 on", a.ids[s]);
      begin[a.ids[s] + 1]++;
    }
    for (int64_t e = 0; e < a.experts; e++) begin[e + 1] += begin[e];
    std::copy(begin, begin + a.experts, next);
    for (int64_t s = 0; s < rows; s++) {
      row[s] = int32_t(next[a.ids[s]]++);
      slot[row[s]] = int32_t(s);
    }
    count = cut_blocks(begin, a.experts, blocks);
  }
};

static Weights up_by_row(const MoeMlpArgs& a) { return {a.weight_dtype, a.up, a.up_expert_stride, a.up_stride, a.width, a.expert_width, true, a.packed}; }
static Weights down_by_row(const MoeMlpArgs& a) { return {a.weight_dtype, a.down, a.down_expert_stride, a.down_stride, a.expert_width, a.width, true, a.packed}; }
// The same tensors for the products that go back: B(k, n) = stored (k, n).
static Weights up_transposed(const MoeMlpArgs& a) { return {a.weight_dtype, a.up, a.up_expert_stride, a.up_stride, a.expert_width, a.width, false}; }
static Weights down_transposed(const MoeMlpArgs& a) { return {a.weight_dtype, a.down, a.down_expert_stride, a.down_stride, a.width, a.expert_width, false}; }

template <class T>
static int64_t widest_panel(const MoeMlpArgs& a) { return panel_elements<T>(std::max(a.width, a.expert_width)); }

// The sums as rows of `out`, `width` apart.
template <class T>
static void write_rows(T* out, int64_t width, int64_t column, int64_t columns, int64_t r, int count, const float* sums) {
  for (int i = 0; i < count; i++)
    for_lanes(columns, [&](int64_t c, int n) {
      store_lanes(out + (r + i) * width + column + c, load_lanes(sums + i * kTileColumns + c, n), n);
    });
}

// y_t = the sum of token t's rows, in fp32, rounded once.
template <class T>
static void combine(const MoeMlpArgs& a, const Routes& routes, const T* rows, T* y) {
#pragma omp for schedule(static)
  for (int64_t t = 0; t < a.tokens; t++)
    for_lanes(a.width, [&](int64_t c, int n) {
      Vec total = set1(0.0f);
      for (int64_t k = 0; k < a.top_k; k++)
        total = total + load_lanes(rows + routes.row[t * a.top_k + k] * a.width + c, n);
      store_lanes(y + t * a.width + c, total, n);
    });
}

template <class T>
struct Forward {
  Routes routes;
  T *active, *rows, *panels;
  Forward(const MoeMlpArgs& a, Workspace& w) : routes(a, w) {
    const int64_t count = a.tokens * a.top_k;
    active = w.take<T>(count * a.expert_width);
    rows = w.take<T>(count * a.width);
    panels = w.take<T>(a.workers * widest_panel<T>(a));
  }
};

template <class T>
static void forward(const MoeMlpArgs& a, const Exec& exec) {
  Workspace space{(char*)exec.workspace};
  Forward<T> f(a, space);
  if (a.packed) {
    check_packed<T>("moe_mlp", a.up, a.experts, a.width, a.expert_width);
    check_packed<T>("moe_mlp", a.down, a.experts, a.expert_width, a.width);
  }
  f.routes.sort(a);
  const int threads = int(std::min<int64_t>(exec.threads, a.workers));
#pragma omp parallel num_threads(threads)
  {
    T* buffer = f.panels + worker() * widest_panel<T>(a);
    const auto x_row = [&](int64_t r) { return (const T*)a.x + f.routes.slot[r] / a.top_k * a.x_stride; };
    const auto active_row = [&](int64_t r) { return f.active + r * a.expert_width; };
    all_products(f.routes.blocks, f.routes.count, up_by_row(a), buffer, x_row,
                 [&](const Block&, int64_t column, int64_t columns, int64_t r, int count, const float* sums) {
                   if (a.hidden) write_rows((T*)a.hidden, a.expert_width, column, columns, r, count, sums);
                   for (int i = 0; i < count; i++) {
                     const Vec weight = set1(a.weights[f.routes.slot[r + i]]);
                     for_lanes(columns, [&](int64_t c, int n) {
                       const Vec v = max(set1(0.0f), load_lanes(sums + i * kTileColumns + c, n));
                       store_lanes(active_row(r + i) + column + c, v * v * weight, n);
                     });
                   }
                 });
    all_products(f.routes.blocks, f.routes.count, down_by_row(a), buffer, active_row,
                 [&](const Block&, int64_t column, int64_t columns, int64_t r, int count, const float* sums) {
                   write_rows(f.rows, a.width, column, columns, r, count, sums);
                 });
    combine(a, f.routes, f.rows, (T*)a.y);
  }
}

template <class T>
struct Backward {
  Routes routes;
  int64_t* padded;            // experts + 1: where an expert's rows begin when each has an even number of them
  T *grad_hidden, *rows;      // rows x F, rows x D
  T *hidden_steps, *active_steps;  // for the weights' gradients: panels of F over an expert's rows
  float* dots;                // rows x panels of F
  T* buffers;
  int64_t buffer_elements;
  Backward(const MoeMlpBwdArgs& b, Workspace& w) : routes(b.forward, w) {
    const MoeMlpArgs& a = b.forward;
    const int64_t count = a.tokens * a.top_k;
    const int64_t steps = steps_elements<T>(count, a.experts, a.expert_width);
    padded = w.take<int64_t>(a.experts + 1);
    grad_hidden = w.take<T>(count * a.expert_width);
    rows = w.take<T>(b.grad_x ? count * a.width : 0);
    hidden_steps = w.take<T>(b.grad_up ? steps : 0);
    active_steps = w.take<T>(b.grad_down ? steps : 0);
    dots = w.take<float>(count * panels_of(a.expert_width));
    buffer_elements = std::max(widest_panel<T>(a), b.grad_up || b.grad_down ? panel_elements<T>(count) : 0);
    buffers = w.take<T>(a.workers * buffer_elements);
  }
};

// Writes `count` rows of 64 columns into a panel over rows, from row `r` of the expert on; r is even.
template <class T>
static void write_steps(T* panel, int64_t columns, int64_t r, int count, const float* values) {
  const int vectors = vectors_of(columns);
  panel += r * vectors * kLanes;
  pack_rows(panel, [&](int64_t i) { return values + i * kTileColumns; }, count, columns, vectors);
}

// With g = down^T dy and r = relu(hidden): dhidden = 2 weight r g, dweight = r^2 . g, and the activation weight r^2.
template <class T>
static void hidden_gradient(const MoeMlpBwdArgs& b, const Backward<T>& s, const Block& block, int64_t column, int64_t columns,
                            int64_t r, int count, const float* sums) {
  const MoeMlpArgs& a = b.forward;
  alignas(64) float grad[kTileRows * kTileColumns], active[kTileRows * kTileColumns];
  for (int i = 0; i < count; i++) {
    const Vec weight = set1(a.weights[s.routes.slot[r + i]]);
    const T* hidden = (const T*)a.hidden + (r + i) * a.expert_width + column;
    Vec dot = set1(0.0f);
    for_lanes(columns, [&](int64_t c, int n) {
      const Vec v = max(set1(0.0f), load_lanes(hidden + c, n)), g = load_lanes(sums + i * kTileColumns + c, n);
      const Vec vg = v * g;
      dot = fma(v, vg, dot);
      store_lanes(grad + i * kTileColumns + c, set1(2.0f) * weight * vg, n);
      store_lanes(active + i * kTileColumns + c, weight * v * v, n);
    });
    s.dots[(r + i) * panels_of(a.expert_width) + column / kTileColumns] = sum(dot);
  }
  write_rows(s.grad_hidden, a.expert_width, column, columns, r, count, grad);
  const int64_t first = r - s.routes.begin[block.expert];
  if (b.grad_up) write_steps(steps_at(s.hidden_steps, s.padded, block.expert, a.expert_width, column), columns, first, count, grad);
  if (b.grad_down) write_steps(steps_at(s.active_steps, s.padded, block.expert, a.expert_width, column), columns, first, count, active);
}

// grad_up[e] = dhidden^T x and grad_down[e] = dy^T active; exactly 0 for an expert without rows.
template <class T>
static void weight_gradients(const MoeMlpBwdArgs& b, const Backward<T>& s, T* buffer) {
  const MoeMlpArgs& a = b.forward;
  const int64_t panels = panels_of(a.width);
  const auto slice = [&](const void* base, int64_t stride, int64_t e, int64_t column, int64_t columns) {
    const int64_t begin = s.routes.begin[e];
    pack_rows(buffer, [&](int64_t i) { return (const T*)base + s.routes.slot[begin + i] / a.top_k * stride + column; },
              s.routes.begin[e + 1] - begin, columns, vectors_of(columns));
  };
#pragma omp for schedule(dynamic, 1)
  for (int64_t task = 0; task < 2 * a.experts * panels; task++) {
    const bool up = task < a.experts * panels;
    if (!(up ? b.grad_up : b.grad_down)) continue;
    const int64_t e = task / panels % a.experts, column = task % panels * kTileColumns;
    const int64_t columns = std::min<int64_t>(kTileColumns, a.width - column), rows = s.routes.begin[e + 1] - s.routes.begin[e];
    const int64_t height = s.padded[e + 1] - s.padded[e], base = e * a.width * a.expert_width;
    if (up) {
      slice(a.x, a.x_stride, e, column, columns);
      transposed_product(steps_at(s.hidden_steps, s.padded, e, a.expert_width, 0), height, a.expert_width, rows, buffer,
                         vectors_of(columns), [&](int64_t m, int count, const float* sums) {
                           write_gradient(a.weight_dtype, b.grad_up, base + m * a.width + column, a.width, columns, count, sums);
                         });
      continue;
    }
    slice(b.grad_y, a.width, e, column, columns);
    for (int64_t f = 0; f < a.expert_width; f += kTileColumns) {
      const int64_t active_columns = std::min<int64_t>(kTileColumns, a.expert_width - f);
      transposed_product(buffer, 0, columns, rows, steps_at(s.active_steps, s.padded, e, a.expert_width, f),
                         vectors_of(active_columns), [&](int64_t m, int count, const float* sums) {
                           write_gradient(a.weight_dtype, b.grad_down, base + (column + m) * a.expert_width + f, a.expert_width,
                                          active_columns, count, sums);
                         });
    }
  }
  stream_end();
}

template <class T>
static void backward(const MoeMlpBwdArgs& b, const Exec& exec) {
  const MoeMlpArgs& a = b.forward;
  Workspace space{(char*)exec.workspace};
  Backward<T> s(b, space);
  s.routes.sort(a);
  pad_rows<T>(s.routes.begin, a.experts, s.padded);
  const int threads = int(std::min<int64_t>(exec.threads, a.workers));
#pragma omp parallel num_threads(threads)
  {
    T* buffer = s.buffers + worker() * s.buffer_elements;
    const auto grad_row = [&](int64_t r) { return (const T*)b.grad_y + s.routes.slot[r] / a.top_k * a.width; };
    all_products(s.routes.blocks, s.routes.count, down_transposed(a), buffer, grad_row,
                 [&](const Block& block, int64_t column, int64_t columns, int64_t r, int count, const float* sums) {
                   hidden_gradient(b, s, block, column, columns, r, count, sums);
                 });
#pragma omp for schedule(static)
    for (int64_t r = 0; r < a.tokens * a.top_k; r++) {
      float total = 0.0f;
      for (int64_t p = 0; p < panels_of(a.expert_width); p++) total += s.dots[r * panels_of(a.expert_width) + p];
      b.grad_weights[s.routes.slot[r]] = total;
    }
    if (b.grad_x) {
      all_products(s.routes.blocks, s.routes.count, up_transposed(a), buffer, [&](int64_t r) { return s.grad_hidden + r * a.expert_width; },
                   [&](const Block&, int64_t column, int64_t columns, int64_t r, int count, const float* sums) {
                     write_rows(s.rows, a.width, column, columns, r, count, sums);
                   });
      combine(a, s.routes, s.rows, (T*)b.grad_x);
    }
    if (b.grad_up || b.grad_down) weight_gradients(b, s, buffer);
  }
}

static void check_args(const MoeMlpArgs& a) {
  check(a.tokens >= 0, "moe_mlp", "tokens must be >= 0", a.tokens);
  check(a.top_k > 0, "moe_mlp", "top_k must be > 0", a.top_k);
  check(a.tokens <= INT32_MAX / a.top_k, "moe_mlp", "tokens * top_k must be below 2^31, tokens", a.tokens);
  check(a.experts > 0, "moe_mlp", "experts must be > 0", a.experts);
  check(a.width > 0, "moe_mlp", "width must be > 0", a.width);
  check(a.expert_width > 0, "moe_mlp", "expert_width must be > 0", a.expert_width);
  check(a.workers > 0, "moe_mlp", "workers must be > 0", a.workers);
  check(a.dtype == DType::bf16 || a.weight_dtype == DType::f32, "moe_mlp", "weights of fp32 tokens must be fp32, dtype", int(a.weight_dtype));
}

template <class Plan, class Args>
static int64_t bytes_of(const Args& args) {
  Workspace space{nullptr};
  Plan plan(args, space);
  return space.bytes;
}

}  // namespace

int64_t moe_mlp_fwd_workspace(const MoeMlpArgs& a) {
  check_args(a);
  return a.dtype == DType::f32 ? bytes_of<Forward<float>>(a) : bytes_of<Forward<bf16>>(a);
}
void moe_mlp_fwd(const MoeMlpArgs& a, const Exec& exec) {
  check(exec.bytes_workspace >= moe_mlp_fwd_workspace(a), "moe_mlp", "workspace is too small", exec.bytes_workspace);
  a.dtype == DType::f32 ? forward<float>(a, exec) : forward<bf16>(a, exec);
}

int64_t moe_mlp_bwd_workspace(const MoeMlpBwdArgs& b) {
  check_args(b.forward);
  check(!b.forward.packed, "moe_mlp", "packed must be 0 for the backward", 1);
  return b.forward.dtype == DType::f32 ? bytes_of<Backward<float>>(b) : bytes_of<Backward<bf16>>(b);
}
void moe_mlp_bwd(const MoeMlpBwdArgs& b, const Exec& exec) {
  check(exec.bytes_workspace >= moe_mlp_bwd_workspace(b), "moe_mlp", "workspace is too small", exec.bytes_workspace);
  b.forward.dtype == DType::f32 ? backward<float>(b, exec) : backward<bf16>(b, exec);
}

}  // namespace hebatron::HEBATRON_ISA_NAMESPACE
