"""attention_prefill's forward by wgmma and TMA under the emulator: against the oracle, the same bits in any order of
work, documents that never see one another, no race; planted bugs found."""

import pytest
import torch
from attention_cases import MASKS, PACKS, make, packed
from emulated import ORDERS
from planted import planted

import hebatron_kernels as hk
from hebatron_kernels import _native, testing

BF16 = torch.bfloat16

pytestmark = pytest.mark.usefixtures("emulator")


def forward(*args, backend):
    with torch.no_grad():
        return hk.attention_prefill(*args, backend=backend)


def check(args):
    testing.check_oracle(forward, args, BF16, "emulator", grad=False)


def model_heads(lengths_q, lengths_k=None, heads=2):
    return packed(lengths_q, lengths_k, heads=heads, kv_heads=1, head_dim=128)


@pytest.mark.parametrize(("lengths_q", "lengths_k"), PACKS)
def test_attention_sm90_matches_oracle(lengths_q, lengths_k):
    for causal, window in MASKS:
        check([*model_heads(lengths_q, lengths_k), causal, None, window])


# queries, keys, causal, window: past a tile of 128 queries and two of 128 keys, so that both stages are used again; a
# chunk behind its keys; a window that begins inside a tile
LONG = [(150, 150, True, None), (20, 400, True, None), (130, 300, True, 90), (3, 270, False, None)]


@pytest.mark.parametrize(("queries", "keys", "causal", "window"), LONG)
def test_attention_sm90_matches_oracle_past_its_tiles(queries, keys, causal, window):
    check([*make(queries, keys, 2, 1, 128), None, None, causal, 0.3, window])


def test_attention_sm90_is_chosen_by_the_chip_and_the_head_dim():
    def products(args, **options):
        _native.emulator_module.take_statistics()
        with testing.emulate(**options):
            forward(*args, backend="emulator")
        found = _native.emulator_module.take_statistics()
        assert found["launches"] == 1
        return found["matrix_operations"]

    args = testing._cast(make(60, None, 2, 1, 128), BF16)
    # a wgmma of 64 rows and 128 columns does the work of 64 mma.sync, and a tile is 4 times as long
    assert 4 * products(args) < products(args, compute_capability=89)
    narrow = testing._cast(make(60, None, 2, 1, 120), BF16)
    assert products(narrow) == products(narrow, compute_capability=89)
    shared = [
        args[0],
        args[1].expand(-1, 2, -1),
        args[2].expand(-1, 2, -1),
    ]  # heads that overlap have no tensor map
    want = forward(*(x.contiguous() for x in shared), backend="emulator")
    torch.testing.assert_close(forward(*shared, backend="emulator"), want, rtol=2e-2, atol=2e-2)


def test_attention_sm90_keeps_the_log_of_the_sum():
    args = testing._cast(model_heads([5, 40, 3], [2, 300, 0]), BF16)
    found = []
    for capability in (89, 90):
        with testing.emulate(compute_capability=capability):
            found.append(torch.ops.hebatron._attention_prefill_keep(*args, True, 0.1, None, "emulator"))
    torch.testing.assert_close(found[1][1], found[0][1], rtol=1e-5, atol=1e-5)
    assert (found[1][1][:3] == -torch.inf).all() and (found[1][0][45:] == 0).all()


def test_attention_sm90_keeps_a_bad_document_to_itself():
    args = [*testing._cast(model_heads([6, 7, 5, 140]), BF16), True, None, None]
    clean = forward(*args, backend="emulator")
    for bad in (float("nan"), float("inf")):
        for x in args[:3]:
            x[9, 0, 3] = bad
        got = forward(*args, backend="emulator")
        assert torch.equal(got[:6], clean[:6]) and torch.equal(got[13:], clean[13:])
        assert not got[6:13].isfinite().all()


def test_attention_sm90_takes_strided_tensors():
    plain = testing._cast(make(140, None, 6, 2, 128), BF16)
    want = forward(*plain, backend="emulator")
    for views in (
        [x.transpose(0, 1).contiguous().transpose(0, 1) for x in plain],
        list(torch.cat(plain, 1).split([6, 2, 2], dim=1)),
    ):
        assert torch.equal(forward(*views, backend="emulator"), want)


def test_attention_sm90_gives_the_same_bits_in_every_order():
    args = [*testing._cast(model_heads([150, 0, 9], [270, 3, 9]), BF16), True, None, 200]
    want = forward(*args, backend="emulator")
    for order in ORDERS:
        with testing.emulate(**order):
            assert torch.equal(forward(*args, backend="emulator"), want), order


@pytest.mark.parametrize("order", [dict(mode="lazy"), dict(mode="random", seed=5)])
def test_attention_sm90_has_no_race(checked, order):
    with testing.emulate(**order):
        check([*model_heads([5, 130, 3], [0, 300, 3], heads=1), True, None, None])


# what stands in the kernel, what is planted in its place, and how it must show
BUGS = {
    "a stage never given back": (
        "    wgmma_hold(s);\n    if (speaks) mbarrier_arrive(&barriers.keys_empty[stage]);\n",
        "    wgmma_hold(s);\n",
        None,
    ),
    "values not waited for": (
        "    mbarrier_wait(&barriers.values_full[stage], phase);\n",
        "",
        "data race in shared memory|nobody wrote",
    ),
    "the next document's values kept": (
        "    if (key + kN > w.sequence.keys) clear(shared",
        "    if (key < 0) clear(shared",
        "NaN",
    ),
    "zeros that wgmma may not see": (
        "  fence_proxy_async();\n  named_barrier_sync",
        "  named_barrier_sync",
        "fence_proxy_async",
    ),
    "results stored over queries still read": (
        "  named_barrier_sync(kConsumerBarrier, kConsumers);  // both have read",
        "  // both have read",
        "data race in shared memory",
    ),
    "the second consumer with the first's rows": ("q = base + group * 64 * kBytesRow;", "q = base;", "error"),
    "the halves of the values side by side": (
        "step * 16 * kBytesRow, 1024, kBytesHalf)",
        "step * 16 * kBytesRow, 1024, kBytesHalf / 2)",
        "error|NaN|nan",
    ),
}


def find(keys):
    """A document of 130 queries and so many keys, beside one that is NaN."""
    args = testing._cast(model_heads([130, 3], [keys, 3], heads=1), BF16)
    args[2][keys:] = torch.nan
    got = forward(*args, backend="emulator")[:130]
    assert got.isfinite().all(), "NaN"
    want = forward(args[0][:130], args[1][:keys], args[2][:keys], backend="torch")
    assert (got - want).abs().max() < 0.1, "error"


@pytest.mark.slow
@pytest.mark.parametrize("bug", BUGS)
def test_attention_sm90_planted_bug_is_found(bug):
    right, wrong, says = BUGS[bug]
    with planted("cuda/attention_sm90.cu", right, wrong):
        with pytest.raises((RuntimeError, AssertionError), match=says):
            for order in (dict(mode="lazy"), dict(mode="random", seed=6)):
                with testing.emulate(**order):
                    find(400)
                    find(384)  # whole tiles: no clearing of values, whose barrier orders more


def test_attention_sm90_has_nothing_to_find_where_nothing_is_planted(checked):
    find(400)
    find(384)
