"""ssd_scan's Triton kernels in Triton's interpreter; run by test_triton.py, as interpreted_triton.py is."""

import pytest
import torch
from ssd_cases import cast, make

import hebatron_kernels as hk
from hebatron_kernels import testing
from hebatron_kernels.ssd import triton_kernels

DTYPES = [torch.float32, torch.bfloat16]
# one token; a chunk and one more; empty sequences first, in the middle and last beside lengths around a chunk, and
# sizes that are no power of two; whole tiles, nothing optional; no token at all
CASES = {
    "one token": dict(tokens=1),
    "a chunk and one": dict(tokens=65, heads=1, groups=1),
    "sequences": dict(tokens=37, ends=[0, 0, 17, 17, 33, 34, 37, 37], heads=4, groups=2, head_dim=5, state=7),
    "bare": dict(tokens=20, heads=2, groups=1, head_dim=16, state=32, D=False, bias=False, initial=False),
    "nothing": dict(tokens=0, ends=[0, 0, 0]),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_ssd_scan_triton_matches_oracle(dtype, case):
    testing.check_oracle(hk.ssd_scan, [*make(**CASES[case]), 128], dtype, "triton")


@pytest.mark.parametrize("limits", [(0.1, 0.5), (0.0, 0.2), (3.0, 3.0)])
def test_ssd_scan_triton_passes_no_gradient_where_the_limits_cut(limits):
    args = make(tokens=18, heads=2, groups=1)
    args[7] = limits
    testing.check_oracle(hk.ssd_scan, [*args, 128], torch.float32, "triton")


def test_ssd_scan_triton_takes_steps_of_any_size():
    """exp of the raw step that overflows, and one that 1 + exp rounds away."""
    args = [
        a.float() if torch.is_tensor(a) and a.is_floating_point() else a
        for a in make(tokens=6, initial=False, bias=False)
    ]
    args[1] = torch.tensor([-40.0, -9.0, 0.0, 19.0, 30.0, 200.0])[:, None].repeat(1, 4)
    testing.check_oracle(hk.ssd_scan, [*args, 128], torch.float32, "triton", grad=False)
    got = hk.ssd_scan(*args, backend="triton")[1]
    one = hk.ssd_scan(*[a[:1] if i in (0, 1, 3, 4) else a for i, a in enumerate(args)], backend="triton")[1]
    assert got.isfinite().all() and one.ne(0).all()


@pytest.mark.parametrize("chunk_size", [3, 20, 64])
def test_ssd_scan_triton_takes_any_chunk(chunk_size):
    testing.check_oracle(
        hk.ssd_scan,
        [*make(tokens=25, ends=[0, 12, 25], heads=1, groups=1), chunk_size],
        torch.float32,
        "triton",
    )


def test_ssd_scan_triton_keeps_packed_sequences_apart():
    """The bits of each alone, whatever the other one holds."""
    args = [
        a.float() if torch.is_tensor(a) and a.is_floating_point() else a
        for a in make(tokens=40, ends=[0, 17, 40], heads=2, groups=1)
    ]
    whole, states = hk.ssd_scan(*args, backend="triton")
    args[0][:17], args[4][:17], args[9][0] = torch.nan, torch.nan, torch.nan
    beside, after = hk.ssd_scan(*args, backend="triton")
    assert (
        beside[:17].isnan().any()
        and torch.equal(beside[17:], whole[17:])
        and torch.equal(after[1], states[1])
    )
    alone = [a[17:] if i in (0, 1, 3, 4) else a for i, a in enumerate(args)]
    alone[8], alone[9] = None, args[9][1:]
    assert torch.equal(hk.ssd_scan(*alone, backend="triton")[0], whole[17:])


def test_ssd_scan_triton_takes_views_of_a_projection():
    args = cast(make(tokens=20), torch.float32)
    want = testing.run(hk.ssd_scan, args, backend="triton")
    row = torch.cat([args[i].flatten(1) for i in (0, 3, 4, 1)], 1)
    x, B, C, dt = row.split([args[i].flatten(1).shape[1] for i in (0, 3, 4, 1)], 1)
    views = [
        x.unflatten(1, args[0].shape[1:]),
        dt,
        args[2],
        *(v.unflatten(1, args[3].shape[1:]) for v in (B, C)),
    ]
    assert not views[0].is_contiguous() and torch.equal(
        hk.ssd_scan(*views, *args[5:], backend="triton")[0], want["out0"]
    )
    across = [args[0].transpose(0, 2).contiguous().transpose(0, 2), *args[1:]]
    assert torch.equal(hk.ssd_scan(*across, backend="triton")[0], want["out0"])


def test_ssd_scan_triton_registers_and_compiles_to_one_graph():
    args = [
        a.float() if torch.is_tensor(a) and a.is_floating_point() else a
        for a in make(tokens=3, ends=[0, 1, 3], heads=1, groups=1, head_dim=2, state=2)
    ]
    testing.check_registration("ssd_scan", *args, 128, backend="triton")
    testing.check_fullgraph(hk.ssd_scan, args, "triton")


def test_ssd_scan_triton_says_what_it_refuses():
    for sizes, reason in (
        (dict(head_dim=129), "head dim of at most 128, got 129"),
        (dict(state=257), "state of at most 256"),
    ):
        args = cast(make(tokens=3, **sizes), torch.float32)
        with pytest.raises(hk.BackendError, match=rf"ssd_scan\[triton\]: takes a {reason}"):
            hk.ssd_scan(*args, backend="triton")
    assert "triton    runs in Triton's interpreter, only by name" in hk.explain(
        hk.ssd_scan,
        *cast(make(tokens=3), torch.float32),
    )


def test_blocks_are_powers_of_two_and_fit():
    for head_dim, state in ((1, 1), (64, 128), (80, 16), (128, 256)):
        for size in (2, 4):
            found = triton_kernels.blocks(head_dim, state, size)
            assert all(n & (n - 1) == 0 and n >= 16 for n in found[:4])
            assert found.p >= head_dim and found.s >= state and found.s % found.part == 0
