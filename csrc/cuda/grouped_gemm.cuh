// What the hand-written kernels of grouped_gemm share: how results leave the registers, and the way back through relu2.
#pragma once
#include "cuda/grouped_gemm.h"
#include "cuda/prim.cuh"

namespace hebatron::cuda {

// act(v) * scale, act the identity or relu(.)^2; a NaN stays one.
HEBATRON_DEVICE float activated(float v, bool relu2, float scale) {
  if (relu2) v = v < 0.0f ? 0.0f : v * v;
  return v * scale;
}

// The way back through kept = relu(h)^2 * scale: the gradient of h from g, that of kept. 0 where scale is, whatever g.
HEBATRON_DEVICE float through_relu2(float g, float kept, float scale) {
  return scale == 0.0f ? 0.0f : copysignf(2.0f * sqrt_approx(scale * kept), scale) * g;
}

// The 4 x 4 words of a quad of lanes, transposed: lane q ends with word q of lanes 0 to 3. Fragments hold two neighbouring
// columns a lane; after this each lane holds eight, one 16-byte store.
HEBATRON_DEVICE void transpose_quad(uint32_t (&word)[4]) {
  const int quad = lane_id() % 4;
#pragma unroll
  for (int mask = 1; mask <= 2; mask *= 2) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
      if (i & mask) continue;
      const uint32_t other = shfl_xor(quad & mask ? word[i] : word[i | mask], mask);
      if (quad & mask) {
        word[i] = other;
      } else {
        word[i | mask] = other;
      }
    }
  }
}

// The gradient of scale needs sums over whole rows, and a tile has a piece of a row. So the kernels leave sum(g * kept) of
// each piece in the workspace, pieces x rows, and this one adds the pieces in their order: the same bits every run.
// What: row_sums[r] = sum over pieces / scale[r]. Grid: a thread a row. Traffic:
// pieces * rows floats, 46 MB for 65,536 tokens in pieces of 64 columns of 1,856: 15 us of 3.0 TB/s. Never run on hardware.
template <int kThreads>
__global__ void __launch_bounds__(kThreads) sum_pieces(const float* pieces, const float* scale, float* row_sums, int rows, int count) {
  const int row = int(blockIdx.x) * kThreads + int(threadIdx.x);
  if (row >= rows) return;
  float sum = 0.0f;
  for (int i = 0; i < count; i++) sum += pieces[int64_t(i) * rows + row];
  // Past the last expert's rows the sum is 0 and scale may be anything.
  row_sums[row] = sum == 0.0f || scale[row] == 0.0f ? 0.0f : sum / scale[row];
}

template <int kThreads = 256>  // a template, so that only files which use it hold the kernel
void launch_sum_pieces(const char* op, const GroupedGemmArgs& args, int64_t count, const Exec& exec) {
  const LaunchShape shape{dim3(unsigned((args.rows + kThreads - 1) / kThreads)), dim3(kThreads)};
  launch(op, sum_pieces<kThreads>, shape, exec, static_cast<const float*>(exec.workspace), args.scale, args.row_sums,
         int(args.rows), int(count));
}

}  // namespace hebatron::cuda
