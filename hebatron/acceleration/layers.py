"""Layers of transformers' NemotronH whose forward calls our operators.

Each is its original's subclass without state of its own, so that accelerating a model is `module.__class__ = ...` and
nothing else: parameters, names, hooks, adapters and gradient checkpointing stay where they are, copies and pickles keep
the class, and what looks for the original class finds it. Projections are called as modules, because an adapter or a
quantised layer may stand there; the blocks, the plain MLP and the head are transformers' own.

T tokens, D width, B rows, L length of a row, H heads, P head dim, S keys of a row, W taps.
"""

from __future__ import annotations

import inspect
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.integrations.accelerate import force_accelerate_hooks
from transformers.models.nemotron_h import modeling_nemotron_h as theirs

from hebatron_kernels import attention_prefill, moe_route, rms_norm

from ..mixers import MambaSizes, MambaState, MambaWeights, mamba2, mamba2_update, routed_experts
from ..model import COMPUTE_DTYPES
from .layout import Layout, find_layout, refuse


class RMSNorm(theirs.NemotronHRMSNorm):
    def forward(self, hidden_states: Tensor) -> Tensor:
        x_TD = hidden_states.reshape(-1, hidden_states.shape[-1])
        y_TD: Any = rms_norm(x_TD, self.weight, self.variance_epsilon)
        return y_TD.view(hidden_states.shape)


class GatedRMSNorm(theirs.NemotronHRMSNormGated):
    def forward(self, hidden_states: Tensor, gate: Tensor | None = None) -> Tensor:
        x_TD = hidden_states.reshape(-1, hidden_states.shape[-1])
        if gate is not None:
            gate = gate.to(x_TD.dtype).reshape(x_TD.shape)
        y_TD: Any = rms_norm(
            x_TD, self.weight, self.variance_epsilon, gate_TD=gate, group_size=self.group_size
        )
        return y_TD.view(hidden_states.shape)


class Mamba2(theirs.NemotronHMamba2Mixer):
    """The step's limit is the config's `time_step_limit`; transformers' own forward clamps at `time_step_min`."""

    @staticmethod
    def refusal(module: Any) -> str | None:
        if module.activation != "silu":
            return f"mamba_hidden_act must be 'silu', got {module.activation!r}"
        if type(module.conv1d) is not nn.Conv1d:
            return f"conv1d must be a plain Conv1d (its weight is read), got {type(module.conv1d).__name__}"
        low, high = module.config.time_step_limit
        return None if 0 <= low < high else f"time_step_limit must be (low, high), got {(low, high)}"

    @force_accelerate_hooks("conv1d")
    def forward(
        self,
        hidden_states: Tensor,
        cache: Cache | None = None,
        layout: Layout | None = None,
        cache_params: Cache | None = None,  # the name of `cache` up to transformers 5.23
        **kwargs: Any,
    ) -> Tensor:
        cache, layout = (cache if cache is not None else cache_params), _given(layout)
        sizes = MambaSizes(
            self.num_heads,
            self.head_dim,
            self.n_groups,
            self.ssm_state_size,
            cast(tuple[float, float], tuple(self.config.time_step_limit)),
            self.chunk_size,
        )
        weights = MambaWeights(
            self.conv1d.weight.squeeze(1),
            self.conv1d.bias,
            -torch.exp(self.A_log.float()),
            self.D,
            self.dt_bias,
        )
        gate_TD, xBC_TC, dt_TH = sizes.split(layout.pack(self.in_proj(hidden_states)))
        before = None if cache is None else self._states(cache, xBC_TC.dtype)
        one_token = layout.shape[1] == 1 and layout.kept_q is None
        if before is not None and one_token and not torch.is_grad_enabled():
            y_TD, after = mamba2_update(sizes, weights, xBC_TC, dt_TH, before), before
        else:
            y_TD, after = mamba2(sizes, weights, xBC_TC, dt_TH, layout.cu_q, before)
        if cache is not None:
            self._keep(cache, after)
        y_BLD = layout.restore(self.norm(y_TD, gate_TD))
        return self.out_proj(y_BLD.to(hidden_states.dtype))

    def _states(self, cache: Cache, dtype: torch.dtype) -> MambaState | None:
        """transformers keeps W inputs of the convolution, of which the last W - 1 are ever used."""
        layer = cast(int, self.layer_idx)
        conv, ssm = cache.get_conv_state(layer), cache.get_recurrent_state(layer)
        if conv is None or ssm is None:
            return None
        # the scan's is copied where a backward may read it: it is overwritten in the cache
        ssm = ssm.clone() if torch.is_grad_enabled() else ssm
        return conv[..., 1:].to(dtype, memory_format=torch.contiguous_format, copy=True), ssm

    def _keep(self, cache: Cache, states: MambaState) -> None:
        (conv, ssm), layer = states, cast(int, self.layer_idx)
        cache.update_conv_state(F.pad(conv, (1, 0)), layer, conv_kernel_size=self.conv_kernel_size)
        if ssm is not cache.get_recurrent_state(layer):
            cache.update_recurrent_state(ssm, layer)


class Attention(theirs.NemotronHAttention):
    @staticmethod
    def refusal(module: Any) -> str | None:
        if module.attention_dropout:
            return f"attention_dropout must be 0, got {module.attention_dropout}"
        causal = getattr(module.config, "is_causal", True)
        return None if causal else "config.is_causal must be True, got False"

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        cache: Cache | None = None,
        layout: Layout | None = None,
        past_key_values: Cache | None = None,  # the name of `cache` up to transformers 5.23
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        cache, layout = (cache if cache is not None else past_key_values), _given(layout)
        projections = (self.q_proj, self.k_proj, self.v_proj)
        q, k, v = (p(hidden_states).unflatten(-1, (-1, self.head_dim)) for p in projections)
        if cache is not None:
            k, v = cache.update(k.transpose(1, 2), v.transpose(1, 2), self.layer_idx)
            k, v = k.transpose(1, 2), v.transpose(1, 2)
        if k.shape[1] != layout.keys:
            refuse("cache", f"give {layout.keys} keys, as many as there were tokens", k.shape[1])
        keys_SHP, values_SHP = layout.pack_keys(k), layout.pack_keys(v)
        y_THP = attention_prefill(
            layout.pack(q), keys_SHP, values_SHP, layout.cu_q, layout.cu_k, scale=self.scaling
        )
        return self.o_proj(layout.restore(y_THP.flatten(1))), None


class Router(theirs.NemotronHTopkRouter):
    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x_TD = hidden_states.reshape(-1, self.hidden_dim)
        logits_TE = F.linear(x_TD.float(), self.weight.float())
        weights_TK, ids_TK, _ = moe_route(
            logits_TE,
            self.e_score_correction_bias,
            self.top_k,
            self.num_group,
            self.topk_group,
            self.norm_topk_prob,
            self.routed_scaling_factor,
        )
        return logits_TE, weights_TK, ids_TK


class Experts(theirs.NemotronHExperts):
    @staticmethod
    def refusal(module: Any) -> str | None:
        if module.config.mlp_hidden_act != "relu2":
            return f"mlp_hidden_act must be 'relu2', got {module.config.mlp_hidden_act!r}"
        if module.up_proj.dtype not in COMPUTE_DTYPES:
            return f"weights must be float32, bfloat16 or float64, got {module.up_proj.dtype}"
        return (
            "experts must all be in this process, got expert parallelism"
            if module._is_expert_parallel
            else None
        )

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        x_TD = hidden_states
        if torch.is_autocast_enabled(x_TD.device.type):
            x_TD = x_TD.to(torch.get_autocast_dtype(x_TD.device.type))
        # each weight is read once: an adapted one is formed anew at every reading
        y_TD = routed_experts(x_TD, top_k_index, top_k_weights, self.up_proj, self.down_proj)
        return y_TD.to(hidden_states.dtype)


OURS: dict[type[nn.Module], type[nn.Module]] = {
    theirs.NemotronHRMSNorm: RMSNorm,
    theirs.NemotronHRMSNormGated: GatedRMSNorm,
    theirs.NemotronHMamba2Mixer: Mamba2,
    theirs.NemotronHAttention: Attention,
    theirs.NemotronHTopkRouter: Router,
    theirs.NemotronHExperts: Experts,
}


def _given(layout: Layout | None) -> Layout:
    if layout is None:
        refuse("layout", "come from the model; call the model and not a layer of it", None)
    return layout


def give_layout(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Before a forward of NemotronHModel: works out the layout and hands it to the layers beside their arguments.

    transformers' masks over all pairs are not built where every mixer that would read one is ours.
    """
    if args:
        names = list(inspect.signature(type(model).forward).parameters)[1:]
        kwargs = dict(zip(names, args)) | kwargs
    tokens = kwargs.get("input_ids")
    tokens = kwargs.get("inputs_embeds") if tokens is None else tokens
    if tokens is None:
        return (), kwargs  # the model says what is missing
    mixers = [block.mixer for block in model.layers]
    cache = kwargs.get("cache")
    cache = kwargs.get("past_key_values") if cache is None else cache
    _check(kwargs, model.config, cache)
    has_attention = any(isinstance(mixer, theirs.NemotronHAttention) for mixer in mixers)
    past = cache.get_seq_length() if cache is not None and has_attention else 0
    rows, length = tokens.shape[:2]
    cached = cache is not None or kwargs.get("use_cache") is True
    layout = find_layout((rows, length), past, tokens.device, cached, kwargs)
    if cache is None and layout.keys == length and layout.cu_q is not None and len(layout.cu_q) != rows + 1:
        kwargs["use_cache"] = False  # documents of a row end in more states than a cache holds
    readers = (theirs.NemotronHAttention, theirs.NemotronHMamba2Mixer)
    if all(isinstance(mixer, (Attention, Mamba2)) for mixer in mixers if isinstance(mixer, readers)):
        kwargs["attention_mask"] = {"full_attention": None, "linear_attention": None}
    return (), kwargs | {"layout": layout}


def _check(kwargs: dict[str, Any], config: Any, cache: Any) -> None:
    instead = "accelerate(model, undo=True) serves this"
    mask = kwargs.get("attention_mask")
    if mask is not None and not (isinstance(mask, Tensor) and mask.dim() == 2):
        got = f"shape {tuple(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
        refuse("attention_mask", f"be None or (rows, tokens) of 0 and 1 ({instead})", got)
    if kwargs.get("output_attentions", getattr(config, "output_attentions", False)):
        refuse("output_attentions", f"be off: no attention weights are formed ({instead})", True)
    if kwargs.get("is_causal") is False:
        refuse("is_causal", f"be True ({instead})", False)
    if cache is None:
        return
    if not isinstance(cache, Cache):
        refuse("cache", f"be a Cache of transformers ({instead})", type(cache).__name__)
    if any(layer.get_max_length() >= 0 or getattr(layer, "record_past", False) for layer in cache.layers):
        refuse("cache", f"grow, and record no past to go back to ({instead})", type(cache).__name__)
