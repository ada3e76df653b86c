"""Chat rows: isolation, weights, labels, and that they are learnt from."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch

from hebatron.chat.chats import Sample
from hebatron.chat.sft import ChatRows, pack_chats
from hebatron.config import ModelConfig
from hebatron.model import Hebatron
from hebatron.presets import PRESETS

VOCABULARY = 64


def make(lengths, tasks=("qa",), langs=("he",), seed=0):
    rng = np.random.default_rng(seed)
    samples = []
    for i, length in enumerate(lengths):
        learn = np.zeros(length, bool)
        learn[length // 2 :] = True
        ids = rng.integers(1, VOCABULARY, length).astype(np.int32)
        samples.append(Sample(ids, learn, f"s{i}", tasks[i % len(tasks)], langs[i % len(langs)], "toy"))
    return samples


def tiny_model():
    hub = {**PRESETS["tiny"]().to_hub(), "hidden_size": 32, "vocab_size": VOCABULARY}
    return Hebatron(ModelConfig.from_hub(hub), torch.float32, seed=0, device="cpu").train()


def gradients(model, batch, counted):
    """Loss sum over the labels of `counted` (a slice of the pairs), and every gradient."""
    labels = torch.full_like(batch.labels, -100)
    labels[counted] = batch.labels[counted]
    model.zero_grad(set_to_none=True)
    loss = model(batch.input_ids, cu_seqlens=batch.cu_seqlens, labels=labels, loss_reduction="sum").loss
    loss.backward()
    return float(loss.detach()), {
        name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None
    }


def test_a_packed_sample_learns_as_if_alone():
    a, b = make([13, 10])
    model = tiny_model()
    packed = ChatRows([a, b], 32, [[0, 1]]).batch(range(1))
    alone = ChatRows([b], 32, [[0]]).batch(range(1))
    assert packed.cu_seqlens.tolist() == [0, 12, 21] and alone.cu_seqlens.tolist() == [0, 9]
    loss, grads = gradients(model, packed, slice(12, 21))
    loss_alone, grads_alone = gradients(model, alone, slice(0, 9))
    assert loss == pytest.approx(loss_alone, abs=1e-5) and loss > 1
    assert grads.keys() == grads_alone.keys() and grads
    for name, grad in grads.items():
        torch.testing.assert_close(grad, grads_alone[name], rtol=1e-5, atol=1e-5, msg=name)
    one = packed.cu_seqlens[[0, -1]]  # the measure sees a leak
    leaking, _ = gradients(model, replace(packed, cu_seqlens=one), slice(12, 21))
    assert abs(leaking - loss_alone) > 1e-3


def test_labels_are_the_learnt_tokens_one_ahead():
    samples = make([6, 9, 4])
    rows = pack_chats(samples, 16)
    assert rows.num_rows == 1 and rows.rows[0] == [1, 0, 2]
    batch = rows.batch(range(1))
    assert batch.row_starts.tolist() == [0, 16] and batch.cu_seqlens.tolist() == [0, 8, 13, 16]
    for begin, i in zip((0, 8, 13), rows.rows[0]):
        s = samples[i]
        for t in range(len(s.ids) - 1):
            assert batch.input_ids[begin + t] == s.ids[t]
            assert batch.labels[begin + t] == (s.ids[t + 1] if s.learn[t + 1] else -100)


def test_every_sample_is_in_exactly_one_row_of_an_epoch():
    lengths = np.random.default_rng(1).integers(2, 34, 300).tolist()
    rows = pack_chats(make(lengths), 32, epochs=2, seed=3)
    assert Counter(i for row in rows.rows for i in row) == dict.fromkeys(range(300), 2)
    assert rows.row_tokens.max() <= 32 and rows.describe()["fill"] > 0.95
    again = pack_chats(make(lengths), 32, epochs=2, seed=3)
    assert again.rows == rows.rows and again.hash == rows.hash
    other = pack_chats(make(lengths), 32, epochs=2, seed=4)
    assert other.rows != rows.rows and other.hash != rows.hash


def test_weights_count_readings():
    samples = make([5] * 120, tasks=("qa", "nli", "math"), langs=("he", "en"))
    rows = pack_chats(samples, 16, epochs=3, task_weights={"nli": 0.5, "math": 0.0}, lang_weights={"en": 1.7})
    read = Counter((samples[i].task, samples[i].lang) for row in rows.rows for i in row)
    assert read == {("qa", "he"): 60, ("qa", "en"): 102, ("nli", "he"): 30, ("nli", "en"): 51}
    groups = rows.describe()["groups"]
    assert groups["task/nli"]["samples"] == 81 and groups["all"]["samples"] == 243
    assert groups["all"]["masked_share"] == pytest.approx(1 / 4)  # 4 pairs, 3 learnt


def test_a_batch_is_a_pure_function_of_its_rows():
    rows = pack_chats(make([7, 9, 12, 5, 16, 3, 8, 11]), 16)
    steps = rows.steps(32)
    assert [r for step in steps for r in step.rows] == list(range(rows.num_rows))
    whole = rows.batch(range(rows.num_rows))
    pieces = [rows.batch(piece) for step in steps for piece in rows.microbatches(step.rows, 16)]
    assert torch.equal(torch.cat([piece.input_ids for piece in pieces]), whole.input_ids)
    assert torch.equal(torch.cat([piece.labels for piece in pieces]), whole.labels)
    for row in range(rows.num_rows):
        names = [rows.samples[i].name for i in rows.rows[row]]
        assert rows.documents(range(row, row + 1)) == {"toy": sorted(names)}
    assert rows.documents(range(rows.num_rows)) == {"toy": [f"s{i}" for i in range(8)]}


def test_answers_are_learnt_from_rows():
    model, rows = tiny_model(), pack_chats(make([12, 10, 9]), 32)
    optimizer, batch, losses = (
        torch.optim.AdamW(model.parameters(), 5e-3),
        rows.batch(range(rows.num_rows)),
        [],
    )
    for _ in range(30):
        optimizer.zero_grad()
        loss = model(batch.input_ids, cu_seqlens=batch.cu_seqlens, labels=batch.labels).loss
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] / 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seq_len": 8}, "samples must have at most seq_len"),
        ({"seq_len": 0}, "seq_len must be at least 1"),
        ({"epochs": 0}, "epochs must be at least 1"),
        ({"task_weights": {"q": 1}}, "task_weights must name one of qa, got 'q'"),
        ({"lang_weights": {"he": -1}}, "must be finite and >= 0"),
        ({"lang_weights": {"he": 0}}, "weights must leave at least one sample"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        pack_chats(make([12]), **{"seq_len": 16, **options})


def test_bad_rows_and_sizes_are_refused():
    rows = pack_chats(make([12]), 16)
    with pytest.raises(ValueError, match="within 0"):
        rows.batch(range(1, 2))
    with pytest.raises(ValueError, match="tokens_per_batch must be at least"):
        rows.steps(15)
    with pytest.raises(ValueError, match="tokens must be at least"):
        rows.microbatches(range(1), 15)
