"""What must hold of the Triton kernels, compiled ahead of time for GPUs that are not here.

    triton_gates.py [80 90 100]      with torch and Triton in the environment

Every block size that triton_kernels.blocks and weight_blocks may choose, at the model's widths, for sm_80, sm_90 and
sm_100: no stack, no local memory, shared memory that fits every GPU, and the tensor cores of the architecture where the
operands are bf16. Triton's wheel brings the assembler and cuobjdump.
"""

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
INTEGERS = "rows experts inner outputs a_row a_inner b_expert b_inner b_output".split()
DIVISIBLE = {"inner", "outputs", "a_row", "b_expert", "b_inner", "b_output"}  # by 16: 2,688 and 1,856 are


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


@dataclass(frozen=True)
class Built:
    registers: int
    bytes_stack: int
    bytes_local: int
    bytes_shared: int
    instructions: Counter[str]


def jobs(archs: tuple[int, ...]) -> Iterator[Job]:
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

    from hebatron_kernels.moe import triton_kernels

    kernel = getattr(triton_kernels, job.kernel)
    constants = dict(job.constants)
    pointers = {"ends": "*i32", "taken": "*i32", "scale": "*fp32", "row_sums": "*fp32"}
    signature, attributes = {}, {}
    for i, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
            continue
        signature[name] = "i32" if name in INTEGERS else pointers.get(name, f"*{job.operand}")
        if name in DIVISIBLE or name not in INTEGERS:
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


def products(job: Job) -> str:
    """The instruction that must multiply: wgmma and tcgen05 take 64 rows of their first operand at least."""
    if job.operand == "fp32":
        return "FFMA"
    constants = dict(job.constants)
    rows = constants["BLOCK_N"] if job.kernel == "times_experts" else constants["BLOCK_K"]
    if rows < 64 or job.arch == 80:
        return "HMMA"
    return "HGMMA" if job.arch == 90 else "UTCHMMA"


def check(job: Job, built: Built) -> list[str]:
    tile = "x".join(str(n) for key, n in job.constants if key in ("BLOCK_N", "BLOCK_M", "BLOCK_K"))
    where = f"{job.kernel} {job.name} {job.operand} {tile} for sm_{job.arch}"
    failures = []
    if built.bytes_stack or built.bytes_local:
        failures.append(
            f"{where}: spills, {built.bytes_stack} B of stack, {built.bytes_local} B of local memory"
        )
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
        f"Triton: {len(wanted)} kernels compiled, none spills; most registers: {said}" if not failures else ""
    )
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
