"""grouped_gemm's part of the GPU timing table: the six products of an expert layer, every form and tile."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from common import GROUPED_GEMM, GROUPED_GEMM_DGRAD, GROUPED_GEMM_WGRAD, Forms, grouped_gemm_forms
from gpu_device import Call
from gpu_problems import BF16, Maker, Problem, Sizes
from torch import Tensor
from torch.nn import functional as F

import hebatron_kernels as hk
from hebatron_kernels import _native, _triton
from hebatron_kernels.moe.native import IMPLEMENTATIONS, parse_implementation
from hebatron_kernels.moe.native_gemm import grouped_gemm_wgrad


def products(sizes: Sizes, device: torch.device) -> Iterator[tuple[str, Maker]]:
    """Of uniform routing, which the table of tiles is made from."""
    yield from _steps(sizes, device, sizes.tokens, "uniform")


def more_products(sizes: Sizes, device: torch.device) -> Iterator[tuple[str, Maker]]:
    """Of Zipf's routing, and the most tokens once."""
    yield from _steps(sizes, device, sizes.tokens, "zipf")
    yield from _steps(sizes, device, (sizes.tokens_once,), "uniform")


def _steps(
    sizes: Sizes, device: torch.device, counts: tuple[int, ...], routing: str
) -> Iterator[tuple[str, Maker]]:
    weights: dict[str, Tensor] = {}
    for tokens in counts:
        for step, make in STEPS.items():
            name = f"grouped_gemm {step} {tokens} {routing}"
            yield name, partial(make, sizes, device, weights, step, tokens, routing)


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
