"""Ratios to peers against bench/results/kernels.json; outside the default run, on an otherwise idle machine:

    OMP_PROC_BIND=true OMP_PLACES=cores python -m pytest -m bench tests/test_bench_ratios.py

A case fails when a peer's time over ours is more than 15 % below the stored ratio. Times are not compared. A
measurement counts only when the peak of products reads at least 94 % of the stored one, before and after it; it is
taken up to three times, and a machine that is never that free skips the case, with the rates in the reason, as does
another kind of processor. Storing anew: `hebatron bench [NOUN ...] --out bench/results`, on such a machine.
"""

import importlib
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "bench"))
import suite

RUN = suite.stored()
QUICK_MS = 1500  # of all rivals together: slower cases are left to `hebatron bench`
CASES = {
    row["case"]: row for row in RUN["results"] if sum(r["ms"] for r in row["rivals"].values()) < QUICK_MS
}


@pytest.mark.bench
@pytest.mark.parametrize("name", CASES)
def test_ratio_to_a_peer_has_not_fallen(name):
    reason = suite.comparable(RUN)
    if reason:
        pytest.skip(reason)
    noun = CASES[name]["noun"]
    (case,) = [case for case in importlib.import_module(f"bench_{noun}").cases() if case.name == name]
    peaks = []
    for _ in range(3):
        torch.manual_seed(0)
        row = suite.measured(noun, case, 15, 10.0)
        peaks.append(row["peak_g_per_s"])
        if suite.usable(peaks[-1:], CASES[name]):
            assert not suite.fallen(CASES[name], row)
            return
    pytest.skip(f"peaks {peaks} GFLOP/s, stored {CASES[name]['peak_g_per_s']}: the machine is busy")
