"""Attention in C++ (csrc/cpu/attention*.cpp) and CUDA (csrc/cuda/attention*.cu): prefill forward and backward, fp32 and
bf16, and decode over pages, on CUDA in bf16 alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import _native

PER_16_BYTES = 8  # bf16: what the CUDA kernels move at a time
MOST_HEAD_DIM, MOST_HEAD_DIM_WITH_GRADIENTS = 256, 128
HOPPER_HEAD_DIM = 128  # of csrc/cuda/attention_sm90.cu
MOST_BLOCKS = 65535  # of a grid along y and z


def supports_attention_prefill(
    q_THP: Tensor,
    k_SHkP: Tensor,
    v_SHkP: Tensor,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    causal: bool,
    scale: float | None,
    window: int | None,
) -> str | None:
    reason = _native.refusal(q_THP, k_SHkP, v_SHkP, cuda=True)
    if reason is not None or not _native.on_cuda(q_THP):
        return reason
    head_dim = q_THP.shape[2]
    if q_THP.dtype == torch.float32:
        return (
            None
            if head_dim <= MOST_HEAD_DIM
            else f"needs a head dim of at most {MOST_HEAD_DIM}, got {head_dim}"
        )
    wants_gradient = torch.is_grad_enabled() and any(x.requires_grad for x in (q_THP, k_SHkP, v_SHkP))
    if wants_gradient and head_dim > MOST_HEAD_DIM_WITH_GRADIENTS:
        return (
            f"the gradients in bfloat16 take head dims up to {MOST_HEAD_DIM_WITH_GRADIENTS}, got {head_dim}"
        )
    return _cuda_refusal(q_THP=q_THP, k_SHkP=k_SHkP, v_SHkP=v_SHkP)


def kernels_attention_prefill(q_THP: Tensor, *others: object) -> list[str]:
    """On Hopper the layout of k and v may leave the sm_90a kernel out."""
    portable = ["attention", "attention_bwd"]
    hopper = q_THP.shape[2] == HOPPER_HEAD_DIM and q_THP.dtype == torch.bfloat16
    return (
        ["attention_sm90", *portable]
        if hopper and _native.arch_of(q_THP.get_device()) == "sm_90"
        else portable
    )


def attention_prefill(
    q_THP: Tensor,
    k_SHkP: Tensor,
    v_SHkP: Tensor,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    causal: bool = True,
    scale: float | None = None,
    window: int | None = None,
) -> Tensor:
    return attention_prefill_keep(q_THP, k_SHkP, v_SHkP, cu_seqlens_q, cu_seqlens_k, causal, scale, window)[0]


def attention_prefill_keep(
    q_THP: Tensor,
    k_SHkP: Tensor,
    v_SHkP: Tensor,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    causal: bool,
    scale: float | None,
    window: int | None,
) -> tuple[Tensor, Tensor]:
    """o, and each row's log of the sum of exponentials (-inf where a query sees no key)."""
    o_THP = _empty(q_THP)
    lse_TH = torch.empty(q_THP.shape[:2], dtype=torch.float32, device=q_THP.device)
    inputs = _inputs(q_THP, k_SHkP, v_SHkP, cu_seqlens_q, cu_seqlens_k, causal, scale, window)
    _native.call("attention_prefill_fwd", **inputs, o=o_THP, lse=lse_TH)
    return o_THP, lse_TH


def attention_prefill_keep_bwd(
    grads: list[Tensor],
    kept: list[Tensor],
    wanted: list[bool],
    q_THP: Tensor,
    k_SHkP: Tensor,
    v_SHkP: Tensor,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    causal: bool,
    scale: float | None,
    window: int | None,
) -> list[Tensor]:
    found = [_empty(x) for x in (q_THP, k_SHkP, v_SHkP)]
    _native.call(
        "attention_prefill_bwd",
        **_inputs(q_THP, k_SHkP, v_SHkP, cu_seqlens_q, cu_seqlens_k, causal, scale, window),
        o=kept[0],
        lse=kept[1],
        grad_o=_native.aligned(grads[0]),
        grad_q=found[0],
        grad_k=found[1],
        grad_v=found[2],
    )
    return [g if want else g.new_empty(0) for g, want in zip(found, wanted)]


def _inputs(
    q_THP: Tensor,
    k_SHkP: Tensor,
    v_SHkP: Tensor,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    causal: bool,
    scale: float | None,
    window: int | None,
) -> dict[str, Any]:
    tokens_q, heads, head_dim = q_THP.shape
    tokens_k, kv_heads, _ = k_SHkP.shape
    everything = tokens_q + tokens_k + 1
    cu_q = _ends(cu_seqlens_q, tokens_q, q_THP.device)
    same = cu_seqlens_k is None and cu_seqlens_q is not None
    cu_k = cu_q if same else _ends(cu_seqlens_k, tokens_k, q_THP.device)
    return {
        "tokens_q": tokens_q,
        "tokens_k": tokens_k,
        "heads": heads,
        "kv_heads": kv_heads,
        "head_dim": head_dim,
        "sequences": cu_q.numel() - 1,
        "causal": int(causal),
        "window": everything if window is None else min(window, everything),
        "scale": head_dim**-0.5 if scale is None else scale,
        "dtype": _native.dtype_name(q_THP),
        "workers": torch.get_num_threads(),
        **_rows("q", q_THP),
        **_rows("k", k_SHkP),
        **_rows("v", v_SHkP),
        "cu_seqlens_q": cu_q,
        "cu_seqlens_k": cu_k,
    }


def _empty(like: Tensor) -> Tensor:
    """Its shape and dtype, contiguous, where it is."""
    return like.new_empty(like.shape) if like.is_cuda else _native.empty(like.shape, like.dtype)


def _ends(cu_seqlens: Tensor | None, tokens: int, device: torch.device) -> Tensor:
    if cu_seqlens is not None:
        return cu_seqlens.contiguous()
    if tokens == 0:
        return torch.zeros(2, dtype=torch.int32, device=device)
    # [0, tokens]; on a GPU torch.tensor would copy it from the host and wait
    return torch.arange(0, tokens + 1, tokens, dtype=torch.int32, device=device)


def _rows(name: str, x: Tensor) -> dict[str, Any]:
    """A tensor of tokens and heads, and the strides of both."""
    token, head = _strides(x)[:2]
    return {name: x, f"{name}_stride": token, f"{name}_head_stride": head}


def _strides(x: Tensor) -> list[int]:
    """0 for a dimension of one element, where torch leaves the stride open."""
    return [step if n > 1 else 0 for step, n in zip(x.stride(), x.shape)]


def _cuda_refusal(**tensors: Tensor) -> str | None:
    """Why the CUDA kernels cannot take these, or None."""
    first = next(iter(tensors.values()))
    if first.dtype != torch.bfloat16:
        return f"computes bfloat16, got {str(first.dtype).removeprefix('torch.')}"
    head_dim = first.shape[-1]
    if head_dim % PER_16_BYTES or head_dim > MOST_HEAD_DIM:
        return f"needs a head dim that is a multiple of {PER_16_BYTES} and at most {MOST_HEAD_DIM}, got {head_dim}"
    return _native.refusal(*tensors.values(), cuda=True) or _native.unaligned(**tensors)


def supports_attention_decode(
    q_QHP: Tensor,
    k_new_QHkP: Tensor,
    v_new_QHkP: Tensor,
    cache: Tensor,
    block_table: Tensor,
    lengths: Tensor,
    scale: float | None,
    window: int | None,
) -> str | None:
    if not _native.on_cuda(q_QHP):
        return _native.refusal(q_QHP, k_new_QHkP, v_new_QHkP, cache)
    if max(q_QHP.shape[0], q_QHP.shape[1]) > MOST_BLOCKS:
        return (
            f"the CUDA kernel takes at most {MOST_BLOCKS} sequences and heads, got {tuple(q_QHP.shape[:2])}"
        )
    return _cuda_refusal(q_QHP=q_QHP, k_new_QHkP=k_new_QHkP, v_new_QHkP=v_new_QHkP, cache=cache)


def kernels_attention_decode(*args: object) -> list[str]:
    return ["attention_decode"]


def attention_decode(
    q_QHP: Tensor,
    k_new_QHkP: Tensor,
    v_new_QHkP: Tensor,
    cache: Tensor,
    block_table: Tensor,
    lengths: Tensor,
    scale: float | None = None,
    window: int | None = None,
) -> Tensor:
    sequences, heads, head_dim = q_QHP.shape
    block_size, kv_heads = cache.shape[2:4]
    everything = block_table.shape[1] * block_size + 1
    o_QHP = torch.empty_like(q_QHP, memory_format=torch.contiguous_format)
    keys, values = cache.unbind()
    block_stride, row_stride, head_stride = _strides(keys)[:3]
    _native.call(
        "attention_decode",
        sequences=sequences,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        block_size=block_size,
        max_blocks=block_table.shape[1],
        window=everything if window is None else min(window, everything),
        scale=head_dim**-0.5 if scale is None else scale,
        dtype=_native.dtype_name(q_QHP),
        workers=torch.get_num_threads(),
        **_rows("q", q_QHP),
        **_rows("k_new", k_new_QHkP),
        **_rows("v_new", v_new_QHkP),
        keys=keys,
        values=values,
        block_stride=block_stride,
        row_stride=row_stride,
        head_stride=head_stride,
        block_table=block_table.contiguous(),
        lengths=lengths.contiguous(),
        o=o_QHP,
    )
    _native.wrote(cache)
    return o_QHP
