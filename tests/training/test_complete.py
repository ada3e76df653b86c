"""Texts that go on: each prompt as if alone, stops and ends, and characters that are never cut."""

import random

import pytest
import torch
from task_toy import make_model, make_tokenizer
from toy import WORDS

from hebatron import Cache, Decoder, Hebatron, presets
from hebatron.evaluation.complete import TextStream, complete
from hebatron.tokenizer import Tokenizer

PROMPTS = ["שלום", "", "ספר ילד בית", "the answer", " ".join(WORDS * 3), "שלום"]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return make_tokenizer()


@pytest.fixture(scope="module")
def model() -> Hebatron:
    return make_model(presets.tiny(330).replace(eos_token_id=1), 3)


def alone(model: Hebatron, tokenizer: Tokenizer, prompt: str, count: int) -> list[int]:
    ids = tokenizer.encode(prompt) or [tokenizer.bos_id]
    return model.generate(torch.tensor([ids]), max_new_tokens=count)[0, len(ids) :].tolist()


def test_complete_is_each_prompt_alone(model: Hebatron, tokenizer: Tokenizer) -> None:
    expected = [tokenizer.decode(alone(model, tokenizer, prompt, 12)) for prompt in PROMPTS]
    assert len(set(expected)) > 2
    for batch_tokens in (1, 30, 8192):
        written = complete(model, tokenizer, PROMPTS, max_new_tokens=12, batch_tokens=batch_tokens)
        assert [one.text for one in written] == expected
        assert not any(one.ended or one.cut for one in written)


def test_complete_stops_at_the_first_stop_text_without_it(model: Hebatron, tokenizer: Tokenizer) -> None:
    whole = [one.text for one in complete(model, tokenizer, PROMPTS, max_new_tokens=12)]
    stop = (whole[0][3:6], whole[2][5:7], "never written")
    for text, one in zip(whole, complete(model, tokenizer, PROMPTS, max_new_tokens=12, stop=stop)):
        places = [text.find(s) for s in stop if s in text]
        assert one.text == (text[: min(places)] if places else text)
        assert one.ended == bool(places)


def test_rows_that_leave_a_decoder_write_the_same(
    model: Hebatron, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU: a padded cache whose bucket shrinks with its rows."""
    whole = [one.text for one in complete(model, tokenizer, PROMPTS, max_new_tokens=12)]
    stop = (whole[0][3:6], whole[2][5:7])
    want = complete(model, tokenizer, PROMPTS, max_new_tokens=12, stop=stop)
    buckets = []

    def one_more_token(model, cache):
        decoder = Decoder(model, cache, lambda device: lambda run: run)

        def decode(ids_B):
            buckets.append(cache.bucket)
            return decoder(ids_B)[:, None]

        return decode

    monkeypatch.setattr("hebatron.evaluation.complete.one_more_token", one_more_token)
    monkeypatch.setattr(model, "new_cache", lambda *sizes: Cache(model.config, *sizes, pad_rows=True))
    assert complete(model, tokenizer, PROMPTS, max_new_tokens=12, stop=stop) == want
    assert buckets[0] == 8 and buckets == sorted(buckets, reverse=True) and buckets[-1] < 8


def test_complete_ends_at_an_end_token(model: Hebatron, tokenizer: Tokenizer) -> None:
    tokens = alone(model, tokenizer, PROMPTS[0], 12)
    end = next(t for i, t in enumerate(tokens) if i > 1 and t not in tokens[:i])
    (one,) = complete(model, tokenizer, PROMPTS[:1], max_new_tokens=12, ends=[end])
    assert one.ended and one.text == tokenizer.decode(tokens[: tokens.index(end)])
    ends_by_config = Hebatron(model.config.replace(eos_token_id=end)).eval()
    ends_by_config.load_state_dict(model.state_dict())
    assert complete(ends_by_config, tokenizer, PROMPTS[:1], max_new_tokens=12) == [one]


def test_complete_draws_by_the_seed_and_not_by_the_neighbours(model: Hebatron, tokenizer: Tokenizer) -> None:
    def write(prompts: list[str], seed: int) -> list[str]:
        written = complete(model, tokenizer, prompts, max_new_tokens=12, temperature=1.5, top_k=50, seed=seed)
        return [one.text for one in written]

    together = write(PROMPTS, 7)
    assert together == [write([prompt], 7)[0] for prompt in PROMPTS]
    assert together != write(PROMPTS, 8)


def test_a_prompt_too_long_loses_its_beginning(tokenizer: Tokenizer) -> None:
    short = make_model(presets.tiny(330).replace(max_position_embeddings=20), 3)
    ids = tokenizer.encode(" ".join(WORDS * 5))
    (one,) = complete(short, tokenizer, [" ".join(WORDS * 5)], max_new_tokens=8)
    out = short.generate(torch.tensor([ids[-12:]]), max_new_tokens=8)[0, 12:]
    assert one.cut and one.text == tokenizer.decode(out.tolist())


def test_complete_refuses(model: Hebatron, tokenizer: Tokenizer) -> None:
    limit = model.config.max_position_embeddings
    for count in (0, limit):
        with pytest.raises(ValueError, match=f"max_new_tokens must be at least 1 and below .*, got {count}"):
            complete(model, tokenizer, ["א"], max_new_tokens=count)
    with pytest.raises(ValueError, match="stop must hold no empty text"):
        complete(model, tokenizer, ["א"], stop=["א", ""])
    with pytest.raises(ValueError, match="temperature must be finite"):
        complete(model, tokenizer, ["א"], temperature=-1.0)
    assert complete(model, tokenizer, []) == []


# ---------------------------------------------------------------- TextStream


def test_stream_gives_whole_characters_as_soon_as_they_are_there(tokenizer: Tokenizer) -> None:
    text = "שלום עולם, 🙂 ñ 漢字\nשָׁלוֹם e\u0301"
    ids = tokenizer.encode(text)
    assert any("\ufffd" in tokenizer.decode([i]) for i in ids)  # characters are cut here
    stream, pieces = TextStream(tokenizer), []
    for i in range(len(ids)):
        pieces.append(stream.add(ids[i]))
        shown, known = "".join(pieces), tokenizer.decode(ids[: i + 1])
        assert "\ufffd" not in shown and shown == known.rstrip("\ufffd")
    assert stream.finish() == "" and "".join(pieces) == text


def test_stream_of_any_tokens_is_their_text(tokenizer: Tokenizer) -> None:
    rng = random.Random(0)
    for _ in range(200):
        ids = [rng.randrange(tokenizer.vocab_size) for _ in range(rng.randrange(12))]
        stream = TextStream(tokenizer)
        assert "".join(map(stream.add, ids)) + stream.finish() == tokenizer.decode(ids)


def test_stream_hides_control_tokens_unless_told(tokenizer: Tokenizer) -> None:
    end = tokenizer.token_id("<|im_end|>")
    assert end is not None
    assert TextStream(tokenizer).add(end) == ""
    assert TextStream(tokenizer, skip_special=False).add(end) == "<|im_end|>"
