// What the kernels of the state-space scan share. ssd_update takes the size of a step alone; the scan's kernels take the
// rest: where a block stands among the packed sequences, the steps of a chunk, tiles in shared memory and their products.
#pragma once
#include <cmath>

#include "cuda/rows.cuh"
#include "hebatron/ops.h"

namespace hebatron::cuda {

// log(1 + e^v) to the last bits at both ends: e^-22 is left of -22, and 22 + e^-22 of 22. NaN stays.
HEBATRON_DEVICE float softplus(float v) { return (v > 0.0f ? v : 0.0f) + log1pf(expf(-fabsf(v))); }

// dt = clamp(softplus(raw)), raw with the bias in it. NaN stays.
HEBATRON_DEVICE float step_of(float raw, float least, float most) {
  const float dt = softplus(raw);
  return dt < least ? least : dt > most ? most : dt;
}

// One store of 16 bytes where there are four: nvcc 13 takes every fourth of store<4>'s apart into four.
template <int kCount>
HEBATRON_DEVICE void store_whole(float* p, const float (&in)[kCount]) {
  if constexpr (kCount == 4) {
    uint4 words;
    memcpy(&words, in, sizeof words);
    store_streaming(p, words);
  } else {
    store<kCount>(p, in);
  }
}

// What both operators demand of their sizes.
inline void check_ssd_sizes(const char* op, int64_t sequences, int64_t heads, int64_t head_dim, int64_t groups, int64_t state_dim) {
  check(sequences >= 0, op, "sequences must be >= 0", sequences);
  check(head_dim > 0 && head_dim < 1 << 20, op, "head_dim must be 1 to 2^20", head_dim);
  check(state_dim > 0 && state_dim < 1 << 20, op, "state_dim must be 1 to 2^20", state_dim);
  check(heads > 0 && heads <= 65535, op, "heads must be 1 to 65,535", heads);
  check(groups > 0 && heads % groups == 0, op, "groups must divide the heads", groups);
}

}  // namespace hebatron::cuda
