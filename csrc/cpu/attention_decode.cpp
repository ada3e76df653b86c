// What      one new key and value per sequence into its pages, then o = softmax(scale q k^T) v over them, one query token each.
// Grid      one task per (sequence, kv head, 256 keys): all heads of the group against keys and values read once. The parts of
//           a sequence are then put together, one task per (sequence, kv head).
// Traffic   every key and value that is seen, once.
// Roofline  DRAM: 2 * keys * kv_heads * head_dim elements; 4 * heads * keys * head_dim operations are as slow at 16 heads a
//           kv head and 30 GB/s.
// Measured  2026-11-28, Zen 4, 2 threads, bf16, 32 q / 2 kv heads of 128, alone and cold: 8,192 keys 1.6 ms, 15 % of a plain
//           read, 3.1x the torch form; 8 sequences of 2,048 7.2x. Within a layer's step it is faster. bench/bench_attention.py.
// Limits    as attention_prefill; pages of any size and strides. Beyond the results: a part's fp32 sums, 0.2 MB a thread.
// Why so    keys are rows of the left operand, broadcast as they lie in the pages, and the heads are lanes: no key is
//           transposed and the softmax runs over lanes side by side. Parts are counted from token 0, so a sequence's result does
//           not depend on its neighbours.
#include <vector>

#include "cpu/blocks.h"
#include "cpu/team.h"

namespace hebatron::HEBATRON_ISA_NAMESPACE {
namespace {

constexpr int64_t kPartKeys = 256;

template <class T>
struct Scratch {
  T* q;           // panels of heads
  T* keys;        // a part's keys, a left operand
  T* values;      // a part's values, a panel of steps per kTileColumns elements of the head
  float* scores;  // kPartKeys, heads
  T* weights;     // steps of keys, heads
  float* o;       // heads, columns
  float *largest, *total;

  Scratch(Workspace& w, int64_t heads, int64_t dim) {
    const int64_t columns = padded_columns(heads);
    q = w.take<T>(columns * padded_k<T>(dim));
    keys = w.take<T>(kPartKeys * padded_k<T>(dim));
    values = w.take<T>(kPartKeys * padded_columns(dim));
    scores = w.take<float>(kPartKeys * columns);
    weights = w.take<T>(kPartKeys * columns);
    o = w.take<float>(heads * padded_columns(dim));
    largest = w.take<float>(columns);
    total = w.take<float>(columns);
  }
};

// One part of one sequence: keys [begin, end).
struct Part {
  int64_t sequence, begin, end;
};

static inline std::vector<Part> parts_of(const AttentionDecodeArgs& a) {
  std::vector<Part> parts;
  for (int64_t n = 0; n < a.sequences; n++) {
    const int64_t end = int64_t(a.lengths[n]) + 1, begin = std::max<int64_t>(0, end - a.window);
    for (int64_t at = begin; at < end; at = (at / kPartKeys + 1) * kPartKeys)
      parts.push_back({n, at, std::min(end, (at / kPartKeys + 1) * kPartKeys)});
  }
  return parts;
}

// A part's results: for each head of a kv head the largest score (base 2), the total, and the sum of weighted values.
struct Partial {
  float *largest, *total, *o;
};

template <class T>
struct Plan {
  int64_t group, columns, bytes_scratch, bytes;
  float* partials;
  char* scratch;

  Plan(const AttentionDecodeArgs& a, int64_t parts, void* base) : group(a.heads / a.kv_heads), columns(padded_columns(a.head_dim)) {
    Workspace counted(nullptr);
    Scratch<T>(counted, group, a.head_dim);
    bytes_scratch = counted.bytes();
    Workspace w(base);
    partials = w.take<float>(parts * a.kv_heads * group * (columns + 2));
    scratch = w.take<char>(a.workers * bytes_scratch);
    bytes = w.bytes();
  }
  Partial partial(int64_t n) const {
    float* base = partials + n * group * (columns + 2);
    return {base, base + group, base + 2 * group};
  }
};

template <class T>
struct Task {
  const AttentionDecodeArgs& a;
  const Plan<T>& plan;
  Part part;
  int64_t kv_head;
  Scratch<T> w;
  int64_t dim = a.head_dim, k_stride = padded_k<T>(a.head_dim), lanes = padded_columns(plan.group), count = part.end - part.begin;

  const T* row(const void* base, int64_t position) const {
    const int64_t block = a.block_table[part.sequence * a.max_blocks + position / a.block_size];
    return (const T*)base + block * a.block_stride + position % a.block_size * a.row_stride + kv_head * a.head_stride;
  }

  void run(Partial to) {
    for (int64_t t = 0; t < count; t++) copy_row(w.keys + t * k_stride, row(a.keys, part.begin + t), dim);
    const T* q = (const T*)a.q + part.sequence * a.q_stride + kv_head * plan.group * a.q_head_stride;
    for (int64_t head = 0; head < plan.group; head += kTileColumns) {
      const int64_t heads = std::min<int64_t>(kTileColumns, plan.group - head);
      T* panel = w.q + head * k_stride;
      pack_columns<T>(panel, q + head * a.q_head_stride, a.q_head_stride, dim, heads, vectors_of(heads));
      switch (vectors_of(heads)) {
        case 1: score<1>(panel, head); break;
        case 2: score<2>(panel, head); break;
        case 3: score<3>(panel, head); break;
        default: score<4>(panel, head);
      }
    }
    for (int64_t head = 0; head < plan.group; head += kLanes) weigh(head, to);
    std::memset(to.o, 0, size_t(plan.group * plan.columns) * sizeof(float));
    for (int64_t at = 0; at < dim; at += kTileColumns) {
      T* values = w.values + at * kPartKeys;
      pack_rows<T>(values, [&](int64_t t) { return row(a.values, part.begin + t) + at; }, count, std::min<int64_t>(kTileColumns, dim - at),
                   vectors_of(dim - at));
      for_strips(plan.group, [&](int64_t r, auto heads) {
        add_product<T, heads>(to.o + r * plan.columns + at, plan.columns, w.weights + r * kUnit<T>, kUnit<T>, lanes * kUnit<T>, values,
                              units_of<T>(count), dim - at);
      });
    }
  }

  // scores (a row per key, heads from `head` on as lanes) = k q^T
  template <int NV>
  void score(const T* panel, int64_t head) {
    for_strips(count, [&](int64_t r, auto keys) {
      constexpr int kRows = decltype(keys)::value;
      Vec acc[kRows][NV];
      clear(acc);
      tile<T>(acc, w.keys + r * k_stride, k_stride, kUnit<T>, panel, units_of<T>(dim));
      HEBATRON_UNROLL for (int i = 0; i < kRows; i++) HEBATRON_UNROLL for (int j = 0; j < NV; j++)
        store(w.scores + (r + i) * lanes + head + j * kLanes, acc[i][j]);
    });
  }

  // Softmax over the part's keys of the kLanes heads from `head` on, each in its lane.
  void weigh(int64_t head, Partial to) {
    const Vec scale = set1(float(a.scale) * kLog2E);
    Vec top = set1(kNone), total = set1(0.0f);
    for (int64_t t = 0; t < count; t++) top = max(top, load(w.scores + t * lanes + head));
    top = top * scale;
    auto weight = [&](int64_t t) { return exp2<T>(fma(load(w.scores + t * lanes + head), scale, set1(0.0f) - top)); };
    for (int64_t t = 0; t < count; t += 2) {
      const Vec first = weight(t), second = t + 1 < count ? weight(t + 1) : set1(0.0f);
      total = total + first;
      total = total + second;
      store_steps(w.weights + (t * lanes + head * kUnit<T>), lanes, first, second);
    }
    const int filled = int(std::min<int64_t>(kLanes, plan.group - head));
    store_lanes(to.largest + head, top, filled);
    store_lanes(to.total + head, total, filled);
  }
};

// o of one sequence and kv head from its parts, in their order.
template <class T>
static void combine(const AttentionDecodeArgs& a, const Plan<T>& plan, int64_t sequence, int64_t kv_head, int64_t first, int64_t end) {
  for (int64_t head = 0; head < plan.group; head++) {
    float largest = kNone, total = 0.0f;
    for (int64_t n = first; n < end; n++) largest = std::max(largest, plan.partial(n * a.kv_heads + kv_head).largest[head]);
    float* sums = plan.partial(first * a.kv_heads + kv_head).o + head * plan.columns;
    for (int64_t n = first; n < end; n++) {
      const Partial part = plan.partial(n * a.kv_heads + kv_head);
      const float ratio = std::exp2(part.largest[head] - largest);
      total += part.total[head] * ratio;
      const float* from = part.o + head * plan.columns;
      for (int64_t i = 0; i < plan.columns; i += kLanes) {
        const Vec scaled = load(from + i) * set1(ratio);
        store(sums + i, n == first ? scaled : load(sums + i) + scaled);
      }
    }
    T* o = (T*)a.o + (sequence * a.heads + kv_head * plan.group + head) * a.head_dim;
    for_lanes(a.head_dim, [&](int64_t i, int n) { store_lanes(o + i, load(sums + i) * set1(1.0f / total), n); });
  }
}

template <class T>
static void write_new(const AttentionDecodeArgs& a) {
  for (int64_t n = 0; n < a.sequences; n++) {
    const int64_t block = a.block_table[n * a.max_blocks + a.lengths[n] / a.block_size];
    const int64_t to = block * a.block_stride + a.lengths[n] % a.block_size * a.row_stride;
    for (int64_t head = 0; head < a.kv_heads; head++) {
      const T* k = (const T*)a.k_new + n * a.k_new_stride + head * a.k_new_head_stride;
      const T* v = (const T*)a.v_new + n * a.v_new_stride + head * a.v_new_head_stride;
      std::memcpy((void*)((T*)a.keys + to + head * a.head_stride), k, size_t(a.head_dim) * sizeof(T));
      std::memcpy((void*)((T*)a.values + to + head * a.head_stride), v, size_t(a.head_dim) * sizeof(T));
    }
  }
}

template <class T>
static void decode_part(const AttentionDecodeArgs& a, const Plan<T>& plan, const std::vector<Part>& parts, int64_t n, int64_t thread) {
  Workspace mine(plan.scratch + thread * plan.bytes_scratch);
  const Scratch<T> scratch(mine, plan.group, a.head_dim);
  Task<T>{a, plan, parts[n / a.kv_heads], n % a.kv_heads, scratch}.run(plan.partial(n));
}

// The parts that task n begins are put together, where it begins a sequence and a kv head.
template <class T>
static void join_part(const AttentionDecodeArgs& a, const Plan<T>& plan, const std::vector<Part>& parts, int64_t n) {
  const int64_t first = n / a.kv_heads, sequence = parts[first].sequence;
  if (first > 0 && parts[first - 1].sequence == sequence) return;
  int64_t end = first;
  while (end < int64_t(parts.size()) && parts[end].sequence == sequence) end++;
  combine(a, plan, sequence, n % a.kv_heads, first, end);
}

template <class T>
static void decode(const AttentionDecodeArgs& a, const Exec& exec) {
  const std::vector<Part> parts = parts_of(a);
  const Plan<T> plan(a, int64_t(parts.size()), exec.workspace);
  check(exec.bytes_workspace >= plan.bytes, "attention_decode", "workspace is too small", exec.bytes_workspace);
  write_new<T>(a);  // before any read: sequences may share blocks
  const int64_t tasks = int64_t(parts.size()) * a.kv_heads;
  const int threads = int(std::min({int64_t(exec.threads), a.workers, std::max<int64_t>(1, tasks)}));
#pragma omp parallel num_threads(threads)
  {
#pragma omp for schedule(dynamic, 1)
    for (int64_t n = 0; n < tasks; n++) decode_part(a, plan, parts, n, thread_number());
#pragma omp for schedule(static)
    for (int64_t n = 0; n < tasks; n++) join_part(a, plan, parts, n);
  }
}

template <class T>
static void decode_member(const AttentionDecodeArgs& a, void* workspace, AttentionDecodePhase phase, int64_t id, int64_t count) {
  if (phase == AttentionDecodePhase::write) {
    if (id == 0) write_new<T>(a);
    return;
  }
  const std::vector<Part> parts = parts_of(a);
  const Plan<T> plan(a, int64_t(parts.size()), workspace);
  for (int64_t n = id; n < int64_t(parts.size()) * a.kv_heads; n += count)
    phase == AttentionDecodePhase::parts ? decode_part(a, plan, parts, n, id) : join_part(a, plan, parts, n);
}

static void check_args(const AttentionDecodeArgs& a) {
  const char* op = "attention_decode";
  check(a.sequences >= 0, op, "sequences must be >= 0", a.sequences);
  check(a.head_dim > 0, op, "head_dim must be > 0", a.head_dim);
  check(a.kv_heads > 0 && a.heads > 0 && a.heads % a.kv_heads == 0, op, "kv_heads must divide the heads", a.kv_heads);
  check(a.block_size > 0 || a.sequences == 0, op, "block_size must be > 0", a.block_size);
  check(a.window > 0, op, "window must be > 0", a.window);
  check(a.workers > 0, op, "workers must be > 0", a.workers);
  for (int64_t n = 0; n < a.sequences; n++)
    check(a.lengths[n] >= 0 && a.lengths[n] < a.max_blocks * a.block_size, op, "lengths must lie in the blocks", a.lengths[n]);
}

}  // namespace

int64_t attention_decode_workspace(const AttentionDecodeArgs& a) {
  check_args(a);
  const int64_t parts = int64_t(parts_of(a).size());
  return a.dtype == DType::f32 ? Plan<float>(a, parts, nullptr).bytes : Plan<bf16>(a, parts, nullptr).bytes;
}

void attention_decode(const AttentionDecodeArgs& a, const Exec& exec) {
  check_args(a);
  return a.dtype == DType::f32 ? decode<float>(a, exec) : decode<bf16>(a, exec);
}

void attention_decode_member(const AttentionDecodeArgs& a, void* workspace, AttentionDecodePhase phase, int64_t id, int64_t count) {
  a.dtype == DType::f32 ? decode_member<float>(a, workspace, phase, id, count) : decode_member<bf16>(a, workspace, phase, id, count);
}

}  // namespace hebatron::HEBATRON_ISA_NAMESPACE
