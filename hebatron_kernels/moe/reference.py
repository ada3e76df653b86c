"""The oracle of the expert operators: loops over tokens and experts in fp64, written without torch_ops.

T tokens, K experts chosen by each, N = T*K routed rows, E experts, D width, F expert width. Row n of the routed rows
belongs to slot order[n] = t*K + k.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .._layout import unpack_panels


def moe_route(
    logits_TE: Tensor,
    bias_E: Tensor,
    top_k: int,
    n_group: int = 1,
    topk_group: int = 1,
    normalize: bool = True,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    experts = logits_TE.shape[1]
    kept = torch.promote_types(logits_TE.dtype, torch.float32)
    score_TE = 1.0 / (1.0 + torch.exp(-logits_TE.double()))
    # The choice is part of the definition: scores and their sums with the bias are rounded to `kept`.
    rated = (score_TE.detach().to(kept) + bias_E.detach().to(kept)).tolist()
    ids = [_choose(row, top_k, n_group, topk_group, kept) for row in rated]
    counts = [sum(row.count(e) for row in ids) for e in range(experts)]
    rows = []
    for t, chosen in enumerate(ids):
        weight_K = torch.stack([score_TE[t, e] for e in chosen])
        if normalize:
            weight_K = weight_K / (weight_K.sum() + 1e-20)
        rows.append(weight_K * scale)
    weights_TK = torch.stack(rows) if rows else score_TE[:, :top_k]
    ids_TK = torch.tensor(ids, dtype=torch.int64, device=logits_TE.device).reshape(len(ids), top_k)
    return weights_TK.to(kept), ids_TK, torch.tensor(counts, dtype=torch.int64, device=logits_TE.device)


def _choose(rated: list[float], top_k: int, n_group: int, topk_group: int, kept: torch.dtype) -> list[int]:
    """The best experts of one token, best first; NaN before every number, equals by index."""
    size = len(rated) // n_group
    groups = list(range(n_group))
    if n_group > 1:
        best_two = [sorted(rated[g * size : (g + 1) * size], key=_rank)[:2] for g in groups]
        totals = [torch.tensor(sum(pair), dtype=torch.float64).to(kept).item() for pair in best_two]
        groups = sorted(groups, key=lambda g: (*_rank(totals[g]), g))[:topk_group]
    candidates = [e for g in groups for e in range(g * size, (g + 1) * size)]
    return sorted(candidates, key=lambda e: (*_rank(rated[e]), e))[:top_k]


def _rank(value: float) -> tuple[int, float]:
    return (0, 0.0) if math.isnan(value) else (1, -value)


def moe_permute(x_TD: Tensor, ids_TK: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    ids = ids_TK.tolist()
    top_k = ids_TK.shape[1]
    order: list[int] = []
    ends: list[int] = []
    for e in range(num_experts):
        order += [t * top_k + k for t, chosen in enumerate(ids) for k in range(top_k) if chosen[k] == e]
        ends.append(len(order))
    tokens = torch.tensor([slot // top_k for slot in order], dtype=torch.int64, device=x_TD.device)
    order_N = torch.tensor(order, dtype=torch.int64, device=x_TD.device)
    return x_TD[tokens], order_N, torch.tensor(ends, dtype=torch.int32, device=x_TD.device)


def supports_grouped_gemm(*args: object) -> str | None:
    return (
        None if args[-1] is None else f"has no implementation {args[-1]}, only the CUDA kernels have several"
    )


def grouped_gemm(
    a_ND: Tensor,
    b_EKN: Tensor,
    offsets_E: Tensor,
    rows_N: Tensor | None = None,
    scale_N: Tensor | None = None,
    activation: str | None = None,
    implementation: str | None = None,
) -> Tensor:
    left_ND = a_ND.double() if rows_N is None else a_ND.double()[rows_N.long()]
    begin, parts = 0, []
    for e, end in enumerate(offsets_E.tolist()):
        part = left_ND[begin:end] @ b_EKN[e].double()
        if activation == "relu2":
            part = torch.clamp(part, min=0.0) ** 2
        if scale_N is not None:
            part = part * scale_N[begin:end].double().unsqueeze(1)
        parts.append(part)
        begin = end
    parts.append(
        torch.zeros(left_ND.shape[0] - begin, b_EKN.shape[2], dtype=torch.float64, device=a_ND.device)
    )
    return torch.cat(parts).to(a_ND.dtype)


def moe_combine(rows_ND: Tensor, order_N: Tensor, weights_TK: Tensor, num_tokens: int) -> Tensor:
    top_k = weights_TK.shape[1]
    sums = [
        torch.zeros(rows_ND.shape[1], dtype=torch.float64, device=rows_ND.device) for _ in range(num_tokens)
    ]
    for n, slot in enumerate(order_N.tolist()):
        t, k = divmod(slot, top_k)
        sums[t] = sums[t] + weights_TK[t, k].double() * rows_ND[n].double()
    return torch.stack(sums).to(rows_ND.dtype) if sums else rows_ND[:0].clone()


def moe_combine_norm(
    rows_ND: Tensor,
    order_N: Tensor,
    weights_TK: Tensor,
    norm_D: Tensor,
    eps: float = 1e-5,
    shared_TD: Tensor | None = None,
    residual_TD: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    exact_ND = rows_ND.double()
    sum_TD = moe_combine(exact_ND, order_N, weights_TK, weights_TK.shape[0])
    for added_TD in (shared_TD, residual_TD):
        if added_TD is not None:
            sum_TD = sum_TD + added_TD.double()
    sum_TD = sum_TD.to(rows_ND.dtype)
    mean_square_T1 = (sum_TD.double() ** 2).mean(1, keepdim=True)
    y_TD = sum_TD.double() / torch.sqrt(mean_square_T1 + eps) * norm_D.double()
    return y_TD.to(rows_ND.dtype), sum_TD


def moe_mlp(x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, up_EFD: Tensor, down_EDF: Tensor) -> Tensor:
    up_EFD, down_EDF = up_EFD.to(x_TD.dtype), down_EDF.to(x_TD.dtype)  # fp32 weights are rounded at their use
    outputs = []
    for t, chosen in enumerate(ids_TK.tolist()):
        y_D = torch.zeros(x_TD.shape[1], dtype=torch.float64, device=x_TD.device)
        for k, e in enumerate(chosen):
            hidden_F = torch.clamp(up_EFD[e].double() @ x_TD[t].double(), min=0.0)
            y_D = y_D + weights_TK[t, k].double() * (down_EDF[e].double() @ (hidden_F * hidden_F))
        outputs.append(y_D)
    return torch.stack(outputs).to(x_TD.dtype) if outputs else x_TD[:0].clone()


def moe_mlp_packed(
    x_TD: Tensor,
    ids_TK: Tensor,
    weights_TK: Tensor,
    up: Tensor,
    down: Tensor,
    num_experts: int,
    expert_width: int,
) -> Tensor:
    width = x_TD.shape[1]
    up_EFD = unpack_panels(up, num_experts, expert_width, width)
    down_EDF = unpack_panels(down, num_experts, width, expert_width)
    return moe_mlp(x_TD, ids_TK, weights_TK, up_EFD, down_EDF)
