// What      out[e] = sum over the rows r of expert e of a[row(r)]^T b[r]: bf16 mma.sync, for all chips from sm_80.
// Grid      a block of 128 threads per tile of an expert's matrix (rows x columns x r of a stage); 2x2 warps, no spill:
//           128x128x32  warps of 64x64, 4 stages 64 KB, 2 blocks an SM; 3 stages 48 KB on 99 KB chips
//           64x128x32   warps of 32x64, 4 stages 48 KB, 3 blocks an SM, 2 on 99 KB chips
// Traffic   out once. A tile reads its columns of both operands through L2, 2 (1 / BM + 1 / BN) bytes a multiply-add; an
//           expert's tiles are neighbours, so that DRAM gives its rows of a and b about once.
// Roofline  6 of 128 experts, 2,688 x 1,856, out bf16 (fp32). 4,096 tokens (245 GFLOP; out 1.28 GB (2.55), b 0.09, a
//           0.02): A100 0.79 ms, tensor bound (1.31, DRAM at 2.04 TB/s); H100 0.46 ms (0.89), DRAM at 3.0 TB/s. 65,536
//           tokens (3.9 TFLOP): A100 12.6 ms; H100 4.9 ms at the 800 TFLOP/s of wgmma. All computed.
// Measured  never run on hardware.
// Limits    m, n and the strides of a and b multiples of 8, tensors on 16 bytes; sizes below 2^31, 64-bit offsets; 49 KB of
//           shared memory a block. The values of offsets and rows_of_a are trusted: the host never reads them.
// Why so    one block adds all the rows of an expert, whatever their number: no atomics and no second pass, the same bits
//           every run, at the cost of a long tail where one expert has most rows. A thread reads the index of a gathered
//           row one stage before its copy, or every stage would wait for L2. `transposed` is the product with a and b in
//           each other's place, so that stores are rows of 16-byte packs either way.
#include "cuda/grouped_gemm_sm80.cuh"

namespace hebatron::cuda {
namespace {

constexpr const char* kOp = "grouped_gemm_wgrad[sm80]";

// One operand: row r of the problem is row rows[r] of it, or r.
struct Side {
  const bf16* data;
  int64_t stride;
  const int32_t* rows;  // or null
  int columns;
};

// out[e] = left^T right over the rows of e: left is a and right b, or transposed left is b and right a.
struct Problem {
  Side left, right;
  const int32_t* offsets;
  void* out;
};

// A thread's part of the tile of one operand, kK rows of kColumns: one chunk of every kStep-th row. Rows past the expert's and
// chunks past the columns become zeros: they add nothing. Only a, the side that may gather, keeps the next rows' indices.
template <int kColumns, int kK, bool kMayGather>
struct Part {
  static constexpr int kChunks = kColumns / kChunk, kStep = kThreads / kChunks, kLoads = kK / kStep;
  static_assert(kStep % 8 == 0, "a thread's chunks must share one swizzle");

  const bf16* data;     // this thread's chunk of row 0, or of the expert's first row where nothing gathers
  int64_t stride;
  const int32_t* rows;  // of the expert, or null
  int begin, k;         // the expert's first row, and how many it has
  bool in;
  int source[kMayGather ? kLoads : 1];  // the rows that the next stage copies

  HEBATRON_DEVICE Part(const Side& side, int begin_, int k_, int column) : stride(side.stride), begin(begin_), k(k_) {
    const int c = column + int(threadIdx.x) % kChunks * kChunk;
    in = c < side.columns;
    data = side.data + (in ? c : 0) + (kMayGather ? 0 : begin * stride);
    rows = side.rows ? side.rows + begin : nullptr;
    if (kMayGather) find(0);
  }

  HEBATRON_DEVICE void find(int k0) {
#pragma unroll
    for (int i = 0; i < kLoads; i++) {
      const int r = k0 + int(threadIdx.x) / kChunks + i * kStep;
      source[i] = rows && r < k ? rows[r] : begin + r;
    }
  }

  HEBATRON_DEVICE void load(uint32_t tile, int k0) {
    const int row = threadIdx.x / kChunks;
    const uint32_t to = tile + swizzled<kChunks>(row, threadIdx.x % kChunks);
#pragma unroll
    for (int i = 0; i < kLoads; i++) {
      const int r = k0 + row + i * kStep;
      cp_async_16(to + i * kThreads * 16, data + (kMayGather ? source[i] : r) * stride, in && r < k);
    }
    if (kMayGather) find(k0 + kK);
  }
};

template <class T, bool kTransposed>
struct Loader {
  int k;
  Part<T::kM, T::kK, !kTransposed> left;
  Part<T::kN, T::kK, kTransposed> right;

  HEBATRON_DEVICE Loader(const Problem& p, int begin, int rows, int row, int column)
      : k(rows), left(p.left, begin, rows, row), right(p.right, begin, rows, column) {}
  HEBATRON_DEVICE void load(uint32_t stage, int k0) {
    left.load(stage, k0);
    right.load(stage + T::kBytesA, k0);
  }
};

// A warp's tile as bf16: quads exchange, so that a lane stores all 16 bytes of every fourth piece of 8 columns.
template <class T>
HEBATRON_DEVICE void store_tile(bf16* out, const Problem& p, const Accumulator<T>& sum, int row, int column) {
  const int in_quad = lane_id() % 4, rows = p.left.columns, columns = p.right.columns;
#pragma unroll
  for (int i = 0; i < T::kFragsM; i++)
#pragma unroll
    for (int piece = 0; piece < 2 * T::kFragsN; piece += 4) {
      uint32_t words[4];
#pragma unroll
      for (int q = 0; q < 4; q++) {
        const float* pair = &sum[i][(piece + q) % T::kFragsN][2 * ((piece + q) / T::kFragsN)];
        words[q] = pack_bf16(pair[0], pair[1]);
      }
      transpose_quad(words);
      const int r = row + lane_id() / 4 + i * 16 + (piece + in_quad) / T::kFragsN * 8;
      const int c = column + (piece + in_quad) % T::kFragsN * 8;
      if (r < rows && c < columns)
        store_streaming(out + int64_t(r) * columns + c, uint4{words[0], words[1], words[2], words[3]});
    }
}

// As fp32: two lanes exchange, so that each has 4 neighbours of one row, of the upper 8 or of the lower.
template <class T>
HEBATRON_DEVICE void store_tile(float* out, const Problem& p, const Accumulator<T>& sum, int row, int column) {
  const int lane = lane_id(), rows = p.left.columns, columns = p.right.columns;
  const bool lower = lane & 1;
#pragma unroll
  for (int i = 0; i < T::kFragsM; i++)
#pragma unroll
    for (int j = 0; j < T::kFragsN; j++) {
      const float* s = sum[i][j];
      const float first = shfl_xor(lower ? s[0] : s[2], 1), second = shfl_xor(lower ? s[1] : s[3], 1);
      const float four[4] = {lower ? first : s[0], lower ? second : s[1], lower ? s[2] : first, lower ? s[3] : second};
      const int r = row + lane / 4 + i * 16 + lower * 8, c = column + j * 8 + lane % 4 / 2 * 4;
      uint4 words;
      memcpy(&words, four, sizeof words);
      if (r < rows && c < columns) store_streaming(out + int64_t(r) * columns + c, words);
    }
}

template <class T, class Out, bool kTransposed>
__global__ void __launch_bounds__(kThreads, T::kBlocks) wgrad(const Problem p) {
  HEBATRON_DYNAMIC_SHARED(stages);
  const int across = (p.right.columns + T::kN - 1) / T::kN, down = (p.left.columns + T::kM - 1) / T::kM;
  const int expert = blockIdx.x / (across * down), tile = blockIdx.x % (across * down);
  const int row = tile / across * T::kM, column = tile % across * T::kN, warp = threadIdx.x / kWarp;
  const int warp_row = warp / T::kWarpsN * T::kWarpM, warp_column = warp % T::kWarpsN * T::kWarpN;
  const int begin = expert ? p.offsets[expert - 1] : 0, rows = p.offsets[expert] - begin;
  float sum[T::kFragsM][T::kFragsN][4] = {};
  if (rows > 0) {
    Loader<T, kTransposed> loader(p, begin, rows, row, column);
    const Reader<T, false, false> reader(warp_row, warp_column);
    multiply<T>(loader, reader, smem_address(stages), sum);
  }
  Out* out = static_cast<Out*>(p.out) + int64_t(expert) * p.left.columns * p.right.columns;
  store_tile<T>(out, p, sum, row + warp_row, column + warp_column);
}

template <class T, bool kTransposed>
void run(const GroupedGemmWgradArgs& g, const Exec& exec) {
  const Side a{static_cast<const bf16*>(g.a), g.a_stride, g.rows_of_a, int(g.m)};
  const Side b{static_cast<const bf16*>(g.b), g.b_stride, nullptr, int(g.n)};
  const Problem p{kTransposed ? b : a, kTransposed ? a : b, g.offsets, g.out};
  const int64_t down = (p.left.columns + T::kM - 1) / T::kM, across = (p.right.columns + T::kN - 1) / T::kN;
  const int64_t blocks = g.experts * down * across;
  check(blocks < int64_t(1) << 31, kOp, "tiles must be fewer than 2^31", blocks);
  const LaunchShape shape{dim3(unsigned(blocks)), dim3(kThreads), T::kStages * T::kBytesStage};
  const auto kernel = g.out_dtype == DType::f32 ? wgrad<T, float, kTransposed> : wgrad<T, bf16, kTransposed>;
  launch("grouped_gemm_wgrad", kernel, shape, exec, p);
}
template <class T>
void run(const GroupedGemmWgradArgs& g, const Exec& exec) {
  g.transposed ? run<T, true>(g, exec) : run<T, false>(g, exec);
}

}  // namespace

const char* refuse_grouped_gemm_wgrad_sm80(const GroupedGemmWgradArgs& g) {
  if (g.dtype != DType::bf16) return "a and b must be bf16";
  if (g.m % kChunk || g.n % kChunk) return "m and n must be multiples of 8";
  if (g.a_stride % kChunk || g.b_stride % kChunk) return "the strides of a and b must be multiples of 8";
  for (const void* p : {g.a, g.b, static_cast<const void*>(g.out)})
    if (reinterpret_cast<uintptr_t>(p) % 16) return "a, b and out must start on a multiple of 16 bytes";
  for (const int64_t size : {g.rows, g.a_rows, g.experts, g.m, g.n})
    if (size >= kMaxSize) return "rows, experts, m and n must be below 2^31 - 256";
  constexpr int64_t kTiles[][2] = {{0, 0}, {64, 128}, {128, 128}};
  for (const auto& tile : kTiles)
    if (g.tile_m == tile[0] && g.tile_n == tile[1]) return nullptr;
  return "the tile must be 64x128 or 128x128, rows and columns of out as it lies";
}

// Up to 256 rows an expert writing out takes longer than the products: three blocks an SM overlap both the better.
void grouped_gemm_wgrad_sm80(const GroupedGemmWgradArgs& g, const Exec& exec) {
  const int64_t m = g.tile_m ? g.tile_m : g.rows / g.experts <= 256 || (g.transposed ? g.n : g.m) <= 64 ? 64 : 128;
  if (m == 64) return run<Tile80<64, 128, 32, 2, 4, 3>>(g, exec);
  if (bytes_shared_per_block(exec) >= 2 * 65 * 1024) return run<Tile80<128, 128, 32, 2, 4, 2>>(g, exec);
  return run<Tile80<128, 128, 32, 2, 3, 2>>(g, exec);
}

}  // namespace hebatron::cuda
