"""The gate of the Triton kernels (.ci/triton_gates.py): each unmet demand is a failure."""

import sys
from collections import Counter
from pathlib import Path

import pytest
from test_gates import load

sys.modules.setdefault("cuda_gates", load(Path(".ci/cuda_gates.py")))
triton_gates = load(Path(".ci/triton_gates.py"))  # which imports the other


def triton_job(operand="bf16", rows=64, arch=90):
    constants = (("BLOCK_N", rows), ("BLOCK_M", 128), ("BLOCK_K", 64))
    return triton_gates.Job("times_experts", "forward", operand, constants, 4, 3, arch)


def triton_built(instructions=("HGMMA.64x128x16.F32.BF16",), stack=0, local=0, shared=98304):
    return triton_gates.Built(128, stack, local, shared, Counter(instructions))


def test_triton_gate_passes_a_clean_kernel():
    assert triton_gates.check(triton_job(), triton_built()) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(stack=8), "spills, 8 B of stack"),
        (dict(local=16), "16 B of local memory"),
        (dict(instructions=("HGMMA.64x128x16", "STL.64")), "holds STL"),
        (dict(instructions=("FFMA", "HMMA.16816.F32.BF16")), "holds no HGMMA"),
        (dict(shared=101_377), "101377 B of shared memory, at most 101376"),
    ],
)
def test_triton_gate_fails(changes, message):
    [failure] = triton_gates.check(triton_job(), triton_built(**changes))
    assert failure.startswith("times_experts forward bf16 64x128x64 for sm_90: ") and message in failure


def test_triton_gate_asks_each_architecture_for_its_tensor_cores():
    wanted = {
        (arch, rows): triton_gates.products(triton_job("bf16", rows, arch))
        for arch in (80, 90, 100)
        for rows in (16, 64)
    }
    assert wanted == {
        (80, 16): "HMMA",
        (80, 64): "HMMA",
        (90, 16): "HMMA",
        (90, 64): "HGMMA",
        (100, 16): "HMMA",
        (100, 64): "UTCHMMA",
    }
    assert triton_gates.products(triton_job("fp32", 64, 100)) == "FFMA"


def test_triton_gate_lets_the_backward_of_the_scan_have_a_little_stack():
    tile = (("BLOCK_T", 64), ("BLOCK_P", 64), ("BLOCK_S", 64))
    job = triton_gates.Job("gradients_of_heads", "back", "bf16", tile, 8, 1, 80, "ssd")
    spills = ("HMMA.16816.F32.BF16", "STL.64")
    assert triton_gates.check(job, triton_built(spills, stack=768)) == []
    [failure] = triton_gates.check(job, triton_built(spills, stack=776))
    assert "spills, 776 B of stack" in failure


def test_triton_gate_reads_what_a_kernel_uses():
    text = " Function times_experts:\n  REG:168 STACK:8 SHARED:1024 LOCAL:4 CONSTANT[0]:612 TEXTURE:0\n"
    assert triton_gates.read_usage(text) == (168, 8, 4)
    with pytest.raises(ValueError, match="reports no registers"):
        triton_gates.read_usage("")
