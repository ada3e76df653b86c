"""hebatron's models in EleutherAI's lm-evaluation-harness (the extra `eval`), under the name "hebatron".

    hebatron eval RUN --lm-eval TASK --include-path FOLDER
    python -m hebatron.evaluation.lm_eval_model --model hebatron --model_args path=RUN --tasks TASK  # as lm_eval
    lm_eval.simple_evaluate(HebatronLM("RUN"), tasks=["TASK"])

Everything is scored by this library's own functions (scoring.py, complete.py), in batches counted in tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

try:
    from lm_eval.api.model import LM
    from lm_eval.api.registry import register_model
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ImportError as error:
    raise ValueError("lm-eval: lm_eval must be installed, got none; pip install 'hebatron[eval]'") from error

from ..chat.chats import ChatEncoder
from ..chat.template import Message, open_template
from ..model import Hebatron
from ..tokenizer import Tokenizer
from ..verbs import open_model
from .complete import complete
from .evaluate import evaluating
from .scoring import empty_context, score_items

GENERATION = ("until", "max_gen_toks", "do_sample", "temperature", "top_k", "top_p")


@register_model("hebatron")
class HebatronLM(LM):
    """A run or model folder, or a model and its tokenizer that are open already.

    Args:
        path: the folder. model, tokenizer: instead of it.
        batch_tokens: of one forward.
        template: "nemotron3" or a Jinja file, for lm_eval's apply_chat_template; None: the model's own.
        batch_size, max_batch_size, device: lm_eval's command line gives them; batches are counted in tokens here, and
            a GPU is used if there is one.
    """

    def __init__(
        self,
        path: str | None = None,
        *,
        model: Hebatron | None = None,
        tokenizer: Tokenizer | None = None,
        batch_tokens: int = 8192,
        template: str | None = None,
        batch_size: object = None,
        max_batch_size: object = None,
        device: object = None,
    ) -> None:
        super().__init__()
        if path is not None and model is None and tokenizer is None:
            model, tokenizer, _ = open_model(Path(path))
        elif path is not None or model is None or tokenizer is None:
            raise ValueError(
                "lm-eval: either path, or model and tokenizer, must be given, got something else"
            )
        self.model, self.tokenizer = model, tokenizer
        self.batch_tokens, self._template = int(batch_tokens), template
        self._device = model.device
        # prompts that a chat template rendered spell control tokens and mean them; a task's own text never does
        self._special = False

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """(log-probability, whether greedy decoding would write it) of each (context, continuation)."""
        pairs = [request.args for request in requests]
        scored = score_items(
            self.model,
            self.tokenizer,
            [(context, [continuation]) for context, continuation in pairs],
            batch_tokens=self.batch_tokens,
            special=self._special,
        )
        results = [(row[0].log_prob, row[0].greedy) for row in scored]
        for pair, result in zip(pairs, results, strict=True):
            self.cache_hook.add_partial("loglikelihood", pair, result)
        return results

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-probability of whole texts: windows as lm_eval cuts them, each token scored once."""
        results = []
        for request in requests:
            ids = self.tokenizer.encode(request.args[0])
            windows = get_rolling_token_windows(
                token_list=ids,
                prefix_token=empty_context(self.tokenizer),
                max_seq_len=self.model.config.max_position_embeddings,
                context_len=1,
            )
            results.append(sum(self._window(*make_disjoint_window(window)) for window in windows))
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, results[-1])
        return results

    def _window(self, context: list[int], targets: list[int]) -> float:
        """Log-probability of `targets`, without building logits: a window may be as long as the model's context."""
        device = self.model.device
        ids = torch.tensor([[*context, *targets][:-1]], device=device)
        labels = torch.full_like(ids, -100)
        labels[0, -len(targets) :] = torch.tensor(targets, device=device)
        with evaluating(self.model):
            loss = self.model(ids, labels=labels, loss_reduction="sum").loss
        return -float(loss)

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Each context's continuation up to one of its `until` texts."""
        groups: dict[str, list[int]] = {}
        for i, request in enumerate(requests):
            groups.setdefault(repr(sorted(request.args[1].items())), []).append(i)
        results = [""] * len(requests)
        # a chat's answer ends with its turn, whether or not the config counts that token among its own ends
        end = self.tokenizer.token_id(self._chat.end_of_turn) if self._special else None
        for group in groups.values():
            options = _options(requests[group[0]].args[1])
            written = complete(
                self.model,
                self.tokenizer,
                [requests[i].args[0] for i in group],
                special=self._special,
                ends=[] if end is None else [end],
                batch_tokens=self.batch_tokens,
                **options,
            )
            for i, one in zip(group, written, strict=True):
                results[i] = one.text
                self.cache_hook.add_partial("generate_until", requests[i].args, one.text)
        return results

    # ---- chats

    @property
    def tokenizer_name(self) -> str:
        return self.tokenizer.fingerprint

    def chat_template(self, chat_template: bool | str = False) -> str:
        """The template's text, which lm_eval writes into its results."""
        return self._chat.template.text if chat_template else ""

    def apply_chat_template(self, chat_history: list[Message], add_generation_prompt: bool = True) -> str:
        self._special = True
        return self._chat.template.render(chat_history, generation=add_generation_prompt, thinking=False)

    @cached_property
    def _chat(self) -> ChatEncoder:
        return ChatEncoder(self.tokenizer, open_template(self._template, self.tokenizer))


def _options(given: dict[str, Any]) -> dict[str, Any]:
    """lm_eval's generation arguments as `complete` takes them."""
    unknown = sorted(set(given) - set(GENERATION))
    if unknown:
        raise ValueError(
            f"lm-eval: generation_kwargs must be among {', '.join(GENERATION)}, got {', '.join(unknown)}"
        )
    until = given.get("until") or []
    temperature = float(given.get("temperature") or 0.0) if given.get("do_sample", True) else 0.0
    return {
        "stop": [text for text in ([until] if isinstance(until, str) else until) if text],
        "max_new_tokens": int(given.get("max_gen_toks", 256)),
        "temperature": temperature,
        "top_k": given.get("top_k"),
        "top_p": given.get("top_p"),
    }


def evaluate(
    model: Hebatron,
    tokenizer: Tokenizer,
    tasks: Sequence[str],
    *,
    include_path: Path | None = None,
    shots: int | None = None,
    limit: int | None = None,
    seed: int = 0,
    template: str | None = None,
    chat: bool = False,
) -> tuple[str, dict[str, Any]]:
    """lm_eval's table and its results for the named tasks; include_path: a folder of task files of one's own."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager
    from lm_eval.utils import make_table

    found = simple_evaluate(
        HebatronLM(model=model, tokenizer=tokenizer, template=template),
        tasks=list(tasks),
        num_fewshot=shots,
        limit=limit,
        task_manager=TaskManager(include_path=None if include_path is None else str(include_path)),
        apply_chat_template=chat or template is not None,
        fewshot_random_seed=seed,
        log_samples=False,
    )
    return make_table(found), found["results"]


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
