"""A model's scores in tasks: worked examples shown, choices compared or answers written, figures with their errors.

for file in find_tasks([Path("tasks")]):
    result = run_task(model, tokenizer, file, shots=5, limit=100)
    print(file.name, result.headline)
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any

from ..chat.chats import ChatEncoder
from ..chat.template import ChatTemplate, Message
from ..model import Hebatron
from ..tokenizer import Tokenizer
from .answers import METRICS
from .complete import complete
from .scoring import Estimate, Item, estimate, multiple_choice
from .task_table import Task
from .tasks import Example, TaskFile, read_examples


@dataclass(frozen=True)
class TaskResult:
    """items, shots: how many, of each. metrics: mean and standard error. metric: the one for the mean over tasks.

    chance: of guessing; None where answers are written. cut: prompts that lost their beginning, being too long for
    the model. predictions: for each item its name, and scores or text.
    """

    items: int
    shots: int
    seed: int
    metric: str
    metrics: dict[str, Estimate]
    chance: float | None
    cut: int
    predictions: list[dict[str, Any]]

    @property
    def headline(self) -> Estimate:
        return self.metrics[self.metric]

    def table(self) -> dict[str, Any]:
        """As JSON holds it."""
        return asdict(self) | {"metrics": {name: one._asdict() for name, one in self.metrics.items()}}


class Prompter:
    """Examples as text: plain, or as turns of a chat."""

    def __init__(self, task: Task, tokenizer: Tokenizer, template: ChatTemplate | None = None) -> None:
        self.task = task
        self.encoder = None if template is None else ChatEncoder(tokenizer, template)
        end = None if self.encoder is None else tokenizer.token_id(self.encoder.end_of_turn)
        self.ends = [] if end is None else [end]  # tokens that end an answer, beside the model's own

    def write(self, example: Example, shown: Sequence[Example]) -> str:
        """The prompt for `example` behind worked examples."""
        if self.encoder is None:
            worked = [shot.prompt + self.behind(shot.prompt, shot.right) for shot in shown]
            header = [self.task.header] if self.task.header else []
            return "\n\n".join([*header, *worked, example.prompt])
        turns = [
            (role, text)
            for shot in shown
            for role, text in (("user", shot.prompt), ("assistant", shot.right))
        ]
        if self.task.header:
            turns.insert(0, ("system", self.task.header))
        messages: list[Message] = [
            {"role": role, "content": text} for role, text in (*turns, ("user", example.prompt))
        ]
        checked = self.encoder.refuse_control(messages, example.name)
        return self.encoder.template.render(checked, generation=True, thinking=False)

    def behind(self, prompt: str, answer: str) -> str:
        """`answer` as it follows `prompt`: one space between them, unless there is white space or a chat."""
        apart = self.encoder is not None or prompt[-1:].isspace() or answer[:1].isspace()
        return answer if apart else f" {answer}"


def choose_shots(
    examples: Sequence[Example], pool: Sequence[Example], shots: int, seed: int
) -> Iterator[list[Example]]:
    """Each example's worked examples: the first `shots` of the pool, in an order drawn from `seed`, that are not it."""
    order = random.Random(seed).sample(list(pool), len(pool))
    for example in examples:
        shown = list(islice((other for other in order if not other.same_as(example)), shots))
        if len(shown) < shots:
            raise ValueError(
                f"tasks: shots must be at most the other examples there are ({len(shown)}) for {example.name}, "
                f"got {shots}"
            )
        yield shown


def run_task(
    model: Hebatron,
    tokenizer: Tokenizer,
    file: TaskFile,
    *,
    shots: int | None = None,
    limit: int | None = None,
    seed: int = 0,
    template: ChatTemplate | None = None,
    batch_tokens: int = 8192,
) -> TaskResult:
    """Scores of one task file.

    Args:
        shots: worked examples before each question; None: as many as the task's own setting.
        limit: the first so many records are asked; the others can still be worked examples. None: all.
        seed: of the choice of worked examples.
        template: ask through this chat template, worked examples being earlier turns.
        batch_tokens: of one forward.
    Raises: ValueError for a bad record, or fewer other examples than shots.
    """
    shots = file.task.shots if shots is None else shots
    if shots < 0:
        raise ValueError(f"tasks: shots must be >= 0, got {shots}")
    if limit is not None and limit < 1:
        raise ValueError(f"tasks: limit must be >= 1, got {limit}")
    records = read_examples(file.path, file.task)
    pool = read_examples(file.shots, file.task) if file.shots else records
    examples = records[:limit]
    prompter = Prompter(file.task, tokenizer, template)
    prompts = [
        prompter.write(example, shown)
        for example, shown in zip(examples, choose_shots(examples, pool, shots, seed), strict=True)
    ]
    ask = _choose if file.task.kind == "choice" else _write
    asked = ask(model, tokenizer, prompter, examples, prompts, batch_tokens)
    return TaskResult(len(examples), shots, seed, file.task.metrics[0], *asked)


_Asked = tuple[dict[str, Estimate], float | None, int, list[dict[str, Any]]]


def _choose(
    model: Hebatron,
    tokenizer: Tokenizer,
    prompter: Prompter,
    examples: Sequence[Example],
    prompts: Sequence[str],
    batch_tokens: int,
) -> _Asked:
    items = [
        Item(prompt, [prompter.behind(prompt, choice) for choice in example.choices], example.gold)
        for prompt, example in zip(prompts, examples, strict=True)
    ]
    special = prompter.encoder is not None
    result = multiple_choice(model, tokenizer, items, batch_tokens=batch_tokens, special=special)
    predictions = [
        {"name": example.name, "gold": example.gold, "log_probs": [one.log_prob for one in row]}
        for example, row in zip(examples, result.scores, strict=True)
    ]
    return result.accuracy, result.chance, result.cut, predictions


def _write(
    model: Hebatron,
    tokenizer: Tokenizer,
    prompter: Prompter,
    examples: Sequence[Example],
    prompts: Sequence[str],
    batch_tokens: int,
) -> _Asked:
    task, chat = prompter.task, prompter.encoder is not None
    written = complete(
        model,
        tokenizer,
        prompts,
        max_new_tokens=task.max_new_tokens,
        stop=() if chat else task.stop,  # an answer in a chat may have several lines, and ends with its turn
        ends=prompter.ends,
        special=chat,
        batch_tokens=batch_tokens,
    )
    predictions: list[dict[str, Any]] = []
    for example, one in zip(examples, written, strict=True):
        scores = {name: METRICS[name](one.text, example.answers) for name in task.metrics}
        predictions.append({"name": example.name, "text": one.text, "ended": one.ended, **scores})
    metrics = {name: estimate([prediction[name] for prediction in predictions]) for name in task.metrics}
    return metrics, None, sum(one.cut for one in written), predictions


def mean_of(results: Sequence[TaskResult]) -> float:
    """The unweighted mean over tasks of each one's headline."""
    return sum(result.headline.value for result in results) / len(results)
