"""The expert layer: choose experts, sort tokens by expert, multiply by each expert's weights, add up again."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .. import _check as check
from .._dispatch import Operator
from . import checks, native, native_gemm, reference, torch_ops, triton_ops
from .packed import moe_mlp_packed
from .rows import moe_combine, moe_combine_norm, moe_permute

__all__ = [
    "grouped_gemm",
    "moe_combine",
    "moe_combine_norm",
    "moe_mlp",
    "moe_mlp_packed",
    "moe_permute",
    "moe_route",
]


def _operator(
    name: str,
    arguments: str,
    returns: str,
    fake: Callable[..., Any],
    fake_keep: Callable[..., Any] | None = None,
    fake_gradients: Callable[..., Any] | None = None,
    **others: ModuleType,
) -> Operator:
    modules = {"torch": torch_ops, "reference": reference, **others}
    return Operator(
        name, arguments, returns, modules, fake, fake_keep=fake_keep, fake_gradients=fake_gradients
    )


def _fake_route(logits: Tensor, bias: Tensor, top_k: int, *_: object) -> tuple[Tensor, Tensor, Tensor]:
    tokens, experts = logits.shape
    weights = logits.new_empty(tokens, top_k, dtype=torch.promote_types(logits.dtype, torch.float32))
    return (
        weights,
        weights.new_empty(tokens, top_k, dtype=torch.int64),
        weights.new_empty(experts, dtype=torch.int64),
    )


_moe_route = _operator(
    "moe_route",
    "Tensor logits, Tensor bias, int top_k, int n_group, int topk_group, bool normalize, float scale",
    "(Tensor, Tensor, Tensor)",
    _fake_route,
    native=native,
    emulator=native,
)
_grouped_gemm = _operator(
    "grouped_gemm",
    "Tensor a, Tensor b, Tensor offsets, Tensor? rows, Tensor? scale, str? activation, str? implementation",
    "Tensor",
    lambda a, b, offsets, rows, *_: a.new_empty((a if rows is None else rows).shape[0], b.shape[2]),
    fake_keep=lambda *_: (),
    fake_gradients=native_gemm.fake_gradients,
    native=native_gemm,
    triton=triton_ops,
    emulator=native_gemm,
)
_moe_mlp = _operator(
    "moe_mlp",
    "Tensor x, Tensor ids, Tensor weights, Tensor up, Tensor down",
    "Tensor",
    lambda x, ids, weights, up, down: x.new_empty(x.shape),
    fake_keep=lambda x, ids, weights, up, down: (x.new_empty(ids.shape[0] * ids.shape[1], up.shape[1]),),
    native=native,
    triton=triton_ops,
    emulator=native,
)


def moe_route(
    logits_TE: Tensor,
    bias_E: Tensor,
    top_k: int,
    n_group: int = 1,
    topk_group: int = 1,
    normalize: bool = True,
    scale: float = 1.0,
    *,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """s = sigmoid(logits); ids = top_k of s + bias; weights = scale * s[ids] / (sum s[ids] + 1e-20).

    Args:
        logits_TE: (T tokens, E experts), any floating dtype. Computed in fp32, fp64 stays fp64.
        bias_E: (E,), any floating dtype; added for the choice only, -inf puts an expert last.
        top_k: K experts per token, 1 to the number of experts in the groups kept.
        n_group: the experts fall into this many equal groups of at least 2; 1 is no grouping.
        topk_group: groups kept per token, those with the largest sum of their two best s + bias.
        normalize: divide by the sum of the chosen scores.
        scale: factor on the weights (routed_scaling_factor), > 0 and finite.
        backend: "native", "torch", "reference" or "emulator"; None chooses.

    Returns:
        weights_TK: (T, K) fp32 (fp64 for fp64 logits).
        ids_TK: (T, K) int64, best first. Equals go to the lowest index; NaN ranks above every number, so that the
            NaN reaches the token's weights (all of them with `normalize`) and no other token.
        counts_E: (E,) int64, tokens per expert; their sum is T*K.

    Raises:
        ValueError: an argument has the wrong shape, dtype, device or range.
        BackendError: the named backend cannot serve these arguments.

    Gradients:
        From weights to logits. The choice has none, so neither has the bias.

    Backends:
        native: fp32 and bf16 logits, in C++ on the CPU and in CUDA, which takes at most 512 experts and 32 choices.
        Both choose the same experts. emulator: the CUDA kernel on CPU tensors, for tests. torch: every dtype and
        device, no host synchronisation.

    Source:
        DeepSeek-V3, arXiv 2412.19437, eq. 12 to 16; the model's n_group, topk_group, norm_topk_prob,
        routed_scaling_factor.
    """
    op = "moe_route"
    check.tensor(op, "logits_TE", logits_TE, None, None)
    experts = logits_TE.shape[1]
    check.tensor(op, "bias_E", bias_E, experts)
    check.same_device(op, logits_TE, bias_E=bias_E)
    check.integer(op, top_k=top_k, n_group=n_group, topk_group=topk_group)
    check.truth(op, normalize=normalize)
    check.positive(op, scale=scale)
    if n_group < 1 or experts % n_group or (n_group > 1 and experts < 2 * n_group):
        check.refuse(op, "n_group", f"divide {experts} experts into groups of at least 2", n_group)
    if not 1 <= topk_group <= n_group:
        check.refuse(op, "topk_group", f"be between 1 and n_group = {n_group}", topk_group)
    kept = experts // n_group * topk_group
    if not 1 <= top_k <= kept:
        check.refuse(op, "top_k", f"be between 1 and the {kept} experts of the groups kept", top_k)
    bias_E = bias_E.detach()  # decides the choice, which has no gradient
    return _moe_route(logits_TE, bias_E, top_k, n_group, topk_group, normalize, scale, backend=backend)


def grouped_gemm(
    a_ND: Tensor,
    b_EKN: Tensor,
    offsets_E: Tensor,
    rows_N: Tensor | None = None,
    scale_N: Tensor | None = None,
    activation: str | None = None,
    *,
    implementation: str | None = None,
    backend: str | None = None,
) -> Tensor:
    """out[n] = act(a[rows[n]] @ b[e]) * scale[n] for the rows n of expert e, offsets[e-1] <= n < offsets[e].

    Args:
        a_ND: (N rows, D), any floating dtype; without rows_N sorted by expert, with it in any order and number.
        b_EKN: (E experts, D, M outputs), dtype of a: contiguous, or the transposed view of weights stored (E, M, D).
        offsets_E: (E,) int32 on the same device: cumulative ends, rising from 0 to at most N (checked on the CPU
            only), as moe_permute gives them.
        rows_N: (N,) int32, the row of a that each row of the result takes, all within a (checked on the CPU only);
            None is row n itself.
        scale_N: (N,), any floating dtype, applied in fp32 (fp64 for fp64); None is 1.
        activation: "relu2", which is max(0, .)^2, or None.
        implementation: "sm80", "sm90a" or "cutlass", one of the CUDA kernels by name, each optionally with its tile
            as in "sm90a:128x208"; None chooses.
        backend: "native", "triton", "torch", "reference" or "emulator"; None chooses.

    Returns:
        (N, M) in the dtype of a; 0 in the rows past the last end, for which neither a nor scale is used.

    Raises:
        ValueError: an argument has the wrong shape, dtype, device or range.
        BackendError: the named backend or implementation cannot serve these arguments.

    Gradients:
        To a (0 past the last end; with rows_N summed over the uses of a row in fp32 and rounded once), b (exactly 0
        for an expert without rows) and scale.

    Backends:
        native: products summed in fp32 and rounded once, after the scale; the gradients are products of the same kind,
        through an activation or scale after computing the product again. On the CPU fp32 and bf16, a row's result
        does not depend on the others, to the bit, nor anything on the number of threads; on CUDA bf16, widths and
        strides in multiples of 16 bytes. emulator: the same kernels on CPU tensors, for tests. triton: GPUs from
        compute capability 8.0 on, fp32 and bf16, any widths and strides, gradients likewise. torch: grouped_mm for
        bf16, fp16 and fp32 where widths and strides are multiples of 16 bytes; elsewhere a loop over the experts,
        which on a GPU synchronises; the product is rounded before activation and scale.

    Source:
        torch.nn.functional.grouped_mm (the convention of the offsets); MegaBlocks, arXiv 2211.15841, section 5 (the
        gather); the model's experts (relu2, the routing weight).
    """
    op = "grouped_gemm"
    check.tensor(op, "a_ND", a_ND, None, None)
    rows, width = a_ND.shape
    check.tensor(op, "b_EKN", b_EKN, None, width, None, dtypes=(a_ND.dtype,))
    checks.widths(op, "b_EKN", b_EKN)
    check.tensor(op, "offsets_E", offsets_E, b_EKN.shape[0], dtypes=(torch.int32,))
    if b_EKN.shape[0] == 0:
        check.refuse(op, "b_EKN", "have at least one expert", check.describe(b_EKN))
    if rows_N is not None:
        check.tensor(op, "rows_N", rows_N, None, dtypes=(torch.int32,))
        checks.in_range(op, "rows_N", rows_N, rows)
        rows = rows_N.shape[0]
    if scale_N is not None:
        check.tensor(op, "scale_N", scale_N, rows)
    if activation not in (None, "relu2"):
        check.refuse(op, "activation", "be None or 'relu2'", repr(activation))
    native.parse_implementation(implementation)
    check.same_device(op, a_ND, b_EKN=b_EKN, offsets_E=offsets_E, rows_N=rows_N, scale_N=scale_N)
    if checks.host_readable(offsets_E):
        ends = [0, *offsets_E.tolist(), rows]
        if ends != sorted(ends):
            check.refuse(op, "offsets_E", f"rise from 0 to at most {rows} (the number of rows)", ends[1:-1])
    return _grouped_gemm(a_ND, b_EKN, offsets_E, rows_N, scale_N, activation, implementation, backend=backend)


def moe_mlp(
    x_TD: Tensor,
    ids_TK: Tensor,
    weights_TK: Tensor,
    up_EFD: Tensor,
    down_EDF: Tensor,
    *,
    backend: str | None = None,
) -> Tensor:
    """y[t] = sum over k of weights[t, k] * down[e] @ relu(up[e] @ x[t])^2, with e = ids[t, k].

    Args:
        x_TD: (T tokens, D width), fp64, fp32 or bf16 (the square overflows fp16 past 255).
        ids_TK: (T, K) int64 or int32, experts in 0..E-1 (checked on the CPU only).
        weights_TK: (T, K), any floating dtype.
        up_EFD: (E experts, F expert width, D), dtype of x; or fp32 under bf16 x, rounded to bf16 at its use.
        down_EDF: (E, D, F), dtype of up.
        backend: "native", "triton", "torch", "reference" or "emulator"; None chooses.

    Returns:
        y_TD: (T, D) in the dtype of x. An expert that no token chose is not read.

    Raises:
        ValueError: an argument has the wrong shape, dtype, device or range.
        BackendError: the named backend cannot serve these arguments.

    Gradients:
        To x, weights, up and down; exactly 0 for the tensors of an expert that no token chose. The backward keeps x,
        the weights and the pre-activation (T*K, F), on CUDA the weighted activation, and makes the rest again.

    Backends:
        native: C++ on the CPU, fp32 and bf16, summed in fp32; a token's result does not depend on the others, to the
        bit, and none on the number of threads; the gradients of fp32 weights under bf16 are not rounded to bf16. CUDA:
        bf16, widths in multiples of 8 up to 8,192 and rows on 16 bytes, at most 512 experts; fp32 weights are rounded
        into a copy in the forward and again in the backward (6 bytes moved a weight each time); the gradient of a
        weight in weights_TK that is 0 is 0. emulator: the same kernels on CPU tensors, for tests. triton: the products
        of grouped_gemm's, fp32 and bf16, any widths; the backward makes up's product again; the gradients of fp32
        weights under bf16 are not rounded. torch: the products as in grouped_gemm, deterministic.

    Source:
        The model's experts: not gated, relu2 (So et al. 2021, arXiv 2109.08668), no biases.
    """
    op = "moe_mlp"
    floats = (torch.float64, torch.float32, torch.bfloat16)
    check.tensor(op, "x_TD", x_TD, None, None, dtypes=floats)
    tokens, width = x_TD.shape
    stored = (torch.bfloat16, torch.float32) if x_TD.dtype == torch.bfloat16 else (x_TD.dtype,)
    check.tensor(op, "up_EFD", up_EFD, None, None, width, dtypes=stored)
    experts, expert_width, _ = up_EFD.shape
    checks.widths(op, "up_EFD", up_EFD)
    check.tensor(op, "down_EDF", down_EDF, experts, width, expert_width, dtypes=(up_EFD.dtype,))
    if experts == 0:
        check.refuse(op, "up_EFD", "have at least one expert", check.describe(up_EFD))
    checks.ids(op, ids_TK, tokens, experts)
    check.tensor(op, "weights_TK", weights_TK, *ids_TK.shape)
    check.same_device(op, x_TD, ids_TK=ids_TK, weights_TK=weights_TK, up_EFD=up_EFD, down_EDF=down_EDF)
    return _moe_mlp(x_TD, ids_TK, weights_TK, up_EFD, down_EDF, backend=backend)
