// What      out = a B, the dense projections: forward, and with the operands exchanged both gradients.
// Grid      tasks of (block of at most 384 rows, 64 columns) over the threads.
// Traffic   B once a block of rows, packed from where it lies or packed ahead; a once a panel, from L2.
// Roofline  compute from about 16 rows on, DRAM below.
// Measured  2026-11-28, Zen 4, 2 threads, bf16 packed ahead, one row, of a plain read's rate: 8,192 x 768 123 %, 2,834 x 768
//           98 %, 768 x 1,152 99 %. Within a prefill of 512 tokens 79 % of peak. bench/bench_linear.py.
// Limits    fp32 and bf16 (B also fp32 under bf16), fp32 accumulation.
// Why so    the product of the experts with one expert: a row's result does not depend on the rows beside it, so a token's
//           projections are the same bits in training, prefill and decoding.
#include "cpu/gemm.h"

namespace hebatron::HEBATRON_ISA_NAMESPACE {
namespace {

template <class T>
struct Plan {
  int64_t* begin;  // of the one expert's rows: 0, rows
  Block* blocks;
  T* panels;  // workers
  Plan(const LinearArgs& a, Workspace& w) {
    begin = w.take<int64_t>(2);
    blocks = w.take<Block>(most_blocks(a.rows, 1));
    panels = w.take<T>(a.packed ? 0 : a.workers * panel_elements<T>(a.k));
  }
};

template <class S>
static void write(const LinearArgs& a, int64_t column, int64_t columns, int64_t r, int count, const float* sums) {
  for (int i = 0; i < count; i++)
    for_lanes(columns, [&](int64_t c, int n) {
      store_lanes((S*)a.out + (r + i) * a.n + column + c, load_lanes(sums + i * kTileColumns + c, n), n);
    });
}

template <class T>
static void multiply(const LinearArgs& a, const Exec& exec) {
  Workspace space{(char*)exec.workspace};
  const Plan<T> plan(a, space);
  if (a.packed) check_packed<T>("linear", a.b, 1, a.k, a.n);
  plan.begin[0] = 0, plan.begin[1] = a.rows;
  const int64_t count = cut_blocks(plan.begin, 1, plan.blocks);
  const Weights weights{a.weight_dtype, a.b, 0, a.b_stride, a.k, a.n, a.b_k_major, a.packed};
  const auto row_of = [&](int64_t r) { return (const T*)a.a + r * a.a_stride; };
  const auto finish = [&](const Block&, int64_t column, int64_t columns, int64_t r, int rows, const float* sums) {
    a.out_dtype == DType::f32 ? write<float>(a, column, columns, r, rows, sums) : write<bf16>(a, column, columns, r, rows, sums);
  };
#pragma omp parallel num_threads(int(std::min<int64_t>(exec.threads, a.workers)))
  all_products(plan.blocks, count, weights, plan.panels + (a.packed ? 0 : worker() * panel_elements<T>(a.k)), row_of, finish);
}

}  // namespace

int64_t linear_fwd_workspace(const LinearArgs& a) {
  check(a.rows >= 0, "linear", "rows must be >= 0", a.rows);
  check(a.n > 0, "linear", "n must be > 0", a.n);
  check(a.k > 0, "linear", "k must be > 0", a.k);
  check(a.workers > 0, "linear", "workers must be > 0", a.workers);
  check(a.dtype == DType::bf16 || a.weight_dtype == DType::f32, "linear", "weights of fp32 rows must be fp32, dtype", int(a.weight_dtype));
  Workspace space{nullptr};
  a.dtype == DType::f32 ? (void)Plan<float>(a, space) : (void)Plan<bf16>(a, space);
  return space.bytes;
}
void linear_fwd(const LinearArgs& a, const Exec& exec) {
  check(exec.bytes_workspace >= linear_fwd_workspace(a), "linear", "workspace is too small", exec.bytes_workspace);
  a.dtype == DType::f32 ? multiply<float>(a, exec) : multiply<bf16>(a, exec);
}

}  // namespace hebatron::HEBATRON_ISA_NAMESPACE
