"""The model: embeddings, one mixer per layer (Mamba-2, attention, experts or MLP) and the head.

Inside, everything is flat: the tokens of all sequences one after another, and `cu_seqlens` says where each begins.
Padding is removed at the door (`enter`) and put back on the logits. Module and parameter names are the hub's, except
that an expert layer's weights are two 3-D tensors.

T tokens, D width, V vocabulary, Q sequences, C convolution channels, W taps, H heads, P head dim, G groups, S state,
E experts, K experts per token, B rows, L length of a row.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hebatron_kernels import (
    attention_decode,
    attention_prefill,
    linear,
    linear_cross_entropy,
    moe_route,
    rms_norm,
)

from .cache import Cache, CacheStep
from .config import ModelConfig
from .generate import generate
from .mixers import MambaSizes, MambaWeights, mamba2, mamba2_update, routed_experts
from .packed import Packed, enter, must
from .router import load_entropy, sequence_balance_loss

# fp16 overflows in squared ReLU and in long sums
COMPUTE_DTYPES = (torch.float32, torch.bfloat16, torch.float64)


def check_dtype(name: str, dtype: torch.dtype) -> torch.dtype:
    if dtype not in COMPUTE_DTYPES:
        raise ValueError(f"{name} must be float32, bfloat16 or float64, got {dtype}")
    return dtype


class RouterStats(NamedTuple):
    """What one expert layer's router did in one forward."""

    loss: Tensor  # sequence_balance_loss: 1 when balanced; differentiable, unscaled
    counts: Tensor  # (E,) int64, tokens each expert was chosen for
    entropy: (
        Tensor  # of the experts' shares, divided by log E: 1 when all are used equally, 0 when one does all
    )
    ids_TK: Tensor  # every token's experts, in the order of the packed tokens


@dataclass
class Output:
    """`logits` is fp32 (B, L, V); None where a loss was asked for and no logits. `hidden_TD` is what the head sees, of
    all tokens, without the padding."""

    logits: Tensor | None = None
    hidden_TD: Tensor | None = None
    loss: Tensor | None = None
    cache: Cache | None = None
    aux: list[RouterStats] = field(default_factory=list)


@dataclass(frozen=True)
class Context:
    """What every layer of one forward needs to know about its tokens."""

    cu_seqlens: Tensor | None  # int32 (Q + 1,); None is one sequence
    step: CacheStep | None = None
    router_stats: bool = True


class Linear(nn.Linear):
    """x @ weight.T in the dtype of x: the parameter may be an fp32 master copy."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, bias=False)

    def reset_parameters(self) -> None:
        """Left to `Hebatron.initialise`."""

    def forward(self, input: Tensor) -> Tensor:
        return linear(input, self.weight)


class RMSNorm(nn.Module):
    def __init__(self, width: int, eps: float, group_size: int | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.eps, self.group_size = eps, group_size

    def forward(self, x_TD: Tensor, gate_TD: Tensor | None = None) -> Tensor:
        y_TD: Any = rms_norm(x_TD, self.weight, self.eps, gate_TD=gate_TD, group_size=self.group_size)
        return y_TD


class AtLeastFloat32(nn.Module):
    """A module whose own parameters and buffers never fall below fp32, whatever `.to()` or `.bfloat16()` ask.

    A step size, a decay or a router's bias in bf16 changes what the model computes: a bf16 bias alone sends 0.65 % of
    tokens to other experts (128 experts, top 6).
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        def keep(tensor: Tensor) -> Tensor:
            applied = fn(tensor)
            if not applied.is_floating_point() or applied.dtype.itemsize >= 4:
                return applied
            return tensor.to(device=applied.device, dtype=torch.float32)

        if recurse:
            for child in self.children():
                child._apply(fn)
        return super()._apply(keep, recurse=False)


class Mamba2(AtLeastFloat32):
    def __init__(self, c: ModelConfig) -> None:
        super().__init__()
        self.config = c
        self.sizes = MambaSizes(
            c.mamba_num_heads,
            c.mamba_head_dim,
            c.n_groups,
            c.ssm_state_size,
            c.time_step_limit,
            c.chunk_size,
        )
        self.in_proj = Linear(c.hidden_size, c.d_inner + c.conv_dim + c.mamba_num_heads)
        self.conv1d = DepthwiseConv(c.conv_dim, c.conv_kernel, c.use_conv_bias)
        self.A_log = nn.Parameter(torch.empty(c.mamba_num_heads))
        self.D = nn.Parameter(torch.empty(c.mamba_num_heads))
        self.dt_bias = nn.Parameter(torch.empty(c.mamba_num_heads))
        self.norm = RMSNorm(c.d_inner, c.layer_norm_epsilon, c.d_inner // c.n_groups)
        self.out_proj = Linear(c.d_inner, c.hidden_size)

    def forward(self, x_TD: Tensor, context: Context, layer: int) -> Tensor:
        z_TD, xBC_TC, dt_TH = self.sizes.split(self.in_proj(x_TD))
        weights = MambaWeights(*self.conv1d.cast(x_TD.dtype), -torch.exp(self.A_log), self.D, self.dt_bias)
        state = None if context.step is None else context.step.mamba_state(layer)
        if context.step is not None and state is not None and context.step.one_token:
            y_TD = mamba2_update(self.sizes, weights, xBC_TC, dt_TH, (state.conv, state.ssm))
        else:
            before = None if state is None else (state.conv, state.ssm)
            y_TD, after = mamba2(self.sizes, weights, xBC_TC, dt_TH, context.cu_seqlens, before)
            if state is not None:
                state.stage(*after)
        return self.out_proj(self.norm(y_TD, z_TD))


class DepthwiseConv(nn.Module):
    """Holds the short convolution's weights under the hub's names and shape (C, 1, W)."""

    def __init__(self, channels: int, taps: int, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, 1, taps))
        self.bias: nn.Parameter | None
        self.register_parameter("bias", nn.Parameter(torch.empty(channels)) if bias else None)

    def cast(self, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        return self.weight.squeeze(1).to(dtype), None if self.bias is None else self.bias.to(dtype)


class Attention(nn.Module):
    """Grouped-query attention with no positional encoding, scale 1/sqrt(head_dim)."""

    def __init__(self, c: ModelConfig) -> None:
        super().__init__()
        self.config = c
        self.q_proj = Linear(c.hidden_size, c.num_attention_heads * c.head_dim)
        self.k_proj = Linear(c.hidden_size, c.num_key_value_heads * c.head_dim)
        self.v_proj = Linear(c.hidden_size, c.num_key_value_heads * c.head_dim)
        self.o_proj = Linear(c.num_attention_heads * c.head_dim, c.hidden_size)

    def forward(self, x_TD: Tensor, context: Context, layer: int) -> Tensor:
        c, step = self.config, context.step
        q_THP = self.q_proj(x_TD).unflatten(1, (c.num_attention_heads, c.head_dim))
        k_THP, v_THP = (p(x_TD).unflatten(1, (-1, c.head_dim)) for p in (self.k_proj, self.v_proj))
        if step is None:
            y_THP = attention_prefill(q_THP, k_THP, v_THP, context.cu_seqlens, context.cu_seqlens)
        elif step.one_token:
            pages = step.pages(layer)
            y_THP = attention_decode(q_THP, k_THP, v_THP, pages, step.block_table, step.lengths)
        else:
            keys_SHP, values_SHP = step.extend(layer, k_THP, v_THP)
            y_THP = attention_prefill(q_THP, keys_SHP, values_SHP, step.cu_seqlens_q, step.cu_seqlens_k)
        return self.o_proj(y_THP.flatten(1))


class MLP(nn.Module):
    """down(relu(up(x))^2): not gated, no bias."""

    def __init__(self, c: ModelConfig, width: int) -> None:
        super().__init__()
        self.up_proj = Linear(c.hidden_size, width)
        self.down_proj = Linear(width, c.hidden_size)

    def forward(self, x_TD: Tensor) -> Tensor:
        return self.down_proj(F.relu(self.up_proj(x_TD)).square())


class Router(AtLeastFloat32):
    """Sigmoid scores in fp32; a bias that gradient descent does not see decides the choice and not the weights."""

    def __init__(self, c: ModelConfig) -> None:
        super().__init__()
        self.config = c
        self.weight = nn.Parameter(torch.empty(c.n_routed_experts, c.hidden_size))
        self.e_score_correction_bias: Tensor
        self.register_buffer("e_score_correction_bias", torch.zeros(c.n_routed_experts))

    def project(self, x_TD: Tensor) -> Tensor:
        return linear(x_TD.to(self.weight.dtype), self.weight)

    def forward(self, x_TD: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        c = self.config
        logits_TE = self.project(x_TD)
        weights_TK, ids_TK, counts_E = moe_route(
            logits_TE,
            self.e_score_correction_bias,
            c.num_experts_per_tok,
            c.n_group,
            c.topk_group,
            c.norm_topk_prob,
            c.routed_scaling_factor,
        )
        return logits_TE, weights_TK, ids_TK, counts_E


class Experts(nn.Module):
    """The routed experts' weights: (E, F, D) up and (E, D, F) down."""

    def __init__(self, c: ModelConfig) -> None:
        super().__init__()
        E, width = c.n_routed_experts, c.moe_intermediate_size
        self.up_proj = nn.Parameter(torch.empty(E, width, c.expert_dim))
        self.down_proj = nn.Parameter(torch.empty(E, c.expert_dim, width))

    def forward(self, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
        # each weight is read once: an adapted one is formed anew at every reading
        return routed_experts(x_TD, ids_TK, weights_TK, self.up_proj, self.down_proj)


class MoE(nn.Module):
    """Routed experts (at the latent width where there is one) plus a shared expert; the router sees the full width."""

    def __init__(self, c: ModelConfig) -> None:
        super().__init__()
        self.gate = Router(c)
        self.experts = Experts(c)
        self.shared_experts = MLP(c, c.moe_shared_expert_intermediate_size)
        self.latent = c.moe_latent_size is not None
        if c.moe_latent_size is not None:
            self.fc1_latent_proj = Linear(c.hidden_size, c.moe_latent_size)
            self.fc2_latent_proj = Linear(c.moe_latent_size, c.hidden_size)

    def forward(self, x_TD: Tensor, context: Context) -> tuple[Tensor, RouterStats | None]:
        logits_TE, weights_TK, ids_TK, counts_E = self.gate(x_TD)
        inner_TD = self.fc1_latent_proj(x_TD) if self.latent else x_TD
        routed_TD = self.experts(inner_TD, ids_TK, weights_TK)
        y_TD = (self.fc2_latent_proj(routed_TD) if self.latent else routed_TD) + self.shared_experts(x_TD)
        stats = None
        if context.router_stats:
            loss = sequence_balance_loss(logits_TE, ids_TK, context.cu_seqlens)
            stats = RouterStats(loss, counts_E.long(), load_entropy(counts_E), ids_TK)
        return y_TD, stats


class Layer(nn.Module):
    """x + mixer(norm(x))."""

    def __init__(self, c: ModelConfig, index: int) -> None:
        super().__init__()
        self.kind, self.index = c.layers_block_type[index], index
        self.norm = RMSNorm(c.hidden_size, c.layer_norm_epsilon)
        self.mixer: nn.Module
        if self.kind == "mamba":
            self.mixer = Mamba2(c)
        elif self.kind == "attention":
            self.mixer = Attention(c)
        elif self.kind == "moe":
            self.mixer = MoE(c)
        else:
            self.mixer = MLP(c, c.intermediate_size)

    def forward(self, x_TD: Tensor, context: Context) -> tuple[Tensor, RouterStats | None]:
        normed_TD = self.norm(x_TD)
        if self.kind == "moe":
            y_TD, stats = self.mixer(normed_TD, context)
            return x_TD + y_TD, stats
        if self.kind == "mlp":
            return x_TD + self.mixer(normed_TD), None
        return x_TD + self.mixer(normed_TD, context, self.index), None


class Backbone(nn.Module):
    def __init__(self, c: ModelConfig) -> None:
        super().__init__()
        self.embeddings = nn.Embedding(
            c.vocab_size, c.hidden_size, _weight=torch.empty(c.vocab_size, c.hidden_size)
        )
        self.layers = nn.ModuleList(Layer(c, index) for index in range(c.num_hidden_layers))
        self.norm_f = RMSNorm(c.hidden_size, c.layer_norm_epsilon)


class Hebatron(nn.Module):
    """A language model of the Nemotron-3 family.

    Args:
        config: the architecture.
        compute_dtype: dtype of activations; parameters are cast to it at use and may stay fp32 masters. None: the
            parameters' own dtype.
        seed: of the initial weights; the same seed gives the same weights.
        device: where to build; on "meta" nothing is allocated or initialised.

    Attributes:
        activation_checkpointing: recompute each layer in the backward pass instead of keeping its activations.
    """

    def __init__(
        self,
        config: ModelConfig,
        compute_dtype: torch.dtype | None = None,
        seed: int = 0,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.compute_dtype = compute_dtype
        self.activation_checkpointing = False
        self.frozen = False  # by freeze_for_inference
        # of a frozen model: (ids_T, step) to what the head sees and the logits, or to None where it cannot
        self.whole_token: Callable[[Tensor, CacheStep], tuple[Tensor, Tensor] | None] | None = None
        self.draws_random_numbers = False  # in a training forward, as an adapter's dropout does
        # of tensors that stay fp32 in memory and came narrower: a checkpoint saved as it came is the same bytes
        self.stored_dtypes: dict[str, torch.dtype] = {}
        with torch.device(device if device is not None else torch.get_default_device()):
            self.backbone = Backbone(config)
            self.lm_head = Linear(config.hidden_size, config.vocab_size)
        self.tie()
        if self.device.type != "meta":
            self.initialise(seed)

    @property
    def device(self) -> torch.device:
        return self.backbone.embeddings.weight.device

    @property
    def compute_dtype(self) -> torch.dtype:
        """As given, or that of the parameters; checked here too, because `.half()` changes those."""
        dtype = self._compute_dtype or self.backbone.embeddings.weight.dtype
        return check_dtype("Hebatron: compute_dtype", dtype)

    @compute_dtype.setter
    def compute_dtype(self, dtype: torch.dtype | None) -> None:
        self._compute_dtype = None if dtype is None else check_dtype("Hebatron: compute_dtype", dtype)

    def tie(self) -> None:
        """Make the head the embeddings' own parameter where the config says so (moving from meta unties them)."""
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.backbone.embeddings.weight

    @torch.no_grad()
    def initialise(self, seed: int) -> None:
        """Fresh weights: normal(initializer_range), with what Mamba-2 wants for its decays, steps and output."""
        c = self.config
        generator = torch.Generator(self.device).manual_seed(seed)
        for name, p in self.named_parameters():
            leaf = name.rsplit(".", 2)[-2:]
            if leaf[-1] == "A_log":
                p.copy_(torch.arange(1, p.shape[0] + 1, device=p.device, dtype=p.dtype).log())
            elif leaf[-1] == "D" or leaf[0] in ("norm", "norm_f"):
                p.fill_(1.0)
            elif leaf[-1] == "dt_bias":
                low, high = math.log(max(c.time_step_min, c.time_step_floor)), math.log(c.time_step_max)
                steps = torch.rand(p.shape, generator=generator, device=p.device, dtype=p.dtype)
                dt = (steps * (high - low) + low).exp().clamp(min=c.time_step_floor)
                p.copy_(dt + torch.log(-torch.expm1(-dt)))  # softplus of it is dt
            elif leaf[0] == "conv1d":
                bound = c.conv_kernel**-0.5  # a convolution's usual uniform start
                p.uniform_(-bound, bound, generator=generator)
            else:
                p.normal_(0.0, c.initializer_range, generator=generator)
                if leaf[0] == "out_proj" and c.rescale_prenorm_residual:
                    p.div_(math.sqrt(c.num_hidden_layers))
        for name, buffer in self.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.zero_()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        cache: Cache | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int | None = None,
        loss_reduction: str = "mean",
        embedding_noise: Tensor | None = None,
    ) -> Output:
        """Logits, or the loss of given targets.

        Args:
            input_ids: (B, L) token ids; with cu_seqlens (1, T) or (T,), documents packed one after another.
            attention_mask: (B, L) of 0 and 1 for these ids alone; the ones of a row must be one run (padding on
                either side). Padded positions have logits 0.
            cu_seqlens: int32 (Q + 1,), where each document begins, from 0 to T. No document sees another.
            cache: continue the sequences it holds; it is advanced in place, and no gradient is recorded. Rows may
                bring no tokens at all (a row of zeros in the mask).
            labels: like input_ids, the target at each position (already shifted); -100 is ignored. The loss is
                computed without building logits, and logits are only returned if logits_to_keep is given too.
            logits_to_keep: only the last n real tokens of each sequence: logits are (Q, n, V), right-aligned, zeros
                where a sequence is shorter.
            loss_reduction: "mean" over the targets that count, "sum", or "none": one loss for each real token, 0
                where the target is ignored.
            embedding_noise: (T, D), added to the embeddings of documents packed with cu_seqlens, in training.

        Raises:
            ValueError: naming the argument, what was expected and what came; the cache is then as it was.
        """
        tokens = (input_ids, attention_mask, cu_seqlens)
        packed = enter(self.config, self.device, *tokens, cache, labels, logits_to_keep, loss_reduction)
        self._check_noise(embedding_noise, packed, cu_seqlens is not None, cache is not None)
        if cache is None:
            return self._forward(packed, None, None, logits_to_keep, loss_reduction, embedding_noise)
        with torch.no_grad():
            step = cache.begin(packed.lengths, self.compute_dtype)
            out = self._forward(packed, cache, step, logits_to_keep, loss_reduction)
            cache.commit(step)
        return out

    def _forward(
        self,
        packed: Packed,
        cache: Cache | None,
        step: CacheStep | None,
        logits_to_keep: int | None,
        loss_reduction: str,
        embedding_noise: Tensor | None = None,
    ) -> Output:
        last_only = packed.labels_T is None and (logits_to_keep is None or logits_to_keep == 1)
        if self.whole_token is not None and step is not None and last_only:
            token = self.whole_token(packed.ids_T, step)
            if token is not None:
                x_TD, logits_TV = token
                logits = logits_TV[:, None] if logits_to_keep else packed.restore(logits_TV)
                return Output(hidden_TD=x_TD, cache=cache, logits=logits)
        context = Context(packed.cu_seqlens, step, router_stats=step is None)
        x_TD, aux = self.hidden_states(packed.ids_T, context, embedding_noise)
        out = Output(hidden_TD=x_TD, cache=cache, aux=aux)
        if packed.labels_T is not None:
            weight_VD = self.lm_head.weight.to(x_TD.dtype)
            out.loss = linear_cross_entropy(x_TD, weight_VD, packed.labels_T, reduction=loss_reduction)
        if logits_to_keep is not None:
            out.logits = self._last_logits(x_TD, packed, logits_to_keep)
        elif packed.labels_T is None:
            out.logits = packed.restore(self._logits(x_TD))
        return out

    def hidden_states(
        self, ids_T: Tensor, context: Context, noise_TD: Tensor | None = None
    ) -> tuple[Tensor, list[RouterStats]]:
        """What the head sees of these tokens, and each router's statistics where the context asks for them."""
        recompute = self.activation_checkpointing and torch.is_grad_enabled()
        keep_rng = self.draws_random_numbers
        x_TD = F.embedding(ids_T, self.backbone.embeddings.weight)
        x_TD = (x_TD if noise_TD is None else x_TD + noise_TD.to(x_TD)).to(self.compute_dtype)
        aux = []
        for layer in self.backbone.layers:
            if recompute:
                x_TD, stats = checkpoint(
                    layer, x_TD, context, use_reentrant=False, preserve_rng_state=keep_rng
                )
            else:
                x_TD, stats = layer(x_TD, context)
            if stats is not None:
                aux.append(stats)
        return self.backbone.norm_f(x_TD), aux

    def next_logits(self, ids_B: Tensor, step: CacheStep) -> Tensor:
        """fp32 (B, V) behind one more token of each row: tensors in, launches, a tensor out; nothing is checked, and
        committing the step is the caller's."""
        with torch.no_grad():
            return self._logits(self.hidden_states(ids_B, Context(None, step, router_stats=False))[0])

    def _check_noise(self, noise: Tensor | None, packed: Packed, flat: bool, cached: bool) -> None:
        if noise is None:
            return
        told = f"training={self.training}, cu_seqlens={flat}, cache={cached}"
        right = self.training and flat and not cached
        must(right, "embedding_noise", "come in training, with cu_seqlens and without cache", told)
        shape, got = (len(packed.ids_T), self.config.hidden_size), tuple(noise.shape)
        must(got == shape, "embedding_noise", f"have shape {shape}", got)

    def _logits(self, x_TD: Tensor) -> Tensor:
        logits_TV = self.lm_head(x_TD)
        return logits_TV.to(torch.promote_types(logits_TV.dtype, torch.float32))

    def _last_logits(self, x_TD: Tensor, packed: Packed, n: int) -> Tensor:
        shape, long_enough = (len(packed.lengths), n), min(packed.lengths) >= n
        if long_enough and math.prod(shape) == len(x_TD):  # all of them, as in decoding
            return self._logits(x_TD).unflatten(0, shape)
        lengths_Q = torch.tensor(packed.lengths, device=x_TD.device)
        ends_Q1 = lengths_Q.cumsum(0)[:, None]
        rows_QN = ends_Q1 - n + torch.arange(n, device=x_TD.device)
        logits_QNV = self._logits(x_TD[rows_QN.clamp(min=0)].flatten(0, 1)).unflatten(0, shape)
        if long_enough:
            return logits_QNV
        return logits_QNV.masked_fill((rows_QN < ends_Q1 - lengths_Q[:, None])[..., None], 0.0)

    @torch.no_grad()
    def update_router_bias(self, counts_per_layer: Sequence[Tensor], rate: float) -> None:
        """bias += rate * sign(mean - count): experts with too few tokens become easier to choose.

        Args:
            counts_per_layer: (E,) for each expert layer in order, summed over everything one optimizer step saw.
            rate: the step; 1e-3 is customary.
        """
        routers = [module for module in self.modules() if isinstance(module, Router)]
        if len(counts_per_layer) != len(routers):
            raise ValueError(
                f"update_router_bias: counts_per_layer must have {len(routers)} entries, got {len(counts_per_layer)}"
            )
        for router, counts_E in zip(routers, counts_per_layer):
            bias = router.e_score_correction_bias
            if counts_E.shape != bias.shape:
                raise ValueError(
                    f"update_router_bias: counts must have shape {tuple(bias.shape)}, got {tuple(counts_E.shape)}"
                )
            counts = counts_E.to(bias)
            bias.add_(torch.sign(counts.mean() - counts), alpha=rate)

    def new_cache(self, batch_size: int, capacity: int = 0) -> Cache:
        """An empty cache for `batch_size` sequences; it grows as needed, `capacity` tokens a row are kept ready. On a
        GPU it holds the states of as many rows as the next power of two, for a `Decoder`."""
        return Cache(self.config, batch_size, capacity, self.compute_dtype, self.device)

    def train(self, mode: bool = True) -> Self:
        if mode and self.frozen:
            raise ValueError("train: model must not be frozen for inference, got a frozen one")
        return super().train(mode)

    def freeze_for_inference(self) -> Hebatron:
        """See `hebatron.frozen.freeze_for_inference`."""
        from .frozen import freeze_for_inference

        return freeze_for_inference(self)

    def generate(self, input_ids: Tensor, attention_mask: Tensor | None = None, **options: Any) -> Tensor:
        """See `hebatron.generate.generate`."""
        return generate(self, input_ids, attention_mask, **options)

    @staticmethod
    def from_pretrained(
        folder: str | Path, dtype: torch.dtype | None = None, device: torch.device | str | None = None
    ) -> Hebatron:
        """See `hebatron.hub.from_pretrained`."""
        from .hub import from_pretrained

        return from_pretrained(folder, dtype, device)

    def save_pretrained(self, folder: str | Path, dtype: torch.dtype | None = None) -> None:
        """See `hebatron.hub.save_pretrained`."""
        from .hub import save_pretrained

        save_pretrained(self, folder, dtype)
