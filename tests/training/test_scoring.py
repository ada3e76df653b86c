"""Multiple choice by likelihood: each choice alone, whatever the batch; the boundary; accuracies and their errors."""

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from task_toy import make_model, make_tokenizer
from toy import WORDS

from hebatron import Hebatron, presets
from hebatron.evaluation.scoring import NORMS, Item, estimate, multiple_choice, score_choices, score_items
from hebatron.tokenizer import Tokenizer

ITEMS = [
    Item("שלום עולם", [" ספר ילד", " בית", " " + " ".join(WORDS * 2)], 1),
    Item("", ["ילד", "אמר יום"], 0),  # nothing before the choices
    Item("ספר ", ["ילד", "בית גדול"], 1),  # the space belongs to the word behind it
    Item("הלך של", ["ום", "וה", "ום יום"], 0),  # a token across the boundary
    Item("תשובה:\n", ["א", "ב", "ג", "ד"], 3),
    Item(" ".join(WORDS * 5), [" " + word for word in WORDS], 2),
    Item("שָׁלוֹם", [" עוֹלָם", "\n\nיום", " 42"], 0),
]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return make_tokenizer()


@pytest.fixture(scope="module")
def model() -> Hebatron:
    return make_model(presets.tiny(330), 3)


def alone(model: Hebatron, ids: Sequence[int], start: int) -> tuple[float, bool]:
    """Log-probability of ids[start:] by one forward of its own, and whether greedy decoding would write it."""
    with torch.no_grad():
        logits_LV = model(torch.tensor([ids[:-1]])).logits[0, start - 1 :].double()
    targets = torch.tensor(ids[start:])
    log_prob = float(logits_LV.log_softmax(-1).gather(1, targets[:, None]).sum())
    return log_prob, bool((logits_LV.argmax(-1) == targets).all())


def boundary(tokenizer: Tokenizer, context: str, choice: str) -> tuple[list[int], int]:
    """The rule, said again: whole ids and where the choice begins."""
    given, whole = tokenizer.encode(context), tokenizer.encode(context + choice)
    start = next((i for i, (a, b) in enumerate(zip(given, whole)) if a != b), min(len(given), len(whole)))
    return (whole, start) if start else ([tokenizer.bos_id or 0, *whole], 1)


@pytest.mark.parametrize("shared_tokens", [1, 3, 128])
def test_score_choices_is_each_choice_alone_whatever_the_batch(
    model: Hebatron, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, shared_tokens: int
) -> None:
    monkeypatch.setattr("hebatron.evaluation.scoring.SHARED_TOKENS", shared_tokens)
    expected = [
        [alone(model, *boundary(tokenizer, item.context, choice))[0] for choice in item.choices]
        for item in ITEMS
    ]
    pairs = [(item.context, item.choices) for item in ITEMS]
    for batch_tokens in (1, 40, 8192):
        for order in (slice(None), slice(None, None, -1)):
            scored = score_items(model, tokenizer, pairs[order], batch_tokens=batch_tokens)[order]
            for got, want in zip(scored, expected, strict=True):
                assert [one.log_prob for one in got] == pytest.approx(want, abs=1e-5, rel=1e-6)
    assert score_choices(model, tokenizer, ITEMS) == [[one.log_prob for one in row] for row in scored]


def test_a_long_common_beginning_is_read_once(
    model: Hebatron, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    worked = "\n\n".join(f"שאלה {i}: {' '.join(WORDS)}\nתשובה: ספר" for i in range(12))
    items = [(f"{worked}\n\nשאלה: {word}\nתשובה:", [" ספר ילד", " בית", " יום יום"]) for word in WORDS]
    items.append(("שלום", [" עולם", " ספר"]))  # shares nothing
    expected = [
        [alone(model, *boundary(tokenizer, context, choice))[0] for choice in choices]
        for context, choices in items
    ]
    fed, forward = [], model.forward

    def counted(input_ids: torch.Tensor, **options: Any) -> Any:
        fed.append(input_ids.numel())
        return forward(input_ids, **options)

    monkeypatch.setattr(model, "forward", counted)
    monkeypatch.setattr("hebatron.evaluation.scoring.MAX_SHARING", 7)
    for got, want in zip(score_choices(model, tokenizer, items), expected, strict=True):
        assert got == pytest.approx(want, abs=1e-5, rel=1e-6)
    beginning = len(tokenizer.encode(worked))
    assert beginning > 128 and len(fed) > 4
    assert sum(fed) < beginning + len(WORDS) * 3 * 30  # and not thirty times the beginning


def test_score_items_counts_tokens_behind_the_shared_beginning(model: Hebatron, tokenizer: Tokenizer) -> None:
    scored = score_items(model, tokenizer, [(item.context, item.choices) for item in ITEMS])
    for item, row in zip(ITEMS, scored, strict=True):
        for choice, one in zip(item.choices, row, strict=True):
            ids, start = boundary(tokenizer, item.context, choice)
            assert one.tokens == len(ids) - start and not one.cut
    # "ספר " + "ילד" is one word with its space before it, and the space is not scored twice
    assert scored[2][0].tokens == len(tokenizer.encode(" ילד"))
    # "הלך של" + "ום": the word is one token, and the context ends with two others
    given, whole = tokenizer.encode("הלך של"), tokenizer.encode("הלך שלום")
    assert len(whole) == 2 and given[1] != whole[1] and scored[3][0].tokens == 1


def test_space_before_or_behind_the_boundary_is_the_same(model: Hebatron, tokenizer: Tokenizer) -> None:
    ours, theirs = score_choices(model, tokenizer, [("שלום ", ["עולם", "ספר"]), ("שלום", [" עולם", " ספר"])])
    assert ours == theirs


def test_score_items_greedy_is_what_generation_writes(model: Hebatron, tokenizer: Tokenizer) -> None:
    context = "שלום עולם"
    prompt = tokenizer.encode(context)
    while True:  # a greedy text that encodes back to its own tokens, longer each time round
        out = model.generate(torch.tensor([prompt]), max_new_tokens=1, eos_token_id=())[0].tolist()
        text = tokenizer.decode(out, skip_special=False)
        if tokenizer.encode(text) == out and text.startswith(context) and len(text) > len(context):
            break
        prompt = tokenizer.encode(context := context + " ספר")
        assert len(prompt) < 200
    (row,) = score_items(model, tokenizer, [(context, [text[len(context) :], " יום יום"])])
    assert [one.greedy for one in row] == [True, False]


def test_a_context_too_long_loses_its_beginning(tokenizer: Tokenizer) -> None:
    short = make_model(presets.tiny(330).replace(max_position_embeddings=16), 3)
    context, choice = " ".join(WORDS * 5), " ספר"
    ids, start = boundary(tokenizer, context, choice)
    (row,) = score_items(short, tokenizer, [(context, [choice])])
    kept = ids[-17:]
    assert row[0].cut and row[0].log_prob == pytest.approx(
        alone(short, kept, 17 - (len(ids) - start))[0], abs=1e-5
    )
    with pytest.raises(
        ValueError, match=r"a choice must have at most max_position_embeddings \(16\) tokens, got"
    ):
        score_items(short, tokenizer, [("א", [context])])


def test_score_items_leaves_mode_gradients_and_generator_alone(model: Hebatron, tokenizer: Tokenizer) -> None:
    rng = torch.get_rng_state()
    model.train()
    score_choices(model, tokenizer, ITEMS)
    assert model.training
    with pytest.raises(ValueError):
        score_choices(model, tokenizer, [("", [""])])
    assert model.training
    model.eval()
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(torch.get_rng_state(), rng)


def test_special_reads_control_tokens_spelt_out(model: Hebatron, tokenizer: Tokenizer) -> None:
    item = ("<|im_start|>user\nשלום<|im_end|>\n", ["ספר"])
    plain, special = (
        score_items(model, tokenizer, [item], special=special)[0][0] for special in (False, True)
    )
    ids = tokenizer.encode(item[0] + item[1][0], special=True)
    assert special.log_prob == pytest.approx(alone(model, ids, len(ids) - special.tokens)[0], abs=1e-5)
    assert abs(plain.log_prob - special.log_prob) > 1e-3


def test_multiple_choice_divides_by_each_length(model: Hebatron, tokenizer: Tokenizer) -> None:
    result = multiple_choice(model, tokenizer, ITEMS)
    lengths = {
        "acc": lambda choice, tokens: 1,
        "acc_norm": lambda choice, tokens: len(choice.strip()),
        "acc_bytes": lambda choice, tokens: len(choice.strip().encode("utf-8")),
        "acc_tokens": lambda choice, tokens: tokens,
    }
    assert list(result.accuracy) == list(NORMS) == list(lengths)
    picks = {}
    for name, length in lengths.items():
        picks[name] = [
            max(
                range(len(row)),
                key=lambda i: row[i].log_prob / length(item.choices[i], row[i].tokens),
            )
            for item, row in zip(ITEMS, result.scores, strict=True)
        ]
        right = [float(pick == item.gold) for pick, item in zip(picks[name], ITEMS, strict=True)]
        assert result.accuracy[name] == estimate(right)
    assert picks["acc"] != picks["acc_norm"]  # the division decides something here
    assert result.chance == pytest.approx((1 / 3 + 1 / 2 + 1 / 2 + 1 / 3 + 1 / 4 + 1 / 10 + 1 / 3) / 7)
    assert result.cut == 0


def test_multiple_choice_finds_the_right_ones_and_takes_plain_tuples(
    model: Hebatron, tokenizer: Tokenizer
) -> None:
    rows = score_choices(model, tokenizer, ITEMS)
    best = [row.index(max(row)) for row in rows]
    worst = [row.index(min(row)) for row in rows]
    for gold, value in ((best, 1.0), (worst, 0.0)):
        items = [(item.context, item.choices, g) for item, g in zip(ITEMS, gold, strict=True)]
        assert multiple_choice(model, tokenizer, items).accuracy["acc"] == (value, 0.0)


def test_estimate_is_the_mean_and_its_sample_error() -> None:
    assert estimate([1.0]) == (1.0, None)
    value, error = estimate([1.0, 0.0, 0.0, 1.0, 1.0])
    assert value == 0.6 and error == pytest.approx(math.sqrt(0.6 * 0.4 / 4))


@pytest.mark.parametrize(
    ("items", "message"),
    [
        ([], "items must hold at least one, got none"),
        ([Item("א", ["ב"], 0)], r"items\[0\] must have two choices or more, none of them blank"),
        ([Item("א", ["ב", " \n"], 0)], r"items\[0\] must have two choices or more, none of them blank"),
        ([Item("א", ["ב", "ג"], 2)], r"items\[0\] must have a gold in \[0, 2\), got 2"),
        ([Item("א", ["ב", "ג"], -1)], r"items\[0\] must have a gold in \[0, 2\), got -1"),
    ],
)
def test_multiple_choice_refuses(
    model: Hebatron, tokenizer: Tokenizer, items: list[Item], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        multiple_choice(model, tokenizer, items)


def test_score_items_refuses_an_empty_choice_no_budget_and_broken_weights(tokenizer: Tokenizer) -> None:
    broken = make_model(presets.tiny(330), 3)
    with pytest.raises(ValueError, match=r"a choice must add a token, got '' in items\[1\]"):
        score_items(broken, tokenizer, [("א", ["ב"]), ("א", [""])])
    with pytest.raises(ValueError, match="batch_tokens must be >= 1, got 0"):
        score_items(broken, tokenizer, [("א", ["ב"])], batch_tokens=0)
    with torch.no_grad():
        broken.lm_head.weight[3] = float("nan")
    with pytest.raises(ValueError, match="logits must be finite"):
        score_items(broken, tokenizer, [("א", ["ב"])])
    assert score_items(broken, tokenizer, []) == []
