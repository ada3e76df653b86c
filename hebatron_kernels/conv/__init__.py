"""The short causal convolution before the state-space scan: whole sequences, and one token at a time."""

from __future__ import annotations

from torch import Tensor

from .. import _check as check
from .._dispatch import Operator
from . import native, reference, torch_ops

__all__ = ["causal_conv1d", "causal_conv1d_update"]

_MODULES = {"native": native, "emulator": native, "torch": torch_ops, "reference": reference}


def _fake(
    x_TC: Tensor,
    weight_CW: Tensor,
    bias_C: Tensor | None,
    activation: str | None,
    cu_seqlens: Tensor | None,
    initial_state: Tensor | None,
) -> tuple[Tensor, Tensor]:
    state = x_TC.new_empty(check.sequences(cu_seqlens), x_TC.shape[1], weight_CW.shape[1] - 1)
    return x_TC.new_empty(x_TC.shape), state


_conv = Operator(
    "causal_conv1d",
    "Tensor x, Tensor weight, Tensor? bias, str? activation, Tensor? cu_seqlens, Tensor? initial_state",
    "(Tensor, Tensor)",
    _MODULES,
    _fake,
)
_update = Operator(
    "causal_conv1d_update",
    "Tensor x, Tensor(a!) conv_state, Tensor weight, Tensor? bias, str? activation",
    "Tensor",
    _MODULES,
    lambda x, *others: x.new_empty(x.shape),
    differentiable=False,
)


def causal_conv1d(
    x_TC: Tensor,
    weight_CW: Tensor,
    bias_C: Tensor | None,
    activation: str | None,
    cu_seqlens: Tensor | None = None,
    initial_state: Tensor | None = None,
    *,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """y_t = activation(bias + sum_w weight[:, w] * x_(t - W + 1 + w)), per channel, within each sequence.

    Args:
        x_TC: (T tokens, C channels), any floating dtype; rows may be strided (a slice of a projection).
        weight_CW: (C, W taps), the last tap meets the token itself; any floating dtype.
        bias_C: (C,), any floating dtype, or None.
        activation: "silu" or None.
        cu_seqlens: (Q + 1,) int32, where each packed sequence starts and ends; None is one sequence. Sequences
            do not see one another, whatever they hold, and may be empty.
        initial_state: (Q, C, W - 1) in the dtype of x, the inputs before each sequence, oldest first; None is zeros.
        backend: "native", "torch", "reference" or "emulator"; None chooses.

    Returns:
        y_TC in the dtype of x, and the last W - 1 inputs of each sequence (Q, C, W - 1) in the dtype of x, oldest
        first, reaching back into initial_state where the sequence is shorter.

    Raises:
        ValueError: an argument has the wrong shape, dtype, device or value.
        BackendError: the named backend cannot serve these arguments.

    Gradients:
        To x, weight, bias and initial_state, through both results.

    Backends:
        native: forward and backward in fp32 and bf16, C++ on the CPU (up to 16 taps) and CUDA on the GPU (up to 8).
        emulator: the CUDA kernels on CPU tensors, for tests. torch: every dtype and device. All sum in fp32 (fp64 for
        fp64 inputs), oldest tap first.

    Source:
        Gu and Dao 2023, Mamba, arXiv 2312.00752, section 3.4; conv_kernel, use_conv_bias of Nemotron-H's config.
    """
    op = "causal_conv1d"
    check.tensor(op, "x_TC", x_TC, None, None)
    _check_weights(op, x_TC, weight_CW, bias_C, activation)
    check.cu_seqlens(op, cu_seqlens, x_TC.shape[0])
    if initial_state is not None:
        shape = (check.sequences(cu_seqlens), x_TC.shape[1], weight_CW.shape[1] - 1)
        check.tensor(op, "initial_state", initial_state, *shape, dtypes=(x_TC.dtype,))
    check.same_device(op, x_TC, cu_seqlens=cu_seqlens, initial_state=initial_state)
    return _conv(x_TC, weight_CW, bias_C, activation, cu_seqlens, initial_state, backend=backend)


def causal_conv1d_update(
    x_QC: Tensor,
    conv_state_QCK: Tensor,
    weight_CW: Tensor,
    bias_C: Tensor | None,
    activation: str | None,
    *,
    backend: str | None = None,
) -> Tensor:
    """One token of causal_conv1d for every sequence; the state drops its oldest input and takes x, in place.

    Args:
        x_QC: (Q sequences, C channels), any floating dtype; rows may be strided.
        conv_state_QCK: (Q, C, K = W - 1 past inputs) in the dtype of x, contiguous, oldest first. Overwritten.
        weight_CW, bias_C, activation: as in causal_conv1d.
        backend: "native", "torch", "reference" or "emulator"; None chooses.

    Returns:
        y_QC in the dtype of x.

    Raises:
        ValueError: an argument has the wrong shape, dtype, device, layout or value, or requires a gradient
            while gradients are recorded.
        BackendError: the named backend cannot serve these arguments.

    Gradients:
        None; causal_conv1d with an initial_state has them.

    Backends:
        native: fp32 and bf16, C++ on the CPU and CUDA on the GPU; the bits of causal_conv1d. emulator: the CUDA kernel
        on CPU tensors, for tests. torch: every dtype and device.

    Source:
        As causal_conv1d.
    """
    op = "causal_conv1d_update"
    check.tensor(op, "x_QC", x_QC, None, None)
    _check_weights(op, x_QC, weight_CW, bias_C, activation)
    shape = (*x_QC.shape, weight_CW.shape[1] - 1)
    check.tensor(op, "conv_state_QCK", conv_state_QCK, *shape, dtypes=(x_QC.dtype,))
    check.same_device(op, x_QC, conv_state_QCK=conv_state_QCK)
    if not conv_state_QCK.is_contiguous():
        check.refuse(op, "conv_state_QCK", "be contiguous", f"strides {conv_state_QCK.stride()}")
    return _update(x_QC, conv_state_QCK, weight_CW, bias_C, activation, backend=backend)


def _check_weights(
    op: str, x: Tensor, weight_CW: Tensor, bias_C: Tensor | None, activation: str | None
) -> None:
    check.tensor(op, "weight_CW", weight_CW, x.shape[1], None)
    if weight_CW.shape[1] < 1:
        check.refuse(op, "weight_CW", "have at least one tap", check.describe(weight_CW))
    if bias_C is not None:
        check.tensor(op, "bias_C", bias_C, x.shape[1])
    check.same_device(op, x, weight_CW=weight_CW, bias_C=bias_C)
    if activation not in ("silu", None):
        check.refuse(op, "activation", 'be "silu" or None', repr(activation))
