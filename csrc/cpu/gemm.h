// What the files that multiply by experts share: a strip of rows times a panel, the rows sorted by expert and cut into
// blocks, and the workspace they lie in.
#pragma once
#if defined(_OPENMP)
#include <omp.h>
#endif
#include "cpu/tile.h"

namespace hebatron::HEBATRON_ISA_NAMESPACE {

// Memory that the next product will read, asked for a few lines at a time while this one computes: `rows` pieces of
// `bytes_row` bytes, `stride` bytes apart.
struct Ahead {
  const char* at = nullptr;
  int64_t bytes_row = 0, stride = 0, rows = 0;
  int64_t in_row = 0, lines_each = 0;  // how far into a row; lines asked for at once
  int64_t lines() const { return rows * ((bytes_row + 63) / 64); }
  void ask() {
    for (int64_t i = 0; i < lines_each && rows; i++) {
      __builtin_prefetch(at + in_row, 0, 2);
      in_row += 64;
      if (in_row >= bytes_row) in_row = 0, at += stride, rows--;
    }
  }
};
constexpr int64_t kAheadBytes = 3 << 17;  // of an L2 of 1 MiB
constexpr int64_t kAheadUnits = 16;       // steps of k between two askings: 400 cycles of a whole strip

// sums[i][n] = sum_k A(i, k) B(k, n) for `count` <= 6 rows and a panel of `vectors` vectors. Each 512 steps of k are one
// chain of additions, and the chains are added in order: an fp32 sum of 2,688 terms errs a third as much as in one chain.
// Step u of row i of A lies at rows[i] + u * ak elements; `padded`: A holds a zero behind an odd last k.
struct Strip {
  const void* rows[6];
  int count;
  int64_t ak, k;
  bool padded;
  Ahead* ahead = nullptr;
};
void strip_product_f32(const Strip& strip, const void* panel, int vectors, float* sums);  // gemm.cpp
void strip_product_bf16(const Strip& strip, const void* panel, int vectors, float* sums);

namespace {

static inline int worker() {
#if defined(_OPENMP)
  return omp_get_thread_num();
#else
  return 0;
#endif
}

static inline int workers() {
#if defined(_OPENMP)
  return omp_get_num_threads();
#else
  return 1;
#endif
}

// Lays buffers out behind one another from `base`; with a null base it only counts their bytes.
struct Workspace {
  char* base;
  int64_t bytes = 0;
  template <class T>
  T* take(int64_t n) {
    T* p = base ? (T*)(base + bytes) : nullptr;
    bytes += (n * int64_t(sizeof(T)) + 63) / 64 * 64;
    return p;
  }
};

// Rows begin .. end - 1 of one expert; an expert with many has several blocks, so that threads share it.
struct Block {
  int64_t expert, begin, end;
};
constexpr int64_t kBlockRows = 384;  // packing a panel for them again costs 1.5 % of their product

static inline int64_t most_blocks(int64_t rows, int64_t experts) { return std::min(rows, experts) + rows / kBlockRows; }
template <class Offset>
static inline int64_t cut_blocks(const Offset* begin, int64_t experts, Block* blocks) {
  int64_t count = 0;
  for (int64_t e = 0; e < experts; e++)
    for (int64_t r = begin[e]; r < begin[e + 1]; r += kBlockRows) blocks[count++] = {e, r, std::min<int64_t>(r + kBlockRows, begin[e + 1])};
  return count;
}

// Weights of the experts: B(k, n) of each. Where k is contiguous in memory `by_column`, else n is. `packed` data are panels.
struct Weights {
  DType dtype;
  const void* data;
  int64_t expert_stride, stride, k, columns;
  bool by_column;
  bool packed = false;
};

// What packed weights begin with: a layout is that of one ISA's vectors and may not be read as another's. Each expert's
// panels follow, in the room that 16 lanes need.
struct PackedHeader {
  int64_t mark, lanes, experts, k, columns, bytes_element, unused[2];
};
constexpr int64_t kPackedMark = 0x6b636170627468;  // "htbpack"
template <class T>
static PackedHeader packed_header(int64_t experts, int64_t k, int64_t columns) {
  return {kPackedMark, kLanes, experts, k, columns, int64_t(sizeof(T)), {}};
}
template <class T>
static int64_t packed_stride(int64_t k, int64_t columns) { return units_of<T>(k) * kUnit<T> * ((columns + 15) / 16 * 16); }
template <class T>
static void check_packed(const char* op, const void* data, int64_t experts, int64_t k, int64_t columns) {
  const PackedHeader want = packed_header<T>(experts, k, columns);
  PackedHeader got;
  std::memcpy(&got, data, sizeof got);
  check(got.mark == want.mark, op, "packed weights must come from moe_pack, mark", got.mark);
  check(got.lanes == want.lanes, op, "packed weights must be packed again for this ISA; their lanes", got.lanes);
  check(got.bytes_element == want.bytes_element, op, "packed weights must have the dtype of x; their bytes", got.bytes_element);
  check(got.experts == experts, op, "packed weights must have as many experts, theirs", got.experts);
  check(got.k == k, op, "packed weights must have as long sums, theirs", got.k);
  check(got.columns == columns, op, "packed weights must have as many outputs, theirs", got.columns);
}

// Panel p of expert e, rounded to T, packed into `buffer`.
template <class T, class S>
static const T* pack_from(const Weights& w, int64_t e, int64_t p, T* buffer) {
  const int64_t n = p * kTileColumns, columns = std::min<int64_t>(kTileColumns, w.columns - n);
  const S* from = (const S*)w.data + e * w.expert_stride + n * (w.by_column ? w.stride : 1);
  if (w.by_column)
    pack_columns(buffer, from, w.stride, w.k, columns, vectors_of(columns));
  else
    pack_rows(buffer, [&](int64_t k) { return from + k * w.stride; }, w.k, columns, vectors_of(columns));
  return buffer;
}
template <class T>
static const T* panel_of(const Weights& w, int64_t e, int64_t p, T* buffer) {
  if (w.packed) {
    const T* panels = (const T*)((const char*)w.data + sizeof(PackedHeader)) + e * packed_stride<T>(w.k, w.columns);
    return panels + p * panel_elements<T>(w.k);
  }
  return w.dtype == DType::f32 ? pack_from<T, float>(w, e, p, buffer) : pack_from<T, bf16>(w, e, p, buffer);
}

// What `panel_of` reads for this panel.
template <class T>
static Ahead source_of(const Weights& w, int64_t e, int64_t p) {
  const int64_t n = p * kTileColumns, columns = std::min<int64_t>(kTileColumns, w.columns - n);
  if (w.packed) {
    const char* panel = (const char*)panel_of<T>(w, e, p, nullptr);
    return {panel, std::min(kAheadBytes, units_of<T>(w.k) * vectors_of(columns) * kLanes * 4), 0, 1};
  }
  const int64_t size = w.dtype == DType::f32 ? 4 : 2, begin = e * w.expert_stride + n * (w.by_column ? w.stride : 1);
  const int64_t length = w.by_column ? w.k : columns, rows = w.by_column ? columns : w.k;
  return {(const char*)w.data + begin * size, length * size, w.stride * size, std::min(rows, kAheadBytes / (length * size))};
}

// The sums of rows begin .. end - 1 and one panel, strip by strip: finish(first row, rows, sums), sums[i * kTileColumns + n].
template <class T, class RowOf, class Finish>
static void product(int64_t begin, int64_t end, const RowOf& row_of, int64_t k, const T* panel, int64_t columns, Ahead ahead,
                    const Finish& finish) {
  alignas(64) float sums[kTileRows * kTileColumns];
  const int64_t askings = (end - begin + kTileRows - 1) / kTileRows * ((units_of<T>(k) + kAheadUnits - 1) / kAheadUnits);
  ahead.lines_each = (ahead.lines() + askings - 1) / std::max<int64_t>(askings, 1);
  for (int64_t r = begin; r < end; r += kTileRows) {
    Strip strip{{}, int(std::min<int64_t>(kTileRows, end - r)), kUnit<T>, k, false, ahead.rows ? &ahead : nullptr};
    for (int i = 0; i < strip.count; i++) strip.rows[i] = row_of(r + i);
    (std::is_same_v<T, float> ? strip_product_f32 : strip_product_bf16)(strip, panel, vectors_of(columns), sums);
    finish(r, strip.count, sums);
  }
}

// out = A B over all blocks and panels: finish(block, column, columns, first row, rows, sums). Called by every thread of a
// parallel region; a thread takes several panels at a time, to know which memory comes next.
template <class T, class RowOf, class Finish>
static void all_products(const Block* blocks, int64_t count, const Weights& w, T* buffer, const RowOf& row_of, const Finish& finish) {
  const int64_t panels = panels_of(w.columns), tasks = count * panels;
  // Packed weights of few rows are streamed, each thread its part in order: the machine's own prefetching does that best.
  const bool streamed = w.packed && count && blocks[count - 1].end - blocks[0].begin <= count * kTileRows;
  const int64_t run = streamed ? (tasks + workers() - 1) / workers() : std::clamp<int64_t>(tasks / (16 * workers()), 1, panels);
#pragma omp for schedule(dynamic, 1)
  for (int64_t first = 0; first < tasks; first += run)
    for (int64_t task = first; task < std::min(tasks, first + run); task++) {
      const Block& block = blocks[task / panels];
      const int64_t p = task % panels, column = p * kTileColumns, columns = std::min<int64_t>(kTileColumns, w.columns - column);
      const int64_t next = task + 1;
      const Ahead ahead = !streamed && next < std::min(tasks, first + run) ? source_of<T>(w, blocks[next / panels].expert, next % panels) : Ahead{};
      product(block.begin, block.end, row_of, w.k, panel_of(w, block.expert, p, buffer), columns, ahead,
              [&](int64_t r, int rows, const float* sums) { finish(block, column, columns, r, rows, sums); });
    }
}

}  // namespace
}  // namespace hebatron::HEBATRON_ISA_NAMESPACE
