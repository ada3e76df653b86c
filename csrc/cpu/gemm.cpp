// What      grouped_gemm, out[r] = act(a[row(r)] b[e]) scale[r]; and sums = A B for a strip of up to 6 rows and one panel,
//           the product under it and under moe_mlp.
// Grid      tasks of (block of at most 384 rows of an expert, 64 columns) over the threads.
// Traffic   a panel (K x 64 of bf16: 344 KB at K = 2,688) comes from L2 once a strip, the rows of A from L1.
// Roofline  compute: vdpbf16ps or fp32 FMA.
// Measured  never on its own; python bench/bench_moe.py times it inside its callers.
// Limits    fp32 and bf16 with fp32 accumulation; any k.
// Why so    all of k in one call: cutting it, so that the panel's part lies in L1, was 1 to 6 % slower, since every cut
//           reads and writes the sums.
#include "cpu/gemm.h"

namespace hebatron::HEBATRON_ISA_NAMESPACE {
namespace {

constexpr int64_t kChainUnits = 512;

template <class T, int MR, int NV>
static void strip_product(const Strip& s, const T* panel, float* sums) {
  const T* rows[MR];
  HEBATRON_UNROLL for (int i = 0; i < MR; i++) rows[i] = (const T*)s.rows[i];
  const bool odd = kUnit<T> == 2 && s.k % 2 && !s.padded;
  const int64_t units = odd ? s.k / 2 : units_of<T>(s.k);
  int64_t u = 0;
  do {
    Vec acc[MR][NV];
    clear(acc);
    const int64_t chain = std::min(kChainUnits, units - u);
    for (int64_t done = 0, some; done < chain; done += some) {
      some = s.ahead ? std::min(kAheadUnits, chain - done) : chain;
      tile(acc, rows, s.ak, panel, some);
      HEBATRON_UNROLL for (int i = 0; i < MR; i++) rows[i] += some * s.ak;
      panel += some * NV * kLanes * kUnit<T>;
      if (s.ahead) s.ahead->ask();
    }
    if (odd && u + chain == units) {
      T last[MR][kUnit<T>] = {};
      const T* pairs[MR];
      for (int i = 0; i < MR; i++) last[i][0] = *rows[i], pairs[i] = last[i];
      tile(acc, pairs, 0, panel, 1);
    }
    HEBATRON_UNROLL for (int i = 0; i < MR; i++) HEBATRON_UNROLL for (int j = 0; j < NV; j++) {
      float* out = sums + i * kTileColumns + j * kLanes;
      store(out, u ? load(out) + acc[i][j] : acc[i][j]);
    }
    u += chain;
  } while (u < units);
}

template <class T, int MR>
static void by_vectors(const Strip& s, const void* panel, int vectors, float* sums) {
  switch (vectors) {
    case 1: return strip_product<T, MR, 1>(s, (const T*)panel, sums);
    case 2: return strip_product<T, MR, 2>(s, (const T*)panel, sums);
    case 3: return strip_product<T, MR, 3>(s, (const T*)panel, sums);
    default: return strip_product<T, MR, 4>(s, (const T*)panel, sums);
  }
}
template <class T>
static void by_count(const Strip& s, const void* panel, int vectors, float* sums) {
  switch (s.count) {
    case 1: return by_vectors<T, 1>(s, panel, vectors, sums);
    case 2: return by_vectors<T, 2>(s, panel, vectors, sums);
    case 3: return by_vectors<T, 3>(s, panel, vectors, sums);
    case 4: return by_vectors<T, 4>(s, panel, vectors, sums);
    case 5: return by_vectors<T, 5>(s, panel, vectors, sums);
    default: return by_vectors<T, 6>(s, panel, vectors, sums);
  }
}

struct Plan {
  int64_t* begin;  // experts + 1
  Block* blocks;
  void* panels;  // workers
  int64_t bytes_panel;
  Plan(const GroupedGemmArgs& a, Workspace& w) {
    begin = w.take<int64_t>(a.experts + 1);
    blocks = w.take<Block>(most_blocks(a.rows, a.experts));
    const bool wide = a.dtype == DType::f32;
    bytes_panel = wide ? panel_elements<float>(a.k) * 4 : panel_elements<bf16>(a.k) * 2;
    panels = w.take<char>(a.workers * bytes_panel);
  }
};

template <class T>
static void write(const GroupedGemmArgs& a, int64_t column, int64_t columns, int64_t r, int count, const float* sums) {
  for (int i = 0; i < count; i++) {
    const Vec scale = set1(a.scale ? a.scale[r + i] : 1.0f);
    for_lanes(columns, [&](int64_t c, int n) {
      Vec v = load_lanes(sums + i * kTileColumns + c, n);
      if (a.relu2) v = max(set1(0.0f), v), v = v * v;
      store_lanes((T*)a.out + (r + i) * a.n + column + c, v * scale, n);
    });
  }
}

template <class T>
static void grouped(const GroupedGemmArgs& a, const Exec& exec) {
  Workspace space{(char*)exec.workspace};
  const Plan plan(a, space);
  plan.begin[0] = 0;
  for (int64_t e = 0; e < a.experts; e++) {
    plan.begin[e + 1] = a.offsets[e];
    check(a.offsets[e] >= plan.begin[e] && a.offsets[e] <= a.rows, "grouped_gemm", "offsets must rise from 0 to the rows", a.offsets[e]);
  }
  const int64_t end = plan.begin[a.experts], count = cut_blocks(plan.begin, a.experts, plan.blocks);
  for (int64_t r = 0; a.rows_of_a && r < end; r++)
    check(a.rows_of_a[r] >= 0 && a.rows_of_a[r] < a.a_rows, "grouped_gemm", "rows must be rows of a", a.rows_of_a[r]);
  const Weights weights{a.dtype, a.b, a.b_expert_stride, a.b_stride, a.k, a.n, a.b_k_major};
  const auto row_of = [&](int64_t r) { return (const T*)a.a + (a.rows_of_a ? a.rows_of_a[r] : r) * a.a_stride; };
#pragma omp parallel num_threads(int(std::min<int64_t>(exec.threads, a.workers)))
  {
    T* buffer = (T*)((char*)plan.panels + worker() * plan.bytes_panel);
    all_products(plan.blocks, count, weights, buffer, row_of,
                 [&](const Block&, int64_t column, int64_t columns, int64_t r, int rows, const float* sums) {
                   write<T>(a, column, columns, r, rows, sums);
                 });
  }
  if (end < a.rows) std::memset((T*)a.out + end * a.n, 0, size_t((a.rows - end) * a.n) * sizeof(T));
}

static void check_args(const GroupedGemmArgs& a) {
  check(a.rows >= 0, "grouped_gemm", "rows must be >= 0", a.rows);
  check(a.experts > 0, "grouped_gemm", "experts must be > 0", a.experts);
  check(a.n > 0, "grouped_gemm", "n must be > 0", a.n);
  check(a.k > 0, "grouped_gemm", "k must be > 0", a.k);
  check(a.workers > 0, "grouped_gemm", "workers must be > 0", a.workers);
  check(!a.kept && !a.row_sums, "grouped_gemm", "kept and row_sums must be null on the CPU; rows", a.rows);
  check(a.implementation == GroupedGemm::automatic, "grouped_gemm", "implementation must be 0 on the CPU", int64_t(a.implementation));
}

}  // namespace

void strip_product_f32(const Strip& s, const void* panel, int vectors, float* sums) { by_count<float>(s, panel, vectors, sums); }
void strip_product_bf16(const Strip& s, const void* panel, int vectors, float* sums) { by_count<bf16>(s, panel, vectors, sums); }

int64_t grouped_gemm_fwd_workspace(const GroupedGemmArgs& a) {
  check_args(a);
  Workspace space{nullptr};
  const Plan plan(a, space);
  return space.bytes;
}
void grouped_gemm_fwd(const GroupedGemmArgs& a, const Exec& exec) {
  check(exec.bytes_workspace >= grouped_gemm_fwd_workspace(a), "grouped_gemm", "workspace is too small", exec.bytes_workspace);
  a.dtype == DType::f32 ? grouped<float>(a, exec) : grouped<bf16>(a, exec);
}

}  // namespace hebatron::HEBATRON_ISA_NAMESPACE
