// What the kernels of the sm_80 family share: the tile of a block, its swizzle in shared memory, the fragments of a warp and
// the main loop over cp.async stages and mma.sync.
#pragma once
#include "cuda/grouped_gemm.cuh"

namespace hebatron::cuda {
namespace {

using bf16 = __nv_bfloat16;
constexpr int kThreads = 128;
constexpr int kChunk = 8;  // bf16 in 16 bytes: what one cp.async, one row of an ldmatrix and one store move
constexpr int64_t kMaxSize = (int64_t(1) << 31) - 256;  // an int may hold it and a tile more

// A block's tile kM x kN, its warps kWarpsM x kWarpsN; each of kStages stages holds kK of K. kBlocks of them fit an SM.
template <int kM_, int kN_, int kK_, int kWarpsM_, int kStages_, int kBlocks_>
struct Tile80 {
  static constexpr int kM = kM_, kN = kN_, kK = kK_, kStages = kStages_, kBlocks = kBlocks_;
  static constexpr int kWarpsM = kWarpsM_, kWarpsN = kThreads / kWarp / kWarpsM_;
  static constexpr int kWarpM = kM / kWarpsM, kWarpN = kN / kWarpsN;
  static constexpr int kFragsM = kWarpM / 16, kFragsN = kWarpN / 8;
  static constexpr int kSteps = kK / 16;  // of the m16n8k16 a stage
  static constexpr int kBytesA = kM * kK * 2, kBytesStage = kBytesA + kN * kK * 2;
  static_assert(kSteps % 2 == 0 && kFragsN % 2 == 0, "fragments are double buffered, and read two columns at a time");
};

// Byte offset of 16-byte chunk `chunk` of row `row` in a tile of kChunks chunks a row. Both kinds of access are free of
// conflicts: 8 rows at one chunk (a matrix of ldmatrix) and 8 consecutive chunks (a quarter warp's cp.async) fall into the
// 8 different 16-byte columns of the 32 banks. Rows of 64 bytes, two to a bank line: column 4 (row % 2) + (chunk ^ row / 2
// % 4). Rows of 128 and 256 bytes: column (chunk ^ row % 8) % 8. Unswizzled, 8 rows meet in two columns or in one.
template <int kChunks>
HEBATRON_DEVICE uint32_t swizzled(int row, int chunk) {
  constexpr int kRowsOfLine = kChunks < 8 ? 8 / kChunks : 1, kSpread = kChunks < 8 ? kChunks : 8;
  return uint32_t(row * kChunks + (chunk ^ (row / kRowsOfLine % kSpread))) * 16;
}

template <class T>
struct Fragments {
  uint32_t a[T::kFragsM][4], b[T::kFragsN][2];
};

// Where in a stage this lane's rows of its warp's matrices start. An operand lies k-major, a row of the tile one row of a or
// one column of b, or k by k. A step along the contiguous dimension changes bits of the chunk only, so it is an exclusive or
// with the offset; a step along the rows is an addition.
template <class T, bool kAKMajor, bool kBKMajor>
struct Reader {
  uint32_t a, b;

  HEBATRON_DEVICE Reader(int warp_row, int warp_column) {
    const int lane = lane_id();
    a = kAKMajor ? swizzled<T::kK / kChunk>(warp_row + lane % 16, lane / 16)
                 : swizzled<T::kM / kChunk>(lane % 8 + lane / 16 * 8, warp_row / kChunk + lane / 8 % 2);
    b = T::kBytesA + (kBKMajor ? swizzled<T::kK / kChunk>(warp_column + lane % 8 + lane / 16 * 8, lane / 8 % 2)
                               : swizzled<T::kN / kChunk>(lane % 16, warp_column / kChunk + lane / 16));
  }

  HEBATRON_DEVICE void read(uint32_t stage, int step, Fragments<T>& f) const {
#pragma unroll
    for (int i = 0; i < T::kFragsM; i++) {
      if (kAKMajor)
        ldmatrix_x4(f.a[i], stage + (a ^ step * 32) + i * 16 * T::kK * 2);
      else
        ldmatrix_x4_trans(f.a[i], stage + (a ^ i * 32) + step * 16 * T::kM * 2);
    }
#pragma unroll
    for (int j = 0; j < T::kFragsN; j += 2) {
      uint32_t r[4];
      if (kBKMajor)
        ldmatrix_x4(r, stage + (b ^ step * 32) + j * 8 * T::kK * 2);
      else
        ldmatrix_x4_trans(r, stage + (b ^ j * 16) + step * 16 * T::kN * 2);
      f.b[j][0] = r[0], f.b[j][1] = r[1], f.b[j + 1][0] = r[2], f.b[j + 1][1] = r[3];
    }
  }
};

template <class T>
using Accumulator = float[T::kFragsM][T::kFragsN][4];

// The sum over all of loader.k, which is not 0: loader.load(stage, k0) is called with k0 = 0, kK, 2 kK and so on, in order.
// One barrier a stage: after it every warp has read stage s for the last time, and the next turn refills that slot. The next
// fragments are read before the current ones are multiplied, across the barrier too.
template <class T, class Loader, class Reader>
HEBATRON_DEVICE void multiply(Loader& loader, const Reader& reader, uint32_t stages, Accumulator<T>& sum) {
  const int turns = (loader.k + T::kK - 1) / T::kK;
#pragma unroll
  for (int s = 0; s < T::kStages - 1; s++) {
    if (s < turns) loader.load(stages + s * T::kBytesStage, s * T::kK);
    cp_async_commit();
  }
  cp_async_wait<T::kStages - 2>();
  block_sync();
  Fragments<T> fragments[2];
  reader.read(stages, 0, fragments[0]);
  int slot = 0, free_slot = T::kStages - 1;
  for (int turn = 0; turn < turns; turn++) {
#pragma unroll
    for (int step = 0; step < T::kSteps; step++) {
      if (step + 1 < T::kSteps) {
        reader.read(stages + slot * T::kBytesStage, step + 1, fragments[(step + 1) % 2]);
      } else if (turn + 1 < turns) {
        cp_async_wait<T::kStages - 2>();
        block_sync();
        slot = slot + 1 == T::kStages ? 0 : slot + 1;
        reader.read(stages + slot * T::kBytesStage, 0, fragments[(step + 1) % 2]);
      }
      if (step == 0) {
        const int ahead = turn + T::kStages - 1;
        if (ahead < turns) loader.load(stages + free_slot * T::kBytesStage, ahead * T::kK);
        cp_async_commit();  // an empty group past the end keeps the count that the wait relies on
        free_slot = free_slot + 1 == T::kStages ? 0 : free_slot + 1;
      }
      const Fragments<T>& f = fragments[step % 2];
#pragma unroll
      for (int i = 0; i < T::kFragsM; i++)
#pragma unroll
        for (int j = 0; j < T::kFragsN; j++) mma_m16n8k16(sum[i][j], f.a[i], f.b[j]);
    }
  }
}

}  // namespace
}  // namespace hebatron::cuda
