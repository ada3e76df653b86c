// What      grouped_gemm_sm90.cu's kernel for b with n contiguous, as the gradient of a needs the weights that the forward
//           reads with k contiguous: out[r] = act(a[row(r)] b[e]) * scale[r], and the way back through relu2.
// Grid      as there; tiles 64 x {128, 256}, 128 x 192, 192 x 192 (three consumer warpgroups), 256 x 192 with
//           {9, 5, 5, 4, 4} stages, and 384 x 192, 512 x 192 by two blocks of a cluster. 168 or 128 registers, no spill.
// Traffic   as there; the way back reads kept and writes 4 bytes a row and 64 columns or more of sums beside.
// Roofline  H100 at 800 TFLOP/s and 3.0 TB/s, 6 of 128 experts a token: down's (k 2688, n 1856, with kept) 494 us for 4,096
//           tokens (DRAM: b 1.28 GB, kept and out 91 MB each), 1,226 us for 16,384 (tensor cores); up's (k 1856, n 2688)
//           500 us and 1,226 us.
// Measured  never run on hardware.
// Limits    as there.
// Why so    wgmma takes b MN-major as it lies: no transposed copy of 1.28 GB. Its columns then come in groups of 64, so the
//           widths 208, 224 and 232 would load 256: 192 wastes 3.4 % of 1,856 columns and nothing of 2,688.
#include "cuda/grouped_gemm_sm90.cuh"

namespace hebatron::cuda {

void grouped_gemm_dgrad_sm90(const GroupedGemmArgs& args, const Exec& exec, GroupedGemmTile tile) {
  using namespace sm90;
  constexpr const char* kOp = "grouped_gemm[sm90a]";
#define HEBATRON_SM90_RUN(M, N, BLOCK)                                                 \
  if (tile.m == M && tile.n == N)                                                      \
    return args.rows_of_a ? run<Config<BLOCK, N, M / BLOCK, true, false>>(kOp, args, exec) \
                          : run<Config<BLOCK, N, M / BLOCK, false, false>>(kOp, args, exec);
  HEBATRON_SM90_DGRAD_TILES(HEBATRON_SM90_RUN)
  fail(std::string(kOp) + ": grouped_gemm_tiles.inc names a tile that is not built, " + std::to_string(tile.m) + "x" + std::to_string(tile.n));
}

}  // namespace hebatron::cuda
