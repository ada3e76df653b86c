"""What must hold of the Triton kernels, compiled ahead of time for GPUs that are not here.

    triton_gates.py [80 90 100]      with torch and Triton in the environment

grouped_gemm at every block size that its triton_kernels.blocks and weight_blocks may choose, ssd_scan at those of
heads of 64 and state 128, at the model's widths, for sm_80, sm_90 and sm_100 (ssd_scan in fp32 for sm_80): no stack
beyond STACK, no local memory, shared memory that fits every GPU, and the tensor cores of the architecture where the
operands are bf16. Triton's wheel brings the assembler and cuobjdump.
"""

import importlib
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from cuda_gates import LOCAL_MEMORY, holds, read_sass

ARCHS = (80, 90, 100)
BYTES_SHARED = 99 * 1024  # what a block may have on sm_86, sm_89 and sm_120
MEANS = (1, 16, 17, 32, 33, 96, 97)  # rows an expert has, around every change of the block sizes
INTEGERS = (
    "rows experts inner outputs a_row a_inner b_expert b_inner b_output"
    " sequences length heads head_dim state heads_a_group"
    " x_row x_head dt_row dt_head B_row B_group C_row C_group elements"
).split()
ODD = set("rows experts a_inner sequences length heads_a_group dt_row dt_head".split())  # no multiples of 16
FLOATS = ("smallest", "largest")
POINTERS = {"ends": "*i32", "taken": "*i32", "cu": "*i32"} | dict.fromkeys(
    "scale row_sums A D dt_bias sums decays start last grad_dt sums_A sums_D sums_bias".split(), "*fp32"
)
# Bytes of stack that are let pass: in ssd_scan's backward for sm_80 21 stores and 6 loads beside 192 products, in its
# sums of chunks for sm_100 8 and 56 bytes.
STACK = {"gradients_of_heads": 768, "gradients_of_groups": 64, "chunk_sums": 64}


@dataclass(frozen=True)
class Job:
    """One kernel to compile: its name, the constants, and of its pointers those that are no operands."""

    kernel: str
    name: str
    operand: str  # "bf16" or "fp32"
    constants: tuple[tuple[str, Any], ...]
    warps: int
    stages: int
    arch: int
    noun: str = "moe"


@dataclass(frozen=True)
class Built:
    registers: int
    bytes_stack: int
    bytes_local: int
    bytes_shared: int
    instructions: Counter[str]


def jobs(archs: tuple[int, ...]) -> Iterator[Job]:
    yield from grouped_gemm_jobs(archs)
    yield from ssd_jobs(archs)


def ssd_jobs(archs: tuple[int, ...]) -> Iterator[Job]:
    from hebatron_kernels.ssd import triton_kernels as kernels

    for operand, size in (("bf16", 2), ("fp32", 4)):
        block = kernels.blocks(64, 128, size)
        tile = {"FP32": False, "BLOCK_Q": 16, "BLOCK_T": block.t, "BLOCK_P": block.p, "BLOCK_S": block.s}
        part = tile | {"BLOCK_S": block.part}
        for name, text, constants in (
            ("chunk_sums", "forward", tile | {"BACK": False}),
            ("chunk_sums", "back", tile | {"BACK": True}),
            ("pass_on", "forward", {"BACK": False, "BLOCK_Q": 16, "PASSED": kernels.PASSED}),
            ("outputs", "forward", tile),
            ("gradients_of_heads", "back", part),
            ("gradients_of_groups", "of B", part | {"OF_C": False}),
            ("gradients_of_groups", "of C", part | {"OF_C": True}),
        ):
            warps = 4 if name == "pass_on" else block.warps
            for arch in archs if operand == "bf16" else archs[:1]:
                yield Job(name, text, operand, tuple(constants.items()), warps, 1, arch, "ssd")


def grouped_gemm_jobs(archs: tuple[int, ...]) -> Iterator[Job]:
    from hebatron_kernels.moe import triton_kernels as kernels

    for operand, size in (("bf16", 2), ("fp32", 4)):
        for block in sorted({kernels.blocks(mean, 1, size) for mean in MEANS}):
            tile = {"FP32": False, "BLOCK_N": block.n, "BLOCK_M": block.m, "BLOCK_K": block.k, "a_inner": 1}
            alone = {"taken": None, "scale": None, "grad": None, "row_sums": None}
            # the whole forward over weights stored (E, M, K), the gradients behind it, and that of a
            for name, more in {
                "forward": {"RELU2": True, "BACK": False, "b_inner": 1, "grad": None, "row_sums": None},
                "back": {"RELU2": True, "BACK": True, "b_inner": 1},
                "dgrad": {"RELU2": False, "BACK": False, "b_output": 1, **alone},
            }.items():
                constants = tuple({**tile, "BLOCK_E": 256, **more}.items())
                for arch in archs:
                    yield Job("times_experts", name, operand, constants, block.warps, block.stages, arch)
        for block in sorted({kernels.weight_blocks(mean, 1, size) for mean in MEANS}):
            tile = {"FP32": False, "BLOCK_N": block.n, "BLOCK_M": block.m, "BLOCK_K": block.k, "a_inner": 1}
            for arch in archs:
                yield Job("by_expert", "wgrad", operand, tuple(tile.items()), block.warps, block.stages, arch)


def build(job: Job) -> Built:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = getattr(importlib.import_module(f"hebatron_kernels.{job.noun}.triton_kernels"), job.kernel)
    constants = dict(job.constants)
    signature, attributes = {}, {}
    for i, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name in FLOATS:
            signature[name] = "fp32"
        else:
            signature[name] = "i32" if name in INTEGERS else POINTERS.get(name, f"*{job.operand}")
            if name not in ODD:
                attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, attributes)
    options = {"num_warps": job.warps, "num_stages": job.stages, "enable_fp_fusion": True}
    made = triton.compile(source, target=GPUTarget("cuda", job.arch, 32), options=options)
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(made.asm["cubin"])
        usage, code = (
            subprocess.run([tool, option, cubin], check=True, capture_output=True, text=True).stdout
            for option in ("-res-usage", "-sass")
        )
    return Built(*read_usage(usage), made.metadata.shared, read_sass(code).popitem()[1])


def read_usage(text: str) -> tuple[int, int, int]:
    """Registers, stack and local memory of `cuobjdump -res-usage`."""
    found = re.search(r"REG:(\d+) STACK:(\d+) .*?LOCAL:(\d+)", text)
    if found is None:
        raise ValueError(f"cuobjdump reports no registers: {text[-300:]}")
    return int(found[1]), int(found[2]), int(found[3])


ROWS = {
    "times_experts": "BLOCK_N",
    "by_expert": "BLOCK_K",
}  # of a product; chunk_sums: head dim; of the others: tokens


def products(job: Job) -> str:
    """The instruction that must multiply: wgmma and tcgen05 take 64 rows of their first operand at least."""
    if job.kernel == "pass_on":  # no product, but a decay
        return "MUFU.EX2"
    if job.operand == "fp32":
        return "FFMA"
    constants = dict(job.constants)
    rows = constants[ROWS.get(job.kernel, "BLOCK_T")]
    if rows < 64 or job.arch == 80:
        return "HMMA"
    return "HGMMA" if job.arch == 90 else "UTCHMMA"


def check(job: Job, built: Built) -> list[str]:
    tile = "x".join(str(n) for key, n in job.constants if key in ("BLOCK_N", "BLOCK_M", "BLOCK_K"))
    where = f"{job.kernel} {job.name} {job.operand} {tile} for sm_{job.arch}"
    failures = []
    stack = STACK.get(job.kernel, 0)
    if built.bytes_stack > stack or built.bytes_local:
        failures.append(
            f"{where}: spills, {built.bytes_stack} B of stack, {built.bytes_local} B of local memory"
        )
    if not stack:
        failures += [f"{where}: holds {name}" for name in LOCAL_MEMORY if holds(built.instructions, name)]
    if built.bytes_shared > BYTES_SHARED:
        failures.append(f"{where}: {built.bytes_shared} B of shared memory, at most {BYTES_SHARED}")
    if not holds(built.instructions, products(job)):
        failures.append(f"{where}: holds no {products(job)}")
    return failures


def main(*words: str) -> int:
    wanted = list(jobs(tuple(map(int, words)) or ARCHS))
    failures = []
    most: Counter[int] = Counter()
    with TemporaryDirectory() as cache, ProcessPoolExecutor(os.cpu_count()) as pool:
        os.environ["TRITON_CACHE_DIR"] = cache  # of this run alone: what is checked is what was compiled now
        for job, built in zip(wanted, pool.map(build, wanted)):
            failures += check(job, built)
            most[job.arch] = max(most[job.arch], built.registers)
    for failure in failures:
        print(f"gate failed: {failure}", file=sys.stderr)
    said = ", ".join(f"sm_{arch} {registers}" for arch, registers in most.items())
    print(
        f"Triton: {len(wanted)} kernels compiled, no stack beyond what is allowed; most registers: {said}"
        if not failures
        else ""
    )
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
