// The contract: one Args struct, one function and one workspace-size function per operator, with the same signature in
// cpu:: and cuda::. Strides are in elements and 64-bit; the last dimension of every tensor is contiguous unless its
// stride is named. Pointers may be null where the comment says "or null".
#pragma once
#include "hebatron/types.h"

namespace hebatron {

// y = rms_norm((x + residual) * silu(gate)) * weight over groups of `group` columns; sum = x + residual.
struct RmsNormArgs {
  int64_t rows, width, group;
  double eps;
  DType dtype, weight_dtype;
  const void* x;
  int64_t x_stride;
  const void* residual;  // or null
  int64_t residual_stride;
  const void* gate;  // or null
  int64_t gate_stride;
  const void* weight;  // width
  void* y;             // rows, width
  void* sum;           // rows, width; null when residual is null
};

// Gradients of the above. grad_input is the gradient of x and of the residual alike.
struct RmsNormBwdArgs {
  RmsNormArgs forward;    // y and sum unused
  const void* grad_y;     // rows, width, contiguous
  const void* grad_sum;   // rows, width, contiguous; or null
  void* grad_input;       // rows, width
  void* grad_gate;        // rows, width; null when gate is null
  float* grad_weight;     // width
};

// Every operator: X(name, Args).
#define HEBATRON_OPS(X)          \
  X(rms_norm_fwd, RmsNormArgs)   \
  X(rms_norm_bwd, RmsNormBwdArgs)

#define HEBATRON_DECLARE(name, Args)             \
  void name(const Args& args, const Exec& exec); \
  int64_t name##_workspace(const Args& args);

namespace cpu {
HEBATRON_OPS(HEBATRON_DECLARE)
}
namespace cuda {
HEBATRON_OPS(HEBATRON_DECLARE)
}

}  // namespace hebatron
