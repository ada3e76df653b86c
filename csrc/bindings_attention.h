// The arguments of attention's operators, from Python; bindings.cpp includes it.
#pragma once
#include "bindings.h"
#include "hebatron/ops.h"

static AttentionArgs read(Reader& in, AttentionArgs*) {
  AttentionArgs a{};
  a.tokens_q = in.integer("tokens_q");
  a.tokens_k = in.integer("tokens_k");
  a.heads = in.integer("heads");
  a.kv_heads = in.integer("kv_heads");
  a.head_dim = in.integer("head_dim");
  a.sequences = in.integer("sequences");
  a.causal = in.integer("causal") != 0;
  a.window = in.integer("window");
  a.scale = in.real("scale");
  a.dtype = in.dtype("dtype");
  a.workers = in.integer("workers");
  a.q = in.pointer("q");
  a.q_stride = in.integer("q_stride");
  a.q_head_stride = in.integer("q_head_stride");
  a.k = in.pointer("k");
  a.k_stride = in.integer("k_stride");
  a.k_head_stride = in.integer("k_head_stride");
  a.v = in.pointer("v");
  a.v_stride = in.integer("v_stride");
  a.v_head_stride = in.integer("v_head_stride");
  a.cu_seqlens_q = (const int32_t*)in.pointer("cu_seqlens_q");
  a.cu_seqlens_k = (const int32_t*)in.pointer("cu_seqlens_k");
  a.o = in.pointer("o");
  a.lse = (float*)in.pointer("lse");
  return a;
}

static AttentionBwdArgs read(Reader& in, AttentionBwdArgs*) {
  AttentionBwdArgs b{};
  b.forward = read(in, (AttentionArgs*)nullptr);
  b.grad_o = in.pointer("grad_o");
  b.grad_q = in.pointer("grad_q");
  b.grad_k = in.pointer("grad_k");
  b.grad_v = in.pointer("grad_v");
  return b;
}

static AttentionDecodeArgs read_attention_decode(Reader& in, bool projected) {
  AttentionDecodeArgs a{};
  a.sequences = in.integer("sequences");
  a.heads = in.integer("heads");
  a.kv_heads = in.integer("kv_heads");
  a.head_dim = in.integer("head_dim");
  a.block_size = in.integer("block_size");
  a.max_blocks = in.integer("max_blocks");
  a.window = in.integer("window");
  a.scale = in.real("scale");
  a.dtype = in.dtype("dtype");
  a.workers = in.integer("workers");
  if (projected) {
    a.q = in.pointer("q");
    a.q_stride = in.integer("q_stride");
    a.q_head_stride = in.integer("q_head_stride");
    a.k_new = in.pointer("k_new");
    a.k_new_stride = in.integer("k_new_stride");
    a.k_new_head_stride = in.integer("k_new_head_stride");
    a.v_new = in.pointer("v_new");
    a.v_new_stride = in.integer("v_new_stride");
    a.v_new_head_stride = in.integer("v_new_head_stride");
    a.o = in.pointer("o");
  }
  a.keys = in.pointer("keys");
  a.values = in.pointer("values");
  a.block_stride = in.integer("block_stride");
  a.row_stride = in.integer("row_stride");
  a.head_stride = in.integer("head_stride");
  a.block_table = (const int32_t*)in.pointer("block_table");
  a.lengths = (const int32_t*)in.pointer("lengths");
  return a;
}

static AttentionDecodeArgs read(Reader& in, AttentionDecodeArgs*) { return read_attention_decode(in, true); }
