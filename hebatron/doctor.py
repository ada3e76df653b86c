"""What is compiled, which form serves each operator and why, and whether their answers are right.

`hebatron doctor` prints the table of `examine()`. Each operator's self-check runs its automatic form and
the fp64 reference on one small case (two sequences packed together, odd sizes) and compares every result,
states changed in place included.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import hebatron_kernels

TOLERANCE = (
    1e-4  # of the reference's largest magnitude: fp32 forms measure 1e-7 to 5e-6 here, a wrong one 1e-1
)
MAPS = Path("/proc/self/maps")
OPENMP_NAMES = ("libgomp", "libomp", "libiomp")


@dataclass(frozen=True)
class OperatorRow:
    """One operator: the serving backend, why the stronger ones refuse, the self-check's relative error."""

    name: str
    backend: str
    refusals: tuple[str, ...]
    error: float

    @property
    def ok(self) -> bool:
        return self.error <= TOLERANCE  # False for NaN as well


@dataclass(frozen=True)
class Diagnosis:
    """Everything doctor reports; `facts` are (name, text) lines, `problems` make the exit code non-zero."""

    facts: tuple[tuple[str, str], ...]
    operators: tuple[OperatorRow, ...]
    problems: tuple[str, ...]

    def text(self) -> str:
        lines = [f"{name:<14}{value}" for name, value in self.facts]
        lines += ["", f"{'operator':<23}{'served by':<12}{'self-check':<16}stronger forms, and why not"]
        for row in self.operators:
            check = f"{'ok' if row.ok else 'WRONG'} {row.error:.1e}"
            lines.append(f"{row.name:<23}{row.backend:<12}{check:<16}{'; '.join(row.refusals) or '-'}")
        lines += ["", *(f"problem: {problem}" for problem in self.problems)]
        if not self.problems:
            lines.append(f"all {len(self.operators)} operators agree with their fp64 reference")
        return "\n".join(lines)


def examine() -> Diagnosis:
    """Looks at the machine and the build, and runs every operator's self-check (about a second)."""
    copies = openmp_copies()
    facts = (
        ("machine", f"{cpu_name()}, {os.cpu_count()} logical CPUs, {platform.system()} {platform.machine()}"),
        ("python", platform.python_version()),
        ("torch", f"{torch.__version__}, {torch.get_num_threads()} threads"),
        ("transformers", _version("transformers")),
        *hebatron_kernels.build_info().items(),
        ("OpenMP", "not checked: no /proc" if copies is None else ", ".join(copies) or "none mapped"),
    )
    cases = small_cases()
    if hebatron_kernels.build_info()["_cpu"].startswith("not built"):
        del cases["moe_mlp_packed"]  # packing is the native module's own
    operators = tuple(
        check_operator(name, cases[name]) for name in hebatron_kernels.OPERATORS if name in cases
    )
    problems = [
        f"{row.name}[{row.backend}] differs from its reference by {row.error:.1e} of its scale, "
        f"more than {TOLERANCE:.0e}"
        for row in operators
        if not row.ok
    ]
    if copies is not None and len(copies) > 1:
        problems.append(f"{len(copies)} OpenMP runtimes are mapped, must be one: threads will fight")
    return Diagnosis(facts, operators, tuple(problems))


def cpu_name() -> str:
    """The processor's marketing name, where the system tells it."""
    path = Path("/proc/cpuinfo")
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def openmp_copies() -> list[str] | None:
    """Paths of the OpenMP runtimes mapped into this process; None where /proc does not tell."""
    if not MAPS.exists():
        return None
    paths = {line.split(maxsplit=5)[5] for line in MAPS.read_text().splitlines() if line.count("/") > 1}
    return sorted(path for path in paths if Path(path).name.startswith(OPENMP_NAMES))


def check_operator(name: str, case: Callable[[], dict[str, Any]]) -> OperatorRow:
    """Runs one operator's automatic form and its reference on fresh copies of `case`."""
    operator = getattr(hebatron_kernels, name)
    explanation = hebatron_kernels.explain(name, **case()).splitlines()
    backend = explanation[0].split(": ")[1]
    reasons: dict[str, list[str]] = {}
    for line in explanation[1:]:
        if line.lstrip().startswith("->"):
            break
        form, reason = line.split(maxsplit=1)
        reasons.setdefault(reason, []).append(form)
    refusals = tuple(f"{', '.join(forms)}: {reason}" for reason, forms in reasons.items())
    with torch.no_grad():
        error = _largest_difference(_run(operator, case(), None), _run(operator, case(), "reference"))
    return OperatorRow(name, backend, refusals, error)


def _run(operator: Callable[..., Any], case: dict[str, Any], backend: str | None) -> list[Tensor]:
    """The results, then the tensor arguments: updates change their states in place."""
    result = operator(**case, backend=backend)
    values = [*(result if isinstance(result, tuple) else (result,)), *case.values()]
    return [value for value in values if isinstance(value, Tensor)]


def _largest_difference(got: list[Tensor], want: list[Tensor]) -> float:
    worst = 0.0
    for mine, exact in zip(got, want, strict=True):
        if mine.shape != exact.shape:
            return float("inf")
        scale = max(exact.double().abs().max().item(), 1e-6)
        difference = (mine.double() - exact.double()).abs().max().item() / scale
        worst = difference if difference != difference else max(worst, difference)
    return worst


def _version(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return "not installed; the quickstart needs it"


def small_cases() -> dict[str, Callable[[], dict[str, Any]]]:
    """One small call of each operator: a function that makes its arguments afresh, always the same."""

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    generator = torch.Generator()
    cu_seqlens = torch.tensor([0, 5, 13], dtype=torch.int32)
    chosen = torch.stack([torch.arange(13) % 8, torch.arange(3, 16) % 7], dim=1)

    def norm() -> dict[str, Any]:
        return {"x_TD": draw(13, 24), "weight_D": draw(24), "gate_TD": draw(13, 24), "group_size": 8}

    def conv() -> dict[str, Any]:
        weights = {"weight_CW": draw(12, 4), "bias_C": draw(12), "activation": "silu"}
        return {"x_TC": draw(13, 12), **weights, "cu_seqlens": cu_seqlens}

    def conv_update() -> dict[str, Any]:
        weights = {"weight_CW": draw(12, 4), "bias_C": draw(12), "activation": "silu"}
        return {"x_QC": draw(2, 12), "conv_state_QCK": draw(2, 12, 3), **weights}

    def scan() -> dict[str, Any]:
        tokens = {"x_THP": draw(13, 4, 8), "dt_TH": draw(13, 4), "A_H": -draw(4).exp()}
        groups = {"B_TGS": draw(13, 2, 6), "C_TGS": draw(13, 2, 6)}
        return {**tokens, **groups, "D_H": draw(4), "dt_bias_H": draw(4), "cu_seqlens": cu_seqlens}

    def scan_update() -> dict[str, Any]:
        tokens = {"state_QHPS": draw(2, 4, 8, 6), "x_QHP": draw(2, 4, 8), "dt_QH": draw(2, 4)}
        groups = {"A_H": -draw(4).exp(), "B_QGS": draw(2, 2, 6), "C_QGS": draw(2, 2, 6)}
        return {**tokens, **groups, "D_H": draw(4), "dt_bias_H": draw(4)}

    def prefill() -> dict[str, Any]:
        keys = {"k_SHkP": draw(13, 2, 8), "v_SHkP": draw(13, 2, 8)}
        return {"q_THP": draw(13, 4, 8), **keys, "cu_seqlens_q": cu_seqlens, "cu_seqlens_k": cu_seqlens}

    def decode() -> dict[str, Any]:
        new = {"q_QHP": draw(2, 4, 8), "k_new_QHkP": draw(2, 2, 8), "v_new_QHkP": draw(2, 2, 8)}
        pages = {
            "cache": draw(2, 4, 4, 2, 8),
            "block_table": torch.tensor([[0, 2], [3, 1]], dtype=torch.int32),
        }
        return {**new, **pages, "lengths": torch.tensor([5, 2], dtype=torch.int32)}

    def route() -> dict[str, Any]:
        return {"logits_TE": draw(13, 8), "bias_E": draw(8) / 8, "top_k": 2, "scale": 2.5}

    def permute() -> dict[str, Any]:
        return {"x_TD": draw(13, 10), "ids_TK": chosen, "num_experts": 8}

    def gemm() -> dict[str, Any]:
        ends = torch.tensor([4, 4, 13], dtype=torch.int32)  # the second expert has no row
        return {"a_ND": draw(13, 10), "b_EKN": draw(3, 10, 6), "offsets_E": ends}

    def combine() -> dict[str, Any]:
        order = torch.randperm(26, generator=generator)
        return {"rows_ND": draw(26, 10), "order_N": order, "weights_TK": draw(13, 2), "num_tokens": 13}

    def combine_norm() -> dict[str, Any]:
        plain = combine()
        del plain["num_tokens"]
        return {**plain, "norm_D": draw(10), "shared_TD": draw(13, 10), "residual_TD": draw(13, 10)}

    def experts() -> dict[str, Any]:
        weights = {"weights_TK": draw(13, 2), "up_EFD": draw(8, 6, 10), "down_EDF": draw(8, 10, 6)}
        return {"x_TD": draw(13, 10), "ids_TK": chosen, **weights}

    def packed() -> dict[str, Any]:
        plain = experts()
        up, down = (hebatron_kernels.moe_pack(plain.pop(name)) for name in ("up_EFD", "down_EDF"))
        return {**plain, "up": up, "down": down, "num_experts": 8, "expert_width": 6}

    def linear() -> dict[str, Any]:
        return {"x_TD": draw(13, 10), "weight_MD": draw(7, 10)}

    def linear_packed() -> dict[str, Any]:
        plain = linear()
        return {
            "x_TD": plain["x_TD"],
            "packed": hebatron_kernels.linear_pack(plain["weight_MD"]),
            "outputs": 7,
        }

    def loss() -> dict[str, Any]:
        targets = torch.arange(13) % 11
        targets[3] = -100
        return {"x_TD": draw(13, 10), "weight_VD": draw(11, 10), "targets_T": targets}

    def seeded(make: Callable[[], dict[str, Any]]) -> Callable[[], dict[str, Any]]:
        def case() -> dict[str, Any]:
            generator.manual_seed(0)
            return make()

        return case

    cases = {
        "rms_norm": norm,
        "causal_conv1d": conv,
        "causal_conv1d_update": conv_update,
        "ssd_scan": scan,
        "ssd_update": scan_update,
        "attention_prefill": prefill,
        "attention_decode": decode,
        "moe_route": route,
        "moe_permute": permute,
        "grouped_gemm": gemm,
        "moe_combine": combine,
        "moe_combine_norm": combine_norm,
        "moe_mlp": experts,
        "moe_mlp_packed": packed,
        "linear": linear,
        "linear_packed": linear_packed,
        "linear_cross_entropy": loss,
    }
    return {name: seeded(make) for name, make in cases.items()}
