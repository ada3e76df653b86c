"""Byte-level BPE: trained on a corpus, or read from a checkpoint folder; saved so that transformers opens it.

A document's text never becomes a control token: `encode` reads "<|im_end|>" as ordinary characters
unless the caller, who rendered a chat template, passes `special=True`.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import tokenizers

PAD, BOS, EOS = "<pad>", "<s>", "</s>"
# What the hub's chat template writes. Were <think> and </think> no tokens, the ">" before an answer could join an
# answer that begins with punctuation, whose first token is then not learnt (5 of 2,000 real chats), and a chat would
# be 7 tokens longer (5 %).
CHAT_TOKENS = ("<|im_start|>", "<|im_end|>", "<think>", "</think>")
SPECIAL_TOKENS = (PAD, BOS, EOS, *CHAT_TOKENS)  # ids 0 to 6

# A word keeps its combining marks (niqqud, cantillation) and, between Hebrew letters, its geresh or
# gershayim, so that an acronym like tsahal (tsadi, he, ", lamed) is one word; word processors write U+2019 and
# U+201D for them. An abbreviation keeps the geresh that ends it, where it is a geresh (U+05F3) and cannot be a
# closing quote. Every digit stands alone: BPE would otherwise learn numbers by frequency. English clitics come
# off (don|'t); line breaks never join the text after them.
_WORD_PATTERN = "|".join(
    [
        r"'(?:[sdmt]|ll|ve|re)(?![\p{L}\p{M}])",
        r" ?[\p{L}\p{M}]+(?:(?<=\p{Hebrew})[\"'\x{05F3}\x{05F4}\x{2019}\x{201D}](?=\p{Hebrew})[\p{L}\p{M}]+)*"
        r"(?:(?<=\p{Hebrew})\x{05F3})?",
        r"\p{N}",
        r" ?[^\s\p{L}\p{M}\p{N}]+",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    ]
)


class Tokenizer:
    """A `tokenizers.Tokenizer` with the ids the rest of the library needs."""

    def __init__(
        self, backend: tokenizers.Tokenizer, config: dict[str, Any], chat_template: str | None = None
    ) -> None:
        """config: contents of tokenizer_config.json, kept on saving. chat_template: Jinja text."""
        self._backend = backend
        self._config = config
        self.chat_template = chat_template
        eos_id = self._special_id("eos_token")
        if eos_id is None:
            raise ValueError("tokenizer: eos_token must be named in tokenizer_config.json, got none")
        self.eos_id: int = eos_id
        self.bos_id = self._special_id("bos_token")
        self.pad_id = self._special_id("pad_token")
        self.vocab_size: int = max(backend.get_vocab(with_added_tokens=True).values()) + 1

    def _special_id(self, role: str) -> int | None:
        entry = self._config.get(role)
        token = entry.get("content") if isinstance(entry, dict) else entry
        if token is None:
            return None
        token_id = self._backend.token_to_id(token)
        if token_id is None:
            raise ValueError(f"tokenizer: {role} must be in the vocabulary, got {token!r}")
        return token_id

    @property
    def fingerprint(self) -> str:
        """sha256 of everything that decides an encoding; the same before and after saving."""
        spec = json.loads(self._backend.to_str())
        parts = ("added_tokens", "normalizer", "pre_tokenizer", "post_processor", "decoder", "model")
        canonical = json.dumps([spec.get(part) for part in parts], sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()

    def token_id(self, token: str) -> int | None:
        """The id of one token string, for example "<|im_end|>"; None if it is not in the vocabulary."""
        return self._backend.token_to_id(token)

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        """Ids of `text`, nothing added. special=True reads control tokens written out in the text as such."""
        return self.encode_batch([text], special=special)[0]

    def encode_batch(self, texts: Sequence[str], *, special: bool = False) -> list[list[int]]:
        """`encode` of each text, in parallel over the machine's cores."""
        self._backend.encode_special_tokens = not special
        with _naming_surrogates(texts):
            return [e.ids for e in self._backend.encode_batch_fast(list(texts), add_special_tokens=False)]

    def encode_with_offsets(
        self, text: str, *, special: bool = True
    ) -> tuple[list[int], list[tuple[int, int]]]:
        """`encode(text, special=special)` and each token's [start, end) in characters of `text`.

        Both tokens of a character cut in two have the whole character.
        """
        self._backend.encode_special_tokens = not special
        with _naming_surrogates([text]):
            encoding = self._backend.encode(text, add_special_tokens=False)
        return encoding.ids, encoding.offsets

    @property
    def control_tokens(self) -> frozenset[str]:
        """The tokens that a text may only get from a chat template; <think> and <tool_call> are ordinary text."""
        added = self._backend.get_added_tokens_decoder().values()
        tags = ("<think", "</think", "<tool_", "</tool_")
        return frozenset(t.content for t in added if t.special and not t.content.startswith(tags))

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        """Text of `ids`; bytes that are not UTF-8 (a character cut in two) become U+FFFD."""
        return self._backend.decode([int(i) for i in ids], skip_special_tokens=skip_special)

    def save(self, folder: Path | str) -> None:
        """Write tokenizer.json, tokenizer_config.json (and chat_template.jinja) into `folder`."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self._backend.encode_special_tokens = False
        self._backend.save(str(folder / "tokenizer.json"))
        config = json.dumps(self._config, ensure_ascii=False, indent=2)
        (folder / "tokenizer_config.json").write_text(config + "\n", encoding="utf-8")
        if self.chat_template is not None:
            (folder / "chat_template.jinja").write_text(self.chat_template, encoding="utf-8")


@contextlib.contextmanager
def _naming_surrogates(texts: Sequence[str]) -> Iterator[None]:
    """A text that UTF-8 cannot hold, as a terminal's broken bytes become, is a TypeError of the binding without a word
    of where."""
    try:
        yield
    except TypeError:
        for text in texts:
            try:
                text.encode("utf-8")
            except UnicodeEncodeError as error:
                got = f"U+{ord(text[error.start]):04X} at character {error.start + 1}"
                raise ValueError(f"tokenizer: text must be valid Unicode, got {got}") from None
        raise


def train_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE; the same texts give the same tokenizer whatever their order or the core count.

    Args:
        texts: any iterable, streamed once.
        vocab_size: entries including the 256 bytes and the 7 control tokens. A corpus too small to fill it
            gives a smaller vocabulary: read the result's `vocab_size`.
    Raises: ValueError for a vocabulary under 263 entries, or texts without one non-empty string.
    """
    smallest = 256 + len(SPECIAL_TOKENS)
    if vocab_size < smallest:
        raise ValueError(
            f"train_bpe: vocab_size must be at least {smallest} (256 bytes and {len(SPECIAL_TOKENS)} control "
            f"tokens), got {vocab_size}"
        )
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [
            tokenizers.pre_tokenizers.Split(tokenizers.Regex(_WORD_PATTERN), behavior="isolated"),
            tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    seen_text = False

    def checked() -> Iterable[str]:
        nonlocal seen_text
        for text in texts:
            seen_text = seen_text or bool(text)
            yield text

    backend.train_from_iterator(checked(), trainer)
    if not seen_text:
        raise ValueError("train_bpe: texts must contain at least one non-empty string, got none")
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "pad_token": PAD,
        "additional_special_tokens": list(CHAT_TOKENS),
        "clean_up_tokenization_spaces": False,
        "model_max_length": 1 << 30,
    }
    return Tokenizer(backend, config)


def load_tokenizer(folder: Path | str) -> Tokenizer:
    """Read a checkpoint folder's tokenizer.json, tokenizer_config.json and, if there is one, its chat template."""
    folder = Path(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        if not (folder / name).is_file():
            raise ValueError(f"load_tokenizer: folder must contain {name}, got {folder}")
    text = _read_utf8(folder / "tokenizer.json")
    try:
        backend = tokenizers.Tokenizer.from_str(text)
    except Exception as error:  # the binding raises a bare Exception for a file it cannot read
        if type(error) is not Exception:
            raise
        raise ValueError(
            f"load_tokenizer: tokenizer.json must be readable, got {error} in {folder}"
        ) from error
    try:
        config = json.loads(_read_utf8(folder / "tokenizer_config.json"))
    except json.JSONDecodeError as error:
        raise ValueError(
            f"load_tokenizer: tokenizer_config.json must be JSON, got {error} in {folder}"
        ) from error
    if not isinstance(config, dict):
        raise ValueError(
            f"load_tokenizer: tokenizer_config.json must be an object, got {type(config).__name__}"
        )
    backend.no_truncation()  # a saved folder may carry a length limit; documents are never cut here
    backend.no_padding()
    return Tokenizer(backend, config, _read_template(folder, config))


def _read_template(folder: Path, config: dict[str, Any]) -> str | None:
    """chat_template.jinja, or what older folders have in tokenizer_config.json: a text, or several with names."""
    file = folder / "chat_template.jinja"
    if file.is_file():
        return _read_utf8(file)
    found = config.get("chat_template")
    if isinstance(found, list):
        named = {entry.get("name"): entry.get("template") for entry in found if isinstance(entry, dict)}
        found = named.get("default")
    if found is not None and not isinstance(found, str):
        raise ValueError(
            f"load_tokenizer: chat_template must be a text, got {type(found).__name__} in {folder}"
        )
    return found


def _read_utf8(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"load_tokenizer: {path} must be UTF-8, got {error}") from error
