// What the attention kernels share: the layout of rows in shared memory and the softmax's small pieces.
#pragma once
#include <cmath>

#include "cuda/rows.cuh"

namespace hebatron::cuda {
namespace {

using bf16 = __nv_bfloat16;
constexpr float kNone = -INFINITY;  // the score of a key that is not seen
constexpr float kLog2E = 1.4426950408889634f, kLn2 = 0.6931471805599453f;

// Byte offset of 16-byte chunk `chunk` of row `row`, of kChunks each, 8 at least: 8 rows at one chunk (a matrix of ldmatrix)
// and 8 chunks of a row (a quarter warp's cp.async) fall into different banks.
template <int kChunks>
HEBATRON_DEVICE uint32_t swizzled(int row, int chunk) {
  return uint32_t(row * kChunks + (chunk ^ row % 8)) * 16;
}

// Over the four lanes that hold a row of an accumulator.
HEBATRON_DEVICE float quad_max(float v) {
  v = fmaxf(v, shfl_xor(v, 1));
  return fmaxf(v, shfl_xor(v, 2));
}
HEBATRON_DEVICE float quad_sum(float v) {
  v += shfl_xor(v, 1);
  return v + shfl_xor(v, 2);
}

}  // namespace
}  // namespace hebatron::cuda
