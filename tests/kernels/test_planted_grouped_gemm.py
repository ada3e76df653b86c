"""Bugs planted into the sm_90a kernels of grouped_gemm: what their tests must catch."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from gemm_cases import check_relu2, check_wgrad, check_wgrad_takes_no_nan_from_its_neighbours
from planted import changed, planted

from hebatron_kernels import testing

DEVICE, WGRAD = "cuda/grouped_gemm_sm90.cuh", "cuda/grouped_gemm_wgrad_sm90.cu"
LISTS = dict(TILES="X(64, 128, 64)", DGRAD_TILES="X(64, 256, 64)", WGRAD_TILES="X(128, 192)")
WRONG = r"error \S+ over the bound|differs at"  # a wrong value
RACE = "data race in shared memory"
ORDERS = [dict(mode="eager"), dict(mode="lazy"), dict(mode="random", seed=1)]


@dataclass
class Bug:
    """`new` in place of `old` in csrc's `file`: `catches` must fail with what `says` matches, in every order of the
    work in flight."""

    file: str
    catches: Callable[[], Any]
    old: str
    new: str
    says: str
    dgrad: str = LISTS["DGRAD_TILES"]

    @property
    def texts(self):
        return (self.file, self.old, self.new), LISTS | dict(DGRAD_TILES=self.dgrad)


def forward(**texts):
    return Bug(DEVICE, lambda: check_relu2("sm90a:64x128", "few", 11 * 64 + 8, 136, True, True), **texts)


def cluster(**texts):
    catches = lambda: check_relu2("sm90a:384x192", "few", 6 * 64, 200, True, False)  # noqa: E731
    return Bug(DEVICE, catches, **texts, dgrad="X(384, 192, 192)")


def edges(outputs=280, **texts):
    return Bug(DEVICE, lambda: check_relu2("sm90a:64x256", "edges", 72, outputs, True, False), **texts)


def neighbours():
    check_wgrad_takes_no_nan_from_its_neighbours("sm90a:128x192", 70, False)


def weights(catches=None, **texts):
    default = lambda: check_wgrad("sm90a:128x192", "edges", 64, 6 * 72, 136, True, False, torch.bfloat16)  # noqa: E731
    return Bug(WGRAD, catches or default, **texts)


BUGS = {
    "the producer does not wait until a stage is empty": forward(
        old="      mbarrier_wait(&shared.empty[ring.stage], ring.phase ^ 1);\n",
        new="",
        says=f"{RACE}|one arrival too many",
    ),
    "the consumers do not wait until a stage is full": forward(
        old="      mbarrier_wait(&shared.full[ring.stage], ring.phase);\n", new="", says=RACE
    ),
    "a stage is given back before its products are done": forward(
        old="""      wgmma_wait<1>();  // the group before this one is done, and its stage free
      if (step > 0 && speaks) release<C>(&shared.empty[reading]);
      reading = ring.stage;
""",
        new="""      if (speaks) release<C>(&shared.empty[ring.stage]);
      wgmma_wait<1>();
      reading = -1;
""",
        says=f"{RACE}|one arrival too many",
    ),
    "cp.async's writes are not fenced for wgmma": forward(
        old="      if (C::kGather) fence_proxy_async();\n",
        new="",
        says="no fence_proxy_async stands between them",
    ),
    "a row of the next expert is stored": edges(
        old="const bool mine = row < tile.row_end &&",
        new="const bool mine = row <= tile.row_end &&",
        says=f"{WRONG}|past the end of|race",
    ),
    "a row's sum is one lane's": edges(old="    sum[half] += shfl_xor(sum[half], 2);\n", new="", says=WRONG),
    "pieces of columns that are not there are summed": edges(
        outputs=8,  # one piece in the workspace, and two warpgroups side by side
        old="  if (!p.kept || left >= p.n) return;",
        new="  if (!p.kept) return;",
        says=r"past the end of",
    ),
    "groups of 64 columns are taken to lie together": edges(
        old="1024, C::kBKMajor ? 16 : kBytesGroup)", new="1024, C::kBKMajor ? 16 : 1024)", says=WRONG
    ),
    "a block gives back its neighbour's stage to itself": cluster(
        old="mbarrier_arrive_rank(empty, uint32_t(rank));",
        new="mbarrier_arrive(empty);",
        says=f"{RACE}|one arrival too many",
    ),
    "a block starts before its neighbour's barriers are there": cluster(
        old="""  if (C::kCluster > 1) {
    warp_sync();  // barrier.cluster is .aligned: a warp comes to it together
    cluster_sync();
  } else {
    block_sync();
  }
""",
        new="  block_sync();\n",
        says=f"{RACE}|before mbarrier_init",
    ),
    "three consumer warpgroups ask for more registers than there are": cluster(
        old="kConsumer = kGroups == 2 ? 232 : 152;",
        new="kConsumer = kGroups == 2 ? 232 : 160;",
        says="setmaxnreg waits for ever",
    ),
    "both blocks load the same half of b": cluster(
        old="  const int rank = C::kCluster > 1 ? int(cluster_rank()) : 0;\n#pragma unroll\n",
        new="  const int rank = 0;\n#pragma unroll\n",
        says=f"{RACE}|before anybody wrote it",
    ),
    "the neighbour's rows are multiplied by zero": weights(
        old="const bool whole = part.end - first >= kStep;",
        new="const bool whole = true;",
        says="NaN differs at",
        catches=neighbours,
    ),
    "a row behind the expert's last is gathered": weights(
        old="""        const bool exists = first + row + 16 * i < part.end;
#pragma unroll
        for (int g = 0; g < C::kGroupsA; g++)""",
        new="""        const bool exists = true;
#pragma unroll
        for (int g = 0; g < C::kGroupsA; g++)""",
        says="NaN differs at",
        catches=neighbours,
    ),
    "an expert without rows is left as it was": weights(
        old="      store_zeros<C>(p, part);\n", new="", says="NaN differs at"
    ),
    "the next rows are found too late": weights(
        old="      find_rows(p, first + kStep + row, part.end, source);\n", new="", says=WRONG
    ),
}


@pytest.mark.parametrize("name", BUGS)
def test_planted_bug_still_applies(name):
    place, lists = BUGS[name].texts
    assert changed(*place, **lists)


@pytest.mark.slow
@pytest.mark.parametrize("name", BUGS)
def test_planted_bug_is_caught(name):
    lacks = testing.emulator_lacks()
    if lacks is not None:
        pytest.skip(f"the emulator needs {lacks}")
    bug = BUGS[name]
    place, lists = bug.texts
    with planted(*place, **lists):
        for order in ORDERS:
            with testing.emulate(**order), pytest.raises((AssertionError, RuntimeError)) as report:
                bug.catches()
            assert re.search(bug.says, str(report.value)), f"{order}: {report.value}"
