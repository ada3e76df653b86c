// The implementations of grouped_gemm_fwd on CUDA and the choice among them. Each refuses with a reason, or null.
#pragma once
#include "hebatron/ops.h"

namespace hebatron::cuda {

// With kept, the workspace holds the row sums of pieces of at least so many columns, float[pieces][rows]: grouped_gemm.cuh.
constexpr int64_t kPieceColumns = 64;

const char* refuse_grouped_gemm_sm80(const GroupedGemmArgs& args);
void grouped_gemm_sm80(const GroupedGemmArgs& args, const Exec& exec);
// The tile that runs: args' own, or one by the mean rows of an expert; its stages by the shared memory a block may have.
struct Sm80Tile {
  int m, n, stages;
};
Sm80Tile sm80_tile(const GroupedGemmArgs& args, int bytes_shared_per_block);

const char* refuse_grouped_gemm_sm90(const GroupedGemmArgs& args);
void grouped_gemm_sm90(const GroupedGemmArgs& args, const Exec& exec);

// The tile of the sm_90a kernel for these sizes on a chip of `sms` multiprocessors: the one whose waves over the chip take
// the fewest clocks. A tile takes those of the tensor cores or of its reads from L2, whichever are more, and every expert
// ends in half a tile of rows that are not there. Arithmetic, not yet measurement.
struct GroupedGemmTile {
  int64_t m, n;
};
GroupedGemmTile sm90_tile(int64_t rows, int64_t experts, int64_t n, int64_t sms);

// CUTLASS's stock ptr-array collective: the baseline. Built only where its headers are (HEBATRON_CUTLASS_DIR).
const char* refuse_grouped_gemm_cutlass(const GroupedGemmArgs& args);
int64_t grouped_gemm_cutlass_workspace(const GroupedGemmArgs& args);
void grouped_gemm_cutlass(const GroupedGemmArgs& args, const Exec& exec);

// The gradient of the weights, grouped_gemm_wgrad: a grid over (expert, tile of m x n), the expert's rows summed over.
const char* refuse_grouped_gemm_wgrad_sm80(const GroupedGemmWgradArgs& args);
void grouped_gemm_wgrad_sm80(const GroupedGemmWgradArgs& args, const Exec& exec);
const char* refuse_grouped_gemm_wgrad_sm90(const GroupedGemmWgradArgs& args);
void grouped_gemm_wgrad_sm90(const GroupedGemmWgradArgs& args, const Exec& exec);

// Why `implementation` cannot run `args` on a chip of this compute capability (90 for sm_90), or null.
const char* refuse_grouped_gemm(GroupedGemm implementation, const GroupedGemmArgs& args, int compute_capability);

// What GroupedGemm::automatic means there: sm90a, else sm80; never cutlass. Throws with every reason when neither can.
GroupedGemm choose_grouped_gemm(const GroupedGemmArgs& args, int compute_capability);

// The same for the gradient of the weights.
const char* refuse_grouped_gemm_wgrad(GroupedGemm implementation, const GroupedGemmWgradArgs& args, int compute_capability);
GroupedGemm choose_grouped_gemm_wgrad(const GroupedGemmWgradArgs& args, int compute_capability);

}  // namespace hebatron::cuda
