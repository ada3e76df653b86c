// What attention's forward and backward share: which keys a query sees, and the packed keys and values.
#pragma once
#include <vector>

#include "cpu/blocks.h"

namespace hebatron::HEBATRON_ISA_NAMESPACE {
namespace {

struct Span {
  int64_t begin, end;
  bool empty() const { return begin >= end; }
};
static inline Span within(Span a, Span b) { return {std::max(a.begin, b.begin), std::min(a.end, b.end)}; }

// One sequence of a call; its keys are counted from its own start, so that no result depends on what it is packed with.
struct Sequence {
  int64_t first_query, queries, first_key, keys;
  int64_t packed;  // where its keys begin among the packed ones: whole panels each
  bool causal;
  int64_t window;

  // The keys that query i sees; both ends rise with i. The last query stands at the last key.
  Span seen(int64_t i) const {
    if (!causal) return {0, keys};
    const int64_t end = std::clamp<int64_t>(keys - queries + i + 1, 0, keys);
    return {std::max<int64_t>(0, keys - queries + i + 1 - window), end};
  }
  // The keys that any of these queries sees.
  Span seen(Span i) const { return {seen(i.begin).begin, seen(i.end - 1).end}; }
  // The queries that see any of these keys.
  Span seeing(Span j) const {
    if (!causal) return {0, queries};
    const int64_t shift = keys - queries;
    return {std::clamp<int64_t>(j.begin - shift, 0, queries), std::clamp<int64_t>(j.end - 1 - shift + window, 0, queries)};
  }
};

static inline std::vector<Sequence> sequences_of(const AttentionArgs& a) {
  std::vector<Sequence> found;
  int64_t packed = 0;
  for (int64_t n = 0; n < a.sequences; n++) {
    const int64_t q = a.cu_seqlens_q[n], k = a.cu_seqlens_k[n];
    const Sequence s = {q, a.cu_seqlens_q[n + 1] - q, k, a.cu_seqlens_k[n + 1] - k, packed, a.causal, a.window};
    if (s.queries > 0) {
      found.push_back(s);
      packed += round_up(s.keys, kTileColumns);
    }
  }
  return found;
}
static inline int64_t packed_keys(const std::vector<Sequence>& sequences) {
  return sequences.empty() ? 0 : sequences.back().packed + round_up(sequences.back().keys, kTileColumns);
}

// Packed keys or values of every kv head. Columns: panels of kTileColumns tokens, for products over the head's elements.
// Rows: for each panel of the head's elements all tokens, for products over tokens.
template <class T>
struct Packs {
  int64_t keys, dim;
  int64_t columns_elements() const { return keys * padded_k<T>(dim); }
  int64_t rows_elements() const { return keys * padded_columns(dim); }
  T* columns(T* base, int64_t head, int64_t key) const { return base + (head * keys + key) * padded_k<T>(dim); }
  T* rows(T* base, int64_t head, int64_t column, int64_t key) const {  // of the panel that begins at `column`
    return base + head * rows_elements() + column * keys + key * vectors_of(dim - column) * kLanes;
  }

  // `count` tokens at `from` become the panel (columns) or the steps (rows) at packed key `key`.
  void pack_columns_at(T* base, int64_t head, int64_t key, const T* from, int64_t stride, int64_t count) const {
    pack_columns<T>(columns(base, head, key), from, stride, dim, count);
  }
  void pack_rows_at(T* base, int64_t head, int64_t key, const T* from, int64_t stride, int64_t count) const {
    pack_row_panels<T>(base + head * rows_elements(), keys, key, from, stride, count, dim);
  }
};

// Calls body(sequence, kv head, first key, keys) for every panel of every sequence's keys, on all threads.
template <class Body>
static void for_panels(const std::vector<Sequence>& sequences, int64_t kv_heads, int threads, const Body& body) {
  const int64_t panels = packed_keys(sequences) / kTileColumns;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t n = 0; n < panels * kv_heads; n++) {
    const int64_t packed = n / kv_heads * kTileColumns;
    auto after = std::upper_bound(sequences.begin(), sequences.end(), packed, [](int64_t p, const Sequence& s) { return p < s.packed; });
    const Sequence& s = *std::prev(after);
    const int64_t key = packed - s.packed;
    body(s, n % kv_heads, key, std::min<int64_t>(kTileColumns, s.keys - key));
  }
}

static inline void check_attention(const AttentionArgs& a) {
  const char* op = "attention_prefill";
  check(a.tokens_q >= 0, op, "tokens_q must be >= 0", a.tokens_q);
  check(a.tokens_k >= 0, op, "tokens_k must be >= 0", a.tokens_k);
  check(a.head_dim > 0, op, "head_dim must be > 0", a.head_dim);
  check(a.kv_heads > 0 && a.heads > 0 && a.heads % a.kv_heads == 0, op, "kv_heads must divide the heads", a.kv_heads);
  check(a.window > 0 && a.window <= a.tokens_q + a.tokens_k + 1, op, "window must be in [1, tokens_q + tokens_k + 1]", a.window);
  check(a.workers > 0, op, "workers must be > 0", a.workers);
  check(a.sequences >= 0, op, "sequences must be >= 0", a.sequences);
  check(a.cu_seqlens_q[0] == 0 && a.cu_seqlens_q[a.sequences] == a.tokens_q, op, "cu_seqlens_q must end with tokens_q", a.cu_seqlens_q[a.sequences]);
  check(a.cu_seqlens_k[0] == 0 && a.cu_seqlens_k[a.sequences] == a.tokens_k, op, "cu_seqlens_k must end with tokens_k", a.cu_seqlens_k[a.sequences]);
  for (int64_t n = 0; n < a.sequences; n++) {
    check(a.cu_seqlens_q[n] <= a.cu_seqlens_q[n + 1], op, "cu_seqlens_q must rise", a.cu_seqlens_q[n + 1]);
    check(a.cu_seqlens_k[n] <= a.cu_seqlens_k[n + 1], op, "cu_seqlens_k must rise", a.cu_seqlens_k[n + 1]);
  }
}

}  // namespace
}  // namespace hebatron::HEBATRON_ISA_NAMESPACE
