// What      y_t = sum_k down[e] (weight relu(up[e] x_t)^2), e = ids[t, k], and its backward, as a sequence of launches. to_slots,
//           the one kernel here, gives the weights' gradients from rows back to slots.
// Grid      forward of few tokens: moe_decode; else the tables (two launches), up with its gather and epilogue, down, the sum over a token's rows. backward:
//           the tables, down's product back with the relu2, to_slots, up's product back, the sum over a token's rows, and a
//           product for the gradient of each weight tensor. to_slots: a thread takes four slots.
// Traffic   forward: the weights of the chosen experts, x once a column of tiles (from L2), the activation and the rows of y
//           written and read. backward: as much twice, and both gradients written. to_slots: 12 bytes a slot.
// Roofline  the tensor cores from 267 rows an expert on (H100), DRAM below: 16,384 tokens, six of 128 experts of 2,688 x
//           1,856: forward 1.96 TFLOP, 2.45 ms at 800 TFLOP/s; backward 3.92 TFLOP, 4.9 ms; its passes over rows 1.6 ms.
// Measured  never run on hardware.
// Limits    bf16 (the gradients of up and down also fp32); widths and strides in multiples of 8, rows on 16 bytes; at most 512
//           experts; tokens * top_k < 2^31. The gradient of a weight that is 0 is 0: nothing is kept of its row.
// Why so    the weight multiplies the activation, in up's epilogue: the second product's rows are only added, and what is kept
//           for the backward, weight relu(h)^2, is itself the operand of down's gradient. Errors against fp64 in bf16: 1.7e-3
//           of down's gradient, 0.8e-3 of h's, 1.8e-3 of the weight's. Nothing is allocated, nothing waits: sizes are those of
//           the slots, wherever the experts end.
#include "cuda/moe.h"

#include <algorithm>

#include "cuda/moe_decode.h"
#include "cuda/rows.cuh"

namespace hebatron::cuda {
namespace {

constexpr const char* kOp = "moe_mlp[cuda]";
constexpr int kThreads = 256;

// Buffers behind one another from `base`, on 256 bytes; with a null base it only counts.
struct Workspace {
  char* base;
  int64_t bytes = 0;
  template <class T>
  T* take(int64_t count) {
    char* at = base ? base + bytes : nullptr;
    bytes += (count * int64_t(sizeof(T)) + 255) / 256 * 256;
    return reinterpret_cast<T*>(at);
  }
};
using bf16 = __nv_bfloat16;

// The sorted rows, and what both directions have of them.
struct Rows {
  int64_t count;
  MoeTables tables;
  char* scratch;  // of one launch after another
  bf16* outputs;  // count, width

  Rows(const MoeMlpArgs& a, Workspace& w, bool with_outputs) : count(a.tokens * a.top_k) {
    tables.order = nullptr;
    tables.tokens = w.take<int32_t>(count);
    tables.scale = w.take<float>(count);
    tables.position = w.take<int32_t>(count);
    tables.offsets = w.take<int32_t>(a.experts);
    outputs = w.take<bf16>(with_outputs ? count * a.width : 0);
    scratch = w.take<char>(moe_tables_workspace(count, a.experts));
  }
  void sort(const MoeMlpArgs& a, const Exec& exec) const {
    moe_tables(kOp, a.ids, a.weights, count, a.top_k, a.experts, tables, scratch, exec);
  }
  void combine(const MoeMlpArgs& a, void* y, const Exec& exec) const {
    MoeCombineArgs c{};
    c.tokens = a.tokens, c.top_k = a.top_k, c.width = a.width, c.dtype = DType::bf16;
    c.rows = outputs, c.rows_stride = a.width, c.position = tables.position, c.y = y;
    moe_combine_fwd(c, exec);
  }
};

// The product of every expert's rows with its part of a weight tensor stored (experts, outer, inner): with its transpose
// (forward), or with itself on the way back. Rows of `a` come in their order, or through tables.tokens.
GroupedGemmArgs product(const MoeMlpArgs& a, const Rows& rows, bool up, bool back) {
  GroupedGemmArgs g{};
  const int64_t stored_outer = up ? a.expert_width : a.width, stored_inner = up ? a.width : a.expert_width;
  g.rows = g.a_rows = rows.count;
  g.experts = a.experts;
  g.n = back ? stored_inner : stored_outer;
  g.k = back ? stored_outer : stored_inner;
  g.workers = 1;
  g.dtype = DType::bf16;
  g.a_stride = g.k;
  g.b = up ? a.up : a.down;
  g.b_expert_stride = up ? a.up_expert_stride : a.down_expert_stride;
  g.b_stride = up ? a.up_stride : a.down_stride;
  g.b_k_major = !back;
  g.offsets = rows.tables.offsets;
  return g;
}
void gather(GroupedGemmArgs& g, const MoeMlpArgs& a, const Rows& rows, const void* tokens, int64_t stride) {
  g.a = tokens, g.a_rows = a.tokens, g.a_stride = stride, g.rows_of_a = rows.tables.tokens;
}

// The gradient of up or down: the rows of x or grad_y, gathered, against those of the hidden side.
GroupedGemmWgradArgs weight_product(const MoeMlpBwdArgs& b, const Rows& rows, bool up, const void* hidden_side) {
  const MoeMlpArgs& a = b.forward;
  GroupedGemmWgradArgs g{};
  g.rows = rows.count, g.a_rows = a.tokens, g.experts = a.experts;
  g.m = a.width, g.n = a.expert_width;
  g.dtype = DType::bf16, g.out_dtype = a.weight_dtype;
  g.a = up ? a.x : b.grad_y;
  g.a_stride = up ? a.x_stride : a.width;
  g.rows_of_a = rows.tables.tokens;
  g.b = hidden_side, g.b_stride = a.expert_width;
  g.offsets = rows.tables.offsets;
  g.out = up ? b.grad_up : b.grad_down;
  g.transposed = up;  // up is stored (experts, expert_width, width)
  return g;
}

Exec with_workspace(const Exec& exec, void* at, int64_t bytes) {
  Exec inner = exec;
  inner.workspace = at, inner.bytes_workspace = bytes;
  return inner;
}

struct Forward {
  Rows rows;
  bf16* active;  // count, expert_width
  GroupedGemmArgs up, down;
  int64_t bytes_products;
  char* products;

  Forward(const MoeMlpArgs& a, Workspace& w) : rows(a, w, true) {
    active = a.hidden ? static_cast<bf16*>(a.hidden) : w.take<bf16>(rows.count * a.expert_width);
    up = product(a, rows, true, false);
    gather(up, a, rows, a.x, a.x_stride);
    up.relu2 = true, up.scale = rows.tables.scale, up.out = active;
    down = product(a, rows, false, false);
    down.a = active, down.out = rows.outputs;
    bytes_products = std::max(grouped_gemm_fwd_workspace(up), grouped_gemm_fwd_workspace(down));
    products = w.take<char>(bytes_products);
  }
};

struct Backward {
  Rows rows;
  bf16* grad_hidden;   // count, expert_width
  float* grad_scale;   // count
  GroupedGemmArgs down, up;
  GroupedGemmWgradArgs grad_up, grad_down;
  int64_t bytes_products;
  char* products;

  Backward(const MoeMlpBwdArgs& b, Workspace& w) : rows(b.forward, w, b.grad_x) {
    const MoeMlpArgs& a = b.forward;
    grad_hidden = w.take<bf16>(rows.count * a.expert_width);
    grad_scale = w.take<float>(rows.count);
    down = product(a, rows, false, true);
    gather(down, a, rows, b.grad_y, a.width);
    down.relu2 = true, down.scale = rows.tables.scale, down.kept = a.hidden;
    down.row_sums = grad_scale, down.out = grad_hidden;
    up = product(a, rows, true, true);
    up.a = grad_hidden, up.out = rows.outputs;
    grad_up = weight_product(b, rows, true, grad_hidden);
    grad_down = weight_product(b, rows, false, a.hidden);
    bytes_products = std::max({grouped_gemm_fwd_workspace(down), grouped_gemm_fwd_workspace(up),
                               grouped_gemm_wgrad_workspace(grad_up), grouped_gemm_wgrad_workspace(grad_down)});
    products = w.take<char>(bytes_products);
  }
};

// grad_weights[slot] = the gradient of its row's scale.
__global__ void __launch_bounds__(kThreads) to_slots(const float* by_row, const int32_t* position, int64_t count, float* by_slot) {
#pragma unroll 4
  for (int64_t slot = int64_t(blockIdx.x) * kThreads + threadIdx.x; slot < count; slot += int64_t(gridDim.x) * kThreads)
    by_slot[slot] = by_row[position[slot]];
}

void check_args(const MoeMlpArgs& a) {
  check_moe_tables(kOp, a.tokens, a.top_k, a.experts);
  check(a.width > 0 && a.width % 8 == 0, kOp, "width must be a multiple of 8", a.width);
  check(a.expert_width > 0 && a.expert_width % 8 == 0, kOp, "expert_width must be a multiple of 8", a.expert_width);
  check(a.dtype == DType::bf16, kOp, "dtype must be bfloat16", int64_t(a.dtype));
  check(!a.packed, kOp, "packed must be 0", a.packed);
}

template <class Plan, class Args>
int64_t bytes_of(const Args& args) {
  Workspace space{nullptr};
  const Plan plan(args, space);
  return space.bytes;
}

void check_workspace(const Exec& exec, int64_t needed) {
  check(exec.bytes_workspace >= needed, kOp, "workspace is too small", exec.bytes_workspace);
  const uintptr_t at = reinterpret_cast<uintptr_t>(exec.workspace);
  check(at % 16 == 0, kOp, "workspace must start on 16 bytes", int64_t(at));
}

void check_inputs(const MoeMlpArgs& a, const Exec& exec) {
  check_pointers(kOp, {{"x", a.x}, {"ids", a.ids}, {"weights", a.weights}, {"up", a.up}, {"down", a.down}, {"hidden", a.hidden},
                       {"workspace", exec.workspace}}, exec);
}

}  // namespace

int64_t moe_mlp_fwd_workspace(const MoeMlpArgs& a) {
  check_args(a);
  return refuse_moe_decode(a) ? bytes_of<Forward>(a) : moe_decode_workspace(a);
}

void moe_mlp_fwd(const MoeMlpArgs& a, const Exec& exec) {
  check_workspace(exec, moe_mlp_fwd_workspace(a));
  if (a.tokens == 0) return;
  const DeviceGuard guard(exec);
  check_inputs(a, exec);
  check_pointer(kOp, "y", a.y, exec);
  if (!refuse_moe_decode(a)) return moe_decode(a, exec);  // few tokens, nothing kept: one launch, each weight read once
  Workspace space{static_cast<char*>(exec.workspace)};
  const Forward f(a, space);
  const Exec inner = with_workspace(exec, f.products, f.bytes_products);
  f.rows.sort(a, exec);
  grouped_gemm_fwd(f.up, inner);
  grouped_gemm_fwd(f.down, inner);
  f.rows.combine(a, a.y, exec);
}

int64_t moe_mlp_bwd_workspace(const MoeMlpBwdArgs& b) {
  check_args(b.forward);
  return bytes_of<Backward>(b);
}

void moe_mlp_bwd(const MoeMlpBwdArgs& b, const Exec& exec) {
  const MoeMlpArgs& a = b.forward;
  check_workspace(exec, moe_mlp_bwd_workspace(b));
  const DeviceGuard guard(exec);
  check_pointers(kOp, {{"grad_up", b.grad_up}, {"grad_down", b.grad_down}}, exec);
  if (a.tokens > 0) {
    check_inputs(a, exec);
    check_pointers(kOp, {{"grad_y", b.grad_y}, {"grad_x", b.grad_x}, {"grad_weights", b.grad_weights}}, exec);
    check(a.hidden, kOp, "hidden must be given", 0);
  }
  Workspace space{static_cast<char*>(exec.workspace)};
  const Backward s(b, space);
  const Exec inner = with_workspace(exec, s.products, s.bytes_products);
  if (a.tokens > 0) {
    s.rows.sort(a, exec);
    grouped_gemm_fwd(s.down, inner);
    const LaunchShape slots{dim3(blocks_of_four(s.rows.count)), dim3(kThreads)};
    launch(kOp, to_slots, slots, exec, s.grad_scale, s.rows.tables.position, s.rows.count, b.grad_weights);
    if (b.grad_x) {
      grouped_gemm_fwd(s.up, inner);
      s.rows.combine(a, b.grad_x, exec);
    }
  }
  if (b.grad_up) grouped_gemm_wgrad(s.grad_up, inner);
  if (b.grad_down) grouped_gemm_wgrad(s.grad_down, inner);
}

}  // namespace hebatron::cuda
