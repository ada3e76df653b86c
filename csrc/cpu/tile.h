// What      acc[rows][4 * kLanes] += A B, the one register tile under every matrix product on the CPU, and the packing of B.
// Grid      called by one thread: 1 to 6 rows x 4 vectors. With 32 registers 24 accumulators, 4 of B and 1 of A fit; the
//           ISAs with 16 walk k twice, over half of the columns each.
// Traffic   per step of k (a unit: one fp32 or two bf16) 16 * kLanes bytes of B and 4 bytes of A a row: 10.7 bytes of B a
//           cycle on AVX-512, so B may stream from L2.
// Roofline  compute: vdpbf16ps, fp32 FMA elsewhere.
// Measured  never on its own: see the kernels built on it.
// Limits    fp32, or bf16 with fp32 accumulation; vdpbf16ps takes denormals as 0. A panel's columns past the matrix and an
//           odd last k hold zeros; A must hold a zero (any finite value) there as well.
// Why so    a row's sum is one chain of additions in the order of k, whatever the number of rows beside it, so a result
//           does not depend on the batch; with one row the tile is the matrix-vector product over the same panels.
#pragma once
#include <algorithm>
#include <type_traits>

#include "cpu/simd.h"

#define HEBATRON_INLINE static inline __attribute__((always_inline))
#define HEBATRON_UNROLL _Pragma("GCC unroll 16")

namespace hebatron::HEBATRON_ISA_NAMESPACE {
namespace {

constexpr int kTileRows = 6, kTileVectors = 4;
constexpr int kTileColumns = kTileVectors * kLanes;  // 64, or 32 where a vector has 8 lanes
template <class T>
constexpr int kUnit = 4 / int(sizeof(T));  // elements of k that are multiplied in one step

// A panel of B: kTileColumns columns beside one another, [units of k][kTileColumns][kUnit]. The last one of a matrix may
// be narrower, of as many vectors as its columns need (NV, `vectors`).
template <class T>
static inline int64_t units_of(int64_t k) { return (k + kUnit<T> - 1) / kUnit<T>; }
template <class T>
static inline int64_t panel_elements(int64_t k) { return units_of<T>(k) * kTileColumns * kUnit<T>; }
static inline int64_t panels_of(int64_t columns) { return (columns + kTileColumns - 1) / kTileColumns; }
static inline int vectors_of(int64_t columns) { return int((std::min<int64_t>(columns, kTileColumns) + kLanes - 1) / kLanes); }

// kLanes units of 32 bits as they lie in memory: fp32 values, or pairs of bf16 whose first is the low half.
#if defined(HEBATRON_ISA_AVX512) || defined(HEBATRON_ISA_AVX512_BF16)
struct Units {
  __m512i v;
};
HEBATRON_INLINE Units load_units(const void* p) { return {_mm512_loadu_si512(p)}; }
HEBATRON_INLINE Units set1_units(uint32_t u) { return {_mm512_set1_epi32(int(u))}; }
HEBATRON_INLINE Vec as_float(Units u) { return {_mm512_castsi512_ps(u.v)}; }
HEBATRON_INLINE Vec first_of(Units u) { return {_mm512_castsi512_ps(_mm512_slli_epi32(u.v, 16))}; }
HEBATRON_INLINE Vec second_of(Units u) { return {_mm512_castsi512_ps(_mm512_and_si512(u.v, _mm512_set1_epi32(int(0xffff0000u))))}; }
#elif defined(HEBATRON_ISA_AVX2)
struct Units {
  __m256i v;
};
HEBATRON_INLINE Units load_units(const void* p) { return {_mm256_loadu_si256((const __m256i*)p)}; }
HEBATRON_INLINE Units set1_units(uint32_t u) { return {_mm256_set1_epi32(int(u))}; }
HEBATRON_INLINE Vec as_float(Units u) { return {_mm256_castsi256_ps(u.v)}; }
HEBATRON_INLINE Vec first_of(Units u) { return {_mm256_castsi256_ps(_mm256_slli_epi32(u.v, 16))}; }
HEBATRON_INLINE Vec second_of(Units u) { return {_mm256_castsi256_ps(_mm256_and_si256(u.v, _mm256_set1_epi32(int(0xffff0000u))))}; }
#else
struct Units {
  uint32_t v[kLanes];
};
HEBATRON_INLINE float float_of(uint32_t u) {
  float f;
  std::memcpy(&f, &u, 4);
  return f;
}
HEBATRON_INLINE Units load_units(const void* p) {
  Units u;
  std::memcpy(u.v, p, sizeof u.v);
  return u;
}
HEBATRON_INLINE Units set1_units(uint32_t a) {
  Units u;
  for (uint32_t& lane : u.v) lane = a;
  return u;
}
HEBATRON_INLINE Vec as_float(Units u) { HEBATRON_LANES(float_of(u.v[i])) }
HEBATRON_INLINE Vec first_of(Units u) { HEBATRON_LANES(float_of(u.v[i] << 16)) }
HEBATRON_INLINE Vec second_of(Units u) { HEBATRON_LANES(float_of(u.v[i] & 0xffff0000u)) }
#endif

// c + the one product of fp32 units, or the two of bf16 units.
template <class T>
HEBATRON_INLINE Vec multiply_add(Units a, Units b, Vec c) {
  if constexpr (std::is_same_v<T, float>) return fma(as_float(a), as_float(b), c);
#if defined(HEBATRON_ISA_AVX512_BF16)
  return {_mm512_dpbf16_ps(c.v, (__m512bh)a.v, (__m512bh)b.v)};
#else
  return fma(second_of(a), second_of(b), fma(first_of(a), first_of(b), c));
#endif
}

// Bytes between what is multiplied and what is asked for: the ten steps that Zen 3 has in flight do not keep its DRAM busy.
// One row's lines are asked for past the last-level cache, where a token's states may stay, 1.13 times as fast as lines that
// are kept. A step of decoding: 1.10 times as fast with 1 sequence, 1.22 with 8, 1.41 with 32; a prefill takes as long.
constexpr int64_t kStreamAhead = 1024;

template <class T, int MR, int NV, int kFirst, int kCount>
HEBATRON_INLINE void tile_part(Vec (&acc)[MR][NV], const T* const (&rows)[MR], int64_t ak, const T* b, int64_t units) {
  int64_t k = 0;
  for (int64_t u = 0; u < units; u++, k += ak, b += NV * kLanes * kUnit<T>) {
    if constexpr (kLanes == 8 && kFirst == 0) {  // both halves: the second walk finds its lines in L2
      HEBATRON_UNROLL for (int64_t line = 0; line < NV * kLanes * 4; line += 64)
        __builtin_prefetch((const char*)b + kStreamAhead + line, 0, MR == 1 ? 0 : 3);
    }
    Units columns[kCount];
    HEBATRON_UNROLL for (int j = 0; j < kCount; j++) columns[j] = load_units(b + (kFirst + j) * kLanes * kUnit<T>);
    HEBATRON_UNROLL for (int i = 0; i < MR; i++) {
      uint32_t bits;
      std::memcpy(&bits, rows[i] + k, 4);
      const Units row = set1_units(bits);
      HEBATRON_UNROLL for (int j = 0; j < kCount; j++)
        acc[i][kFirst + j] = multiply_add<T>(row, columns[j], acc[i][kFirst + j]);
    }
  }
}

// acc += A B over `units` steps of k. Step u of row i of A are the kUnit<T> elements from rows[i][u * ak] on (ak is
// kUnit<T> where k is contiguous); b is a panel of NV vectors, or the part of one from some step of k on.
template <class T, int MR, int NV>
HEBATRON_INLINE void tile(Vec (&acc)[MR][NV], const T* const (&rows)[MR], int64_t ak, const T* b, int64_t units) {
  if constexpr (kLanes == 16 || NV <= 2 || MR <= 2) {  // few rows: their memory is read once, in order
    tile_part<T, MR, NV, 0, NV>(acc, rows, ak, b, units);
  } else {
    tile_part<T, MR, NV, 0, 2>(acc, rows, ak, b, units);
    tile_part<T, MR, NV, 2, NV - 2>(acc, rows, ak, b, units);
  }
}
// The same for rows that lie `ai` elements apart.
template <class T, int MR, int NV>
HEBATRON_INLINE void tile(Vec (&acc)[MR][NV], const T* a, int64_t ai, int64_t ak, const T* b, int64_t units) {
  const T* rows[MR];
  HEBATRON_UNROLL for (int i = 0; i < MR; i++) rows[i] = a + i * ai;
  tile(acc, rows, ak, b, units);
}

template <int MR, int NV>
HEBATRON_INLINE void clear(Vec (&acc)[MR][NV]) {
  HEBATRON_UNROLL for (int i = 0; i < MR; i++) HEBATRON_UNROLL for (int j = 0; j < NV; j++) acc[i][j] = set1(0.0f);
}

// Calls body(first row, std::integral_constant<int, MR>) for strips of six rows and once for the one to five left over.
template <class Body>
HEBATRON_INLINE void for_strips(int64_t rows, const Body& body) {
  int64_t r = 0;
  for (; r + kTileRows <= rows; r += kTileRows) body(r, std::integral_constant<int, kTileRows>());
  switch (rows - r) {
    case 1: return body(r, std::integral_constant<int, 1>());
    case 2: return body(r, std::integral_constant<int, 2>());
    case 3: return body(r, std::integral_constant<int, 3>());
    case 4: return body(r, std::integral_constant<int, 4>());
    case 5: return body(r, std::integral_constant<int, 5>());
  }
}

// rows x columns of units, transposed in place.
#if defined(HEBATRON_ISA_AVX512) || defined(HEBATRON_ISA_AVX512_BF16)
HEBATRON_INLINE void transpose(Units (&u)[kLanes]) {
  __m512i t[16];
  HEBATRON_UNROLL for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(u[i].v, u[i + 1].v);
    t[i + 1] = _mm512_unpackhi_epi32(u[i].v, u[i + 1].v);
  }
  HEBATRON_UNROLL for (int i = 0; i < 16; i += 4) HEBATRON_UNROLL for (int j = 0; j < 2; j++) {
    u[i + 2 * j].v = _mm512_unpacklo_epi64(t[i + j], t[i + j + 2]);
    u[i + 2 * j + 1].v = _mm512_unpackhi_epi64(t[i + j], t[i + j + 2]);
  }
  HEBATRON_UNROLL for (int i = 0; i < 4; i++) {  // u[4g + i]: rows 4g to 4g + 3, column i of each 128-bit part
    const __m512i low = _mm512_shuffle_i32x4(u[i].v, u[4 + i].v, 0x88), high = _mm512_shuffle_i32x4(u[i].v, u[4 + i].v, 0xdd);
    const __m512i low2 = _mm512_shuffle_i32x4(u[8 + i].v, u[12 + i].v, 0x88), high2 = _mm512_shuffle_i32x4(u[8 + i].v, u[12 + i].v, 0xdd);
    t[i] = _mm512_shuffle_i32x4(low, low2, 0x88);
    t[8 + i] = _mm512_shuffle_i32x4(low, low2, 0xdd);
    t[4 + i] = _mm512_shuffle_i32x4(high, high2, 0x88);
    t[12 + i] = _mm512_shuffle_i32x4(high, high2, 0xdd);
  }
  HEBATRON_UNROLL for (int i = 0; i < 16; i++) u[i].v = t[i];
}
#elif defined(HEBATRON_ISA_AVX2)
HEBATRON_INLINE void transpose(Units (&u)[kLanes]) {
  __m256i t[8];
  HEBATRON_UNROLL for (int i = 0; i < 8; i += 2) {
    t[i] = _mm256_unpacklo_epi32(u[i].v, u[i + 1].v);
    t[i + 1] = _mm256_unpackhi_epi32(u[i].v, u[i + 1].v);
  }
  HEBATRON_UNROLL for (int i = 0; i < 8; i += 4) HEBATRON_UNROLL for (int j = 0; j < 2; j++) {
    u[i + 2 * j].v = _mm256_unpacklo_epi64(t[i + j], t[i + j + 2]);
    u[i + 2 * j + 1].v = _mm256_unpackhi_epi64(t[i + j], t[i + j + 2]);
  }
  HEBATRON_UNROLL for (int i = 0; i < 4; i++) {
    t[i] = _mm256_permute2x128_si256(u[i].v, u[4 + i].v, 0x20);
    t[4 + i] = _mm256_permute2x128_si256(u[i].v, u[4 + i].v, 0x31);
  }
  HEBATRON_UNROLL for (int i = 0; i < 8; i++) u[i].v = t[i];
}
#else
HEBATRON_INLINE void transpose(Units (&u)[kLanes]) {
  for (int i = 0; i < kLanes; i++)
    for (int j = 0; j < i; j++) std::swap(u[i].v[j], u[j].v[i]);
}
#endif
HEBATRON_INLINE void store_units(void* p, const Units& u) { std::memcpy(p, &u, sizeof u); }

// kLanes units from the first `filled` of kLanes * kUnit<T> elements, rounded to T, zeros behind them.
template <class T, class S>
HEBATRON_INLINE Units gather_units(const S* from, int64_t filled) {
  constexpr int kElements = kLanes * kUnit<T>;
  T buffer[kElements];
  if constexpr (std::is_same_v<S, T>) {
    if (filled >= kElements) return load_units(from);
    std::memset((void*)buffer, 0, sizeof buffer);
    std::memcpy((void*)buffer, from, size_t(filled) * sizeof(T));
  } else {
    for (int i = 0; i < kUnit<T>; i++) {
      const int64_t left = std::min<int64_t>(kLanes, filled - i * kLanes);
      store(buffer + i * kLanes, left <= 0 ? set1(0.0f) : left < kLanes ? load(from + i * kLanes, int(left)) : load(from + i * kLanes));
    }
  }
  return load_units(buffer);
}

// kLanes * kUnit<T> elements as kLanes units, rounded to T.
template <class T, class S>
HEBATRON_INLINE Units whole_units(const S* from) {
#if defined(HEBATRON_ISA_AVX512) || defined(HEBATRON_ISA_AVX512_BF16)
  // Not through memory: a load of 64 bytes waits until two stores of 32 have left the store buffer.
  if constexpr (kUnit<T> == 2 && std::is_same_v<S, float>)
    return {_mm512_inserti64x4(_mm512_castsi256_si512(narrow(load(from))), narrow(load(from + kLanes)), 1)};
#endif
  return gather_units<T>(from, kLanes * kUnit<T>);
}

// The rows to come: the memory's own prefetching does not follow rows that lie further apart than they are long.
constexpr int64_t kAhead = 16;
template <class S>
HEBATRON_INLINE void prefetch(const S* from, int64_t elements) {
  for (int64_t i = 0; i < elements * int64_t(sizeof(S)); i += 64) __builtin_prefetch((const char*)from + i);
}

// One panel of B from columns whose k elements are contiguous: B(k, n) = from[n * n_stride + k], rounded to T;
// `columns` <= kTileColumns of them.
template <class T, class S>
static void pack_columns(T* panel, const S* from, int64_t n_stride, int64_t k, int64_t columns, int vectors = kTileVectors) {
  const int64_t units = units_of<T>(k), width = vectors * kLanes, whole = k / (kLanes * kUnit<T>) * kLanes;
  for (int64_t n = 0; n < width; n += kLanes)
    for (int64_t begin = 0; begin < units; begin += kLanes) {
      const S* corner = from + n * n_stride + begin * kUnit<T>;
      Units block[kLanes];
      for (int64_t i = 0; i < kLanes; i++) prefetch(corner + (i + kLanes) * n_stride, kLanes * kUnit<T>);
      if (n + kLanes <= columns && begin < whole) {
        HEBATRON_UNROLL for (int i = 0; i < kLanes; i++) block[i] = whole_units<T>(corner + i * n_stride);
      } else {
        for (int64_t i = 0; i < kLanes; i++)
          block[i] = n + i < columns ? gather_units<T>(corner + i * n_stride, k - begin * kUnit<T>) : set1_units(0);
      }
      transpose(block);
      T* to = panel + (begin * width + n) * kUnit<T>;
      if (begin + kLanes <= units) {
        HEBATRON_UNROLL for (int i = 0; i < kLanes; i++) store_units(to + i * width * kUnit<T>, block[i]);
      } else {
        for (int64_t i = 0; i < units - begin; i++) store_units(to + i * width * kUnit<T>, block[i]);
      }
    }
}

// Units whose first elements are a's lanes and whose second are b's, rounded to bf16.
HEBATRON_INLINE void store_pairs(bf16* to, Vec a, Vec b) {
#if defined(HEBATRON_ISA_AVX512) || defined(HEBATRON_ISA_AVX512_BF16)
  const __m512i low = _mm512_cvtepu16_epi32(narrow(a)), high = _mm512_cvtepu16_epi32(narrow(b));
  _mm512_storeu_si512(to, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
#else
  bf16 first[kLanes], second[kLanes];
  store(first, a);
  store(second, b);
  for (int i = 0; i < kLanes; i++) to[2 * i] = first[i], to[2 * i + 1] = second[i];
#endif
}

// The same of values that are bf16 already: only their order changes.
HEBATRON_INLINE void store_pairs(bf16* to, const bf16* a, const bf16* b) {
#if defined(HEBATRON_ISA_AVX2)
  const __m128i first = _mm_loadu_si128((const __m128i*)a), second = _mm_loadu_si128((const __m128i*)b);
  _mm_storeu_si128((__m128i*)to, _mm_unpacklo_epi16(first, second));
  _mm_storeu_si128((__m128i*)to + 1, _mm_unpackhi_epi16(first, second));
#else
  store_pairs(to, load(a), load(b));
#endif
}
HEBATRON_INLINE void store_pairs(bf16* to, const float* a, const float* b) { store_pairs(to, load(a), load(b)); }

// One panel of B from rows: B(k, n) = row(k)[n], rounded to T; row(k) is a pointer to `columns` <= kTileColumns elements.
template <class T, class Row>
static void pack_rows(T* panel, const Row& row, int64_t k, int64_t columns, int vectors = kTileVectors) {
  const int64_t width = vectors * kLanes;
  for (int64_t step = 0; step < units_of<T>(k); step++, panel += width * kUnit<T>) {
    const int64_t k0 = step * kUnit<T>;
    const auto* first = row(k0);
    const auto* second = kUnit<T> == 2 && k0 + 1 < k ? row(k0 + 1) : nullptr;
    for (int64_t ahead = k0 + kAhead; ahead < std::min<int64_t>(k, k0 + kAhead + kUnit<T>); ahead++) prefetch(row(ahead), width);
    if constexpr (kUnit<T> == 2)
      if (columns == width && second) {
        for (int64_t n = 0; n < width; n += kLanes) store_pairs(panel + n * 2, first + n, second + n);
        continue;
      }
    for (int64_t n = 0; n < width; n += kLanes) {
      const int filled = int(std::clamp<int64_t>(columns - n, 0, kLanes));
      const Vec a = filled ? load_lanes(first + n, filled) : set1(0.0f);
      if constexpr (kUnit<T> == 1) {
        store(panel + n, a);
      } else {
        store_pairs(panel + n * 2, a, filled && second ? load_lanes(second + n, filled) : set1(0.0f));
      }
    }
  }
}

}  // namespace
}  // namespace hebatron::HEBATRON_ISA_NAMESPACE
