"""One token of a whole layer in one call of the native CPU module, for models packed for inference.

Not operators of their own: each is the operators of the layer one after another, y = x + mixer(rms_norm(x)), equal
to them to the bit, without the 20 us and more that a call from Python costs. A caller asks `step_available` first:
where it is false the operators serve.

Q sequences, D width, H heads, P head dim, S state, G groups, C convolution channels, W taps, E experts. Matrices are
packed (`linear_pack`, `moe_pack`) in the dtype of x, float32 or bfloat16; vectors are float32.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import _check as check
from . import _dispatch, _native


def step_available() -> bool:
    """Whether the automatic choice for tensors on the CPU is the native module, and no gradient is recorded."""
    native = _dispatch.named_backend() in (None, "native")
    return native and _native.cpu_module is not None and not _native.emulating and not torch.is_grad_enabled()


def mamba_step(
    x_QD: Tensor,
    norm_D: Tensor,
    in_proj: Tensor,
    conv_state_QCK: Tensor,
    conv_weight_CW: Tensor,
    conv_bias_C: Tensor | None,
    state_QHPS: Tensor,
    A_H: Tensor,
    D_H: Tensor,
    dt_bias_H: Tensor,
    gate_norm: Tensor,
    out_proj: Tensor,
    groups: int,
    eps: float,
    dt_limit: tuple[float, float],
) -> Tensor:
    """A Mamba-2 layer: rms_norm, linear to z, x B C and dt, causal_conv1d_update with silu, ssd_update, rms_norm gated
    by z in G groups, linear, and the sum with x. Both states are advanced in place.

    Args:
        x_QD: (Q, D).
        norm_D, gate_norm: (D,) and (H * P,), weights of the norms.
        in_proj, out_proj: packed (2 H P + 2 G S + H, D) and (D, H P).
        conv_state_QCK: (Q, C, W - 1) in the dtype of x. conv_weight_CW, conv_bias_C: fp32.
        state_QHPS: (Q, H, P, S), fp32.
        A_H, D_H, dt_bias_H: (H,).
        dt_limit: bounds of the step size.

    Returns:
        y_QD in the dtype of x.

    Raises:
        ValueError: an argument has the wrong shape, dtype, device or layout.
    """
    op = "mamba_step"
    Q, D = _rows(op, x_QD)
    check.tensor(op, "state_QHPS", state_QHPS, Q, None, None, None, dtypes=(torch.float32,))
    _, H, P, S = state_QHPS.shape
    check.positive(op, groups=groups)
    if H % groups:
        check.refuse(op, "groups", f"divide the {H} heads", groups)
    C = H * P + 2 * groups * S
    check.tensor(op, "conv_weight_CW", conv_weight_CW, C, None, dtypes=(torch.float32,))
    taps = conv_weight_CW.shape[1]
    check.tensor(op, "conv_state_QCK", conv_state_QCK, Q, C, taps - 1, dtypes=(x_QD.dtype,))
    heads = {"A_H": A_H, "D_H": D_H, "dt_bias_H": dt_bias_H}
    _vectors(op, D, norm_D=norm_D)
    _vectors(op, H * P, gate_norm=gate_norm)
    _vectors(op, C, conv_bias_C=conv_bias_C)
    _vectors(op, H, **heads)
    _packed(op, x_QD, in_proj=in_proj, out_proj=out_proj)
    _contiguous(op, state_QHPS=state_QHPS, conv_state_QCK=conv_state_QCK, conv_weight_CW=conv_weight_CW)
    y_QD = torch.empty_like(x_QD)
    _native.call(
        op,
        sequences=Q,
        width=D,
        heads=H,
        head_dim=P,
        groups=groups,
        state_dim=S,
        taps=taps,
        eps=eps,
        dt_min=dt_limit[0],
        dt_max=dt_limit[1],
        dtype=_native.dtype_name(x_QD),
        x=x_QD,
        norm=norm_D,
        in_proj=in_proj,
        conv_state=conv_state_QCK,
        conv_weight=conv_weight_CW,
        conv_bias=conv_bias_C,
        state=state_QHPS,
        A=A_H,
        D=D_H,
        dt_bias=dt_bias_H,
        gate_norm=gate_norm,
        out_proj=out_proj,
        y=y_QD,
    )
    _native.wrote(conv_state_QCK, state_QHPS)
    return y_QD


def moe_step(
    x_QD: Tensor,
    norm_D: Tensor,
    router: Tensor,
    bias_E: Tensor,
    up: Tensor,
    down: Tensor,
    shared_up: Tensor,
    shared_down: Tensor,
    expert_width: int,
    shared_width: int,
    top_k: int,
    n_group: int,
    topk_group: int,
    normalize: bool,
    scale: float,
    eps: float,
) -> Tensor:
    """An expert layer: rms_norm, linear in fp32 to the router's logits, moe_route, moe_mlp_packed, the shared expert
    (linear, squared ReLU, linear), and both sums.

    Args:
        x_QD: (Q, D). norm_D: (D,). bias_E: (E,), the router's.
        router: packed (E, D) in float32. up, down: packed (E, expert_width, D) and (E, D, expert_width).
        shared_up, shared_down: packed (shared_width, D) and (D, shared_width).
        top_k, n_group, topk_group, normalize, scale: as for `moe_route`.

    Returns:
        y_QD in the dtype of x.

    Raises:
        ValueError: an argument has the wrong shape, dtype, device, layout or range.
    """
    op = "moe_step"
    Q, D = _rows(op, x_QD)
    _vectors(op, D, norm_D=norm_D)
    check.tensor(op, "bias_E", bias_E, None, dtypes=(torch.float32,))
    check.positive(op, expert_width=expert_width, shared_width=shared_width)
    _packed(op, x_QD, up=up, down=down, shared_up=shared_up, shared_down=shared_down)
    check.tensor(op, "router", router, None, dtypes=(torch.float32,))
    _contiguous(op, bias_E=bias_E, router=router)
    y_QD = torch.empty_like(x_QD)
    _native.call(
        op,
        tokens=Q,
        width=D,
        experts=bias_E.numel(),
        top_k=top_k,
        groups=n_group,
        kept_groups=topk_group,
        expert_width=expert_width,
        shared_width=shared_width,
        normalize=int(normalize),
        eps=eps,
        scale=scale,
        dtype=_native.dtype_name(x_QD),
        x=x_QD,
        norm=norm_D,
        router=router,
        bias=bias_E,
        up=up,
        down=down,
        shared_up=shared_up,
        shared_down=shared_down,
        y=y_QD,
    )
    return y_QD


def attention_step(
    x_QD: Tensor,
    norm_D: Tensor,
    q_proj: Tensor,
    k_proj: Tensor,
    v_proj: Tensor,
    o_proj: Tensor,
    cache: Tensor,
    block_table: Tensor,
    lengths: Tensor,
    heads: int,
    eps: float,
) -> Tensor:
    """An attention layer: rms_norm, three linears, attention_decode, linear, and the sum with x.

    Args:
        x_QD: (Q, D). norm_D: (D,).
        q_proj, k_proj, v_proj, o_proj: packed (heads P, D), (kv_heads P, D) twice and (D, heads P).
        cache, block_table, lengths: as for `attention_decode`; every length lies within the table's pages.
        heads: query heads.

    Returns:
        y_QD in the dtype of x.

    Raises:
        ValueError: an argument has the wrong shape, dtype, device or layout.
    """
    op = "attention_step"
    Q, D = _rows(op, x_QD)
    _vectors(op, D, norm_D=norm_D)
    _packed(op, x_QD, q_proj=q_proj, k_proj=k_proj, v_proj=v_proj, o_proj=o_proj)
    check.tensor(op, "cache", cache, 2, None, None, None, None, dtypes=(x_QD.dtype,))
    check.tensor(op, "block_table", block_table, Q, None, dtypes=(torch.int32,))
    check.tensor(op, "lengths", lengths, Q, dtypes=(torch.int32,))
    _contiguous(op, cache=cache, block_table=block_table, lengths=lengths)
    _, blocks, block_size, kv_heads, head_dim = cache.shape
    check.positive(op, heads=heads)
    if heads % kv_heads:
        check.refuse(op, "heads", f"be a multiple of the {kv_heads} kv heads", heads)
    pages = block_table.shape[1]
    if Q and (int(lengths.max()) >= pages * block_size or int(lengths.min()) < 0):
        check.refuse(op, "lengths", f"leave room in {pages} pages of {block_size} tokens", lengths.tolist())
    if block_table.numel() and not 0 <= int(block_table.min()) <= int(block_table.max()) < blocks:
        check.refuse(op, "block_table", f"name blocks from 0 to {blocks - 1}", block_table.tolist())
    y_QD = torch.empty_like(x_QD)
    _native.call(
        op,
        sequences=Q,
        width=D,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        block_size=block_size,
        max_blocks=pages,
        window=pages * block_size + 1,
        scale=head_dim**-0.5,
        dtype=_native.dtype_name(x_QD),
        workers=torch.get_num_threads(),
        eps=eps,
        x=x_QD,
        norm=norm_D,
        q_proj=q_proj,
        k_proj=k_proj,
        v_proj=v_proj,
        o_proj=o_proj,
        keys=cache[0],
        values=cache[1],
        block_stride=cache.stride(1),
        row_stride=cache.stride(2),
        head_stride=cache.stride(3),
        block_table=block_table,
        lengths=lengths,
        y=y_QD,
    )
    _native.wrote(cache)
    return y_QD


def _rows(op: str, x_QD: Tensor) -> torch.Size:
    check.tensor(op, "x_QD", x_QD, None, None, dtypes=(torch.float32, torch.bfloat16))
    _contiguous(op, x_QD=x_QD)
    return x_QD.shape


def _vectors(op: str, count: int, **values: Tensor | None) -> None:
    for arg, value in values.items():
        if value is not None:
            check.tensor(op, arg, value, count, dtypes=(torch.float32,))
    _contiguous(op, **values)


def _packed(op: str, x_QD: Tensor, **values: Tensor) -> None:
    """The kernel holds their sizes against the layer's."""
    for arg, value in values.items():
        check.tensor(op, arg, value, None, dtypes=(x_QD.dtype,))
    _contiguous(op, **values)


def _contiguous(op: str, **values: Any) -> None:
    for arg, value in values.items():
        if value is not None and not (value.is_contiguous() and value.device.type == "cpu"):
            check.refuse(op, arg, "be contiguous on the CPU", f"strides {value.stride()} on {value.device}")
