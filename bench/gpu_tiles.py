"""The table of tiles that ships: csrc/cuda/grouped_gemm_tiles.inc from the timings of a record.

    python bench/gpu_tiles.py bench/results/2026-12-01-h200.json

A line a problem of a multiprocessor count. Where a problem was timed under two routings, the tile whose time is the
least share above the best of each is taken. Other chips' lines stay.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

from common import ROOT

TILES = ROOT / "csrc" / "cuda" / "grouped_gemm_tiles.inc"
ENTRY = re.compile(r"  X\((\w+), (\d+), (\d+), (\d+), (\d+), (\d+), (\d+), (\d+)\)")
DEFINE = "#define HEBATRON_SM90_MEASURED(X)"
Key = tuple[str, int, int, int, int, int]  # use, multiprocessors, rows, experts, k, n


def read(text: str) -> dict[Key, tuple[int, int]]:
    found: dict[Key, tuple[int, int]] = {}
    for use, *numbers in ENTRY.findall(text):
        sms, rows, experts, k, n, tile_m, tile_n = map(int, numbers)
        found[use, sms, rows, experts, k, n] = (tile_m, tile_n)
    return found


def measured(timings: list[dict[str, Any]], sms: int) -> dict[Key, tuple[int, int]]:
    """The best tile of every problem of the sm_90a kernels in a record's rows."""
    excess: dict[Key, dict[tuple[int, int], list[float]]] = {}
    for row in timings:
        times = {
            rival.partition(":")[2]: found["ms"]
            for rival, found in row["rivals"].items()
            if rival.startswith("sm90a:") and "ms" in found
        }
        if "sizes" not in row or not times:
            continue
        use, rows, experts, k, n = row["sizes"]
        of_problem = excess.setdefault((use, sms, rows, experts, k, n), {})
        for name, ms in times.items():
            m, _, columns = name.partition("x")
            of_problem.setdefault((int(m), int(columns)), []).append(ms / min(times.values()))
    best = {}
    for key, tiles in excess.items():
        timed = max(map(len, tiles.values()))  # a tile that failed under one routing is no choice
        best[key] = min((sum(e), tile) for tile, e in tiles.items() if len(e) == timed)[1]
    return best


def rewritten(text: str, found: dict[Key, tuple[int, int]]) -> str:
    """The file with these problems' tiles in place of what it said of them."""
    head, _, rest = text.partition(DEFINE)
    entries = sorted((read(rest) | found).items())
    head = head.replace(" Empty: no\n// GPU has been measured yet.", "") if entries else head
    lines = [f"  X({', '.join(map(str, (*key, *tile)))})" for key, tile in entries]
    return head + " \\\n".join([DEFINE, *lines]) + "\n"


def main(record: str) -> None:
    found = json.loads(Path(record).read_text(encoding="utf-8"))
    if found["dry_run"]:
        raise SystemExit("a dry run's times say nothing of tiles")
    tiles = measured(found["timings"], found["machine"]["sms"])
    TILES.write_text(rewritten(TILES.read_text(encoding="utf-8"), tiles), encoding="utf-8")
    print(f"{TILES.relative_to(ROOT)}: {len(tiles)} problems")


if __name__ == "__main__":
    main(*sys.argv[1:])
