"""Bugs planted in the state-space scan's CUDA kernels, each of which the emulator's tests must find."""

import pytest
import torch
from planted import planted
from ssd_cases import cast, make

import hebatron_kernels as hk
from hebatron_kernels import testing

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("emulator")]

ENDS = [0, 5, 24]  # in chunks of one token: one segment, and two


def scan(grad=False):
    args = [*make(24, 2, 16, 1, 16, ENDS), 1]
    testing.check_oracle(hk.ssd_scan, args, torch.bfloat16, "emulator", grad)


def one_chunk(grad=False):
    testing.check_oracle(hk.ssd_scan, [*make(40, 2, 8, 1, 8), 64], torch.bfloat16, "emulator", grad)


def gradients():
    """Heads and slices of a head in one group, chunks of one sequence, short sequences and an empty one."""
    args = [*make(70, 2, 72, 1, 16, [0, 3, 3, 70]), 64]
    testing.check_oracle(hk.ssd_scan, args, torch.bfloat16, "emulator")


def gradients_in_little_memory():
    with testing.emulate(bytes_shared=99 * 1024):
        gradients()


def gradients_of_segments():
    scan(True)


def gradients_within_limits():
    args = [*make(20, 2, 8, 1, 8), 64]
    args[7] = (0.2, 0.6)
    testing.check_oracle(hk.ssd_scan, args, torch.bfloat16, "emulator")


def large_step():
    """Twenty steps of a log decay of -192 each: what is left behind them is the second part of the logs alone."""
    args = cast([*make(40, 1, 8, 1, 8), 64], torch.float32)
    args[1][5:25], args[2][0] = 1e4, -0.02
    want = hk.ssd_scan(*cast(args, torch.float64), backend="reference")[0][25:]
    got = hk.ssd_scan(*args, backend="emulator")[0][25:]
    torch.testing.assert_close(got.double(), want, rtol=0, atol=4e-6 * want.abs().max().item())


def one_token():
    args = cast(make(2, 2, 21, 1, 8)[:7], torch.float32)
    wide = torch.full((2, 16), torch.nan)
    wide[:, 4:12] = args[3].flatten(1)
    args[3] = wide[:, 4:12].unflatten(1, (1, 8))
    states = [torch.randn(2, 2, 21, 8)]
    states.append(states[0].clone())
    got, want = (
        hk.ssd_update(state, *args, backend=backend) for state, backend in zip(states, ("emulator", "torch"))
    )
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(*states)


# file, what stands there, what is put in its place, what finds it, what the report says ("": a wrong value)
BUGS = {
    "update: rows past the head's last": (
        "cuda/ssd_update.cu",
        "        if (row + r < head_dim) load<kCount>",
        "        load<kCount>",
        one_token,
        "data race in state|outside",
    ),
    "update: rows of B taken as dense": (
        "cuda/ssd_update.cu",
        "q * a.B_stride",
        "q * int64_t(a.groups) * state_dim",
        one_token,
        "",
    ),
    "scan: later tokens seen": ("cuda/ssd_scan.cu", "from <= to ?", "from <= to + 1 ?", one_chunk, ""),
    "scan: the next chunk's rows of C over those still read": (
        "cuda/ssd_scan.cu",
        "    block_sync();  // the steps are here; C and h may be written over\n",
        "",
        scan,
        "data race in shared memory",
    ),
    "scan: a segment's decay is its last chunk's": (
        "cuda/ssd_segments.cuh",
        "log += mine.total;",
        "log = mine.total;",
        scan,
        "",
    ),
    "scan: logs of decays in one part": (
        "cuda/ssd_tiles.cuh",
        "(high[i] - high[j]) + (low[i] - low[j])",
        "high[i] - high[j]",
        large_step,
        "",
    ),
    "scan: two sequences' segments in one slot": (
        "cuda/ssd_tiles.cuh",
        "start_of(a, middle) / length + middle <= slot",
        "start_of(a, middle) / length <= slot",
        scan,
        "",
    ),
    "scan: states carried on undecayed": (
        "cuda/ssd_segments.cuh",
        "h[e] = decay[i] * h[e] + added[i][e];",
        "h[e] += added[i][e];",
        scan,
        "",
    ),
    "backward: the token itself among the pairs its decay stands between": (
        "cuda/ssd_scan_bwd.cu",
        "within[0] += column < row + g ?",
        "within[0] += column <= row + g ?",
        gradients,
        "grad",
    ),
    "backward: a head's steps over those still read": (
        "cuda/ssd_scan_bwd.cu",
        "mine.write(steps[unit / slices % 2]);",
        "mine.write(steps[0]);",
        gradients,
        "shared memory",
    ),
    "backward: sums of one unit over those of the last": (
        "cuda/ssd_scan_bwd.cu",
        "Sums<T>& to = sums[unit % 2];",
        "Sums<T>& to = sums[0];",
        gradients,
        "data race in shared memory|nobody wrote",
    ),
    "backward: one stage, and the next unit's tiles over those still read": (
        "cuda/ssd_scan_bwd.cu",
        "        sync();\n        load_unit(unit + 1);",
        "        load_unit(unit + 1);",
        gradients_in_little_memory,
        "data race in shared memory",
    ),
    "backward: two stages, and the next unit's tiles over those still read": (
        "cuda/ssd_scan_bwd.cu",
        "      sync();  // the unit's tiles and steps are here, and nobody reads the last one's any more\n",
        "",
        gradients,
        "data race in shared memory",
    ),
    "backward: a second head goes on with the first one's sums": (
        "cuda/ssd_scan_bwd.cu",
        "if (unit % slices == 0) total",
        "if (unit == 0) total",
        gradients,
        "grad",
    ),
    "backward: rows past the sequence's last": (
        "cuda/ssd_scan_bwd.cu",
        "               at.tokens - row, int(a.state_dim) - column_S);",
        "               16, int(a.state_dim) - column_S);",
        gradients,
        "past the end of grad_B",
    ),
    "backward: what a state's entry decays to counted whole": (
        "cuda/ssd_scan_bwd.cu",
        "double(carried * exp2_approx(float(step.total)))",
        "double(carried)",
        gradients,
        "grad",
    ),
    "backward: empty chunks leave what the workspace held": (
        "cuda/ssd_scan_bwd.cu",
        "    for (int i = threadIdx.x; i < count; i += kGradThreads)",
        "    for (int i = threadIdx.x; i < 0; i += kGradThreads)",
        gradients,
        "grad|workspace",
    ),
    "backward: gradients of states walk to the sequence's end": (
        "cuda/ssd_segments.cuh",
        "(w.back ? count - 1 - turn : turn)",
        "turn",
        gradients_of_segments,
        "grad",
    ),
    "backward: a step at its limit has a gradient": (
        "cuda/ssd_scan_bwd.cu",
        "if (open >= float(a.dt_min) && open <= float(a.dt_max))",
        "if (open >= float(a.dt_min))",
        gradients_within_limits,
        "grad",
    ),
}


@pytest.mark.parametrize("name", BUGS)
def test_a_planted_bug_is_found(name):
    file, right, wrong, find, report = BUGS[name]
    with planted(file, right, wrong), pytest.raises((RuntimeError, AssertionError), match=report):
        find()


def test_nothing_is_found_where_nothing_is_planted():
    with testing.emulate(checked=True):
        for find in {bug[3] for bug in BUGS.values()}:
            find()
