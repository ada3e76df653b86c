"""The cases of gpu_sanitize.py for grouped_gemm and its gradients, compared with numpy."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from gpu_sanitize import Runner

Tiles = list[tuple[int, int]]
K_TILES = [(64, 128), (64, 256), (128, 128), (128, 208), (128, 224), (128, 232)]
K_TILES += [(192, 208), (192, 224), (256, 192), (256, 208), (384, 208), (512, 192)]
N_TILES = [(64, 128), (64, 256), (128, 192), (192, 192), (256, 192), (384, 192), (512, 192)]
# The number of the implementation in csrc/hebatron/ops.h and its tiles.
FORMS: dict[str, tuple[int, Tiles]] = {
    "grouped_gemm_sm80": (1, [(16, 64), (64, 128), (128, 128)]),
    "grouped_gemm_wgrad_sm80": (1, [(64, 128), (128, 128)]),
    "grouped_gemm_sm90": (2, K_TILES),
    "grouped_gemm_dgrad_sm90": (2, N_TILES),
    "grouped_gemm_wgrad_sm90": (2, [(128, 192), (192, 192), (256, 192)]),
    "cutlass/grouped_gemm": (3, [(128, 128), (128, 208), (128, 224)]),
}
COUNTS, TAIL, WIDTH, OUTPUTS = (0, 1, 37, 0, 130), 3, 136, 264
ROWS, ENDS = sum(COUNTS) + TAIL, np.cumsum(COUNTS).astype(np.int32)
SPANS = list(enumerate(zip([0, *ENDS], ENDS)))
Floats = NDArray[np.float32]


def grouped_cases(kernel: str, run: Runner, random: np.random.Generator, few: bool) -> Iterator[str]:
    """`few`: the smallest tile and the largest, in the form that does most; the emulator has tests of its own."""
    implementation, tiles = FORMS[kernel]
    tiles = [tiles[0], tiles[-1]] if few else tiles
    for m, n in tiles:
        if "wgrad" in kernel:
            for transposed in (False, True):
                for fp32 in (False,) if few else (False, True):
                    _wgrad(run, random, implementation, m, n, transposed, fp32)
                    yield f"tile {m}x{n}{' transposed' if transposed else ''}{' fp32' if fp32 else ''}"
            continue
        layouts = {"grouped_gemm_sm80": (True, False), "grouped_gemm_dgrad_sm90": (False,)}.get(
            kernel, (True,)
        )
        for by_output in layouts:
            no_way_back = implementation == 3 or (implementation == 1 and by_output)
            forms = ("", "whole") if no_way_back else ("", "whole", "back")
            for form in forms[-1:] if few else forms:
                _grouped(run, random, implementation, m, n, by_output, form)
                yield f"tile {m}x{n}{'' if by_output else ' by width'} {form}".rstrip()


def _draw(run: Runner, random: np.random.Generator, *shape: int) -> Floats:
    return run.rounded(random.standard_normal(shape).astype(np.float32))


def _grouped(
    run: Runner, random: np.random.Generator, implementation: int, m: int, n: int, by_output: bool, form: str
) -> None:
    """`whole`: gathered, relu2 and scale. `back`: gathered, the way back through them, with the sums of rows."""
    back = form == "back"
    gather = form != "" and implementation != 3  # CUTLASS gathers no rows
    source = 50 if gather else ROWS
    a = _draw(run, random, source, WIDTH)
    stored = (len(COUNTS), OUTPUTS, WIDTH) if by_output else (len(COUNTS), WIDTH, OUTPUTS)
    b = run.rounded(random.standard_normal(stored).astype(np.float32) * WIDTH**-0.5)
    taken = random.integers(0, source, ROWS, dtype=np.int32)
    scale = random.random(ROWS, dtype=np.float32) + 0.5
    kept = run.rounded(np.maximum(_draw(run, random, ROWS, OUTPUTS), 0) ** 2 * scale[:, None])
    out, row_sums = run.output(ROWS, OUTPUTS), run.card.empty(4 * ROWS)
    run.call(
        "grouped_gemm_fwd",
        rows=ROWS,
        a_rows=source,
        experts=len(COUNTS),
        n=OUTPUTS,
        k=WIDTH,
        relu2=int(form != ""),
        a=run.put(a),
        a_stride=WIDTH,
        rows_of_a=run.card.put(taken) if gather else None,
        b=run.put(b),
        b_expert_stride=OUTPUTS * WIDTH,
        b_stride=stored[2],
        b_k_major=int(by_output),
        offsets=run.card.put(ENDS),
        scale=run.card.put(scale) if form else None,
        kept=run.put(kept) if back else None,
        row_sums=row_sums if back else None,
        out=out,
        implementation=implementation,
        workers=1,
        dtype=run.dtype,
        tile_m=m,
        tile_n=n,
    )
    product = np.zeros((ROWS, OUTPUTS), np.float32)
    for expert, (begin, end) in SPANS:
        of_rows = a[taken[begin:end]] if gather else a[begin:end]
        product[begin:end] = of_rows @ (b[expert].T if by_output else b[expert])
    if back:
        run.compare("row_sums", row_sums, (product * kept).sum(1) / scale, fp32=True)
        product *= 2 * np.sqrt(kept * scale[:, None])
    elif form:
        product = np.maximum(product, 0) ** 2 * scale[:, None]
    run.compare("out", out, product)


def _wgrad(
    run: Runner,
    random: np.random.Generator,
    implementation: int,
    m: int,
    n: int,
    transposed: bool,
    fp32: bool,
) -> None:
    a, b = _draw(run, random, 50, WIDTH), _draw(run, random, ROWS, OUTPUTS)
    taken = random.integers(0, 50, ROWS, dtype=np.int32)
    shape = (len(COUNTS), OUTPUTS, WIDTH) if transposed else (len(COUNTS), WIDTH, OUTPUTS)
    out = run.card.empty(int(np.prod(shape)) * (4 if fp32 else 2))
    arguments: dict[str, Any] = {
        "rows": ROWS,
        "a_rows": 50,
        "experts": len(COUNTS),
        "m": WIDTH,
        "n": OUTPUTS,
        "workers": 1,
        "dtype": run.dtype,
        "out_dtype": "float32" if fp32 else run.dtype,
        "a": run.put(a),
        "a_stride": WIDTH,
        "rows_of_a": run.card.put(taken),
        "b": run.put(b),
        "b_stride": OUTPUTS,
        "offsets": run.card.put(ENDS),
        "out": out,
        "transposed": int(transposed),
        "implementation": implementation,
        "tile_m": m,
        "tile_n": n,
    }
    run.call("grouped_gemm_wgrad", **arguments)
    want = np.zeros(shape, np.float32)
    for expert, (begin, end) in SPANS:
        product = a[taken[begin:end]].T @ b[begin:end]
        want[expert] = product.T if transposed else product
    run.compare("out", out, want, fp32=fp32)
