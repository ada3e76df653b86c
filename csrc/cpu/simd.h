// One vector of fp32 lanes per ISA, with bf16 loads and stores. Everything lives in an anonymous namespace inside the
// ISA's own namespace: a shared inline would be merged by the linker and run AVX-512 code on a machine without it.
#pragma once
#include <cstdint>
#include <cstring>
#if defined(__AVX2__)
#include <immintrin.h>
#endif
#include "hebatron/ops.h"

namespace hebatron::HEBATRON_ISA_NAMESPACE {
namespace {

struct bf16 {
  uint16_t bits;
};

static inline float to_float(float v) { return v; }
static inline float to_float(bf16 v) {
  uint32_t u = uint32_t(v.bits) << 16;
  float f;
  std::memcpy(&f, &u, 4);
  return f;
}
static inline void from_float(float v, float& out) { out = v; }
static inline void from_float(float v, bf16& out) {  // round to nearest even; NaN stays NaN
  uint32_t u;
  std::memcpy(&u, &v, 4);
  if ((u & 0x7fffffffu) > 0x7f800000u) {
    out.bits = uint16_t((u >> 16) | 0x40u);
    return;
  }
  out.bits = uint16_t((u + 0x7fffu + ((u >> 16) & 1u)) >> 16);
}

#if defined(HEBATRON_ISA_AVX512) || defined(HEBATRON_ISA_AVX512_BF16)
constexpr int kLanes = 16;
struct Vec {
  __m512 v;
};
static inline Vec set1(float a) { return {_mm512_set1_ps(a)}; }
static inline Vec operator+(Vec a, Vec b) { return {_mm512_add_ps(a.v, b.v)}; }
static inline Vec operator-(Vec a, Vec b) { return {_mm512_sub_ps(a.v, b.v)}; }
static inline Vec operator*(Vec a, Vec b) { return {_mm512_mul_ps(a.v, b.v)}; }
static inline Vec operator/(Vec a, Vec b) { return {_mm512_div_ps(a.v, b.v)}; }
static inline Vec fma(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
static inline Vec max(Vec a, Vec b) { return {_mm512_max_ps(a.v, b.v)}; }  // NaN in b stays
static inline Vec min(Vec a, Vec b) { return {_mm512_min_ps(a.v, b.v)}; }
static inline float sum(Vec a) { return _mm512_reduce_add_ps(a.v); }
static inline Vec round_even(Vec a) { return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
static inline Vec scale2(Vec a, Vec n) { return {_mm512_scalef_ps(a.v, n.v)}; }  // a * 2^n
static inline __mmask16 lane_mask(int n) { return __mmask16((1u << n) - 1u); }
static inline Vec load(const float* p) { return {_mm512_loadu_ps(p)}; }
static inline Vec load(const float* p, int n) { return {_mm512_maskz_loadu_ps(lane_mask(n), p)}; }
static inline void store(float* p, Vec a) { _mm512_storeu_ps(p, a.v); }
static inline void store(float* p, Vec a, int n) { _mm512_mask_storeu_ps(p, lane_mask(n), a.v); }
static inline Vec widen(__m256i b) { return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(b), 16))}; }
static inline __m256i narrow(Vec a) {
#if defined(HEBATRON_ISA_AVX512_BF16)
  return (__m256i)_mm512_cvtneps_pbh(a.v);
#else
  __m512i u = _mm512_castps_si512(a.v);
  __m512i odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
  __m512i rounded = _mm512_add_epi32(u, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  __mmask16 nan = _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q);
  rounded = _mm512_mask_or_epi32(rounded, nan, u, _mm512_set1_epi32(0x400000));
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16));
#endif
}
static inline Vec load(const bf16* p) { return widen(_mm256_loadu_si256((const __m256i*)p)); }
static inline Vec load(const bf16* p, int n) { return widen(_mm256_maskz_loadu_epi16(lane_mask(n), p)); }
static inline void store(bf16* p, Vec a) { _mm256_storeu_si256((__m256i*)p, narrow(a)); }
static inline void store(bf16* p, Vec a, int n) { _mm256_mask_storeu_epi16(p, lane_mask(n), narrow(a)); }

#else  // eight lanes: AVX2, or plain loops that any compiler vectorises for its own target
constexpr int kLanes = 8;
#if defined(HEBATRON_ISA_AVX2)
struct Vec {
  __m256 v;
};
static inline Vec set1(float a) { return {_mm256_set1_ps(a)}; }
static inline Vec operator+(Vec a, Vec b) { return {_mm256_add_ps(a.v, b.v)}; }
static inline Vec operator-(Vec a, Vec b) { return {_mm256_sub_ps(a.v, b.v)}; }
static inline Vec operator*(Vec a, Vec b) { return {_mm256_mul_ps(a.v, b.v)}; }
static inline Vec operator/(Vec a, Vec b) { return {_mm256_div_ps(a.v, b.v)}; }
static inline Vec fma(Vec a, Vec b, Vec c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
static inline Vec max(Vec a, Vec b) { return {_mm256_max_ps(a.v, b.v)}; }
static inline Vec min(Vec a, Vec b) { return {_mm256_min_ps(a.v, b.v)}; }
static inline Vec round_even(Vec a) { return {_mm256_round_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
static inline float sum(Vec a) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}
static inline Vec scale2(Vec a, Vec n) {
  __m256i e = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n.v), _mm256_set1_epi32(127)), 23);
  return {_mm256_mul_ps(a.v, _mm256_castsi256_ps(e))};
}
static inline Vec load(const float* p) { return {_mm256_loadu_ps(p)}; }
static inline void store(float* p, Vec a) { _mm256_storeu_ps(p, a.v); }
static inline Vec load(const bf16* p) {
  __m256i u = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p));
  return {_mm256_castsi256_ps(_mm256_slli_epi32(u, 16))};
}
static inline void store(bf16* p, Vec a) {
  __m256i u = _mm256_castps_si256(a.v);
  __m256i odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
  __m256i rounded = _mm256_add_epi32(u, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  __m256 nan = _mm256_cmp_ps(a.v, a.v, _CMP_UNORD_Q);
  __m256i quiet = _mm256_or_si256(u, _mm256_set1_epi32(0x400000));
  rounded = _mm256_castps_si256(_mm256_blendv_ps(_mm256_castsi256_ps(rounded), _mm256_castsi256_ps(quiet), nan));
  rounded = _mm256_srli_epi32(rounded, 16);
  _mm_storeu_si128((__m128i*)p, _mm_packus_epi32(_mm256_castsi256_si128(rounded), _mm256_extracti128_si256(rounded, 1)));
}
#else
struct Vec {
  float v[kLanes];
};
#define HEBATRON_LANES(expr)                      \
  Vec r;                                          \
  for (int i = 0; i < kLanes; i++) r.v[i] = expr; \
  return r;
static inline Vec set1(float a) { HEBATRON_LANES(a) }
static inline Vec operator+(Vec a, Vec b) { HEBATRON_LANES(a.v[i] + b.v[i]) }
static inline Vec operator-(Vec a, Vec b) { HEBATRON_LANES(a.v[i] - b.v[i]) }
static inline Vec operator*(Vec a, Vec b) { HEBATRON_LANES(a.v[i] * b.v[i]) }
static inline Vec operator/(Vec a, Vec b) { HEBATRON_LANES(a.v[i] / b.v[i]) }
static inline Vec fma(Vec a, Vec b, Vec c) { HEBATRON_LANES(a.v[i] * b.v[i] + c.v[i]) }
static inline Vec max(Vec a, Vec b) { HEBATRON_LANES(a.v[i] > b.v[i] ? a.v[i] : b.v[i]) }
static inline Vec min(Vec a, Vec b) { HEBATRON_LANES(a.v[i] < b.v[i] ? a.v[i] : b.v[i]) }
static inline Vec round_even(Vec a) { HEBATRON_LANES((a.v[i] + 12582912.0f) - 12582912.0f) }  // |a| < 2^22
static inline float sum(Vec a) {
  return ((a.v[0] + a.v[4]) + (a.v[2] + a.v[6])) + ((a.v[1] + a.v[5]) + (a.v[3] + a.v[7]));
}
static inline float power2(float n) {
  uint32_t u = uint32_t(int32_t(n) + 127) << 23;
  float f;
  std::memcpy(&f, &u, 4);
  return f;
}
static inline Vec scale2(Vec a, Vec n) { HEBATRON_LANES(a.v[i] * power2(n.v[i])) }
template <class T>
static inline Vec load(const T* p) { HEBATRON_LANES(to_float(p[i])) }
template <class T>
static inline void store(T* p, Vec a) {
  for (int i = 0; i < kLanes; i++) from_float(a.v[i], p[i]);
}
#endif
template <class T>
static inline Vec load(const T* p, int n) {
  T buffer[kLanes] = {};
  std::memcpy((void*)buffer, p, size_t(n) * sizeof(T));
  return load(buffer);
}
template <class T>
static inline void store(T* p, Vec a, int n) {
  T buffer[kLanes];
  store(buffer, a);
  std::memcpy((void*)p, buffer, size_t(n) * sizeof(T));
}
#endif

// e^x; relative error under 2e-7, infinite from 88.4 on (e^88.7 is the largest fp32), NaN stays. |r| <= ln2/2, Taylor to degree 7 (next term 5e-9).
static inline Vec exp(Vec x) {
  x = min(set1(89.0f), max(set1(-87.0f), x));
  Vec n = round_even(x * set1(1.44269504f));
  Vec r = fma(n, set1(-0.693359375f), x);
  r = fma(n, set1(2.12194440e-4f), r);
  Vec p = set1(1.0f / 5040);
  const float c[] = {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f};
  for (float k : c) p = fma(p, r, set1(k));
  return scale2(p, n);
}

static inline Vec sigmoid(Vec x) { return set1(1.0f) / (set1(1.0f) + exp(set1(0.0f) - x)); }

// Runs body(column, lanes) over [0, width) in whole vectors, then once for the tail.
template <class Body>
static inline void for_lanes(int64_t width, const Body& body) {
  int64_t i = 0;
  for (; i + kLanes <= width; i += kLanes) body(i, kLanes);
  if (i < width) body(i, int(width - i));
}
template <class T>
static inline Vec load_lanes(const T* p, int n) { return n == kLanes ? load(p) : load(p, n); }
template <class T>
static inline void store_lanes(T* p, Vec a, int n) { n == kLanes ? store(p, a) : store(p, a, n); }

// body(task) for all tasks, shared among the threads. One thread calls it as it is: it may be one of a parallel region that
// runs this operator for itself.
template <class Body>
static inline void for_tasks(int64_t tasks, int threads, const Body& body) {
  if (threads == 1) {
    for (int64_t task = 0; task < tasks; task++) body(task);
    return;
  }
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t task = 0; task < tasks; task++) body(task);
}

// Stores past the caches, for what nobody reads soon: a line is not read before it is written. Whoever streams ends with
// stream_end().
#if defined(HEBATRON_ISA_AVX512) || defined(HEBATRON_ISA_AVX512_BF16)
static inline void stream(float* p, Vec a) { uintptr_t(p) % 64 ? store(p, a) : _mm512_stream_ps(p, a.v); }
static inline void stream_end() { _mm_sfence(); }
#else
static inline void stream(float* p, Vec a) { store(p, a); }
static inline void stream_end() {}
#endif
static inline void stream(bf16* p, Vec a) { store(p, a); }

}  // namespace
}  // namespace hebatron::HEBATRON_ISA_NAMESPACE
