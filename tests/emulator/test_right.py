"""Right kernels: right results and no report, in both builds, every mode and order of threads; and runs that repeat."""

from __future__ import annotations

import sys

import numpy as np
import pytest
from emulator_cases import HERE, MODES, Library, library

sys.path.insert(0, str(HERE.parents[1] / "bench" / "conformance"))
from expected import EXPECTED, noise, small

SEEDS = (0, 1, 2)  # 0 is the order of the threads' numbers


@pytest.fixture(params=["plain", "checked"])
def build(request: pytest.FixtureRequest) -> Library:
    return library(request.param == "checked")


def is_right(name: str) -> bool:
    return "/" not in name


def test_right_kernels_give_their_result_and_no_report(build: Library) -> None:
    names = [name for name in build.names if is_right(name)]
    assert len(names) > 15
    for name in names:
        for mode in MODES:
            for seed in SEEDS:
                assert build.run(name, mode, seed) == "", f"{name}, {mode}, seed {seed}"


# The conformance cases that expected.py leaves out and that numpy can say in a line or two.


def scans() -> bytes:
    values = noise(3, 16)
    sums = np.cumsum(values, dtype=np.uint32)
    return np.concatenate([sums[-1:], sums]).tobytes()


def streams() -> bytes:
    return noise(5, 64 * 4).reshape(64, 4)[np.arange(64) ^ 3].tobytes()


def clusters(size: int) -> bytes:
    words = noise(6, 8 * 64).reshape(-1, size, 64)
    ranks = np.arange(size, dtype=np.uint32)
    read = np.roll(words, -1, axis=1)  # rank r reads rank r + 1 and is written to by rank r - 2
    written = np.roll(words + ranks[:, None], 2, axis=1)[..., ::-1]
    rest = np.empty((*words.shape[:2], 4), np.uint32)
    rest[..., 0], rest[..., 1:] = ranks, (size, 1, 0)
    return np.concatenate([read, written, rest], axis=2).tobytes()


def copies() -> bytes:
    given = noise(20, 512 * 4).reshape(4, 128, 4)
    t = np.arange(128)
    stages = given.copy()
    stages[1] = given[1][t * 3 % 128]
    stages[0][t % 5 == 0] = stages[1][t % 3 == 0] = stages[3][9] = 0
    return stages[:, ::-1].tobytes()


def bulk_copies() -> bytes:
    given = small(54, 516)
    out = np.concatenate([given[:4], given[4:]])
    total = small(55, 256) + 2 * given[4 : 4 + 256]
    return out.tobytes() * 2 + total.tobytes()


def limits() -> bytes:
    """By argument (-inf, inf, NaN, 0, -1000): 2^v, e^v, 1 / sqrt v, sqrt v, sigmoid v, the larger of v and 3, v - v."""
    nan, inf = np.nan, np.inf
    rows = [
        [0, 0, nan, nan, 0, 3, nan],
        [inf, inf, 0, inf, 1, inf, nan],
        [nan, nan, nan, nan, nan, 3, nan],
        [1, 1, inf, 0, 0.5, 3, 0],
        [0, 0, nan, nan, 0, 3, 0],
    ]
    values = np.array(rows, np.float32)
    return np.where(np.isnan(values), np.uint32(0x7FFFFFFF), values.view(np.uint32)).tobytes()


SIMPLE = {
    "limits": limits,
    "tickets": scans,
    "streaming": streams,
    "cluster2": lambda: clusters(2),
    "cluster4": lambda: clusters(4),
    "async_copies": copies,
    "bulk": bulk_copies,
    "proxy_global": lambda: (noise(56, 64) ^ 0x5A5A5A5A).tobytes(),
}


def test_every_primitive_conforms_in_every_mode(build: Library) -> None:
    """bench/conformance: what numpy says, and where it says nothing the same bytes in every mode and order."""
    names = [name.split("/")[1] for name in build.names if name.startswith("conformance/")]
    expected = {**EXPECTED, **SIMPLE}
    assert not expected.keys() - set(names), "these cases are no longer there"
    for name in names:
        want = expected[name]() if name in expected else None
        for mode in MODES:
            for seed in SEEDS:
                assert build.run(f"conformance/{name}", mode, seed) == "", f"{name}, {mode}, seed {seed}"
                found = build.output()
                want = found if want is None else want
                assert found == want, f"{name}, {mode}, seed {seed}: other bytes than expected"


@pytest.mark.parametrize("sms", [1, 2, 5])
def test_results_do_not_depend_on_how_many_blocks_are_resident(build: Library, sms: int) -> None:
    for name in ("last_block", "lookback", "histogram", "multicast_to_2"):
        for seed in SEEDS:
            assert build.run(name, "random", seed, sms) == ""


def test_one_seed_is_one_run(build: Library) -> None:
    """The same statistics and the same report; other seeds go other ways."""
    runs = []
    for seed in range(1, 7):
        pair = []
        for _ in range(2):
            assert build.run("gemm_cp_async", "random", seed) == ""
            pair.append(build.statistics())
        assert pair[0] == pair[1]
        runs.append(pair[0].switches)
    assert len(set(runs)) > 3, "different seeds gave the same interleaving"


def test_one_seed_is_one_report() -> None:
    checked = library(True)
    reports = [checked.run("handover/no_full", "random", seed) for seed in range(6)]
    assert reports == [checked.run("handover/no_full", "random", seed) for seed in range(6)]
    assert len(set(reports)) > 1


def test_work_is_counted(build: Library) -> None:
    assert build.run("gemm") == ""
    counted = build.statistics()
    assert (counted.launches, counted.async_operations, counted.matrix_operations) == (1, 6, 12)
