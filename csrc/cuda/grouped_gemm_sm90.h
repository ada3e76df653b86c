// The tiles of grouped_gemm on sm_90a and the choice among them: what the kernels' files and the host agree on.
#pragma once
#include <algorithm>

#include "cuda/grouped_gemm.h"

namespace hebatron::cuda {

// Rows and columns of a tile, and the rows of a block: where these are half as many, two blocks of a cluster share the tile,
// and each half of b is read from L2 once for both. With b's n contiguous, columns come in groups of 64.
#define HEBATRON_SM90_TILES(X)                                                                    \
  X(64, 128, 64) X(64, 256, 64) X(128, 128, 128) X(128, 208, 128) X(128, 224, 128) X(128, 232, 128) \
  X(192, 208, 192) X(192, 224, 192) X(256, 192, 256) X(256, 208, 128) X(384, 208, 192) X(512, 192, 256)
#define HEBATRON_SM90_DGRAD_TILES(X)                                                 \
  X(64, 128, 64) X(64, 256, 64) X(128, 192, 128) X(192, 192, 192)     \
  X(256, 192, 256) X(384, 192, 192) X(512, 192, 256)
// Of out as it lies, for the gradient of the weights.
#define HEBATRON_SM90_WGRAD_TILES(X) X(128, 192) X(192, 192) X(256, 192)

namespace sm90 {

constexpr int kStepK = 64;  // of K in a stage: 128 bytes, one row of the swizzle
constexpr int kBytesRow = 128;
constexpr int kBytesShared = 227 * 1024;  // what a block of sm_90 may have
constexpr int kBytesTables = 2048;        // of these, at least, for the barriers and the count of tiles
constexpr int kMaxExperts = 512;

// Of a block of m x n.
constexpr int stage_count(int m, int n) { return (kBytesShared - kBytesTables) / ((m + n) * kBytesRow); }
constexpr int max_experts(int m, int n) {  // 490 with 128 x 232, whose five stages leave no more
  const int stages = stage_count(m, n), bytes_barriers = stages * 2 * int(sizeof(uint64_t));
  const int room = (kBytesShared - stages * (m + n) * kBytesRow - bytes_barriers) / int(sizeof(int)) - 2;
  return room < kMaxExperts ? room : kMaxExperts;
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace sm90

// The part of grouped_gemm_sm90 that multiplies by b with n contiguous (grouped_gemm_dgrad_sm90.cu).
void grouped_gemm_dgrad_sm90(const GroupedGemmArgs& args, const Exec& exec, GroupedGemmTile tile);

}  // namespace hebatron::cuda
