// The implementations of grouped_gemm_fwd on CUDA and the choice among them. Each refuses with a reason, or null.
#pragma once
#include "hebatron/ops.h"

namespace hebatron::cuda {

const char* refuse_grouped_gemm_sm80(const GroupedGemmArgs& args);
void grouped_gemm_sm80(const GroupedGemmArgs& args, const Exec& exec);

const char* refuse_grouped_gemm_sm90(const GroupedGemmArgs& args);
void grouped_gemm_sm90(const GroupedGemmArgs& args, const Exec& exec);

// CUTLASS's stock ptr-array collective: the baseline. Built only where its headers are (HEBATRON_CUTLASS_DIR).
const char* refuse_grouped_gemm_cutlass(const GroupedGemmArgs& args);
int64_t grouped_gemm_cutlass_workspace(const GroupedGemmArgs& args);
void grouped_gemm_cutlass(const GroupedGemmArgs& args, const Exec& exec);

}  // namespace hebatron::cuda
