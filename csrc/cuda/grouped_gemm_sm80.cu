// What      out[r] = act(a[row(r)] b[e]) * scale[r] for the rows r of each expert e: bf16 mma.sync, for all chips from sm_80.
// Grid      a block of 128 threads per tile (rows x columns x K of a stage); no spill on sm_80 and sm_90 (nvcc 13.0):
//           128x128x32  2x2 warps of 64x64, 4 stages 64 KB, 248 registers, 2 blocks an SM; 3 stages 48 KB on 99 KB chips
//           64x128x32   2x2 warps of 32x64, 4 stages 48 KB, 162 registers, 3 blocks an SM, 2 on 99 KB chips
//           16x64x64    1x4 warps of 16x16, 4 stages 40 KB, 74 registers, 3 blocks an SM, 2 on 99 KB chips
// Traffic   out once. A tile reads its rows of a and columns of b through L2, 2 (1 / BM + 1 / BN) bytes a multiply-add:
//           128x128 asks 4.9 TB/s of L2 at 312 TFLOP/s. DRAM: a and b about once, neighbouring blocks sharing their rows.
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

template <class T>
struct Fragments {
  uint32_t a[T::kFragsM][4], b[T::kFragsN][2];
};

// Where in a stage this lane's rows of its warp's matrices start. A step along K, or along N in an n-major tile, changes
// bits of the chunk only, so it is an exclusive or with the offset; a step along the rows is an addition.
template <class T, bool kKMajor>
struct Reader {
  uint32_t a, b;

  HEBATRON_DEVICE Reader(int warp_row, int warp_column) {
    const int lane = lane_id();
    a = swizzled<T::kK / kChunk>(warp_row + lane % 16, lane / 16);
    b = T::kBytesA + (kKMajor ? swizzled<T::kK / kChunk>(warp_column + lane % 8 + lane / 16 * 8, lane / 8 % 2)
                              : swizzled<T::kN / kChunk>(lane % 16, warp_column / kChunk + lane / 16));
  }

  HEBATRON_DEVICE void read(uint32_t stage, int step, Fragments<T>& f) const {
#pragma unroll
    for (int i = 0; i < T::kFragsM; i++) ldmatrix_x4(f.a[i], stage + (a ^ step * 32) + i * 16 * T::kK * 2);
#pragma unroll
    for (int j = 0; j < T::kFragsN; j += 2) {
      uint32_t r[4];
      if (kKMajor)
        ldmatrix_x4(r, stage + (b ^ step * 32) + j * 8 * T::kK * 2);
      else
        ldmatrix_x4_trans(r, stage + (b ^ j * 16) + step * 16 * T::kN * 2);
      f.b[j][0] = r[0], f.b[j][1] = r[1], f.b[j + 1][0] = r[2], f.b[j + 1][1] = r[3];
    }
  }
};

template <class T>
using Accumulator = float[T::kFragsM][T::kFragsN][4];

// One barrier a stage: after it every warp has read stage s for the last time, and the next turn refills that slot. The next
// fragments are read before the current ones are multiplied, across the barrier too.
template <class T, bool kKMajor>
HEBATRON_DEVICE void multiply(const Loader<T, kKMajor>& loader, const Reader<T, kKMajor>& reader, uint32_t stages,
                              Accumulator<T>& sum) {
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

// A lane holds 2 columns of every piece of 8: quads exchange, so that it stores all 16 bytes of every fourth piece instead.
// Pieces of 16 rows: the first kFragsN are of the upper 8 rows, the others of the lower 8.
template <class T>
HEBATRON_DEVICE void store_tile(const GroupedGemmArgs& g, const Accumulator<T>& sum, int row, int end, int column) {
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
      uint32_t words[4];
#pragma unroll
      for (int p = 0; p < 4; p++) {
        const int half = (piece + p) / T::kFragsN, j = (piece + p) % T::kFragsN;
        const float* pair = &sum[i][j][2 * half];
        words[p] = pack_bf16(activated(pair[0], g.relu2, scale[half]), activated(pair[1], g.relu2, scale[half]));
      }
      transpose_quad(words);
      const int half = (piece + in_quad) / T::kFragsN, j = (piece + in_quad) % T::kFragsN;
      const int r = row + i * 16 + half * 8, c = column + j * 8;
      if (r < end && c < g.n)
        *reinterpret_cast<uint4*>(static_cast<bf16*>(g.out) + r * g.n + c) = uint4{words[0], words[1], words[2], words[3]};
    }
  }
}

template <class T>
HEBATRON_DEVICE void store_zeros(const GroupedGemmArgs& g, int row, int end, int column) {
  constexpr int kChunks = T::kN / kChunk;
  const int c = column + threadIdx.x % kChunks * kChunk;
  if (c >= g.n) return;
  for (int r = row + threadIdx.x / kChunks; r < end && r < row + T::kM; r += kThreads / kChunks)
    *reinterpret_cast<uint4*>(static_cast<bf16*>(g.out) + r * g.n + c) = uint4{0, 0, 0, 0};
}

template <class T, bool kKMajor>
__global__ void __launch_bounds__(kThreads, T::kBlocks) grouped_gemm(const GroupedGemmArgs g) {
  HEBATRON_DYNAMIC_SHARED(stages);
  RowTile* found = reinterpret_cast<RowTile*>(stages + T::kStages * T::kBytesStage);
  const int column_tiles = (int(g.n) + T::kN - 1) / T::kN;
  if (threadIdx.x < kWarp) find_rows<T::kM>(g, blockIdx.x / column_tiles, found);
  block_sync();
  const RowTile tile = *found;
  const int column = blockIdx.x % column_tiles * T::kN;
  if (tile.expert < 0) return;
  if (tile.expert == g.experts) return store_zeros<T>(g, tile.row, tile.end, column);
  const int warp = threadIdx.x / kWarp;
  const int warp_row = warp / T::kWarpsN * T::kWarpM, warp_column = warp % T::kWarpsN * T::kWarpN;
  float sum[T::kFragsM][T::kFragsN][4] = {};
  const Loader<T, kKMajor> loader(g, tile, column);
  const Reader<T, kKMajor> reader(warp_row, warp_column);
  multiply<T, kKMajor>(loader, reader, smem_address(stages), sum);
  store_tile<T>(g, sum, tile.row + warp_row, tile.end, column + warp_column);
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
  launch("grouped_gemm", g.b_k_major ? grouped_gemm<T, true> : grouped_gemm<T, false>, shape, exec, g);
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
  if (g.kept) return "has no way back through relu2";
  if (g.k % kChunk || g.n % kChunk || g.k == 0 || g.n == 0) return "k and n must be multiples of 8, and not 0";
  if (g.a_stride % kChunk || g.b_stride % kChunk || g.b_expert_stride % kChunk)
    return "the strides of a and b must be multiples of 8";
  for (const void* p : {g.a, g.b, static_cast<const void*>(g.out)})
    if (reinterpret_cast<uintptr_t>(p) % 16) return "a, b and out must start on a multiple of 16 bytes";
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

const char* refuse_grouped_gemm_wgrad_sm80(const GroupedGemmWgradArgs&) { return "has no kernel for the gradient of the weights"; }
void grouped_gemm_wgrad_sm80(const GroupedGemmWgradArgs& args, const Exec&) {
  fail(std::string("grouped_gemm_wgrad[sm80]: ") + refuse_grouped_gemm_wgrad_sm80(args));
}

}  // namespace hebatron::cuda
