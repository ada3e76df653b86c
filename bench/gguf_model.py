"""A model as a GGUF file, which llama.cpp opens: the peer of bench_model.py computes with the same weights.

Names and shapes are those of the architecture `nemotron_h_moe`. The package `gguf` comes with llama.cpp's source
(bench/fetch_peers.sh). There is no tokenizer in the file: prompts are token ids.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import ROOT
from torch import Tensor

from hebatron import Hebatron

GGUF = ROOT / "third_party/peers/llama-source/vendor/llama.cpp/gguf-py"
# the rest of a layer's names, and whether the kind of the file (bf16, q8_0) applies; vectors and the router are fp32
MATRICES = {
    "in_proj.weight": "ssm_in.weight",
    "out_proj.weight": "ssm_out.weight",
    "q_proj.weight": "attn_q.weight",
    "k_proj.weight": "attn_k.weight",
    "v_proj.weight": "attn_v.weight",
    "o_proj.weight": "attn_output.weight",
    "experts.up_proj": "ffn_up_exps.weight",
    "experts.down_proj": "ffn_down_exps.weight",
    "shared_experts.up_proj.weight": "ffn_up_shexp.weight",
    "shared_experts.down_proj.weight": "ffn_down_shexp.weight",
}
VECTORS = {
    "conv1d.weight": "ssm_conv1d.weight",
    "conv1d.bias": "ssm_conv1d.bias",
    "dt_bias": "ssm_dt.bias",
    "A_log": "ssm_a",
    "D": "ssm_d",
    "norm.weight": "ssm_norm.weight",
    "gate.weight": "ffn_gate_inp.weight",
    "gate.e_score_correction_bias": "exp_probs_b.bias",
}


def write_gguf(model: Hebatron, path: Path, kind: str) -> None:
    """`kind`: "bf16" or "q8_0" (widths are then multiples of 32)."""
    sys.path.insert(0, str(GGUF))
    import gguf

    c = model.config
    if "mlp" in c.layers_block_type or c.moe_latent_size is not None:
        raise ValueError(f"write_gguf: model must have full-width expert layers and no mlp, got {c.pattern}")
    quantised = gguf.GGMLQuantizationType.BF16 if kind == "bf16" else gguf.GGMLQuantizationType.Q8_0
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    writer = gguf.GGUFWriter(partial, "nemotron_h_moe")
    _write_settings(writer, c, gguf)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16 if kind == "bf16" else gguf.LlamaFileType.MOSTLY_Q8_0)

    def matrix(name: str, value: Tensor) -> None:
        data = gguf.quants.quantize(value.detach().float().numpy(), quantised)
        writer.add_tensor(name, data, raw_dtype=quantised)

    def vector(name: str, value: Tensor) -> None:
        writer.add_tensor(name, np.ascontiguousarray(value.detach().float().numpy()))

    state = dict(model.named_parameters()) | dict(model.named_buffers())
    matrix("token_embd.weight", state.pop("backbone.embeddings.weight"))
    vector("output_norm.weight", state.pop("backbone.norm_f.weight"))
    matrix("output.weight", state.pop("lm_head.weight"))
    for name, value in state.items():
        _, _, layer, _, rest = name.split(".", 4) if ".mixer." in name else (*name.split(".", 3), "")
        if not rest:
            vector(f"blk.{layer}.attn_norm.weight", value)
        elif rest in MATRICES:
            matrix(f"blk.{layer}.{MATRICES[rest]}", value)
        else:
            vector(f"blk.{layer}.{VECTORS[rest]}", _as_llama(rest, value, c.n_groups))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    partial.rename(path)


def _as_llama(name: str, value: Tensor, groups: int) -> Tensor:
    if name == "conv1d.weight":
        return value.squeeze(1)
    if name == "A_log":
        return -torch.exp(value)[:, None]
    if name == "D":
        return value[:, None]
    return value.view(groups, -1) if name == "norm.weight" else value


def _write_settings(w: Any, c: Any, gguf: Any) -> None:
    w.add_vocab_size(c.vocab_size)
    w.add_context_length(c.max_position_embeddings)
    w.add_embedding_length(c.hidden_size)
    w.add_block_count(c.num_hidden_layers)
    w.add_head_count(c.num_attention_heads)
    kinds = c.layers_block_type
    w.add_head_count_kv([c.num_key_value_heads if kind == "attention" else 0 for kind in kinds])
    w.add_feed_forward_length([c.moe_intermediate_size if kind == "moe" else 0 for kind in kinds])
    w.add_key_length(c.head_dim)
    w.add_value_length(c.head_dim)
    w.add_rope_dimension_count(c.head_dim)
    w.add_layer_norm_eps(c.layer_norm_epsilon)
    w.add_layer_norm_rms_eps(c.layer_norm_epsilon)
    w.add_ssm_conv_kernel(c.conv_kernel)
    w.add_ssm_inner_size(c.d_inner)
    w.add_ssm_state_size(c.ssm_state_size)
    w.add_ssm_time_step_rank(c.mamba_num_heads)
    w.add_ssm_group_count(c.n_groups)
    w.add_expert_count(c.n_routed_experts)
    w.add_expert_used_count(c.num_experts_per_tok)
    w.add_expert_feed_forward_length(c.moe_intermediate_size)
    w.add_expert_shared_feed_forward_length(c.moe_shared_expert_intermediate_size)
    w.add_expert_shared_count(c.n_shared_experts)
    w.add_expert_weights_norm(c.norm_topk_prob)
    w.add_expert_weights_scale(c.routed_scaling_factor)
    w.add_expert_group_count(c.n_group)
    w.add_expert_group_used_count(c.topk_group)
    w.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID)
    w.add_tokenizer_model("none")
