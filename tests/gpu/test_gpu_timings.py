"""The timing table of bench/gpu_check.sh without a GPU: its forms, its tiles, its targets, at toy sizes."""

import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import gpu_device
import gpu_kernels
import pytest
import torch
from common import GROUPED_GEMM, GROUPED_GEMM_DGRAD, GROUPED_GEMM_WGRAD, ROOT, TRITON, grouped_gemm_forms
from gpu_problems import Sizes
from gpu_problems_attention import attentions, decodes
from gpu_problems_loss import losses
from gpu_problems_moe import layers, mlps
from gpu_problems_norm import norms
from gpu_problems_ssd import scans
from gpu_targets import TARGETS, target

from hebatron_kernels import _triton


def tiles_in_source(kernel):
    lists = {"sm90": "TILES", "dgrad_sm90": "DGRAD_TILES", "wgrad_sm90": "WGRAD_TILES"}
    name = lists.get(kernel.removeprefix("grouped_gemm_"))
    if name is not None:
        text = (ROOT / "csrc/cuda/grouped_gemm_sm90.h").read_text().replace("\\\n", "")
        (entries,) = re.findall(rf"#define HEBATRON_SM90_{name}\(X\) (.*)", text)
        return [f"{m}x{n}" for m, n in re.findall(r"X\((\d+), (\d+)", entries)]
    text = (ROOT / "csrc" / "cuda" / f"{kernel}.cu").read_text()
    (named,) = re.findall(r'"(?:the tile must be|has the tiles) ([\dx, orand]+)', text)
    return re.findall(r"\d+x\d+", named)


def test_tiles_are_those_of_the_kernels():
    from gpu_sanitize_gemm import FORMS

    for table in (GROUPED_GEMM, GROUPED_GEMM_DGRAD, GROUPED_GEMM_WGRAD):
        for kernel, tiles in table.values():
            assert sorted(tiles_in_source(kernel)) == sorted(tiles), kernel
            assert sorted(f"{m}x{n}" for m, n in FORMS[kernel][1]) == sorted(tiles), kernel


def test_the_table_of_tiles_takes_what_was_fastest(tmp_path):
    import gpu_tiles

    def row(routing, **times):
        rivals = {f"sm90a:{name.removeprefix('t')}": {"ms": ms} for name, ms in times.items()}
        rivals |= {"ours": {"ms": 0.1}, "sm80:16x64": {"ms": 0.01}, "sm90a:64x256": {"error": "wrong"}}
        return {"sizes": ["k_major", 6, 128, 2688, 1856], "case": routing, "rivals": rivals}

    rows = [row("uniform", t64x128=1.0, t128x208=1.1), row("zipf", t64x128=3.0, t128x208=2.0)]
    found = gpu_tiles.measured([*rows, {"kernel": "norm", "rivals": {}}], 132)
    assert found == {("k_major", 132, 6, 128, 2688, 1856): (128, 208)}
    empty = gpu_tiles.TILES.read_text()
    once = gpu_tiles.rewritten(empty, found)
    assert "Empty" not in once and gpu_tiles.read(once) == found
    other = {("wgrad", 78, 6, 128, 2688, 1856): (192, 192)}
    both = gpu_tiles.rewritten(once, other)
    assert gpu_tiles.read(both) == found | other and both.count("#define") == 1
    assert both.splitlines()[-3:] == [
        "#define HEBATRON_SM90_MEASURED(X) \\",
        "  X(k_major, 132, 6, 128, 2688, 1856, 128, 208) \\",
        "  X(wgrad, 78, 6, 128, 2688, 1856, 192, 192)",
    ]


def test_forms_are_those_a_gpu_must_run():
    compiled = ["norm", "grouped_gemm_sm80", "grouped_gemm_sm90"]
    assert set(grouped_gemm_forms(compiled, 80).values()) == {"grouped_gemm_sm80"}
    assert set(grouped_gemm_forms(compiled, 90).values()) == {"grouped_gemm_sm80", "grouped_gemm_sm90"}
    assert len(grouped_gemm_forms([*compiled, "cutlass/grouped_gemm"], 90)) == 18
    assert not grouped_gemm_forms([], 90) and not grouped_gemm_forms(compiled, 75)


def test_a_wrong_result_is_not_timed():
    right = torch.randn(8, 8)
    rivals = {
        "torch form": lambda: right,
        "sm80:16x64": lambda: right * 1.1,
        "sm80:64x128": lambda: torch.full_like(right, torch.nan),
        "sm80:128x128": lambda: right + 1e-4,
    }
    problem = gpu_kernels.Problem("grouped_gemm", "up", 1.0, 1.0, rivals, "torch form")
    device = gpu_kernels.Device("cpu")
    good, _ = gpu_kernels.checked(device, problem)
    assert set(good) == {"torch form", "sm80:128x128"}
    row, checks = gpu_kernels.measure(
        device, problem, gpu_kernels.Ceilings(1e9, 1e9), gpu_kernels.Clocks(False), repeats=2
    )
    assert [check["passed"] for check in checks] == [False, False, True]
    assert {check["kernel"] for check in checks} == {"grouped_gemm_sm80"}
    assert "ms" in row["rivals"]["sm80:128x128"] and "ms" not in row["rivals"]["sm80:16x64"]


def test_what_takes_long_is_repeated_less():
    found = [gpu_device.rounds_for(seconds, 15) for seconds in (0.0, 0.1, 0.2, 0.5, 1.0, 60.0)]
    assert found == [15, 10, 5, 3, 3, 3] and gpu_device.rounds_for(60.0, 2) == 2


def test_a_reference_out_of_memory_is_a_row_and_no_fault_of_the_kernels():
    def too_large():
        raise torch.OutOfMemoryError("CUDA out of memory\nof 140 GB")

    right = torch.randn(8, 8)
    rivals = {"torch form": too_large, "sm80:16x64": lambda: right}
    problem = gpu_kernels.Problem("grouped_gemm", "up", 1.0, 1.0, rivals, "torch form")
    device = gpu_kernels.Device("cpu")
    row, checks = gpu_kernels.measure(
        device, problem, gpu_kernels.Ceilings(1e9, 1e9), gpu_kernels.Clocks(False), repeats=2
    )
    assert row["rivals"]["torch form"] == {"error": "CUDA out of memory"}
    assert "ms" in row["rivals"]["sm80:16x64"] and "distance" not in row["rivals"]["sm80:16x64"]
    assert [check["passed"] for check in checks] == [True]


def test_what_is_left_out_is_not_chosen_either():
    rivals = dict.fromkeys(
        ["ours", "sm80:16x64", "sm90a:128x128", "cutlass:128x128", "torch form"], lambda: None
    )
    for without, left in [
        ({"sm90a"}, ["sm80:16x64", "cutlass:128x128", "torch form"]),
        ({"cutlass"}, ["ours", "sm80:16x64", "sm90a:128x128", "torch form"]),
        ({"norm"}, list(rivals)),
    ]:
        problem = gpu_kernels.Problem("grouped_gemm", "up", 1.0, 1.0, dict(rivals), "torch form")
        gpu_kernels.leave_out(problem, without)
        assert list(problem.rivals) == left
    for without, left in [
        ({"moe/triton"}, ["ours", "triton", "torch form"]),
        ({"ssd/triton"}, ["ours", "torch form"]),
        ({"ssd_scan"}, ["triton", "torch form"]),  # its backward computes the states by it
    ]:
        rivals = dict.fromkeys(["ours", "triton", "torch form"], lambda: None)
        problem = gpu_kernels.Problem("ssd_scan_bwd", "x", 1.0, 1.0, rivals)
        gpu_kernels.leave_out(problem, without)
        assert list(problem.rivals) == left


def test_every_triton_form_is_tested_sanitized_and_timed():
    import gpu_sanitize_triton

    named = [_triton.kernel(noun) for noun in _triton.NOUNS]
    assert list(TRITON) == named == list(gpu_sanitize_triton.CASES)
    assert all((ROOT / f"tests/gpu/test_gpu_{file}.py").exists() for file, _ in TRITON.values())
    for kernel, form in (("grouped_gemm", named[0]), ("moe_decode", named[0]), ("ssd_scan_bwd", named[1])):
        assert gpu_kernels.kernel_of(gpu_kernels.Problem(kernel, "", 1.0, 1.0, {}), "triton") == form


def test_every_target_is_of_a_problem_of_the_timing_table():
    narrow = replace(
        Sizes(), width=16, expert_width=16, experts=8, top_k=2
    )  # cases of the layer name tokens alone
    made = [make() for table in (layers, mlps) for _, make in table(narrow, torch.device("cpu"))]
    for table in (attentions, decodes, scans, norms, losses):
        made += [make() for _, make in table(Sizes(), torch.device("meta"))]
    assert set(TARGETS) <= {(problem.kernel, problem.case) for problem in made}


def test_every_problem_has_a_name_of_its_own_and_the_first_are_of_all_kinds():
    names = [name for name, _ in gpu_kernels.in_turn(Sizes(), torch.device("meta"))]
    assert len(names) == len(set(names))
    kinds = {re.split(r"[ _]", name)[0] for name in names}
    assert {re.split(r"[ _]", name)[0] for name in names[: len(gpu_kernels.TABLES)]} >= kinds - {"in", "lm"}


def test_targets_are_times_of_the_problem_at_hand():
    assert target("attention_sm90", "causal 65536") == target("attention", "causal 65536")
    assert target("attention", "causal 4096") is None
    flops = 2.0 * 32 * 65536**2 * 128
    assert target("attention", "causal 65536").as_row(0.0, flops)["must_ms"] == pytest.approx(73.3, abs=0.05)
    assert target("moe", "4096 uniform").as_row(1e9, 1e12)["must_ms"] == 1.4
    norm = target("norm", "plain 65536x2688").as_row(2 * 2 * 65536 * 2688, 0.0)
    assert (norm["must_ms"], norm["stretch_ms"]) == pytest.approx((0.271, 0.235), abs=1e-3)
    together = target(
        "moe", "16384 uniform forward and backward"
    )  # 480 and 420 TFLOP/s, twice the operations
    assert together.must == pytest.approx(3 / (1 / 480 + 2 / 420), abs=0.1)


def test_the_timing_table_at_toy_sizes_compares_with_the_reference(tmp_path):
    events = Path(tmp_path) / "timings.jsonl"
    command = [
        sys.executable,
        ROOT / "bench" / "gpu_kernels.py",
        "--device",
        "cpu",
        "--events",
        events,
        "--seconds",
        "0",
    ]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 1 and "out of time" in done.stdout, done.stderr
