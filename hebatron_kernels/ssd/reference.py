"""Oracle of the state-space scan: the recurrence itself, one token at a time, in fp64.

T tokens, H heads, P head dim, G groups, S state, Q sequences. Head h reads group h // (H / G).
"""

import math
from itertools import pairwise

import torch
from torch import Tensor


def ssd_scan(
    x_THP: Tensor,
    dt_TH: Tensor,
    A_H: Tensor,
    B_TGS: Tensor,
    C_TGS: Tensor,
    D_H: Tensor | None,
    dt_bias_H: Tensor | None,
    dt_limit: tuple[float, float] = (0.0, math.inf),
    cu_seqlens: Tensor | None = None,
    initial_state: Tensor | None = None,
    chunk_size: int = 128,
) -> tuple[Tensor, Tensor]:
    tokens, heads, head_dim = x_THP.shape
    bounds = [0, tokens] if cu_seqlens is None else cu_seqlens.tolist()
    state_dtype = torch.float64 if x_THP.dtype == torch.float64 else torch.float32
    zero_HPS = torch.zeros(heads, head_dim, B_TGS.shape[2], dtype=torch.float64, device=x_THP.device)
    y_rows, states = [], []
    for q, (begin, end) in enumerate(pairwise(bounds)):
        state_HPS = zero_HPS if initial_state is None else initial_state[q].double()
        for t in range(begin, end):
            y_HP, state_HPS = _one_token(
                state_HPS, x_THP[t], dt_TH[t], A_H, B_TGS[t], C_TGS[t], D_H, dt_bias_H, dt_limit
            )
            y_rows.append(y_HP)
        states.append(state_HPS)
    y_THP = torch.stack(y_rows) if y_rows else x_THP.double().clone()
    final_QHPS = torch.stack(states) if states else zero_HPS.expand(0, *zero_HPS.shape)
    return y_THP.to(x_THP.dtype), final_QHPS.to(state_dtype)


def ssd_update(
    state_QHPS: Tensor,
    x_QHP: Tensor,
    dt_QH: Tensor,
    A_H: Tensor,
    B_QGS: Tensor,
    C_QGS: Tensor,
    D_H: Tensor | None,
    dt_bias_H: Tensor | None,
    dt_limit: tuple[float, float] = (0.0, math.inf),
) -> Tensor:
    y_QHP = torch.empty_like(x_QHP)
    for q in range(x_QHP.shape[0]):
        y_HP, state_HPS = _one_token(
            state_QHPS[q].double(), x_QHP[q], dt_QH[q], A_H, B_QGS[q], C_QGS[q], D_H, dt_bias_H, dt_limit
        )
        y_QHP[q] = y_HP.to(x_QHP.dtype)
        state_QHPS[q] = state_HPS.to(state_QHPS.dtype)
    return y_QHP


def _one_token(
    state_HPS: Tensor,
    x_HP: Tensor,
    dt_H: Tensor,
    A_H: Tensor,
    B_GS: Tensor,
    C_GS: Tensor,
    D_H: Tensor | None,
    dt_bias_H: Tensor | None,
    dt_limit: tuple[float, float],
) -> tuple[Tensor, Tensor]:
    """h = exp(dt A) h + dt x B^T;  y = h C + D x."""
    x_HP = x_HP.double()
    raw_H = dt_H.double() if dt_bias_H is None else dt_H.double() + dt_bias_H.double()
    dt_H = torch.logaddexp(raw_H, torch.zeros_like(raw_H)).clamp(dt_limit[0], dt_limit[1])
    heads_per_group = x_HP.shape[0] // B_GS.shape[0]
    B_HS = B_GS.double().repeat_interleave(heads_per_group, dim=0)
    C_HS = C_GS.double().repeat_interleave(heads_per_group, dim=0)
    decay_H = torch.exp(dt_H * A_H.double())
    state_HPS = decay_H[:, None, None] * state_HPS + (dt_H[:, None] * x_HP)[:, :, None] * B_HS[:, None, :]
    y_HP = (state_HPS * C_HS[:, None, :]).sum(-1)
    return y_HP if D_H is None else y_HP + D_H.double()[:, None] * x_HP, state_HPS
