"""Oracle of the causal convolution: explicit sums over the taps, in fp64, one token at a time.

T tokens, C channels, W taps, Q sequences, K = W - 1 past inputs.
"""

from itertools import pairwise

import torch
from torch import Tensor


def causal_conv1d(
    x_TC: Tensor,
    weight_CW: Tensor,
    bias_C: Tensor | None,
    activation: str | None,
    cu_seqlens: Tensor | None = None,
    initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    tokens, channels = x_TC.shape
    taps = weight_CW.shape[1]
    bounds = [0, tokens] if cu_seqlens is None else cu_seqlens.tolist()
    y_rows, states = [], []
    for q, (begin, end) in enumerate(pairwise(bounds)):
        if initial_state is None:
            past_KC = torch.zeros(taps - 1, channels, dtype=torch.float64, device=x_TC.device)
        else:
            past_KC = initial_state[q].double().T
        inputs = torch.cat([past_KC, x_TC[begin:end].double()])
        for t in range(end - begin):
            y_rows.append(_one_token(inputs[t : t + taps], weight_CW, bias_C, activation))
        states.append(inputs[end - begin :].T)
    y_TC = torch.stack(y_rows) if y_rows else x_TC.double().clone()
    empty_state = torch.zeros(0, channels, taps - 1, dtype=torch.float64, device=x_TC.device)
    return y_TC.to(x_TC.dtype), (torch.stack(states) if states else empty_state).to(x_TC.dtype)


def causal_conv1d_update(
    x_QC: Tensor,
    conv_state_QCK: Tensor,
    weight_CW: Tensor,
    bias_C: Tensor | None,
    activation: str | None,
) -> Tensor:
    y_QC = torch.empty_like(x_QC)
    for q in range(x_QC.shape[0]):
        inputs = torch.cat([conv_state_QCK[q].double().T, x_QC[q : q + 1].double()])
        y_QC[q] = _one_token(inputs, weight_CW, bias_C, activation).to(x_QC.dtype)
        conv_state_QCK[q] = inputs[1:].T.to(conv_state_QCK.dtype)
    return y_QC


def _one_token(inputs_WC: Tensor, weight_CW: Tensor, bias_C: Tensor | None, activation: str | None) -> Tensor:
    total_C = torch.zeros_like(inputs_WC[0]) if bias_C is None else bias_C.double()
    for w in range(weight_CW.shape[1]):
        total_C = total_C + weight_CW[:, w].double() * inputs_WC[w]
    return total_C * torch.sigmoid(total_C) if activation == "silu" else total_C
