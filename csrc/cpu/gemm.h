// What the files that multiply by experts share: a strip of rows times a panel, the rows sorted by expert and cut into
// blocks, and the workspace they lie in.
#pragma once
#if defined(_OPENMP)
#include <omp.h>
#endif
#include "cpu/tile.h"

namespace hebatron::HEBATRON_ISA_NAMESPACE {

// sums[i][n] = sum_k A(i, k) B(k, n) for `count` <= 6 rows and a panel of `vectors` vectors. Each 512 steps of k are one
// chain of additions, and the chains are added in order: an fp32 sum of 2,688 terms errs a third as much as in one chain.
// Step u of row i of A lies at rows[i] + u * ak elements; `padded`: A holds a zero behind an odd last k.
struct Strip {
  const void* rows[6];
  int count;
  int64_t ak, k;
  bool padded;
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

// The sums of rows begin .. end - 1 and one panel, strip by strip: finish(first row, rows, sums), sums[i * kTileColumns + n].
template <class T, class RowOf, class Finish>
static void product(int64_t begin, int64_t end, const RowOf& row_of, int64_t k, const T* panel, int64_t columns, const Finish& finish) {
  alignas(64) float sums[kTileRows * kTileColumns];
  for (int64_t r = begin; r < end; r += kTileRows) {
    Strip strip{{}, int(std::min<int64_t>(kTileRows, end - r)), kUnit<T>, k, false};
    for (int i = 0; i < strip.count; i++) strip.rows[i] = row_of(r + i);
    (std::is_same_v<T, float> ? strip_product_f32 : strip_product_bf16)(strip, panel, vectors_of(columns), sums);
    finish(r, strip.count, sums);
  }
}

}  // namespace
}  // namespace hebatron::HEBATRON_ISA_NAMESPACE
