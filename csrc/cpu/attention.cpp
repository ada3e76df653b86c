// What      o = softmax(scale q k^T) v over the keys that a query sees, and the log of each row's sum of exponentials.
// Grid      one task per (sequence, kv head, block of queries): its rows are (query, head) pairs, up to 192, so every key and
//           value read serves all heads of the group. Keys go in blocks of 256; a task's scores, weights and sums are 0.5 MB
//           and stay in L2. Tasks with the most keys first, dynamically over the threads.
// Traffic   q and o once; k and v once to be packed, then once per task from L3: 192 rows a byte.
// Roofline  compute: 4 * pairs * head_dim operations.
// Measured  2026-11-28, Zen 4, 2 threads, bf16, 32 q / 2 kv heads of 128: 4,096 tokens 83 % of peak, 2.5x torch's SDPA; 512 tokens
//           62 % (before: 57 %), 3.6x. bench/bench_attention.py.
// Limits    fp32 and bf16 with fp32 scores and sums (weights are rounded to bf16 in front of the second product); any head dim
//           and strides of tokens and heads; int64 offsets. Memory beyond the results: k and v packed and 0.7 MB a thread.
// Why so    keys and their blocks are counted from the sequence's own start and every row is added up alone, so a query's
//           result is the same to the bit alone, packed, in chunks and beside any other query.
#include "cpu/attention.h"

namespace hebatron::HEBATRON_ISA_NAMESPACE {
namespace {

constexpr int64_t kTaskRows = 192;   // 32 strips of six
constexpr int64_t kBlockKeys = 256;  // whole panels on every ISA

// How a call is cut: heads of one kv head and queries that one task holds.
struct Cut {
  int64_t group, heads, head_parts, queries;
  explicit Cut(const AttentionArgs& a)
      : group(a.heads / a.kv_heads),
        heads(std::min(group, kTaskRows)),
        head_parts((group + heads - 1) / heads),
        queries(kTaskRows / heads) {}
};

// One thread's arrays. Rows of q are left operands, of o whole panels of columns.
template <class T>
struct Scratch {
  T* q;
  float* scores;  // kTaskRows, kBlockKeys
  T* weights;     // the same; fp32 ones replace the scores
  float* o;
  float* largest;  // of each row, times scale * log2(e)
  float* total;
  Span* seen;  // the keys that each row sees
  int64_t q_stride, o_stride;

  Scratch(Workspace& w, int64_t head_dim) : q_stride(padded_k<T>(head_dim)), o_stride(padded_columns(head_dim)) {
    q = w.take<T>(kTaskRows * q_stride);
    scores = w.take<float>(kTaskRows * kBlockKeys);
    if constexpr (kUnit<T> == 1) {
      weights = scores;
    } else {
      weights = w.take<T>(kTaskRows * kBlockKeys);
    }
    o = w.take<float>(kTaskRows * o_stride);
    largest = w.take<float>(kTaskRows);
    total = w.take<float>(kTaskRows);
    seen = w.take<Span>(kTaskRows);
  }
};

template <class T>
struct Plan {
  Packs<T> packs;
  T *k, *v;
  char* scratch;
  int64_t bytes_scratch, bytes;

  Plan(const AttentionArgs& a, int64_t keys, void* base) : packs{keys, a.head_dim} {
    Workspace counted(nullptr);
    Scratch<T>(counted, a.head_dim);
    bytes_scratch = counted.bytes();
    Workspace w(base);
    k = w.take<T>(a.kv_heads * packs.columns_elements());
    v = w.take<T>(a.kv_heads * packs.rows_elements());
    scratch = w.take<char>(a.workers * bytes_scratch);
    bytes = w.bytes();
  }
};

// One block of queries of one kv head.
template <class T>
struct Task {
  const AttentionArgs& a;
  const Plan<T>& plan;
  const Sequence& s;
  int64_t kv_head, first_head, heads;
  Span queries;
  Scratch<T> w;

  int64_t rows() const { return (queries.end - queries.begin) * heads; }
  Span seen(int64_t row, int64_t count) const { return {w.seen[row].begin, w.seen[row + count - 1].end}; }
  int64_t place(int64_t row) const {  // of a row among the call's tokens x heads
    return (s.first_query + queries.begin + row / heads) * a.heads + first_head + row % heads;
  }

  void run() {
    for (int64_t r = 0; r < rows(); r++) {
      const int64_t token = s.first_query + queries.begin + r / heads, head = first_head + r % heads;
      copy_row(w.q + r * w.q_stride, (const T*)a.q + token * a.q_stride + head * a.q_head_stride, a.head_dim);
      w.seen[r] = s.seen(queries.begin + r / heads);
      w.largest[r] = kNone;
      w.total[r] = 0.0f;
    }
    std::memset(w.o, 0, size_t(rows() * w.o_stride) * sizeof(float));
    const Span all = s.seen(queries);
    for (int64_t begin = all.begin / kBlockKeys * kBlockKeys; begin < all.end; begin += kBlockKeys) {
      const Span block = {begin, std::min(begin + kBlockKeys, s.keys)};
      score(block);
      for_strips(rows(), [&](int64_t r, auto count) {
        const Span strip = within(seen(r, count), block);
        for (int64_t i = r; i < r + count; i++) weigh(i, within(w.seen[i], block), strip, begin);
      });
      add_values(block);
    }
    finish();
  }

  // scores = q k^T for the panels that a strip sees; a panel of keys stays in L1 over all strips.
  void score(Span block) {
    for (int64_t key = block.begin; key < block.end; key += kTileColumns) {
      const T* panel = plan.packs.columns(plan.k, kv_head, s.packed + key);
      for_strips(rows(), [&](int64_t r, auto count) {
        if (within(seen(r, count), {key, key + kTileColumns}).empty()) return;
        constexpr int kRows = decltype(count)::value;
        Vec acc[kRows][kTileVectors];
        clear(acc);
        tile<T>(acc, w.q + r * w.q_stride, w.q_stride, kUnit<T>, panel, units_of<T>(a.head_dim));
        HEBATRON_UNROLL for (int i = 0; i < kRows; i++) HEBATRON_UNROLL for (int j = 0; j < kTileVectors; j++)
          store(w.scores + (r + i) * kBlockKeys + key - block.begin + j * kLanes, acc[i][j]);
      });
    }
  }

  // Online softmax of one row in base 2: weights = 2^(scale log2(e) score - largest) where the row sees, 0 elsewhere in the
  // strip's part of the block.
  void weigh(int64_t row, Span mine, Span strip, int64_t first) {
    if (strip.empty()) return;
    float* scores = w.scores + row * kBlockKeys;
    T* weights = w.weights + row * kBlockKeys;
    const int64_t begin = (strip.begin - first) / kLanes * kLanes, end = round_up(strip.end - first, kLanes);
    if (mine.empty()) {
      for (int64_t i = begin; i < end; i += kLanes) store(weights + i, set1(0.0f));
      return;
    }
    hide(scores, begin, mine.begin - first, mine.end - first, end);
    Vec top = set1(kNone), top2 = top;
    int64_t i = begin;
    for (; i + 2 * kLanes <= end; i += 2 * kLanes) top = max(top, load(scores + i)), top2 = max(top2, load(scores + i + kLanes));
    if (i < end) top = max(top, load(scores + i));
    const float scale = float(a.scale) * kLog2E, before = w.largest[row], largest = std::max(before, highest(max(top, top2)) * scale);
    Vec sums = set1(0.0f);
    for (i = begin; i < end; i += kLanes) {
      const Vec p = exp2<T>(fma(load(scores + i), set1(scale), set1(-largest)));
      sums = sums + p;
      store(weights + i, p);
    }
    if (largest > before) {  // the sums so far were in units of the old largest
      const float ratio = std::exp2(before - largest);
      float* o = w.o + row * w.o_stride;
      for (i = 0; i < w.o_stride; i += kLanes) store(o + i, load(o + i) * set1(ratio));
      w.total[row] *= ratio;
    }
    w.largest[row] = largest;
    w.total[row] += sum(sums);
  }

  // -inf in [begin, end) outside [first, last).
  static void hide(float* scores, int64_t begin, int64_t first, int64_t last, int64_t end) {
    for (; begin < first; begin += kLanes) store(scores + begin, keep_columns(load(scores + begin), begin, first, last));
    for (; end > last; end -= kLanes) store(scores + end - kLanes, keep_columns(load(scores + end - kLanes), end - kLanes, first, last));
  }

  // o += weights v
  void add_values(Span block) {
    for (int64_t at = 0; at < a.head_dim; at += kTileColumns) {
      const T* v = plan.packs.rows(plan.v, kv_head, at, s.packed + block.begin);
      for_strips(rows(), [&](int64_t r, auto count) {
        const Span keys = within(seen(r, count), block);
        if (keys.empty()) return;
        const int64_t first = (keys.begin - block.begin) / kUnit<T>, last = units_of<T>(keys.end - block.begin);
        add_product<T, count>(w.o + r * w.o_stride + at, w.o_stride, w.weights + r * kBlockKeys + first * kUnit<T>, kBlockKeys, kUnit<T>,
                              v + first * kUnit<T> * vectors_of(a.head_dim - at) * kLanes, last - first, a.head_dim - at);
      });
    }
  }

  void finish() {
    for (int64_t r = 0; r < rows(); r++) {
      const float total = w.total[r];
      const Vec scale = set1(total == 0.0f ? 0.0f : 1.0f / total);
      T* o = (T*)a.o + place(r) * a.head_dim;
      for_lanes(a.head_dim, [&](int64_t i, int n) { store_lanes(o + i, load(w.o + r * w.o_stride + i) * scale, n); });
      a.lse[place(r)] = total == 0.0f ? kNone : (w.largest[r] + std::log2(total)) * kLn2;
    }
  }
};

// One task's place in the call, the longest first.
struct Item {
  int64_t sequence, queries, kv_head, head_part, keys;
};

template <class T>
static void forward(const AttentionArgs& a, const Exec& exec) {
  const std::vector<Sequence> sequences = sequences_of(a);
  const Plan<T> plan(a, packed_keys(sequences), exec.workspace);
  check(exec.bytes_workspace >= plan.bytes, "attention_prefill", "workspace is too small", exec.bytes_workspace);
  const int threads = int(std::min<int64_t>(exec.threads, a.workers));
  for_panels(sequences, a.kv_heads, threads, [&](const Sequence& s, int64_t head, int64_t key, int64_t count) {
    const int64_t token = s.first_key + key;
    plan.packs.pack_columns_at(plan.k, head, s.packed + key, (const T*)a.k + token * a.k_stride + head * a.k_head_stride, a.k_stride, count);
    plan.packs.pack_rows_at(plan.v, head, s.packed + key, (const T*)a.v + token * a.v_stride + head * a.v_head_stride, a.v_stride, count);
  });
  const Cut cut(a);
  std::vector<Item> items;
  for (size_t n = 0; n < sequences.size(); n++)
    for (int64_t q = 0; q < sequences[n].queries; q += cut.queries)
      for (int64_t head = 0; head < a.kv_heads; head++)
        for (int64_t part = 0; part < cut.head_parts; part++) {
          const Span seen = sequences[n].seen(Span{q, std::min(q + cut.queries, sequences[n].queries)});
          items.push_back({int64_t(n), q, head, part, seen.end - seen.begin});
        }
  std::sort(items.begin(), items.end(), [](const Item& x, const Item& y) { return x.keys > y.keys; });
#pragma omp parallel num_threads(threads)
  {
    Workspace mine(plan.scratch + thread_number() * plan.bytes_scratch);
    const Scratch<T> scratch(mine, a.head_dim);
#pragma omp for schedule(dynamic, 1)
    for (size_t n = 0; n < items.size(); n++) {
      const Item& item = items[n];
      const Sequence& s = sequences[item.sequence];
      const int64_t first = item.head_part * cut.heads;
      Task<T> task{a, plan, s, item.kv_head, item.kv_head * cut.group + first, std::min(cut.heads, cut.group - first),
                   {item.queries, std::min(item.queries + cut.queries, s.queries)}, scratch};
      task.run();
    }
  }
}

}  // namespace

int64_t attention_prefill_fwd_workspace(const AttentionArgs& a) {
  check_attention(a);
  const int64_t keys = packed_keys(sequences_of(a));
  return a.dtype == DType::f32 ? Plan<float>(a, keys, nullptr).bytes : Plan<bf16>(a, keys, nullptr).bytes;
}

void attention_prefill_fwd(const AttentionArgs& a, const Exec& exec) {
  check_attention(a);
  return a.dtype == DType::f32 ? forward<float>(a, exec) : forward<bf16>(a, exec);
}

}  // namespace hebatron::HEBATRON_ISA_NAMESPACE
