"""Attention in C++: the oracle on every ISA, and what only this form promises (bits, memory)."""

import pytest
import torch
from attention_cases import LENGTHS, MASKS, PACKS, make, packed, paged

import hebatron_kernels as hk
from hebatron_kernels import _native, testing

DTYPES = [torch.float32, torch.bfloat16]
PRIVATE = torch.ops.hebatron._attention_prefill


def check_prefill(isa, args, dtype):
    """The oracle rule against SDPA. Where a query sees one key its gradients to q and k are a difference of equals, all
    rounding, and only the result is held."""
    one_key = args[-1] == 1 or args[0].shape[0] <= 2
    with testing.use_isa(isa):
        testing.check_oracle(hk.attention_prefill, args, dtype, "native", not one_key)


@pytest.mark.parametrize("isa", testing.isas())
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("lengths_q", "lengths_k"), PACKS)
def test_attention_prefill_native_matches_oracle(isa, dtype, lengths_q, lengths_k):
    for causal, window in MASKS:
        check_prefill(isa, [*packed(lengths_q, lengths_k), causal, None, window], dtype)


# heads, kv heads, head dim, tokens: one of each; the model's group of 16; every head its own; head dims of one, three
# and more than four vectors; more heads than a task has rows
HEADS = [(1, 1, 1, 2), (16, 1, 128, 9), (3, 3, 40, 113), (6, 2, 33, 67), (4, 2, 80, 30), (200, 1, 16, 3)]


@pytest.mark.parametrize("isa", testing.isas())
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim", "tokens"), HEADS)
def test_attention_prefill_native_matches_oracle_at_head_shapes(
    isa, dtype, heads, kv_heads, head_dim, tokens
):
    for window in (None, 20):
        args = [*make(tokens, None, heads, kv_heads, head_dim), None, None, True, 0.3, window]
        check_prefill(isa, args, dtype)


# queries, keys, causal, window: past every block (96 queries, 192 and 256 keys), and past the backward's 2,048 keys
LONG = [
    (700, 700, True, None),
    (700, 700, True, 300),
    (90, 700, True, None),
    (300, 520, False, None),
    (130, 2300, True, None),
]


@pytest.mark.parametrize("isa", testing.isas())
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("queries", "keys", "causal", "window"), LONG)
def test_attention_prefill_native_matches_oracle_past_its_blocks(isa, dtype, queries, keys, causal, window):
    check_prefill(isa, [*make(queries, keys, 2, 1, 6), None, None, causal, None, window], dtype)


@pytest.mark.parametrize("isa", testing.isas())
def test_attention_prefill_native_keeps_the_log_of_the_sum(isa):
    q, k, v, cu_q, cu_k = packed([5, 40, 3], [2, 300, 0], dtype=torch.float32)
    with testing.use_isa(isa):
        o, lse = torch.ops.hebatron._attention_prefill_keep(q, k, v, cu_q, cu_k, True, 0.5, None, "native")
        assert torch.equal(o, hk.attention_prefill(q, k, v, cu_q, cu_k, True, 0.5, backend="native"))
    scores = torch.einsum("qhp,khp->qhk", q[5:45], k[2:302].repeat_interleave(2, 1)) * 0.5
    scores = scores.masked_fill((torch.arange(300) > torch.arange(260, 300)[:, None])[:, None], -torch.inf)
    torch.testing.assert_close(lse[5:45], scores.logsumexp(2), rtol=1e-6, atol=1e-6)
    assert (lse[:3] == -torch.inf).all() and (lse[45:] == -torch.inf).all()


@pytest.mark.parametrize("isa", testing.isas())
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [None, 150])
def test_attention_prefill_native_gives_a_document_the_same_bits_alone_and_packed(isa, dtype, window):
    lengths = [6, 1, 0, 411, 5, 230]
    q, k, v, cu_q, _ = packed(lengths, dtype=dtype, heads=6, head_dim=24)
    together = testing.run(hk.attention_prefill, [q, k, v, cu_q, None, True, None, window], backend="native")
    upstream = torch.cos(torch.arange(q.numel(), dtype=torch.float64) * 0.7 + 1).reshape(q.shape).to(dtype)
    with testing.use_isa(isa):
        together = testing.run(
            hk.attention_prefill, [q, k, v, cu_q, None, True, None, window], backend="native"
        )
        for begin, end in zip(cu_q.tolist(), cu_q.tolist()[1:]):
            leaves = [x[begin:end].detach().requires_grad_() for x in (q, k, v)]
            out = hk.attention_prefill(*leaves, window=window, backend="native")
            grads = torch.autograd.grad(out, leaves, upstream[begin:end])
            for name, got in zip(("out0", "grad0", "grad1", "grad2"), (out, *grads)):
                assert torch.equal(got, together[name][begin:end]), name


@pytest.mark.parametrize("isa", testing.isas())
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [None, 100])
def test_attention_prefill_native_in_chunks_has_the_same_bits(isa, dtype, window):
    q, k, v = make(333, heads=6, head_dim=24, dtype=dtype)
    with testing.use_isa(isa):
        whole = hk.attention_prefill(q, k, v, window=window, backend="native")
        for chunk in (1, 2, 7, 64, 200):
            starts = range(0, 333, chunk) if chunk > 2 else range(250, 270, chunk)
            for i in starts:
                keys = slice(0, i + chunk)
                part = hk.attention_prefill(
                    q[i : i + chunk], k[keys], v[keys], window=window, backend="native"
                )
                assert torch.equal(part, whole[i : i + chunk]), (chunk, i)


@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_prefill_native_does_not_depend_on_threads_or_runs(dtype):
    args = [*packed([230, 90], [400, 90], dtype=dtype, heads=6, head_dim=40), True, None, None]
    before = torch.get_num_threads()
    want = testing.run(hk.attention_prefill, args, backend="native")
    try:
        for threads in (1, 2, 3, *[2] * 20):
            torch.set_num_threads(threads)
            got = testing.run(hk.attention_prefill, args, backend="native")
            assert all(torch.equal(got[name], want[name]) for name in want), threads
    finally:
        torch.set_num_threads(before)


def test_attention_prefill_native_takes_strided_tensors():
    plain = make(40, heads=6, head_dim=21, dtype=torch.float32)
    fused = torch.randn(40, 10, 21)
    q, k, v = fused.split([6, 2, 2], dim=1)
    for views in (
        [testing.strided(x) for x in plain],
        [x.transpose(0, 1).contiguous().transpose(0, 1) for x in plain],
    ):
        assert any(not x.is_contiguous() for x in views)
        want = testing.run(hk.attention_prefill, plain, backend="native")
        got = testing.run(hk.attention_prefill, views, backend="native")
        assert all(torch.equal(got[name], want[name]) for name in want)
    want = hk.attention_prefill(q.contiguous(), k.contiguous(), v.contiguous(), backend="native")
    assert torch.equal(hk.attention_prefill(q, k, v, backend="native"), want)


@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_prefill_native_keeps_a_bad_document_to_itself(dtype):
    args = [*packed([6, 7, 5, 80], dtype=dtype), True, None, None]
    clean = testing.run(hk.attention_prefill, args, backend="native")
    for bad in (float("nan"), float("inf")):
        for x in args[:3]:
            x[9, 0, 3] = bad
        got = testing.run(hk.attention_prefill, args, backend="native")
        for name, want in clean.items():
            assert torch.equal(got[name][:6], want[:6]) and torch.equal(got[name][13:], want[13:]), name
        assert not got["out0"][6:13].isfinite().all()


def test_attention_prefill_native_survives_huge_scores():
    q, k, v = make(40, dtype=torch.float32)
    found = testing.run(hk.attention_prefill, [q * 300, k * 300, v], backend="native")
    assert all(value.isfinite().all() for value in found.values())
    torch.testing.assert_close(
        found["out0"], hk.attention_prefill(q * 300, k * 300, v, backend="reference"), rtol=1e-3, atol=1e-2
    )


@pytest.mark.parametrize(("lengths", "window"), [(None, 2), ([3, 0, 4], None)])
def test_attention_prefill_native_registration_and_fullgraph(lengths, window):
    args = (
        [*make(7, dtype=torch.float32), None, None]
        if lengths is None
        else packed(lengths, dtype=torch.float32)
    )
    args = [*args, True, None, window]
    testing.check_registration("attention_prefill", *args, backend="native")
    testing.check_fullgraph(hk.attention_prefill, args, "native")
    if lengths is not None:  # as the model calls it
        args[4] = args[3]
        testing.check_fullgraph(hk.attention_prefill, args, "native")


def test_attention_native_is_chosen_and_says_why_not():
    q, k, v = make(3, dtype=torch.float32)
    assert "-> native" in hk.explain(hk.attention_prefill, q, k, v)
    assert "-> torch" in hk.explain(hk.attention_prefill, q.double(), k.double(), v.double())
    with pytest.raises(hk.BackendError, match="computes float32 and bfloat16, got float64"):
        hk.attention_prefill(q.double(), k.double(), v.double(), backend="native")
    sideways = k.transpose(0, 2).contiguous().transpose(0, 2)
    with pytest.raises(hk.BackendError, match="needs a contiguous last dimension"):
        hk.attention_prefill(q, sideways, v, backend="native")
    args, _ = paged([2], dtype=torch.float32)
    assert "-> native" in hk.explain(hk.attention_decode, *args)


@pytest.mark.parametrize(
    ("cu_q", "cu_k", "message"),
    [
        ([0, 4], [0, 6], "cu_seqlens_q must end with tokens_q, got 4"),
        ([0, 6], [0, 7], "cu_seqlens_k must end with tokens_k, got 7"),
        ([0, 5, 2, 6], [0, 1, 2, 6], "cu_seqlens_q must rise, got 2"),
        ([0, 1, 2, 6], [0, 5, -3, 6], "cu_seqlens_k must rise, got -3"),
    ],
)
def test_attention_prefill_native_checks_what_compiled_code_could_not(cu_q, cu_k, message):
    q, k, v = make(6, dtype=torch.float32)
    ends = [torch.tensor(c, dtype=torch.int32) for c in (cu_q, cu_k)]
    with pytest.raises(ValueError, match=f"attention_prefill: {message}"):
        PRIVATE(q, k, v, *ends, True, None, None, "native")


def workspace(op, tokens, dtype):
    q, k = torch.empty(2, 32, 128, dtype=dtype), torch.empty(2, 2, 128, dtype=dtype)
    from hebatron_kernels.attention import native

    numbers = native._inputs(q, k, k, None, None, True, None, None)
    ends = torch.tensor([0, tokens], dtype=torch.int32)
    numbers |= {
        "tokens_q": tokens,
        "tokens_k": tokens,
        "window": tokens,
        "cu_seqlens_q": ends,
        "cu_seqlens_k": ends,
    }
    pointers = {n: x.data_ptr() if isinstance(x, torch.Tensor) else x for n, x in numbers.items()}
    extra = dict.fromkeys(("grad_o", "grad_q", "grad_k", "grad_v") if op.endswith("bwd") else ())
    return getattr(_native.cpu_module, f"{op}_workspace")(**pointers, o=None, lse=None, **extra)


@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_prefill_native_memory_is_linear_in_the_length(dtype):
    # 65,536 tokens, 32 query and 2 key heads of 128: what is needed beyond inputs and results
    for op, limit in (("attention_prefill_fwd", 0.15e9), ("attention_prefill_bwd", 1.6e9)):
        sizes = [workspace(op, tokens, dtype) for tokens in (16384, 32768, 65536)]
        assert sizes[2] - sizes[1] == 2 * (sizes[1] - sizes[0])
        assert sizes[2] < limit


def decode(*tensors, backend):
    return hk.attention_decode(*tensors[:3], tensors[3].clone(), *tensors[4:], backend=backend)


# heads, kv heads, head dim, block size: one head; the model's 16:1; an odd group; more heads than a panel is wide
@pytest.mark.parametrize("isa", testing.isas())
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "block_size"),
    [(1, 1, 1, 1), (16, 1, 128, 16), (6, 2, 33, 5), (70, 1, 8, 300)],
)
def test_attention_decode_native_matches_oracle(isa, dtype, heads, kv_heads, head_dim, block_size):
    for window in (None, 1, 250, 5000):
        args, _ = paged([37, 0, 255, 256, 601], block_size, heads, kv_heads, head_dim)
        args[3].nan_to_num_(1e3)
        with testing.use_isa(isa):
            testing.check_oracle(decode, [*args, 0.2, window], dtype, "native", grad=False)


@pytest.mark.parametrize("isa", testing.isas())
@pytest.mark.parametrize("window", [None, 1, 5, 100])
def test_attention_decode_native_is_the_last_row_of_prefill(isa, window):
    args, wholes = paged(LENGTHS, dtype=torch.float32)
    before = args[3].clone()
    with testing.use_isa(isa):
        got = hk.attention_decode(*args, None, window, backend="native")
    for n, whole in enumerate(wholes):
        want = hk.attention_prefill(
            args[0][n : n + 1], whole[0], whole[1], window=window, backend="reference"
        )
        torch.testing.assert_close(got[n : n + 1], want, rtol=0, atol=1e-6)
        block, row = args[4][n, LENGTHS[n] // 4], LENGTHS[n] % 4
        assert torch.equal(args[3][:, block, row], whole[:, -1])
        before[:, block, row] = whole[:, -1]
    assert torch.equal(args[3].nan_to_num(9e9), before.nan_to_num(9e9))  # nothing else was written or read


@pytest.mark.parametrize("isa", testing.isas())
@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_decode_native_does_not_depend_on_batch_or_threads(isa, dtype):
    args, _ = paged([3, 700, 0, 256, 31, 300, 12], 16, 6, 2, 24, dtype=dtype)
    before = torch.get_num_threads()
    with testing.use_isa(isa):
        want = hk.attention_decode(*args[:3], args[3].clone(), *args[4:], backend="native")
        try:
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                got = hk.attention_decode(*args[:3], args[3].clone(), *args[4:], backend="native")
                assert torch.equal(got, want)
        finally:
            torch.set_num_threads(before)
        for some in ([1], [5, 1], [0, 1, 2, 3, 4, 5]):
            chosen = [args[n][some] if n != 3 else args[3].clone() for n in range(6)]
            assert torch.equal(hk.attention_decode(*chosen, backend="native"), want[some])
        many = [args[n].repeat(64 if n in (0, 1, 2) else 1, *[1] * (args[n].dim() - 1)) for n in (0, 1, 2)]
        pages = torch.cat([args[3]] * 64, 1)
        tables = torch.cat([args[4] + n * args[3].shape[1] for n in range(64)])
        got = hk.attention_decode(*many, pages, tables, args[5].repeat(64), backend="native")
        assert all(torch.equal(part, want) for part in got.split(7))


def test_attention_decode_native_takes_strided_tensors():
    args, _ = paged(LENGTHS, dtype=torch.float32)
    want = hk.attention_decode(*args[:3], args[3].clone(), *args[4:], backend="native")
    views = [testing.strided(x) for x in args[:4]]
    assert torch.equal(hk.attention_decode(*views, *args[4:], backend="native"), want)
    views[3] = args[3].transpose(2, 3).contiguous().transpose(2, 3)  # rows of one head side by side
    assert torch.equal(hk.attention_decode(*views, *args[4:], backend="native"), want)


def test_attention_decode_native_reads_what_a_neighbour_wrote_into_a_shared_block():
    args, _ = paged([3, 5], dtype=torch.float32)
    args[4][1] = args[4][0]  # both read block 0 of the first; the new tokens are rows 3 and 5 of it
    args[3].nan_to_num_(0.5)
    args[4][:, 1] = 2
    caches = [args[3].clone() for _ in range(2)]
    got = hk.attention_decode(*args[:3], caches[0], *args[4:], backend="native")
    want = hk.attention_decode(*args[:3], caches[1], *args[4:], backend="torch")
    torch.testing.assert_close(got, want)
    assert torch.equal(caches[0], caches[1])


def test_attention_decode_native_registration_and_fullgraph():
    args, _ = paged([5, 2], dtype=torch.float32)
    args[3].nan_to_num_(0.0)  # opcheck compares the cache, and NaN is not NaN
    testing.check_registration("attention_decode", *args, None, 3, backend="native")
    want_cache, got_cache = args[3].clone(), args[3].clone()
    want = hk.attention_decode(*args[:3], want_cache, *args[4:], backend="native")
    torch._dynamo.reset()
    compiled = torch.compile(hk.attention_decode, fullgraph=True, backend="aot_eager")
    got = compiled(*args[:3], got_cache, *args[4:], backend="native")
    assert torch.equal(got, want) and torch.equal(got_cache, want_cache)


def test_attention_decode_native_tells_autograd_that_the_cache_changed():
    args, _ = paged([2], dtype=torch.float32)
    x = args[3].clone().requires_grad_()
    args[3] = x.detach()
    y = (x * x).sum()
    hk.attention_decode(*args, backend="native")
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()
    lengths = torch.tensor([500], dtype=torch.int32)
    with pytest.raises(ValueError, match="attention_decode: lengths must lie in the blocks, got 500"):
        torch.ops.hebatron._attention_decode(*args[:5], lengths, None, None, "native")
