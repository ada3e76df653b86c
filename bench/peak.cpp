// The machine's rate of products, for bench/common.py: chains of multiply-adds that never leave the registers (inline assembly:
// an array of accumulators read half of the rate). extern "C" double peak(int bf16, int threads, double seconds), in operations a
// second; 0 where this CPU has no such instruction. Build: c++ -O3 -march=native -fopenmp -shared -fPIC.
#include <omp.h>

#include <chrono>

#if defined(__AVX512F__)
#include <immintrin.h>
using Register = __m512;
constexpr int kChains = 24, kFloats = 16;
#elif defined(__AVX2__) && defined(__FMA__)
#include <immintrin.h>
using Register = __m256;
constexpr int kChains = 12, kFloats = 8;
#endif

static double now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

#if defined(__AVX512F__) || (defined(__AVX2__) && defined(__FMA__))
template <bool kBf16>
static double rounds(double seconds) {  // of all chains, in one thread
  Register c[kChains] = {}, a = {}, b = {};
  double done = 0;
  for (const double end = now() + seconds; now() < end; done += 1000)
    for (int n = 0; n < 1000; n++) {
#pragma GCC unroll 24
      for (int i = 0; i < kChains; i++) {
#if defined(__AVX512BF16__)
        if (kBf16) {
          asm volatile("vdpbf16ps %2, %1, %0" : "+v"(c[i]) : "v"(a), "v"(b));
          continue;
        }
#endif
        asm volatile("vfmadd231ps %2, %1, %0" : "+v"(c[i]) : "v"(a), "v"(b));
      }
    }
  return done;
}

extern "C" double peak(int bf16, int threads, double seconds) {
#if !defined(__AVX512BF16__)
  if (bf16) return 0.0;
#endif
  double total = 0;
  const double begin = now();
#pragma omp parallel num_threads(threads) reduction(+ : total)
  total += bf16 ? rounds<true>(seconds) : rounds<false>(seconds);
  return total * kChains * kFloats * (bf16 ? 4 : 2) / (now() - begin);
}
#else
extern "C" double peak(int, int, double) { return 0.0; }
#endif

// Bytes a second of reading `bytes` from memory, each thread its own part in order.
extern "C" double read_rate(const char* data, long long bytes, int threads) {
  double total = 0;
  const double begin = now();
#pragma omp parallel num_threads(threads) reduction(+ : total)
  {
    const long long part = bytes / threads / 1024 * 1024;
    const float* from = (const float*)(data + part * omp_get_thread_num());
    float sums[64] = {};
    for (long long i = 0; i < part / 4; i += 64)
      for (int j = 0; j < 64; j++) sums[j] += from[i + j];
    for (float sum : sums) total += sum;
  }
  const double seconds = now() - begin;
  volatile double kept = total;
  (void)kept;
  return bytes / seconds;
}
