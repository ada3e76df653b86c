"""Bugs planted in the expert layer's kernels: the emulator's tests must find each, as a report or as a wrong value."""

import pytest
import torch
from moe_cases import mlp, routing
from planted import planted

import hebatron_kernels as hk
from hebatron_kernels import testing

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("emulator")]


def route(groups, kept):
    args = [*routing(9, 24), 5, groups, kept, True, 2.5]
    return lambda: testing.check_oracle(hk.moe_route, args, torch.float32, "emulator")


def permute():
    ids = torch.randint(7, (1500, 3))
    got = hk.moe_permute(torch.ones(1500, 1), ids, 7, backend="emulator")
    assert torch.equal(got[1], torch.argsort(ids.flatten(), stable=True))


def combine():
    rows, order, weights = torch.randn(24, 80)[:, 8:-8], torch.randperm(24), torch.rand(8, 3)
    testing.check_oracle(hk.moe_combine, [rows, order, weights, 8], torch.float32, "emulator")


def layer():
    testing.check_oracle(hk.moe_mlp, mlp(30, 6, 3, 48, 32), torch.bfloat16, "emulator")


# file, what stands there, what is put in its place, what finds it, what the report says ("" : a wrong value)
BUGS = {
    "route: keys read before every lane has written its own": (
        "cuda/moe_route.cu",
        "    warp_sync();\n    uint64_t total[kSlots];",
        "    uint64_t total[kSlots];",
        route(4, 2),
        "data race in shared memory|is read before anybody wrote it",
    ),
    "route: keys of the next token over those still read": (
        "cuda/moe_route.cu",
        "    warp_sync();  // the next token's keys may be written\n",
        "",
        lambda: testing.check_oracle(
            hk.moe_route, [*routing(230, 24), 5, 4, 2, True, 2.5], torch.float32, "emulator"
        ),
        "data race in shared memory",
    ),
    "route: zeros over the gradients of the chosen": (
        "cuda/moe_route.cu",
        "    warp_sync();\n    const double s = choice.score;",
        "    const double s = choice.score;",
        route(1, 1),
        "data race in grad_logits",
    ),
    "route: the bias forgotten": (
        "cuda/moe_route.cu",
        "float(score[i]) + a.bias[e]",
        "float(score[i])",
        route(1, 1),
        "",
    ),
    "permute: a warp's next row read while a lane moves it on": (
        "cuda/moe_permute.cu",
        "    warp_sync();\n    if (valid) {",
        "    if (valid) {",
        permute,
        "data race in shared memory",
    ),
    "permute: slots of the blocks before not counted": (
        "cuda/moe_permute.cu",
        " + earlier[e];",
        ";",
        permute,
        "data race in (order|position)|",
    ),
    "permute: ends read before they are summed": (
        "cuda/moe_permute.cu",
        "scan(ends, bins);\n  block_sync();",
        "scan(ends, bins);",
        permute,
        "data race in shared memory",
    ),
    "combine: rows taken as dense": (
        "cuda/moe_combine.cu",
        "position[slot] * a.rows_stride",
        "position[slot] * a.width",
        combine,
        "",
    ),
    "combine: the sum of a warp for that of a block": (
        "cuda/moe_combine.cu",
        "dot = block_sum(dot, slots);",
        "dot = warp_sum(dot);",
        lambda: testing.check_oracle(
            hk.moe_combine,
            [torch.randn(6, 2688), torch.randperm(6), torch.rand(3, 2), 3],
            torch.float32,
            "emulator",
        ),
        "",
    ),
    "layer: the way back without the tokens' order": (
        "cuda/moe.cu",
        "by_slot[slot] = by_row[position[slot]];",
        "by_slot[slot] = by_row[slot];",
        layer,
        "",
    ),
    "layer: up's gradient not transposed": (
        "cuda/moe.cu",
        "g.transposed = up;",
        "g.transposed = false;",
        layer,
        "",
    ),
}


@pytest.mark.parametrize("name", BUGS)
def test_a_planted_bug_is_found(name):
    file, right, wrong, find, report = BUGS[name]
    with planted(file, right, wrong), pytest.raises((RuntimeError, AssertionError), match=report):
        find()


def test_nothing_is_found_where_nothing_is_planted():
    with testing.emulate(checked=True):
        for find in {id(bug[3]): bug[3] for bug in BUGS.values()}.values():
            find()
