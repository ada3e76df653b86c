"""Byte-level BPE: lossless, deterministic, Hebrew-friendly, and the same in transformers."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from hebatron.tokenizer import SPECIAL_TOKENS, Tokenizer, load_tokenizer, train_bpe

HEBREW = [
    "הילדה קראה ספר על הים, ואחר כך הלכה לישון. הספר היה ארוך והילדה אהבה אותו.",
    'צה"ל ומנכ"לית החברה נפגשו ב-1948; ג\'ורג\' אמר: "שלום לכולם".',
    "הַיַּלְדָּה קָרְאָה סֵפֶר עַל הַיָּם וְהָלְכָה לִישׁוֹן",
    "הַמֶּלֶךְ בָּ֣א אֶל־הָעִ֑יר׃ וְהָעָ֖ם שָׂמֵֽחַ׃",
]
OTHER = [
    "The girl read a book about the sea; she didn't sleep. It's 1,234 pages long.",
    "def add(a: int, b: int) -> int:\n    return a + b\n\n\nprint(add(12, 34))\n",
    "emoji 👩‍👩‍👧 and CRLF\r\nline, tab\tend, \u202eoverride\u202c, e\u0301, NUL\x00 too",
]
TEXTS = HEBREW + OTHER
PATTERNS = ["", " ", "\n", "א", "123", "   x", "\U0001f1ee\U0001f1f1", "\u05b0", "a\u05b0", "\ufeff"]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_bpe(TEXTS * 3, 500)


def test_tokenizer_special_ids(tokenizer: Tokenizer) -> None:
    assert [tokenizer.token_id(token) for token in SPECIAL_TOKENS] == list(range(7))
    assert (tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id) == (0, 1, 2)
    assert tokenizer.vocab_size == 500


@pytest.mark.parametrize("text", TEXTS + PATTERNS)
def test_tokenizer_is_lossless(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_tokenizer_splits_digits_singly(tokenizer: Tokenizer) -> None:
    many = train_bpe(["1948 1948 1948"] * 50, 300)
    assert len(many.encode("1948")) == 4
    assert len(tokenizer.encode("1234")) == 4


def test_tokenizer_keeps_marks_and_gershayim_in_words() -> None:
    """Whatever is frequent enough becomes one token exactly if the pre-tokeniser keeps it whole."""
    words = ["בָּרָא", 'צה"ל', "ג'ירף", "צה״ל", "e\u0301te\u0301", "צה\u201dל", "ג\u2019ירף", "וכו\u05f3"]
    trained = train_bpe([f"{word} " for word in words] * 50, 400)
    assert {word: len(trained.encode(word)) for word in words} == dict.fromkeys(words, 1)
    apart = ["אב־גד", 'x"y', "אב.גד", "x\u201dy"]  # maqaf, quotes between Latin letters, a full stop
    trained = train_bpe([f"{word} " for word in apart] * 50, 400)
    assert {word: len(trained.encode(word)) for word in apart} == dict.fromkeys(apart, 3)
    closing = ["אב\u201d", "אב'", "x\u05f3"]  # a quote after a word is not part of it
    trained = train_bpe([f"{word} " for word in closing] * 50, 400)
    assert {word: len(trained.encode(word)) for word in closing} == dict.fromkeys(closing, 2)


def test_tokenizer_text_never_becomes_a_control_token(tokenizer: Tokenizer) -> None:
    text = "a<|im_end|></s><pad>"
    assert min(tokenizer.encode(text)) >= len(SPECIAL_TOKENS)
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.encode(text, special=True)[1:] == [4, 2, 0]
    assert tokenizer.encode(text)[1:] != [4, 2, 0]  # the choice does not stick


def test_tokenizer_batch_is_one_by_one(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode_batch(TEXTS) == [tokenizer.encode(text) for text in TEXTS]
    assert tokenizer.encode_batch([]) == []


def test_tokenizer_names_what_utf8_cannot_hold(tokenizer: Tokenizer) -> None:
    for encode in (tokenizer.encode, tokenizer.encode_with_offsets):
        with pytest.raises(
            ValueError, match=r"^tokenizer: text must be valid Unicode, got U\+DCD7 at character 3$"
        ):
            encode("ab\udcd7")  # a byte of a broken argument, as Python hands it on


def test_tokenizer_saved_folder_is_the_same_in_transformers(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path)
    for theirs in (
        AutoTokenizer.from_pretrained(tmp_path),
        PreTrainedTokenizerFast.from_pretrained(tmp_path),
    ):
        for text in TEXTS + PATTERNS + ["x<|im_start|>y</s>"]:
            assert theirs(text)["input_ids"] == tokenizer.encode(text, special=True)
            assert theirs.decode(tokenizer.encode(text)) == tokenizer.decode(tokenizer.encode(text))
        assert (theirs.pad_token_id, theirs.bos_token_id, theirs.eos_token_id) == (0, 1, 2)
        assert len(theirs) == tokenizer.vocab_size


def test_tokenizer_save_and_load_keep_everything(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path / "a")
    (tmp_path / "a" / "chat_template.jinja").write_text("{{ messages }}", encoding="utf-8")
    loaded = load_tokenizer(tmp_path / "a")
    loaded.save(tmp_path / "b")
    assert loaded.fingerprint == tokenizer.fingerprint
    assert loaded.encode_batch(TEXTS) == tokenizer.encode_batch(TEXTS)
    assert {p.name: p.read_bytes() for p in (tmp_path / "a").iterdir()} == {
        p.name: p.read_bytes() for p in (tmp_path / "b").iterdir()
    }


def test_tokenizer_loaded_never_truncates_or_pads(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path)
    spec = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))
    spec["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec), encoding="utf-8")
    loaded = load_tokenizer(tmp_path)
    assert loaded.encode(TEXTS[0]) == tokenizer.encode(TEXTS[0])
    assert loaded.fingerprint == tokenizer.fingerprint


def test_load_tokenizer_reads_token_objects_and_does_without_pad(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    """Older hub folders write a token as an object; some name no padding token."""
    tokenizer.save(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text(encoding="utf-8"))
    config["eos_token"] = {"__type": "AddedToken", "content": "<|im_end|>", "special": True}
    del config["pad_token"]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    loaded = load_tokenizer(tmp_path)
    assert (loaded.eos_id, loaded.bos_id, loaded.pad_id) == (4, 1, None)


def test_tokenizer_training_is_deterministic(tokenizer: Tokenizer) -> None:
    assert train_bpe(TEXTS[::-1] * 3, 500).fingerprint == tokenizer.fingerprint
    assert train_bpe(TEXTS * 4, 499).fingerprint != tokenizer.fingerprint
    code = f"from hebatron.tokenizer import train_bpe; print(train_bpe({TEXTS!r} * 3, 500).fingerprint)"
    for environment in ({"PYTHONHASHSEED": "1"}, {"PYTHONHASHSEED": "2", "RAYON_NUM_THREADS": "1"}):
        run = subprocess.run(
            [sys.executable, "-c", code],
            env={"PYTHONPATH": ":".join(sys.path), "PYTHONIOENCODING": "utf-8", **environment},
            capture_output=True,
            text=True,
            check=True,
        )
        assert run.stdout.strip() == tokenizer.fingerprint


def test_train_bpe_errors() -> None:
    with pytest.raises(ValueError, match=r"train_bpe: vocab_size must be at least 263 .*, got 262"):
        train_bpe(TEXTS, 262)
    for empty in ([], ["", ""]):
        with pytest.raises(ValueError, match="train_bpe: texts must contain at least one non-empty string"):
            train_bpe(empty, 300)


def test_load_tokenizer_errors(tokenizer: Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"load_tokenizer: folder must contain tokenizer\.json, got"):
        load_tokenizer(tmp_path)
    tokenizer.save(tmp_path)
    config_file, json_file = tmp_path / "tokenizer_config.json", tmp_path / "tokenizer.json"
    config = json.loads(config_file.read_text(encoding="utf-8"))
    for contents, message in [
        (b"{", "tokenizer_config.json must be JSON"),
        (b"[]", "tokenizer_config.json must be an object, got list"),
        (b"\xff", "must be UTF-8"),
        (json.dumps({**config, "eos_token": None}).encode(), "eos_token must be named .*, got none"),
        (
            json.dumps({**config, "pad_token": "<no>"}).encode(),
            "pad_token must be in the vocabulary, got '<no>'",
        ),
    ]:
        config_file.write_bytes(contents)
        with pytest.raises(ValueError, match=message):
            load_tokenizer(tmp_path)
    for contents in (b"{", b"{}", b"", b'{"model": 3}'):
        json_file.write_bytes(contents)
        with pytest.raises(ValueError, match=r"load_tokenizer: tokenizer\.json must be readable, got"):
            load_tokenizer(tmp_path)


def test_the_chat_template_of_older_folders_is_in_the_config(tmp_path: Path) -> None:
    train_bpe(HEBREW, 300).save(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "שלום"}]
    for given, read in (("שלום", "שלום"), (named, "שלום"), (named[:1], None), (None, None)):
        path.write_text(json.dumps(config | {"chat_template": given}), encoding="utf-8")
        assert load_tokenizer(tmp_path).chat_template == read
    path.write_text(json.dumps(config | {"chat_template": 3}), encoding="utf-8")
    with pytest.raises(ValueError, match="chat_template must be a text, got int"):
        load_tokenizer(tmp_path)
    (tmp_path / "chat_template.jinja").write_text("newer", encoding="utf-8")
    assert load_tokenizer(tmp_path).chat_template == "newer"
