"""The loss of the language model, straight from the hidden states: the logits are never held together."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import _check as check
from .._dispatch import Operator
from . import native, reference, torch_ops

__all__ = ["linear_cross_entropy"]

REDUCTIONS = ("mean", "sum", "none")


def _fake(x: Tensor, weight: Tensor, targets: Tensor, ignore_index: int, reduction: str) -> Tensor:
    shape = targets.shape if reduction == "none" else ()
    return x.new_empty(shape, dtype=torch.promote_types(x.dtype, torch.float32))


def _fake_keep(x: Tensor, weight: Tensor, targets: Tensor, *_: Any) -> tuple[Tensor, ...]:
    shapes = (targets.shape, native.kept_logits(x, weight))
    return tuple(x.new_empty(shape, dtype=torch.float32) for shape in shapes)


_linear_cross_entropy = Operator(
    "linear_cross_entropy",
    "Tensor x, Tensor weight, Tensor targets, int ignore_index, str reduction",
    "Tensor",
    {"native": native, "emulator": native, "torch": torch_ops, "reference": reference},
    _fake,
    fake_keep=_fake_keep,
)


def linear_cross_entropy(
    x_TD: Tensor,
    weight_VD: Tensor,
    targets_T: Tensor,
    ignore_index: int = -100,
    reduction: str = "mean",
    *,
    backend: str | None = None,
) -> Tensor:
    """loss_t = logsumexp(z_t) - z_t[target_t], with z = x weight^T, over the tokens whose target is not ignored.

    Args:
        x_TD: (T tokens, D width), any floating dtype, any strides.
        weight_VD: (V vocabulary entries, D), the dtype of x: fp32 master weights are cast by the caller.
        targets_T: int64 (T,), each in [0, V) or ignore_index.
        ignore_index: the target of tokens that count neither in the loss nor in its mean.
        reduction: "mean" over the tokens that count, "sum", or "none" (0 where ignored).

    Returns:
        The loss, fp32 (fp64 for fp64 inputs): a scalar, or (T,) for "none".

    Raises:
        ValueError: an argument has the wrong shape, dtype, device or value; on the CPU also a target out of range
            and a mean over no token at all. Elsewhere and under torch.compile, where the targets may not be read,
            that mean is NaN and such a target is the caller's fault; "sum" of no token is 0 everywhere.
        BackendError: the named backend cannot serve these arguments.

    Gradients:
        To x and weight, for any upstream gradient; first order. Ignored tokens get exactly 0, whatever their
        rows hold.

    Backends:
        native: fp32 and bf16; logits, softmax and sums in fp32, the gradient of the logits rounded to the dtype. C++ on
        the CPU, 512 entries at a time; a token's loss does not depend on the others there. Up to 2^23 logits (34 MB)
        are kept for the backward; beyond, and on CUDA, they are made again and one number per token is kept. On CUDA
        torch's products around a kernel, 2^27 logits at a time; a target out of range makes its token's loss NaN.
        emulator: that kernel on CPU tensors, for tests.
        torch: chunks of tokens (256 at a vocabulary of 4,096 or more), every dtype and device. Logits and softmax are
        fp32 whatever the dtype; a half-precision gradient is rounded once per chunk and summed in fp32.
        reference: fp64, all logits.

    Source:
        Cross-entropy of a softmax over the output projection; the gradient made in the forward for mean and sum:
        Hsu et al. 2024, arXiv 2410.10989, section 3.
    """
    op = "linear_cross_entropy"
    check.tensor(op, "x_TD", x_TD, None, None)
    tokens, width = x_TD.shape
    check.tensor(op, "weight_VD", weight_VD, None, width, dtypes=(x_TD.dtype,))
    check.tensor(op, "targets_T", targets_T, tokens, dtypes=(torch.int64,))
    check.same_device(op, x_TD, weight_VD=weight_VD, targets_T=targets_T)
    check.integer(op, ignore_index=ignore_index)
    entries = weight_VD.shape[0]
    if entries == 0 or width == 0:
        check.refuse(op, "weight_VD", "have entries and a width > 0", check.describe(weight_VD))
    if reduction not in REDUCTIONS:
        check.refuse(op, "reduction", f"be one of {', '.join(REDUCTIONS)}", repr(reduction))
    if targets_T.device.type == "cpu" and not torch.compiler.is_compiling():
        _check_targets(op, targets_T, entries, ignore_index, reduction)
    return _linear_cross_entropy(x_TD, weight_VD, targets_T, ignore_index, reduction, backend=backend)


def _check_targets(op: str, targets_T: Tensor, entries: int, ignore_index: int, reduction: str) -> None:
    kept_T = targets_T != ignore_index
    wrong_T = kept_T & ((targets_T < 0) | (targets_T >= entries))
    if wrong_T.any():
        t = int(wrong_T.nonzero()[0, 0])
        condition = f"be in [0, {entries}) or ignore_index {ignore_index}"
        check.refuse(op, f"targets_T[{t}]", condition, int(targets_T[t]))
    if reduction == "mean" and not kept_T.any():
        condition = 'have a token that is not ignored when reduction is "mean" (use "sum")'
        check.refuse(op, "targets_T", condition, f"{len(targets_T)} ignored tokens")
