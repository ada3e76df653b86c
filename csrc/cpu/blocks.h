// What the kernels made of blocks of products share: 2^x, rows as steps of a product, sums over a panel's columns, and arrays
// cut from the caller's workspace.
#pragma once
#include <cmath>
#include <limits>
#ifdef _OPENMP
#include <omp.h>
#endif

#include "cpu/tile.h"

namespace hebatron::HEBATRON_ISA_NAMESPACE {
namespace {

constexpr float kLog2E = 1.4426950408889634f, kLn2 = 0.6931471805599453f;
constexpr float kNone = -std::numeric_limits<float>::infinity();  // the largest of no values

static inline int64_t round_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }
// A head of `dim` elements as the left operand of a product over its elements, and as columns of a product over tokens.
template <class T>
static inline int64_t padded_k(int64_t dim) { return units_of<T>(dim) * kUnit<T>; }
static inline int64_t padded_columns(int64_t dim) { return round_up(dim, kLanes); }

// 2^t for t <= 127: 0 far below, NaN stays. r = t - floor(t), 2^r by a minimax polynomial: 1.5e-7 relative in front of fp32,
// 4e-6 in front of a rounding to bf16.
template <class T>
HEBATRON_INLINE Vec exp2(Vec t) {
#if defined(HEBATRON_ISA_AVX512) || defined(HEBATRON_ISA_AVX512_BF16)
  const Vec r = {_mm512_reduce_ps(t.v, 1)};  // 1: the fraction above the floor
#else
  t = min(set1(127.0f), max(set1(-126.0f), t));
  const Vec n = round_even(t - set1(0.5f)), r = t - n;
#endif
  Vec p;
  if constexpr (kUnit<T> == 2 && kLanes == 16) {
    p = fma(set1(0.013670309453361338f), r, set1(0.051744997764096856f));
    p = fma(p, r, set1(0.2416043572700981f));
    p = fma(p, r, set1(0.69297292217305f));
    p = fma(p, r, set1(1.0000034929076984f));
  } else {
    p = fma(set1(0.00021865784801363908f), r, set1(0.001239133183006765f));
    p = fma(p, r, set1(0.009684186310822214f));
    p = fma(p, r, set1(0.05548063019645923f));
    p = fma(p, r, set1(0.24023045441236401f));
    p = fma(p, r, set1(0.6931469327588616f));
    p = fma(p, r, set1(1.0000000025307454f));
  }
#if defined(HEBATRON_ISA_AVX512) || defined(HEBATRON_ISA_AVX512_BF16)
  return {_mm512_scalef_ps(p.v, t.v)};  // p * 2^floor(t), 0 for -inf
#else
  return scale2(p, n) - set1(1.17549435e-38f);  // 2^-126: what stands for 0 becomes 0, and nothing above 2^-102 moves
#endif
}

// The lanes of v whose column, counted from `column`, lies outside [begin, end) become -inf.
HEBATRON_INLINE Vec keep_columns(Vec v, int64_t column, int64_t begin, int64_t end) {
  const int first = int(std::clamp<int64_t>(begin - column, 0, kLanes)), last = int(std::clamp<int64_t>(end - column, 0, kLanes));
  if (first == 0 && last == kLanes) return v;
#if defined(HEBATRON_ISA_AVX512) || defined(HEBATRON_ISA_AVX512_BF16)
  return {_mm512_mask_mov_ps(_mm512_set1_ps(kNone), __mmask16(lane_mask(last) & ~lane_mask(first)), v.v)};
#else
  float lanes[kLanes];
  store(lanes, v);
  for (int i = 0; i < kLanes; i++)
    if (i < first || i >= last) lanes[i] = kNone;
  return load(lanes);
#endif
}

HEBATRON_INLINE float highest(Vec v) {
  float lanes[kLanes];
  store(lanes, v);
  float found = lanes[0];
  for (float lane : lanes) found = std::max(found, lane);
  return found;
}

// Two rows as units of steps of k: fp32 one after another `stride` elements apart, bf16 side by side.
HEBATRON_INLINE void store_steps(float* to, int64_t stride, Vec first, Vec second) {
  store(to, first);
  store(to + stride, second);
}
HEBATRON_INLINE void store_steps(bf16* to, int64_t, Vec first, Vec second) { store_pairs(to, first, second); }

// c (MR rows of NV whole vectors, `stride` apart) += A B. The product is a chain of additions of its own: as a part of one
// chain over all blocks it would err more with every block.
template <class T, int MR, int NV>
static void add_tile(float* c, int64_t stride, const T* a, int64_t ai, int64_t ak, const T* b, int64_t units) {
  Vec acc[MR][NV];
  clear(acc);
  tile<T>(acc, a, ai, ak, b, units);
  HEBATRON_UNROLL for (int i = 0; i < MR; i++) HEBATRON_UNROLL for (int j = 0; j < NV; j++) {
    float* to = c + i * stride + j * kLanes;
    store(to, load(to) + acc[i][j]);
  }
}
// The same for a panel as wide as its columns need.
template <class T, int MR>
static void add_product(float* c, int64_t stride, const T* a, int64_t ai, int64_t ak, const T* b, int64_t units, int64_t columns) {
  switch (vectors_of(columns)) {
    case 1: return add_tile<T, MR, 1>(c, stride, a, ai, ak, b, units);
    case 2: return add_tile<T, MR, 2>(c, stride, a, ai, ak, b, units);
    case 3: return add_tile<T, MR, 3>(c, stride, a, ai, ak, b, units);
    default: return add_tile<T, MR, 4>(c, stride, a, ai, ak, b, units);
  }
}

// Every panel of a right operand whose k steps are rows: B(k, n) = from[k * stride + n]. Panel p begins at to + p * kTileColumns *
// panel_rows, and is as wide as its columns need; `panel_rows` (whole steps) is the k of the whole panel, `row` where these begin.
template <class T>
static void pack_row_panels(T* to, int64_t panel_rows, int64_t row, const T* from, int64_t stride, int64_t rows, int64_t columns) {
  for (int64_t at = 0; at < columns; at += kTileColumns) {
    const int vectors = vectors_of(columns - at);
    pack_rows<T>(to + at * panel_rows + row * vectors * kLanes, [&](int64_t r) { return from + r * stride + at; }, rows,
                 std::min<int64_t>(kTileColumns, columns - at), vectors);
  }
}

// A row of `dim` elements as a left operand: a zero behind an odd last one. (A call of memcpy per row took 8 % of the backward.)
template <class T>
HEBATRON_INLINE void copy_row(T* to, const T* from, int64_t dim) {
  constexpr int64_t kPiece = 32 / int64_t(sizeof(T));
  int64_t i = 0;
  for (; i + kPiece <= dim; i += kPiece) std::memcpy((void*)(to + i), from + i, 32);
  for (; i < dim; i++) to[i] = from[i];
  for (; i < padded_k<T>(dim); i++) to[i] = T{};
}

static inline int64_t thread_number() {
#ifdef _OPENMP
  return omp_get_thread_num();
#else
  return 0;
#endif
}

// Cuts the caller's workspace into arrays, each on a cache line of its own; with no base it only counts.
class Workspace {
 public:
  explicit Workspace(void* base) : at_(base ? (char*)round_up(int64_t(base), 64) : nullptr) {}
  template <class T>
  T* take(int64_t elements) {
    char* found = at_ ? at_ + bytes_ : nullptr;
    bytes_ += round_up(elements * int64_t(sizeof(T)), 64);
    return (T*)found;
  }
  int64_t bytes() const { return bytes_ + 64; }  // and what it takes to begin on a line

 private:
  char* at_;
  int64_t bytes_ = 0;
};

}  // namespace
}  // namespace hebatron::HEBATRON_ISA_NAMESPACE
