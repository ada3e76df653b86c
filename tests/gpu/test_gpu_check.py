"""What bench/gpu_check.sh does without a GPU: dry run, records, the README's table."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import gpu_check
import gpu_table
import pytest
import torch
from common import ROOT

from hebatron_kernels import _evidence, _native, testing

# The dry run


def dry_run(tmp_path, steps):
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    command = [ROOT / "bench" / "gpu_check.sh", "--dry-run", "--only", steps, "--keep", tmp_path / "kept"]
    environment = os.environ | {"PATH": path, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)


def test_dry_run_goes_through_every_step_that_needs_no_compiler(tmp_path):
    watched = [ROOT / "README.md", ROOT / "hebatron_kernels" / "evidence.json", ROOT / "bench" / "results"]
    before = [path.stat().st_mtime_ns for path in watched]
    done = dry_run(tmp_path, "tests,sanitizer,timings,record")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "DRY RUN: passed" in done.stdout and "results must come from a GPU, got a dry run" in done.stdout
    assert [path.stat().st_mtime_ns for path in watched] == before, "a dry run wrote into the tree"
    (record,) = (tmp_path / "kept").glob("20*.json")
    found = json.loads(record.read_text())
    assert found["dry_run"] is True and [step["step"] for step in found["steps"]] == [
        "tests",
        "sanitizer",
        "timings",
    ]
    kernels = {check["kernel"] for check in found["checks"]}
    assert kernels >= {"norm", "conv", "loss", "grouped_gemm_sm80", "grouped_gemm_sm90", "moe"}
    assert kernels >= {"grouped_gemm_dgrad_sm90", "grouped_gemm_wgrad_sm80", "grouped_gemm_wgrad_sm90"}
    assert kernels >= {path.stem for path in (ROOT / "tests" / "gpu").glob("test_gpu_[gmn]*.py")}
    assert len(found["timings"]) > 20 and not found["kernels"]
    assert "mean nothing" in gpu_table.table(record.name, found)


def test_a_real_run_must_begin_with_the_build():
    done = subprocess.run(
        [sys.executable, ROOT / "bench" / "gpu_check.py", "--only", "timings"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2 and "must begin with build" in done.stderr


def a_run(tmp_path, **options):
    return gpu_check.Run(SimpleNamespace(dry_run=False, commit="abc", **options), tmp_path)


def test_a_step_that_fails_is_recorded_and_the_next_one_runs(tmp_path, monkeypatch, capsys):
    def faulty(run):
        raise RuntimeError("no such thing")

    run = a_run(tmp_path)
    monkeypatch.setattr(gpu_check, "STEPS", {"tests": faulty, "timings": lambda run: "fine"})
    gpu_check.perform(run, ["tests", "timings"], 10, tmp_path / "kept")
    assert [step["said"] for step in run.steps] == ["RuntimeError: no such thing", "fine"]
    assert [(check["kernel"], check["passed"]) for check in run.checks] == [("tests", False)]
    assert json.loads((tmp_path / "kept" / "so_far.json").read_text())["commit"] == "abc"


def test_a_command_is_stopped_at_its_deadline_with_all_it_started(tmp_path):
    run = a_run(tmp_path)
    run.deadline = time.monotonic() + 1
    status, said = run.command("slow", "bash", "-c", "echo began; sleep 600 & sleep 600")
    assert status is None and said == "began" and time.monotonic() - run.deadline < 5


PYTEST_LOG = """
{"test": "f.py::test_a", "event": "start"}
{"test": "f.py::test_a", "event": "passed", "check": "streams", "seconds": 1, "detail": ""}
{"test": "f.py::test_b", "event": "start"}
{"test": "f.py::test_b", "event": "failed", "check": "values", "seconds": 1, "detail": "wrong"}
{"test": "f.py::test_c", "event": "start"}
{"test": "f.py::test_c", "event": "skipped", "check": "values", "seconds": 1, "detail": "no memory"}
{"test": "f.py::test_d", "event": "start"}
"""


@pytest.mark.parametrize(
    ("status", "why"), [(None, "hung until the step's end"), (-6, "the process ended with -6")]
)
def test_a_hang_and_a_crash_have_the_name_of_their_test(tmp_path, monkeypatch, status, why):
    run = a_run(tmp_path)
    (tmp_path / "tests_norm.jsonl").write_text(PYTEST_LOG.lstrip())
    monkeypatch.setattr(run, "python", lambda *words: (status, "last words"))
    gpu_check._one_pytest(run, "norm", "f.py", "")
    seen = [(check["check"], check["name"], check["passed"], check["detail"]) for check in run.checks]
    assert seen[:3] == [
        ("streams", "test_a", True, ""),
        ("values", "test_b", False, "wrong"),
        ("values", "test_d", False, why),
    ]
    assert run.skipped == ["test_c: no memory"]


def test_tests_that_were_all_skipped_are_a_failed_check(tmp_path, monkeypatch):
    run = a_run(tmp_path)
    monkeypatch.setattr(run, "python", lambda *words: (0, "2 skipped"))
    gpu_check._one_pytest(run, "norm", "f.py", "")
    assert [(check["kernel"], check["passed"]) for check in run.checks] == [("norm", False)]


def test_compute_sanitizer_that_is_missing_is_a_failed_check(monkeypatch):
    import gpu_sanitize

    monkeypatch.setattr(gpu_sanitize, "find_sanitizer", lambda: None)
    checks = gpu_sanitize.sanitize(["norm"], 10)
    assert [check["check"] for check in checks] == list(gpu_sanitize.TOOLS)
    assert all(not check["passed"] and "not installed" in check["detail"] for check in checks)


@pytest.mark.parametrize(
    ("script", "tool", "passed"),
    [
        ("echo '========= ERROR SUMMARY: 0 errors'", "memcheck", True),
        ("echo '========= RACECHECK SUMMARY: 0 hazards displayed'", "racecheck", True),
        ("echo '========= ERROR SUMMARY: 0 errors'; exit 1", "memcheck", False),
        ("echo '========= Invalid __global__ write'; exit 86", "memcheck", False),
        ("echo 'no summary: the tool did not run'", "initcheck", False),
        ("echo '========= RACECHECK SUMMARY: 3 hazards displayed'", "racecheck", False),
        ("sleep 60", "synccheck", False),
    ],
)
def test_a_tool_passes_only_with_its_own_clean_summary(tmp_path, script, tool, passed):
    import gpu_sanitize

    program = tmp_path / "compute-sanitizer"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    assert gpu_sanitize._under_tool(str(program), tool, "norm", 2)[0] is passed


# Records


def full_record(tmp_path):
    """What a run on a GPU leaves where everything passed."""
    run = a_run(tmp_path)
    run.facts = {
        "machine": {"gpu": "NVIDIA H200", "arch": "sm_90", "driver": "580.1", "torch": "2.11.0"},
        "kernels": {"norm": "0123456789abcdef"},
        "toolkit": 13,
        "compilers": {},
    }
    run.checks = [{"kernel": "*", "check": "primitives", "name": "mma", "passed": True, "detail": ""}]
    for check in _evidence.CHECKS[1:]:
        run.check("norm", check, True)
    times = {"ms": 0.2, "p10_ms": 0.2, "p90_ms": 0.2, "percent_of_floor": 80.0, "graph": True}
    run.timings = {
        "ceilings": {"bytes_per_second": 4.2e12, "flops_per_second": 7.9e14},
        "rows": [
            {
                "kernel": "grouped_gemm",
                "case": "up 4096 uniform",
                "floor_ms": 0.16,
                "target": {"must_ms": 0.18, "stretch_ms": 0.17, "set_as": "0.18, stretch 0.17 ms"},
                "bound": "memory",
                "clocks": {"clocks.sm": 1755.0},
                "rivals": {"ours": times, "sm90a:128x232": times, "torch form": {"error": "no grouped_mm"}},
            }
        ],
    }
    return gpu_check.results(run)


def test_a_full_record_is_evidence(tmp_path):
    earned, refused = _evidence.judge(full_record(tmp_path), "x.json")
    assert [entry["kernel"] for entry in earned] == ["norm"] and not refused


def test_one_failed_primitive_is_no_evidence(tmp_path):
    record = full_record(tmp_path)
    record["checks"].append(
        {"kernel": "*", "check": "primitives", "name": "bulk", "passed": False, "detail": "x"}
    )
    earned, refused = _evidence.judge(record, "x.json")
    assert not earned and refused == {"norm": "failed primitives"}


def test_records_of_one_day_do_not_overwrite_each_other(tmp_path):
    record = full_record(tmp_path)
    names = []
    for _ in range(3):
        path = gpu_check.result_path(tmp_path, record)
        path.write_text(json.dumps(record))
        names.append(path.name)
    date = record["date"]
    assert names == [f"{date}-h200.json", f"{date}-h200-2.json", f"{date}-h200-3.json"]


def test_table_shows_the_record_finished_last(tmp_path):
    record = full_record(tmp_path)
    for name, finished in (
        ("2026-12-01-h200.json", "2026-12-01T08"),
        ("2026-12-01-h200-2.json", "2026-12-01T09"),
    ):
        (tmp_path / name).write_text(json.dumps(record | {"finished": finished}))
    (tmp_path / "norm.json").write_text("{}")  # a CPU benchmark's, with no date in its name
    block = gpu_table.generated(tmp_path)
    assert "bench/results/2026-12-01-h200-2.json" in block and "8 of 8 checks passed" in block
    row = (
        "| grouped_gemm | up 4096 uniform | 0.16 | 0.18 | 0.2 | 80 % | 0.2 (128x232) | - | - | - | - | 1755 |"
    )
    assert row in block.splitlines()


def test_table_of_no_record_says_so(tmp_path):
    assert gpu_table.NOTHING in gpu_table.generated(tmp_path)


def test_readme_has_the_table_of_the_newest_record():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert gpu_table.rewritten(readme, gpu_table.generated()) == readme, "python bench/gpu_table.py"


def test_a_readme_without_the_markers_is_an_error():
    with pytest.raises(ValueError, match="once each"):
        gpu_table.rewritten("nothing here", "")


@pytest.mark.parametrize("wrong", ["x", "weight", "y", "sum"])
def test_norm_refuses_a_pointer_of_no_tensor(wrong):
    """On a GPU a host pointer; in the emulator memory that the call was not given."""
    testing.load_emulator()
    module = _native.emulator_module
    tensors = {name: torch.randn(4, 64) for name in ("x", "residual", "y", "sum")} | {
        "weight": torch.randn(64)
    }
    keywords = {name: tensor.data_ptr() for name, tensor in tensors.items()}
    keywords |= {
        "rows": 4,
        "width": 64,
        "group": 64,
        "eps": 1e-5,
        "dtype": "float32",
        "weight_dtype": "float32",
    }
    keywords |= {"x_stride": 64, "residual_stride": 64, "gate": None, "gate_stride": 0, "device": 0}
    elsewhere = torch.randn(4, 64)
    try:
        for name, tensor in tensors.items():
            module.allow_memory(tensor.data_ptr(), tensor.nbytes, name)
        module.rms_norm_fwd(**keywords)
        with pytest.raises(ValueError, match=f"{wrong} must be memory of the call's tensors"):
            module.rms_norm_fwd(**(keywords | {wrong: elsewhere.data_ptr()}))
    finally:
        module.forget_memory()
