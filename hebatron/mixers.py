"""What a Mamba-2 mixer and routed experts compute between their projections, for our model and for transformers'.

T tokens, D width, C convolution channels, W taps, H heads, P head dim, G groups, S state, Q sequences, E experts,
K experts per token, F expert width.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from hebatron_kernels import causal_conv1d, causal_conv1d_update, moe_mlp, ssd_scan, ssd_update


class MambaSizes(NamedTuple):
    heads: int
    head_dim: int
    groups: int
    state: int
    time_step_limit: tuple[float, float]  # of the step after softplus
    chunk_size: int

    @property
    def inner(self) -> int:
        return self.heads * self.head_dim

    def split(self, proj_TD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The input projection's output: gate (T, H * P), what the convolution sees (T, C), raw steps (T, H)."""
        channels = self.inner + 2 * self.groups * self.state
        gate_TD, xBC_TC, dt_TH = proj_TD.split([self.inner, channels, self.heads], dim=-1)
        return gate_TD, xBC_TC, dt_TH

    def split_channels(self, xBC_TC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        width = self.groups * self.state
        x_TD, B_TD, C_TD = xBC_TC.split([self.inner, width, width], dim=-1)
        x_THP = x_TD.unflatten(1, (self.heads, self.head_dim))
        B_TGS, C_TGS = (part.unflatten(1, (self.groups, self.state)) for part in (B_TD, C_TD))
        return x_THP, B_TGS, C_TGS


class MambaWeights(NamedTuple):
    conv_CW: Tensor
    conv_bias_C: Tensor | None
    A_H: Tensor  # -exp(A_log)
    D_H: Tensor
    dt_bias_H: Tensor


MambaState = tuple[Tensor, Tensor]  # (Q, C, W - 1) last inputs of the convolution; (Q, H, P, S) of the scan


def mamba2(
    sizes: MambaSizes,
    weights: MambaWeights,
    xBC_TC: Tensor,
    dt_TH: Tensor,
    cu_seqlens: Tensor | None,
    state: MambaState | None = None,
) -> tuple[Tensor, MambaState]:
    """Convolution and scan of whole sequences: (T, H * P), and the states they end in."""
    conv, ssm = (None, None) if state is None else state
    xBC_TC, conv = causal_conv1d(
        xBC_TC, weights.conv_CW, weights.conv_bias_C, "silu", cu_seqlens, initial_state=conv
    )
    x_THP, B_TGS, C_TGS = sizes.split_channels(xBC_TC)
    steps = (weights.D_H, weights.dt_bias_H, sizes.time_step_limit)
    y_THP, ssm = ssd_scan(x_THP, dt_TH, weights.A_H, B_TGS, C_TGS, *steps, cu_seqlens, ssm, sizes.chunk_size)
    return y_THP.flatten(1), (conv, ssm)


def mamba2_update(
    sizes: MambaSizes, weights: MambaWeights, xBC_QC: Tensor, dt_QH: Tensor, state: MambaState
) -> Tensor:
    """The same for one token of each sequence: (Q, H * P); the states are overwritten."""
    conv, ssm = state
    xBC_QC = causal_conv1d_update(xBC_QC, conv, weights.conv_CW, weights.conv_bias_C, "silu")
    x_QHP, B_QGS, C_QGS = sizes.split_channels(xBC_QC)
    steps = (weights.D_H, weights.dt_bias_H, sizes.time_step_limit)
    return ssd_update(ssm, x_QHP, dt_QH, weights.A_H, B_QGS, C_QGS, *steps).flatten(1)


def routed_experts(
    x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, up_EFD: Tensor, down_EDF: Tensor
) -> Tensor:
    """`moe_mlp` in the dtype of x, whatever the weights are kept in."""
    # the operator rounds fp32 weights under bf16 itself, without a copy
    if (x_TD.dtype, up_EFD.dtype) != (torch.bfloat16, torch.float32):
        up_EFD, down_EDF = up_EFD.to(x_TD.dtype), down_EDF.to(x_TD.dtype)
    return moe_mlp(x_TD, ids_TK, weights_TK, up_EFD, down_EDF)
