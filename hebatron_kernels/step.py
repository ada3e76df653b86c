"""One token of a whole layer in one call of the native CPU module, for models packed for inference.

Not operators of their own: each is the operators of the layer one after another, y = x + mixer(rms_norm(x)), equal
to them to the bit, without the 20 us and more that a call from Python costs: what does not change from token to
token is checked once, when the object is made. It keeps the tensors it was given; a copy keeps copies. A caller asks
`step_available` first: where it is false the operators serve.

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


class Step:
    """`numbers` and `tensors` are the kernel's arguments that stay, by keyword."""

    op: str
    kind: int  # enum LayerKind of csrc/hebatron/ops.h
    states: int  # tensors that are one layer's alone

    def __init__(
        self, given: tuple[Any, ...], numbers: dict[str, Any], tensors: dict[str, Tensor | None]
    ) -> None:
        self._given, self._tensors = given, tensors
        self._fixed = numbers | {k: None if v is None else v.data_ptr() for k, v in tensors.items()}

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), self._given  # addresses are not copied

    def arguments(self, Q: int, *state: Tensor) -> dict[str, Any]:
        """The kernel's, for these states of Q sequences, without x and y."""
        raise NotImplementedError

    def _run(self, x_QD: Tensor, *state: Tensor) -> Tensor:
        Q = _rows(self.op, x_QD, self.width, self.dtype)
        y_QD = torch.empty_like(x_QD)
        _native.call(self.op, **(self.arguments(Q, *state) | {"x": x_QD, "y": y_QD}))
        return y_QD

    def _read(self, dtype: torch.dtype, width: int) -> None:
        if dtype not in _native.DTYPES:
            check.refuse(self.op, "the packed matrices", "have dtype float32 or bfloat16", dtype)
        self.dtype, self.width = dtype, width


class MambaStep(Step):
    """A Mamba-2 layer: rms_norm, linear to z, x B C and dt, causal_conv1d_update with silu, ssd_update, rms_norm gated
    by z in G groups, linear, and the sum with x.

    Args:
        norm_D, gate_norm: (D,) and (H * P,), weights of the norms.
        in_proj, out_proj: packed (2 H P + 2 G S + H, D) and (D, H P).
        conv_weight_CW, conv_bias_C: (C, W) and (C,) or None, with C = H P + 2 G S.
        A_H, D_H, dt_bias_H: (H,).
        head_dim, state_dim, groups: P, S, G.
        dt_limit: bounds of the step size.

    Called with x_QD (Q, D), conv_state_QCK (Q, C, W - 1) in its dtype and state_QHPS (Q, H, P, S) in fp32, both
    advanced in place; returns y_QD.

    Raises:
        ValueError: an argument has the wrong shape, dtype, device or layout.
    """

    op = "mamba_step"
    kind, states = 0, 2

    def __init__(
        self,
        norm_D: Tensor,
        in_proj: Tensor,
        conv_weight_CW: Tensor,
        conv_bias_C: Tensor | None,
        A_H: Tensor,
        D_H: Tensor,
        dt_bias_H: Tensor,
        gate_norm: Tensor,
        out_proj: Tensor,
        head_dim: int,
        state_dim: int,
        groups: int,
        eps: float,
        dt_limit: tuple[float, float],
    ) -> None:
        op = self.op
        check.positive(op, head_dim=head_dim, state_dim=state_dim, groups=groups)
        check.tensor(op, "norm_D", norm_D, None, dtypes=(torch.float32,))
        check.tensor(op, "A_H", A_H, None, dtypes=(torch.float32,))
        self._read(in_proj.dtype, norm_D.numel())
        H = A_H.numel()
        if H % groups:
            check.refuse(op, "groups", f"divide the {H} heads", groups)
        C = H * head_dim + 2 * groups * state_dim
        check.tensor(op, "conv_weight_CW", conv_weight_CW, C, None, dtypes=(torch.float32,))
        taps = conv_weight_CW.shape[1]
        _vectors(op, H, A_H=A_H, D_H=D_H, dt_bias_H=dt_bias_H)
        _vectors(op, H * head_dim, gate_norm=gate_norm)
        _vectors(op, C, conv_bias_C=conv_bias_C)
        packed(op, self.dtype, in_proj=in_proj, out_proj=out_proj)
        contiguous(op, norm_D=norm_D, conv_weight_CW=conv_weight_CW)
        self.conv_shape, self.state_shape = (C, taps - 1), (H, head_dim, state_dim)
        given = (norm_D, in_proj, conv_weight_CW, conv_bias_C, A_H, D_H, dt_bias_H, gate_norm, out_proj)
        names = ("norm", "in_proj", "conv_weight", "conv_bias", "A", "D", "dt_bias", "gate_norm", "out_proj")
        numbers = {
            "width": self.width,
            "heads": H,
            "head_dim": head_dim,
            "groups": groups,
            "state_dim": state_dim,
            "taps": taps,
            "eps": eps,
            "dt_min": dt_limit[0],
            "dt_max": dt_limit[1],
            "dtype": _native.DTYPES[self.dtype],
        }
        sizes = (head_dim, state_dim, groups, eps, dt_limit)
        super().__init__((*given, *sizes), numbers, dict(zip(names, given)))

    def arguments(self, Q: int, *state: Tensor) -> dict[str, Any]:
        conv_state_QCK, state_QHPS = state
        check.tensor(self.op, "conv_state_QCK", conv_state_QCK, Q, *self.conv_shape, dtypes=(self.dtype,))
        check.tensor(self.op, "state_QHPS", state_QHPS, Q, *self.state_shape, dtypes=(torch.float32,))
        contiguous(self.op, conv_state_QCK=conv_state_QCK, state_QHPS=state_QHPS)
        states = {"conv_state": conv_state_QCK.data_ptr(), "state": state_QHPS.data_ptr()}
        return self._fixed | states | {"sequences": Q}

    def __call__(self, x_QD: Tensor, conv_state_QCK: Tensor, state_QHPS: Tensor) -> Tensor:
        y_QD = self._run(x_QD, conv_state_QCK, state_QHPS)
        _native.wrote(conv_state_QCK, state_QHPS)
        return y_QD


class MoeStep(Step):
    """An expert layer: rms_norm, linear in fp32 to the router's logits, moe_route, moe_mlp_packed, the shared expert
    (linear, squared ReLU, linear), and both sums.

    Args:
        norm_D: (D,). bias_E: (E,), the router's.
        router: packed (E, D) in float32. up, down: packed (E, expert_width, D) and (E, D, expert_width).
        shared_up, shared_down: packed (shared_width, D) and (D, shared_width).
        top_k, n_group, topk_group, normalize, scale: as for `moe_route`.

    Called with x_QD (Q, D); returns y_QD.

    Raises:
        ValueError: an argument has the wrong shape, dtype, device, layout or range.
    """

    op = "moe_step"
    kind, states = 1, 0

    def __init__(
        self,
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
    ) -> None:
        op = self.op
        check.tensor(op, "norm_D", norm_D, None, dtypes=(torch.float32,))
        check.tensor(op, "bias_E", bias_E, None, dtypes=(torch.float32,))
        check.positive(op, expert_width=expert_width, shared_width=shared_width)
        self._read(up.dtype, norm_D.numel())
        packed(op, self.dtype, up=up, down=down, shared_up=shared_up, shared_down=shared_down)
        check.tensor(op, "router", router, None, dtypes=(torch.float32,))
        contiguous(op, norm_D=norm_D, bias_E=bias_E, router=router)
        given = (norm_D, router, bias_E, up, down, shared_up, shared_down)
        names = ("norm", "router", "bias", "up", "down", "shared_up", "shared_down")
        numbers = {
            "width": self.width,
            "experts": bias_E.numel(),
            "top_k": top_k,
            "groups": n_group,
            "kept_groups": topk_group,
            "expert_width": expert_width,
            "shared_width": shared_width,
            "normalize": int(normalize),
            "eps": eps,
            "scale": scale,
            "dtype": _native.DTYPES[self.dtype],
        }
        sizes = (expert_width, shared_width, top_k, n_group, topk_group, normalize, scale, eps)
        super().__init__((*given, *sizes), numbers, dict(zip(names, given)))

    def arguments(self, Q: int, *state: Tensor) -> dict[str, Any]:
        return self._fixed | {"tokens": Q}

    def __call__(self, x_QD: Tensor) -> Tensor:
        return self._run(x_QD)


class AttentionStep(Step):
    """An attention layer: rms_norm, three linears, attention_decode, linear, and the sum with x.

    Args:
        norm_D: (D,).
        q_proj, k_proj, v_proj, o_proj: packed (heads P, D), (kv_heads P, D) twice and (D, heads P).
        heads, kv_heads, head_dim: of queries, of keys and values, P.

    Called with x_QD (Q, D) and cache, block_table, lengths as `attention_decode` is; returns y_QD.

    Raises:
        ValueError: an argument has the wrong shape, dtype, device, layout or range.
    """

    op = "attention_step"
    kind, states = 2, 1

    def __init__(
        self,
        norm_D: Tensor,
        q_proj: Tensor,
        k_proj: Tensor,
        v_proj: Tensor,
        o_proj: Tensor,
        heads: int,
        kv_heads: int,
        head_dim: int,
        eps: float,
    ) -> None:
        op = self.op
        check.tensor(op, "norm_D", norm_D, None, dtypes=(torch.float32,))
        check.positive(op, heads=heads, kv_heads=kv_heads, head_dim=head_dim)
        if heads % kv_heads:
            check.refuse(op, "heads", f"be a multiple of the {kv_heads} kv heads", heads)
        self._read(q_proj.dtype, norm_D.numel())
        packed(op, self.dtype, q_proj=q_proj, k_proj=k_proj, v_proj=v_proj, o_proj=o_proj)
        contiguous(op, norm_D=norm_D)
        self.key_shape = (kv_heads, head_dim)
        given = (norm_D, q_proj, k_proj, v_proj, o_proj)
        numbers = {
            "width": self.width,
            "heads": heads,
            "kv_heads": kv_heads,
            "head_dim": head_dim,
            "scale": head_dim**-0.5,
            "eps": eps,
            "dtype": _native.DTYPES[self.dtype],
        }
        names = ("norm", "q_proj", "k_proj", "v_proj", "o_proj")
        super().__init__((*given, heads, kv_heads, head_dim, eps), numbers, dict(zip(names, given)))

    def arguments(self, Q: int, *state: Tensor) -> dict[str, Any]:
        op, (cache, block_table, lengths) = self.op, state
        check.tensor(op, "cache", cache, 2, None, None, *self.key_shape, dtypes=(self.dtype,))
        check.tensor(op, "block_table", block_table, Q, None, dtypes=(torch.int32,))
        check.tensor(op, "lengths", lengths, Q, dtypes=(torch.int32,))
        contiguous(op, cache=cache, block_table=block_table, lengths=lengths)
        _, blocks, block_size, _, _ = cache.shape
        pages = block_table.shape[1]
        if Q and (int(lengths.max()) >= pages * block_size or int(lengths.min()) < 0):
            check.refuse(
                op, "lengths", f"leave room in {pages} pages of {block_size} tokens", lengths.tolist()
            )
        if block_table.numel() and not 0 <= int(block_table.min()) <= int(block_table.max()) < blocks:
            check.refuse(op, "block_table", f"name blocks from 0 to {blocks - 1}", block_table.tolist())
        keys = cache.data_ptr()
        return self._fixed | {
            "sequences": Q,
            "block_size": block_size,
            "max_blocks": pages,
            "window": pages * block_size + 1,
            "workers": torch.get_num_threads(),
            "keys": keys,
            "values": keys + cache.stride(0) * cache.element_size(),
            "block_stride": cache.stride(1),
            "row_stride": cache.stride(2),
            "head_stride": cache.stride(3),
            "block_table": block_table.data_ptr(),
            "lengths": lengths.data_ptr(),
        }

    def __call__(self, x_QD: Tensor, cache: Tensor, block_table: Tensor, lengths: Tensor) -> Tensor:
        y_QD = self._run(x_QD, cache, block_table, lengths)
        _native.wrote(cache)
        return y_QD


def _rows(op: str, x_QD: Tensor, width: int, dtype: torch.dtype) -> int:
    check.tensor(op, "x_QD", x_QD, None, width, dtypes=(dtype,))
    contiguous(op, x_QD=x_QD)
    return x_QD.shape[0]


def _vectors(op: str, count: int, **values: Tensor | None) -> None:
    for arg, value in values.items():
        if value is not None:
            check.tensor(op, arg, value, count, dtypes=(torch.float32,))
    contiguous(op, **values)


def packed(op: str, dtype: torch.dtype, **values: Tensor) -> None:
    """The kernel holds their sizes against the layer's."""
    for arg, value in values.items():
        check.tensor(op, arg, value, None, dtypes=(dtype,))
    contiguous(op, **values)


def contiguous(op: str, **values: Tensor | None) -> None:
    for arg, value in values.items():
        if value is not None and not (value.is_contiguous() and value.is_cpu):
            check.refuse(op, arg, "be contiguous on the CPU", f"strides {value.stride()} on {value.device}")
