"""Bits per byte: equal to each document alone, whatever the packing, and it leaves no trace."""

import math

import pytest
import torch
from toy import write_corpora

from hebatron import presets
from hebatron.corpus import Corpus
from hebatron.evaluate import bits_per_byte, choose_documents
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
    for limit in (None, 100, 1):
        ours = [corpus.hash(i) for i in choose_documents(corpus, limit)["he"]]
        theirs = [turned.hash(i) for i in choose_documents(turned, limit)["he"]]
        assert ours == theirs == sorted(ours)
        total = sum(len(corpus.tokens(i)) for i in choose_documents(corpus, limit)["he"])
        assert len(ours) == {None: len(corpus), 1: 1}.get(limit, len(ours))
        assert limit in (None, 1) or total <= limit


def test_bits_per_byte_refuses_an_empty_budget(model: Hebatron, corpus: Corpus) -> None:
    with pytest.raises(ValueError, match="must be >= 1, got 0, None"):
        bits_per_byte(model, corpus, batch_tokens=0)
    with pytest.raises(ValueError, match="must be >= 1, got 8192, 0"):
        bits_per_byte(model, corpus, max_tokens=0)
