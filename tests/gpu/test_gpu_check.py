"""What bench/gpu_check.sh does without a GPU: dry run, records, the README's table."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import gpu_check
import gpu_record
import gpu_table
import gpu_tests
import gpu_timings
import gpu_watch
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
        "timings",
        "sanitizer",
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
    run = gpu_check.Run(SimpleNamespace(dry_run=False, commit="abc", keep=None, **options), tmp_path)
    run.deadline = time.monotonic() + 120
    return run


def seen(run):
    return [(check["check"], check["name"], check["passed"], check["detail"]) for check in run.checks]


def test_a_step_that_fails_is_recorded_and_the_next_one_runs(tmp_path, monkeypatch, capsys):
    def faulty(run):
        raise RuntimeError("no such thing")

    run = a_run(tmp_path)
    run.keep, run.facts = (
        tmp_path / "kept",
        {"machine": {}, "kernels": {"norm": "0"}, "toolkit": 13, "compilers": {}},
    )
    monkeypatch.setattr(gpu_check, "STEPS", {"tests": faulty, "timings": lambda run: "fine"})
    gpu_check.perform(run, ["tests", "timings"], 10)
    assert [step["said"] for step in run.steps] == ["RuntimeError: no such thing", "fine"]
    assert [(check["kernel"], check["passed"]) for check in run.checks] == [("tests", False)]
    assert json.loads((tmp_path / "kept" / "so_far.json").read_text())["commit"] == "abc"


def test_without_a_module_the_primitives_alone_are_checked(tmp_path, monkeypatch, capsys):
    def faulty(run):
        raise RuntimeError("no GPU module to test")

    run = a_run(tmp_path)
    steps = {"build": faulty} | {name: lambda run: "ran" for name in ("conformance", "tests", "record")}
    monkeypatch.setattr(gpu_check, "STEPS", steps)
    gpu_check.perform(run, list(steps), 10)
    assert [step["step"] for step in run.steps] == ["build", "conformance"]


def test_a_command_is_stopped_at_its_deadline_with_all_it_started(tmp_path):
    run = a_run(tmp_path)
    run.deadline = time.monotonic() + 1
    status, said = run.command("slow", "bash", "-c", "echo began; sleep 600 & sleep 600")
    assert status is None and said == "began" and time.monotonic() - run.deadline < 5


def test_a_run_that_is_killed_leaves_what_it_has(tmp_path, monkeypatch):
    run = a_run(tmp_path)
    run.keep = tmp_path / "kept"
    run.facts = {"machine": {"gpu": "NVIDIA H200"}, "kernels": {}, "toolkit": 13, "compilers": {}}
    monkeypatch.setattr(gpu_record, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(gpu_record, "SAVED_EVERY_S", 0.01)
    with run.saved():
        run.doing = "tests"
        run.check("norm", "values", True)
        (tmp_path / "tests_norm.log").write_text("words")
        for place in ("kept/so_far.json", "results"):  # while the step goes on
            end = time.monotonic() + 10
            while not (found := read_record(tmp_path / place)) or not found["checks"]:
                assert time.monotonic() < end
            assert found["doing"] == "tests" and found["checks"][0]["kernel"] == "norm"
    assert "words" in (tmp_path / "kept" / "logs.txt").read_text()


def read_record(path):
    files = [path] if path.is_file() else list(path.glob("*.json"))
    return json.loads(files[0].read_text()) if files else None


# what the tests' pytest and gpu_kernels.py tell, of processes that hang, crash, and end after a fault
WORKER = """
import json, os, sys, time
path, tests = sys.argv[1:]
begun = set(line.split('"')[3] for line in open(path)) if os.path.exists(path) else set()
def say(**event):
    with open(path, "a") as file: file.write(json.dumps(event) + chr(10))
for name in {names}:
    if name in begun: continue
    say(**(dict(test=name, event="start") if tests else dict(begin=name, rival="sm80:16x64", kernel="norm")))
    if name == "f::hang": time.sleep(60)
    if name == "f::crash": os.abort()
    passed = name != "f::fault"
    say(**(dict(test=name, event="passed" if passed else "failed", check="values", detail="") if tests
           else dict(row=dict(case=name), checks=[dict(kernel="norm", check="values", name=name, passed=passed)])))
    if not passed: sys.exit(2)
say(done=True)
"""
NAMES = ["f::a", "f::hang", "f::b", "f::crash", "f::c", "f::fault", "f::d"]


def worker(tmp_path, monkeypatch, module, tests):
    script = tmp_path / "worker.py"
    script.write_text(WORKER.format(names=NAMES))
    monkeypatch.setattr(module, "SILENCE_S", 0.5)
    real = module.watch

    def watch(words, log, events, *others, **environment):
        return real([sys.executable, str(script), str(events), tests], log, events, *others, **environment)

    monkeypatch.setattr(module, "watch", watch)


def test_a_hang_a_crash_and_a_fault_cost_their_own_test(tmp_path, monkeypatch):
    worker(tmp_path, monkeypatch, gpu_tests, "tests")
    run = a_run(tmp_path)
    gpu_tests.run(run, [gpu_tests.Job("norm", "f.py")])
    assert {(name, passed, detail) for _, name, passed, detail in seen(run)} == {
        *((name, True, "") for name in "abcd"),
        ("hang", False, "hung: nothing for 0 s"),
        ("crash", False, "the process ended with -6"),
        ("fault", False, ""),
    }


def test_tests_that_were_all_skipped_are_a_failed_check(tmp_path, monkeypatch):
    run = a_run(tmp_path)
    monkeypatch.setattr(gpu_tests, "watch", lambda *words, **environment: "")
    gpu_tests.run(run, [gpu_tests.Job("norm", "f.py")])
    assert [(check["kernel"], check["passed"]) for check in run.checks] == [("norm", False)]


def test_tests_that_found_no_time_are_a_failed_check(tmp_path, monkeypatch):
    run, job = a_run(tmp_path), gpu_tests.Job("norm", "f.py")
    monkeypatch.setattr(gpu_tests, "watch", lambda *words, **environment: gpu_watch.LATE)
    gpu_tests.take(run, job, {"found": 3})
    for test in ("f.py::test_a", "f.py::test_b"):
        gpu_tests.take(run, job, {"test": test, "event": "start"})
    skipped = {"test": "f.py::test_a", "event": "skipped", "check": "values", "detail": "no memory"}
    gpu_tests.take(run, job, skipped)
    gpu_tests.run_job(run, job)
    assert run.skipped == ["test_a: no memory"]
    assert [check[1:] for check in seen(run)] == [
        ("test_b", False, "out of time"),
        ("", False, "1 of 3 tests not begun: out of time: nothing"),
    ]


def test_a_hang_a_crash_and_a_fault_cost_their_own_timing(tmp_path, monkeypatch):
    worker(tmp_path, monkeypatch, gpu_timings, "")
    run = a_run(tmp_path)
    gpu_timings.run(run)
    assert [row["case"] for row in run.timings["rows"]] == ["f::a", "f::b", "f::c", "f::fault", "f::d"]
    assert [(check["name"], check["detail"]) for check in run.checks if "detail" in check] == [
        ("f::hang sm80:16x64", "hung: nothing for 0 s"),
        ("f::crash sm80:16x64", "the process ended with -6"),
    ]
    assert run.skipped == ["timings of norm: it failed"]


REAL = """
import os, time, pytest, torch
pytestmark = pytest.mark.gpu
def test_a(): pass
def test_hang(): time.sleep(600)
def test_abort(): os.abort()
@pytest.mark.parametrize("x", [1, 2])
def test_b(x): assert x == 1, "two"
def test_fault():
    torch.cuda.is_initialized = lambda: True
    torch.cuda.synchronize = lambda: (_ for _ in ()).throw(RuntimeError("an illegal memory access\\nand more"))
    torch.cuda.synchronize()
def test_c(): pytest.skip("no memory")
"""


@pytest.mark.slow  # four times torch's import
def test_pytest_goes_on_behind_a_hang_a_crash_and_a_fault(tmp_path, monkeypatch):
    file = tmp_path / "test_real.py"
    file.write_text(REAL)
    monkeypatch.setenv("PYTEST_ADDOPTS", "-p conftest")
    monkeypatch.setenv("PYTHONPATH", f"{ROOT / 'tests' / 'gpu'}:{ROOT}")
    monkeypatch.setattr(gpu_tests, "SILENCE_S", 5.0)
    run = a_run(tmp_path)
    gpu_tests.run(run, [gpu_tests.Job("norm", str(file))])
    assert [check[1:] for check in seen(run)] == [
        ("test_a", True, ""),
        ("test_hang", False, "hung: nothing for 5 s"),
        ("test_abort", False, "the process ended with -6"),
        ("test_b[1]", True, ""),
        ("test_b[2]", False, "AssertionError: two"),
        ("test_fault", False, "RuntimeError: an illegal memory access"),
        ("test_fault", False, "RuntimeError: an illegal memory access"),  # and after it
    ]
    assert len(run.skipped) == 1 and run.skipped[0].startswith("test_c: ") and "no memory" in run.skipped[0]


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
    return run.contents()


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
        path = gpu_record.result_path(tmp_path, record)
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
