// What      grouped_gemm_wgrad, out[e] = sum over the rows r of expert e of a[row(r)]^T b[r].
// Grid      first a's rows as panels over them, tasks of (expert, 64 columns of a); then tasks of (expert, 64 columns of b),
//           which pack their part of b and multiply all of a's columns by it.
// Traffic   a is read once, written as panels and read from them once a task (from L2 up to 170 rows of 2,688 bf16); b and
//           out once.
// Roofline  compute from about 100 rows an expert on, the writing of out below.
// Measured  never on its own.
// Limits    fp32 and bf16 with fp32 accumulation; out in either.
// Why so    one thread adds all rows of an expert for its 64 columns, in chains of a fixed length: the bits do not depend on
//           the number of threads. `transposed` is the product with a and b in each other's place.
#include "cpu/wgrad.h"

namespace hebatron::HEBATRON_ISA_NAMESPACE {
namespace {

// One operand: row r is row rows[r] of it, or r.
struct Side {
  const void* data;
  int64_t stride, width;
  const int32_t* rows;
  template <class T>
  const T* row(int64_t r) const { return (const T*)data + (rows ? rows[r] : r) * stride; }
};
static Side left_of(const GroupedGemmWgradArgs& g) {
  return g.transposed ? Side{g.b, g.b_stride, g.n, nullptr} : Side{g.a, g.a_stride, g.m, g.rows_of_a};
}
static Side right_of(const GroupedGemmWgradArgs& g) {
  return g.transposed ? Side{g.a, g.a_stride, g.m, g.rows_of_a} : Side{g.b, g.b_stride, g.n, nullptr};
}

template <class T>
struct Plan {
  int64_t *begin, *padded;  // experts + 1
  T *steps, *panels;        // all of the left operand; one panel of the right one a worker
  int64_t panel;
  Plan(const GroupedGemmWgradArgs& g, Workspace& w) : panel(panel_elements<T>(g.rows)) {
    begin = w.take<int64_t>(g.experts + 1);
    padded = w.take<int64_t>(g.experts + 1);
    steps = w.take<T>(steps_elements<T>(g.rows, g.experts, left_of(g).width));
    panels = w.take<T>(g.workers * panel);
  }
};

template <class T>
static void wgrad(const GroupedGemmWgradArgs& g, const Exec& exec) {
  Workspace space{(char*)exec.workspace};
  const Plan<T> plan(g, space);
  const Side left = left_of(g), right = right_of(g);
  plan.begin[0] = 0;
  for (int64_t e = 0; e < g.experts; e++) {
    plan.begin[e + 1] = g.offsets[e];
    check(g.offsets[e] >= plan.begin[e] && g.offsets[e] <= g.rows, "grouped_gemm_wgrad", "offsets must rise from 0 to the rows", g.offsets[e]);
  }
  for (int64_t r = 0; g.rows_of_a && r < plan.begin[g.experts]; r++)
    check(g.rows_of_a[r] >= 0 && g.rows_of_a[r] < g.a_rows, "grouped_gemm_wgrad", "rows must be rows of a", g.rows_of_a[r]);
  pad_rows<T>(plan.begin, g.experts, plan.padded);
  const auto pack = [&](const Side& side, int64_t e, int64_t column, T* to) {
    const int64_t columns = std::min<int64_t>(kTileColumns, side.width - column);
    pack_rows(to, [&](int64_t i) { return side.row<T>(plan.begin[e] + i) + column; }, plan.begin[e + 1] - plan.begin[e], columns,
              vectors_of(columns));
  };
#pragma omp parallel num_threads(int(std::min<int64_t>(exec.threads, g.workers)))
  {
    const int64_t down = panels_of(left.width), across = panels_of(right.width);
#pragma omp for schedule(dynamic, 1)
    for (int64_t task = 0; task < g.experts * down; task++) {
      const int64_t e = task / down, column = task % down * kTileColumns;
      pack(left, e, column, steps_at(plan.steps, plan.padded, e, left.width, column));
    }
    T* panel = plan.panels + worker() * plan.panel;
#pragma omp for schedule(dynamic, 1)
    for (int64_t task = 0; task < g.experts * across; task++) {
      const int64_t e = task / across, column = task % across * kTileColumns, base = e * left.width * right.width + column;
      const int64_t columns = std::min<int64_t>(kTileColumns, right.width - column);
      pack(right, e, column, panel);
      transposed_product(steps_at(plan.steps, plan.padded, e, left.width, 0), plan.padded[e + 1] - plan.padded[e], left.width,
                         plan.begin[e + 1] - plan.begin[e], panel, vectors_of(columns),
                         [&](int64_t m, int count, const float* sums) {
                           write_gradient(g.out_dtype, g.out, base + m * right.width, right.width, columns, count, sums);
                         });
    }
    stream_end();
  }
}

static void check_args(const GroupedGemmWgradArgs& g) {
  check(g.rows >= 0, "grouped_gemm_wgrad", "rows must be >= 0", g.rows);
  check(g.experts > 0, "grouped_gemm_wgrad", "experts must be > 0", g.experts);
  check(g.m > 0, "grouped_gemm_wgrad", "m must be > 0", g.m);
  check(g.n > 0, "grouped_gemm_wgrad", "n must be > 0", g.n);
  check(g.workers > 0, "grouped_gemm_wgrad", "workers must be > 0", g.workers);
  check(g.implementation == GroupedGemm::automatic, "grouped_gemm_wgrad", "implementation must be 0 on the CPU", int64_t(g.implementation));
}

}  // namespace

int64_t grouped_gemm_wgrad_workspace(const GroupedGemmWgradArgs& g) {
  check_args(g);
  Workspace space{nullptr};
  g.dtype == DType::f32 ? (void)Plan<float>(g, space) : (void)Plan<bf16>(g, space);
  return space.bytes;
}
void grouped_gemm_wgrad(const GroupedGemmWgradArgs& g, const Exec& exec) {
  check(exec.bytes_workspace >= grouped_gemm_wgrad_workspace(g), "grouped_gemm_wgrad", "workspace is too small", exec.bytes_workspace);
  g.dtype == DType::f32 ? wgrad<float>(g, exec) : wgrad<bf16>(g, exec);
}

}  // namespace hebatron::HEBATRON_ISA_NAMESPACE
