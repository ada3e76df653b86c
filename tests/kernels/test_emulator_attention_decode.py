"""attention_decode's CUDA kernel under the emulator: against the oracle, the same bits in any order of work, nothing
read or written but the pages of a sequence, no race; planted bugs found."""

import mmap
from functools import partial

import pytest
import torch
from attention_cases import LENGTHS, paged
from emulated import ORDERS
from planted import planted

import hebatron_kernels as hk
from hebatron_kernels import _native, testing

BF16 = torch.bfloat16

pytestmark = pytest.mark.usefixtures("emulator")


def decode(*tensors, backend):
    return hk.attention_decode(*tensors[:3], tensors[3].clone(), *tensors[4:], backend=backend)


def check(args, *others):
    args[3].nan_to_num_(1e3)
    testing.check_oracle(decode, [*args, *others], BF16, "emulator", grad=False)


# heads, kv heads, head dim, block size: one head, which 15 rows of zeros join; the model's group of 16; 5 heads a kv
# head; more than 16, the second tile with 4; pages longer than a sequence; the largest head dim. 72 and 136 leave zeros
SHAPES = [(1, 1, 8, 1), (16, 1, 128, 16), (10, 2, 64, 5), (20, 1, 72, 16), (6, 3, 136, 300), (2, 2, 256, 7)]


@pytest.mark.parametrize("window", [None, 1, 50])
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim", "block_size"), SHAPES)
def test_attention_decode_emulated_matches_oracle(heads, kv_heads, head_dim, block_size, window):
    # the first key, a warp's 16 and the block's 64 (32 above head dim 128), past every stage
    args, _ = paged([0, 15, 63, 64, 201], block_size, heads, kv_heads, head_dim)
    check(args, 0.2, window)


def long(lengths, blocks, block_size=64, heads=2, kv_heads=1, head_dim=16):
    """Sequences in a table of so many blocks: their parts are of the table, not of their lengths."""
    args, _ = paged(lengths, block_size, heads, kv_heads, head_dim)
    table = torch.full((len(lengths), blocks), 1000, dtype=torch.int32)
    used = args[4][:, :blocks]
    table[:, : used.shape[1]] = used
    args[4] = table
    return args


# a table of 768 keys is three parts; of 3,840 fifteen, two groups of parts; lengths that use one, some and all of them
PARTS = {
    "three parts": ([0, 64, 700], 12, 5),
    "two groups": ([3839], 60, 8),
    "a part of a group": ([850], 60, 8),
}


@pytest.mark.parametrize("name", PARTS)
def test_attention_decode_emulated_matches_oracle_in_parts(name):
    lengths, blocks, sms = PARTS[name]
    with testing.emulate(sms=sms):
        check(long(lengths, blocks), None, None if len(lengths) > 1 else 3500)


def test_attention_decode_emulated_gives_the_same_bits_in_every_order():
    args = testing._cast(long([0, 90, 700], 12, head_dim=8), BF16)
    with testing.emulate(sms=5):
        want = decode(*args, backend="emulator")
    for order in ORDERS:
        with testing.emulate(**order, sms=5):
            assert torch.equal(decode(*args, backend="emulator"), want), order


@pytest.mark.parametrize("window", [None, 1, 5, 100])
def test_attention_decode_emulated_reads_and_writes_the_pages_of_its_sequences_alone(window):
    args, wholes = paged(LENGTHS, dtype=BF16)  # everything not written is NaN
    before = args[3].clone()
    got = hk.attention_decode(*args, None, window, backend="emulator")
    for n, whole in enumerate(wholes):
        want = hk.attention_prefill(args[0][n : n + 1].double(), *whole.double(), window=window)
        torch.testing.assert_close(got[n : n + 1].double(), want, rtol=2e-2, atol=2e-2)
        block, row = args[4][n, LENGTHS[n] // 4], LENGTHS[n] % 4
        assert torch.equal(args[3][:, block, row], whole[:, -1])
        before[:, block, row] = whole[:, -1]
    assert torch.equal(args[3].nan_to_num(9e9), before.nan_to_num(9e9))


def test_attention_decode_emulated_reads_what_a_neighbour_wrote_into_a_shared_block():
    args, _ = paged([3, 5], dtype=BF16)
    args[4][1] = args[4][0]  # both read block 0 of the first; the new tokens are rows 3 and 5 of it
    args[3].nan_to_num_(0.5)
    args[4][:, 1] = 2
    caches = [args[3].clone() for _ in range(2)]
    got = hk.attention_decode(*args[:3], caches[0], *args[4:], backend="emulator")
    want = hk.attention_decode(*args[:3], caches[1], *args[4:], backend="native")
    torch.testing.assert_close(got, want, rtol=2e-2, atol=2e-2)
    assert torch.equal(caches[0], caches[1])


def test_attention_decode_emulated_keeps_nan_to_its_sequence():
    args, _ = paged([30, 41, 7], dtype=BF16)
    want = decode(*args, backend="emulator")
    args[0][1, 0, 3] = torch.nan
    got = decode(*args, backend="emulator")
    assert got[1, 0].isnan().all() and torch.equal(got[[0, 2]], want[[0, 2]])


def test_attention_decode_emulated_gives_scores_of_minus_infinity_no_weight():
    args, _ = paged([90], 16, 2, 1, dtype=BF16)
    args[3].nan_to_num_()
    args[0][..., 0] = 1
    args[3][0, args[4][0, 0], ..., 0] = -torch.inf  # 16 keys: all that a warp has seen after its first step
    got = decode(*args, backend="emulator")
    exact = [a.double() if a.is_floating_point() else a for a in args]
    torch.testing.assert_close(got.double(), decode(*exact, backend="reference"), rtol=2**-7, atol=2**-7)


def test_attention_decode_emulated_takes_strided_tensors_and_no_sequence():
    args, _ = paged(LENGTHS, dtype=BF16)
    want = decode(*args, backend="emulator")
    views = [torch.cat([x, torch.full_like(x, torch.nan)], -1)[..., : x.shape[-1]] for x in args[:4]]
    assert torch.equal(decode(*views, *args[4:], backend="emulator"), want)
    views[3] = args[3].transpose(2, 3).contiguous().transpose(2, 3)  # rows of one head side by side
    assert torch.equal(hk.attention_decode(*views, *args[4:], backend="emulator"), want)
    assert hk.attention_decode(*paged([], dtype=BF16)[0], backend="emulator").shape == (0, 4, 8)


def test_attention_decode_emulated_reads_pages_past_2_to_the_31_elements():
    stride = (
        2**30 + 8
    )  # block 2 starts past 2^31 elements; only the blocks' own pages of memory are ever touched
    args, _ = paged([5, 9], dtype=BF16)
    args[3].nan_to_num_(0.5)
    want = decode(*args, backend="emulator")
    used = args[3][:, args[4][:, :3].clamp(0, args[3].shape[1] - 1).flatten().long()]
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)
    memory = mmap.mmap(-1, 2 * (5 * stride + 128), flags=flags)
    far = torch.frombuffer(memory, dtype=BF16).as_strided(used.shape, (64, stride, 16, 8, 1)).copy_(used)
    table = torch.arange(6, dtype=torch.int32).view(2, 3)
    assert torch.equal(hk.attention_decode(*args[:3], far, table, args[5], backend="emulator"), want)


@pytest.mark.parametrize("order", [dict(mode="lazy"), dict(mode="random", seed=5)])
def test_attention_decode_has_no_race(checked, order):
    with testing.emulate(**order):
        check(paged([0, 16, 150], 16, 3, 1, 72)[0])
    with testing.emulate(**order, sms=2):
        check(long([90, 600], 12, head_dim=8))


@pytest.mark.slow
@pytest.mark.parametrize("order", [dict(mode="lazy"), dict(mode="random", seed=5)])
def test_attention_decode_in_groups_of_parts_has_no_race(checked, order):
    with testing.emulate(**order, sms=8):
        check(long([3839], 60))


def test_attention_decode_emulated_is_two_launches():
    args, _ = paged([5, 2], dtype=BF16)
    _native.emulator_module.take_statistics()
    decode(*args, backend="emulator")
    assert _native.emulator_module.take_statistics()["launches"] == 2


def test_attention_decode_says_why_its_kernel_refuses():
    args, _ = paged([5, 2], dtype=BF16)

    def refused(reason, error=hk.BackendError, **changed):
        given = dict(zip(("q", "k_new", "v_new", "cache", "table", "lengths"), args)) | changed
        with pytest.raises(error, match=reason):
            hk.attention_decode(*given.values(), backend="emulator")

    floats = dict(zip(("q", "k_new", "v_new", "cache"), testing._cast(args[:4], torch.float32)))
    refused("computes bfloat16, got float32", **floats)
    for head_dim, got in ((12, 12), (264, 264)):
        wide, _ = paged([5, 2], head_dim=head_dim, dtype=BF16)
        refused(f"multiple of 8 and at most 256, got {got}", **dict(zip(floats, wide)))
    refused("needs the rows of q_QHP to start on 16 bytes", q=testing.strided(args[0], 8))
    refused("needs the rows of cache to start on 16 bytes", cache=testing.strided(args[3], 7))


def raw(args, **changed):
    """The kernel's own checks, behind Python's."""
    q, k_new, v_new, cache, table, lengths = args
    strides = {f"{name}_stride": 0 for name in ("q", "q_head", "k_new", "k_new_head", "v_new", "v_new_head")}
    arguments = dict(
        sequences=q.shape[0], heads=q.shape[1], kv_heads=k_new.shape[1], head_dim=q.shape[2],
        block_size=cache.shape[2], max_blocks=table.shape[1], window=9, scale=1.0, dtype="bfloat16", workers=1, q=q,
        k_new=k_new, v_new=v_new, keys=cache, values=cache, block_stride=8, row_stride=8, head_stride=8,
        block_table=table, lengths=lengths, o=torch.empty_like(q), **strides,
    )  # fmt: skip
    _native.emulated(partial(_native.call, "attention_decode", **(arguments | changed)))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (dict(dtype="float32"), "dtype must be bfloat16, 1, got 0"),
        (dict(sequences=65536), "sequences must be 0 to 65,535, got 65536"),
        (dict(head_dim=12), "head_dim must be a multiple of 8 up to 256, got 12"),
        (dict(heads=3), "kv_heads must divide the heads, got 2"),
        (dict(block_size=0), "block_size and max_blocks must be > 0, got 0"),
        (dict(max_blocks=2**30), "max_blocks . block_size must be below 2.31"),
        (dict(window=0), "window must be > 0, got 0"),
        (dict(row_stride=12), "the strides must be multiples of 8, got 12"),
        (dict(v_new=torch.zeros(99, dtype=BF16)[1:]), "the tensors must start on 16 bytes"),
    ],
)
def test_attention_decode_checks_its_numbers(wrong, message):
    with pytest.raises(ValueError, match=rf"attention_decode\[cuda\]: {message}"):
        raw(paged([5, 2], dtype=BF16)[0], **wrong)


# what stands in the kernel, what is planted in its place, and how it must show
BUGS = {
    "copies not waited for": ("cp_async_wait<kStages - 2>();", "", "data race in shared memory|nobody wrote"),
    "a stage refilled while other lanes read it": (
        "    warp_sync();  // the step's keys",
        "    // the step's keys",
        "data race in shared memory",
    ),
    "sums stored over stages still read": (
        "  block_sync();  // the warps' sums",
        "  // the warps' sums",
        "data race in shared memory",
    ),
    "parts published by nobody": (
        "    fence_gpu();\n    *told",
        "    *told",
        "data race in workspace",
    ),
    "every block is the last": ("+ 1 == uint32_t(count);", "+ 1 <= uint32_t(count);", "data race|error"),
    "keys past the last counted": (
        "if (j * 8 + lane % 4 * 2 + i % 2 >= count) s[j][i] = kNone;",
        ";",
        "error",
    ),
    "the old sums in units of the new largest": ("total[half] *= ratio;", "", "error"),
    "a page's row taken for the sequence's": (
        "k % block_size * a.row_stride",
        "k * a.row_stride",
        "out of|outside|error",
    ),
    "the window counted without the new key": (
        "end > a.window ? end - int(a.window) : 0",
        "end > a.window ? end - 1 - int(a.window) : 0",
        "error",
    ),
    "tickets left as they were": ("if (at < p.count_tickets) p.tickets[at] = 0;", "", "error|nan|NaN"),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("bug", BUGS)
def test_attention_decode_planted_bug_is_found(bug):
    right, wrong, says = BUGS[bug]
    with planted("cuda/attention_decode.cu", right, wrong):
        with pytest.raises((RuntimeError, AssertionError), match=says):
            for order in (dict(mode="lazy"), dict(mode="random", seed=6)):
                with testing.emulate(**order, sms=3):
                    check(paged([0, 16, 150], 16, 3, 1, 72)[0], None, 100)
                    check(long([90, 600], 12, head_dim=8))
