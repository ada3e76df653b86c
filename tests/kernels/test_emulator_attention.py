"""attention_prefill's CUDA kernels under the emulator: against the oracle with every gradient, the same bits in any
order of work, documents that never see one another, no race; planted bugs found."""

import mmap
from functools import partial

import pytest
import torch
from attention_cases import MASKS, PACKS, cu, make, packed
from emulated import same_bits
from planted import planted

import hebatron_kernels as hk
from hebatron_kernels import _native, testing

BF16, FP32 = torch.bfloat16, torch.float32
RANDOM = dict(mode="random", seed=7)

pytestmark = pytest.mark.usefixtures("emulator")


def check(args, dtype=BF16, grad=True):
    """The oracle rule against SDPA. Where a query sees one key its gradients to q and k are a difference of equals, all
    rounding, and only the result is held."""
    one_key = args[-1] == 1 or args[0].shape[0] <= 2
    testing.check_oracle(hk.attention_prefill, args, dtype, "emulator", grad and not one_key)


@pytest.mark.parametrize("dtype", [BF16, FP32])
@pytest.mark.parametrize(("lengths_q", "lengths_k"), PACKS)
def test_attention_prefill_emulated_matches_oracle(dtype, lengths_q, lengths_k):
    for causal, window in MASKS:
        check([*packed(lengths_q, lengths_k), causal, None, window], dtype)


# heads, kv heads, head dim, tokens: the model's group of 16; every head its own; 5 heads a kv head; elements of 33 in
# fp32 alone; no whole chunks of a tile
HEADS = [(16, 1, 128, 9, BF16), (3, 3, 40, 70, BF16), (5, 1, 80, 30, BF16), (6, 2, 33, 21, FP32)]


@pytest.mark.parametrize(("heads", "kv_heads", "head_dim", "tokens", "dtype"), HEADS)
def test_attention_prefill_emulated_matches_oracle_at_head_shapes(heads, kv_heads, head_dim, tokens, dtype):
    for window in (None, 20):
        check([*make(tokens, None, heads, kv_heads, head_dim), None, None, True, 0.3, window], dtype)


@pytest.mark.parametrize("head_dim", [136, 256])
def test_attention_prefill_emulated_matches_oracle_at_wide_heads(head_dim):
    # the gradients take head dims up to 128
    check([*make(70, None, 2, 1, head_dim), None, None, True, None, None], grad=False)


# queries, keys, causal, window: past a tile's 128 queries and 64 or 32 keys, and the gradients' 64 and 32; a chunk
# behind its keys; a window that begins inside a tile
LONG = [(150, 150, True, None), (150, 150, True, 40), (20, 170, True, None), (70, 100, False, None)]


@pytest.mark.parametrize("head_dim", [8, 72])
@pytest.mark.parametrize(("queries", "keys", "causal", "window"), LONG)
def test_attention_prefill_emulated_matches_oracle_past_its_tiles(queries, keys, causal, window, head_dim):
    check([*make(queries, keys, 2, 1, head_dim), None, None, causal, None, window])


def test_attention_prefill_emulated_finds_its_tiles_among_many_sequences():
    # more than the 32 that a warp scans at once
    lengths = [(7 * n) % 5 for n in range(40)]
    check([*packed(lengths, heads=2, kv_heads=1), True, None, None])


@pytest.mark.parametrize("sms", [1, 2, 4])
def test_attention_prefill_emulated_adds_the_parts_of_the_heads(sms):
    # 4 sms blocks are wanted and 6 are there: with 4 multiprocessors a kv head's 3 query heads are 2 parts
    with testing.emulate(sms=sms):
        check([*make(90, None, 9, 3, 16), None, None, True, None, None])


def test_attention_prefill_emulated_keeps_the_log_of_the_sum():
    q, k, v, cu_q, cu_k = packed([5, 40, 3], [2, 100, 0], dtype=BF16)
    o, lse = torch.ops.hebatron._attention_prefill_keep(q, k, v, cu_q, cu_k, True, 0.5, None, "emulator")
    assert torch.equal(o, hk.attention_prefill(q, k, v, cu_q, cu_k, True, 0.5, backend="emulator"))
    scores = torch.einsum("qhp,khp->qhk", q[5:45].float(), k[2:102].float().repeat_interleave(2, 1)) * 0.5
    scores = scores.masked_fill((torch.arange(100) > torch.arange(60, 100)[:, None])[:, None], -torch.inf)
    torch.testing.assert_close(lse[5:45], scores.logsumexp(2), rtol=1e-5, atol=1e-5)
    assert (lse[:3] == -torch.inf).all() and (lse[45:] == -torch.inf).all() and (o[45:] == 0).all()


@pytest.mark.parametrize("window", [None, 30])
def test_attention_prefill_emulated_gives_a_document_the_same_bits_alone_and_packed(window):
    lengths = [6, 0, 81, 5]
    q, k, v, cu_q, _ = packed(lengths, dtype=BF16)
    together = testing.run(
        hk.attention_prefill, [q, k, v, cu_q, None, True, None, window], backend="emulator"
    )
    upstream = torch.cos(torch.arange(q.numel(), dtype=torch.float64) * 0.7 + 1).reshape(q.shape).to(BF16)
    for begin, end in zip(cu_q.tolist(), cu_q.tolist()[1:]):
        leaves = [x[begin:end].detach().clone().requires_grad_() for x in (q, k, v)]
        out = hk.attention_prefill(*leaves, window=window, backend="emulator")
        grads = torch.autograd.grad(out, leaves, upstream[begin:end])
        for name, got in zip(("out0", "grad0", "grad1", "grad2"), (out, *grads)):
            assert torch.equal(got, together[name][begin:end]), name


def test_attention_prefill_emulated_keeps_a_bad_document_to_itself():
    args = [*packed([6, 7, 5, 80], dtype=BF16), True, None, None]
    clean = testing.run(hk.attention_prefill, args, backend="emulator")
    for bad in (float("nan"), float("inf")):
        for x in args[:3]:
            x[9, 0, 3] = bad
        got = testing.run(hk.attention_prefill, args, backend="emulator")
        for name, want in clean.items():
            assert torch.equal(got[name][:6], want[:6]) and torch.equal(got[name][13:], want[13:]), name
        assert not got["out0"][6:13].isfinite().all()


def test_attention_prefill_emulated_takes_strided_tensors():
    plain = make(40, heads=6, head_dim=24, dtype=BF16)
    want = testing.run(hk.attention_prefill, plain, backend="emulator")
    fused = torch.cat(plain, 1)
    for views in (
        [x.transpose(0, 1).contiguous().transpose(0, 1) for x in plain],
        list(fused.split([6, 2, 2], dim=1)),
    ):
        got = testing.run(hk.attention_prefill, views, backend="emulator")
        assert all(torch.equal(got[name], want[name]) for name in want)


def test_attention_prefill_emulated_reads_rows_past_2_to_the_31_elements():
    stride = (
        2**30 + 8
    )  # token 2 starts past 2^31 elements; only the tokens' own pages of memory are ever touched
    plain = make(4, None, 2, 1, 8, BF16)
    want = testing.run(hk.attention_prefill, plain, backend="emulator")
    views = []
    for x in plain:
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)
        memory = mmap.mmap(-1, 2 * (3 * stride + 16), flags=flags)
        views.append(torch.frombuffer(memory, dtype=BF16).as_strided(x.shape, (stride, 8, 1)).copy_(x))
    got = testing.run(hk.attention_prefill, views, backend="emulator")
    assert all(torch.equal(got[name], want[name]) for name in want)


def test_attention_prefill_emulated_survives_huge_scores():
    q, k, v = make(40, dtype=BF16)
    args = [q * 300, k * 300, v]
    found = testing.run(hk.attention_prefill, args, backend="emulator")
    assert all(value.isfinite().all() for value in found.values())
    want = hk.attention_prefill(*(x.double() for x in args), backend="reference")
    torch.testing.assert_close(found["out0"].double(), want, rtol=1e-2, atol=1e-2)


def test_attention_prefill_emulated_gives_the_same_bits_in_every_order():
    with testing.emulate(sms=4):
        same_bits(
            hk.attention_prefill, [*packed([70, 0, 9], dtype=BF16, heads=2, kv_heads=1), True, None, 50]
        )


@pytest.mark.parametrize("order", [{}, RANDOM])
def test_attention_prefill_has_no_race(checked, order):
    with testing.emulate(**order, sms=4):
        check([*make(70, None, 2, 1, 72), None, None, True, None, None])
        check([*packed([5, 66], [0, 100], heads=2, kv_heads=1), True, None, 40])
        check([*packed([3, 0, 2], heads=2, kv_heads=1), True, None, None], FP32)


def test_attention_prefill_emulated_launches_are_fixed_and_never_read_the_lengths():
    take = _native.emulator_module.take_statistics
    args = [*packed([5, 0, 9], dtype=BF16), True, None, None]
    take()
    hk.attention_prefill(*args, backend="emulator")
    assert take()["launches"] == 1
    with testing.emulate(sms=1):
        testing.run(hk.attention_prefill, args, backend="emulator")
    assert take()["launches"] == 4  # forward, prepare, of_keys, of_queries
    for lengths in ([], [0], [0, 0]):
        found = testing.run(hk.attention_prefill, packed(lengths, dtype=BF16), backend="emulator")
        assert all(value.shape[0] == 0 for value in found.values())


def test_attention_prefill_says_why_its_kernels_refuse():
    q, k, v = make(6, dtype=BF16)

    def refused(reason, *args):
        with pytest.raises(hk.BackendError, match=reason):
            hk.attention_prefill(*args, backend="emulator")

    refused("computes float32 and bfloat16, got float64", *make(6))
    refused("multiple of 8 and at most 256, got 12", *make(6, head_dim=12, dtype=BF16))
    refused("at most 256, got 264", *make(6, head_dim=264, dtype=FP32))
    wide = [x.requires_grad_() for x in make(6, head_dim=136, dtype=BF16)]
    refused("gradients in bfloat16 take head dims up to 128, got 136", *wide)
    refused("needs the rows of k_SHkP to start on 16 bytes", q, testing.strided(k, 8), v)


def raw(args, **changed):
    """The kernels' own checks, behind Python's."""
    q, k, v = args
    ends = cu([q.shape[0]])
    strides = {f"{name}_stride": 0 for name in ("q", "q_head", "k", "k_head", "v", "v_head")}
    arguments = dict(
        tokens_q=q.shape[0], tokens_k=k.shape[0], heads=q.shape[1], kv_heads=k.shape[1], head_dim=q.shape[2],
        sequences=1, causal=1, window=9, scale=1.0, dtype="bfloat16", workers=1, q=q, k=k, v=v, cu_seqlens_q=ends,
        cu_seqlens_k=ends, o=torch.empty_like(q), lse=torch.empty(q.shape[:2]), **strides,
    ) | changed  # fmt: skip
    op = "attention_prefill_bwd" if "grad_o" in changed else "attention_prefill_fwd"
    _native.emulated(partial(_native.call, op, **arguments))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (dict(tokens_q=2**30), "tokens_q must be 0 to 2.30 - 1"),
        (dict(tokens_k=-1), "tokens_k must be 0 to 2.30 - 1, got -1"),
        (dict(head_dim=257), "head_dim must be 1 to 256, got 257"),
        (dict(heads=3), "kv_heads must divide the heads, got 2"),
        (dict(window=0), "window must be > 0, got 0"),
        (dict(head_dim=12), "head_dim must be a multiple of 8 for bfloat16, got 12"),
        (dict(k_stride=12), "the strides must be multiples of 8 for bfloat16, got 12"),
        (dict(v=torch.zeros(99, dtype=BF16)[1:]), "q, k, v and o must start on 16 bytes"),
        (
            dict(head_dim=136, **dict.fromkeys(("grad_o", "grad_q", "grad_k", "grad_v"))),
            "head_dim must be at most 128",
        ),
    ],
)
def test_attention_prefill_checks_its_numbers(wrong, message):
    with pytest.raises(ValueError, match=rf"attention_prefill\[cuda\]: {message}"):
        raw(make(6, dtype=BF16), **wrong)


# the file, what stands there, what is planted in its place, and how it must show
BUGS = {
    "keys read before they are there": (
        "cuda/attention.cu",
        "    cp_async_wait_all();\n    block_sync();  // the keys and values",
        "    block_sync();  // the keys and values",
        "data race in shared memory|nobody wrote",
    ),
    "keys refilled while other warps read them": (
        "cuda/attention.cu",
        "    block_sync();  // the keys and values are here, and every warp has read those before\n    if (key",
        "    warp_sync();\n    if (key",
        "data race in shared memory",
    ),
    "a tile on the diagonal taken for whole": (
        "cuda/attention.cu",
        "if (key + T::kN > sequence.end(first) ||",
        "if (key + T::kN > sequence.end(first + rows - 1) ||",
        "error",
    ),
    "the sums kept in units of the old largest": (
        "cuda/attention.cu",
        "total[f][half] * ratio + sum",
        "total[f][half] + sum",
        "error",
    ),
    "the window one key too long": (
        "cuda/attention.cuh",
        "keys - queries + i + 1 - window;",
        "keys - queries + i - window;",
        "error",
    ),
    "queries aligned with the first keys": (
        "cuda/attention.cuh",
        "const int last = keys - queries + i + 1;",
        "const int last = i + 1;",
        "error|NaN|inf",
    ),
    "a scan that forgets the sequences before": (
        "cuda/attention.cuh",
        "    after += before;",
        "",
        "error|NaN|nan",
    ),
    "delta of another head": (
        "cuda/attention_bwd.cu",
        "return stats[head * b.forward.tokens_q",
        "return stats[head / 2 * b.forward.tokens_q",
        "error",
    ),
    "the last head of a kv head left out": (
        "cuda/attention_bwd.cu",
        "heads = left < each ? left : each;",
        "heads = each - 1;",
        "error",
    ),
    "a step's rows replaced while they are read": (
        "cuda/attention_bwd.cu",
        "    block_sync();  // the step's rows are here, and every warp has read those of the step before"
        "\n    if (step + 1",
        "    warp_sync();\n    if (step + 1",
        "data race in shared memory",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("bug", BUGS)
def test_attention_prefill_planted_bug_is_found(bug):
    file, right, wrong, says = BUGS[bug]
    with planted(file, right, wrong):
        with pytest.raises((RuntimeError, AssertionError), match=says):
            for order in (dict(mode="lazy"), dict(mode="random", seed=6)):
                with testing.emulate(**order, sms=1):
                    check([*make(70, 90, 4, 2, 72), None, None, True, None, 50])
                    check([*make(70, None, 2, 1, 8), None, None, True, None, None])
                    check([*packed([(7 * n) % 5 for n in range(40)], heads=2, kv_heads=1), True, None, None])
