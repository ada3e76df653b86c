"""Decoding in buckets, without a GPU: what a graph would replay is called again and must find everything where it was.

The padded caches here are those of a GPU (`pad_rows`). The model's own forward, token by token on a cache without
padding, gives the same bits on the CPU's kernels: no row's result depends on the others.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from model_cases import make_model, random_ids, relative
from torch import Tensor

import hebatron.generate
import hebatron_kernels as hk
from hebatron import Hebatron, presets
from hebatron.cache import BLOCK_TOKENS, Cache, bucket_of
from hebatron.decoder import Bucket, Decoder
from hebatron_kernels.moe.torch_ops import offsets_read

CONFIG = presets.tiny().replace(layers_block_type=("mamba", "moe", "attention") * 2)


class Replays:
    """Stands for CUDA graphs: a replay calls the function again, if no tensor of the cache has moved since."""

    def __init__(self, cache: Cache) -> None:
        self.cache, self.captured, self.replayed = cache, 0, 0

    def addresses(self) -> list[int]:
        states = [t for held in self.cache._held.values() for t in (held.conv, held.ssm)]
        return [t.data_ptr() for t in [*states, *self.cache.pages.values()]]

    def __call__(self, device: torch.device) -> Callable[[Callable[[], Tensor]], Callable[[], Tensor]]:
        def capture(run: Callable[[], Tensor]) -> Callable[[], Tensor]:
            self.captured += 1
            addresses = self.addresses()

            def replay() -> Tensor:
                assert addresses == self.addresses(), "a graph would read what is no longer there"
                self.replayed += 1
                return run()

            return replay

        return capture


@pytest.fixture(scope="module")
def model() -> Hebatron:
    return make_model(CONFIG, 2).eval()


def padded(model: Hebatron, rows: int, capacity: int = 0) -> tuple[Decoder, Cache, Replays]:
    cache = Cache(model.config, rows, capacity, model.compute_dtype, pad_rows=True)
    replays = Replays(cache)
    return Decoder(model, cache, replays), cache, replays


def prefilled(model: Hebatron, caches: list[Cache], rows: int, longest: int) -> None:
    """Ragged: row r is r tokens shorter than the longest."""
    ids, mask = random_ids(model.config, rows, longest), torch.ones(rows, longest)
    for row in range(rows):
        mask[row, longest - row :] = 0
    for cache in caches:
        model(ids, mask, cache=cache, logits_to_keep=1)


def check_tokens(model: Hebatron, decoder: Decoder, plain: Cache, tokens: int) -> None:
    """Logits to the bit, and lengths."""
    for seed in range(tokens):
        ids_B = random_ids(model.config, plain.batch_size, 1, seed)[:, 0]
        want = model(ids_B[:, None], cache=plain, logits_to_keep=1).logits[:, 0]
        assert torch.equal(decoder(ids_B), want)
    assert decoder.cache.lengths == plain.lengths


# whole buckets, padded ones, one of more padding than the next smaller bucket has rows
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 9])
def test_decoder_gives_the_bits_of_the_forward(model: Hebatron, rows: int) -> None:
    decoder, cache, replays = padded(model, rows)
    plain = model.new_cache(rows)
    prefilled(model, [cache, plain], rows, 12)
    check_tokens(model, decoder, plain, 5)
    assert cache.bucket == bucket_of(rows) and (replays.captured, replays.replayed) == (1, 4)
    assert decoder.uncaptured == []


def test_decoder_captures_anew_when_the_cache_grows(model: Hebatron) -> None:
    decoder, cache, replays = padded(model, 3)
    plain = model.new_cache(3, 2 * BLOCK_TOKENS)  # which does not grow
    prefilled(model, [cache, plain], 3, BLOCK_TOKENS - 4)
    check_tokens(model, decoder, plain, 10)  # the longest row enters its second block at the fifth
    assert cache.moves == 2 and (replays.captured, replays.replayed) == (2, 8)


def test_rows_leave_without_moving_the_others(model: Hebatron) -> None:
    decoder, cache, replays = padded(model, 9, 30)
    plain = model.new_cache(9)
    prefilled(model, [cache, plain], 9, 12)
    check_tokens(model, decoder, plain, 2)
    for staying in ([8, 1, 2, 3, 4, 5, 7], [0, 2, 3, 4, 6], [4, 3, 0], [2]):  # buckets 8, 8, 4, 1
        for each in (cache, plain):
            each.reorder(staying)
        check_tokens(model, decoder, plain, 2)
    assert cache.moves == 0 and replays.captured == 4
    for staying in ([0, 0, 0], [2, 1, 0, 1]):  # bucket 4 again, and what was padding there is a row
        for each in (cache, plain):
            each.reorder(staying)
        check_tokens(model, decoder, plain, 2)
    assert cache.moves == 0 and replays.captured == 4
    for each in (cache, plain):
        each.reorder([0, 1, 2] * 4)
    check_tokens(model, decoder, plain, 2)
    assert cache.moves == 1 and replays.captured == 5


def test_prefill_snapshot_and_restore_come_between_tokens(model: Hebatron) -> None:
    decoder, cache, replays = padded(model, 3, 60)
    plain = model.new_cache(3)
    prefilled(model, [cache, plain], 3, 12)
    check_tokens(model, decoder, plain, 3)
    kept = cache.snapshot(), plain.snapshot()
    prefilled(model, [cache, plain], 3, 5)
    check_tokens(model, decoder, plain, 3)
    assert replays.captured == 1
    for each, snapshot in zip((cache, plain), kept, strict=True):
        each.restore(snapshot)
    check_tokens(model, decoder, plain, 3)
    assert replays.captured == 2


def test_a_cut_cache_goes_on_from_its_new_length() -> None:
    model = make_model(CONFIG.replace(layers_block_type=("attention", "mlp"), intermediate_size=16), 2)
    decoder, cache, replays = padded(model, 3, 40)
    plain = model.new_cache(3)
    prefilled(model, [cache, plain], 3, 12)
    check_tokens(model, decoder, plain, 3)
    for each in (cache, plain):
        each.cut(11)
    check_tokens(model, decoder, plain, 3)
    assert replays.captured == 1


def test_padding_may_hold_anything(model: Hebatron) -> None:
    decoder, cache, _ = padded(model, 5)
    plain = model.new_cache(5)
    prefilled(model, [cache, plain], 5, 12)
    for state in cache._held.values():
        state.conv[5:], state.ssm[5:] = torch.nan, torch.nan
    for pages in cache.pages.values():
        pages[:, 5:] = torch.nan
    check_tokens(model, decoder, plain, 3)


def test_a_step_that_dies_is_known_and_undone(model: Hebatron, monkeypatch: pytest.MonkeyPatch) -> None:
    decoder, cache, _ = padded(model, 2, 30)
    plain = model.new_cache(2)
    prefilled(model, [cache, plain], 2, 9)
    check_tokens(model, decoder, plain, 2)
    kept = cache.snapshot()
    with monkeypatch.context() as patch:
        patch.setattr(model, "_logits", lambda x_TD: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            decoder(torch.tensor([1, 2]))
    with pytest.raises(ValueError, match="states must be whole"):
        decoder(torch.tensor([1, 2]))
    cache.restore(kept)
    check_tokens(model, decoder, plain, 3)


def test_a_form_that_reads_on_the_host_is_not_captured(model: Hebatron) -> None:
    decoder, cache, replays = padded(model, 3)
    plain = model.new_cache(3)
    prefilled(model, [cache, plain], 3, 6)
    with hk.use_backend("reference"):
        for seed in range(3):
            ids_B = random_ids(CONFIG, 3, 1, seed)[:, 0]
            want = model(ids_B[:, None], cache=plain).logits[:, 0]
            assert relative(decoder(ids_B), want) < 1e-5
    assert replays.captured == 0 and decoder.cache.lengths == plain.lengths
    assert "moe_mlp[reference]: loops over values on the host" in decoder.uncaptured
    decoder(torch.tensor([1, 2, 3]))  # another backend: begun anew
    decoder(torch.tensor([1, 2, 3]))
    assert replays.captured == 1 and decoder.uncaptured == []
    with hk.use_backend("reference"):
        decoder(torch.tensor([1, 2, 3]))
    assert replays.replayed == 1  # and not the other backend's graph


@pytest.mark.parametrize(
    ("dtype", "arch", "fits", "reads"),
    [
        (torch.bfloat16, "sm_90", True, False),
        (torch.bfloat16, "sm_100", True, False),
        (torch.bfloat16, "sm_80", True, True),
        (torch.bfloat16, "sm_120", True, True),
        (torch.float32, "sm_90", True, True),
        (torch.bfloat16, "sm_90", False, True),  # widths that grouped_mm does not take
    ],
)
def test_torch_experts_read_on_the_host_where_grouped_mm_loops(
    dtype: torch.dtype, arch: str, fits: bool, reads: bool
) -> None:
    assert (offsets_read(dtype, arch, fits) is not None) == reads


def test_a_step_reads_nothing_on_the_host() -> None:
    """Meta tensors have no values: what reads one raises. (The experts' products answer for themselves, above.)"""
    config = CONFIG.replace(layers_block_type=("mamba", "moe", "attention", "mlp"), intermediate_size=16)
    model = Hebatron(config, torch.bfloat16, device="meta")
    with hk.use_backend("torch"), hk.host_reads() as reads:
        bucket = Bucket(model, Cache(config, 3, 8, torch.bfloat16, "meta", pad_rows=True))
        assert bucket.launch().shape == (4, config.vocab_size) and reads == []


@pytest.fixture
def generates_as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> list[Replays]:
    """`generate` with padded caches and a Decoder."""
    seen: list[Replays] = []

    def new_cache(self: Hebatron, rows: int, capacity: int = 0) -> Cache:
        return Cache(self.config, rows, capacity, self.compute_dtype, pad_rows=True)

    def one_more_token(model: Hebatron, cache: Cache) -> Callable[[Tensor], Tensor]:
        seen.append(Replays(cache))
        decoder = Decoder(model, cache, seen[-1])
        return lambda ids_B: decoder(ids_B)[:, None]

    monkeypatch.setattr(Hebatron, "new_cache", new_cache)
    monkeypatch.setattr(hebatron.generate, "one_more_token", one_more_token)
    return seen


@pytest.mark.parametrize(
    "options", [{}, {"temperature": 0.9, "top_k": 9, "seed": [1, 2, 3]}], ids=["greedy", "drawn"]
)
def test_generate_gives_the_same_tokens(
    model: Hebatron, options: dict[str, Any], request: pytest.FixtureRequest
) -> None:
    prompts, mask = random_ids(CONFIG, 3, 8), torch.ones(3, 8)
    mask[1, :5] = 0
    free = model.generate(prompts, mask, max_new_tokens=12, eos_token_id=(), **options)
    ends = [int(free[0, 10]), int(free[1, 13])]  # rows that end early
    want = model.generate(prompts, mask, max_new_tokens=12, eos_token_id=ends, **options)
    seen = request.getfixturevalue("generates_as_on_a_gpu")
    got = model.generate(prompts, mask, max_new_tokens=12, eos_token_id=ends, **options)
    assert torch.equal(got, want) and [replays.captured for replays in seen] == [1]


def test_decoder_refuses_by_name(model: Hebatron) -> None:
    with pytest.raises(ValueError, match="decoder: model must be on a GPU, got cpu"):
        Decoder(model, model.new_cache(1))
    decoder, cache, _ = padded(model, 3)
    for ids_B, got in (
        (torch.zeros(4, dtype=torch.int64), r"\(4,\)"),
        (torch.zeros(3, 1).long(), r"\(3, 1\)"),
    ):
        with pytest.raises(ValueError, match=rf"decoder: ids_B must be \(3,\) on cpu, got {got} on cpu"):
            decoder(ids_B)
    cache.lengths = [1, CONFIG.max_position_embeddings, 2]
    with pytest.raises(ValueError, match=r"max_position_embeddings \(1024\), got 1025 tokens"):
        decoder(torch.tensor([1, 2, 3]))
    assert cache.lengths == [1, 1024, 2] and not cache.broken
    other = Cache(CONFIG, 1, dtype=torch.float64, pad_rows=True)
    with pytest.raises(ValueError, match="dtype must equal the model's compute_dtype"):
        Decoder(model, other, Replays(other))(torch.tensor([1]))


@pytest.mark.usefixtures("emulator")
def test_decoder_on_emulated_kernels() -> None:
    """The kernels that a graph holds, a bucket of 4 with 3 rows; torch's products on the CPU round by the batch."""
    model = make_model(CONFIG, 2).bfloat16()
    decoder, cache, replays = padded(model, 3)
    plain = model.new_cache(3)
    with hk.use_backend("emulator"):
        prefilled(model, [cache, plain], 3, 6)
        for seed in range(3):
            ids_B = random_ids(CONFIG, 3, 1, seed)[:, 0]
            want = model(ids_B[:, None], cache=plain).logits[:, 0]
            assert relative(decoder(ids_B), want) < 2**-6
    assert (replays.captured, decoder.uncaptured) == (1, [])
