"""Root-mean-square normalisation: the residual form before a mixer and the gated, grouped form inside Mamba-2."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .. import _check as check
from .._dispatch import Operator
from . import native, reference, torch_ops

__all__ = ["rms_norm"]


def _fake(
    x_TD: Tensor, weight_D: Tensor, eps: float, residual_TD: Tensor | None, *_: Any
) -> tuple[Tensor, Tensor]:
    y_TD = x_TD.new_empty(x_TD.shape)
    return y_TD, x_TD.new_empty(x_TD.shape if residual_TD is not None else (0,))


_rms_norm = Operator(
    "rms_norm",
    "Tensor x, Tensor weight, float eps, Tensor? residual, Tensor? gate, int? group_size",
    "(Tensor, Tensor)",
    {"native": native, "emulator": native, "torch": torch_ops, "reference": reference},
    _fake,
)


def rms_norm(
    x_TD: Tensor,
    weight_D: Tensor,
    eps: float = 1e-5,
    residual_TD: Tensor | None = None,
    gate_TD: Tensor | None = None,
    group_size: int | None = None,
    *,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """y = u / sqrt(mean(u^2) + eps) * weight, with u = (x + residual) * silu(gate), the mean over each group.

    Args:
        x_TD: (T tokens, D width), any floating dtype; rows may be strided, so a slice of a wider projection fits.
        weight_D: (D,), any floating dtype.
        eps: added to the mean square; > 0.
        residual_TD: like x_TD, or None. Its sum with x is rounded to the dtype of x before it is normalised.
        gate_TD: like x_TD, or None. The gate is applied before the norm (Mamba-2's norm_before_gate=False).
        group_size: columns per group, a divisor of D; None is one group of D.
        backend: "native", "torch", "reference" or "emulator"; None chooses.

    Returns:
        y_TD in the dtype of x_TD; with a residual the pair (y_TD, x_TD + residual_TD).

    Raises:
        ValueError: an argument has the wrong shape, dtype or device.
        BackendError: the named backend cannot serve these arguments.

    Gradients:
        To x, weight, residual and gate, through both results. First order (torch form: any).

    Backends:
        native: forward and backward in fp32 and bf16, C++ on the CPU and CUDA on the GPU. emulator: the CUDA kernels on
        CPU tensors, for tests. torch: every dtype and device. All compute in fp32 (fp64 for fp64 inputs) and round
        once, after the weight.

    Source:
        Zhang and Sennrich 2019, arXiv 1910.07467, eq. 4; the gated form: Mamba-2, arXiv 2405.21060, section 7.
    """
    op = "rms_norm"
    check.tensor(op, "x_TD", x_TD, None, None)
    rows, width = x_TD.shape
    check.tensor(op, "weight_D", weight_D, width)
    check.positive(op, eps=eps)
    if group_size is not None:
        check.integer(op, group_size=group_size)
    for name, value in (("residual_TD", residual_TD), ("gate_TD", gate_TD)):
        if value is not None:
            check.tensor(op, name, value, rows, width, dtypes=(x_TD.dtype,))
    check.same_device(op, x_TD, weight_D=weight_D, residual_TD=residual_TD, gate_TD=gate_TD)
    if width == 0:
        check.refuse(op, "x_TD", "have a width > 0", check.describe(x_TD))
    if group_size is not None and (group_size < 1 or width % group_size):
        check.refuse(op, "group_size", f"divide the width {width}", group_size)
    y_TD, sum_TD = _rms_norm(x_TD, weight_D, eps, residual_TD, gate_TD, group_size, backend=backend)
    return y_TD if residual_TD is None else (y_TD, sum_TD)
