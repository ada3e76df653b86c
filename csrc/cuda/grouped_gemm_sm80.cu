// What      out[r] = act(a[row(r)] b[e]) * scale[r] for the rows r of each expert e: bf16 mma.sync, for all chips from sm_80.
//           With kept the way back through relu2: out[r] = 2 scale relu(h) g, and the row's sum of g kept for sum_pieces.
// Grid      a block of 128 threads per tile (rows x columns x K of a stage); no spill on sm_80 and sm_90 (nvcc 13.0):
//           128x128x32  2x2 warps of 64x64, 4 stages 64 KB, 248 registers, 2 blocks an SM; 3 stages 48 KB on 99 KB chips
//           64x128x32   2x2 warps of 32x64, 4 stages 48 KB, 162 registers, 3 blocks an SM, 2 on 99 KB chips
//           16x64x64    1x4 warps of 16x16, 4 stages 40 KB, 74 registers, 3 blocks an SM, 2 on 99 KB chips
// Traffic   out once, on the way back kept once and 8 bytes a row and column tile. A tile reads its rows of a and columns of b
//           through L2, 2 (1 / BM + 1 / BN) bytes a multiply-add: 128x128 asks 4.9 TB/s of L2 at 312 TFLOP/s. DRAM: a and b
//           about once, neighbouring blocks sharing their rows.
// Roofline  6 of 128 experts, 2,688 -> 1,856. 4,096 tokens (245 GFLOP, 1.39 GB): A100 0.79 ms, tensor bound (bytes 0.68 ms
//           at 2.04 TB/s); H100 0.46 ms, DRAM bound (3.0 TB/s). 65,536 tokens: A100 12.6 ms (312 TFLOP/s); H100 4.9 ms at
//           the 800 TFLOP/s of wgmma, of which mma.sync is reported to reach 0.63. All computed.
// Measured  never run on hardware.
// Limits    k, n and the strides of a and b multiples of 8, tensors on 16 bytes; sizes below 2^31, 64-bit offsets; 49 KB of
//           shared memory a block. The values of offsets and rows_of_a are trusted: the host never reads them.
// Why so    a tile a block, not a persistent grid: with two or three blocks on an SM the neighbour's main loop hides a
//           block's search, fill and stores, and the hardware hands out tiles as they end, whatever the experts' sizes.
//           Warps of 64x64: per k16 a tile moves 24 KB through shared memory in 256 clocks of A100's tensor cores, 75 %
//           of what it can; 8 warps of 64x32 would need all of it.
#include "cuda/grouped_gemm_sm80.cuh"

namespace hebatron::cuda {
namespace {

// Rows [row, end) of an expert belong to a row tile; expert == experts: rows past the last end; -1: no rows left.
struct RowTile {
  int expert, row, end;
};

// Called by one warp: writes row tile number `tile` of those that the groups' ends give, by a scan of 32 groups at a time.
template <int kM>
HEBATRON_DEVICE void find_rows(const GroupedGemmArgs& g, int tile, RowTile* found) {
  const int lane = lane_id(), experts = int(g.experts);
  int start = 0, before = 0;  // the first row, and the first tile, of the 32 groups at hand
  for (int first = 0; first <= experts; first += kWarp) {
    const int group = first + lane;
    const int end = group < experts ? g.offsets[group] : int(g.rows);
    const int previous = shfl_up(end, 1), row = lane ? previous : start;
    const int tiles = (end - row + kM - 1) / kM;
    int after = tiles;
#pragma unroll
    for (int offset = 1; offset < kWarp; offset *= 2) {
      const int left = shfl_up(after, offset);
      if (lane >= offset) after += left;
    }
    after += before;
    const bool hit = tile >= after - tiles && tile < after;
    if (hit) *found = {group, row + (tile - (after - tiles)) * kM, end};
    if (any(hit)) return;
    start = shfl(end, kWarp - 1);
    before = shfl(after, kWarp - 1);
  }
  if (lane == 0) *found = {-1, 0, 0};
}

// What a thread copies into each stage: chunks kStepA rows of a apart, and kStepB rows of b apart. A row of b is one column's
// k when k-major, and one k's columns when n-major. What lies outside the rows, N or K becomes zeros: they add nothing.
template <class T, bool kKMajor>
struct Loader {
  static constexpr int kChunksA = T::kK / kChunk, kChunksB = (kKMajor ? T::kK : T::kN) / kChunk;
  static constexpr int kStepA = kThreads / kChunksA, kStepB = kThreads / kChunksB;
  static constexpr int kLoadsA = T::kM / kStepA, kLoadsB = (kKMajor ? T::kN : T::kK) / kStepB;
  static_assert(kStepA % 8 == 0 && kStepB % 8 == 0, "a thread's chunks must share one swizzle");

  const bf16* a[kLoadsA];
  const bf16* b;
  int64_t b_step, b_advance;    // elements of b between the thread's chunks, and per element of K
  uint32_t rows_in, columns_in; // bit i: chunk i lies inside the rows, inside N
  int k, k_of_a, k_of_b;        // K, and where in a stage's K the thread's first chunks start

  HEBATRON_DEVICE Loader(const GroupedGemmArgs& g, const RowTile& tile, int column) {
    const int row_a = threadIdx.x / kChunksA, chunk_a = threadIdx.x % kChunksA;
    const int row_b = threadIdx.x / kChunksB, chunk_b = threadIdx.x % kChunksB;
    k = int(g.k);
    k_of_a = chunk_a * kChunk;
    k_of_b = kKMajor ? chunk_b * kChunk : row_b;
    rows_in = columns_in = 0;
#pragma unroll
    for (int i = 0; i < kLoadsA; i++) {
      const int row = tile.row + row_a + i * kStepA;
      const bool in = row < tile.end;
      const int64_t source = in && g.rows_of_a ? g.rows_of_a[row] : in ? row : 0;
      a[i] = static_cast<const bf16*>(g.a) + source * g.a_stride + k_of_a;
      rows_in |= uint32_t(in) << i;
    }
    const int column_b = column + (kKMajor ? row_b : chunk_b * kChunk);
#pragma unroll
    for (int i = 0; i < kLoadsB; i++) columns_in |= uint32_t(column_b + (kKMajor ? i * kStepB : 0) < g.n) << i;
    b_step = kStepB * g.b_stride;
    b_advance = kKMajor ? 1 : g.b_stride;
    b = static_cast<const bf16*>(g.b) + tile.expert * g.b_expert_stride +
        (kKMajor ? column_b * g.b_stride + k_of_b : k_of_b * g.b_stride + column_b);
  }

  // B first: its addresses do not wait for rows_of_a.
  HEBATRON_DEVICE void load(uint32_t stage, int k0) const {
    const uint32_t to_a = stage + swizzled<kChunksA>(threadIdx.x / kChunksA, threadIdx.x % kChunksA);
    const uint32_t to_b = stage + T::kBytesA + swizzled<kChunksB>(threadIdx.x / kChunksB, threadIdx.x % kChunksB);
#pragma unroll
    for (int i = 0; i < kLoadsB; i++) {
      const bool in = (columns_in >> i & 1) && k0 + k_of_b + (kKMajor ? 0 : i * kStepB) < k;
      cp_async_16(to_b + i * kThreads * 16, b + i * b_step + k0 * b_advance, in);
    }
#pragma unroll
    for (int i = 0; i < kLoadsA; i++)
      cp_async_16(to_a + i * kThreads * 16, a[i] + k0, (rows_in >> i & 1) && k0 + k_of_a < k);
  }
};

// A lane holds 2 columns of every piece of 8: quads exchange, so that it stores all 16 bytes of every fourth piece instead, and
// reads `kept` so. Pieces of 16 rows: the first kFragsN are of the upper 8 rows, the others of the lower 8. With kBack
// sums[i][half] are this lane's shares of the sums of rows.
template <class T, bool kBack>
HEBATRON_DEVICE void store_tile(const GroupedGemmArgs& g, const Accumulator<T>& sum, int row, int end, int column,
                                float (&sums)[T::kFragsM][2]) {
  const int in_quad = lane_id() % 4;
  row += lane_id() / 4;
#pragma unroll
  for (int i = 0; i < T::kFragsM; i++) {
    float scale[2];
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const int r = row + i * 16 + half * 8;
      scale[half] = g.scale && r < end ? g.scale[r] : 1.0f;
    }
#pragma unroll
    for (int piece = 0; piece < 2 * T::kFragsN; piece += 4) {
      const int own = piece + in_quad, r = row + i * 16 + own / T::kFragsN * 8, c = column + own % T::kFragsN * 8;
      const bool in = r < end && c < g.n;
      uint32_t words[4], kept[4] = {};
      if (kBack) {
        if (in) {
          const uint4 read = *reinterpret_cast<const uint4*>(static_cast<const bf16*>(g.kept) + r * g.n + c);
          kept[0] = read.x, kept[1] = read.y, kept[2] = read.z, kept[3] = read.w;
        }
        transpose_quad(kept);
      }
#pragma unroll
      for (int p = 0; p < 4; p++) {
        const int half = (piece + p) / T::kFragsN, j = (piece + p) % T::kFragsN;
        float pair[2] = {sum[i][j][2 * half], sum[i][j][2 * half + 1]};
#pragma unroll
        for (int q = 0; q < 2; q++) {
          if (kBack) {
            const float k = unpack_bf16(kept[p], q);
            if (column + j * 8 < g.n) sums[i][half] += pair[q] * k;  // past N an infinite row of a gives NaN
            pair[q] = through_relu2(pair[q], k, scale[half]);
          } else {
            pair[q] = activated(pair[q], g.relu2, scale[half]);
          }
        }
        words[p] = pack_bf16(pair[0], pair[1]);
      }
      transpose_quad(words);
      if (in) *reinterpret_cast<uint4*>(static_cast<bf16*>(g.out) + r * g.n + c) = uint4{words[0], words[1], words[2], words[3]};
    }
  }
}

// The lanes' shares of the sums of rows become the block's: over a quad, then over the warps beside one another, in their order.
template <class T>
HEBATRON_DEVICE void store_sums(float (&sums)[T::kFragsM][2], float* slots, float* piece, int row, int end, int warp_row, int warp_n) {
#pragma unroll
  for (int i = 0; i < T::kFragsM; i++)
#pragma unroll
    for (int half = 0; half < 2; half++) {
      float v = sums[i][half];
      v += shfl_xor(v, 1);
      v += shfl_xor(v, 2);
      if (lane_id() % 4 == 0) slots[warp_n * T::kM + warp_row + i * 16 + half * 8 + lane_id() / 4] = v;
    }
  block_sync();
  const int r = threadIdx.x;
  if (r >= T::kM || row + r >= end) return;
  float total = 0.0f;
#pragma unroll
  for (int n = 0; n < T::kWarpsN; n++) total += slots[n * T::kM + r];
  piece[row + r] = total;
}

template <class T>
HEBATRON_DEVICE void store_zeros(const GroupedGemmArgs& g, float* piece, int row, int end, int column) {
  constexpr int kChunks = T::kN / kChunk;
  const int c = column + threadIdx.x % kChunks * kChunk;
  for (int r = row + threadIdx.x; piece && r < end && r < row + T::kM; r += kThreads) piece[r] = 0.0f;
  if (c >= g.n) return;
  for (int r = row + threadIdx.x / kChunks; r < end && r < row + T::kM; r += kThreads / kChunks)
    *reinterpret_cast<uint4*>(static_cast<bf16*>(g.out) + r * g.n + c) = uint4{0, 0, 0, 0};
}

template <class T, bool kKMajor, bool kBack>
__global__ void __launch_bounds__(kThreads, T::kBlocks) grouped_gemm(const GroupedGemmArgs g, float* pieces) {
  HEBATRON_DYNAMIC_SHARED(stages);
  RowTile* found = reinterpret_cast<RowTile*>(stages + T::kStages * T::kBytesStage);
  const int column_tiles = (int(g.n) + T::kN - 1) / T::kN;
  if (threadIdx.x < kWarp) find_rows<T::kM>(g, blockIdx.x / column_tiles, found);
  block_sync();
  const RowTile tile = *found;
  const int column = blockIdx.x % column_tiles * T::kN;
  if (tile.expert < 0) return;
  float* const piece = kBack ? pieces + column / T::kN * g.rows : nullptr;  // this column tile's sums of rows
  if (tile.expert == g.experts) return store_zeros<T>(g, piece, tile.row, tile.end, column);
  const int warp = threadIdx.x / kWarp;
  const int warp_row = warp / T::kWarpsN * T::kWarpM, warp_column = warp % T::kWarpsN * T::kWarpN;
  float sum[T::kFragsM][T::kFragsN][4] = {};
  const Loader<T, kKMajor> loader(g, tile, column);
  const Reader<T, true, kKMajor> reader(warp_row, warp_column);
  multiply<T>(loader, reader, smem_address(stages), sum);
  float sums[T::kFragsM][2] = {};
  store_tile<T, kBack>(g, sum, tile.row + warp_row, tile.end, column + warp_column, sums);
  if (kBack) {
    block_sync();  // the stages are read: the sums of rows take their place
    store_sums<T>(sums, reinterpret_cast<float*>(stages), piece, tile.row, tile.end, warp_row, warp % T::kWarpsN);
  }
}

// Row tiles are at most rows / kM and one more per group that has rows, the rows past the last end being a group too. Blocks
// past the real count end at once.
template <class T>
void run(const GroupedGemmArgs& g, const Exec& exec) {
  const int64_t groups = g.experts + 1 < g.rows ? g.experts + 1 : g.rows;
  const int64_t most = g.rows / T::kM + groups, row_tiles = most < g.rows ? most : g.rows;
  const int64_t blocks = row_tiles * ((g.n + T::kN - 1) / T::kN);
  check(blocks < int64_t(1) << 31, "grouped_gemm[sm80]", "tiles must be fewer than 2^31", blocks);
  const LaunchShape shape{dim3(unsigned(blocks)), dim3(kThreads), T::kStages * T::kBytesStage + int(sizeof(RowTile))};
  const auto kernel = g.kept        ? grouped_gemm<T, false, true>
                      : g.b_k_major ? grouped_gemm<T, true, false>
                                    : grouped_gemm<T, false, false>;
  launch("grouped_gemm", kernel, shape, exec, g, static_cast<float*>(exec.workspace));
  if (g.kept) launch_sum_pieces("grouped_gemm[sm80]", g, (g.n + T::kN - 1) / T::kN, exec);
}

}  // namespace

Sm80Tile sm80_tile(const GroupedGemmArgs& g, int bytes_shared) {
  // 128x128 does 1.33 times the work at 192 rows an expert, 64x128 1.16 times and 1.02 from 1,500 rows on (uniform routing).
  const int64_t mean = g.rows / (g.experts ? g.experts : 1);
  const int64_t m = g.tile_m ? g.tile_m : mean <= 24 ? 16 : mean <= 256 ? 64 : 128;
  if (m == 16) return {16, 64, 4};
  if (m == 64) return {64, 128, 4};
  return {128, 128, bytes_shared >= 2 * 65 * 1024 ? 4 : 3};  // two blocks of 4 stages, or of 3 where they do not fit
}

const char* refuse_grouped_gemm_sm80(const GroupedGemmArgs& g) {
  if (g.kept && g.b_k_major) return "needs n contiguous in b for the way back through relu2";
  if (g.k % kChunk || g.n % kChunk || g.k == 0 || g.n == 0) return "k and n must be multiples of 8, and not 0";
  if (g.a_stride % kChunk || g.b_stride % kChunk || g.b_expert_stride % kChunk)
    return "the strides of a and b must be multiples of 8";
  for (const void* p : {g.a, g.b, g.kept, static_cast<const void*>(g.out)})
    if (reinterpret_cast<uintptr_t>(p) % 16) return "a, b, kept and out must start on a multiple of 16 bytes";
  for (const int64_t size : {g.rows, g.a_rows, g.experts, g.n, g.k})
    if (size >= kMaxSize) return "rows, experts, n and k must be below 2^31 - 256";
  constexpr int64_t kTiles[][2] = {{0, 0}, {16, 64}, {64, 128}, {128, 128}};
  for (const auto& tile : kTiles)
    if (g.tile_m == tile[0] && g.tile_n == tile[1]) return nullptr;
  return "the tile must be 16x64, 64x128 or 128x128";
}

void grouped_gemm_sm80(const GroupedGemmArgs& g, const Exec& exec) {
  const Sm80Tile tile = sm80_tile(g, bytes_shared_per_block(exec));
  if (tile.m == 16) return run<Tile80<16, 64, 64, 1, 4, 3>>(g, exec);
  if (tile.m == 64) return run<Tile80<64, 128, 32, 2, 4, 3>>(g, exec);
  if (tile.stages == 3) return run<Tile80<128, 128, 32, 2, 3, 2>>(g, exec);
  return run<Tile80<128, 128, 32, 2, 4, 2>>(g, exec);
}

}  // namespace hebatron::cuda
