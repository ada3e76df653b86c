"""`hebatron data score`."""

from __future__ import annotations

import itertools
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hebatron.verbs import Arguments, VerbGroup, add_verb, open_model

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt


def register(group: VerbGroup) -> None:
    score = add_verb(group, "score", run, "measure how hard each document is; data split makes phases of it")
    score.add_argument("corpus", metavar="CORPUS", type=Path)
    score.add_argument("--tokenizer", type=Path, help="the corpus's tokenizer; not needed with --model")
    score.add_argument(
        "--model", type=Path, metavar="RUN|MODEL", help="adds this model's bits a character to the measures"
    )
    score.add_argument(
        "--model-tokens", type=int, metavar="N", help="let the model read at most N tokens of each document"
    )
    score.add_argument(
        "--weight",
        action="append",
        default=[],
        metavar="MEASURE=W",
        help="weight of a measure in the score (default 1 each); may be given again",
    )
    score.add_argument("--phases", type=int, default=3, help="print the split into this many equal shares")
    score.add_argument("--plot", type=Path, metavar="PNG", help="draw every measure by source")


def run(arguments: Arguments) -> int:
    from hebatron.data.corpus import Corpus, write_scores
    from hebatron.data.difficulty import METHOD, measure, score_weights, split_phases
    from hebatron.data.model_bits import kept_file
    from hebatron.files import check_writable
    from hebatron.tokenizer import load_tokenizer

    if arguments.phases < 1:
        raise ValueError(f"data score: --phases must be at least 1, got {arguments.phases}")
    if arguments.model is None and (arguments.tokenizer is None or arguments.model_tokens is not None):
        missing = "--model" if arguments.model_tokens is not None else "--tokenizer or --model"
        raise ValueError(f"data score: {missing} must be given, got neither")
    if arguments.plot is not None:
        check_writable(arguments.plot, "data score: --plot")
    weights = _weights(arguments.weight)
    model = None
    if arguments.model is not None:
        model, tokenizer, _ = open_model(arguments.model)
        Corpus.open(arguments.corpus, tokenizer, verify=False)  # the model's must be the corpus's
    if arguments.tokenizer is not None:
        tokenizer = load_tokenizer(arguments.tokenizer)
    corpus = Corpus.open(arguments.corpus, tokenizer)
    limit = arguments.model_tokens
    kept = None if model is None else kept_file(arguments.corpus, corpus, model, limit)
    report = Progress(corpus.lengths, limit)
    columns = measure(corpus, tokenizer, model, weights=weights, model_tokens=limit, kept=kept, report=report)
    names = [name for name in columns if name != "difficulty"]
    method: dict[str, Any] = {"name": METHOD, "weights": score_weights(names, weights)}
    if model is not None:
        method |= {"model": arguments.model.name, "model_tokens": limit}
    write_scores(arguments.corpus, columns, method)
    if kept is not None:
        kept.unlink(missing_ok=True)
    phases = split_phases(columns["difficulty"], corpus.lengths, [1.0] * arguments.phases)
    for phase in range(arguments.phases):
        inside = phases == phase
        means = "  ".join(f"{name} {columns[name][inside].mean():.3f}" for name in columns if inside.any())
        print(
            f"phase {phase + 1}: {inside.sum():,} documents {corpus.lengths[inside].sum():,} tokens  {means}"
        )
    if arguments.plot is not None:
        from hebatron.data.difficulty_figure import plot_difficulty

        print(plot_difficulty(Corpus.open(arguments.corpus, verify=False), arguments.plot, arguments.phases))
    return 0


class Progress:
    """How far a model has read, as lines on stderr: at the start, every EVERY seconds and at the end."""

    EVERY = 10.0

    def __init__(self, lengths: npt.NDArray[np.int64], most: int | None) -> None:
        self.ends = [0, *itertools.accumulate(min(int(n), most or int(n)) for n in lengths)]
        self.first: tuple[float, int] | None = None  # when it began, and after how many tokens
        self.told = 0.0

    def __call__(self, documents: int) -> None:
        from hebatron.training.metrics import duration

        now, tokens, total = time.monotonic(), self.ends[documents], self.ends[-1]
        line = f"model: {documents:,} of {len(self.ends) - 1:,} documents read ({tokens / max(total, 1):.0%})"
        if self.first is None:
            self.first = now, tokens
            line += "; a stop loses nothing, the same command goes on"
        elif now - self.told < self.EVERY and tokens < total:
            return
        else:
            speed = (tokens - self.first[1]) / (now - self.first[0])
            line += f", {speed:,.0f} tokens/s, {duration((total - tokens) / max(speed, 1e-9))} to go"
        self.told = now
        print(line, file=sys.stderr, flush=True)


def _weights(given: list[str]) -> dict[str, float]:
    weights: dict[str, float] = {}
    for text in given:
        name, _, value = text.partition("=")
        try:
            weights[name] = float(value)
        except ValueError:
            raise ValueError(f"data score: --weight must be MEASURE=NUMBER, got {text!r}") from None
    return weights
