// What      the gradients of attention: with p = exp(scale q k^T - lse), delta = sum(grad_o * o),
//           ds = p * (grad_o v^T - delta): grad_v = p^T grad_o, grad_k = scale ds^T q, grad_q = scale ds k.
// Grid      keys of the call in pieces of up to 2,048, one after another. In a piece a task is one query head: its blocks of 192
//           keys in order, for each the blocks of 96 queries that see it; scores and weights of such a pair stay in L2.
// Traffic   q, o, grad_o and, per block of keys, an fp32 sum of grad_q of the queries that see it: 96 rows a byte.
// Roofline  compute: 10 * pairs * head_dim operations, 2.5 times the forward's.
// Measured  2026-11-28, Zen 4, 2 threads, bf16, 32 q / 2 kv heads of 128: 4,096 tokens 76 % of peak, 1.7x the torch form's
//           backward; 512 tokens 59 %. bench/bench_attention.py.
// Limits    as the forward. Memory beyond the results: k and v packed, an fp32 copy of grad_q, 2,048 keys' fp32 gradients of
//           every query head, 0.6 MB a thread. At most one thread per query head and sequence has work.
// Why so    every sum has one order: grad_q of a head adds blocks of keys as they come, grad_k and grad_v of a block add
//           queries as they come and then the heads in order. So the gradients do not depend on threads, and nothing is
//           computed twice (a pass for grad_q and one for grad_k and grad_v make 7 products of 5).
#include "cpu/attention.h"

namespace hebatron::HEBATRON_ISA_NAMESPACE {
namespace {

constexpr int64_t kBlockQueries = 96, kBlockKeys = 192;  // 16 and 32 strips of six; whole panels on every ISA
constexpr int64_t kPieceKeys = 2048;

// Blocks [first, end) of one sequence's keys; `place` is where they lie in the piece's gradients.
struct Part {
  int64_t sequence, first, end, place;
};

// One thread's arrays for a pair of blocks. Steps of k over queries: see store_steps.
template <class T>
struct Scratch {
  T *q, *grad_o;            // left operands: a row per query
  T *q_rows, *grad_o_rows;  // the same as right operands of a product over queries, a panel per 64 elements of the head
  T *p_steps, *ds_steps;    // weights and their gradients by steps of queries: left operands of products over queries
  T* ds;                    // a row per query; fp32: the same array as ds_steps
  float* scaled_lse;        // times log2(e)

  Scratch(Workspace& w, int64_t dim) {
    q = w.take<T>(kBlockQueries * padded_k<T>(dim));
    grad_o = w.take<T>(kBlockQueries * padded_k<T>(dim));
    q_rows = w.take<T>(kBlockQueries * padded_columns(dim));
    grad_o_rows = w.take<T>(kBlockQueries * padded_columns(dim));
    p_steps = w.take<T>(kBlockQueries * kBlockKeys);
    ds_steps = w.take<T>(kBlockQueries * kBlockKeys);
    ds = kUnit<T> == 1 ? ds_steps : w.take<T>(kBlockQueries * kBlockKeys);
    scaled_lse = w.take<float>(kBlockQueries);
  }
};

template <class T>
struct Plan {
  Packs<T> packs;
  T *k, *v, *k_rows;
  float* delta;    // heads, tokens_q
  float* grad_q;   // heads, tokens_q, columns
  float *grad_k, *grad_v;  // heads, kPieceKeys, columns
  char* scratch;
  int64_t columns, bytes_scratch, bytes;

  Plan(const AttentionArgs& a, int64_t keys, void* base) : packs{keys, a.head_dim}, columns(padded_columns(a.head_dim)) {
    Workspace counted(nullptr);
    Scratch<T>(counted, a.head_dim);
    bytes_scratch = counted.bytes();
    Workspace w(base);
    k = w.take<T>(a.kv_heads * packs.columns_elements());
    v = w.take<T>(a.kv_heads * packs.columns_elements());
    k_rows = w.take<T>(a.kv_heads * packs.rows_elements());
    delta = w.take<float>(a.heads * a.tokens_q);
    grad_q = w.take<float>(a.heads * a.tokens_q * columns);
    grad_k = w.take<float>(a.heads * kPieceKeys * columns);
    grad_v = w.take<float>(a.heads * kPieceKeys * columns);
    scratch = w.take<char>(a.workers * bytes_scratch);
    bytes = w.bytes();
  }
};

// One query head against one sequence.
template <class T>
struct Task {
  const AttentionBwdArgs& b;
  const Plan<T>& plan;
  const Sequence& s;
  int64_t head;
  Scratch<T> w;
  const AttentionArgs& a = b.forward;
  int64_t kv_head = head / (a.heads / a.kv_heads), dim = a.head_dim, k_stride = padded_k<T>(a.head_dim);

  // Key blocks [first, end); their gradients lie from `place` on.
  void run(int64_t first, int64_t end, int64_t place) {
    for (int64_t block = first; block < end; block++) {
      const Span keys = {block * kBlockKeys, std::min((block + 1) * kBlockKeys, s.keys)};
      float* grad_k = plan.grad_k + (head * kPieceKeys + place) * plan.columns;
      float* grad_v = plan.grad_v + (head * kPieceKeys + place) * plan.columns;
      std::memset(grad_k, 0, size_t((keys.end - keys.begin) * plan.columns) * sizeof(float));
      std::memset(grad_v, 0, size_t((keys.end - keys.begin) * plan.columns) * sizeof(float));
      const Span queries = s.seeing(keys);
      for (int64_t q = queries.begin / kBlockQueries * kBlockQueries; q < queries.end; q += kBlockQueries)
        pair({q, std::min(q + kBlockQueries, s.queries)}, keys, grad_k, grad_v);
      place += keys.end - keys.begin;
    }
  }

  void pair(Span queries, Span keys, float* grad_k, float* grad_v) {
    load_queries(queries);
    const int64_t rows = queries.end - queries.begin;
    for (int64_t key = keys.begin; key < keys.end; key += kTileColumns)
      for_strips(rows, [&](int64_t r, auto count) { weigh<count>(queries.begin, r, keys.begin, key); });
    add_keys(queries, keys, w.p_steps, w.grad_o_rows, grad_v);
    add_keys(queries, keys, w.ds_steps, w.q_rows, grad_k);
    add_queries(queries, keys);
  }

  void load_queries(Span queries) {
    const int64_t token = s.first_query + queries.begin, rows = queries.end - queries.begin;
    const T* q = (const T*)a.q + token * a.q_stride + head * a.q_head_stride;
    const T* grad_o = (const T*)b.grad_o + (token * a.heads + head) * dim;
    for (int64_t r = 0; r < rows; r++) {
      copy_row(w.q + r * k_stride, q + r * a.q_stride, dim);
      copy_row(w.grad_o + r * k_stride, grad_o + r * a.heads * dim, dim);
      const float lse = a.lse[(token + r) * a.heads + head];
      w.scaled_lse[r] = lse == kNone ? 0.0f : lse * kLog2E;  // such a row sees nothing: -inf is not subtracted from -inf
    }
    pack_row_panels<T>(w.q_rows, kBlockQueries, 0, w.q, k_stride, rows, dim);
    pack_row_panels<T>(w.grad_o_rows, kBlockQueries, 0, w.grad_o, k_stride, rows, dim);
  }

  // p and ds of MR queries from r on and one panel of keys; 0 where a query does not see a key.
  template <int MR>
  void weigh(int64_t first_query, int64_t r, int64_t first_key, int64_t key) {
    const Span panel = {key, key + kTileColumns}, strip = {first_query + r, first_query + r + MR};
    const int64_t column = key - first_key;
    Vec p[MR + 1][kTileVectors], ds[MR + 1][kTileVectors];  // one more row: an odd last query has a pair of zeros
    clear(p);
    clear(ds);
    if (!within(s.seen(strip), panel).empty()) {
      Vec acc[MR][kTileVectors];
      clear(acc);
      tile<T>(acc, w.q + r * k_stride, k_stride, kUnit<T>, plan.packs.columns(plan.k, kv_head, s.packed + key), units_of<T>(dim));
      const Span all = {s.seen(strip.end - 1).begin, s.seen(strip.begin).end};  // what every query of the strip sees
      const bool whole = all.begin <= panel.begin && all.end >= panel.end;
      const Vec scale = set1(float(a.scale) * kLog2E);
      HEBATRON_UNROLL for (int i = 0; i < MR; i++) {
        const Span seen = s.seen(strip.begin + i);
        HEBATRON_UNROLL for (int j = 0; j < kTileVectors; j++) {
          if (!whole) acc[i][j] = keep_columns(acc[i][j], key + j * kLanes, seen.begin, seen.end);
          p[i][j] = exp2<T>(fma(acc[i][j], scale, set1(-w.scaled_lse[r + i])));
        }
      }
      clear(acc);
      tile<T>(acc, w.grad_o + r * k_stride, k_stride, kUnit<T>, plan.packs.columns(plan.v, kv_head, s.packed + key), units_of<T>(dim));
      HEBATRON_UNROLL for (int i = 0; i < MR; i++) {
        const Vec delta = set1(plan.delta[head * a.tokens_q + s.first_query + strip.begin + i]);
        HEBATRON_UNROLL for (int j = 0; j < kTileVectors; j++) ds[i][j] = p[i][j] * (acc[i][j] - delta);
      }
    }
    for (int i = 0; i < MR; i += 2)
      for (int j = 0; j < kTileVectors; j++) {
        const int64_t to = (r + i) * kBlockKeys + (column + j * kLanes) * kUnit<T>;
        if (kUnit<T> == 1 && i + 1 == MR) {
          store(w.p_steps + to, p[i][j]);
          store(w.ds_steps + to, ds[i][j]);
          continue;
        }
        store_steps(w.p_steps + to, kBlockKeys, p[i][j], p[i + 1][j]);
        store_steps(w.ds_steps + to, kBlockKeys, ds[i][j], ds[i + 1][j]);
      }
    if constexpr (kUnit<T> == 2)
      for (int i = 0; i < MR; i++)
        for (int j = 0; j < kTileVectors; j++) store(w.ds + (r + i) * kBlockKeys + column + j * kLanes, ds[i][j]);
  }

  // to (a row per key) += steps^T rows: over the queries that see a strip of keys.
  void add_keys(Span queries, Span keys, const T* steps, const T* rows, float* to) {
    for (int64_t at = 0; at < dim; at += kTileColumns)
      for_strips(keys.end - keys.begin, [&](int64_t r, auto count) {
        const Span seeing = within(s.seeing({keys.begin + r, keys.begin + r + count}), queries);
        if (seeing.empty()) return;
        const int64_t first = (seeing.begin - queries.begin) / kUnit<T>, last = units_of<T>(seeing.end - queries.begin);
        add_product<T, count>(to + r * plan.columns + at, plan.columns, steps + (first * kBlockKeys + r) * kUnit<T>, kUnit<T>,
                              kBlockKeys * kUnit<T>, rows + at * kBlockQueries + first * kUnit<T> * vectors_of(dim - at) * kLanes,
                              last - first, dim - at);
      });
  }

  // grad_q += ds k
  void add_queries(Span queries, Span keys) {
    float* to = plan.grad_q + (head * a.tokens_q + s.first_query + queries.begin) * plan.columns;
    for (int64_t at = 0; at < dim; at += kTileColumns) {
      const T* rows = plan.packs.rows(plan.k_rows, kv_head, at, s.packed + keys.begin);
      for_strips(queries.end - queries.begin, [&](int64_t r, auto count) {
        const Span seen = within(s.seen(Span{queries.begin + r, queries.begin + r + count}), keys);
        if (seen.empty()) return;
        const int64_t first = (seen.begin - keys.begin) / kUnit<T>, last = units_of<T>(seen.end - keys.begin);
        add_product<T, count>(to + r * plan.columns + at, plan.columns, w.ds + r * kBlockKeys + first * kUnit<T>, kBlockKeys, kUnit<T>,
                              rows + first * kUnit<T> * vectors_of(dim - at) * kLanes, last - first, dim - at);
      });
    }
  }
};

// The call's key blocks in order, cut into pieces of at most kPieceKeys keys.
static inline std::vector<std::vector<Part>> pieces_of(const std::vector<Sequence>& sequences) {
  std::vector<std::vector<Part>> pieces(1);
  int64_t used = 0;
  for (size_t n = 0; n < sequences.size(); n++)
    for (int64_t block = 0; block * kBlockKeys < sequences[n].keys; block++) {
      const int64_t keys = std::min(kBlockKeys, sequences[n].keys - block * kBlockKeys);
      if (used + keys > kPieceKeys) {
        pieces.emplace_back();
        used = 0;
      }
      std::vector<Part>& piece = pieces.back();
      if (piece.empty() || piece.back().sequence != int64_t(n)) piece.push_back({int64_t(n), block, block, used});
      piece.back().end = block + 1;
      used += keys;
    }
  return pieces;
}

// Everything in front of the products: packs, delta, and sums that begin with 0.
template <class T>
static void prepare(const AttentionBwdArgs& b, const std::vector<Sequence>& sequences, const Plan<T>& plan, int threads) {
  const AttentionArgs& a = b.forward;
  for_panels(sequences, a.kv_heads, threads, [&](const Sequence& s, int64_t head, int64_t key, int64_t count) {
    const int64_t token = s.first_key + key;
    const T* k = (const T*)a.k + token * a.k_stride + head * a.k_head_stride;
    const T* v = (const T*)a.v + token * a.v_stride + head * a.v_head_stride;
    plan.packs.pack_columns_at(plan.k, head, s.packed + key, k, a.k_stride, count);
    plan.packs.pack_rows_at(plan.k_rows, head, s.packed + key, k, a.k_stride, count);
    plan.packs.pack_columns_at(plan.v, head, s.packed + key, v, a.v_stride, count);
  });
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t row = 0; row < a.tokens_q * a.heads; row++) {
    const int64_t token = row / a.heads, head = row % a.heads;
    const T *o = (const T*)a.o + row * a.head_dim, *grad_o = (const T*)b.grad_o + row * a.head_dim;
    Vec dots = set1(0.0f);
    for_lanes(a.head_dim, [&](int64_t i, int n) { dots = fma(load_lanes(o + i, n), load_lanes(grad_o + i, n), dots); });
    plan.delta[head * a.tokens_q + token] = sum(dots);
    std::memset(plan.grad_q + (head * a.tokens_q + token) * plan.columns, 0, size_t(plan.columns) * sizeof(float));
  }
}

// The gradients of one part's keys: the heads of each kv head added in order.
template <class T>
static void finish_keys(const AttentionBwdArgs& b, const Plan<T>& plan, const Sequence& s, const Part& part, int threads) {
  const AttentionArgs& a = b.forward;
  const int64_t group = a.heads / a.kv_heads, first = part.first * kBlockKeys;
  const int64_t count = std::min(part.end * kBlockKeys, s.keys) - first;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t row = 0; row < count * a.kv_heads; row++) {
    const int64_t key = row / a.kv_heads, head = row % a.kv_heads;
    const int64_t to = ((s.first_key + first + key) * a.kv_heads + head) * a.head_dim;
    for_lanes(a.head_dim, [&](int64_t i, int n) {
      Vec grad_k = set1(0.0f), grad_v = set1(0.0f);
      for (int64_t h = head * group; h < (head + 1) * group; h++) {
        const int64_t from = (h * kPieceKeys + part.place + key) * plan.columns + i;
        grad_k = grad_k + load(plan.grad_k + from);
        grad_v = grad_v + load(plan.grad_v + from);
      }
      store_lanes((T*)b.grad_k + to + i, grad_k * set1(float(a.scale)), n);
      store_lanes((T*)b.grad_v + to + i, grad_v, n);
    });
  }
}

template <class T>
static void backward(const AttentionBwdArgs& b, const Exec& exec) {
  const AttentionArgs& a = b.forward;
  const std::vector<Sequence> sequences = sequences_of(a);
  const Plan<T> plan(a, packed_keys(sequences), exec.workspace);
  check(exec.bytes_workspace >= plan.bytes, "attention_prefill", "workspace is too small", exec.bytes_workspace);
  const int threads = int(std::min<int64_t>(exec.threads, a.workers));
  prepare(b, sequences, plan, threads);
  for (void* grads : {b.grad_k, b.grad_v})  // keys of sequences without queries
    if (grads) std::memset(grads, 0, size_t(a.tokens_k * a.kv_heads * a.head_dim) * sizeof(T));
  for (const std::vector<Part>& piece : pieces_of(sequences)) {
#pragma omp parallel num_threads(threads)
    {
      Workspace mine(plan.scratch + thread_number() * plan.bytes_scratch);
      const Scratch<T> scratch(mine, a.head_dim);
#pragma omp for schedule(dynamic, 1)
      for (int64_t n = 0; n < int64_t(piece.size()) * a.heads; n++) {
        const Part& part = piece[n / a.heads];
        Task<T>{b, plan, sequences[part.sequence], n % a.heads, scratch}.run(part.first, part.end, part.place);
      }
    }
    for (const Part& part : piece) finish_keys(b, plan, sequences[part.sequence], part, threads);
  }
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t row = 0; row < a.tokens_q * a.heads; row++) {
    const float* from = plan.grad_q + (row % a.heads * a.tokens_q + row / a.heads) * plan.columns;
    for_lanes(a.head_dim, [&](int64_t i, int n) {
      store_lanes((T*)b.grad_q + row * a.head_dim + i, load(from + i) * set1(float(a.scale)), n);
    });
  }
}

}  // namespace

int64_t attention_prefill_bwd_workspace(const AttentionBwdArgs& b) {
  check_attention(b.forward);
  const int64_t keys = packed_keys(sequences_of(b.forward));
  return b.forward.dtype == DType::f32 ? Plan<float>(b.forward, keys, nullptr).bytes : Plan<bf16>(b.forward, keys, nullptr).bytes;
}

void attention_prefill_bwd(const AttentionBwdArgs& b, const Exec& exec) {
  check_attention(b.forward);
  return b.forward.dtype == DType::f32 ? backward<float>(b, exec) : backward<bf16>(b, exec);
}

}  // namespace hebatron::HEBATRON_ISA_NAMESPACE
