"""Chat templates: Jinja text, rendered in a sandbox and never executed otherwise.

    template = ChatTemplate(tokenizer.chat_template or NEMOTRON3)
    text = template.render(messages, generation=True, thinking=False)

A template comes with a checkpoint, so it is a stranger's program. It sees plain data only; attributes that lead to
the interpreter are refused by jinja2's immutable sandbox, and what it may do and make is bounded (sandbox.py).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .sandbox import MAX_TEMPLATE_CHARS, Budget, sandbox

if TYPE_CHECKING:
    from ..tokenizer import Tokenizer

Message = dict[str, Any]

MAX_CHARS = 1 << 22  # of a rendering: some 1 M tokens
# what a filter or method says to a value that it does not take
OF_VALUES = (ArithmeticError, AttributeError, LookupError, TypeError, ValueError)

# The Nemotron-3 form: a system turn that is there even when empty; an assistant turn that begins with its reasoning
# between <think> tags, empty if there is none; reasoning before the last user turn left out unless
# truncate_history_thinking is false; tool calls as tagged text and their answers in a user turn. A list of `tools`
# is refused: the wording that introduces it belongs to the checkpoint's own template.
NEMOTRON3 = r"""
{%- if tools %}{{ raise_exception("tools need the checkpoint's own chat template") }}{% endif %}
{%- set forget = truncate_history_thinking | default(true) %}
{%- set seen = namespace(last_user=-1) %}
{%- for message in messages %}
    {%- if message.role == "user" %}{% set seen.last_user = loop.index0 %}{% endif %}
{%- endfor %}
{%- set first_is_system = messages[0].role == "system" %}
{{- "<|im_start|>system\n" ~ (messages[0].content if first_is_system else "") ~ "<|im_end|>\n" }}
{%- for message in messages %}
    {%- if first_is_system and loop.first %}
    {%- elif message.role == "assistant" %}
        {%- set past = forget and loop.index0 < seen.last_user %}
        {%- set text = message.content or "" %}
        {%- if message.reasoning_content and message.reasoning_content | trim %}
            {%- set text = "<think>\n" ~ message.reasoning_content ~ "\n</think>\n" ~ text %}
        {%- elif "<think>" not in text and "</think>" not in text %}
            {%- set text = "<think></think>" ~ text %}
        {%- endif %}
        {%- if past and message.tool_calls %}
            {%- set rest = text.split("</think>")[-1] if "</think>" in text else text.split("<think>")[0] %}
            {%- set text = "<think></think>" ~ (rest | trim) %}
        {%- elif past and "<think>" in text and "</think>" in text %}
            {%- set text = "<think></think>" ~ text.split("</think>")[-1] %}
        {%- endif %}
        {{- "<|im_start|>assistant\n" ~ (text | trim) }}
        {%- if message.tool_calls %}
            {{- "\n" }}
            {%- for call in message.tool_calls %}
                {%- set call = call.function or call %}
                {{- "<tool_call>\n<function=" ~ call.name ~ ">\n" }}
                {%- for name, value in (call.arguments or {}) | items %}
                    {%- set plain = value is string or not (value is mapping or value is sequence) %}
                    {{- "<parameter=" ~ name ~ ">\n" ~ (value if plain else value | tojson) ~ "\n</parameter>\n" }}
                {%- endfor %}
                {{- "</function>\n</tool_call>\n" }}
            {%- endfor %}
        {%- endif %}
        {{- "<|im_end|>\n" }}
    {%- elif message.role == "tool" %}
        {%- if loop.previtem and loop.previtem.role != "tool" %}{{ "<|im_start|>user\n" }}{% endif %}
        {{- "<tool_response>\n" ~ message.content ~ "\n</tool_response>\n" }}
        {%- if loop.last or loop.nextitem.role != "tool" %}{{ "<|im_end|>\n" }}{% endif %}
    {%- else %}
        {{- "<|im_start|>" ~ message.role ~ "\n" ~ message.content ~ "<|im_end|>\n" }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- "<|im_start|>assistant\n" ~ ("<think>\n" if enable_thinking | default(true) else "<think></think>") }}
{%- endif %}
"""


class TemplateError(ValueError):
    """A chat template is broken, refused the messages, or did what the sandbox forbids."""


class ChatTemplate:
    """One compiled template; `render` is a pure function of its arguments."""

    def __init__(self, text: str, bos_token: str = "", eos_token: str = "") -> None:
        """text: Jinja. bos_token, eos_token: what the template may write under these names.

        Raises: TemplateError for a template that does not compile; ValueError where jinja2 is not installed.
        """
        self.text = text
        self._tokens = {"bos_token": bos_token, "eos_token": eos_token}
        self._compiled, self._budget, self._error = _compile(text)

    @property
    def reads_reasoning(self) -> bool:
        """Whether a message's reasoning_content has a place of its own in it."""
        return "reasoning_content" in self.text

    def render(
        self,
        messages: Sequence[Message],
        *,
        generation: bool = False,
        thinking: bool = True,
        keep_reasoning: bool = False,
        tools: Sequence[dict[str, Any]] | None = None,
    ) -> str:
        """The messages as text.

        Args:
            generation: end with the opening of an assistant turn, for the model to go on from.
            thinking: that opening asks for reasoning first, where the template knows of it.
            keep_reasoning: earlier turns keep their reasoning (the hub's form leaves it out).
        Raises: TemplateError.
        """
        self._budget.reset()
        try:
            pieces, size = [], 0
            for piece in self._compiled.generate(
                messages=list(messages),
                tools=list(tools) if tools else None,
                add_generation_prompt=generation,
                enable_thinking=thinking,
                truncate_history_thinking=not keep_reasoning,
                **self._tokens,
            ):
                size += len(piece)
                if size > MAX_CHARS:
                    raise ValueError(f"a rendering must have at most {MAX_CHARS:,} characters, got more")
                pieces.append(piece)
            return "".join(pieces)
        except (self._error, *OF_VALUES, RecursionError) as error:
            raise TemplateError(
                f"chat template: messages must be what it can render, got {type(error).__name__}: {error}"
            ) from error


def _compile(text: str) -> tuple[Any, Budget, type[Exception]]:
    try:
        import jinja2
    except ImportError as error:
        raise ValueError(
            "chat template: jinja2 must be installed, got none; pip install 'hebatron[chat]'"
        ) from error
    if len(text) > MAX_TEMPLATE_CHARS:
        raise TemplateError(
            f"chat template: text must have at most {MAX_TEMPLATE_CHARS:,} characters, got {len(text):,}"
        )
    budget = Budget()
    try:
        return sandbox(budget).from_string(text), budget, jinja2.TemplateError
    except (jinja2.TemplateError, SyntaxError, ValueError, RecursionError) as error:  # some are Python's
        raise TemplateError(f"chat template: text must be a Jinja template, got {error}") from error


@functools.lru_cache(maxsize=8)
def end_of_turn(template: ChatTemplate, control_tokens: frozenset[str]) -> str:
    """The control token that ends an assistant turn: the first one behind an answer's text.

    Raises: TemplateError if there is none: then a model could not learn where to stop.
    """
    probe = "0451"  # no case to change, nothing to trim
    text = template.render([{"role": "user", "content": "?"}, {"role": "assistant", "content": probe}])
    tail = text[text.rindex(probe) + len(probe) :] if probe in text else ""
    places = sorted((tail.index(token), -len(token), token) for token in control_tokens if token in tail)
    if not places:
        raise TemplateError(
            f"chat template: an assistant turn must end with a control token of the tokenizer, got {tail!r} behind it; "
            "a tokenizer that `hebatron data prepare --train-tokenizer` makes has those of the hub's form"
        )
    return places[0][2]


def open_template(name: str | None, tokenizer: Tokenizer) -> ChatTemplate:
    """ "nemotron3", the hub's form; a file of Jinja text; None: the tokenizer's own.

    Raises: ValueError if there is none.
    """
    text = tokenizer.chat_template
    if name == "nemotron3":
        text = NEMOTRON3
    elif name is not None:
        if not Path(name).is_file():
            raise ValueError(f"chat template: template must be nemotron3 or a file, got {name!r}")
        text = Path(name).read_text(encoding="utf-8")
    if text is None:
        raise ValueError(
            "chat template: the model must have one, got none; give --template nemotron3 or a file"
        )
    bos, eos = (
        "" if i is None else tokenizer.decode([i], skip_special=False)
        for i in (tokenizer.bos_id, tokenizer.eos_id)
    )
    return ChatTemplate(text, bos_token=bos, eos_token=eos)
