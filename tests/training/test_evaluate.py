"""Bits per byte: equal to each document alone, whatever the packing, and it leaves no trace."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from toy import write_corpora

from hebatron import presets
from hebatron.data.corpus import Corpus
from hebatron.evaluation.evaluate import bits_per_byte, choose_documents, piece_bits
from hebatron.model import Hebatron


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    root = tmp_path_factory.mktemp("corpora")
    write_corpora(root)
    return Corpus.open(root / "he")


@pytest.fixture(scope="module")
def model() -> Hebatron:
    return Hebatron(presets.tiny(320), seed=3)


def test_bits_per_byte_equals_the_sum_over_documents_alone(model: Hebatron, corpus: Corpus) -> None:
    nats = 0.0
    for i in range(len(corpus)):
        tokens = torch.from_numpy(corpus.tokens(i).astype("int64"))
        with torch.no_grad():
            logits_LV = model(tokens[None, :-1]).logits[0]
        nats -= float(logits_LV.double().log_softmax(-1).gather(1, tokens[1:, None]).sum())
    expected = nats / math.log(2) / corpus.num_bytes
    for batch_tokens in (1, 70, 100_000):
        assert bits_per_byte(model, corpus, batch_tokens=batch_tokens) == pytest.approx(
            {"he": expected}, rel=1e-6
        )


def test_bits_per_byte_leaves_mode_gradients_and_generator_alone(model: Hebatron, corpus: Corpus) -> None:
    rng = torch.get_rng_state()
    for training in (True, False):
        model.train(training)
        bits_per_byte(model, corpus, max_tokens=50)
        assert model.training is training
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(torch.get_rng_state(), rng)


def test_bits_per_byte_restores_the_mode_after_an_error(model: Hebatron, corpus: Corpus) -> None:
    narrow = Hebatron(presets.tiny(260), seed=3)
    narrow.train()
    with pytest.raises(ValueError, match="input_ids must be in"):
        bits_per_byte(narrow, corpus)
    assert narrow.training


def test_choose_documents_goes_by_hash_not_by_place(corpus: Corpus) -> None:
    turned = corpus.select(list(range(len(corpus)))[::-1])
    for limit in (None, 100, 2):
        chosen = choose_documents(corpus, limit)["he"]
        ours = [(corpus.hash(i), read) for i, read in chosen]
        assert ours == [(turned.hash(i), read) for i, read in choose_documents(turned, limit)["he"]]
        assert ours == sorted(ours)
        assert len(ours) == {None: len(corpus), 2: 1}.get(limit, len(ours))
        assert limit is None or sum(read for _, read in chosen) <= limit


def test_choose_documents_passes_over_a_first_one_that_is_too_long(corpus: Corpus) -> None:
    order = sorted(range(len(corpus)), key=corpus.hash)
    lengths = corpus.lengths[order]
    longer = int(np.argmax(lengths[:-1] > lengths[1:]))  # followed by a shorter one
    view = corpus.select(order[longer:])
    ((first, read),) = choose_documents(view, int(lengths[longer + 1]))["he"]
    assert first != 0 and read == view.lengths[first]


def test_bits_per_byte_of_a_long_document_stays_within_max_tokens(
    model: Hebatron, corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = corpus.select([0])
    length, read = int(one.lengths[0]), 7
    tokens = torch.from_numpy(one.tokens(0).astype("int64"))
    with torch.no_grad():
        logits_LV = model(tokens[None, : read - 1]).logits[0]
    nats = -float(logits_LV.log_softmax(-1).gather(1, tokens[1:read, None]).sum())
    expected = nats / math.log(2) / (one.num_bytes * read / length)
    assert bits_per_byte(model, one, max_tokens=read) == pytest.approx({"he": expected}, rel=1e-5)


def test_bits_per_byte_cuts_a_document_longer_than_the_model_takes(corpus: Corpus) -> None:
    short = Hebatron(replace(presets.tiny(320), max_position_embeddings=8), seed=3)
    one = corpus.select([0])
    tokens = torch.from_numpy(one.tokens(0).astype("int64"))
    nats = 0.0
    for start in range(0, len(tokens) - 1, 8):  # every pair once
        piece = tokens[start : start + 9]
        with torch.no_grad():
            logits_LV = short(piece[None, :-1]).logits[0]
        nats -= float(logits_LV.log_softmax(-1).gather(1, piece[1:, None]).sum())
    expected = nats / math.log(2) / one.num_bytes
    assert bits_per_byte(short, one) == pytest.approx({"he": expected}, rel=1e-5)


def test_bits_per_byte_refuses_an_empty_budget(model: Hebatron, corpus: Corpus) -> None:
    with pytest.raises(ValueError, match="batch_tokens must be >= 1, got 0"):
        bits_per_byte(model, corpus, batch_tokens=0)
    with pytest.raises(ValueError, match="max_tokens must be None or >= 2, got 1"):
        bits_per_byte(model, corpus, max_tokens=1)


def test_piece_bits_are_those_of_each_piece_alone(model: Hebatron, corpus: Corpus) -> None:
    for piece, limit, batch in ((7, None, 1), (7, 9, 60), (10_000, None, 300)):
        found = list(piece_bits(model, corpus, piece_tokens=piece, max_tokens=limit, batch_tokens=batch))
        assert [i for i, _, _ in found] == sorted(i for i, _, _ in found)
        for i in range(len(corpus)):
            tokens = corpus.tokens(i).astype("int64")[: None if limit is None else limit + 1]
            mine = [(targets, bits) for at, targets, bits in found if at == i]
            assert np.concatenate([targets for targets, _ in mine]).tolist() == tokens[1:].tolist()
            assert all(len(bits) == len(targets) <= piece for targets, bits in mine)
            if i % 9 == 0:
                start = 0
                for targets, bits in mine:
                    ids = torch.from_numpy(tokens[start : start + len(targets)])
                    with torch.no_grad():
                        logits_LV = model(ids[None]).logits[0].double().log_softmax(-1)
                    alone = -logits_LV.gather(1, torch.from_numpy(targets)[:, None])[:, 0] / math.log(2)
                    assert np.allclose(bits, alone.numpy(), atol=1e-4)
                    start += len(targets)
    short = Hebatron(replace(presets.tiny(320), max_position_embeddings=8), seed=3)
    assert max(len(bits) for _, _, bits in piece_bits(short, corpus, piece_tokens=99)) == 8
    for name in ("piece_tokens", "max_tokens", "batch_tokens"):
        with pytest.raises(ValueError, match=f"piece_bits: {name} must be >= 1, got 0"):
            next(piece_bits(model, corpus, **{"piece_tokens": 4, name: 0}))
