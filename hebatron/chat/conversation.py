"""A conversation with a model, answers as they are written; what was said stays in the cache from turn to turn."""

from __future__ import annotations

from collections.abc import Generator

import torch

from ..decoder import one_more_token
from ..evaluation.complete import TextStream
from ..generate import check_sampling, choose, last_logits
from ..model import Hebatron
from ..tokenizer import Tokenizer
from .chats import ChatEncoder
from .template import ChatTemplate, Message

THINK = (
    "<think>\n"  # what the hub's form opens an answer with, to be gone on from, where it asks for reasoning
)


class Conversation:
    """Turns of user and model.

    Attributes:
        messages: what was said, an answer that was stopped included.
        cut: whether the last answer ended because it reached max_new_tokens or the model's context.
    """

    def __init__(
        self,
        model: Hebatron,
        tokenizer: Tokenizer,
        template: ChatTemplate,
        *,
        system: str | None = None,
        thinking: bool = False,
        max_new_tokens: int = 1024,
        temperature: float = 0.7,
        top_k: int | None = None,
        top_p: float | None = 0.9,
        seed: int = 0,
    ) -> None:
        """temperature and top_p: those the Hebatron model card serves with.

        Raises: ValueError for arguments out of range, or a system text that spells a control token.
        """
        self._sampling = (temperature, top_k, top_p)
        check_sampling(model.config.vocab_size, max_new_tokens, *self._sampling)
        self.model, self.tokenizer = model, tokenizer
        self.thinking, self.max_new_tokens = thinking, max_new_tokens
        self._encoder = ChatEncoder(tokenizer, template)
        self._end = tokenizer.token_id(self._encoder.end_of_turn)
        self._generator = torch.Generator().manual_seed(seed)
        self._first = [] if system is None else [{"role": "system", "content": system}]
        self._encoder.refuse_control(self._first, "chat")
        self.reset()

    def reset(self) -> None:
        """Forget what was said, but for the system text."""
        self.messages: list[Message] = list(self._first)
        self.cut = False
        self._forget()

    def _forget(self) -> None:
        self._cache = self.model.new_cache(1)
        self._decode = one_more_token(self.model, self._cache)
        # what the model has been given or wrote; the cache holds the first of these tokens, and never others
        self._ids: list[int] = []
        self._text = ""

    def ask(self, text: str) -> Generator[str, None, None]:
        """The answer to `text`, piece by piece, each of whole characters. Closed early, or interrupted, what was
        written so far is the answer.

        Raises: ValueError for a text that spells a control token, or when the context is full; nothing was said then.
        """
        self._encoder.refuse_control([{"role": "user", "content": text}], "chat")
        messages = [*self.messages, {"role": "user", "content": text}]
        prompt = self._encoder.template.render(
            messages, generation=True, thinking=self.thinking, keep_reasoning=True
        )
        self._say(prompt)
        self.messages, answer = messages, list[int]()
        stream = TextStream(self.tokenizer, skip_special=False)
        ended = False
        try:
            while not ended and len(answer) < self.max_new_tokens and self._room() > 0:
                token = self._next()
                ended = token == self._end or token in self.model.config.eos_token_ids
                if ended and token != self._end:
                    break  # the template closes the turn with its own token
                self._ids.append(token)
                if not ended:
                    answer.append(token)
                    yield stream.add(token)
            yield stream.finish()
        except (Exception, KeyboardInterrupt):
            self._forget()  # a step may have died half way, and its cache with it
            raise
        finally:
            content = self.tokenizer.decode(answer, skip_special=False)
            if self._ids:
                self._text = (
                    prompt + content + (self._encoder.end_of_turn if self._ids[-1] == self._end else "")
                )
            opened = THINK if prompt.endswith(THINK) else ""
            self.messages = [*messages, {"role": "assistant", "content": opened + content}]
            self.cut = not ended

    def _say(self, prompt: str) -> None:
        """Bring the tokens up to `prompt`. Its new part alone is encoded, and later fed: what the model wrote stays
        the tokens that it chose, whatever their text would be encoded to.

        Where the rendering does not go on from what was said, the whole of it is given anew: a template that knows
        nothing of truncate_history_thinking leaves earlier reasoning out, and most trim an answer's white space.
        """
        before = (self._cache, self._decode, self._ids, self._text)
        if not prompt.startswith(self._text):
            self._forget()
        self._ids = self._ids + self.tokenizer.encode(prompt[len(self._text) :], special=True)
        self._text = prompt
        if self._room() < 1:
            self._cache, self._decode, self._ids, self._text = before
            limit = self.model.config.max_position_embeddings
            raise ValueError(
                f"chat: a conversation must stay below max_position_embeddings ({limit}) tokens, got more; /reset"
            )

    def _room(self) -> int:
        return self.model.config.max_position_embeddings - len(self._ids)

    def _next(self) -> int:
        """Feed what the cache does not hold yet, and choose the token behind it."""
        new = torch.tensor(self._ids[self._cache.lengths[0] :], device=self.model.device)
        if len(new) == 1:
            logits = self._decode(new)
        else:
            logits = self.model(new[None], cache=self._cache, logits_to_keep=1).logits
        return int(choose(last_logits(logits), *self._sampling, [self._generator]))
