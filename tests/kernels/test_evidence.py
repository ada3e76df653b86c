"""Digests of the kernels (cmake/digest.py) and the table of those that have run on a GPU (evidence.json)."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch

from hebatron_kernels import _evidence, _native

ROOT = Path(__file__).resolve().parents[2]
spec = importlib.util.spec_from_file_location("digest", ROOT / "cmake" / "digest.py")
digest = importlib.util.module_from_spec(spec)
spec.loader.exec_module(digest)

KERNEL = """// What  adds one.
#include "cuda/prim.cuh"
#include "hebatron/ops.h"
__global__ void add(float* p) {
  int a = 1, b = - -a;  // kept
  p[0] += a + b + 'x' + 1'000;
#define TWICE(v) \\
  (v) * 2
  puts("a // b"); asm("mov.u32 %0, %1;");
}
"""


@pytest.fixture
def tree(tmp_path):
    """A csrc of one kernel, two headers and the contract."""
    for name, text in {
        "cuda/add.cu": KERNEL,
        "cuda/prim.cuh": '#ifdef HEBATRON_EMULATOR\n#include "prim.h"\n#else\n#include "cuda/prim/ptx.cuh"\n#endif\n',
        "cuda/prim/ptx.cuh": 'inline void sync() { asm volatile("bar.sync 0;"); }\n',
        "cuda/device.cu": '// no __global__ here\n#include "cuda/prim.cuh"\nint device_count();\n',
        "hebatron/ops.h": "struct AddArgs {};\n",
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def of(tree, name="cuda/add.cu"):
    return digest.digest(tree / name, tree)


def edit(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("// What  adds one.", "// What  adds one, quickly: __global__\n/* and\n more */"),
        ("  // kept", ""),
        ("int a = 1, b", "int a=1,\n\n      b"),
        ("(float* p) {", "(float *p)\n{"),
        ("(v) * 2", "(v)   *   2"),
    ],
)
def test_digest_ignores_comments_and_layout(tree, old, new):
    before = of(tree)
    edit(tree / "cuda/add.cu", old, new)
    assert of(tree) == before


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("cuda/add.cu", "int a = 1", "int a = 2"),
        ("cuda/add.cu", "a = 1", "a1"),
        ("cuda/add.cu", "- -a", "--a"),
        ("cuda/add.cu", "'x'", "' '"),
        ("cuda/add.cu", "1'000", "1'001"),
        ("cuda/add.cu", '"a // b"', '"a //  b"'),
        ("cuda/add.cu", "(v) \\\n", "(v)\n"),
        ("cuda/prim.cuh", "#ifdef", "#ifndef"),
        ("cuda/prim/ptx.cuh", "bar.sync 0;", "bar.sync 1;"),
    ],
)
def test_digest_follows_code_and_headers(tree, name, old, new):
    before = of(tree)
    edit(tree / name, old, new)
    assert of(tree) != before


def test_digest_leaves_the_contract_out(tree):
    before = of(tree)
    edit(tree / "hebatron/ops.h", "AddArgs", "AddArgs {}; struct SubArgs")
    assert of(tree) == before


def test_digest_does_not_depend_on_the_folder(tree, tmp_path_factory):
    other = tmp_path_factory.mktemp("elsewhere") / "csrc"
    (tree).rename(other)
    moved = of(other)
    other.rename(tree)
    assert moved == of(tree)


def test_kernel_table_names_kernel_files_only(tree):
    out = tree / "generated" / "table.h"
    digest.main(str(out), str(tree), "cuda/device.cu=80-real", "cuda/add.cu=80-real,90a-real")
    text = out.read_text()
    assert f'X("add", "{of(tree)}", "80-real,90a-real")' in text
    assert "device" not in text


def test_every_kernel_of_the_tree_has_a_digest():
    kernels = [p for p in (ROOT / "csrc" / "cuda").rglob("*.cu") if digest.holds_kernel(p, ROOT / "csrc")]
    assert {"norm"} <= {digest.kernel_name(p, ROOT / "csrc") for p in kernels}
    digests = [digest.digest(p, ROOT / "csrc") for p in kernels]
    assert len(set(digests)) == len(digests)
    assert {"cuda/norm.cu", "cuda/prim.cuh", "cuda/prim/ptx.cuh"} <= set(
        digest.closure(ROOT / "csrc/cuda/norm.cu", ROOT / "csrc")
    )


def results(**changes):
    checks = [
        {"kernel": "norm", "check": name, "passed": True, "detail": ""} for name in _evidence.CHECKS[1:]
    ]
    checks.append({"kernel": "*", "check": "primitives", "passed": True, "detail": ""})
    found = {
        "gpu": "NVIDIA H100",
        "arch": "sm_90",
        "date": "2026-12-01",
        "torch": "2.11.0",
        "toolkit": 13,
        "dry_run": False,
        "kernels": {"norm": "d1"},
        "checks": checks,
        "timings": [],
    }
    return found | changes


@pytest.fixture
def table(tmp_path, monkeypatch):
    """An empty table of our own, in place of the committed one."""
    path = tmp_path / "evidence.json"
    path.write_text('{"entries": []}')
    monkeypatch.setattr(_evidence, "TABLE", path)
    monkeypatch.setattr(_evidence, "entries", ())
    return path


def record(table, found):
    path = table.with_name("2026-12-01-h100.json")
    path.write_text(json.dumps(found))
    return _evidence.record(path)


def unproven(arch="sm_90", digest="d1", toolkit=13, kernel="norm"):
    return _evidence.unproven(kernel, arch, digest=digest, toolkit=toolkit)


def test_record_proves_what_passed_and_nothing_else(table):
    assert unproven() == "never run on hardware"
    assert record(table, results()) == {"norm": "recorded for sm_90"}
    assert unproven() is None
    assert unproven(kernel="conv") == "never run on hardware"
    assert unproven(arch="sm_80") == "never run on sm_80 with CUDA 13, only on sm_90 with CUDA 13"
    assert unproven(toolkit=12) == "never run on sm_90 with CUDA 12, only on sm_90 with CUDA 13"
    assert unproven(digest="d2") == "the kernel changed since it ran on NVIDIA H100 (2026-12-01)"


@pytest.mark.parametrize("name", _evidence.CHECKS)
def test_record_refuses_a_kernel_with_a_failed_check(table, name):
    found = results()
    next(c for c in found["checks"] if c["check"] == name)["passed"] = False
    assert record(table, found) == {"norm": f"not recorded: failed {name}"}
    assert json.loads(table.read_text()) == {"entries": []}


@pytest.mark.parametrize("name", _evidence.CHECKS)
def test_record_refuses_a_kernel_with_a_check_left_out(table, name):
    found = results()
    found["checks"] = [c for c in found["checks"] if c["check"] != name]
    assert record(table, found) == {"norm": f"not recorded: not checked: {name}"}
    assert json.loads(table.read_text()) == {"entries": []}


def test_record_fails_a_check_that_both_passed_and_failed(table):
    found = results()
    found["checks"].append({"kernel": "norm", "check": "values", "passed": False, "detail": "row 3"})
    assert record(table, found) == {"norm": "not recorded: failed values"}


def test_record_counts_only_true_as_passed(table):
    found = results()
    found["checks"][0]["passed"] = "no"
    assert "failed" in record(table, found)["norm"]


def test_record_withdraws_an_entry_that_fails_later(table):
    record(table, results())
    broken = results(date="2026-12-02")
    broken["checks"][0]["passed"] = False
    record(table, broken)
    assert unproven() == "never run on hardware"


def test_record_keeps_an_entry_that_a_later_run_left_out(table):
    record(table, results())
    record(table, results(checks=[], date="2026-12-02"))
    assert unproven() is None


def test_record_replaces_the_entry_of_the_same_key(table):
    record(table, results())
    record(table, results(date="2026-12-05"))
    record(table, results(arch="sm_80", gpu="NVIDIA A100"))
    rows = json.loads(table.read_text())["entries"]
    assert [(r["arch"], r["date"]) for r in rows] == [("sm_80", "2026-12-01"), ("sm_90", "2026-12-05")]
    assert sorted(rows[0]) == sorted(_evidence.FIELDS)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dry_run": True}, "must come from a GPU"),
        ({"arch": "90"}, "arch must look like sm_90, got '90'"),
        ({"toolkit": "13"}, "toolkit must be a major version, got '13'"),
    ],
)
def test_record_refuses_results_of_no_gpu(table, changes, message):
    before = table.read_text()
    with pytest.raises(ValueError, match=message):
        record(table, results(**changes))
    assert table.read_text() == before


def test_record_refuses_incomplete_results(table):
    found = results()
    del found["toolkit"]
    with pytest.raises(ValueError, match="results must have toolkit"):
        record(table, found)


def test_an_incomplete_row_is_an_error(table):
    table.write_text('{"entries": [{"kernel": "norm"}]}')
    with pytest.raises(ValueError, match="an entry must have kernel, digest"):
        _evidence.read()


def test_unproven_is_traced_by_compiled_code(table):
    def choice(x, kernel, arch, digest):
        return x + 1 if _evidence.unproven(kernel, arch, digest=digest, toolkit=13) is None else x - 1

    record(table, results())
    compiled = torch.compile(choice, fullgraph=True, backend="eager", dynamic=False)
    assert compiled(torch.zeros(1), "norm", "sm_90", "d1").item() == 1
    assert compiled(torch.zeros(1), "conv", "sm_90", "d1").item() == -1
    assert compiled(torch.zeros(1), "norm", "sm_80", "d1").item() == -1
    assert compiled(torch.zeros(1), "norm", "sm_90", "d2").item() == -1


def test_summary_names_every_kernel(table):
    built = {"norm": "d1", "conv": "d9", "moe": "d8"}
    assert _evidence.summary(built, 13) == "norm, conv, moe: never run on hardware"
    record(table, results())
    ran = "norm: ran on sm_90 (NVIDIA H100, 2026-12-01)"
    assert _evidence.summary(built, 13) == f"{ran}; conv, moe: never run on hardware"
    assert _evidence.summary({"norm": "d1"}, 12) == (
        "norm: never run on a GPU with CUDA 12, only on sm_90 with CUDA 13"
    )
    changed = "norm: the kernel changed since it ran on NVIDIA H100 (2026-12-01)"
    assert _evidence.summary({"norm": "d2"}, 13) == changed


def test_build_info_tells_of_the_evidence(monkeypatch):
    class Module:
        compiled_archs = staticmethod(lambda: "80-real")
        device_count = staticmethod(lambda: 0)
        kernels = staticmethod(lambda: {"norm": {"digest": "d1", "archs": "80-real"}})

    monkeypatch.setattr(_native, "digests", {"norm": "d1"})
    monkeypatch.setattr(_native, "toolkit", 13)
    monkeypatch.setattr(_native, "cuda_module", Module)
    assert "norm: never run on hardware" in _native.build_info()["_cuda"]


def test_committed_table_is_what_its_results_files_earn():
    files = {digest.kernel_name(p, ROOT / "csrc") for p in (ROOT / "csrc" / "cuda").rglob("*.cu")}
    for entry in _evidence.read():
        assert entry["kernel"] in files, f"{entry['kernel']}: no such kernel file"
        path = ROOT / "bench" / "results" / entry["results"]
        earned, _ = _evidence.judge(json.loads(path.read_text()), path.name)
        assert entry in earned, f"{entry['kernel']}: {path.name} does not earn this entry"
