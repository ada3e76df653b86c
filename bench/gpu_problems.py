"""What the GPU timing table holds: our kernels at the model's shapes beside their rivals, and torch's own bars.

T tokens, E experts, K chosen, N = T*K routed rows, D width, F expert width. Each problem is made when its turn comes
and freed after it. `bytes_moved` counts each input and each output once; only experts with rows are read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from common import GROUPED_GEMM, GROUPED_GEMM_DGRAD, GROUPED_GEMM_WGRAD, Forms, grouped_gemm_forms
from gpu_device import Call
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import hebatron_kernels as hk
from hebatron_kernels import _native, _triton
from hebatron_kernels.moe.native import IMPLEMENTATIONS, parse_implementation
from hebatron_kernels.moe.native_gemm import grouped_gemm_wgrad

BF16 = torch.bfloat16


@dataclass(frozen=True)
class Sizes:
    """Nano 30B-A3B, and how much of it to time."""

    width: int = 2688
    expert_width: int = 1856
    experts: int = 128
    top_k: int = 6
    tokens: tuple[int, ...] = (4096, 16384, 1024, 64, 8, 1)
    tokens_once: int = 65536
    inner: int = 4096  # Mamba-2: 64 heads of 64, its gated norm in 8 groups
    channels: int = 6144  # of its convolution
    attention: tuple[int, ...] = (4096, 16384)
    decode: tuple[tuple[int, int], ...] = ((1, 65536), (32, 8192))
    projections: tuple[tuple[str, int, int], ...] = (("in_proj", 2688, 10304), ("lm_head", 2688, 131072))
    projection_tokens: tuple[int, ...] = (64, 4096)
    copy_bytes: int = 4 << 30
    matmul_size: int = 8192


TINY = Sizes(
    width=64,
    expert_width=48,
    experts=4,
    top_k=2,
    tokens=(8, 1),
    tokens_once=16,
    inner=64,
    channels=64,
    attention=(32,),
    decode=((1, 64),),
    projections=(("in_proj", 64, 96),),
    projection_tokens=(4,),
    copy_bytes=1 << 20,
    matmul_size=64,
)


@dataclass
class Problem:
    kernel: str
    case: str
    bytes_moved: float
    flops: float
    rivals: dict[str, Call]
    reference: str = ""  # the rival whose result the others must give
    other_results: set[str] = field(default_factory=set)  # rivals that do less than the whole operator
    forms: Forms = field(default_factory=lambda: GROUPED_GEMM)  # what the rivals named by implementation are
    sizes: tuple[str, int, int, int, int] | None = None  # use, rows, experts, k, n: of the table of tiles


Maker = Callable[[], Problem]


def problems(sizes: Sizes, device: torch.device) -> Iterator[tuple[str, Maker]]:
    """(what it is, what makes it), the most wanted first: time may run out."""
    weights: dict[str, Tensor] = {}
    routed = [(tokens, routing) for routing in ("uniform", "zipf") for tokens in sizes.tokens]
    for tokens, routing in [*routed, (sizes.tokens_once, "uniform")]:
        for step, make in STEPS.items():
            name = f"grouped_gemm {step} {tokens} {routing}"
            yield name, partial(make, sizes, device, weights, step, tokens, routing)
        if (tokens, routing) == routed[len(sizes.tokens) - 1]:
            yield from norms(sizes, device)
            yield from layers(sizes, device, weights)
    yield from baselines(sizes, device)


def route(sizes: Sizes, tokens: int, routing: str, device: torch.device) -> tuple[Tensor, Tensor]:
    """rows_N (int32, the token of each routed row, sorted by expert) and offsets_E, with K distinct experts a token."""
    likely_E = torch.ones(sizes.experts)
    if routing == "zipf":
        likely_E = 1.0 / torch.arange(1, sizes.experts + 1)
    ids_TK = torch.multinomial(likely_E.expand(tokens, -1), sizes.top_k)
    rows_N = torch.argsort(ids_TK.flatten(), stable=True) // sizes.top_k
    offsets_E = torch.bincount(ids_TK.flatten(), minlength=sizes.experts).cumsum(0)
    return rows_N.int().to(device), offsets_E.int().to(device)


def stored(sizes: Sizes, device: torch.device, weights: dict[str, Tensor], step: str) -> Tensor:
    """up (E, F, D) or down (E, D, F), made once: 1.3 GB."""
    inner, outer = (sizes.width, sizes.expert_width) if step == "up" else (sizes.expert_width, sizes.width)
    if step not in weights:
        weights[step] = torch.randn(sizes.experts, outer, inner, device=device, dtype=BF16) * 0.02
    return weights[step]


def grouped(
    sizes: Sizes, device: torch.device, weights: dict[str, Tensor], step: str, tokens: int, routing: str
) -> Problem:
    """up: gather, product, relu2, scale. down: the product of the rows as they lie."""
    up = step == "up"
    inner, outer = (sizes.width, sizes.expert_width) if up else (sizes.expert_width, sizes.width)
    b_EKN = stored(sizes, device, weights, step).transpose(1, 2)
    rows_N, offsets_E = route(sizes, tokens, routing, device)
    count = rows_N.numel()
    a = torch.randn(tokens if up else count, inner, device=device, dtype=BF16)
    scale_N = torch.rand(count, device=device) + 0.5
    gathered = a.index_select(0, rows_N) if up else a
    args = (a, b_EKN, offsets_E, rows_N, scale_N, "relu2") if up else (a, b_EKN, offsets_E)
    in_place = (gathered, b_EKN, offsets_E, None, scale_N, "relu2") if up else args  # CUTLASS gathers no rows
    ends = [0, *offsets_E.tolist()]
    used = sum(1 for e in range(sizes.experts) if ends[e + 1] > ends[e])
    rivals: dict[str, Call] = {"torch form": lambda: hk.grouped_gemm(*args, backend="torch")}
    if device.type == "cuda":
        rivals["ours"] = lambda: hk.grouped_gemm(*args, backend="native")
        if _triton.refusal(a) is None:
            rivals["triton"] = lambda: hk.grouped_gemm(*args, backend="triton")
        for form in forms_of(device, GROUPED_GEMM):
            given = in_place if form.startswith("cutlass") else args
            rivals[form] = partial(hk.grouped_gemm, *given, implementation=form, backend="native")
    grouped_mm = getattr(F, "grouped_mm", None) or getattr(torch, "_grouped_mm", None)
    if grouped_mm is not None:
        rivals["grouped_mm, product alone"] = lambda: grouped_mm(gathered, b_EKN, offs=offsets_E)
    rivals["cuBLAS by expert, product alone"] = partial(by_expert, gathered, b_EKN, ends)
    return Problem(
        "grouped_gemm",
        f"{step} {tokens} {routing}",
        2.0 * (used * inner * outer + a.numel() + count * outer) + (8.0 * count if up else 0.0),
        2.0 * count * inner * outer,
        rivals,
        "torch form",
        {name for name in rivals if name.endswith("product alone")},
        sizes=("k_major", count, sizes.experts, inner, outer),
    )


def way_back(
    sizes: Sizes, device: torch.device, weights: dict[str, Tensor], step: str, tokens: int, routing: str
) -> Problem:
    """dgrad down: gather, product with the outputs of b contiguous, back through relu2, sums of rows. dgrad up: the
    product alone, of rows as they lie."""
    down = step == "dgrad down"
    stored = "down" if down else "up"  # (experts, inner, outer) here, as the forward stores it
    inner, outer = (sizes.width, sizes.expert_width) if down else (sizes.expert_width, sizes.width)
    if stored not in weights:
        weights[stored] = torch.randn(sizes.experts, inner, outer, device=device, dtype=BF16) * 0.02
    b_EKN = weights[stored]
    rows_N, offsets_E = route(sizes, tokens, routing, device)
    count = rows_N.numel()
    a = torch.randn(tokens if down else count, inner, device=device, dtype=BF16)
    scale_N = torch.rand(count, device=device) + 0.5
    kept = (
        (torch.randn(count, outer, device=device).relu_() ** 2 * scale_N[:, None]).to(BF16) if down else None
    )

    def torch_form() -> list[Tensor]:
        left = a.index_select(0, rows_N) if down else a
        g = hk.grouped_gemm(left, b_EKN, offsets_E, backend="torch")
        if kept is None:
            return [g]
        wide = kept.float()
        h_grad = (2.0 * (wide * scale_N[:, None]).sqrt() * g).to(BF16)
        return [h_grad, (g.float() * wide).sum(1) / scale_N]

    rivals: dict[str, Call] = {"torch form": torch_form}
    if device.type == "cuda":
        taken = rows_N if down else None
        ours = partial(way_back_of, a, b_EKN, offsets_E, taken, scale_N if down else None, kept)
        rivals["ours"] = partial(ours, None)
        for form in forms_of(device, GROUPED_GEMM_DGRAD):
            rivals[form] = partial(ours, form)
    used = int((offsets_E.diff(prepend=offsets_E.new_zeros(1)) > 0).sum())
    return Problem(
        "grouped_gemm",
        f"{step} {tokens} {routing}",
        2.0 * (used * inner * outer + a.numel() + (2 if down else 1) * count * outer)
        + (12.0 * count if down else 0.0),
        2.0 * count * inner * outer,
        rivals,
        "torch form",
        forms=GROUPED_GEMM_DGRAD,
        sizes=("n_major", count, sizes.experts, inner, outer),
    )


def way_back_of(
    a: Tensor,
    b_EKN: Tensor,
    offsets_E: Tensor,
    rows_N: Tensor | None,
    scale_N: Tensor | None,
    kept: Tensor | None,
    form: str | None,
) -> list[Tensor]:
    name, tile_m, tile_n = parse_implementation(form)
    count = (a if rows_N is None else rows_N).shape[0]
    out = a.new_empty(count, b_EKN.shape[2])
    row_sums = None if kept is None else torch.empty(count, device=a.device)
    _native.call(
        "grouped_gemm_fwd",
        rows=count,
        a_rows=a.shape[0],
        experts=b_EKN.shape[0],
        n=b_EKN.shape[2],
        k=b_EKN.shape[1],
        workers=1,
        dtype="bfloat16",
        relu2=int(kept is not None),
        a=a,
        a_stride=a.stride(0),
        rows_of_a=rows_N,
        b=b_EKN,
        b_expert_stride=b_EKN.stride(0),
        b_stride=b_EKN.stride(1),
        b_k_major=0,
        offsets=offsets_E,
        scale=scale_N,
        kept=kept,
        row_sums=row_sums,
        out=out,
        implementation=IMPLEMENTATIONS[name] if name else 0,
        tile_m=tile_m,
        tile_n=tile_n,
    )
    return [out] if row_sums is None else [out, row_sums]


def weights_gradient(
    sizes: Sizes, device: torch.device, weights: dict[str, Tensor], step: str, tokens: int, routing: str
) -> Problem:
    """wgrad up: the gradient of (experts, expert_width, width) from x gathered; wgrad down: of (experts, width,
    expert_width) from the gradient of y gathered."""
    up = step == "wgrad up"
    rows_N, offsets_E = route(sizes, tokens, routing, device)
    count = rows_N.numel()
    a = torch.randn(tokens, sizes.width, device=device, dtype=BF16)
    b = torch.randn(count, sizes.expert_width, device=device, dtype=BF16)
    ends = [0, *offsets_E.tolist()]

    def torch_form() -> Tensor:
        taken = a.index_select(0, rows_N)
        left, right = (b, taken) if up else (taken, b)
        return torch.ops.hebatron._torch_weight_gemm(left, right, offsets_E)

    rivals: dict[str, Call] = {"torch form": torch_form}
    if device.type == "cuda":
        ours = partial(grouped_gemm_wgrad, a, b, offsets_E, rows_N, BF16, up)
        rivals["ours"] = partial(ours, None)
        for form in forms_of(device, GROUPED_GEMM_WGRAD):
            rivals[form] = partial(ours, form)
    used = sum(1 for e in range(sizes.experts) if ends[e + 1] > ends[e])
    down_rows, across = (sizes.expert_width, sizes.width) if up else (sizes.width, sizes.expert_width)
    return Problem(
        "grouped_gemm_wgrad",
        f"{step} {tokens} {routing}",
        2.0 * (sizes.experts * sizes.width * sizes.expert_width + (a.numel() + b.numel()) * (used > 0))
        + 4.0 * count,
        2.0 * count * sizes.width * sizes.expert_width,
        rivals,
        "torch form",
        forms=GROUPED_GEMM_WGRAD,
        sizes=("wgrad", count, sizes.experts, down_rows, across),
    )


STEPS: dict[str, Callable[..., Problem]] = {
    "up": grouped,
    "down": grouped,
    "dgrad down": way_back,
    "dgrad up": way_back,
    "wgrad up": weights_gradient,
    "wgrad down": weights_gradient,
}


def forms_of(device: torch.device, table: Forms) -> list[str]:
    major, minor = torch.cuda.get_device_capability(device)
    compiled = [] if _native.cuda_module is None else _native.cuda_module.kernels()
    return list(grouped_gemm_forms(compiled, 10 * major + minor, table))


def by_expert(a_NK: Tensor, b_EKM: Tensor, ends: list[int]) -> Tensor:
    out_NM = a_NK.new_empty(a_NK.shape[0], b_EKM.shape[2])
    for expert in range(b_EKM.shape[0]):
        begin, end = ends[expert], ends[expert + 1]
        if end > begin:
            torch.mm(a_NK[begin:end], b_EKM[expert], out=out_NM[begin:end])
    return out_NM


NORM_FORMS = {"plain": 2, "residual": 4, "gated": 3}  # tensors moved by the forward
NORM_BACKWARD = {
    "plain": 3,
    "residual": 6,
    "gated": 5,
}  # and by the backward: inputs, incoming gradients, gradients


def norms(sizes: Sizes, device: torch.device) -> Iterator[tuple[str, Maker]]:
    for tokens in (*sizes.tokens, sizes.tokens_once):
        for form in NORM_FORMS:
            yield f"norm {form} {tokens}", partial(norm, sizes, device, form, tokens, False)
    for form in NORM_FORMS:
        yield f"norm {form} backward", partial(norm, sizes, device, form, sizes.tokens[0], True)


def norm(sizes: Sizes, device: torch.device, form: str, tokens: int, backward: bool) -> Problem:
    width = sizes.inner if form == "gated" else sizes.width
    x, other = torch.randn(2, tokens, width, device=device).to(BF16)
    weight = 1 + 0.1 * torch.randn(width, device=device)
    residual, gate = (other if form == name else None for name in ("residual", "gated"))
    group = width // 8 if form == "gated" else None
    args = (x, weight, 1e-5, residual, gate, group)
    rivals = by_backend(device, partial(_both_ways if backward else hk.rms_norm, *args))
    if form == "plain" and not backward:
        rivals["F.rms_norm"] = lambda: F.rms_norm(x, (width,), weight.to(BF16), 1e-5)
    tensors = NORM_FORMS[form] + (NORM_BACKWARD[form] if backward else 0)
    case = f"{form} {tokens}x{width}" + (" forward and backward" if backward else "")
    return Problem("norm", case, 2.0 * tensors * x.numel() + 4.0 * width, 0.0, rivals, "torch form")


def by_backend(device: torch.device, call: Callable[..., object]) -> dict[str, Call]:
    backends = {"native": "ours", "torch": "torch form"} if device.type == "cuda" else {"torch": "torch form"}
    return {name: partial(call, backend=backend) for backend, name in backends.items()}


def _both_ways(*args: Tensor | float | None, backend: str) -> list[Tensor]:
    return _gradients(hk.rms_norm, args, backend)


def _gradients(op: Callable[..., object], args: Sequence[object], backend: str) -> list[Tensor]:
    """Forward and backward; the upstream gradients are ones, of stride 0 until the operator makes them whole."""
    floats = [isinstance(a, Tensor) and a.is_floating_point() for a in args]
    leaves = [a.detach().requires_grad_() if f else a for a, f in zip(args, floats)]
    out: Any = op(*leaves, backend=backend)
    outputs = [out] if isinstance(out, Tensor) else list(out)
    wanted = [a for a, f in zip(leaves, floats) if f]
    return list(torch.autograd.grad(outputs, wanted, [torch.ones_like(o) for o in outputs]))


def layers(sizes: Sizes, device: torch.device, weights: dict[str, Tensor]) -> Iterator[tuple[str, Maker]]:
    """The expert layer around its products, and whole."""
    for tokens in (sizes.tokens_once, *sizes.tokens):
        yield f"moe_route {tokens}", partial(routing, sizes, device, tokens)
        yield f"moe_permute {tokens}", partial(permutation, sizes, device, tokens)
        for fused in (False, True):
            yield f"moe_combine {tokens}", partial(combination, sizes, device, tokens, fused)
    for tokens in sizes.tokens:
        for backward in (False, True):
            yield f"moe_mlp {tokens}", partial(mlp, sizes, device, weights, tokens, backward)


def chosen(sizes: Sizes, tokens: int, device: torch.device) -> tuple[Tensor, Tensor]:
    ids_TK = torch.multinomial(torch.ones(tokens, sizes.experts), sizes.top_k).to(device)
    return ids_TK, torch.rand(tokens, sizes.top_k, device=device) + 0.1


def routing(sizes: Sizes, device: torch.device, tokens: int) -> Problem:
    logits = torch.randn(tokens, sizes.experts, device=device)
    call = partial(hk.moe_route, logits, torch.zeros(sizes.experts, device=device), sizes.top_k, scale=2.5)
    bytes_moved = 4.0 * logits.numel() + 12.0 * tokens * sizes.top_k
    return Problem("moe_route", f"{tokens}", bytes_moved, 0.0, by_backend(device, call), "torch form")


def permutation(sizes: Sizes, device: torch.device, tokens: int) -> Problem:
    ids_TK, _ = chosen(sizes, tokens, device)
    x = torch.randn(tokens, sizes.width, device=device, dtype=BF16)
    call = partial(hk.moe_permute, x, ids_TK, sizes.experts)
    bytes_moved = 2.0 * x.numel() * (1 + sizes.top_k) + 16.0 * ids_TK.numel()
    return Problem("moe_permute", f"{tokens}", bytes_moved, 0.0, by_backend(device, call), "torch form")


def combination(sizes: Sizes, device: torch.device, tokens: int, fused: bool) -> Problem:
    """fused: with the shared expert, the residual and the next norm."""
    ids_TK, weights_TK = chosen(sizes, tokens, device)
    order_N = torch.argsort(ids_TK.flatten(), stable=True)
    rows = torch.randn(order_N.numel(), sizes.width, device=device, dtype=BF16)
    shared, residual = torch.randn(2, tokens, sizes.width, device=device, dtype=BF16)
    norm = 1 + 0.1 * torch.randn(sizes.width, device=device)
    call = partial(hk.moe_combine, rows, order_N, weights_TK, tokens)
    if fused:
        call = partial(hk.moe_combine_norm, rows, order_N, weights_TK, norm, 1e-5, shared, residual)
    tensors = sizes.top_k + (4 if fused else 1)
    bytes_moved = 2.0 * tensors * shared.numel() + 12.0 * order_N.numel()
    case = f"{tokens}{' with shared, residual, norm' if fused else ''}"
    return Problem("moe_combine", case, bytes_moved, 0.0, by_backend(device, call), "torch form")


def mlp(
    sizes: Sizes, device: torch.device, weights: dict[str, Tensor], tokens: int, backward: bool
) -> Problem:
    ids_TK, weights_TK = chosen(sizes, tokens, device)
    x = torch.randn(tokens, sizes.width, device=device, dtype=BF16)
    both = [stored(sizes, device, weights, step) for step in ("up", "down")]
    args = (x, ids_TK, weights_TK, *both)
    call = partial(_gradients, hk.moe_mlp, args) if backward else partial(hk.moe_mlp, *args)
    used = ids_TK.unique().numel() * 2 * sizes.width * sizes.expert_width
    bytes_moved = 2.0 * (used + 2 * x.numel()) + (
        2.0 * (both[0].numel() * 2 + 2 * x.numel()) if backward else 0
    )
    flops = (3 if backward else 1) * 4.0 * ids_TK.numel() * sizes.width * sizes.expert_width
    case = f"{tokens} uniform" + (" forward and backward" if backward else "")
    return Problem("moe", case, bytes_moved, flops, by_backend(device, call), "torch form")


def baselines(sizes: Sizes, device: torch.device) -> Iterator[tuple[str, Maker]]:
    for tokens in sizes.attention:
        for backward in (False, True):
            yield f"attention {tokens}", partial(attention, device, tokens, backward)
    for batch, context in sizes.decode:
        yield f"decode {batch}x{context}", partial(decode, device, batch, context)
    for name, inner, outer in sizes.projections:
        for tokens in sizes.projection_tokens:
            yield f"{name} {tokens}", partial(projection, device, name, tokens, inner, outer)


def attention(device: torch.device, tokens: int, backward: bool) -> Problem:
    """One sequence, 32 query heads over 2 of 128, causal; SDPA's kernels by name on the same tensors."""
    q = torch.randn(tokens, 32, 128, device=device, dtype=BF16)
    k, v = torch.randn(2, tokens, 2, 128, device=device, dtype=BF16)

    def sdpa(q: Tensor, k: Tensor, v: Tensor, backend: str) -> Tensor:
        batch = [x.transpose(0, 1)[None] for x in (q, k, v)]
        with sdpa_kernel(getattr(SDPBackend, backend)):
            return F.scaled_dot_product_attention(*batch, is_causal=True, enable_gqa=True)[0].transpose(0, 1)

    call = (
        partial(_gradients, hk.attention_prefill, (q, k, v))
        if backward
        else partial(hk.attention_prefill, q, k, v)
    )
    rivals = by_backend(device, call)
    names = ("FLASH_ATTENTION", "CUDNN_ATTENTION") if device.type == "cuda" else ("MATH",)
    for name in names:
        bar = partial(_gradients, sdpa, (q, k, v), name) if backward else partial(sdpa, q, k, v, name)
        rivals[f"SDPA {name}"] = bar
    tensors = (
        (4 * q.numel() + 4 * k.numel()) if backward else 0
    )  # o, grad_o, grad_q and q again; k, v and theirs
    bytes_moved = 2.0 * (2 * q.numel() + k.numel() + v.numel() + tensors)
    flops = (3.5 if backward else 1) * 2.0 * 32 * tokens**2 * 128
    hopper = device.type == "cuda" and torch.cuda.get_device_capability(device) == (9, 0)
    forward = "attention_sm90" if hopper else "attention"
    kernel, case = ("attention_bwd", " forward and backward") if backward else (forward, "")
    return Problem(kernel, f"causal {tokens}{case}", bytes_moved, flops, rivals, "torch form")


def decode(device: torch.device, batch: int, context: int) -> Problem:
    """32 query heads over 2 of 128, pages of 64 tokens in any order; SDPA reads contiguous keys of the same values."""
    q = torch.randn(batch, 32, 128, device=device, dtype=BF16)
    k_new, v_new = torch.randn(2, batch, 2, 128, device=device, dtype=BF16)
    pages = context // 64
    cache = torch.randn(2, batch * pages, 64, 2, 128, device=device, dtype=BF16)
    table = torch.randperm(batch * pages, dtype=torch.int32).view(batch, pages).to(device)
    lengths = torch.full((batch,), context - 1, dtype=torch.int32, device=device)
    call = partial(hk.attention_decode, q, k_new, v_new, cache, table, lengths)
    rivals = by_backend(device, call)
    k, v = cache[:, table.long()].flatten(2, 3).transpose(2, 3).contiguous()
    k[:, :, -1], v[:, :, -1] = k_new, v_new

    def sdpa() -> Tensor:
        return F.scaled_dot_product_attention(q[:, :, None], k, v, enable_gqa=True)[:, :, 0]

    rivals["SDPA, contiguous keys"] = sdpa
    bytes_moved = 2.0 * (2 * k.numel() + 2 * q.numel())
    flops = 4.0 * batch * 32 * context * 128
    return Problem("attention_decode", f"{batch}x{context}", bytes_moved, flops, rivals, "torch form")


def projection(device: torch.device, name: str, tokens: int, inner: int, outer: int) -> Problem:
    x = torch.randn(tokens, inner, device=device, dtype=BF16)
    w = torch.randn(outer, inner, device=device, dtype=BF16) * 0.02
    bytes_moved = 2.0 * (x.numel() + w.numel() + tokens * outer)
    rivals: dict[str, Call] = {"F.linear": lambda: F.linear(x, w)}
    return Problem("baseline", f"{name} {tokens}", bytes_moved, 2.0 * tokens * inner * outer, rivals)
