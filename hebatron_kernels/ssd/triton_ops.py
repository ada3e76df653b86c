"""ssd_scan in Triton, for every GPU from compute capability 8.0 on: forward and all gradients, fp32 and bf16.

T tokens, H heads, P head dim, G groups, S state, Q sequences.
"""

from __future__ import annotations

import math
from contextlib import nullcontext
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .. import _triton

FP_FUSION = True  # a product of fp32 is then one instruction a pair; the default up to Triton 3.9
# The strides that kernels take of these, and what the second of them steps over.
STRIDED = {"x": "head", "dt": "head", "B": "group", "C": "group"}


def _kernels() -> ModuleType:
    from . import triton_kernels  # at the first call: it imports Triton

    return triton_kernels


def supports_ssd_scan(
    x_THP: Tensor, dt_TH: Tensor, A_H: Tensor, B_TGS: Tensor, C_TGS: Tensor, *others: object
) -> str | None:
    reason = _triton.refusal(x_THP)
    if reason is not None:
        return reason
    kernels = _kernels()
    for name, size, most in (
        ("head dim", x_THP.shape[2], kernels.LARGEST_HEAD_DIM),
        ("state", B_TGS.shape[2], kernels.LARGEST_STATE),
        ("distance between tokens", max(x_THP.stride(0), dt_TH.stride(0)), kernels.LARGEST_ROW),
        ("distance between tokens", max(B_TGS.stride(0), C_TGS.stride(0)), kernels.LARGEST_ROW),
    ):
        if size > most:
            return f"takes a {name} of at most {most}, got {size}"
    return None


def unproven_ssd_scan(x_THP: Tensor, *others: object) -> str | None:
    return _triton.unproven("ssd", x_THP.get_device())


def ssd_scan(*args: Any) -> tuple[Tensor, Tensor]:
    scan = _Scan(*args)
    before, _, last = scan.states()
    y = torch.empty(args[0].shape, **scan.like_x)
    scan.launch("outputs", scan.chunks, scan.groups, before=before, y=y)
    return y, last


def ssd_scan_bwd(grads: list[Tensor], *args: Any) -> list[Tensor]:
    """Nothing is kept from the forward: the states of the chunks are computed again."""
    scan, grad_y, grad_last = _Scan(*args), grads[0].contiguous(), grads[1]
    before, decays, _ = scan.states()
    ends = scan.initial is not None
    behind, grad_initial = scan.passed_on(scan.sums(decays, grad_y), decays, grad_last, ends, back=True)
    named = dict(zip(("x", "dt", "A", "B", "C", "D", "dt_bias"), args))
    found = {f"grad_{name}": torch.empty(named[name].shape, **scan.like_x) for name in ("x", "B", "C")}
    found["grad_dt"] = torch.empty(named["dt"].shape, **scan.fp32)
    # zeros: of chunks that are not there. Added up in one order, as atomics would not be.
    sums = {f"sums_{name}": torch.zeros(scan.chunks, scan.heads, **scan.fp32) for name in ("A", "D", "bias")}
    given = {"before": before, "behind": behind, "grad_y": grad_y, "BLOCK_S": scan.part, **found, **sums}
    scan.launch("gradients_of_heads", scan.chunks, scan.heads, **given)
    for of_C in (False, True):
        scan.launch("gradients_of_groups", scan.chunks, scan.groups, scan.parts, **given, OF_C=of_C)
    for name in ("A", "D", "dt_bias"):
        found[f"grad_{name}"] = sums[f"sums_{name.removeprefix('dt_')}"].sum(0)
    results = [found[f"grad_{name}"].to(v.dtype) for name, v in named.items() if v is not None]
    return results if grad_initial is None else [*results, grad_initial.to(args[9].dtype)]


class _Scan:
    """One call: tensors, sizes and constants by the names that the kernels' parameters have, and the launches."""

    def __init__(
        self,
        x: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor | None,
        dt_bias: Tensor | None,
        dt_limit: tuple[float, float] = (0.0, math.inf),
        cu_seqlens: Tensor | None = None,
        initial_state: Tensor | None = None,
        chunk_size: int = 128,
    ) -> None:
        tokens, self.heads, head_dim = x.shape
        self.groups, state = B.shape[1:]
        self.device, self.initial, self.matrix = x.device, initial_state, (self.heads, head_dim, state)
        self.like_x: dict[str, Any] = {"dtype": x.dtype, "device": x.device}
        self.fp32: dict[str, Any] = {"dtype": torch.float32, "device": x.device}
        if cu_seqlens is None:
            cu_seqlens = torch.arange(2, dtype=torch.int32, device=x.device) * tokens  # no copy from the host
        size = _kernels().blocks(head_dim, state, x.element_size())
        self.sequences, length = cu_seqlens.shape[0] - 1, min(chunk_size, size.t)
        self.chunks = min(tokens, (tokens + self.sequences * (length - 1)) // length)  # the most there can be
        self.part, self.parts, self.warps = size.part, -(-state // size.part), size.warps
        tensors = {"A": A, "D": D, "dt_bias": dt_bias, "cu": cu_seqlens}
        self.values: dict[str, Any] = {
            **{name: v if v.stride(2) == 1 else v.contiguous() for name, v in zip("xBC", (x, B, C))},
            **{name: None if v is None else v.contiguous() for name, v in tensors.items()},
            "dt": dt,
            "sequences": self.sequences,
            "length": length,
            "heads": self.heads,
            "head_dim": head_dim,
            "state": state,
            "heads_a_group": self.heads // self.groups,
            "elements": head_dim * state,
            "smallest": float(dt_limit[0]),
            "largest": float(dt_limit[1]),
            "FP32": _triton.interpreting,
            "BLOCK_Q": max(16, 1 << max(self.sequences - 1, 0).bit_length()),
            "BLOCK_T": size.t,
            "BLOCK_P": size.p,
            "BLOCK_S": size.s,
            "PASSED": _kernels().PASSED,
        }

    def states(self) -> tuple[Tensor, Tensor, Tensor]:
        """The states before the chunks, the chunks' decays, the states behind the sequences."""
        decays = torch.empty(self.chunks, self.heads, **self.fp32)
        before, last = self.passed_on(self.sums(decays), decays, self.initial)
        assert last is not None
        return before, decays, last

    def sums(self, decays: Tensor, grad_y: Tensor | None = None) -> Tensor:
        """What each chunk adds to the state, and its decay; with grad_y, to the gradient of the state before it."""
        sums = torch.empty(self.chunks, *self.matrix, **self.fp32)
        back = {} if grad_y is None else {"x": grad_y, "B": self.values["C"]}
        given = {"sums": sums, "decays": decays, "BACK": bool(back), **back}
        self.launch("chunk_sums", self.chunks, self.heads, **given)
        return sums

    def passed_on(
        self, sums: Tensor, decays: Tensor, start: Tensor | None, ends: bool = True, back: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """What enters every chunk and, with ends, what leaves the sequences; back: from their ends to their starts."""
        found = torch.empty(self.chunks, *self.matrix, **self.like_x)
        last = torch.empty(self.sequences, *self.matrix, **self.fp32) if ends else None
        given = {"sums": sums, "decays": decays, "found": found, "last": last, "BACK": back}
        given["start"] = None if start is None else start.contiguous()
        parts = -(-self.values["elements"] // self.values["PASSED"])
        self.launch("pass_on", self.sequences * self.heads * parts, warps=4, **given)
        return found, last

    def launch(self, name: str, *grid: int, warps: int = 0, **given: Any) -> None:
        """A kernel with `given` before the call's own values."""
        if not all(grid):
            return
        kernel, values = getattr(_kernels(), name), self.values | given
        for tensor, second in STRIDED.items():
            values[f"{tensor}_row"], values[f"{tensor}_{second}"] = values[tensor].stride()[:2]
        # Triton launches on the current GPU and its current stream, which need not be the tensors'
        with torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext():
            kernel[grid](
                **{parameter: values[parameter] for parameter in kernel.arg_names},
                num_warps=warps or self.warps,
                num_stages=1,  # two heads' tiles in flight do not fit 99 KB
                enable_fp_fusion=FP_FUSION,
            )
