// The threads of one parallel region that go through a token's layers together: a barrier whose waiting threads read ahead.
#pragma once
#if defined(_OPENMP)
#include <omp.h>
#endif
#include <sched.h>

#include <algorithm>

#include "hebatron/ops.h"

namespace hebatron::HEBATRON_ISA_NAMESPACE {

// A thread's share of attention_decode, between barriers: the new keys and values, the parts, their sums.
enum class AttentionDecodePhase { write, parts, join };
void attention_decode_member(const AttentionDecodeArgs& a, void* workspace, AttentionDecodePhase phase, int64_t id, int64_t count);

namespace {

// A workspace that serves as many serves any number of threads.
static inline int64_t most_threads() {
#if defined(_OPENMP)
  return omp_get_max_threads();
#else
  return 1;
#endif
}

// Memory that a thread reads next.
struct Span {
  const char* at = nullptr;
  int64_t bytes = 0;
};
constexpr int64_t kSpanBytes = 3 << 16;  // read ahead at most: of an L2 of 512 KiB

struct Member {
  int64_t* arrived;  // by all threads, at all barriers so far; shared
  int64_t id, count;
  int64_t passed = 0;

  // Until every thread is here. DRAM is idle while threads wait, and it is what a token waits for.
  void wait(Span next = {}) {
    const int64_t all = ++passed * count;
    __atomic_add_fetch(arrived, 1, __ATOMIC_ACQ_REL);
    const char *at = next.at, *end = next.at + std::min(next.bytes, kSpanBytes);
    for (int64_t polls = 0; __atomic_load_n(arrived, __ATOMIC_ACQUIRE) < all; polls++) {
      if (at < end) {
        for (int i = 0; i < 4; i++, at += 64) __builtin_prefetch(at, 0, 2);
      } else if (polls > kPolls) {
        sched_yield();  // more threads than cores: the one that is waited for may be waiting for this core
      } else {
        pause();
      }
    }
  }
  // This thread's share of `total` tasks: as many consecutive ones as the others have, or one fewer.
  int64_t begin(int64_t total) const { return total * id / count; }
  int64_t end(int64_t total) const { return total * (id + 1) / count; }

 private:
  static constexpr int64_t kPolls = 4096;  // about 50 us
  static void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
  }
};

}  // namespace
}  // namespace hebatron::HEBATRON_ISA_NAMESPACE
