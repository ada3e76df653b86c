"""Generation: greedy, sampled, padded either way, and every refusal."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from model_cases import make_model, random_ids

from hebatron import Hebatron, presets
from hebatron.generate import choose


@pytest.fixture(scope="module")
def model() -> Hebatron:
    return make_model(presets.tiny(), seed=2)


def by_hand(model: Hebatron, prompt: torch.Tensor, steps: int) -> torch.Tensor:
    for _ in range(steps):
        with torch.no_grad():
            prompt = torch.cat([prompt, model(prompt).logits[:, -1].argmax(-1, keepdim=True)], 1)
    return prompt


def padded(prompts: list[torch.Tensor], left: bool) -> tuple[torch.Tensor, torch.Tensor]:
    longest = max(len(p) for p in prompts)
    ids, mask = torch.zeros(2, len(prompts), longest, dtype=torch.int64)
    for row, p in enumerate(prompts):
        span = slice(longest - len(p), None) if left else slice(0, len(p))
        ids[row, span], mask[row, span] = p, 1
    return ids, mask


def test_greedy_is_the_argmax_of_a_full_forward(model: Hebatron) -> None:
    prompt = random_ids(model.config, 2, 9)
    assert torch.equal(model.generate(prompt, max_new_tokens=20, eos_token_id=()), by_hand(model, prompt, 20))


@pytest.mark.parametrize("left", [True, False])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_a_row_does_not_depend_on_padding_or_neighbours(
    model: Hebatron, left: bool, temperature: float
) -> None:
    prompts = [random_ids(model.config, 1, n, seed=n)[0] for n in (3, 11, 1, 7)]
    ids, mask = padded(prompts, left)
    options: dict[str, Any] = {
        "max_new_tokens": 12,
        "temperature": temperature,
        "eos_token_id": (),
        "seed": 9,
    }
    together = model.generate(ids, mask, **options)
    assert torch.equal(together[:, : ids.shape[1]], ids)
    for row, prompt in enumerate(prompts):
        alone = model.generate(prompt[None], **options)
        assert torch.equal(together[row, ids.shape[1] :], alone[0, len(prompt) :])


def test_seeds_decide_and_may_differ_by_row(model: Hebatron) -> None:
    prompt = random_ids(model.config, 1, 5).repeat(3, 1)
    out = model.generate(prompt, max_new_tokens=16, temperature=1.0, seed=[1, 2, 1], eos_token_id=())
    assert torch.equal(out[0], out[2]) and not torch.equal(out[0], out[1])
    again = model.generate(prompt, max_new_tokens=16, temperature=1.0, seed=[1, 2, 1], eos_token_id=())
    assert torch.equal(out, again)


def test_rows_end_at_any_end_token_and_are_padded(model: Hebatron) -> None:
    prompt = random_ids(model.config, 2, 4)
    free = model.generate(prompt, max_new_tokens=10, eos_token_id=())[:, 4:]
    ends = [int(free[0, 2]), int(free[1, 5])]
    out = model.generate(prompt, max_new_tokens=10, eos_token_id=ends)[:, 4:]
    for row in range(2):
        first = next(n for n, token in enumerate(free[row].tolist()) if token in ends)
        assert torch.equal(out[row, : first + 1], free[row, : first + 1])
        assert not out[row, first + 1 :].any()  # the pad token is 0
    assert out.shape[1] <= 6  # stops where the last row ended


def test_no_new_tokens_gives_the_prompt(model: Hebatron) -> None:
    prompt = random_ids(model.config, 2, 4)
    assert torch.equal(model.generate(prompt, max_new_tokens=0), prompt)


def test_top_k_of_one_and_a_tiny_top_p_are_greedy(model: Hebatron) -> None:
    prompt = random_ids(model.config, 2, 4)
    greedy = model.generate(prompt, max_new_tokens=8, eos_token_id=())
    for options in ({"top_k": 1}, {"top_p": 1e-9}):
        assert torch.equal(
            model.generate(prompt, max_new_tokens=8, temperature=1.5, eos_token_id=(), **options), greedy
        )


@pytest.mark.parametrize("temperature", [5e-324, 1e-320, 1e-300])
def test_a_vanishing_temperature_is_greedy(model: Hebatron, temperature: float) -> None:
    prompt = random_ids(model.config, 2, 4)
    greedy = model.generate(prompt, max_new_tokens=8)
    assert torch.equal(model.generate(prompt, max_new_tokens=8, temperature=temperature), greedy)


def test_draws_follow_the_probabilities() -> None:
    logits = torch.tensor([0.1, 0.4, 0.2, 0.3]).log()
    draws = 4000
    generators = [torch.Generator().manual_seed(n) for n in range(draws)]

    def shares(**options: Any) -> torch.Tensor:
        settings = {"temperature": 1.0, "top_k": None, "top_p": None} | options
        for g, n in zip(generators, range(draws), strict=True):
            g.manual_seed(n)
        tokens = choose(logits.expand(draws, -1), generators=generators, **settings)
        return torch.bincount(tokens, minlength=4) / draws

    # 0.03 is four standard deviations of a share at 4,000 draws
    assert (shares() - torch.tensor([0.1, 0.4, 0.2, 0.3])).abs().max() < 0.03
    assert (shares(top_k=2) - torch.tensor([0, 4 / 7, 0, 3 / 7])).abs().max() < 0.03
    assert (shares(top_p=0.75) - torch.tensor([0, 4 / 9, 2 / 9, 3 / 9])).abs().max() < 0.03
    cooler = torch.tensor([0.1, 0.4, 0.2, 0.3]).square()
    assert (shares(temperature=0.5) - cooler / cooler.sum()).abs().max() < 0.03


BAD: list[tuple[dict[str, Any], str]] = [
    ({"temperature": float("nan")}, "temperature must be finite and >= 0, got nan"),
    ({"temperature": -1.0}, "temperature must be finite and >= 0, got -1.0"),
    ({"top_k": 65}, r"top_k must be an integer in \[1, 64\], got 65"),
    ({"top_k": 0}, r"top_k must be an integer in \[1, 64\], got 0"),
    ({"top_k": 2.5}, r"top_k must be an integer in \[1, 64\], got 2.5"),
    ({"top_k": True}, r"top_k must be an integer in \[1, 64\], got True"),
    ({"top_p": "1"}, r"top_p must be in \(0, 1\], got '1'"),
    ({"temperature": None}, "temperature must be finite and >= 0, got None"),
    ({"temperature": True}, "temperature must be finite and >= 0, got True"),
    ({"max_new_tokens": 2.5}, "max_new_tokens must be an integer >= 0, got 2.5"),
    ({"eos_token_id": "2"}, r"eos_token_id must be in \[0, 64\), got '2'"),
    ({"eos_token_id": [True]}, r"eos_token_id must be in \[0, 64\), got True"),
    ({"eos_token_id": 2.0}, r"eos_token_id must be in \[0, 64\), got 2.0"),
    ({"seed": "ab"}, r"seed must be an integer in \[0, 2\*\*63\), got 'ab'"),
    ({"seed": None}, r"seed must be an integer in \[0, 2\*\*63\), got None"),
    ({"seed": -1}, r"seed must be an integer in \[0, 2\*\*63\), got -1"),
    ({"seed": [0, 2**63]}, r"seed must be an integer in \[0, 2\*\*63\), got 9223372036854775808"),
    ({"attention_mask": [[1] * 4] * 2}, "attention_mask must be a tensor, got list"),
    ({"input_ids": [[1, 2]]}, "input_ids must be a tensor, got list"),
    ({"input_ids": torch.tensor([[999]]), "max_new_tokens": 0}, r"input_ids must be in \[0, 64\), got 999"),
    ({"top_p": 0.0}, r"top_p must be in \(0, 1\], got 0.0"),
    ({"top_p": 1.5}, r"top_p must be in \(0, 1\], got 1.5"),
    ({"max_new_tokens": -1}, "max_new_tokens must be an integer >= 0, got -1"),
    ({"max_new_tokens": 2000}, r"must stay within max_position_embeddings \(1024\), got 4 \+ 2000"),
    ({"eos_token_id": 64}, r"eos_token_id must be in \[0, 64\), got 64"),
    ({"seed": [1, 2, 3]}, r"seed must be one number or one per row \(2\), got 3"),
    (
        {"attention_mask": torch.tensor([[1, 1, 1, 1], [0, 0, 0, 0]])},
        "every prompt must have a token, got none in row 1",
    ),
    (
        {"attention_mask": torch.ones(2, 3)},
        r"attention_mask must have the shape of input_ids \(2, 4\), got \(2, 3\)",
    ),
    (
        {"input_ids": torch.zeros(2, 0, dtype=torch.int64)},
        r"input_ids must be \(B, L\) with a token .* got \(2, 0\)",
    ),
    ({"input_ids": torch.zeros(4, dtype=torch.int64)}, r"input_ids must be \(B, L\)"),
    ({"input_ids": torch.full((2, 4), 64)}, r"input_ids must be in \[0, 64\), got 64"),
]


@pytest.mark.parametrize(
    ("change", "message"), BAD, ids=[f"{next(iter(c))}-{n}" for n, (c, _) in enumerate(BAD)]
)
def test_wrong_argument_is_refused_by_name(model: Hebatron, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        model.generate(**({"input_ids": random_ids(model.config, 2, 4)} | change))


def test_broken_weights_are_named() -> None:
    model = make_model(presets.tiny(), seed=2)
    with torch.no_grad():
        model.lm_head.weight[3] = float("nan")
    with pytest.raises(ValueError, match="logits must be finite"):
        model.generate(random_ids(model.config, 1, 4), max_new_tokens=3)
