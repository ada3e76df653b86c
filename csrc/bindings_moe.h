// The arguments of routing, permutation and sum, from Python; bindings.cpp includes it.
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
