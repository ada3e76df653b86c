"""KL(base || model) on anchor rows: the model is held to what its frozen base says of the base's own languages.

For every token of a step's anchor rows, with p = softmax(base's logits / temperature) and q the model's,
KL = sum_v p_v (log p_v - log q_v) nats. What is added to the step's loss is

    coefficient * temperature^2 * (sum of KL over the step's anchor tokens) / (number of them)

so k microbatches give the gradient of one, and a step without anchor rows has no term. temperature^2 keeps the
gradient's size as the temperature rises (Hinton et al. 2015, arXiv 1503.02531, section 2.1). Cross-entropy on
replayed text asks for that text; this asks for the base's whole distribution, so it works on few tokens (learning
without forgetting: Li and Hoiem 2016, arXiv 1606.09282). It costs a forward of the base over the anchor rows.

The base is a second model in memory, in the dtype it is stored in; nothing of a step reaches it. Its hash, of
configuration and weights, is in every checkpoint: a run resumed over another base is refused.

T tokens, D width, V vocabulary, C tokens of a chunk.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..model import Context, Hebatron
from .checkpoint import model_tensors

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ..curriculum.plan import Batch
    from .sections import AnchorKLConfig, RunConfig

# Logits of one chunk, of each of the two models: 2^20 fp32 are 4 MB. Below 256 rows the products starve.
CHUNK_LOGITS, CHUNK_MIN_TOKENS = 2**20, 256


# ---------------------------------------------------------------- the divergence


def kl_divergence(
    x_TD: Tensor, weight_VD: Tensor, base_x_TD: Tensor, base_weight_VD: Tensor, temperature: float = 1.0
) -> Tensor:
    """sum_t KL(softmax(base_x_t base_weight^T / temperature) || softmax(x_t weight^T / temperature)), in nats.

    Args:
        x_TD, weight_VD: the model's final hidden states and head, of one floating dtype.
        base_x_TD, base_weight_VD: the base's; its width may be another, its vocabulary not.
        temperature: > 0.
    Returns: a scalar, fp32 (fp64 for fp64 inputs); 0 for no token.
    Raises: ValueError for shapes or dtypes that do not fit.
    Gradients: to x and weight, first order, made in the forward; the base is a constant. Chunks of tokens: (T, V)
        logits never exist; the weight's gradient is one V x D tensor in fp32.
    """
    for name, x, weight in (("x_TD", x_TD, weight_VD), ("base_x_TD", base_x_TD, base_weight_VD)):
        if x.ndim != 2 or weight.ndim != 2 or x.shape[1] != weight.shape[1] or x.dtype != weight.dtype:
            raise ValueError(
                f"kl_divergence: {name} must be (T, D) beside a head (V, D) of its dtype, "
                f"got {tuple(x.shape)} {x.dtype} and {tuple(weight.shape)} {weight.dtype}"
            )
    if base_x_TD.shape[0] != x_TD.shape[0] or base_weight_VD.shape[0] != weight_VD.shape[0]:
        raise ValueError(
            f"kl_divergence: base must have the model's {x_TD.shape[0]} tokens and {weight_VD.shape[0]} entries, "
            f"got {base_x_TD.shape[0]} and {base_weight_VD.shape[0]}"
        )
    if not temperature > 0:
        raise ValueError(f"kl_divergence: temperature must be > 0, got {temperature}")
    grad = torch.is_grad_enabled()
    wanted = (grad and x_TD.requires_grad, grad and weight_VD.requires_grad)
    loss: Tensor = _SummedKL.apply(
        x_TD, weight_VD, base_x_TD.detach(), base_weight_VD.detach(), temperature, *wanted
    )
    return loss


class _SummedKL(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_TD: Tensor,
        weight_VD: Tensor,
        base_x_TD: Tensor,
        base_weight_VD: Tensor,
        temperature: float,
        grad_x: bool,
        grad_weight: bool,
    ) -> Tensor:
        compute = torch.promote_types(x_TD.dtype, torch.float32)
        wide_VD, base_wide_VD = _widened(weight_VD, compute), _widened(base_weight_VD, compute)
        kl = torch.zeros((), dtype=compute, device=x_TD.device)
        grad_x_TD = torch.zeros_like(x_TD) if grad_x else None
        grad_weight_VD = torch.zeros_like(weight_VD, dtype=compute) if grad_weight else None
        rows = max(CHUNK_MIN_TOKENS, CHUNK_LOGITS // weight_VD.shape[0])
        for begin in range(0, x_TD.shape[0], rows):
            x_CD = x_TD[begin : begin + rows]
            log_q_CV = torch.log_softmax(_logits(x_CD, wide_VD, compute) / temperature, 1)
            base_CV = _logits(base_x_TD[begin : begin + rows], base_wide_VD, compute) / temperature
            log_p_CV = torch.log_softmax(base_CV, 1)
            p_CV = log_p_CV.exp()
            kl += (p_CV * (log_p_CV - log_q_CV)).sum()
            if not (grad_x or grad_weight):
                continue
            grad_CV = log_q_CV.exp_().sub_(p_CV).div_(temperature).to(x_TD.dtype)
            if grad_x_TD is not None:
                grad_x_TD[begin : begin + rows] = grad_CV @ weight_VD
            if grad_weight_VD is not None:
                grad_weight_VD += grad_CV.T @ x_CD
        ctx.save_for_backward(grad_x_TD, grad_weight_VD)
        ctx.dtype = weight_VD.dtype
        return kl

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        grad_x_TD, grad_weight_VD = ctx.saved_tensors
        return (
            None if grad_x_TD is None else (grad_x_TD * upstream).to(grad_x_TD.dtype),
            None if grad_weight_VD is None else (grad_weight_VD * upstream).to(ctx.dtype),
            *(None,) * 5,
        )


def _widened(weight_VD: Tensor, compute: torch.dtype) -> Tensor:
    """On the CPU once for all chunks; a GPU multiplies half precision into fp32 results."""
    return weight_VD.to(compute) if weight_VD.device.type == "cpu" else weight_VD


def _logits(x_CD: Tensor, weight_VD: Tensor, compute: torch.dtype) -> Tensor:
    """fp32 logits: in bf16 a logit of 20 is off by up to 0.06, and small divergences are smaller than that."""
    if x_CD.dtype == compute or x_CD.device.type == "cpu":
        return x_CD.to(compute) @ weight_VD.to(compute).T
    return torch.mm(x_CD, weight_VD.T, out_dtype=compute)


# ---------------------------------------------------------------- the frozen base


@dataclass(frozen=True)
class Base:
    """model: in eval mode, without gradients. hash: sha256 of its configuration and weights."""

    model: Hebatron
    hash: str


def open_base(config: RunConfig, model: Hebatron) -> Base | None:
    """The frozen base of a run: anchor_kl.base, or the folder that the run starts from; None without the term."""
    if config.anchor_kl.coefficient == 0:
        return None
    folder = config.anchor_kl.base or config.model.path
    if folder is None:
        raise ValueError(
            "train: anchor_kl.base must be given for a run from fresh weights (no model.path), got none"
        )
    base = Hebatron.from_pretrained(folder, device=model.device)  # as stored: no bit is lost, none is added
    base.compute_dtype = model.compute_dtype
    if base.config.vocab_size != model.config.vocab_size:
        raise ValueError(
            f"train: anchor_kl.base must have the model's vocabulary of {model.config.vocab_size}, "
            f"got {base.config.vocab_size} in {folder}"
        )
    longest = max(phase.seq_len for phase in config.phases if phase.anchor_share > 0)
    if longest > base.config.max_position_embeddings:
        raise ValueError(
            f"train: anchor_kl.base must take the anchor's rows of {longest} tokens, "
            f"got max_position_embeddings {base.config.max_position_embeddings} in {folder}"
        )
    return Base(base.eval().requires_grad_(False), weights_hash(base))


def weights_hash(model: Hebatron) -> str:
    """sha256 of the configuration and of every weight and buffer, by name."""
    digest = hashlib.sha256(json.dumps(model.config.to_hub(), sort_keys=True).encode())
    for name, tensor in sorted(model_tensors(model).items()):
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


class AnchorTerm:
    """The term of one step, over its microbatches. Without a base it asks for nothing and says nothing."""

    def __init__(self, base: Base | None, settings: AnchorKLConfig, batches: Sequence[Batch]) -> None:
        self.base, self.settings = base, settings
        self.tokens = sum(int(_anchor_tokens(batch).sum()) for batch in batches) if base else 0
        self.nats = 0.0

    def loss(self, model: Hebatron, batch: Batch, hidden_TD: Tensor) -> Tensor | float:
        """What this microbatch adds to the step's loss; hidden_TD: the model's, of the whole microbatch."""
        anchor_T = _anchor_tokens(batch)
        if self.base is None or not anchor_T.any():
            return 0.0
        kl = self.divergence(model, batch, hidden_TD)
        self.nats += float(kl.detach())
        return kl * (self.settings.coefficient * self.settings.temperature**2 / self.tokens)

    def divergence(self, model: Hebatron, batch: Batch, hidden_TD: Tensor) -> Tensor:
        """KL(base || model) summed over the anchor tokens of a microbatch."""
        assert self.base is not None  # for mypy: `loss` has asked
        base, anchor_T = self.base.model, _anchor_tokens(batch)
        lengths_Q = batch.cu_seqlens.diff()[anchor_T[batch.cu_seqlens[:-1].long()]]
        cu_seqlens = torch.cat([lengths_Q.new_zeros(1), lengths_Q.cumsum(0)]).to(torch.int32)
        with torch.no_grad():  # the documents are isolated, so the base needs to read these rows alone
            context = Context(cu_seqlens.to(base.device), router_stats=False)
            base_TD, _ = base.hidden_states(batch.input_ids[anchor_T].to(base.device), context)
        x_TD = hidden_TD[anchor_T.to(hidden_TD.device)]
        heads = [m.lm_head.weight.to(x_TD.dtype) for m in (model, base)]
        return kl_divergence(x_TD, heads[0], base_TD, heads[1], self.settings.temperature)

    def record(self, skipped: bool) -> dict[str, float | None]:
        """For the step's record: anchor_kl, nats a token of the anchor's rows; null where a step has none."""
        if self.base is None:
            return {}
        return {"anchor_kl": self.nats / self.tokens if self.tokens and not skipped else None}


def _anchor_tokens(batch: Batch) -> Tensor:
    """(T,) bool: the tokens of anchor rows."""
    return batch.is_anchor.repeat_interleave(batch.row_starts.diff())
