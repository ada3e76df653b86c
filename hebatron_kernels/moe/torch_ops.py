"""The expert operators in torch, for every device and dtype, with hand-ordered gradients.

T tokens, K experts chosen by each, N = T*K routed rows, E experts, D width, F expert width. Row n of the routed rows
belongs to slot order[n] = t*K + k, and position[t, k] is the row of that slot.

Which product: grouped_mm wherever it takes the operands (bf16, fp16, fp32, widths and strides of 16 bytes), a loop
over the experts elsewhere (fp64, odd widths). On the CPU grouped_mm is never the slower: one thread, ms, E=16 D=F=192
N=8192 fp32 7.5 against 7.7, bf16 3.5 against 3.8; E=128 D=768 F=544 N=3072 fp32 45.9 against 46.8, bf16 28.1 against
29.6.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from .. import _native
from .._packing import unpack

_grouped_mm: Any = (
    F.grouped_mm if hasattr(F, "grouped_mm") else torch._grouped_mm
)  # where the name is still private


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
    # fp64 and one rounding: torch's fp32 sigmoid gives 4 % of values another last bit in the vector's body than in
    # its tail, so equal logits would not tie and a token's experts would depend on its place in the batch.
    choice_TE = logits_TE.detach().double().sigmoid().to(kept) + bias_E.detach().to(kept)
    if n_group > 1:
        choice_TE = _keep_best_groups(choice_TE, n_group, topk_group)
    # A stable sort, NaN first, where topk leaves the order of equals open.
    ids_TK = torch.sort(choice_TE, dim=1, descending=True, stable=True).indices[:, :top_k].contiguous()
    weights_TK = logits_TE.gather(1, ids_TK).double().sigmoid()
    if normalize:
        weights_TK = weights_TK / (weights_TK.sum(1, keepdim=True) + 1e-20)
    return (weights_TK * scale).to(kept), ids_TK, _count(ids_TK.reshape(-1), experts, torch.int64)


def _keep_best_groups(choice_TE: Tensor, n_group: int, topk_group: int) -> Tensor:
    """-inf outside the topk_group groups with the largest sum of their two best; inside, -inf becomes finite."""
    choice_TGS = choice_TE.unflatten(1, (n_group, -1))
    total_TG = choice_TGS.topk(2, dim=2).values.sum(2)
    best_Tg = torch.sort(total_TG, dim=1, descending=True, stable=True).indices[:, :topk_group]
    outside_TG = torch.ones_like(total_TG, dtype=torch.bool).scatter(1, best_Tg, False)
    inside_TGS = choice_TGS.clamp(min=torch.finfo(choice_TE.dtype).min)
    return inside_TGS.masked_fill(outside_TG.unsqueeze(2), -torch.inf).flatten(1)


def moe_permute(x_TD: Tensor, ids_TK: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    order_N, offsets_E = sort_by_expert(ids_TK, num_experts)
    return _Permute.apply(x_TD, order_N, ids_TK.shape[1]), order_N, offsets_E


def supports_grouped_gemm(*args: object) -> str | None:
    return (
        None if args[-1] is None else f"has no implementation {args[-1]}, only the CUDA kernels have several"
    )


def host_reads_grouped_gemm(a_ND: Tensor, b_EKN: Tensor, *others: object) -> str | None:
    return _reads_offsets(a_ND, b_EKN)


def grouped_gemm(
    a_ND: Tensor,
    b_EKN: Tensor,
    offsets_E: Tensor,
    rows_N: Tensor | None = None,
    scale_N: Tensor | None = None,
    activation: str | None = None,
    implementation: str | None = None,
) -> Tensor:
    left_ND = a_ND if rows_N is None else _Gather.apply(a_ND, rows_N)
    product_NM = _GroupedGemm.apply(left_ND, b_EKN, offsets_E)
    if scale_N is None and activation is None:
        return product_NM
    compute = torch.promote_types(a_ND.dtype, torch.float32)
    out_NM = product_NM.to(compute)
    if activation == "relu2":
        out_NM = out_NM.relu().square()
    if scale_N is not None:
        out_NM = out_NM * scale_N.to(compute).unsqueeze(1)
    return out_NM.masked_fill(past_end(out_NM, offsets_E), 0.0).to(a_ND.dtype)


def moe_combine(rows_ND: Tensor, order_N: Tensor, weights_TK: Tensor, num_tokens: int) -> Tensor:
    return _Combine.apply(rows_ND, order_N, weights_TK)


def moe_combine_norm(
    rows_ND: Tensor,
    order_N: Tensor,
    weights_TK: Tensor,
    norm_D: Tensor,
    eps: float = 1e-5,
    shared_TD: Tensor | None = None,
    residual_TD: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    compute = torch.promote_types(rows_ND.dtype, torch.float32)
    sum_TD = moe_combine(rows_ND, order_N, weights_TK, weights_TK.shape[0])
    for added_TD in (shared_TD, residual_TD):
        sum_TD = sum_TD if added_TD is None else sum_TD + added_TD
    normed_TD = F.rms_norm(sum_TD.to(compute), sum_TD.shape[1:], eps=eps)
    return (normed_TD * norm_D.to(compute)).to(rows_ND.dtype), sum_TD


def host_reads_moe_mlp(
    x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, up_EFD: Tensor, down_EDF: Tensor
) -> str | None:
    return _reads_offsets(x_TD, up_EFD) or _reads_offsets(x_TD, down_EDF)


def moe_mlp(x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, up_EFD: Tensor, down_EDF: Tensor) -> Tensor:
    return _MoeMlp.apply(x_TD, ids_TK, weights_TK, up_EFD.to(x_TD.dtype), down_EDF.to(x_TD.dtype))


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
    up_EFD = unpack(up, num_experts, expert_width, width)
    down_EDF = unpack(down, num_experts, width, expert_width)
    return moe_mlp(x_TD, ids_TK, weights_TK, up_EFD, down_EDF)


def _count(ids_N: Tensor, experts: int, dtype: torch.dtype) -> Tensor:
    counts_E = torch.zeros(experts, dtype=dtype, device=ids_N.device)
    ones_N = torch.ones(1, dtype=dtype, device=ids_N.device).expand(ids_N.numel())
    return counts_E.scatter_add(0, ids_N.long(), ones_N)  # bincount would synchronise on a GPU


def sort_by_expert(ids_TK: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    """order_N, the slots by expert and then by themselves, and offsets_E."""
    ids_N = ids_TK.reshape(-1)
    offsets_E = _count(ids_N, experts, torch.int32).cumsum(0, dtype=torch.int32)
    return torch.argsort(ids_N, stable=True), offsets_E


def positions(order_N: Tensor, top_k: int) -> Tensor:
    """(T, K): the row of each slot."""
    rows_N = torch.arange(order_N.numel(), device=order_N.device)
    return torch.empty_like(order_N).scatter_(0, order_N, rows_N).view(-1, top_k)


def tokens_of(order_N: Tensor, top_k: int) -> Tensor:
    """(N,): the token of each row."""
    return torch.div(order_N, top_k, rounding_mode="floor")


def sum_rows(rows_ND: Tensor, position_TK: Tensor, weights_TK: Tensor | None = None) -> Tensor:
    """y_t = sum_k weight * rows[position[t, k]] in fp32, rounded once. embedding_bag gathers and sums in one pass:
    0.14 ms where index_select and sum take 0.86 (T=4096, K=2, D=192, fp32, one thread)."""
    weights_TK = None if weights_TK is None else weights_TK.to(rows_ND.dtype)
    return F.embedding_bag(position_TK, rows_ND, mode="sum", per_sample_weights=weights_TK)


def _fits(like: Tensor, *sizes: int) -> bool:
    """grouped_mm wants widths and strides that are multiples of 16 bytes."""
    per_16_bytes = 16 // like.element_size()
    return like.dtype != torch.float64 and all(n % per_16_bytes == 0 for n in sizes)


def _reads_offsets(a_NK: Tensor, b_EKM: Tensor) -> str | None:
    """Why the experts' ends are read on the host, or None."""
    if not a_NK.is_cuda:
        return None
    fits = _fits(a_NK, *b_EKM.shape[1:], *(s for s in b_EKM.stride() if s != 1))
    return offsets_read(a_NK.dtype, _native.arch_of(a_NK.get_device()), fits)


def offsets_read(dtype: torch.dtype, arch: str, fits: bool) -> str | None:
    """grouped_mm has a kernel for bf16 on compute capability 9.x and 10.x (torch 2.10); elsewhere it copies the ends to
    the host and loops, as the loop here does."""
    if fits and dtype == torch.bfloat16 and arch in ("sm_90", "sm_100", "sm_103"):
        return None
    return f"the experts' ends: torch's grouped_mm has no kernel for {str(dtype).removeprefix('torch.')} on {arch}"


def _dense(b_EKM: Tensor) -> bool:
    return b_EKM.stride(2) == 1 and b_EKM.stride(1) >= b_EKM.shape[2]


def _rows(x: Tensor) -> Tensor:
    """Contiguous by its strides too: of a single row, or none, torch asks no stride, but grouped_mm does."""
    return x.contiguous().flatten().view(x.shape)


def _gemm_impl(a_NK: Tensor, b_EKM: Tensor, offsets_E: Tensor) -> Tensor:
    a_NK = _rows(a_NK)
    if not (_dense(b_EKM) or _dense(b_EKM.transpose(1, 2))):
        b_EKM = b_EKM.contiguous()
    if _fits(a_NK, *b_EKM.shape[1:], *(s for s in b_EKM.stride() if s != 1)):
        return _grouped_mm(a_NK, b_EKM, offs=offsets_E)
    out_NM = a_NK.new_empty(a_NK.shape[0], b_EKM.shape[2])
    begin = 0
    for e, end in enumerate(offsets_E.tolist()):
        torch.mm(a_NK[begin:end], b_EKM[e], out=out_NM[begin:end])
        begin = end
    return out_NM


def _weight_gemm_impl(a_NK: Tensor, b_NM: Tensor, offsets_E: Tensor) -> Tensor:
    a_NK, b_NM = _rows(a_NK), _rows(b_NM)
    if _fits(a_NK, a_NK.shape[1], b_NM.shape[1]):
        return _grouped_mm(a_NK.t(), b_NM, offs=offsets_E)
    out_EKM = a_NK.new_empty(offsets_E.numel(), a_NK.shape[1], b_NM.shape[1])
    begin = 0
    for e, end in enumerate(offsets_E.tolist()):
        torch.mm(a_NK[begin:end].t(), b_NM[begin:end], out=out_EKM[e])
        begin = end
    return out_EKM


# Ops of their own: torch.compile cannot trace grouped_mm in fp32 (its fake form knows bf16 only), nor a loop that
# reads the offsets on the host.
_library = torch.library.Library("hebatron", "FRAGMENT")
_library.define("_torch_gemm(Tensor a, Tensor b, Tensor offsets) -> Tensor")
_library.impl("_torch_gemm", _gemm_impl, "CompositeExplicitAutograd")
_library.define("_torch_weight_gemm(Tensor a, Tensor b, Tensor offsets) -> Tensor")
_library.impl("_torch_weight_gemm", _weight_gemm_impl, "CompositeExplicitAutograd")


@torch.library.register_fake("hebatron::_torch_gemm", lib=_library)
def _fake_gemm(a: Tensor, b: Tensor, offsets: Tensor) -> Tensor:
    return a.new_empty(a.shape[0], b.shape[2])


@torch.library.register_fake("hebatron::_torch_weight_gemm", lib=_library)
def _fake_weight_gemm(a: Tensor, b: Tensor, offsets: Tensor) -> Tensor:
    return a.new_empty(offsets.shape[0], a.shape[1], b.shape[1])


def _gemm(a_NK: Tensor, b_EKM: Tensor, offsets_E: Tensor) -> Tensor:
    """(N, M): the rows of each expert times its b. Rows past offsets[-1] are neither read nor written."""
    return torch.ops.hebatron._torch_gemm(a_NK, b_EKM, offsets_E)


def _weight_gemm(a_NK: Tensor, b_NM: Tensor, offsets_E: Tensor) -> Tensor:
    """(E, K, M): each expert's rows of a, transposed, times its rows of b; exactly 0 for one without rows."""
    return torch.ops.hebatron._torch_weight_gemm(a_NK, b_NM, offsets_E)


def past_end(out_NM: Tensor, offsets_E: Tensor) -> Tensor:
    return (torch.arange(out_NM.shape[0], device=out_NM.device) >= offsets_E[-1]).unsqueeze(1)


def _zero_past_end(out_NM: Tensor, offsets_E: Tensor) -> Tensor:
    return out_NM.masked_fill_(past_end(out_NM, offsets_E), 0.0)


def sum_uses(grad_ND: Tensor, rows_N: Tensor, count: int) -> Tensor:
    """(count, D): the sum of the rows n with rows[n] = r, in their order, in fp32, rounded once."""
    uses_R = _count(rows_N, count, torch.int64)
    users_N = torch.argsort(rows_N, stable=True)
    return F.embedding_bag(users_N, grad_ND, uses_R.cumsum(0) - uses_R, mode="sum")


class _Gather(torch.autograd.Function):
    """a[rows]; the gradient of a row of a is summed over its uses in fp32 and rounded once."""

    @staticmethod
    def forward(ctx: Any, a_RD: Tensor, rows_N: Tensor) -> Tensor:
        ctx.save_for_backward(rows_N)
        ctx.count = a_RD.shape[0]
        return a_RD.index_select(0, rows_N)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_ND: Tensor) -> tuple[Tensor, None]:
        (rows_N,) = ctx.saved_tensors
        return sum_uses(grad_ND, rows_N, ctx.count), None


class _Permute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, order_N: Tensor, top_k: int) -> Tensor:
        ctx.save_for_backward(order_N)
        ctx.top_k = top_k
        return x_TD.index_select(0, tokens_of(order_N, top_k))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_rows_ND: Tensor) -> tuple[Tensor, None, None]:
        (order_N,) = ctx.saved_tensors
        return sum_rows(grad_rows_ND, positions(order_N, ctx.top_k)), None, None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows_ND: Tensor, order_N: Tensor, weights_TK: Tensor) -> Tensor:
        ctx.save_for_backward(rows_ND, order_N, weights_TK)
        return sum_rows(rows_ND, positions(order_N, weights_TK.shape[1]), weights_TK)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y_TD: Tensor) -> tuple[Tensor, None, Tensor]:
        rows_ND, order_N, weights_TK = ctx.saved_tensors
        top_k = weights_TK.shape[1]
        grad_y_ND = grad_y_TD.index_select(0, tokens_of(order_N, top_k))
        grad_weights_N = _row_dots(rows_ND, grad_y_ND, weights_TK.dtype)
        grad_rows_ND = grad_y_ND.mul_(_by_row(weights_TK, order_N, rows_ND.dtype))
        return grad_rows_ND, None, by_slot(grad_weights_N, order_N, top_k)


class _GroupedGemm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a_ND: Tensor, b_EKN: Tensor, offsets_E: Tensor) -> Tensor:
        ctx.save_for_backward(a_ND, b_EKN, offsets_E)
        return _zero_past_end(_gemm(a_ND, b_EKN, offsets_E), offsets_E)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        a_ND, b_EKN, offsets_E = ctx.saved_tensors
        grad_a = grad_b = None
        if ctx.needs_input_grad[0]:
            grad_a = _zero_past_end(_gemm(grad, b_EKN.transpose(1, 2), offsets_E), offsets_E)
        if ctx.needs_input_grad[1]:
            # In the layout of b, so that a stored (E, N, K) gets its gradient without a copy.
            if b_EKN.stride(2) == 1:
                grad_b = _weight_gemm(a_ND, grad, offsets_E)
            else:
                grad_b = _weight_gemm(grad, a_ND, offsets_E).transpose(1, 2)
        return grad_a, grad_b, None


class _MoeMlp(torch.autograd.Function):
    """The weight multiplies the activation, not the output: its gradient is then a dot over F beside da, and only
    the pre-activation (N, F) is kept for the backward; the rows of x and the activation are made again."""

    @staticmethod
    def forward(
        ctx: Any, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, up_EFD: Tensor, down_EDF: Tensor
    ) -> Tensor:
        top_k = ids_TK.shape[1]
        order_N, offsets_E = sort_by_expert(ids_TK, up_EFD.shape[0])
        x_ND = x_TD.index_select(0, tokens_of(order_N, top_k))
        hidden_NF = _gemm(x_ND, up_EFD.transpose(1, 2), offsets_E)
        ctx.save_for_backward(x_TD, weights_TK, up_EFD, down_EDF, order_N, offsets_E, hidden_NF)
        active_NF = hidden_NF.relu()
        active_NF.mul_(active_NF).mul_(_by_row(weights_TK, order_N, x_TD.dtype))
        rows_ND = _gemm(active_NF, down_EDF.transpose(1, 2), offsets_E)
        return sum_rows(rows_ND, positions(order_N, top_k))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y_TD: Tensor) -> tuple[Tensor | None, ...]:
        x_TD, weights_TK, up_EFD, down_EDF, order_N, offsets_E, hidden_NF = ctx.saved_tensors
        top_k = weights_TK.shape[1]
        tokens_N = tokens_of(order_N, top_k)
        weight_N1 = _by_row(weights_TK, order_N, x_TD.dtype)
        grad_y_ND = grad_y_TD.index_select(0, tokens_N)
        relu_NF = hidden_NF.relu()
        grad_x = grad_weights = grad_up = grad_down = None
        if any(ctx.needs_input_grad[i] for i in (0, 2, 3)):
            # With r = relu(h), a = r^2 and g = dy @ down: d weight = a . g and dh = 2 * weight * r * g.
            grad_NF = _gemm(grad_y_ND, down_EDF, offsets_E).mul_(relu_NF)
            grad_weights = by_slot(_row_dots(relu_NF, grad_NF, weights_TK.dtype), order_N, top_k)
            grad_NF.mul_(2.0 * weight_N1)
            if ctx.needs_input_grad[0]:
                grad_x = sum_rows(_gemm(grad_NF, up_EFD, offsets_E), positions(order_N, top_k))
            if ctx.needs_input_grad[3]:
                grad_up = _weight_gemm(grad_NF, x_TD.index_select(0, tokens_N), offsets_E)
        if ctx.needs_input_grad[4]:
            active_NF = relu_NF.mul_(relu_NF).mul_(weight_N1)
            grad_down = _weight_gemm(grad_y_ND, active_NF, offsets_E)
        return grad_x, None, grad_weights, grad_up, grad_down


def _by_row(weights_TK: Tensor, order_N: Tensor, dtype: torch.dtype) -> Tensor:
    return weights_TK.reshape(-1).index_select(0, order_N).to(dtype).unsqueeze(1)


def by_slot(value_N: Tensor, order_N: Tensor, top_k: int) -> Tensor:
    return torch.empty_like(value_N).scatter_(0, order_N, value_N).view(-1, top_k)


def _row_dots(a_NM: Tensor, b_NM: Tensor, dtype: torch.dtype) -> Tensor:
    return (a_NM * b_NM).sum(1, dtype=dtype)
