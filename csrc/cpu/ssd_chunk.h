// What ssd_scan.cpp and ssd_scan_bwd.cpp share: the steps and decays of one head in one chunk, and how its operands are
// packed for tile.h. A chunk holds at most kChunk tokens of one sequence, counted from that sequence's start.
#pragma once
#include <algorithm>
#ifdef _OPENMP
#include <omp.h>
#endif

#include "cpu/tile.h"

namespace hebatron::HEBATRON_ISA_NAMESPACE {
namespace {

constexpr int64_t kChunk = 64;       // 64 / 128 / 256 tokens: 30.8 / 33.7 / 40.2 ms in a sketch at 64 x 64 heads, state 128
constexpr int64_t kDecayBlock = 16;  // rows whose decays to earlier blocks are products of two exponentials

static inline int this_worker() {
#ifdef _OPENMP
  return omp_get_thread_num();
#else
  return 0;
#endif
}

// Hands out parts of a buffer, each on its own cache lines. From a null base it only counts.
struct Carver {
  char* base;
  int64_t bytes = 0;
  template <class E>
  E* take(int64_t count) {
    E* found = base ? (E*)(base + bytes) : nullptr;
    bytes += (count * int64_t(sizeof(E)) + 63) / 64 * 64;
    return found;
  }
};

// to[i] = e^log_decay(i), `count` (whole vectors) of them. The logs come in fp64, and what their rounding to fp32 drops is
// put back: at -5 it is 3e-7 of the decay, which grad_A would show. 0 below e^-87, where exp() would stay at 1.6e-38 and a
// step of 1e38 would see it. NaN stays.
template <class Log>
static void decays_of(float* to, int64_t count, const Log& log_decay) {
  alignas(64) float high[64], low[64];
  for (int64_t i = 0; i < count; i++) {
    const double log = log_decay(i), bounded = log < -200.0 ? -200.0 : log > 200.0 ? 200.0 : log;
    high[i] = float(bounded);
    low[i] = float(bounded - double(high[i]));
  }
  for (int64_t i = 0; i < count; i += kLanes) {
    const Vec x = load(high + i), e = exp(x), in_range = min(set1(1.0f), max(set1(0.0f), (x + set1(87.0f)) * set1(1e30f)));
    store(to + i, fma(e, load(low + i), e) * in_range);
  }
}

// log(1 + e^v) = max(v, 0) + 2 atanh(u / (2 + u)), u = e^-|v|; the series to s^15 / 15 (next term under 2e-9 of the sum).
static inline Vec softplus(Vec v) {
  const Vec u = exp(min(v, set1(0.0f) - v)), s = u / (set1(2.0f) + u), square = s * s;
  Vec p = set1(1.0f / 15);
  const float c[] = {1.0f / 13, 1.0f / 11, 1.0f / 9, 1.0f / 7, 1.0f / 5, 1.0f / 3, 1.0f};
  for (float k : c) p = fma(p, square, set1(k));
  return fma(s + s, p, max(set1(0.0f), v));
}

// One head in one chunk of n tokens; from n on dt is 0 and the decays go on as they are.
struct Steps {
  alignas(64) double log_decay[kChunk];  // from the chunk's start through each token: fp32 sums would lose the small ones
  alignas(64) float raw[kChunk];         // dt + dt_bias
  alignas(64) float open[kChunk];        // softplus of it
  alignas(64) float dt[kChunk];          // clamped
  alignas(64) float from_start[kChunk];  // decay from the chunk's start through the token
  alignas(64) float to_end[kChunk];      // decay from behind the token to the chunk's end
  alignas(64) float dt_to_end[kChunk];
  float total;

  Steps(const SsdScanArgs& a, int64_t head, int64_t begin, int64_t n) {
    const float bias = a.dt_bias ? a.dt_bias[head] : 0.0f;
    const int64_t filled = (n + kLanes - 1) / kLanes * kLanes;
    for (int64_t i = 0; i < filled; i++) raw[i] = i < n ? a.dt[(begin + i) * a.heads + head] + bias : 0.0f;
    for (int64_t i = 0; i < filled; i += kLanes) {
      const Vec step = softplus(load(raw + i));
      store(open + i, step);
      store(dt + i, min(set1(float(a.dt_max)), max(set1(float(a.dt_min)), step)));
    }
    for (int64_t i = n; i < kChunk; i++) dt[i] = 0.0f;
    double sum = 0.0;
    for (int64_t i = 0; i < n; i++) log_decay[i] = sum += double(dt[i]) * double(a.A[head]);
    for (int64_t i = n; i < kChunk; i++) log_decay[i] = sum;
    decays_of(from_start, filled, [&](int64_t i) { return log_decay[i]; });
    decays_of(to_end, filled, [&](int64_t i) { return sum - log_decay[i]; });
    for (int64_t i = 0; i < filled; i += kLanes) store(dt_to_end + i, load(dt + i) * load(to_end + i));
    total = from_start[n - 1];
  }

  // matrix[i][j] = the decay from behind token j through token i, for j <= i < n; 0 for later j, masked before the
  // exponential. Left of a block of rows it is e^(a_i - a_b) e^(a_b - a_j) with b the block's first row, both <= 1.
  void decay_matrix(int64_t n, float* matrix) const {
    alignas(64) float left[kChunk], within[kDecayBlock];
    for (int64_t b = 0; b < n; b += kDecayBlock) {
      decays_of(left, b, [&](int64_t j) { return log_decay[b] - log_decay[j]; });
      decays_of(within, kDecayBlock, [&](int64_t i) { return log_decay[b + i] - log_decay[b]; });
      for (int64_t i = 0; i < std::min(kDecayBlock, n - b); i++) {
        float* row = matrix + (b + i) * kChunk;
        for (int64_t j = 0; j < b; j += kLanes) store(row + j, set1(within[i]) * load(left + j));
        decays_of(row + b, kDecayBlock, [&](int64_t j) { return j <= i ? log_decay[b + i] - log_decay[b + j] : -200.0; });
        for (int64_t j = b + kDecayBlock; j < kChunk; j += kLanes) store(row + j, set1(0.0f));
      }
    }
  }
};

// One step of k of a panel: kLanes units of one fp32 value, or of two bf16 values.
template <class T>
HEBATRON_INLINE void store_step(T* to, Vec first, Vec second) {
  if constexpr (kUnit<T> == 1) {
    store(to, first);
  } else {
    T parts[2][kLanes];
    uint32_t pairs[kLanes];
    store(parts[0], first);
    store(parts[1], second);
    for (int i = 0; i < kLanes; i++) pairs[i] = uint32_t(parts[0][i].bits) | uint32_t(parts[1][i].bits) << 16;
    std::memcpy((void*)to, pairs, sizeof pairs);
  }
}

// Rows of kTileColumns values, `count` values in all, as the steps of k of a panel; nothing to do where they are that already.
template <class T>
static void pack_state(T* packed, const float* state, int64_t count) {
  if constexpr (kUnit<T> == 1) {
    if (packed != state) std::memcpy(packed, state, size_t(count) * sizeof(float));
  } else {
    for (const float* end = state + count; state < end; state += 2 * kTileColumns)
      for (int64_t v = 0; v < kTileColumns; v += kLanes, packed += 2 * kLanes)
        store_step(packed, load(state + v), load(state + kTileColumns + v));
  }
}

// Panels over the columns of `rows` x `columns` elements at `from`, the steps of k over its rows, twice: row k times
// scale[k] in one (null: as it is) and times scale2[k] in two (null: none). Rows of a token lie pages apart and in the same
// cache set, so they are read once for both.
template <class T>
static void pack_scaled(T* one, const float* scale, T* two, const float* scale2, const T* from, int64_t stride, int64_t rows,
                        int64_t columns) {
  for (int64_t begin = 0; begin < columns; begin += kTileColumns)
    for (int64_t k = 0; k < rows; k += kUnit<T>) {
      const bool pair = kUnit<T> == 2 && k + 1 < rows;
      const int64_t last = pair ? k + 1 : k;
      const Vec first_scale = set1(scale ? scale[k] : 1.0f), last_scale = set1(scale ? scale[last] : 1.0f);
      const int64_t to = begin / kTileColumns * panel_elements<T>(kChunk) + k * kTileColumns;
      for (int64_t v = 0; v < kTileColumns; v += kLanes) {
        const int filled = int(std::clamp<int64_t>(columns - begin - v, 0, kLanes));
        const T* row = from + k * stride + begin + v;
        const Vec a = filled ? load_lanes(row, filled) : set1(0.0f), b = filled && pair ? load_lanes(row + stride, filled) : set1(0.0f);
        store_step(one + to + v * kUnit<T>, a * first_scale, b * last_scale);
        if (two) store_step(two + to + v * kUnit<T>, a * set1(scale2[k]), b * set1(scale2[last]));
      }
    }
}

// The same once, and as they are.
template <class T>
static void pack_steps(T* panels, const T* from, int64_t stride, int64_t rows, int64_t columns) {
  for (int64_t begin = 0; begin < columns; begin += kTileColumns, panels += panel_elements<T>(kChunk))
    pack_rows<T>(panels, [&](int64_t k) { return from + k * stride + begin; }, rows,
                 std::min<int64_t>(kTileColumns, columns - begin));
}

// Panels over the rows, the steps of k over the columns: the operand of A B^T.
template <class T>
static void pack_transposed(T* panels, const T* from, int64_t stride, int64_t rows, int64_t columns) {
  for (int64_t begin = 0; begin < rows; begin += kTileColumns, panels += panel_elements<T>(columns))
    pack_columns<T>(panels, from + begin * stride, stride, columns, std::min<int64_t>(kTileColumns, rows - begin));
}

// Rows behind each other, each padded with zeros to whole panels.
template <class T>
static void copy_rows(T* to, const T* from, int64_t stride, int64_t rows, int64_t columns) {
  const int64_t width = panels_of(columns) * kTileColumns;
  for (int64_t i = 0; i < rows; i++, to += width) {
    std::memcpy((void*)to, from + i * stride, size_t(columns) * sizeof(T));
    std::memset((void*)(to + columns), 0, size_t(width - columns) * sizeof(T));
  }
}

// Asks for rows that will be read next. A head's rows lie pages apart, where the machine's own prefetcher does not follow.
template <class T>
static void prefetch_rows(const T* from, int64_t stride, int64_t rows, int64_t columns) {
  for (int64_t i = 0; i < rows; i++)
    for (int64_t byte = 0; byte < columns * int64_t(sizeof(T)); byte += 64)
      __builtin_prefetch((const char*)(from + i * stride) + byte, 0, 2);
}

// A product: rows of A `row` elements apart whose steps of k lie `step` apart, and one panel.
template <class T>
struct Factors {
  const T* a;
  int64_t row, step;
  const T* panel;
  int64_t units;
};

// to = keep to + first, or where scale is given scale[i] (keep to + first) + second: one panel's columns of `rows` rows. keep
// 0 is whatever `to` holds. The only register tile here, so that each ISA compiles it once for each dtype.
template <class T>
static void multiply(float* to, int64_t stride, int64_t rows, float keep, const Factors<T>& first, const float* scale = nullptr,
                     const Factors<T>& second = {}) {
  for_strips(rows, [&](int64_t r, auto mr) {
    Vec c[mr.value][kTileVectors];
    float* out = to + r * stride;
    clear(c);
    if (keep != 0.0f)
      HEBATRON_UNROLL for (int i = 0; i < mr.value; i++)
        HEBATRON_UNROLL for (int j = 0; j < kTileVectors; j++) c[i][j] = set1(keep) * load(out + i * stride + j * kLanes);
    tile(c, first.a + r * first.row, first.row, first.step, first.panel, first.units);
    if (scale) {
      HEBATRON_UNROLL for (int i = 0; i < mr.value; i++)
        HEBATRON_UNROLL for (int j = 0; j < kTileVectors; j++) c[i][j] = c[i][j] * set1(scale[r + i]);
      tile(c, second.a + r * second.row, second.row, second.step, second.panel, second.units);
    }
    HEBATRON_UNROLL for (int i = 0; i < mr.value; i++)
      HEBATRON_UNROLL for (int j = 0; j < kTileVectors; j++) store(out + i * stride + j * kLanes, c[i][j]);
  });
}

// Rows as copy_rows left them, from row `at` on, times a panel whose steps run along them.
template <class T>
static Factors<T> along_rows(const T* rows, int64_t at, int64_t width, const T* panel) {
  const int64_t stride = panels_of(width) * kTileColumns;
  return {rows + at * stride, stride, kUnit<T>, panel, units_of<T>(width)};
}

// The columns of a packed panel as rows, from column `at` on, times a panel, both over the tokens from `skip` (even) to n.
template <class T>
static Factors<T> over_tokens(const T* columns, int64_t at, const T* panel, int64_t n, int64_t skip = 0) {
  constexpr int64_t kStep = kTileColumns * kUnit<T>;
  const int64_t skipped = skip / kUnit<T>;
  return {columns + at * kUnit<T> + skipped * kStep, kUnit<T>, kStep, panel + skipped * kStep, units_of<T>(n) - skipped};
}

// scores[i][j] = rows_i . panels_j (kChunk columns), for i < n and every j from the start of a panel that i has reached.
template <class T>
static void lower_scores(float* scores, const T* rows, const T* panels, int64_t n, int64_t width) {
  for (int64_t begin = 0; begin < n; begin += kTileColumns, panels += panel_elements<T>(width))
    multiply(scores + begin * kChunk + begin, kChunk, n - begin, 0.0f, along_rows(rows, begin, width, panels));
}

static void check_scan(const SsdScanArgs& a) {
  const char* op = "ssd_scan";
  check(a.head_dim > 0, op, "head_dim must be > 0", a.head_dim);
  check(a.state_dim > 0, op, "state_dim must be > 0", a.state_dim);
  check(a.groups > 0 && a.heads % a.groups == 0, op, "groups must divide the heads", a.groups);
  check(a.chunk > 0 && a.chunk <= kChunk, op, "chunk must be between 1 and 64", a.chunk);
  check(a.workers > 0, op, "workers must be > 0", a.workers);
  check(a.sequences >= 0, op, "sequences must be >= 0", a.sequences);
  check(a.cu_seqlens[0] == 0, op, "cu_seqlens must start at 0", a.cu_seqlens[0]);
  for (int64_t q = 0; q < a.sequences; q++)
    check(a.cu_seqlens[q] <= a.cu_seqlens[q + 1], op, "cu_seqlens must not fall", a.cu_seqlens[q + 1]);
  check(a.cu_seqlens[a.sequences] == a.tokens, op, "cu_seqlens must end at the number of tokens", a.cu_seqlens[a.sequences]);
}

}  // namespace
}  // namespace hebatron::HEBATRON_ISA_NAMESPACE
