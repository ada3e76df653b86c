"""Planted bugs: the checked build must report each in every mode and order of threads, and name the lines concerned."""

from __future__ import annotations

import re
from dataclasses import dataclass

import pytest
from emulator_cases import MODES, Library, library, markers

SEEDS = (0, 1, 2, 3)


@dataclass
class Report:
    """What a report must contain, and in `lines` the markers of the lines that it must name."""

    says: str
    lines: tuple[str, ...]


def race(first: str, second: str, where: str = "shared memory") -> Report:
    return Report(f"data race in {where}", (first, second))


def no_fence(first: str, second: str) -> Report:
    return Report("async proxy, and no fence_proxy_async stands between them", (first, second))


def error(says: str, *lines: str) -> Report:
    return Report(says, lines)


STUCK = "deadlock, every thread waits"
OVERWRITTEN = race("pipeline.load", "pipeline.load")

# Every case with a slash in its name. Several reports: whichever of them the order of the threads brings out first.
BUGS: dict[str, Report | list[Report]] = {
    # barriers and warps
    "reverse/no_block_sync": race("reverse.write", "reverse.read"),
    "swap/no_warp_sync": race("swap.write", "swap.read"),
    "swap/shuffle_for_sync": race("swap.write", "swap.read"),
    "handover/no_full": race("handover.write", "handover.read"),
    "handover/no_empty": [
        race("handover.write", "handover.read"),
        error("named_barrier_sync", "handover.full"),  # the arrivals of two rounds count for one
    ],
    "handover/wrong_count": [
        error("barrier 1 counts 32 threads here and 64 elsewhere", "handover.full"),
        error("barrier 1 counts 64 threads here and 32 elsewhere", "handover.arrive"),
    ],
    "collective/half_a_warp": error(": 16 lanes have arrived", "half_a_warp.shuffle"),
    "collective/two_kinds": error(
        "in different collectives", "two_collectives.shuffle", "two_collectives.ballot"
    ),
    "collective/half_a_block": error(": 32 of 64 threads have arrived", "half_a_block.sync"),
    # bounds, memory nobody wrote, the language
    "reverse/unwritten": error("is read before anybody wrote it", "reverse.read"),
    "reverse/past_shared": error("at offset 256 of 256 bytes of shared memory", "reverse.write"),
    "reverse/past_tensor": error("0 bytes past the end of out (256 bytes)", "reverse.out"),
    "reverse/before_tensor": error("4 bytes before out (256 bytes)", "reverse.out"),
    "bulk/past_tensor": error("0 bytes past the end of in (1024 bytes)", "bulk.load"),
    "bulk/past_shared": error("past the block's", "bulk.load"),
    "tile_out/past_tensor": error("past the end of out (1024 bytes)", "tile_out.store"),
    "language/local_array": error("an array index is out of bounds", "local_array.index"),
    "language/shift": error("a shift is out of range", "shift"),
    "language/overflow": error("a signed product overflows", "overflow"),
    "language/misaligned": error("at an address that is no multiple of its size", "misaligned"),
    "both_memories/no_room_for_alignment": error("more than a block may use", "both_memories"),
    "registers/not_of_8": error("setmaxnreg takes multiples of 8 from 24 to 256, got 44", "registers.fewer"),
    "registers/too_many": error("ask for 66560 registers, and the block has 64512"),
    "registers/no_decrease": error("setmaxnreg: 176 is no decrease from 168", "registers.fewer"),
    "registers/one_warp": error("setmaxnreg", "one_warp_decreases"),
    # between blocks
    "blocks/one_word": race("one_word.write", "one_word.write", "out at byte 0"),
    "last_block/no_release": race("last_block.write", "last_block.read", "partial"),
    "last_block/no_acquire": race("last_block.write", "last_block.read", "partial"),
    "last_block/no_block_sync": race("last_block.write", "last_block.read", "partial"),
    "lookback/relaxed_flag": race("lookback.write", "lookback.read", "sum"),
    "lookback/flag_first": race("lookback.write", "lookback.read", "sum"),
    "lookback/backwards": error("load_acquire", "lookback.wait"),
    "histogram/plain_add": race("histogram.add", "histogram.add", "bins"),
    # cp.async
    "staged/no_wait": race("staged.copy", "staged.read"),
    "staged/one_group_less": race("staged.copy", "staged.read"),
    "staged/no_sync_after_wait": race("staged.copy", "staged.read"),
    "staged/no_sync_before_reuse": race("staged.copy", "staged.read"),
    "staged/left_open": error("ends with cp.async copies it has not waited for", "staged.end"),
    "staged/misaligned": error("multiples of 16", "staged.copy"),
    "gather/no_wait_on_full": [
        race("gather.copy", "gather.read"),
        race("gather.copy", "gather.copy"),  # the reader lets the next copy in before the first is known
    ],
    "gather/no_wait_on_empty": race("gather.copy", "gather.copy"),
    # mbarriers and TMA loads
    "pipeline/no_wait_on_empty": [
        OVERWRITTEN,
        error("one arrival too many at the mbarrier", "pipeline.expect"),
    ],
    "pipeline/no_wait_on_full": race("pipeline.load", "pipeline.read"),
    "pipeline/early_release": race("pipeline.load", "pipeline.read"),
    "pipeline/wrong_phase": race("pipeline.load", "pipeline.read"),
    "pipeline/too_few_bytes": error("more bytes arrived than were expected at the mbarrier", "pipeline.load"),
    "pipeline/too_many_bytes": Report(
        "waits for 0 of 1 arrivals and 16 bytes", ("pipeline.full", "pipeline.empty")
    ),
    "pipeline/two_arrivals": error("one arrival too many at the mbarrier", "pipeline.second_arrival"),
    "pipeline/no_fence_init": no_fence("pipeline.init", "pipeline.load"),
    "pipeline/no_init": [
        error("is used before mbarrier_init", "pipeline.full"),
        error("is used before mbarrier_init", "pipeline.empty"),
    ],
    "pipeline/misaligned_tile": error("must start at a multiple of 1,024", "pipeline.load"),
    "bulk/no_wait": race("bulk.load", "bulk.read"),
    "bulk/misaligned": error("multiples of 16", "bulk.load"),
    # wgmma and mma
    "gemm/release_before_wait": race("gemm.wgmma", "gemm.load"),
    "gemm/wait_one": race("gemm.wgmma", "gemm.load"),
    "gemm/no_wgmma_fence": error("wgmma without wgmma_fence before it", "gemm.wgmma"),
    "gemm/overwrite": race("gemm.wgmma", "gemm.overwrite"),
    "gemm/left_open": error("ends with wgmma it has not waited for", "gemm.out"),
    "gemm/different_operands": error("give different operands", "gemm.wgmma"),
    "held/overwritten": error("A's registers were changed before wgmma_wait", "held.wgmma", "held.wait"),
    "gemm_cp_async/no_proxy_fence": no_fence("gemm.copy", "gemm.wgmma"),
    "gemm_cp_async/fence_without_sync": race("gemm.copy", "gemm.wgmma"),
    "gemm_stores/no_proxy_fence": no_fence("gemm.store", "gemm.wgmma"),
    "mma/no_warp_sync": race("mma.store", "mma.load"),
    "mma/misaligned": error("must be a multiple of 16", "mma.load"),
    # TMA stores
    "tile_out/no_proxy_fence": no_fence("tile_out.write", "tile_out.store"),
    "tile_out/no_sync": race("tile_out.write", "tile_out.store"),
    "tile_out/no_wait_read": race("tile_out.write", "tile_out.store"),
    "tile_out/no_commit": race("tile_out.write", "tile_out.store"),
    "tile_out/left_unread": error("tma_wait_read is missing", "tile_out.end"),
    "tile_out/misaligned": error("multiples of 16", "tile_out.store"),
    "publish/no_wait": race("publish.store", "publish.read", "middle"),
    # clusters
    "ring/no_sync_before_read": race("ring.write", "ring.read"),
    "ring/no_sync_before_write": race("ring.read", "ring.remote_write"),
    "ring/block_sync_only": race("ring.write", "ring.read"),
    "ring/rank_outside": error("names rank 2 of a smaller cluster", "ring.read"),
    "multicast/no_cluster_sync": race("multicast.init", "multicast.load"),
    "multicast/no_wait_on_empty": race("multicast.load", "multicast.read"),
    "multicast/rank_outside": error("names ranks outside the cluster", "multicast.load"),
}
# Those that show only where one block overtakes another, in random mode with some seed.
OVERTAKEN = {
    "relay/one_short": race("relay.part", "relay.read", "part"),
    "ring/no_sync_at_end": error("is used after its end", "ring.remote_write"),
}
DEADLOCKS = (
    "collective/half_a_warp",
    "collective/half_a_block",
    "lookback/backwards",
    "pipeline/too_many_bytes",
)


def is_bug(name: str) -> bool:
    return "/" in name and not name.startswith("conformance/")


def matches(report: str, wanted: Report) -> bool:
    """Each line is named, and a line that stands for both sides of a race twice."""
    places = [markers()[line] for line in wanted.lines]
    named = re.findall(r"tests/emulator/cases/\w+\.cu:\d+", report)
    return wanted.says in report and all(named.count(place) >= places.count(place) for place in places)


def test_every_planted_bug_is_expected(checked: Library) -> None:
    assert {name for name in checked.names if is_bug(name)} == BUGS.keys() | OVERTAKEN.keys()


@pytest.mark.parametrize("name", BUGS)
def test_planted_bug_is_reported_with_its_lines(name: str) -> None:
    wanted = BUGS[name]
    choices = wanted if isinstance(wanted, list) else [wanted]
    for mode in MODES:
        for seed in SEEDS:
            report = library(True).run(name, mode, seed)
            assert any(matches(report, choice) for choice in choices), (
                f"{mode}, seed {seed}: {report or 'no report'}\nwanted {choices}"
            )


@pytest.mark.parametrize("name", OVERTAKEN)
def test_blocks_overtake_each_other_in_random_mode(name: str) -> None:
    reports = [library(True).run(name, "random", seed) for seed in range(8)]
    assert any(matches(report, OVERTAKEN[name]) for report in reports), reports
    assert all(report == "" or matches(report, OVERTAKEN[name]) for report in reports), reports


@pytest.mark.parametrize("name", DEADLOCKS)
def test_deadlock_is_explained_by_both_builds(name: str) -> None:
    wanted = BUGS[name]
    assert isinstance(wanted, Report)
    for checked in (False, True):
        report = library(checked).run(name)
        assert STUCK in report and matches(report, wanted), report


def test_emulator_runs_on_after_a_report(checked: Library) -> None:
    """A report abandons the fibers of its launch; the next launch must not notice."""
    for name in ("pipeline", "gemm", "multicast_to_4"):
        for bug in ("pipeline/early_release", "collective/half_a_block", "language/shift"):
            assert checked.run(bug) != ""
            assert checked.run(name) == ""
