// What      y[t] = sum_k weights[t, k] rows[n] + shared[t] + residual[t] over the rows n of token t, and rms_norm(y) * norm
//           in the same pass; the backward of the sum to rows and weights.
// Grid      a block a token, 32 to 512 threads, at most four packs of 16 bytes (or 16 single elements) a thread in
//           registers; 128 bytes of static shared memory; 128 registers at most, no spill (nvcc 13.0, sm_80 and sm_90a).
// Traffic   forward: each row once, shared and residual once, y (and normalized) written once. backward: rows and grad_y
//           once (grad_y stays in registers for its K rows), grad_rows written once.
// Roofline  DRAM. 65,536 tokens x 6 rows of 2,688 bf16: 2.47 GB, 0.82 ms at 3.0 TB/s (H100); with shared, residual and norm
//           3.52 GB, 1.17 ms, where four passes (sum, two additions, norm) move 5.3 GB.
// Measured  never run on hardware.
// Limits    fp32 and bf16; at most 2,048 packs or 8,192 single elements a row; any number of rows a token. Packs where every
//           row starts on 16 bytes, single elements elsewhere.
// Why so    a token gathers its rows where an atomic add from the product would meet them in any order: one rounding, the
//           order of k, the same bits every run. The rows of a slot are found through its position, two rows in flight, each
//           with all of a thread's packs: pack by pack a token would wait for DRAM 20 times instead of 5.
#include "cuda/moe.h"
#include "cuda/rows.cuh"

namespace hebatron::cuda {
namespace {

constexpr const char* kOp = "moe_combine[cuda]";
constexpr int kThreads = 256;  // of invert

template <class T, int kCount>
HEBATRON_DEVICE void add(const void* row, int64_t at, int64_t width, float factor, float (&sum)[kPacks<kCount>][kCount]) {
#pragma unroll
  for (int first = 0; first < kPacks<kCount>; first += kAtOnce<kCount>) {
    RowPacks<T, kCount> in;
    in.read(static_cast<const T*>(row) + at, width, first);
#pragma unroll
    for (int p = 0; p < kAtOnce<kCount>; p++)
#pragma unroll
      for (int i = 0; i < kCount; i++) sum[first + p][i] += factor * in(p, i);
  }
}

template <class T>
HEBATRON_DEVICE float weight_of(const float* weights, int64_t slot) {
  return weights ? rounded<T>(weights[slot]) : 1.0f;
}

template <class T, class W, int kCount>
__global__ void __launch_bounds__(kMaxRowThreads, 1) combine(const MoeCombineArgs a, const int32_t* position) {
  HEBATRON_SHARED(float, slots, kWarp);
  for (int64_t t = blockIdx.x; t < a.tokens; t += gridDim.x) {
    float value[kPacks<kCount>][kCount] = {}, squares = 0.0f;
#pragma unroll 2
    for (int64_t slot = t * a.top_k; slot < (t + 1) * a.top_k; slot++)
      add<T, kCount>(a.rows, position[slot] * a.rows_stride, a.width, weight_of<T>(a.weights, slot), value);
    if (a.shared) add<T, kCount>(a.shared, t * a.shared_stride, a.width, 1.0f, value);
    if (a.residual) add<T, kCount>(a.residual, t * a.residual_stride, a.width, 1.0f, value);
#pragma unroll
    for (int p = 0; p < kPacks<kCount>; p++) {
      const int64_t column = (int64_t(p) * blockDim.x + threadIdx.x) * kCount;
      if (column >= a.width) break;
#pragma unroll
      for (int i = 0; i < kCount; i++) {
        value[p][i] = rounded<T>(value[p][i]);
        squares += value[p][i] * value[p][i];
      }
      store<kCount>(static_cast<T*>(a.y) + t * a.width + column, value[p]);
    }
    if (!a.norm) continue;
    const float scale = rsqrt_approx(block_sum(squares, slots) / float(a.width) + float(a.eps));
#pragma unroll
    for (int p = 0; p < kPacks<kCount>; p++) {
      const int64_t column = (int64_t(p) * blockDim.x + threadIdx.x) * kCount;
      if (column >= a.width) break;
      float norm[kCount];
      load<kCount>(static_cast<const W*>(a.norm) + column, norm);
#pragma unroll
      for (int i = 0; i < kCount; i++) norm[i] *= value[p][i] * scale;
      store<kCount>(static_cast<T*>(a.normalized) + t * a.width + column, norm);
    }
  }
}

// grad_rows[n] = weight grad_y[t] and grad_weight = rows[n] . grad_y[t].
template <class T, int kCount>
__global__ void __launch_bounds__(kMaxRowThreads, 1) spread(const MoeCombineBwdArgs b, const int32_t* position) {
  HEBATRON_SHARED(float, slots, kWarp);
  const MoeCombineArgs& a = b.forward;
  for (int64_t t = blockIdx.x; t < a.tokens; t += gridDim.x) {
    float grad[kPacks<kCount>][kCount];
#pragma unroll
    for (int p = 0; p < kPacks<kCount>; p++) {
      const int64_t column = (int64_t(p) * blockDim.x + threadIdx.x) * kCount;
      if (column < a.width) load<kCount>(static_cast<const T*>(b.grad_y) + t * a.width + column, grad[p]);
    }
    for (int64_t slot = t * a.top_k; slot < (t + 1) * a.top_k; slot++) {
      const int64_t row = position[slot];
      const float weight = weight_of<T>(a.weights, slot);
      float dot = 0.0f;
#pragma unroll
      for (int first = 0; first < kPacks<kCount>; first += kAtOnce<kCount>) {
        RowPacks<T, kCount> in;
        in.read(static_cast<const T*>(a.rows) + row * a.rows_stride, a.width, first);
#pragma unroll
        for (int p = 0; p < kAtOnce<kCount>; p++) {
          const int64_t column = (int64_t(first + p) * blockDim.x + threadIdx.x) * kCount;
          if (column >= a.width) break;
          float out[kCount];
#pragma unroll
          for (int i = 0; i < kCount; i++) {
            dot += in(p, i) * grad[first + p][i];
            out[i] = weight * grad[first + p][i];
          }
          store<kCount>(static_cast<T*>(b.grad_rows) + row * a.width + column, out);
        }
      }
      dot = block_sum(dot, slots);
      if (threadIdx.x == 0) b.grad_weights[slot] = dot;
    }
  }
}

// position[order[n]] = n; an order that is no permutation leaves the caller with a wrong result, not with a fault here.
__global__ void __launch_bounds__(kThreads) invert(const int64_t* order, int64_t count, int32_t* position) {
#pragma unroll 4
  for (int64_t n = int64_t(blockIdx.x) * kThreads + threadIdx.x; n < count; n += int64_t(gridDim.x) * kThreads) {
    const int64_t slot = order[n];
    if (slot >= 0 && slot < count) position[slot] = int32_t(n);
  }
}

// The row of every slot: as given, or made in the workspace.
const int32_t* positions(const MoeCombineArgs& a, const Exec& exec) {
  if (!a.order) return a.position;
  const int64_t count = a.tokens * a.top_k;
  int32_t* made = static_cast<int32_t*>(exec.workspace);
  fill_zero(kOp, made, size_t(count) * sizeof(int32_t), exec);  // where an order that is no permutation leaves holes
  launch(kOp, invert, {dim3(blocks_of_four(count)), dim3(kThreads)}, exec, a.order, count, made);
  return made;
}

template <int kCount>
LaunchShape shape_for(const MoeCombineArgs& a) {
  const int64_t blocks = a.tokens < kMaxRowBlocks ? a.tokens : kMaxRowBlocks;
  return {dim3(unsigned(blocks)), dim3(threads_for_row<kCount>(kOp, "width must fit one block", a.width))};
}

template <class T, class W, int kCount>
void run_combine(const MoeCombineArgs& a, const Exec& exec) {
  const LaunchShape shape = shape_for<kCount>(a);  // refuses before anything is launched
  launch(kOp, combine<T, W, kCount>, shape, exec, a, positions(a, exec));
}
template <class T, int kCount>
void run_spread(const MoeCombineBwdArgs& b, const Exec& exec) {
  const LaunchShape shape = shape_for<kCount>(b.forward);
  launch(kOp, spread<T, kCount>, shape, exec, b, positions(b.forward, exec));
}

void check_args(const MoeCombineArgs& a) {
  check_moe_tables(kOp, a.tokens, a.top_k, 1);
  check(a.width > 0, kOp, "width must be > 0", a.width);
  check(!a.order != !a.position, kOp, "one of order and position must be given, tokens", a.tokens);
}

void check_inputs(const MoeCombineArgs& a, const Exec& exec) {
  check_pointers(kOp, {{"rows", a.rows}, {"order", a.order}, {"position", a.position}, {"weights", a.weights}, {"workspace", exec.workspace}}, exec);
}

int64_t bytes_of_positions(const MoeCombineArgs& a) { return a.order ? a.tokens * a.top_k * int64_t(sizeof(int32_t)) : 0; }

}  // namespace

int64_t moe_combine_fwd_workspace(const MoeCombineArgs& a) { return bytes_of_positions(a); }

void moe_combine_fwd(const MoeCombineArgs& a, const Exec& exec) {
  if (a.tokens == 0) return;
  check_args(a);
  check(exec.bytes_workspace >= moe_combine_fwd_workspace(a), kOp, "workspace is too small", exec.bytes_workspace);
  const DeviceGuard guard(exec);
  check_inputs(a, exec);
  check_pointers(kOp, {{"shared", a.shared}, {"residual", a.residual}, {"norm", a.norm}, {"y", a.y}, {"normalized", a.normalized}}, exec);
  const uintptr_t addresses = addresses_of({a.rows, a.shared, a.residual, a.norm, a.y, a.normalized});
  const int64_t strides = a.rows_stride | a.shared_stride | a.residual_stride | a.width;
  const auto packs = [=](int count) { return addresses % 16 == 0 && strides % count == 0; };
  HEBATRON_BY_DTYPES(run_combine, packs, a.dtype, a.norm_dtype, a, exec)
}

int64_t moe_combine_bwd_workspace(const MoeCombineBwdArgs& b) { return bytes_of_positions(b.forward); }

void moe_combine_bwd(const MoeCombineBwdArgs& b, const Exec& exec) {
  const MoeCombineArgs& a = b.forward;
  if (a.tokens == 0) return;
  check_args(a);
  check(exec.bytes_workspace >= moe_combine_bwd_workspace(b), kOp, "workspace is too small", exec.bytes_workspace);
  const DeviceGuard guard(exec);
  check_inputs(a, exec);
  check_pointers(kOp, {{"grad_y", b.grad_y}, {"grad_rows", b.grad_rows}, {"grad_weights", b.grad_weights}}, exec);
  const uintptr_t addresses = addresses_of({a.rows, b.grad_y, b.grad_rows});
  const auto packs = [&](int count) { return addresses % 16 == 0 && (a.rows_stride | a.width) % count == 0; };
  if (a.dtype == DType::f32) return packs(4) ? run_spread<float, 4>(b, exec) : run_spread<float, 1>(b, exec);
  return packs(8) ? run_spread<__nv_bfloat16, 8>(b, exec) : run_spread<__nv_bfloat16, 1>(b, exec);
}

}  // namespace hebatron::cuda
