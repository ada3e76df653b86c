// A part of bindings.cpp, included where the operators' arguments are read: those of the steps of layers and models.
#pragma once

static AttentionStepArgs read(Reader& in, AttentionStepArgs*) {
  AttentionStepArgs a{};
  a.decode = read_attention_decode(in, false);
  a.width = in.integer("width");
  a.eps = in.real("eps");
  a.x = in.pointer("x");
  a.norm = (const float*)in.pointer("norm");
  a.q_proj = in.pointer("q_proj");
  a.k_proj = in.pointer("k_proj");
  a.v_proj = in.pointer("v_proj");
  a.o_proj = in.pointer("o_proj");
  a.y = in.pointer("y");
  return a;
}

static MambaStepArgs read(Reader& in, MambaStepArgs*) {
  MambaStepArgs a{};
  a.sequences = in.integer("sequences");
  a.width = in.integer("width");
  a.heads = in.integer("heads");
  a.head_dim = in.integer("head_dim");
  a.groups = in.integer("groups");
  a.state_dim = in.integer("state_dim");
  a.taps = in.integer("taps");
  a.eps = in.real("eps");
  a.dt_min = in.real("dt_min");
  a.dt_max = in.real("dt_max");
  a.dtype = in.dtype("dtype");
  a.x = in.pointer("x");
  a.norm = (const float*)in.pointer("norm");
  a.in_proj = in.pointer("in_proj");
  a.conv_state = in.pointer("conv_state");
  a.conv_weight = (const float*)in.pointer("conv_weight");
  a.conv_bias = (const float*)in.pointer("conv_bias");
  a.state = (float*)in.pointer("state");
  a.A = (const float*)in.pointer("A");
  a.D = (const float*)in.pointer("D");
  a.dt_bias = (const float*)in.pointer("dt_bias");
  a.gate_norm = (const float*)in.pointer("gate_norm");
  a.out_proj = in.pointer("out_proj");
  a.y = in.pointer("y");
  return a;
}

static MoeStepArgs read(Reader& in, MoeStepArgs*) {
  MoeStepArgs a{};
  a.tokens = in.integer("tokens");
  a.width = in.integer("width");
  a.experts = in.integer("experts");
  a.top_k = in.integer("top_k");
  a.groups = in.integer("groups");
  a.kept_groups = in.integer("kept_groups");
  a.expert_width = in.integer("expert_width");
  a.shared_width = in.integer("shared_width");
  a.normalize = in.integer("normalize") != 0;
  a.eps = in.real("eps");
  a.scale = in.real("scale");
  a.dtype = in.dtype("dtype");
  a.x = in.pointer("x");
  a.norm = (const float*)in.pointer("norm");
  a.router = in.pointer("router");
  a.bias = (const float*)in.pointer("bias");
  a.up = in.pointer("up");
  a.down = in.pointer("down");
  a.shared_up = in.pointer("shared_up");
  a.shared_down = in.pointer("shared_down");
  a.y = in.pointer("y");
  return a;
}

static DecodeStepArgs read(Reader& in, DecodeStepArgs*) {
  DecodeStepArgs a{};
  a.count = in.integer("count");
  a.layers = (const LayerStepArgs*)in.pointer("layers");
  a.rows = in.integer("rows");
  a.width = in.integer("width");
  a.entries = in.integer("entries");
  a.blocks = in.integer("blocks");
  a.max_blocks = in.integer("max_blocks");
  a.eps = in.real("eps");
  a.dtype = in.dtype("dtype");
  a.ids = (const int64_t*)in.pointer("ids");
  a.table = in.pointer("table");
  a.block_table = (const int32_t*)in.pointer("block_table");
  a.lengths = (const int32_t*)in.pointer("lengths");
  a.norm = (const float*)in.pointer("norm");
  a.head = in.pointer("head");
  a.hidden = in.pointer("hidden");
  a.logits = (float*)in.pointer("logits");
  return a;
}

// The array that decode_step's `layers` points to, and its address, from (LayerKind, what the layer's own step takes).
static std::pair<py::bytes, Ptr> decode_layers(const std::vector<std::pair<int, py::dict>>& given) {
  std::vector<LayerStepArgs> layers;
  for (const auto& [kind, arguments] : given) {
    check(kind >= int(LayerKind::mamba) && kind <= int(LayerKind::attention), "decode_layers", "kind must be 0 to 2", kind);
    const py::kwargs kw = py::reinterpret_borrow<py::kwargs>(arguments);
    Reader in(kw);
    LayerStepArgs layer{LayerKind(kind), {}, {}, {}};
    if (layer.kind == LayerKind::mamba) layer.mamba = read(in, (MambaStepArgs*)nullptr);
    if (layer.kind == LayerKind::experts) layer.experts = read(in, (MoeStepArgs*)nullptr);
    if (layer.kind == LayerKind::attention) layer.attention = read(in, (AttentionStepArgs*)nullptr);
    in.finish();
    layers.push_back(layer);
  }
  py::bytes made((const char*)layers.data(), layers.size() * sizeof(LayerStepArgs));
  const Ptr address = Ptr(PyBytes_AS_STRING(made.ptr()));
  return {made, address};
}
