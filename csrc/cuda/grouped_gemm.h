// The implementations of grouped_gemm_fwd on CUDA and the choice among them. Each refuses with a reason, or null.
#pragma once
#include <vector>

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

// The tile of the sm_90a kernels (grouped_gemm_tiles.cu): pure, and the same for one problem everywhere.
struct GroupedGemmTile {
  int64_t m, n;
};
enum class TileUse { k_major, n_major, wgrad };  // how b lies in grouped_gemm_fwd; or the gradient of the weights, where
struct TileProblem {                             // k and n are the rows and columns of out as it lies
  TileUse use;
  int64_t rows, experts, k, n, sms;
};
struct MeasuredTile {
  TileProblem problem;
  GroupedGemmTile tile;
};
const std::vector<MeasuredTile>& measured_tiles();
GroupedGemmTile sm90_tile(const TileProblem& problem, const std::vector<MeasuredTile>& measured = measured_tiles());

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
