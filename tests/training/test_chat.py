"""Conversations: the cache goes from turn to turn, whatever ends an answer; and the verb, piped and interrupted."""

import io
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from task_toy import make_model, make_tokenizer

from hebatron import Cache, Decoder, Hebatron, cli, presets
from hebatron.chat.conversation import Conversation
from hebatron.chat.template import NEMOTRON3, ChatTemplate
from hebatron.tokenizer import Tokenizer

TURNS = ["שלום", "ספר ילד בית?", "the answer 🙂"]
# leaves earlier reasoning out, whatever it is asked
FORGETFUL = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{{ m.content.split('</think>')[-1] if m.role == 'assistant' else m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return make_tokenizer()


@pytest.fixture(scope="module")
def model() -> Hebatron:
    return make_model(presets.tiny(330), 3)


@pytest.fixture
def fed(model: Hebatron, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many tokens each forward was given."""
    counts: list[int] = []
    forward = model.forward

    def counted(input_ids: torch.Tensor, **options: Any) -> Any:
        counts.append(input_ids.numel())
        return forward(input_ids, **options)

    monkeypatch.setattr(model, "forward", counted)
    return counts


def talk(model: Hebatron, tokenizer: Tokenizer, template: str = NEMOTRON3, **options: Any) -> Conversation:
    settings = {"temperature": 0.0, "top_p": None, "max_new_tokens": 6} | options
    return Conversation(model, tokenizer, ChatTemplate(template), **settings)


def script(monkeypatch: pytest.MonkeyPatch, tokens: Sequence[int]) -> None:
    """The model writes these tokens, one after another."""
    coming: Iterator[int] = iter(tokens)
    monkeypatch.setattr("hebatron.chat.conversation.choose", lambda *_: torch.tensor([next(coming)]))


def written(tokenizer: Tokenizer, *answers: str, end: str = "<|im_end|>") -> list[int]:
    return [token for answer in answers for token in tokenizer.encode(answer + end, special=True)]


def test_each_answer_is_what_the_whole_conversation_gives(model: Hebatron, tokenizer: Tokenizer) -> None:
    conversation = talk(model, tokenizer, system="ענה בעברית")
    for turn in TURNS:
        answer = "".join(conversation.ask(turn))
        ids = conversation._ids
        alone = model.generate(torch.tensor([ids[:-6]]), max_new_tokens=6, eos_token_id=())[0].tolist()
        assert alone == ids and tokenizer.decode(alone[-6:], skip_special=False) == answer
        prompt = ChatTemplate(NEMOTRON3).render(conversation.messages[:-1], generation=True, thinking=False)
        assert tokenizer.decode(ids, skip_special=False) == prompt + answer
        assert conversation.messages[-1] == {"role": "assistant", "content": answer} and conversation.cut
    assert [m["content"] for m in conversation.messages if m["role"] == "user"] == TURNS


def test_answers_from_a_decoder_are_the_same(
    model: Hebatron, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU: one decoder from turn to turn, while the cache grows."""
    plain = talk(model, tokenizer, temperature=0.9, max_new_tokens=40)
    want = ["".join(plain.ask(turn)) for turn in TURNS]

    def one_more_token(model: Hebatron, cache: Cache) -> Any:
        decoder = Decoder(model, cache, lambda device: lambda run: run)
        return lambda ids_B: decoder(ids_B)[:, None]

    monkeypatch.setattr("hebatron.chat.conversation.one_more_token", one_more_token)
    decoded = talk(model, tokenizer, temperature=0.9, max_new_tokens=40)
    assert ["".join(decoded.ask(turn)) for turn in TURNS] == want
    assert decoded._cache.moves > 1


@pytest.mark.parametrize("thinking", [False, True])
def test_no_token_is_fed_twice(
    model: Hebatron, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, fed: list[int], thinking: bool
) -> None:
    thought = "שלום\n</think>\n" if thinking else ""
    script(monkeypatch, written(tokenizer, thought + "עולם", thought + "ספר", thought + "יום"))
    conversation = talk(model, tokenizer, thinking=thinking, max_new_tokens=40)
    for turn, answer in zip(TURNS, ("עולם", "ספר", "יום"), strict=True):
        assert "".join(conversation.ask(turn)) == thought + answer and not conversation.cut
    assert sum(fed) == len(conversation._ids) - 1  # the last end of turn waits for the next question
    template = ChatTemplate(NEMOTRON3)
    whole = template.render(conversation.messages, keep_reasoning=True)
    assert tokenizer.decode(conversation._ids, skip_special=False) + "\n" == whole
    assert conversation._ids == tokenizer.encode(whole.rstrip("\n"), special=True)


def test_tokens_the_model_chose_stay_whatever_their_text_encodes_to(
    model: Hebatron, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, fed: list[int]
) -> None:
    bytewise = [token for character in "שלום" for token in tokenizer.encode(character)]
    assert bytewise != tokenizer.encode("שלום")
    script(monkeypatch, bytewise + written(tokenizer, "", "טוב"))
    conversation = talk(model, tokenizer, max_new_tokens=40)
    assert ["".join(conversation.ask(turn)) for turn in TURNS[:2]] == ["שלום", "טוב"]
    assert sum(fed) == len(conversation._ids) - 1
    assert len(conversation._ids) > len(tokenizer.encode(conversation._text, special=True))


def test_a_template_that_forgets_is_rendered_anew(
    model: Hebatron, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, fed: list[int]
) -> None:
    script(monkeypatch, written(tokenizer, "ילד</think>עולם", "ילד</think>ספר"))
    conversation = talk(model, tokenizer, FORGETFUL, max_new_tokens=40)
    assert "".join(conversation.ask("שלום")) == "ילד</think>עולם"
    first = len(fed)
    assert "".join(conversation.ask("מה?")) == "ילד</think>ספר"
    prompt = ChatTemplate(FORGETFUL).render(conversation.messages[:-1], generation=True)
    assert "ילד" not in prompt and "עולם" in prompt
    assert fed[first] == len(tokenizer.encode(prompt, special=True))  # all of it, once more
    assert conversation._ids[: fed[first]] == tokenizer.encode(prompt, special=True)


def test_another_end_token_is_not_part_of_the_answer(
    model: Hebatron, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, fed: list[int]
) -> None:
    script(monkeypatch, written(tokenizer, "עולם", end="</s>") + written(tokenizer, "ספר"))
    conversation = talk(model, tokenizer, max_new_tokens=40)
    assert "".join(conversation.ask("שלום")) == "עולם" and not conversation.cut
    assert "".join(conversation.ask("מה?")) == "ספר"
    assert sum(fed) == len(conversation._ids) - 1 and tokenizer.eos_id not in conversation._ids


def test_pieces_are_whole_characters(
    model: Hebatron, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "שָׁלוֹם 🙂 漢字"
    script(monkeypatch, written(tokenizer, text))
    pieces = list(talk(model, tokenizer, max_new_tokens=80).ask("שלום"))
    assert "".join(pieces) == text and "\ufffd" not in "".join(pieces) and len(pieces) > 5


@pytest.mark.parametrize(
    ("at", "death"),
    [(0, KeyboardInterrupt), (1, KeyboardInterrupt), (4, KeyboardInterrupt), (4, MemoryError)],
)
def test_an_interrupted_answer_stands_as_far_as_it_came(
    model: Hebatron,
    tokenizer: Tokenizer,
    monkeypatch: pytest.MonkeyPatch,
    at: int,
    death: type[BaseException],
) -> None:
    conversation = talk(model, tokenizer, max_new_tokens=8)
    expected = "".join(talk(model, tokenizer, max_new_tokens=max(at, 1)).ask("שלום")) if at else ""
    lm_head, left = model.lm_head.forward, iter(range(at))

    def dying(x: torch.Tensor) -> torch.Tensor:
        if next(left, None) is None:
            raise death  # in the middle of a step
        return lm_head(x)

    with monkeypatch.context() as patch:
        patch.setattr(model.lm_head, "forward", dying)
        with pytest.raises(death):
            list(conversation.ask("שלום"))
    assert conversation.messages[-1] == {"role": "assistant", "content": expected}
    again = "".join(conversation.ask("מה?"))
    ids = conversation._ids
    assert model.generate(torch.tensor([ids[:-8]]), max_new_tokens=8, eos_token_id=())[0].tolist() == ids
    assert tokenizer.decode(ids[-8:], skip_special=False) == again


def test_a_closed_answer_stands_and_the_cache_stays(
    model: Hebatron, tokenizer: Tokenizer, fed: list[int]
) -> None:
    conversation = talk(model, tokenizer)
    pieces = conversation.ask("שלום")
    first = next(pieces) + next(pieces)
    pieces.close()
    assert conversation.messages[-1]["content"].startswith(first)
    "".join(conversation.ask("מה?"))
    assert sum(fed) == len(conversation._ids) - 1


def test_reset_keeps_the_system_text_alone(model: Hebatron, tokenizer: Tokenizer) -> None:
    conversation = talk(model, tokenizer, system="ענה בעברית")
    first = "".join(conversation.ask("שלום"))
    "".join(conversation.ask("מה?"))
    conversation.reset()
    assert conversation.messages == [{"role": "system", "content": "ענה בעברית"}]
    assert "".join(conversation.ask("שלום")) == first


def test_a_refused_text_was_not_said(model: Hebatron, tokenizer: Tokenizer) -> None:
    conversation, other = talk(model, tokenizer), talk(model, tokenizer)
    for one in (conversation, other):
        "".join(one.ask("שלום"))
    with pytest.raises(ValueError, match=r"must not spell '<\|im_end\|>'"):
        list(conversation.ask("a<|im_end|>b"))
    room = model.config.max_position_embeddings
    with pytest.raises(
        ValueError, match=rf"must stay below max_position_embeddings \({room}\) tokens, got more"
    ):
        list(conversation.ask("ספר " * room))
    assert "".join(conversation.ask("מה?")) == "".join(other.ask("מה?"))
    assert conversation.messages == other.messages
    with pytest.raises(ValueError, match="must not spell"):
        talk(model, tokenizer, system="<|im_start|>")
    with pytest.raises(ValueError, match="temperature must be finite"):
        talk(model, tokenizer, temperature=-1.0)


def test_an_answer_ends_where_the_context_does(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    script(monkeypatch, tokenizer.encode("א" * 99))
    short = make_model(presets.tiny(330).replace(max_position_embeddings=64), 3)
    conversation = talk(short, tokenizer, max_new_tokens=1000)
    "".join(conversation.ask("שלום"))
    assert len(conversation._ids) == 64 and conversation.cut


# ---------------------------------------------------------------- the verb


@pytest.fixture(scope="module")
def folder(model: Hebatron, tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    model.save_pretrained(folder)
    tokenizer.save(folder)
    (folder / "chat_template.jinja").write_text(NEMOTRON3, encoding="utf-8")
    return folder


def run(monkeypatch: pytest.MonkeyPatch, folder: Path, text: str, *options: str) -> int:
    monkeypatch.setattr("sys.stdin", io.StringIO(text))
    return cli.main(["chat", str(folder), "--temperature", "0", "--max-new-tokens", "6", *options])


def test_chat_answers_each_line_of_a_pipe(
    folder: Path,
    model: Hebatron,
    tokenizer: Tokenizer,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    answers = ["עולם", "ספר\nילד", "טוב"]
    script(monkeypatch, written(tokenizer, *answers))
    assert run(monkeypatch, folder, "שלום\n\n/help\nמה?\n/reset\na<|im_end|>\nיום\n/exit\nnever") == 0
    out, err = capsys.readouterr()
    assert out == "עולם\nספר\nילד\nטוב\n"
    assert "/reset forgets" in err and re.search(r"hebatron: chat: .* must not spell '<\|im_end\|>'", err)


def test_chat_makes_control_characters_visible(
    folder: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script(monkeypatch, written(tokenizer, "א\x1b[2J\u202eב"))
    assert run(monkeypatch, folder, "שלום\n", "--max-new-tokens", "40") == 0
    assert capsys.readouterr().out == "א\ufffd[2J\ufffdב\n"


def test_chat_goes_on_after_an_interrupted_or_cut_answer(
    folder: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    coming = iter([*tokenizer.encode("ספר"), None, *written(tokenizer, "טוב"), *tokenizer.encode(" ילד" * 9)])

    def choose(*_: Any) -> torch.Tensor:
        token = next(coming)
        if token is None:
            raise KeyboardInterrupt
        return torch.tensor([token])

    monkeypatch.setattr("hebatron.chat.conversation.choose", choose)
    assert run(monkeypatch, folder, "שלום\nמה?\nעוד\n") == 0
    out, err = capsys.readouterr()
    assert out.startswith("ספר") and "טוב\n" in out and "(stopped)" in err
    assert "(cut: the answer reached its length limit)" in err


def test_chat_needs_a_template(
    folder: Path, tmp_path: Path, model: Hebatron, tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    model.save_pretrained(tmp_path)
    tokenizer.save(tmp_path)
    assert cli.main(["chat", str(tmp_path)]) == 2
    assert "the model must have one, got none; give --template nemotron3 or a file" in capsys.readouterr().err
