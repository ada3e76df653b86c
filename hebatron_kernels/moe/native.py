"""The expert layer in C++ (csrc/cpu/moe.cpp, moe_route.cpp: forward and backward, fp32 and bf16) and CUDA
(csrc/cuda/moe.cu, bf16; moe_route.cu), and the forward of grouped_gemm in C++ (csrc/cpu/gemm.cpp) and CUDA
(csrc/cuda/grouped_gemm.cu, bf16).

moe_mlp: T tokens, K experts chosen by each, E experts, D width, F expert width. grouped_gemm: N rows, R rows of a, E
experts, K summed over, M outputs.
"""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from torch import Tensor

from .. import _check as check
from .. import _native
from . import native_rows

# enum class GroupedGemm of csrc/hebatron/ops.h
IMPLEMENTATIONS = {"sm80": 1, "sm90a": 2, "cutlass": 3}
PER_16_BYTES = 8
MOST_EXPERTS, MOST_CHOICES = 512, 32  # of the CUDA kernels


def parse_implementation(value: str | None) -> tuple[str | None, int, int]:
    """The name and the tile of "sm90a:128x208"; 0 x 0 where no tile is named."""
    name, colon, tile = value.partition(":") if isinstance(value, str) else ("", "", "")
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
        if implementation is not None:
            return f"has no implementation {implementation} on the CPU, only the CUDA kernels have several"
        return _native.refusal(a_RK, _stored(b_EKM))
    if a_RK.dtype != torch.bfloat16:
        return f"computes bfloat16, got {str(a_RK.dtype).removeprefix('torch.')}"
    stored = _stored(b_EKM)
    reason = _native.refusal(a_RK, stored, cuda=True)
    if reason is not None:
        return reason
    for name, width in (("inner width", b_EKM.shape[1]), ("number of outputs", b_EKM.shape[2])):
        if width % PER_16_BYTES:
            return f"needs the {name} to be a multiple of {PER_16_BYTES}, got {width}"
    reason = _native.unaligned(a_ND=a_RK, b_EKN=stored)
    if reason is not None:
        return reason
    if stored.stride(1) < stored.shape[2] or stored.stride(0) < 0:
        return f"needs b_EKN without overlap, got strides {tuple(b_EKM.stride())}"
    if implementation is not None and implementation.startswith("cutlass") and not a_RK.is_cuda:
        return "CUTLASS's kernels run on a GPU only"
    if implementation is not None and implementation.startswith("cutlass") and not _stored_by_output(b_EKM):
        return "cutlass needs b_EKN as the transposed view of weights stored (E, M, K)"
    if implementation is not None and implementation.startswith("cutlass") and rows_N is not None:
        return "cutlass gathers no rows: needs them in place (moe_permute first) and rows_N=None"
    return None


def kernels_grouped_gemm(a_RK: Tensor, *others: object) -> list[str]:
    name, _, _ = parse_implementation(cast(str | None, others[-1]))
    by_output = _stored_by_output(cast(Tensor, others[0]))
    files = {
        "sm80": "grouped_gemm_sm80",
        "sm90a": "grouped_gemm_sm90" if by_output else "grouped_gemm_dgrad_sm90",
        "cutlass": "cutlass/grouped_gemm",
    }
    if name is not None:
        return [files[name]]
    return _products(a_RK)


def _products(x: Tensor) -> list[str]:
    """What the automatic choice may run, with the gradients, each of which reads b the other way; on Hopper the sizes
    may leave the sm_90a kernels out."""
    portable = ["grouped_gemm_sm80", "grouped_gemm_wgrad_sm80"]
    hopper = [f"grouped_gemm_{part}sm90" for part in ("", "dgrad_", "wgrad_")]
    return [*hopper, *portable] if _native.arch_of(x.get_device()) == "sm_90" else portable


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
        workers=torch.get_num_threads(),
        dtype=_native.dtype_name(a_RK),
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
        kept=None,
        row_sums=None,
        out=out_NM,
        implementation=0 if name is None else IMPLEMENTATIONS[name],
        tile_m=tile_m,
        tile_n=tile_n,
    )
    return out_NM


def supports_moe_route(logits_TE: Tensor, bias_E: Tensor, top_k: int, *others: object) -> str | None:
    experts = logits_TE.shape[1]
    if _native.on_cuda(logits_TE) and (experts > MOST_EXPERTS or top_k > MOST_CHOICES):
        most = f"{MOST_EXPERTS} experts and {MOST_CHOICES} choices"
        return f"the CUDA kernel takes at most {most}, got {experts} and {top_k}"
    return _native.refusal(logits_TE, cuda=True)


def kernels_moe_route(*args: object) -> list[str]:
    return ["moe_route"]


def moe_route(
    logits_TE: Tensor,
    bias_E: Tensor,
    top_k: int,
    n_group: int = 1,
    topk_group: int = 1,
    normalize: bool = True,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    (tokens, experts), device = logits_TE.shape, logits_TE.device
    weights_TK = torch.empty(tokens, top_k, dtype=torch.float32, device=device)
    ids_TK = torch.empty(tokens, top_k, dtype=torch.int64, device=device)
    counts_E = torch.empty(experts, dtype=torch.int64, device=device)
    numbers = _route_numbers(logits_TE, bias_E, top_k, n_group, topk_group, normalize, scale)
    _native.call("moe_route_fwd", **numbers, weights=weights_TK, ids=ids_TK, counts=counts_E)
    return weights_TK, ids_TK, counts_E


def moe_route_bwd(grads: list[Tensor], logits_TE: Tensor, bias_E: Tensor, *others: Any) -> list[Tensor]:
    grad_logits_TE = torch.empty_like(logits_TE, memory_format=torch.contiguous_format)
    _native.call(
        "moe_route_bwd",
        **_route_numbers(logits_TE, bias_E, *others),
        grad_weights=grads[0],
        grad_logits=grad_logits_TE,
    )
    return [grad_logits_TE, torch.zeros_like(bias_E, memory_format=torch.contiguous_format)]


def _route_numbers(
    logits_TE: Tensor,
    bias_E: Tensor,
    top_k: int,
    n_group: int,
    topk_group: int,
    normalize: bool,
    scale: float,
) -> dict[str, Any]:
    return {
        "tokens": logits_TE.shape[0],
        "experts": logits_TE.shape[1],
        "top_k": top_k,
        "groups": n_group,
        "kept_groups": topk_group,
        "workers": torch.get_num_threads(),
        "normalize": int(normalize),
        "scale": scale,
        "dtype": _native.dtype_name(logits_TE),
        "logits": logits_TE,
        "logits_stride": logits_TE.stride(0),
        "bias": bias_E.float().contiguous(),
    }


def supports_moe_mlp(
    x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, up_EFD: Tensor, down_EDF: Tensor
) -> str | None:
    if not _native.on_cuda(x_TD):
        return _native.refusal(x_TD, up_EFD, down_EDF)
    if x_TD.dtype != torch.bfloat16:
        return f"computes bfloat16, got {str(x_TD.dtype).removeprefix('torch.')}"
    experts, expert_width, width = up_EFD.shape
    if experts > MOST_EXPERTS:
        return f"the CUDA kernel takes at most {MOST_EXPERTS} experts, got {experts}"
    for name, columns in (("width", width), ("expert width", expert_width)):
        if columns % PER_16_BYTES or columns > native_rows.MOST_COLUMNS:
            most = f"at most {native_rows.MOST_COLUMNS:,}"
            return f"needs the {name} to be a multiple of {PER_16_BYTES} and {most}, got {columns:,}"
    rounded = up_EFD.dtype != x_TD.dtype  # then what the kernels read is a copy
    weights = {} if rounded else {"up_EFD": up_EFD, "down_EDF": down_EDF}
    return _native.refusal(x_TD, *weights.values(), cuda=True) or _native.unaligned(x_TD=x_TD, **weights)


def kernels_moe_mlp(x_TD: Tensor, *others: object) -> list[str]:
    return ["moe", "moe_decode", "moe_permute", "moe_combine", *_products(x_TD)]


def moe_mlp(x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, up_EFD: Tensor, down_EDF: Tensor) -> Tensor:
    return _forward(x_TD, ids_TK, weights_TK, up_EFD, down_EDF, None)


def moe_mlp_keep(
    x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, up_EFD: Tensor, down_EDF: Tensor
) -> tuple[Tensor, Tensor]:
    """y, and of the sorted rows (T*K, F) the pre-activation, on CUDA the activation times the weight."""
    hidden_NF = _empty(x_TD, ids_TK.numel(), up_EFD.shape[1])
    return _forward(x_TD, ids_TK, weights_TK, up_EFD, down_EDF, hidden_NF), hidden_NF


def moe_mlp_keep_bwd(
    grads: list[Tensor],
    kept: list[Tensor],
    wanted: list[bool],
    x_TD: Tensor,
    ids_TK: Tensor,
    weights_TK: Tensor,
    up_EFD: Tensor,
    down_EDF: Tensor,
) -> list[Tensor]:
    numbers = _mlp_numbers(x_TD, ids_TK, weights_TK, up_EFD, down_EDF)
    given = [x_TD, weights_TK, up_EFD, down_EDF]
    found = [_empty(a, *(a.shape if want else (0,))) for a, want in zip(given, wanted)]
    grad_weights_TK = torch.empty(weights_TK.shape, dtype=torch.float32, device=x_TD.device)
    _native.call(
        "moe_mlp_bwd",
        **numbers,
        hidden=kept[0],
        grad_y=_native.aligned(grads[0]),
        grad_x=found[0] if wanted[0] else None,
        grad_weights=grad_weights_TK,
        grad_up=found[2] if wanted[2] else None,
        grad_down=found[3] if wanted[3] else None,
    )
    if wanted[1]:
        found[1] = grad_weights_TK.to(weights_TK.dtype)
    return found


def _empty(like: Tensor, *shape: int) -> Tensor:
    """In its dtype, where it is."""
    return like.new_empty(shape) if like.is_cuda else _native.empty(shape, like.dtype)


def _forward(
    x_TD: Tensor,
    ids_TK: Tensor,
    weights_TK: Tensor,
    up_EFD: Tensor,
    down_EDF: Tensor,
    hidden_NF: Tensor | None,
) -> Tensor:
    y_TD = torch.empty_like(x_TD, memory_format=torch.contiguous_format)
    numbers = _mlp_numbers(x_TD, ids_TK, weights_TK, up_EFD, down_EDF)
    _native.call("moe_mlp_fwd", **numbers, hidden=hidden_NF, y=y_TD)
    return y_TD


def _mlp_numbers(
    x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, up_EFD: Tensor, down_EDF: Tensor
) -> dict[str, Any]:
    experts, expert_width, _ = up_EFD.shape
    weight_dtype = _native.dtype_name(up_EFD)
    if _native.on_cuda(x_TD):
        # The kernels read bf16: fp32 masters are rounded here, forward and backward, 6 bytes moved a weight. For 128
        # experts of 2,688 x 1,856 that is 7.7 GB, 2.6 ms at 3.0 TB/s; a step on 16,384 tokens is bound by 7.4 ms.
        up_EFD, down_EDF = (w.to(x_TD.dtype) for w in (up_EFD, down_EDF))
    return {
        **_mlp_sizes(x_TD, ids_TK, weights_TK, experts, expert_width),
        "weight_dtype": weight_dtype,
        "packed": 0,
        "up": up_EFD,
        "up_expert_stride": _step(up_EFD),
        "up_stride": up_EFD.stride(1),
        "down": down_EDF,
        "down_expert_stride": _step(down_EDF),
        "down_stride": down_EDF.stride(1),
    }


def _mlp_sizes(
    x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, experts: int, expert_width: int
) -> dict[str, Any]:
    return {
        "tokens": x_TD.shape[0],
        "top_k": ids_TK.shape[1],
        "experts": experts,
        "width": x_TD.shape[1],
        "expert_width": expert_width,
        "workers": torch.get_num_threads(),
        "dtype": _native.dtype_name(x_TD),
        "x": x_TD,
        "x_stride": _step(x_TD),
        "ids": ids_TK.long().contiguous(),
        "weights": weights_TK.float().contiguous(),
    }


def supports_moe_mlp_packed(x_TD: Tensor, *others: object) -> str | None:
    if _native.on_cuda(x_TD):
        return "no CUDA kernel is written for this operator"
    return _native.refusal(x_TD)


def moe_mlp_packed(
    x_TD: Tensor,
    ids_TK: Tensor,
    weights_TK: Tensor,
    up: Tensor,
    down: Tensor,
    num_experts: int,
    expert_width: int,
) -> Tensor:
    y_TD = torch.empty(x_TD.shape, dtype=x_TD.dtype)
    _native.call(
        "moe_mlp_fwd",
        **_mlp_sizes(x_TD, ids_TK, weights_TK, num_experts, expert_width),
        weight_dtype=_native.dtype_name(x_TD),
        packed=1,
        up=up,
        up_expert_stride=0,
        up_stride=0,
        down=down,
        down_expert_stride=0,
        down_stride=0,
        hidden=None,
        y=y_TD,
    )
    return y_TD
