"""The primitives' conformance cases: the emulator against NumPy, how two sides are compared, crashes on the way."""

import re
import sys
import time

import gpu_conformance
import pytest
import torch
from common import ROOT
from expected import EXPECTED


@pytest.fixture(scope="module")
def emulator_checks():
    return {check["name"]: check for check in gpu_conformance.conformance(["emulator"], 150)}


def test_emulator_gives_what_numpy_expects(emulator_checks):
    wrong = {name: check["detail"] for name, check in emulator_checks.items() if not check["passed"]}
    assert not wrong
    for name in EXPECTED:
        assert emulator_checks[name]["compared"] == ["emulator", "expected"], name


def test_conformance_covers_every_primitive():
    """Every function of prim/ptx.cuh and prim/wgmma.cuh is called by a case."""
    names = set()
    for header in ("ptx.cuh", "wgmma.cuh"):
        text = (ROOT / "csrc" / "cuda" / "prim" / header).read_text()
        names |= set(re.findall(r"^\s*HEBATRON_DEVICE [\w ]+?[ *](\w+)\(", text, re.MULTILINE))
    assert len(names) > 60
    cases = "".join(path.read_text() for path in (ROOT / "bench" / "conformance").glob("*.cuh"))
    indirect = {"cluster_arrive", "cluster_wait", "mbarrier_test"}  # cluster_sync and mbarrier_wait call them
    missing = {name for name in names - indirect if not re.search(rf"\b{name}\b", cases)}
    assert not missing, f"no conformance case for {sorted(missing)}"
    widths = re.findall(
        r"^HEBATRON_WGMMA\((\d+),", (ROOT / "csrc/cuda/prim/wgmma.cuh").read_text(), re.MULTILINE
    )
    assert {f"wgmma_ss_{n}_kk" for n in widths} | {f"wgmma_rs_{n}_n" for n in widths} <= set(EXPECTED)


def results_of(**cases):
    return {name: gpu_conformance.Result(0, data) for name, data in cases.items()}


def test_a_difference_names_the_first_byte():
    sides = {"hardware": results_of(x=b"abcdefgh"), "emulator": results_of(x=b"abcdeZgh")}
    (check,) = gpu_conformance.compare(["x"], sides)
    assert not check["passed"] and "byte 5 of 8: hardware 0x66, emulator 0x5a" in check["detail"]


def test_numpy_says_which_side_is_wrong():
    right = EXPECTED["ldmatrix"]()
    wrong = bytes([right[0] ^ 1]) + right[1:]
    (check,) = gpu_conformance.compare(
        ["ldmatrix"], {"hardware": results_of(ldmatrix=right), "emulator": results_of(ldmatrix=wrong)}
    )
    between, with_expected = check["detail"].split(" | ")
    assert "hardware" in between and "emulator" in between
    assert "emulator 0x" in with_expected and "expected 0x" in with_expected


def test_a_case_without_a_record_does_not_pass():
    failed = {"x": gpu_conformance.Result(0, b"", "no answer for 20 s")}
    (check,) = gpu_conformance.compare(["x"], {"hardware": failed, "emulator": results_of(x=b"a")})
    assert not check["passed"] and "hardware: no answer" in check["detail"]


@pytest.mark.parametrize(("apart", "passed"), [(0, True), (4, True), (5, False)])
def test_approximations_may_differ_by_their_units(apart, passed):
    near = torch.tensor([1.5]).view(torch.int32) + apart
    sides = {
        "hardware": {"e": gpu_conformance.Result(4, near.numpy().tobytes())},
        "emulator": {"e": gpu_conformance.Result(4, torch.tensor([1.5]).numpy().tobytes())},
    }
    assert gpu_conformance.compare(["e"], sides)[0]["passed"] is passed


CRASHING = """#!{python}
import os, sys
for name in sys.argv[2:]:
    with open(sys.argv[1], "ab") as file:
        if name == "refused":
            file.write(b"fail refused 0 4\\nboom")
            sys.exit(1)
        if name == "crash":
            os.abort()
        file.write(b"case %s 0 2\\nok" % name.encode())
"""


def test_cases_go_on_behind_a_crash(tmp_path):
    program = tmp_path / "program"
    program.write_text(CRASHING.format(python=sys.executable))
    program.chmod(0o755)
    names = ["one", "refused", "two", "crash", "three"]
    found = gpu_conformance.run(program, names, time.monotonic() + 60)
    assert {name for name in names if found[name].data == b"ok"} == {"one", "two", "three"}
    assert found["refused"].failure == "boom" and "ended with -6" in found["crash"].failure
