"""Chats as training samples: `messages` rendered, tokenised, and the assistant's answers marked for the loss.

    samples, ledger = encode_chats([Path("chats.jsonl.zst")], ChatEncoder(tokenizer, ChatTemplate(NEMOTRON3)), 2048)

One JSON object a line of .jsonl or .jsonl.zst: `messages` [{role, content, reasoning_content?, tool_calls?}, ...],
optional `tools`, `task`, `lang`, `source`, `id`. Learnt are the tokens that the model would have to produce: from
the end of what a prompt for that turn ends with ("<|im_start|>assistant\\n<think></think>" in the hub's form) up to
and with the end-of-turn token; never the role header, never the line break behind the turn. Which tokens these are
is found twice, by rendering prefixes of the chat and by marking the answers and reading the tokenizer's offsets;
where the two differ the sample is refused by name. A text that spells a control token is refused, not encoded.

Longer than `max_tokens`: truncation="drop" drops the chat; "cut" keeps its beginning, so that the answer it cuts
has no end to learn. A chat without a learnt token is dropped. All of it is counted.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from ..data.documents import MAX_DOCUMENT_BYTES, raw_documents
from ..tokenizer import Tokenizer
from .template import ChatTemplate, Message, end_of_turn

SUFFIXES = (".jsonl", ".jsonl.zst")
ROLES = ("system", "user", "assistant", "tool")
BEGIN, END = "\ufdd0", "\ufdd1"  # noncharacters: no text has them
Span = tuple[int, int]
_THOUGHT = re.compile(r"<think>\n(.*?)\n</think>\n(.*)", re.DOTALL)
_NO_THOUGHT = re.compile(r"<think></think>(.*)", re.DOTALL)


class BadChat(ValueError):
    """One chat cannot be used: `reason` is its name in the ledger."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


@dataclass(frozen=True)
class Chat:
    """A checked record; `name` is what messages about it say (file, line, and id if it has one)."""

    messages: list[Message]
    name: str
    task: str = "chat"
    lang: str = "und"
    source: str = "chats"
    tools: list[dict[str, Any]] | None = None


@dataclass(frozen=True, eq=False)
class Sample:
    """ids: (T,) int32 tokens of the chat. learn: (T,) bool, whether the token is to be predicted."""

    ids: npt.NDArray[np.int32]
    learn: npt.NDArray[np.bool_]
    name: str
    task: str
    lang: str
    source: str
    digest: str = ""  # sha256 of the chat's messages and tools, whatever file, template and tokenizer


@dataclass
class ChatLedger:
    """read = used + the dropped. tokens and learnt count the used; truncated are among the used."""

    read: int = 0
    used: int = 0
    truncated: int = 0
    tokens: int = 0
    learnt: int = 0
    dropped: Counter[str] = field(default_factory=Counter)

    @property
    def masked_share(self) -> float:
        """The share of the used tokens that carries no loss."""
        return 1 - self.learnt / self.tokens if self.tokens else 0.0


# ---------------------------------------------------------------- reading


def read_chats(
    files: Sequence[Path], ledger: ChatLedger, bad: Literal["error", "drop"] = "error"
) -> Iterator[Chat]:
    """The chats of `files` in order; a broken one is an error naming file and line, or a counted drop."""
    for path in files:
        if not path.name.endswith(SUFFIXES) or not path.is_file():
            raise ValueError(f"chats: input must be a {' or '.join(SUFFIXES)} file, got {path}")
        for line, raw in raw_documents(path, ()):
            if isinstance(raw, bytes) and raw.strip():
                ledger.read += 1
                try:
                    yield parse_chat(raw, f"{path}:{line}")
                except BadChat as problem:
                    _drop(ledger, problem, bad)


def _drop(ledger: ChatLedger, problem: BadChat, bad: Literal["error", "drop"]) -> None:
    if bad == "error":
        raise ValueError(f"chats: {problem}") from None
    ledger.dropped[problem.reason] += 1


def parse_chat(raw: bytes, where: str) -> Chat:
    """One checked chat out of a line; raises BadChat."""
    if len(raw) > MAX_DOCUMENT_BYTES:
        raise BadChat("too large", f"{where} must be at most {MAX_DOCUMENT_BYTES:,} bytes, got more")
    try:
        record = json.loads(raw.decode("utf-8").removeprefix("\ufeff"))
    except (ValueError, RecursionError) as error:
        raise BadChat("broken JSON", f"{where} must be one JSON object in UTF-8, got {error}") from None
    if not isinstance(record, dict) or not isinstance(record.get("messages"), list):
        raise BadChat(
            "no messages", f"{where} must be an object with a list `messages`, got {str(record)[:60]!r}"
        )
    name = f"{where} ({record['id']})" if record.get("id") is not None else where
    labels = {key: record[key] for key in ("task", "lang", "source") if record.get(key) is not None}
    for key, value in labels.items():
        if not isinstance(value, str) or not value:
            raise BadChat("field not a string", f"{name}: {key} must be a non-empty string, got {value!r}")
    tools = record.get("tools")
    if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise BadChat("tools", f"{name}: tools must be a list of objects, got {str(tools)[:60]!r}")
    return Chat(check_messages(record["messages"], name), name, **labels, tools=tools)


def check_messages(messages: Sequence[Any], name: str) -> list[Message]:
    """Copies with known roles and text contents; a tool call's arguments, JSON text for some, become objects."""
    checked: list[Message] = []
    for i, message in enumerate(messages):
        where = f"{name}: messages[{i}]"
        role = message.get("role") if isinstance(message, dict) else None
        if role not in ROLES:
            raise BadChat("unknown role", f"{where}.role must be one of {', '.join(ROLES)}, got {role!r}")
        if (i and role == "system") or (not i and role in ("assistant", "tool")):
            raise BadChat("order of roles", f"{where}.role must not be {role!r} at this place, got it")
        kept = {
            key: message[key]
            for key in ("role", "content", "reasoning_content")
            if message.get(key) is not None
        }
        if role == "assistant" and message.get("tool_calls"):
            kept["tool_calls"] = _tool_calls(message["tool_calls"], where)
            kept.setdefault("content", "")
        for key in ("content", "reasoning_content"):
            text = kept.get(key, "" if key == "reasoning_content" else None)
            if not isinstance(text, str):
                raise BadChat(
                    "content not text", f"{where}.{key} must be a string, got {type(text).__name__}"
                )
        checked.append(kept)
    if not checked:
        raise BadChat("no messages", f"{name}: messages must not be empty, got []")
    return checked


def _tool_calls(calls: Any, where: str) -> list[dict[str, Any]]:
    result = []
    for call in calls if isinstance(calls, list) else [None]:
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise BadChat(
                "tool call", f"{where}.tool_calls must be a list of named functions, got {str(calls)[:60]!r}"
            )
        arguments = function.get("arguments") or {}
        if isinstance(arguments, str):
            try:
                arguments = json.loads(arguments)
            except ValueError as error:
                raise BadChat(
                    "tool call", f"{where}.tool_calls arguments must be JSON, got {error}"
                ) from None
        if not isinstance(arguments, dict):
            raise BadChat("tool call", f"{where}.tool_calls arguments must be an object, got {arguments!r}")
        result.append({"type": "function", "function": {"name": function["name"], "arguments": arguments}})
    return result


# ---------------------------------------------------------------- encoding


class ChatEncoder:
    """A tokenizer and a template that fit each other."""

    def __init__(self, tokenizer: Tokenizer, template: ChatTemplate) -> None:
        """Raises ValueError if the template ends an assistant turn with no control token of the tokenizer."""
        self.tokenizer, self.template = tokenizer, template
        self.control_tokens = tokenizer.control_tokens
        self.end_of_turn = end_of_turn(template, self.control_tokens)

    def prompt_ids(self, messages: Sequence[Message], thinking: bool = False) -> list[int]:
        """What the model is given to answer the chat so far."""
        checked = self.refuse_control(check_messages(messages, "prompt"), "prompt")
        return self.tokenizer.encode(
            self.template.render(checked, generation=True, thinking=thinking), special=True
        )

    def encode(self, chat: Chat) -> Sample:
        """Tokens and loss mask of one chat, in which earlier turns keep their reasoning; raises BadChat."""
        messages = [self._split_reasoning(m) for m in self.refuse_control(chat.messages, chat.name)]
        for i, tool in enumerate(chat.tools or ()):  # a description is a text like others
            self._refuse_control(tool, f"{chat.name}: tools[{i}]")
        try:
            text = self._render(chat, messages)
            ids, offsets = self.tokenizer.encode_with_offsets(text)
            by_prefix = self._mask_by_prefixes(chat, messages, text, ids)
            by_offset = self._mask_by_offsets(chat, messages, text, offsets)
        except BadChat:
            raise
        except ValueError as error:  # the template refused
            raise BadChat("template", f"{chat.name}: {error}") from error
        if (by_prefix != by_offset).any():
            at = int(np.flatnonzero(by_prefix != by_offset)[0])
            raise BadChat(
                "masks differ",
                f"{chat.name}: the loss mask must be the same by prefixes and by offsets, got "
                f"{bool(by_prefix[at])} and {bool(by_offset[at])} for token {at} of {len(ids)}",
            )
        digest = hashlib.sha256(json.dumps([chat.messages, chat.tools], sort_keys=True).encode()).hexdigest()
        ids_T = np.asarray(ids, np.int32)
        return Sample(ids_T, by_prefix, chat.name, chat.task, chat.lang, chat.source, digest)

    def _render(self, chat: Chat, messages: Sequence[Message], **options: Any) -> str:
        return self.template.render(messages, tools=chat.tools, keep_reasoning=True, **options)

    def refuse_control(self, messages: list[Message], name: str) -> list[Message]:
        """`messages`, of which none spells a control token: a text must not open or close turns."""
        for i, message in enumerate(messages):
            self._refuse_control(message, f"{name}: messages[{i}]")
        return messages

    def _refuse_control(self, value: Any, where: str) -> None:
        text = json.dumps(value, ensure_ascii=False)
        for token in (*self.control_tokens, BEGIN, END):
            if token in text:
                raise BadChat("control token", f"{where} must not spell {token!r}, got it")
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            got = f"U+{ord(text[error.start]):04X}"
            raise BadChat("lone surrogate", f"{where} must be valid Unicode, got {got}") from None

    def _split_reasoning(self, message: Message) -> Message:
        """Reasoning written into the content goes to its own field, which renders the same, if the template has one."""
        if (
            message["role"] != "assistant"
            or not self.template.reads_reasoning
            or "reasoning_content" in message
        ):
            return message
        if (found := _THOUGHT.fullmatch(message["content"])) and found[1].strip():
            return {**message, "reasoning_content": found[1], "content": found[2]}
        if (found := _NO_THOUGHT.fullmatch(message["content"])) and "think>" not in found[1]:
            return {**message, "content": found[1]}
        return message

    def _mask_by_prefixes(
        self, chat: Chat, messages: Sequence[Message], text: str, ids: Sequence[int]
    ) -> npt.NDArray[np.bool_]:
        """Way one: the chat up to each answer, with and without it, is rendered and tokenised by itself."""
        learn = np.zeros(len(ids), bool)
        for i, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            after = self._render(chat, messages[: i + 1])
            after = after[: after.rindex(self.end_of_turn) + len(self.end_of_turn)]
            prompts = [
                self._render(chat, messages[:i], generation=True, thinking=thinking)
                for thinking in (True, False)
            ]
            prompts = [prompt for prompt in prompts if after.startswith(prompt)]
            if not prompts or not text.startswith(after):
                raise BadChat(
                    "not incremental",
                    f"{chat.name}: messages[{i}] must be rendered as the prompt before it goes on, got another text",
                )
            before = self.tokenizer.encode(max(prompts, key=len), special=True)
            start, stop = len(before), len(self.tokenizer.encode(after, special=True))
            if list(ids[:start]) != before:
                raise BadChat(
                    "token over the edge",
                    f"{chat.name}: messages[{i}] must begin with a token of its own, got one joined to the role header",
                )
            learn[start:stop] = True
        return learn

    def _mask_by_offsets(
        self, chat: Chat, messages: Sequence[Message], text: str, offsets: Sequence[Span]
    ) -> npt.NDArray[np.bool_]:
        """Way two: answers between marks in one rendering; a token is learnt if its characters lie within."""
        for inner in (False, True):  # marks around what the template strips would keep it
            marked = self._render(chat, [_mark(message, inner) for message in messages])
            if marked.replace(BEGIN, "").replace(END, "") == text:
                break
        else:
            raise BadChat(
                "marks change the text", f"{chat.name}: answers must be rendered as they are, got changes"
            )
        spans: list[Span] = []
        at = removed = 0
        answers = sum(message["role"] == "assistant" for message in messages)
        for _ in range(answers):
            begin, end = marked.find(BEGIN, at), marked.find(END, at)
            at = marked.find(self.end_of_turn, end) + len(self.end_of_turn)
            if not -1 < begin < end < at:
                raise BadChat(
                    "answer missing", f"{chat.name}: every answer and reasoning must be rendered, got fewer"
                )
            spans.append((begin - removed, at - removed - 2))
            removed += 2
        starts, stops = np.asarray(offsets, np.int64).reshape(-1, 2).T
        learn = np.zeros(len(offsets), bool)
        for begin, end in spans:
            learn |= (starts >= begin) & (stops <= end) & (stops > starts)
        return learn


def _mark(message: Message, inner: bool) -> Message:
    """BEGIN before the first of reasoning and content, END after the content (or its last character, if `inner`)."""
    if message["role"] != "assistant":
        return message
    marked = dict(message)
    core = message["content"].rstrip()
    marked["content"] = core + END + message["content"][len(core) :]
    first = "reasoning_content" if message.get("reasoning_content", "").strip() else "content"
    text = marked[first]
    lead = len(text) - len(text.lstrip()) if inner else 0
    marked[first] = text[:lead] + BEGIN + text[lead:]
    return marked


def encode_chats(
    files: Sequence[Path],
    encoder: ChatEncoder,
    max_tokens: int,
    *,
    truncation: Literal["drop", "cut"] = "drop",
    bad: Literal["error", "drop"] = "error",
) -> tuple[list[Sample], ChatLedger]:
    """All samples of `files` of at most `max_tokens` tokens, in order, and the ledger of what became of each chat.

    Raises: ValueError naming the chat (with bad="error"), the file or the option.
    """
    if max_tokens < 2:
        raise ValueError(f"chats: max_tokens must be at least 2, got {max_tokens}")
    for name, value, allowed in (
        ("truncation", truncation, ("drop", "cut")),
        ("bad", bad, ("error", "drop")),
    ):
        if value not in allowed:
            raise ValueError(f"chats: {name} must be one of {', '.join(allowed)}, got {value!r}")
    ledger, samples = ChatLedger(), []
    for chat in read_chats(files, ledger, bad):
        try:
            sample = encoder.encode(chat)
        except BadChat as problem:
            _drop(ledger, problem, bad)
            continue
        too_long = len(sample.ids) > max_tokens
        if too_long and truncation == "drop":
            ledger.dropped["too long"] += 1
            continue
        ids, learn = sample.ids[:max_tokens], sample.learn[:max_tokens]
        if not learn.any():
            ledger.dropped["nothing to learn"] += 1
            continue
        ledger.used += 1
        ledger.truncated += too_long
        ledger.tokens += len(ids)
        ledger.learnt += int(learn.sum())
        samples.append(replace(sample, ids=ids, learn=learn))
    return samples, ledger
