"""`hebatron eval`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hebatron.verbs import Arguments, VerbGroup, add_verb, open_model, seed

if TYPE_CHECKING:
    from hebatron.evaluation.benchmark import TaskResult
    from hebatron.evaluation.scoring import Estimate
    from hebatron.evaluation.tasks import TaskFile
    from hebatron.model import Hebatron
    from hebatron.tokenizer import Tokenizer


def register(group: VerbGroup) -> None:
    evaluate = add_verb(group, "eval", run, "bits per byte of corpora, by source; accuracy in tasks")
    evaluate.add_argument("model", metavar="RUN|MODEL", type=Path, help="a run or model folder")
    evaluate.add_argument("corpora", metavar="CORPUS", nargs="*", type=Path, help="a prepared corpus")
    evaluate.add_argument("--max-tokens", type=int, help="at most this many tokens of each source")
    evaluate.add_argument(
        "--tasks",
        metavar="PATH",
        nargs="+",
        type=Path,
        default=[],
        help=".jsonl files named by task, or folders",
    )
    evaluate.add_argument("--task", metavar="NAME", help="all files are of this task, whatever their names")
    evaluate.add_argument(
        "--lm-eval", metavar="TASK", nargs="+", default=[], help="lm-evaluation-harness's tasks"
    )
    evaluate.add_argument("--include-path", type=Path, help="a folder of task files for --lm-eval")
    evaluate.add_argument("--shots", type=int, help="worked examples; default: each task's own setting")
    evaluate.add_argument("--limit", type=int, help="the first so many records of each file")
    evaluate.add_argument("--seed", type=seed, help="of the choice of worked examples (default 0)")
    evaluate.add_argument("--chat", action="store_true", help="ask through the model's chat template")
    evaluate.add_argument("--template", metavar="NAME|FILE", help="ask through this one: nemotron3, or Jinja")
    evaluate.add_argument("--out", type=Path, help="figures and predictions as JSON")


def run(arguments: Arguments) -> int:
    from hebatron.evaluation.tasks import find_tasks
    from hebatron.files import check_writable, replace_text

    if not (arguments.corpora or arguments.tasks or arguments.lm_eval):
        raise ValueError("eval: a CORPUS, --tasks or --lm-eval must be given, got none")
    _refuse_unread(arguments)
    if arguments.out is not None:
        check_writable(arguments.out, "eval: --out")
    if arguments.lm_eval:
        from hebatron.evaluation import lm_eval_model as lm_eval_model  # says now if lm_eval is missing
    files = find_tasks(arguments.tasks, arguments.task)
    model, tokenizer, _ = open_model(arguments.model)
    found: dict[str, Any] = {"model": str(arguments.model)}
    if arguments.corpora:
        found["bits_per_byte"] = _corpora(arguments, model, tokenizer)
    if files:
        found |= _tasks(arguments, model, tokenizer, files)
    if arguments.lm_eval:
        found["lm_eval"] = _lm_eval(arguments, model, tokenizer)
    if arguments.out is not None:
        replace_text(arguments.out, json.dumps(found, ensure_ascii=False, indent=1) + "\n")
    return 0


def _refuse_unread(arguments: Arguments) -> None:
    """Raises where an option is given that nothing asked for would read."""
    asked = {
        "a CORPUS": (arguments.corpora, ("max_tokens",)),
        "--tasks": (arguments.tasks, ("task",)),
        "--lm-eval": (arguments.lm_eval, ("include_path",)),
        "--tasks or --lm-eval": (
            arguments.tasks or arguments.lm_eval,
            ("shots", "limit", "seed", "chat", "template"),
        ),
    }
    for needed, (given, names) in asked.items():
        for name in names:
            value = getattr(arguments, name)
            if not given and value is not None and value is not False:
                option = f"--{name.replace('_', '-')}"
                raise ValueError(f"eval: {needed} must be given with {option}, got none")


def _corpora(arguments: Arguments, model: Hebatron, tokenizer: Tokenizer) -> dict[str, dict[str, float]]:
    from hebatron.data.prepare import Corpus
    from hebatron.evaluation.evaluate import bits_per_byte
    from hebatron.training.metrics import printable_name

    found = {}
    for folder in arguments.corpora:
        corpus = Corpus.open(folder, tokenizer)
        found[str(folder)] = bits_per_byte(model, corpus, max_tokens=arguments.max_tokens)
        for source, value in found[str(folder)].items():
            print(f"{value:8.4f} bits per byte  {folder}  {printable_name(source)}")
    return found


def _tasks(
    arguments: Arguments, model: Hebatron, tokenizer: Tokenizer, files: list[TaskFile]
) -> dict[str, Any]:
    from hebatron.chat.template import open_template
    from hebatron.evaluation.benchmark import mean_of, run_task
    from hebatron.files import file_sha256

    chat, seed = arguments.chat or arguments.template is not None, arguments.seed or 0
    template = open_template(arguments.template, tokenizer) if chat else None
    options = {
        "shots": arguments.shots,
        "limit": arguments.limit,
        "seed": seed,
        "template": template,
    }
    results = {}
    for file in files:
        results[file.name] = run_task(model, tokenizer, file, **options)
        print(line(file.name, results[file.name]), flush=True)
    mean = mean_of(list(results.values()))
    print(f"{mean:8.4f} mean of {len(results)} tasks, worked examples by seed {seed}")
    tables = {
        file.name: {"file": str(file.path), "sha256": file_sha256(file.path), **results[file.name].table()}
        for file in files
    }
    return {"mean": mean, "seed": seed, "chat": chat, "tasks": tables}


def _lm_eval(arguments: Arguments, model: Hebatron, tokenizer: Tokenizer) -> dict[str, Any]:
    from hebatron.evaluation import lm_eval_model

    table, results = lm_eval_model.evaluate(
        model,
        tokenizer,
        arguments.lm_eval,
        include_path=arguments.include_path,
        shots=arguments.shots,
        limit=arguments.limit,
        seed=arguments.seed or 0,
        template=arguments.template,
        chat=arguments.chat,
    )
    print(table)
    return results


def line(name: str, result: TaskResult) -> str:
    """The headline with its error first, then the other figures."""
    chance = "" if result.chance is None else f" (chance {result.chance:.4f})"
    others = "".join(f"  {m} {_figure(e)}" for m, e in result.metrics.items() if m != result.metric)
    cut = f"  {result.cut} prompts cut" if result.cut else ""
    shown = f"{result.items} items, {result.shots} shots"
    return f"{_figure(result.headline):>16} {result.metric}{chance}  {name}  {shown}{others}{cut}"


def _figure(estimate: Estimate) -> str:
    error = "" if estimate.stderr is None else f" ±{estimate.stderr:.4f}"
    return f"{estimate.value:.4f}{error}"
