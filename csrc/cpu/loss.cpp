// What      loss_t = logsumexp(z_t) - z_t[target_t] with z = x weight^T, and its gradients
//           dz = upstream * (softmax(z) - onehot(target)), grad_x = dz weight, grad_weight = dz^T x.
// Grid      512 entries of the vocabulary at a time, packed once for all threads. Forward: rows of x over the threads. Backward:
//           256 tokens at a time, dz by rows, then grad_x by rows and grad_weight by entries over the threads.
// Traffic   x once per 512 entries (from cache), weight once or twice, the gradients once.
// Roofline  compute: 2 * tokens * entries * width operations forward, 4 backward, and 2 more where z is made again.
// Measured  2026-12-01, Zen 3 with AVX2, `bench/bench_loss.py --only float32`, 1,024 x 192 x 8,192 in fp32: 68 % of the peak forward,
//           67 % with the backward, z kept.
// Limits    fp32 and bf16; logits, softmax and all sums in fp32, dz rounded to bf16 in front of its products; any sizes and row
//           strides. Memory beyond the results: 512 entries packed twice and their fp32 gradient, 256 tokens packed twice, an
//           fp32 grad_x; z whole where the caller keeps it.
// Why so    a whole block of logits never leaves the caches, and every sum has one order: a token's loss and grad_x by blocks
//           of entries, grad_weight by tokens. So a token's loss does not depend on the others, nothing on the threads.
#include "cpu/blocks.h"

namespace hebatron::HEBATRON_ISA_NAMESPACE {
namespace {

constexpr int64_t kEntries = 512, kTokens = 256;  // of a block; whole panels on every ISA
constexpr int64_t kRows = 48;                     // of x beside one another in a thread's L2, eight strips
constexpr int64_t kStepsStride = kEntries + kTileColumns;  // a power of two would put every step into the same lines of L1

// The tokens that count, in order, in the workspace.
struct Kept {
  int64_t count;
  const int64_t* tokens;
};

static inline Kept kept_tokens(const LossArgs& a, int64_t* tokens) {
  int64_t count = 0;
  for (int64_t t = 0; t < a.tokens; t++)
    if (a.targets[t * a.targets_stride] != a.ignore_index) tokens[count++] = t;
  return {count, tokens};
}

template <class T>
struct ForwardPlan {
  int64_t* tokens;
  T *weight, *x;  // panels of kEntries entries; kRows rows a thread
  float *z, *largest, *total, *target;
  int64_t x_stride, bytes;

  ForwardPlan(const LossArgs& a, void* base) : x_stride(padded_k<T>(a.width)) {
    Workspace w(base);
    tokens = w.take<int64_t>(a.tokens);
    weight = w.take<T>(kEntries * x_stride);
    x = w.take<T>(a.workers * kRows * x_stride);
    z = w.take<float>(a.workers * kTileRows * kEntries);
    largest = w.take<float>(a.tokens);
    total = w.take<float>(a.tokens);
    target = w.take<float>(a.tokens);
    bytes = w.bytes();
  }
};

// Entries [first, first + count) as panels of columns, for products over the width.
template <class T>
static void pack_entries(const LossArgs& a, T* to, int64_t first, int64_t count) {
#pragma omp for schedule(static)
  for (int64_t panel = 0; panel < panels_of(count); panel++) {
    const int64_t entry = panel * kTileColumns;
    pack_columns<T>(to + entry * padded_k<T>(a.width), (const T*)a.weight + (first + entry) * a.weight_stride, a.weight_stride, a.width,
                    std::min<int64_t>(kTileColumns, count - entry));
  }
}

constexpr int64_t kGradUnits = 128;

// acc = the logits of MR rows of x and a panel of entries. Each 256 steps are one chain of additions, and the chains are added,
// as in gemm.h.
template <class T, int MR>
HEBATRON_INLINE void logits_of(Vec (&acc)[MR][kTileVectors], const T* x, const T* panel, int64_t width) {
  constexpr int64_t kChainUnits = 256;
  const int64_t units = units_of<T>(width);
  clear(acc);
  tile<T>(acc, x, padded_k<T>(width), kUnit<T>, panel, std::min(units, kChainUnits));
  for (int64_t u = kChainUnits; u < units; u += kChainUnits) {
    float sums[MR][kTileColumns];
    HEBATRON_UNROLL for (int i = 0; i < MR; i++) HEBATRON_UNROLL for (int j = 0; j < kTileVectors; j++) store(sums[i] + j * kLanes, acc[i][j]);
    clear(acc);
    tile<T>(acc, x + u * kUnit<T>, padded_k<T>(width), kUnit<T>, panel + u * kTileColumns * kUnit<T>, std::min(units - u, kChainUnits));
    HEBATRON_UNROLL for (int i = 0; i < MR; i++) HEBATRON_UNROLL for (int j = 0; j < kTileVectors; j++)
      acc[i][j] = load(sums[i] + j * kLanes) + acc[i][j];
  }
}

// z of MR rows of x against the packed entries.
template <class T, int MR>
static void logits(const T* x, int64_t width, const T* weight, int64_t panels, float* z, int64_t z_stride) {
  for (int64_t panel = 0; panel < panels; panel++) {
    Vec acc[MR][kTileVectors];
    logits_of<T>(acc, x, weight + panel * kTileColumns * padded_k<T>(width), width);
    HEBATRON_UNROLL for (int i = 0; i < MR; i++) HEBATRON_UNROLL for (int j = 0; j < kTileVectors; j++)
      store(z + i * z_stride + panel * kTileColumns + j * kLanes, acc[i][j]);
  }
}

// Takes `count` logits of one token into its running largest and total.
static void add_logits(const float* z, int64_t count, float& largest, float& total) {
  Vec top = set1(kNone);
  for_lanes(count, [&](int64_t i, int n) { top = max(top, keep_columns(load(z + i), 0, 0, n)); });
  const float before = largest;
  largest = std::max(before, highest(top));
  Vec sums = set1(0.0f);
  for_lanes(count, [&](int64_t i, int n) {
    sums = sums + exp2<float>((keep_columns(load(z + i), 0, 0, n) - set1(largest)) * set1(kLog2E));
  });
  total = total * (largest > before ? std::exp2((before - largest) * kLog2E) : 1.0f) + sum(sums);
}

template <class T>
static void forward(const LossArgs& a, const Exec& exec) {
  const ForwardPlan<T> plan(a, exec.workspace);
  check(exec.bytes_workspace >= plan.bytes, "linear_cross_entropy", "workspace is too small", exec.bytes_workspace);
  const Kept kept = kept_tokens(a, plan.tokens);
  for (int64_t t = 0; t < a.tokens; t++) a.losses[t] = a.lse[t] = 0.0f;
  for (int64_t n = 0; n < kept.count; n++) plan.largest[n] = kNone, plan.total[n] = 0.0f, plan.target[n] = std::nanf("");
#pragma omp parallel num_threads(int(std::min<int64_t>(exec.threads, a.workers)))
  {
    T* x = plan.x + thread_number() * kRows * plan.x_stride;
    float* own_z = plan.z + thread_number() * kTileRows * kEntries;
    const int64_t z_stride = a.z ? a.z_stride : kEntries;
    for (int64_t first = 0; first < a.entries; first += kEntries) {
      const int64_t count = std::min(kEntries, a.entries - first);
      pack_entries(a, plan.weight, first, count);  // ends with a barrier
#pragma omp for schedule(static)
      for (int64_t block = 0; block < (kept.count + kRows - 1) / kRows; block++) {
        const int64_t begin = block * kRows, rows = std::min(kRows, kept.count - begin);
        for (int64_t r = 0; r < rows; r++) copy_row(x + r * plan.x_stride, (const T*)a.x + kept.tokens[begin + r] * a.x_stride, a.width);
        for_strips(rows, [&](int64_t r, auto strip) {
          float* z = a.z ? a.z + (begin + r) * z_stride + first : own_z;
          logits<T, strip>(x + r * plan.x_stride, a.width, plan.weight, panels_of(count), z, z_stride);
          for (int64_t i = 0; i < strip; i++) {
            const int64_t n = begin + r + i, target = a.targets[kept.tokens[n] * a.targets_stride] - first;
            if (target >= 0 && target < count) plan.target[n] = z[i * z_stride + target];
            add_logits(z + i * z_stride, count, plan.largest[n], plan.total[n]);
          }
        });
      }
    }
#pragma omp for schedule(static)
    for (int64_t n = 0; n < kept.count; n++) {
      const float largest = plan.largest[n], log_total = std::log(plan.total[n]);
      a.lse[kept.tokens[n]] = largest + log_total;
      // the difference first: where the target is the largest it is 0, and log_total keeps the digits that lse has lost
      a.losses[kept.tokens[n]] = (largest - plan.target[n]) + log_total;
    }
    if (a.z) {  // what no panel wrote, so that equal inputs give equal results
      const int64_t written = panels_of(a.entries) * kTileColumns;
#pragma omp for schedule(static)
      for (int64_t n = 0; n < a.tokens; n++)
        std::fill(a.z + n * a.z_stride + (n < kept.count ? written : 0), a.z + (n + 1) * a.z_stride, 0.0f);
    }
  }
}

template <class T>
struct BackwardPlan {
  int64_t* tokens;
  T *weight, *weight_rows;  // kEntries entries as columns, and as rows
  T *x, *x_rows;            // kTokens tokens as left operands, and as rows
  T *dz, *dz_steps;         // kTokens rows of kEntries, and by steps of tokens: see store_steps
  float *grad_x, *grad_weight;  // every token that counts; kEntries entries
  int64_t x_stride, columns, bytes;

  BackwardPlan(const LossArgs& a, void* base) : x_stride(padded_k<T>(a.width)), columns(padded_columns(a.width)) {
    Workspace w(base);
    tokens = w.take<int64_t>(a.tokens);
    weight = w.take<T>(kEntries * x_stride);
    weight_rows = w.take<T>(kEntries * columns);
    x = w.take<T>(kTokens * x_stride);
    x_rows = w.take<T>(kTokens * columns);
    dz = w.take<T>(kTokens * kStepsStride);
    dz_steps = kUnit<T> == 1 ? dz : w.take<T>(kTokens * kStepsStride);
    grad_x = w.take<float>(a.tokens * columns);
    grad_weight = w.take<float>(kEntries * columns);
    bytes = w.bytes();
  }
};

// One block of entries against one block of tokens; every function is entered by all threads and ends with a barrier.
template <class T>
struct Block {
  const LossBwdArgs& b;
  const BackwardPlan<T>& plan;
  Kept kept;
  int64_t first, count;  // entries
  int64_t begin, rows;   // of the tokens that count
  const LossArgs& a = b.forward;

  void load_tokens() const {
#pragma omp for schedule(static)
    for (int64_t r = 0; r < rows; r++) copy_row(plan.x + r * plan.x_stride, (const T*)a.x + kept.tokens[begin + r] * a.x_stride, a.width);
#pragma omp for schedule(static)
    for (int64_t at = 0; at < a.width; at += kTileColumns) {
      const int64_t columns = std::min<int64_t>(kTileColumns, a.width - at);
      pack_row_panels<T>(plan.x_rows + at * kTokens, kTokens, 0, plan.x + at, plan.x_stride, rows, columns);
    }
  }

  void differentiate() const {
    const int64_t strips = (rows + kTileRows - 1) / kTileRows;
#pragma omp for schedule(static)
    for (int64_t strip = 0; strip < strips; strip++) {
      const int64_t at = strip * kTileRows;
      for_strips(std::min<int64_t>(kTileRows, rows - at), [&](int64_t, auto count) { differentiate<count>(at); });
    }
  }

  // dz of MR tokens: upstream * (exp(z - lse) - onehot), 0 behind the last entry.
  template <int MR>
  void differentiate(int64_t r) const {
    for (int64_t panel = 0; panel < panels_of(count); panel++) {
      Vec acc[MR][kTileVectors];
      if (a.z) {
        const float* z = a.z + (begin + r) * a.z_stride + first + panel * kTileColumns;
        HEBATRON_UNROLL for (int i = 0; i < MR; i++) HEBATRON_UNROLL for (int j = 0; j < kTileVectors; j++)
          acc[i][j] = load(z + i * a.z_stride + j * kLanes);
      } else {
        logits_of<T>(acc, plan.x + r * plan.x_stride, plan.weight + panel * kTileColumns * plan.x_stride, a.width);
      }
      float dz[MR + 1][kTileColumns];  // one more row: an odd last token has a pair of zeros
      for (float& value : dz[MR]) value = 0.0f;
      HEBATRON_UNROLL for (int i = 0; i < MR; i++) {
        const int64_t token = kept.tokens[begin + r + i];
        const Vec lse = set1(a.lse[token]), upstream = set1(b.upstream[token]);
        HEBATRON_UNROLL for (int j = 0; j < kTileVectors; j++) {
          const int64_t column = panel * kTileColumns + j * kLanes;
          store(dz[i] + j * kLanes, exp2<float>((keep_columns(acc[i][j], column, 0, count) - lse) * set1(kLog2E)) * upstream);
        }
        const int64_t target = a.targets[token * a.targets_stride] - first - panel * kTileColumns;
        if (target >= 0 && target < kTileColumns) dz[i][target] -= b.upstream[token];
      }
      write<MR>(r, panel * kTileColumns, dz);
    }
  }

  template <int MR>
  void write(int64_t r, int64_t column, float (&dz)[MR + 1][kTileColumns]) const {
    for (int j = 0; j < kTileColumns; j += kLanes) {
      for (int i = 0; i < MR; i++) store(plan.dz + (r + i) * kStepsStride + column + j, load(dz[i] + j));
      if constexpr (kUnit<T> == 2)
        for (int i = 0; i < MR; i += 2)
          store_steps(plan.dz_steps + (r + i) * kStepsStride + (column + j) * kUnit<T>, kStepsStride, load(dz[i] + j), load(dz[i + 1] + j));
    }
  }

  void add_grad_x() const {
#pragma omp for schedule(static) collapse(2)
    for (int64_t panel = 0; panel < panels_of(a.width); panel++)
      for (int64_t at = 0; at < rows; at += kRows) {
        const int64_t column = panel * kTileColumns, step = vectors_of(a.width - column) * kLanes * kUnit<T>, units = units_of<T>(count);
        for_strips(std::min(kRows, rows - at), [&](int64_t r, auto count_rows) {
          for (int64_t u = 0; u < units; u += kGradUnits)  // short chains: a target's large term stands among many small ones
            add_product<T, count_rows>(plan.grad_x + (begin + at + r) * plan.columns + column, plan.columns,
                                       plan.dz + (at + r) * kStepsStride + u * kUnit<T>, kStepsStride, kUnit<T>,
                                       plan.weight_rows + column * kEntries + u * step, std::min(kGradUnits, units - u), a.width - column);
        });
      }
  }

  void add_grad_weight() const {
#pragma omp for schedule(static) collapse(2)
    for (int64_t panel = 0; panel < panels_of(a.width); panel++)
      for (int64_t at = 0; at < count; at += kRows) {
        const int64_t column = panel * kTileColumns;
        for_strips(std::min(kRows, count - at), [&](int64_t r, auto entries) {
          add_product<T, entries>(plan.grad_weight + (at + r) * plan.columns + column, plan.columns, plan.dz_steps + (at + r) * kUnit<T>,
                                  kUnit<T>, kStepsStride * kUnit<T>, plan.x_rows + column * kTokens, units_of<T>(rows), a.width - column);
        });
      }
  }
};

// Entries [first, first + count) as rows, for products over entries.
template <class T>
static void pack_entry_rows(const LossArgs& a, T* to, int64_t first, int64_t count) {
#pragma omp for schedule(static)
  for (int64_t at = 0; at < a.width; at += kTileColumns) {
    const int64_t columns = std::min<int64_t>(kTileColumns, a.width - at);
    pack_row_panels<T>(to + at * kEntries, kEntries, 0, (const T*)a.weight + first * a.weight_stride + at, a.weight_stride, count, columns);
  }
}

// fp32 rows of whole panels become rows of the result; with `tokens`, row r becomes row tokens[r].
template <class T>
static void write_rows(T* to, const float* from, int64_t rows, int64_t width, const int64_t* tokens) {
#pragma omp for schedule(static)
  for (int64_t r = 0; r < rows; r++)
    for_lanes(width, [&](int64_t i, int n) {
      store_lanes(to + (tokens ? tokens[r] : r) * width + i, load(from + r * padded_columns(width) + i), n);
    });
}

template <class T>
static void backward(const LossBwdArgs& b, const Exec& exec) {
  const LossArgs& a = b.forward;
  const BackwardPlan<T> plan(a, exec.workspace);
  check(exec.bytes_workspace >= plan.bytes, "linear_cross_entropy", "workspace is too small", exec.bytes_workspace);
  const Kept kept = kept_tokens(a, plan.tokens);
  if (a.tokens) std::memset(b.grad_x, 0, size_t(a.tokens * a.width) * sizeof(T));
  std::memset(plan.grad_x, 0, size_t(kept.count * plan.columns) * sizeof(float));
#pragma omp parallel num_threads(int(std::min<int64_t>(exec.threads, a.workers)))
  {
    for (int64_t first = 0; first < a.entries; first += kEntries) {
      const int64_t count = std::min(kEntries, a.entries - first);
      if (!a.z) pack_entries(a, plan.weight, first, count);
      pack_entry_rows(a, plan.weight_rows, first, count);
#pragma omp for schedule(static)
      for (int64_t i = 0; i < count * plan.columns; i += kLanes) store(plan.grad_weight + i, set1(0.0f));
      for (int64_t begin = 0; begin < kept.count; begin += kTokens) {
        const Block<T> block = {b, plan, kept, first, count, begin, std::min(kTokens, kept.count - begin)};
        block.load_tokens();
        block.differentiate();
        block.add_grad_x();
        block.add_grad_weight();
      }
      write_rows((T*)b.grad_weight + first * a.width, plan.grad_weight, count, a.width, nullptr);
    }
    write_rows((T*)b.grad_x, plan.grad_x, kept.count, a.width, kept.tokens);
  }
}

static void check_args(const LossArgs& a) {
  const char* op = "linear_cross_entropy";
  check(a.tokens >= 0, op, "tokens must be >= 0", a.tokens);
  check(a.entries > 0, op, "entries must be > 0", a.entries);
  check(a.width > 0, op, "width must be > 0", a.width);
  check(a.workers > 0, op, "workers must be > 0", a.workers);
  check(!a.z || a.z_stride >= round_up(a.entries, kTileColumns), op, "z_stride must hold whole panels of entries", a.z_stride);
}

}  // namespace

int64_t linear_cross_entropy_fwd_workspace(const LossArgs& a) {
  check_args(a);
  return a.dtype == DType::f32 ? ForwardPlan<float>(a, nullptr).bytes : ForwardPlan<bf16>(a, nullptr).bytes;
}

void linear_cross_entropy_fwd(const LossArgs& a, const Exec& exec) {
  check_args(a);
  return a.dtype == DType::f32 ? forward<float>(a, exec) : forward<bf16>(a, exec);
}

int64_t linear_cross_entropy_bwd_workspace(const LossBwdArgs& b) {
  check_args(b.forward);
  return b.forward.dtype == DType::f32 ? BackwardPlan<float>(b.forward, nullptr).bytes : BackwardPlan<bf16>(b.forward, nullptr).bytes;
}

void linear_cross_entropy_bwd(const LossBwdArgs& b, const Exec& exec) {
  check_args(b.forward);
  return b.forward.dtype == DType::f32 ? backward<float>(b, exec) : backward<bf16>(b, exec);
}

}  // namespace hebatron::HEBATRON_ISA_NAMESPACE
