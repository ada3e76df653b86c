// The forward of attention_prefill by wgmma and TMA: csrc/cuda/attention_sm90.cu.
#pragma once
#include "hebatron/ops.h"

namespace hebatron::cuda {

// Whether it takes these arguments of attention_prefill_fwd on this device; those it takes it is meant to serve faster.
bool attention_sm90_takes(const AttentionArgs& args, const Exec& exec);
void attention_sm90(const AttentionArgs& args, const Exec& exec);

}  // namespace hebatron::cuda
