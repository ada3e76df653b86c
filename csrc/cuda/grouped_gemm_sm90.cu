// What      out[r] = act(a[row(r)] b[e]^T) * scale[r] for the rows r of expert e; act is the identity or relu(.)^2. With kept,
//           the way back through it: out = 2 sqrt(scale kept) (a b), and the sums of rows for the gradient of scale.
// Grid      one persistent block an SM: a producer warpgroup and two or three consumer warpgroups (384 threads of 168
//           registers at launch, 512 of 128; no spill, nvcc 13.0). Tiles 64 x {128, 256}, 128 x {128, 208, 224, 232},
//           192 x {208, 224} (three warpgroups), 256 x 192 with {9, 5, 7, 5, 5, 5, 4, 4, 4} stages of 64 k, all 227 KB of
//           shared memory; and 256 x 208, 384 x 208, 512 x 192 by two blocks of a cluster that share b.
// Traffic   DRAM: a's rows, b and out once. L2: 2 (m + n) k bytes a tile of m x n, so 82 flop a byte with 128 x 232 and
//           110 with 256 x 192; a cluster reads b once for both blocks: 135 with 384 x 208, 140 with 512 x 192.
// Roofline  H100 at 800 TFLOP/s and 3.0 TB/s, 6 of 128 experts a token, k 2688, n 1856: 463 us for 4,096 tokens (DRAM:
//           b alone is 1.28 GB), 1,226 us for 16,384 (tensor cores; L2 would have to give 9.7 TB/s with 128 x 232,
//           5.9 with 384 x 208).
// Measured  never run on hardware.
// Limits    bf16; k and n multiples of 8; a, b, kept, out on 16 bytes and strides multiples of 8; b with k contiguous here,
//           with n in grouped_gemm_dgrad_sm90.cu; gathered rows within 64 GiB; 512 experts, with 128 x 232 490; sm_90
//           only: nothing of sm_90a runs on Blackwell. The values of offsets and rows_of_a are trusted: the host never
//           reads them.
// Why so    TMA cannot gather rows on Hopper, so the producer copies a by cp.async and b by TMA, on one mbarrier.
//           Results go from registers to memory in 16-byte stores under a row predicate: a tensor map cannot clip at an
//           expert's end, and a staging buffer would cost the fifth stage. No atomics: the same bits every run.
#include "cuda/grouped_gemm_sm90.cuh"

namespace hebatron::cuda {
namespace {

constexpr const char* kOp = "grouped_gemm[sm90a]";

bool is_tile(const GroupedGemmArgs& args) {
#define HEBATRON_SM90_IS(M, N, BLOCK) \
  if (args.tile_m == M && args.tile_n == N) return true;
  if (args.b_k_major) {
    HEBATRON_SM90_TILES(HEBATRON_SM90_IS)
  } else {
    HEBATRON_SM90_DGRAD_TILES(HEBATRON_SM90_IS)
  }
  return false;
}

}  // namespace

const char* refuse_grouped_gemm_sm90(const GroupedGemmArgs& args) {
  using namespace sm90;
#define HEBATRON_SM90_NAME(M, N, BLOCK) " " #M "x" #N
  constexpr int64_t kMaxInt = 0x7fffffff, kMaxStride = int64_t(1) << 39;
  const int64_t b_expert_stride = args.experts == 1 ? args.b_stride : args.b_expert_stride;  // of one: any
  const auto address = [](const void* p) { return reinterpret_cast<uintptr_t>(p); };
  if (args.experts > kMaxExperts) return "experts must be at most 512";
  if (args.tile_m != 0 || args.tile_n != 0) {
    if (!is_tile(args))
      return args.b_k_major ? "the tile must be one of" HEBATRON_SM90_TILES(HEBATRON_SM90_NAME)
                            : "with n contiguous in b the tile must be one of" HEBATRON_SM90_DGRAD_TILES(HEBATRON_SM90_NAME);
    const bool room = args.tile_n != 232 || args.experts <= max_experts(128, 232);
    if (!room) return "experts must be at most 490 with the tile 128x232";
  }
  if (args.k % 8 != 0) return "k must be a multiple of 8";
  if (args.n % 8 != 0) return "n must be a multiple of 8";
  if (args.a_stride % 8 != 0) return "the row stride of a must be a multiple of 8";
  if (args.b_stride % 8 != 0 || b_expert_stride % 8 != 0) return "the strides of b must be multiples of 8";
  // What a tensor map cannot say: rows that overlap, strides of 2^40 bytes.
  const int64_t b_width = args.b_k_major ? args.k : args.n;
  if (args.b_stride < b_width || b_expert_stride < args.b_stride) return "the rows and experts of b must not overlap";
  if (!args.rows_of_a && args.a_stride < args.k) return "the rows of a must not overlap";
  if (args.b_stride >= kMaxStride || b_expert_stride >= kMaxStride || args.a_stride >= kMaxStride)
    return "strides must be less than 2^39";
  if ((address(args.a) | address(args.b) | address(args.out) | address(args.kept)) % 16 != 0)
    return "a, b, kept and out must start on 16 bytes";
  if (args.k > kMaxInt - kStepK || args.n > kMaxInt - 256) return "k and n must be less than 2^31 - 256";
  const bool reached = !args.rows_of_a || args.a_rows * (args.a_stride / 8) <= int64_t(1) << 32;
  if (!reached) return "the rows of a must lie within 64 GiB";
  const int64_t most_tiles = (args.rows / 64 + args.experts + 2) * (args.n / 128 + 1);
  if (args.rows > kMaxInt - 512 || most_tiles > kMaxInt / 2) return "rows times n must be less than 2^43";
  return nullptr;
}

void grouped_gemm_sm90(const GroupedGemmArgs& args, const Exec& exec) {
  using namespace sm90;
  const TileUse use = args.b_k_major ? TileUse::k_major : TileUse::n_major;
  const GroupedGemmTile tile = args.tile_m ? GroupedGemmTile{args.tile_m, args.tile_n}
                                           : sm90_tile({use, args.rows, args.experts, args.k, args.n, sm_count(exec)});
  if (!args.b_k_major) return grouped_gemm_dgrad_sm90(args, exec, tile);
#define HEBATRON_SM90_RUN(M, N, BLOCK)                                                \
  if (tile.m == M && tile.n == N)                                                     \
    return args.rows_of_a ? run<Config<BLOCK, N, M / BLOCK, true, true>>(kOp, args, exec) \
                          : run<Config<BLOCK, N, M / BLOCK, false, true>>(kOp, args, exec);
  HEBATRON_SM90_TILES(HEBATRON_SM90_RUN)
  fail(std::string(kOp) + ": grouped_gemm_tiles.inc names a tile that is not built, " + std::to_string(tile.m) + "x" + std::to_string(tile.n));
}

}  // namespace hebatron::cuda
