// The expert layer of few tokens, in one launch: csrc/cuda/moe_decode.cu.
#pragma once
#include "hebatron/ops.h"

namespace hebatron::cuda {

// Why moe_decode does not take these arguments of moe_mlp_fwd, or null. Those it takes it serves faster than the products of
// grouped_gemm: an expert has few rows, and the reading of its weights is all that counts.
const char* refuse_moe_decode(const MoeMlpArgs& args);

}  // namespace hebatron::cuda
