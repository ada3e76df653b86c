"""The rows of the expert layer: out of the tokens in the order of their experts, and added up again."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _check as check
from .._dispatch import Operator
from . import checks, native_rows, reference, torch_ops

_MODULES = {"torch": torch_ops, "reference": reference, "native": native_rows, "emulator": native_rows}


def _fake_permute(x: Tensor, ids: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    rows = ids.shape[0] * ids.shape[1]
    order = ids.new_empty(rows, dtype=torch.int64)
    return x.new_empty(rows, x.shape[1]), order, ids.new_empty(num_experts, dtype=torch.int32)


_moe_permute = Operator(
    "moe_permute",
    "Tensor x, Tensor ids, int num_experts",
    "(Tensor, Tensor, Tensor)",
    _MODULES,
    _fake_permute,
    fake_keep=lambda x, ids, num_experts: (ids.new_empty(ids.shape, dtype=torch.int32),),
)
_moe_combine = Operator(
    "moe_combine",
    "Tensor rows, Tensor order, Tensor weights, int num_tokens",
    "Tensor",
    _MODULES,
    lambda rows, order, weights, num_tokens: rows.new_empty(num_tokens, rows.shape[1]),
)
_moe_combine_norm = Operator(
    "moe_combine_norm",
    "Tensor rows, Tensor order, Tensor weights, Tensor norm, float eps, Tensor? shared, Tensor? residual",
    "(Tensor, Tensor)",
    _MODULES,
    lambda rows, order, weights, *_: tuple(rows.new_empty(len(weights), rows.shape[1]) for _ in range(2)),
    fake_keep=lambda *_: (),
    keep_results=True,
)


def moe_permute(
    x_TD: Tensor, ids_TK: Tensor, num_experts: int, *, backend: str | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """rows[n] = x[order[n] // K]: one row per chosen expert, sorted by expert, then by token.

    Args:
        x_TD: (T tokens, D width), any floating dtype.
        ids_TK: (T, K) int64 or int32, experts in 0..E-1 (checked on the CPU only).
        num_experts: E.
        backend: "native", "torch", "reference" or "emulator"; None chooses.

    Returns:
        rows_ND: (N = T*K, D), dtype of x.
        order_N: (N,) int64; row n belongs to slot order[n] = t*K + k.
        offsets_E: (E,) int32, the cumulative ends: expert e owns rows offsets[e-1] (0 for e = 0) to offsets[e].

    Raises:
        ValueError: an argument has the wrong shape, dtype, device or range.
        BackendError: the named backend cannot serve these arguments.

    Gradients:
        To x, summed over its K rows in fp32 and rounded once.

    Backends:
        native: CUDA, fp32 and bf16, at most 512 experts, rows of at most 8,192 columns; an id outside the experts sorts
        past the last end. emulator: the same kernels on CPU tensors, for tests. torch: every dtype and device, no host
        synchronisation, deterministic.

    Source:
        MegaBlocks, arXiv 2211.15841, section 4.
    """
    op = "moe_permute"
    check.tensor(op, "x_TD", x_TD, None, None)
    check.positive(op, num_experts=num_experts)
    check.integer(op, num_experts=num_experts)
    checks.ids(op, ids_TK, x_TD.shape[0], num_experts)
    check.same_device(op, x_TD, ids_TK=ids_TK)
    return _moe_permute(x_TD, ids_TK, num_experts, backend=backend)


def _check_rows(op: str, rows_ND: Tensor, order_N: Tensor, weights_TK: Tensor, num_tokens: int) -> None:
    check.tensor(op, "weights_TK", weights_TK, num_tokens, None)
    if weights_TK.shape[1] == 0:
        check.refuse(op, "weights_TK", "have at least one expert per token", check.describe(weights_TK))
    slots = weights_TK.numel()
    check.tensor(op, "rows_ND", rows_ND, slots, None)
    check.tensor(op, "order_N", order_N, slots, dtypes=(torch.int64,))
    check.same_device(op, rows_ND, order_N=order_N, weights_TK=weights_TK)
    if checks.host_readable(order_N) and not torch.equal(order_N.sort().values, torch.arange(slots)):
        check.refuse(op, "order_N", f"be a permutation of the {slots} slots", order_N.tolist()[:12])


def moe_combine(
    rows_ND: Tensor, order_N: Tensor, weights_TK: Tensor, num_tokens: int, *, backend: str | None = None
) -> Tensor:
    """y[t] = sum over k of weights[t, k] * rows[n], where order[n] = t*K + k.

    Args:
        rows_ND: (N = T*K, D width), any floating dtype.
        order_N: (N,) int64, a permutation of the slots, as moe_permute gives it (checked on the CPU only).
        weights_TK: (T, K), any floating dtype; rounded to the dtype of the rows.
        num_tokens: T.
        backend: "native", "torch", "reference" or "emulator"; None chooses.

    Returns:
        y_TD: (T, D) in the dtype of the rows, summed in fp32 (fp64 for fp64) and rounded once.

    Raises:
        ValueError: an argument has the wrong shape, dtype or device.
        BackendError: the named backend cannot serve these arguments.

    Gradients:
        To rows and weights.

    Backends:
        native: CUDA, fp32 and bf16, rows of at most 8,192 columns, added in the order of k. emulator: the same kernels
        on CPU tensors, for tests. torch: every dtype and device, no host synchronisation, deterministic.

    Source:
        DeepSeek-V3, arXiv 2412.19437, eq. 12.
    """
    op = "moe_combine"
    check.integer(op, num_tokens=num_tokens)
    if num_tokens < 0:
        check.refuse(op, "num_tokens", "be >= 0", num_tokens)
    _check_rows(op, rows_ND, order_N, weights_TK, num_tokens)
    return _moe_combine(rows_ND, order_N, weights_TK, num_tokens, backend=backend)


def moe_combine_norm(
    rows_ND: Tensor,
    order_N: Tensor,
    weights_TK: Tensor,
    norm_D: Tensor,
    eps: float = 1e-5,
    shared_TD: Tensor | None = None,
    residual_TD: Tensor | None = None,
    *,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """y = rms_norm(s) * norm with s[t] = sum over k of weights[t, k] * rows[n] + shared[t] + residual[t].

    The end of an expert layer and the norm that begins the next, in one pass over the rows; order[n] = t*K + k.

    Args:
        rows_ND: (N = T*K, D width), any floating dtype.
        order_N: (N,) int64, a permutation of the slots, as moe_permute gives it (checked on the CPU only).
        weights_TK: (T, K), any floating dtype; rounded to the dtype of the rows.
        norm_D: (D,), the norm's weight, any floating dtype.
        eps: added to the mean square; > 0.
        shared_TD: (T, D), dtype of the rows: the shared expert's output; None adds nothing.
        residual_TD: (T, D), dtype of the rows: the layer's input; None adds nothing.
        backend: "native", "torch", "reference" or "emulator"; None chooses.

    Returns:
        y_TD: (T, D) in the dtype of the rows, of the rounded sum, as rms_norm gives it.
        sum_TD: (T, D).

    Raises:
        ValueError: an argument has the wrong shape, dtype, device or range.
        BackendError: the named backend cannot serve these arguments.

    Gradients:
        To rows, weights, norm, shared and residual. The backward keeps the sum.

    Backends:
        native: CUDA, fp32 and bf16, rows of at most 8,192 columns; all of s is summed in fp32 and rounded once.
        emulator: the same kernels on CPU tensors, for tests. torch: every dtype and device; rounds after each addition.

    Source:
        DeepSeek-V3, arXiv 2412.19437, eq. 12 (shared expert and residual); RMSNorm, arXiv 1910.07467, eq. 4.
    """
    op = "moe_combine_norm"
    check.tensor(op, "weights_TK", weights_TK, None, None)
    tokens = weights_TK.shape[0]
    _check_rows(op, rows_ND, order_N, weights_TK, tokens)
    width = rows_ND.shape[1]
    check.tensor(op, "norm_D", norm_D, width)
    check.positive(op, eps=eps)
    added = {"shared_TD": shared_TD, "residual_TD": residual_TD}
    for name, value in added.items():
        if value is not None:
            check.tensor(op, name, value, tokens, width, dtypes=(rows_ND.dtype,))
    check.same_device(op, rows_ND, order_N=order_N, weights_TK=weights_TK, norm_D=norm_D, **added)
    y_TD, sum_TD = _moe_combine_norm(
        rows_ND, order_N, weights_TK, norm_D, eps, shared_TD, residual_TD, backend=backend
    )
    return y_TD, sum_TD
