"""The expert layer of few tokens (csrc/cuda/moe_decode.cu) under the emulator: against the oracle, the same bits in any
order of work and with any number of blocks, a token's bits whoever stands beside it, no race; planted bugs found."""

from functools import partial

import pytest
import torch
from moe_cases import mlp
from planted import planted

import hebatron_kernels as hk
from hebatron_kernels import _native, testing

ORDERS = [dict(mode="eager", sms=1), *(dict(mode="random", seed=seed, sms=seed) for seed in (1, 2, 4))]


pytestmark = pytest.mark.usefixtures("emulator")


def decode(x, ids, weights, up, down, /, *, backend="emulator", **changed):
    if backend != "emulator":
        return hk.moe_mlp(x, ids, weights, up, down, backend=backend)
    y = torch.full(x.shape, torch.nan, dtype=x.dtype)
    arguments = dict(
        tokens=x.shape[0], top_k=ids.shape[1], experts=up.shape[0], width=x.shape[1], expert_width=up.shape[1],
        workers=1, dtype=_native.dtype_name(x), weight_dtype=_native.dtype_name(up), packed=0, x=x,
        x_stride=x.stride(0), ids=ids, weights=weights.float(), up=up, up_expert_stride=up.stride(0),
        up_stride=up.stride(1), down=down, down_expert_stride=down.stride(0), down_stride=down.stride(1),
        hidden=None, y=y,
    )  # fmt: skip
    _native.emulated(partial(_native.call, "moe_decode", **(arguments | changed)))
    return y


def problem(tokens, experts, top_k, width, expert_width, ids=None):
    args = mlp(tokens, experts, top_k, width, expert_width)
    if ids is not None:
        args[1] = ids
    return args


# tokens, experts, top_k, width, expert_width: one token of one expert, the smallest; tails of 16 rows and of 32 of K in
# both products; groups of 8 tokens, exactly and one more; more experts than a block has threads
PROBLEMS = {
    "smallest": (1, 1, 1, 8, 8),
    "one token": (1, 6, 3, 72, 40),
    "tails": (5, 4, 2, 296, 136),
    "two groups": (9, 1, 1, 40, 24),
    "three groups": (17, 1, 1, 40, 24),
    "four groups": (32, 2, 2, 40, 24),
    "many experts": (7, 140, 3, 16, 24),
}


@pytest.mark.parametrize("name", PROBLEMS)
def test_moe_decode_matches_oracle(name):
    testing.check_oracle(decode, problem(*PROBLEMS[name]), torch.bfloat16, "emulator", grad=False)


def test_moe_decode_takes_more_rows_of_an_expert_than_it_multiplies_at_once():
    # 70 tokens of which expert 2 has all, of 9 experts: 32, 32 and 6
    ids = torch.stack([torch.full((70,), 2), torch.randint(3, 9, (70,))], 1)
    args = problem(70, 9, 2, 24, 40, ids)
    testing.check_oracle(decode, args, torch.bfloat16, "emulator", grad=False)


@pytest.mark.parametrize("name", ["one token", "tails", "many experts"])
def test_moe_decode_gives_the_same_bits_in_every_order_with_any_number_of_blocks(name):
    args = testing._cast(problem(*PROBLEMS[name]), torch.bfloat16)
    want = decode(*args)
    for order in ORDERS:
        with testing.emulate(**order):
            assert torch.equal(decode(*args), want), order


def test_moe_decode_of_a_token_does_not_depend_on_the_others_to_the_bit():
    x, ids, weights, up, down = testing._cast(problem(19, 3, 2, 72, 40), torch.bfloat16)
    want = decode(x, ids, weights, up, down)
    for some in (slice(0, 1), slice(3, 12), slice(18, 19)):
        assert torch.equal(decode(x[some], ids[some].contiguous(), weights[some], up, down), want[some])


def test_moe_decode_takes_strided_rows_and_weights_and_keeps_nan_to_its_token():
    args = testing._cast(problem(6, 5, 2, 72, 40), torch.bfloat16)
    want = decode(*args)
    x, ids, weights, up, down = args
    wide = torch.full((6, 88), torch.nan, dtype=x.dtype)
    wide[:, 8:-8] = x
    stored = torch.full((5, 41, 80), torch.nan, dtype=x.dtype)
    stored[:, 1:, 8:] = up
    assert torch.equal(decode(wide[:, 8:-8], ids, weights, stored[:, 1:, 8:], down), want)
    x[2, 5] = torch.nan
    unused = [e for e in range(5) if not (ids == e).any()]
    up[unused] = torch.nan
    got = decode(x, ids, weights, up, down)
    others = torch.arange(6) != 2
    assert got[2].isnan().all() and torch.equal(got[others], want[others])


@pytest.mark.parametrize(
    "order", [dict(mode="lazy"), dict(mode="random", seed=5), dict(mode="random", seed=6, sms=1)]
)
def test_moe_decode_has_no_race(order):
    with testing.emulate(checked=True, **order):
        for name in ("one token", "tails", "two groups"):
            testing.check_oracle(decode, problem(*PROBLEMS[name]), torch.bfloat16, "emulator", grad=False)


def test_moe_decode_says_why_it_refuses():
    args = testing._cast(problem(4, 4, 2, 24, 16), torch.bfloat16)
    for wrong, reason in [
        (dict(tokens=129), "tokens must be 1 to 128, and tokens . top_k at most 1,024"),
        (dict(tokens=0), "tokens must be 1 to 128"),
        (dict(tokens=128, top_k=9), "tokens must be .* at most 1,024"),
        (dict(tokens=33), "an expert must have at most 16 rows on average"),
        (dict(experts=513), "experts must be 1 to 512"),
        (dict(width=20), "width, expert_width and the strides must be multiples of 8"),
        (dict(up_stride=20), "width, expert_width and the strides must be multiples of 8"),
        (
            dict(x=torch.zeros(200, dtype=torch.bfloat16)[4:]),
            "x, up and down must start on a multiple of 16 bytes",
        ),
        (dict(hidden=args[0]), "keeps nothing for a backward"),
        (dict(weight_dtype="float32"), "x and the weights must be bf16, and not packed"),
    ]:
        with pytest.raises(ValueError, match=rf"moe_decode\[cuda\]: {reason}"):
            decode(*args, **wrong)


# what stands in the kernel, what is planted in its place, and how it must show
BUGS = {
    "activation published by nobody": (
        "      if (speaks) {\n        fence_gpu();\n        atomic_add(p.up_done",
        "      if (speaks) {\n        atomic_add(p.up_done",
        "data race in workspace",
    ),
    "the last unit is not seen to be it": (
        "atomic_add(p.down_done + tile, 1u) + 1 == uint32_t(t.count)",
        "atomic_add(p.down_done + tile, 1u) == uint32_t(t.count)",
        "non-finite|nan|NaN",
    ),
    "a unit of down that waits for all but one of up's": (
        "load_acquire(p.up_done + place) < uint32_t(up_tiles)",
        "load_acquire(p.up_done + place) + 1 < uint32_t(up_tiles)",
        "data race in workspace",
    ),
    "sums read before all warps wrote them": (
        "lane / 4 + i / 2 * 8] = sum[g][i];\n  block_sync();",
        "lane / 4 + i / 2 * 8] = sum[g][i];",
        "data race in shared memory",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("bug", BUGS)
def test_moe_decode_planted_bug_is_found(bug):
    right, wrong, says = BUGS[bug]
    with planted("cuda/moe_decode.cu", right, wrong):
        with pytest.raises((RuntimeError, AssertionError), match=says):
            for order in (dict(mode="lazy"), *(dict(mode="random", seed=seed) for seed in range(6))):
                with testing.emulate(**order):
                    testing.check_oracle(
                        decode, problem(*PROBLEMS["tails"]), torch.bfloat16, "emulator", grad=False
                    )


def test_moe_mlp_of_few_tokens_that_keeps_nothing_is_moe_decode():
    args = [value.bfloat16() if value.is_floating_point() else value for value in problem(*PROBLEMS["tails"])]
    with torch.no_grad():
        assert torch.equal(hk.moe_mlp(*args, backend="emulator"), decode(*args))
