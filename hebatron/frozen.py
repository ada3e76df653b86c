"""A model that will only be run: its weights once in the dtype it computes in, the experts' in the kernels' own order.

E experts, F expert width, D width, T tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from hebatron_kernels import (
    AttentionStep,
    DecodeStep,
    MambaStep,
    MoeStep,
    linear_pack,
    linear_packed,
    linear_unpack,
    moe_mlp_packed,
    moe_pack,
    moe_unpack,
    step_available,
)

from .cache import CacheStep
from .model import Context, Experts, Hebatron, Layer, Linear, Router, RouterStats


def _refuse_loading(prefix: str) -> None:
    raise ValueError(f"load_state_dict: {prefix[:-1]} must not be frozen: load first, then freeze")


class PackedMatrix(nn.Module):
    """A module whose `weight` is packed for the CPU kernels; reading it unpacks it, as a state dict does."""

    packed: Tensor

    def __init__(self, weight_MD: Tensor, dtype: torch.dtype) -> None:
        nn.Module.__init__(self)
        self.out_features, self.in_features = weight_MD.shape
        self.register_buffer("packed", linear_pack(weight_MD.detach(), dtype), persistent=False)

    @property
    def weight(self) -> Tensor:
        return linear_unpack(self.packed, self.out_features, self.in_features)

    def project(self, x_TD: Tensor) -> Tensor:
        return linear_packed(x_TD.to(self.packed.dtype), self.packed, self.out_features)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}weight"] = self.weight

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *_: Any) -> None:
        _refuse_loading(prefix)


class FrozenLinear(PackedMatrix):
    def forward(self, input: Tensor) -> Tensor:
        return self.project(input)


class FrozenRouter(PackedMatrix, Router):  # type: ignore[misc]
    def __init__(self, router: Router) -> None:
        super().__init__(router.weight, router.weight.dtype)
        self.config = router.config
        self.register_buffer("e_score_correction_bias", router.e_score_correction_bias)


class FrozenExperts(Experts):
    """Experts packed for the CPU kernels: no parameters; a state dict gets them unpacked, in the dtype they are in."""

    def __init__(self, experts: Experts, dtype: torch.dtype) -> None:
        nn.Module.__init__(self)
        self.sizes = tuple(experts.up_proj.shape)  # E, F, D
        self.packed_up: Tensor
        self.packed_down: Tensor
        self.register_buffer("packed_up", moe_pack(experts.up_proj.detach(), dtype), persistent=False)
        self.register_buffer("packed_down", moe_pack(experts.down_proj.detach(), dtype), persistent=False)

    def forward(self, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
        E, F, _ = self.sizes
        return moe_mlp_packed(x_TD, ids_TK, weights_TK.detach(), self.packed_up, self.packed_down, E, F)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        E, F, D = self.sizes
        destination[f"{prefix}up_proj"] = moe_unpack(self.packed_up, E, F, D)
        destination[f"{prefix}down_proj"] = moe_unpack(self.packed_down, E, D, F)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *_: Any) -> None:
        _refuse_loading(prefix)


class FrozenLayer(Layer):
    """A layer whose mixer is frozen: one token a sequence is one call, where the kernels have one for it."""

    def __init__(self, layer: Layer, dtype: torch.dtype) -> None:
        nn.Module.__init__(self)
        self.kind, self.index, self.norm, self.mixer = layer.kind, layer.index, layer.norm, layer.mixer
        make = {"mamba": _mamba_step, "attention": _attention_step, "moe": _moe_step}.get(self.kind)
        self.token: Any = None if make is None else make(self.mixer, _vector(self.norm.weight), dtype)

    def forward(self, x_TD: Tensor, context: Context) -> tuple[Tensor, RouterStats | None]:
        step = context.step
        if step is None or not step.one_token or self.token is None or not step_available():
            return super().forward(x_TD, context)
        if self.kind == "mamba":
            state = step.mamba_state(self.index)
            return self.token(x_TD, state.conv, state.ssm), None
        if self.kind == "attention":
            return self.token(x_TD, step.pages(self.index), step.block_table, step.lengths), None
        return self.token(x_TD), None


class WholeToken:
    """The next token of every layer, and its logits, in one call."""

    def __init__(self, model: Hebatron, layers: list[FrozenLayer]) -> None:
        self.kinds = [layer.kind for layer in layers]
        norm, head = model.backbone.norm_f, model.lm_head
        tokens = [layer.token for layer in layers]
        table_VD = model.backbone.embeddings.weight.detach()
        assert isinstance(head, FrozenLinear)
        self.step = DecodeStep(table_VD, tokens, _vector(norm.weight), head.packed, norm.eps)

    def __call__(self, ids_T: Tensor, step: CacheStep) -> tuple[Tensor, Tensor] | None:
        """hidden_TD and logits_TV; None where the operators serve."""
        if not step.one_token or not step_available():
            return None
        states: list[Tensor] = []
        for layer, kind in enumerate(self.kinds):
            if kind == "mamba":
                state = step.mamba_state(layer)
                states += (state.conv, state.ssm)
            elif kind == "attention":
                states.append(step.pages(layer))
        return self.step(ids_T, states, step.block_table, step.lengths)


def _vector(value: Tensor) -> Tensor:
    """As the operators read it at every call."""
    return value.detach().float().contiguous()


def _mamba_step(m: Any, norm_D: Tensor, dtype: torch.dtype) -> MambaStep:
    c = m.config
    weight_CW, bias_C = m.conv1d.cast(dtype)
    A_H, D_H, dt_bias_H, gate_norm = (
        _vector(v) for v in (-torch.exp(m.A_log), m.D, m.dt_bias, m.norm.weight)
    )
    conv = (_vector(weight_CW), None if bias_C is None else _vector(bias_C))
    sizes = (c.mamba_head_dim, c.ssm_state_size, c.n_groups, m.norm.eps, c.time_step_limit)
    scan = (A_H, D_H, dt_bias_H, gate_norm)
    return MambaStep(norm_D, m.in_proj.packed, *conv, *scan, m.out_proj.packed, *sizes)


def _attention_step(m: Any, norm_D: Tensor, dtype: torch.dtype) -> AttentionStep:
    c = m.config
    matrices = (m.q_proj.packed, m.k_proj.packed, m.v_proj.packed, m.o_proj.packed)
    heads = (c.num_attention_heads, c.num_key_value_heads, c.head_dim)
    return AttentionStep(norm_D, *matrices, *heads, c.layer_norm_epsilon)


def _moe_step(m: Any, norm_D: Tensor, dtype: torch.dtype) -> MoeStep | None:
    if m.latent:
        return None
    c, shared = m.gate.config, m.shared_experts
    router = (m.gate.packed, m.gate.e_score_correction_bias)
    matrices = (m.experts.packed_up, m.experts.packed_down, shared.up_proj.packed, shared.down_proj.packed)
    widths = (c.moe_intermediate_size, c.moe_shared_expert_intermediate_size)
    choice = (c.num_experts_per_tok, c.n_group, c.topk_group, c.norm_topk_prob, c.routed_scaling_factor)
    return MoeStep(norm_D, *router, *matrices, *widths, *choice, c.layer_norm_epsilon)


@torch.no_grad()
def freeze_for_inference(model: Hebatron) -> Hebatron:
    """Prepare a model on the CPU to be run and no longer trained, in place.

    The embeddings are rounded to the compute dtype once instead of at every use; projections and routed experts are
    packed for the kernels (`hebatron_kernels.moe_pack`), one after another, so that only one is held twice; a layer's
    next token is one call, and where every layer has one, so is the whole model's. No result changes by a bit.
    Parameters need no gradient afterwards; `train()`, `load_state_dict` and optimizers refuse the model, and a state
    dict or an export holds the rounded weights in the usual layout.

    Args:
        model: computes in float32 or bfloat16. A frozen one is left as it is.

    Returns:
        The model, in evaluation mode.

    Raises:
        ValueError: the model is not on the CPU, or computes in another dtype.
    """
    if model.frozen:
        return model
    dtype = model.compute_dtype
    if model.device.type != "cpu":
        raise ValueError(f"freeze_for_inference: model must be on the CPU, got {model.device}")
    if dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"freeze_for_inference: model must compute in float32 or bfloat16, got {dtype}")
    model.compute_dtype = dtype  # no longer that of the embeddings
    model.eval().requires_grad_(False)
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, Experts):
                module.register_module(name, FrozenExperts(child, dtype).eval())
            elif isinstance(child, Linear):
                module.register_module(name, FrozenLinear(child.weight, dtype).eval())
            elif isinstance(child, Router):
                module.register_module(name, FrozenRouter(child).eval())
            elif isinstance(child, nn.Embedding):
                child.weight = nn.Parameter(child.weight.to(dtype), requires_grad=False)
    layers = model.backbone.layers
    for index, layer in enumerate(layers):
        assert isinstance(layer, Layer)
        layers[index] = FrozenLayer(layer, dtype).eval()
    frozen: Any = list(layers)
    if all(layer.token is not None for layer in frozen):
        model.whole_token = WholeToken(model, frozen)
    model.frozen = True
    return model
