// What the hand-written kernels of grouped_gemm share on the device: how results leave the registers.
#pragma once
#include "cuda/grouped_gemm.h"
#include "cuda/prim.cuh"

namespace hebatron::cuda {

// act(v) * scale, act the identity or relu(.)^2; a NaN stays one.
HEBATRON_DEVICE float activated(float v, bool relu2, float scale) {
  if (relu2) v = v < 0.0f ? 0.0f : v * v;
  return v * scale;
}

// The 4 x 4 words of a quad of lanes, transposed: lane q ends with word q of lanes 0 to 3. Fragments hold two neighbouring
// columns a lane; after this each lane holds eight, one 16-byte store.
HEBATRON_DEVICE void transpose_quad(uint32_t (&word)[4]) {
  const int quad = lane_id() % 4;
#pragma unroll
  for (int mask = 1; mask <= 2; mask *= 2) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
      if (i & mask) continue;
      const uint32_t other = shfl_xor(quad & mask ? word[i] : word[i | mask], mask);
      if (quad & mask) {
        word[i] = other;
      } else {
        word[i | mask] = other;
      }
    }
  }
}

}  // namespace hebatron::cuda
