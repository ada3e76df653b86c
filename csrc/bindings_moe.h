// The arguments of the expert layer's operators, from Python; bindings.cpp includes it.
#pragma once
#include "bindings.h"
#include "hebatron/ops.h"

static MoeRouteArgs read_moe_route(Reader& in, bool outputs) {
  MoeRouteArgs a{};
  a.tokens = in.integer("tokens");
  a.experts = in.integer("experts");
  a.top_k = in.integer("top_k");
  a.groups = in.integer("groups");
  a.kept_groups = in.integer("kept_groups");
  a.workers = in.integer("workers");
  a.normalize = in.integer("normalize") != 0;
  a.scale = in.real("scale");
  a.dtype = in.dtype("dtype");
  a.logits = in.pointer("logits");
  a.logits_stride = in.integer("logits_stride");
  a.bias = (const float*)in.pointer("bias");
  if (outputs) {
    a.weights = (float*)in.pointer("weights");
    a.ids = (int64_t*)in.pointer("ids");
    a.counts = (int64_t*)in.pointer("counts");
  }
  return a;
}

static MoeRouteArgs read(Reader& in, MoeRouteArgs*) { return read_moe_route(in, true); }

static MoeRouteBwdArgs read(Reader& in, MoeRouteBwdArgs*) {
  MoeRouteBwdArgs b{};
  b.forward = read_moe_route(in, false);
  b.grad_weights = (const float*)in.pointer("grad_weights");
  b.grad_logits = in.pointer("grad_logits");
  return b;
}

static MoeMlpArgs read_moe_mlp(Reader& in, bool outputs) {
  MoeMlpArgs a{};
  a.tokens = in.integer("tokens");
  a.top_k = in.integer("top_k");
  a.experts = in.integer("experts");
  a.width = in.integer("width");
  a.expert_width = in.integer("expert_width");
  a.workers = in.integer("workers");
  a.dtype = in.dtype("dtype");
  a.weight_dtype = in.dtype("weight_dtype");
  a.packed = in.integer("packed") != 0;
  a.x = in.pointer("x");
  a.x_stride = in.integer("x_stride");
  a.ids = (const int64_t*)in.pointer("ids");
  a.weights = (const float*)in.pointer("weights");
  a.up = in.pointer("up");
  a.up_expert_stride = in.integer("up_expert_stride");
  a.up_stride = in.integer("up_stride");
  a.down = in.pointer("down");
  a.down_expert_stride = in.integer("down_expert_stride");
  a.down_stride = in.integer("down_stride");
  a.hidden = in.pointer("hidden");
  if (outputs) a.y = in.pointer("y");
  return a;
}

static MoeMlpArgs read(Reader& in, MoeMlpArgs*) { return read_moe_mlp(in, true); }

static MoeMlpBwdArgs read(Reader& in, MoeMlpBwdArgs*) {
  MoeMlpBwdArgs b{};
  b.forward = read_moe_mlp(in, false);
  b.grad_y = in.pointer("grad_y");
  b.grad_x = in.pointer("grad_x");
  b.grad_weights = (float*)in.pointer("grad_weights");
  b.grad_up = in.pointer("grad_up");
  b.grad_down = in.pointer("grad_down");
  return b;
}

static GroupedGemm implementation_of(Reader& in) {
  const int64_t found = in.integer("implementation");
  check(found >= 0 && found <= int(GroupedGemm::cutlass), "grouped_gemm", "implementation must be 0 to 3", found);
  return GroupedGemm(found);
}

static GroupedGemmArgs read(Reader& in, GroupedGemmArgs*) {
  GroupedGemmArgs a{};
  a.rows = in.integer("rows");
  a.a_rows = in.integer("a_rows");
  a.experts = in.integer("experts");
  a.n = in.integer("n");
  a.k = in.integer("k");
  a.workers = in.integer("workers");
  a.dtype = in.dtype("dtype");
  a.relu2 = in.integer("relu2") != 0;
  a.a = in.pointer("a");
  a.a_stride = in.integer("a_stride");
  a.rows_of_a = (const int32_t*)in.pointer("rows_of_a");
  a.b = in.pointer("b");
  a.b_expert_stride = in.integer("b_expert_stride");
  a.b_stride = in.integer("b_stride");
  a.b_k_major = in.integer("b_k_major") != 0;
  a.offsets = (const int32_t*)in.pointer("offsets");
  a.scale = (const float*)in.pointer("scale");
  a.kept = in.pointer("kept");
  a.row_sums = (float*)in.pointer("row_sums");
  a.out = in.pointer("out");
  a.implementation = implementation_of(in);
  a.tile_m = in.integer("tile_m");
  a.tile_n = in.integer("tile_n");
  return a;
}

static GroupedGemmWgradArgs read(Reader& in, GroupedGemmWgradArgs*) {
  GroupedGemmWgradArgs a{};
  a.rows = in.integer("rows");
  a.a_rows = in.integer("a_rows");
  a.experts = in.integer("experts");
  a.m = in.integer("m");
  a.n = in.integer("n");
  a.workers = in.integer("workers");
  a.dtype = in.dtype("dtype");
  a.out_dtype = in.dtype("out_dtype");
  a.a = in.pointer("a");
  a.a_stride = in.integer("a_stride");
  a.rows_of_a = (const int32_t*)in.pointer("rows_of_a");
  a.b = in.pointer("b");
  a.b_stride = in.integer("b_stride");
  a.offsets = (const int32_t*)in.pointer("offsets");
  a.out = in.pointer("out");
  a.transposed = in.integer("transposed") != 0;
  a.implementation = implementation_of(in);
  a.tile_m = in.integer("tile_m");
  a.tile_n = in.integer("tile_n");
  return a;
}

#ifndef HEBATRON_MODULE_CPU
static MoePermuteArgs read(Reader& in, MoePermuteArgs*) {
  MoePermuteArgs a{};
  a.tokens = in.integer("tokens");
  a.top_k = in.integer("top_k");
  a.experts = in.integer("experts");
  a.width = in.integer("width");
  a.dtype = in.dtype("dtype");
  a.x = in.pointer("x");
  a.x_stride = in.integer("x_stride");
  a.ids = (const int64_t*)in.pointer("ids");
  a.rows = in.pointer("rows");
  a.order = (int64_t*)in.pointer("order");
  a.position = (int32_t*)in.pointer("position");
  a.offsets = (int32_t*)in.pointer("offsets");
  return a;
}

static MoeCombineArgs read_moe_combine(Reader& in, bool outputs) {
  MoeCombineArgs a{};
  a.tokens = in.integer("tokens");
  a.top_k = in.integer("top_k");
  a.width = in.integer("width");
  a.dtype = in.dtype("dtype");
  a.rows = in.pointer("rows");
  a.rows_stride = in.integer("rows_stride");
  a.order = (const int64_t*)in.pointer("order");
  a.position = (const int32_t*)in.pointer("position");
  a.weights = (const float*)in.pointer("weights");
  if (outputs) {
    a.eps = in.real("eps");
    a.norm_dtype = in.dtype("norm_dtype");
    a.shared = in.pointer("shared");
    a.shared_stride = in.integer("shared_stride");
    a.residual = in.pointer("residual");
    a.residual_stride = in.integer("residual_stride");
    a.norm = in.pointer("norm");
    a.y = in.pointer("y");
    a.normalized = in.pointer("normalized");
  }
  return a;
}

static MoeCombineArgs read(Reader& in, MoeCombineArgs*) { return read_moe_combine(in, true); }

static MoeCombineBwdArgs read(Reader& in, MoeCombineBwdArgs*) {
  MoeCombineBwdArgs b{};
  b.forward = read_moe_combine(in, false);
  b.grad_y = in.pointer("grad_y");
  b.grad_rows = in.pointer("grad_rows");
  b.grad_weights = (float*)in.pointer("grad_weights");
  return b;
}
#endif
