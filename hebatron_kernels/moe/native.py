"""grouped_gemm in CUDA (csrc/cuda/grouped_gemm.cu): forward, bf16. The other expert operators have no kernel yet.

N rows, R rows of a, E experts, K summed over, M outputs.
"""

from __future__ import annotations

import math
from typing import cast

import torch
from torch import Tensor

from .. import _check as check
from .. import _native

# enum class GroupedGemm of csrc/hebatron/ops.h
IMPLEMENTATIONS = {"sm80": 1, "sm90a": 2, "cutlass": 3}
PER_16_BYTES = 8


def parse_implementation(value: str | None) -> tuple[str | None, int, int]:
    """The name and the tile of "sm90a:128x208"; 0 x 0 where no tile is named."""
    name, colon, tile = (value or "").partition(":")
    sizes = tile.split("x") if colon else ["0", "0"]
    if value is not None:
        right = name in IMPLEMENTATIONS and len(sizes) == 2 and all(size.isdecimal() for size in sizes)
        if not right or (colon and "0" in sizes):
            known = ", ".join(IMPLEMENTATIONS)
            check.refuse(
                "grouped_gemm",
                "implementation",
                f'be one of {known}, with or without a tile as in "sm90a:128x208"',
                repr(value),
            )
    return (name or None), int(sizes[0]), int(sizes[1])


def supports_grouped_gemm(
    a_RK: Tensor,
    b_EKM: Tensor,
    offsets_E: Tensor,
    rows_N: Tensor | None,
    scale_N: Tensor | None,
    activation: str | None,
    implementation: str | None,
) -> str | None:
    if not _native.on_cuda(a_RK):
        return "no CPU kernel is written for this operator yet"
    if a_RK.dtype != torch.bfloat16:
        return f"computes bfloat16, got {str(a_RK.dtype).removeprefix('torch.')}"
    stored = _stored(b_EKM)
    reason = _native.refusal(a_RK, stored, cuda=True)
    if reason is not None:
        return reason
    for name, width in (("inner width", b_EKM.shape[1]), ("number of outputs", b_EKM.shape[2])):
        if width % PER_16_BYTES:
            return f"needs the {name} to be a multiple of {PER_16_BYTES}, got {width}"
    for name, tensor in (("a_ND", a_RK), ("b_EKN", stored)):
        steps = [step for step, n in zip(tensor.stride()[:-1], tensor.shape) if n > 1]
        # while compiling a tensor has no address yet: the kernel checks it again
        start = 0 if torch.compiler.is_compiling() else tensor.data_ptr() // tensor.element_size()
        if any(step % PER_16_BYTES for step in [*steps, start]):
            return f"needs the rows of {name} to start on 16 bytes, got strides {tuple(tensor.stride())}"
    if stored.stride(1) < stored.shape[2] or stored.stride(0) < 0:
        return f"needs b_EKN without overlap, got strides {tuple(b_EKM.stride())}"
    if implementation is not None and implementation.startswith("cutlass") and not a_RK.is_cuda:
        return "CUTLASS's kernels run on a GPU only"
    if implementation is not None and not implementation.startswith("sm80") and not _stored_by_output(b_EKM):
        name = implementation.partition(":")[0]
        return f"{name} needs b_EKN as the transposed view of weights stored (E, M, K)"
    if implementation is not None and implementation.startswith("cutlass") and rows_N is not None:
        return "cutlass gathers no rows: needs them in place (moe_permute first) and rows_N=None"
    return None


def kernels_grouped_gemm(a_RK: Tensor, *others: object) -> list[str]:
    name, _, _ = parse_implementation(cast(str | None, others[-1]))
    files = {"sm80": "grouped_gemm_sm80", "sm90a": "grouped_gemm_sm90", "cutlass": "cutlass/grouped_gemm"}
    if name is not None:
        return [files[name]]
    # on Hopper the sizes may leave the sm_90a kernel out
    return (
        [files["sm90a"], files["sm80"]] if _native.arch_of(a_RK.get_device()) == "sm_90" else [files["sm80"]]
    )


def _stored_by_output(b_EKM: Tensor) -> bool:
    return b_EKM.stride(1) == 1


def _stored(b_EKM: Tensor) -> Tensor:
    """b with its contiguous dimension last."""
    return b_EKM.transpose(1, 2) if _stored_by_output(b_EKM) else b_EKM


def _step(value: Tensor) -> int:
    """The stride of the first dimension, also where torch leaves it open: of one element or none."""
    return value.stride(0) if value.shape[0] > 1 else math.prod(value.shape[1:])


def grouped_gemm(
    a_RK: Tensor,
    b_EKM: Tensor,
    offsets_E: Tensor,
    rows_N: Tensor | None = None,
    scale_N: Tensor | None = None,
    activation: str | None = None,
    implementation: str | None = None,
) -> Tensor:
    count = (a_RK if rows_N is None else rows_N).shape[0]
    experts, inner, outputs = b_EKM.shape
    name, tile_m, tile_n = parse_implementation(implementation)
    stored = _stored(b_EKM)
    out_NM = torch.empty(count, outputs, dtype=a_RK.dtype, device=a_RK.device)
    _native.call(
        "grouped_gemm_fwd",
        rows=count,
        a_rows=a_RK.shape[0],
        experts=experts,
        n=outputs,
        k=inner,
        relu2=int(activation == "relu2"),
        a=a_RK,
        a_stride=_step(a_RK),
        rows_of_a=None if rows_N is None else rows_N.contiguous(),
        b=stored,
        b_expert_stride=_step(stored),
        b_stride=stored.stride(1),
        b_k_major=int(_stored_by_output(b_EKM)),
        offsets=offsets_E.contiguous(),
        scale=None if scale_N is None else scale_N.float().contiguous(),
        out=out_NM,
        implementation=0 if name is None else IMPLEMENTATIONS[name],
        tile_m=tile_m,
        tile_n=tile_n,
    )
    return out_NM
