"""`hebatron plan`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from hebatron.verbs import OVERRIDES, Arguments, VerbGroup, add_verb

if TYPE_CHECKING:
    from hebatron.chat.chat_data import ChatData
    from hebatron.curriculum.plan import Plan
    from hebatron.training.sections import RunConfig


def register(group: VerbGroup) -> None:
    plan = add_verb(group, "plan", run, "what a run file will read: phases, sources, steps, time and hashes")
    plan.add_argument("run_file", metavar="RUN.toml", type=Path)
    plan.add_argument("--tokens-per-s", type=float, help="speed for the time; default: the run's own metrics")
    plan.epilog = OVERRIDES
    plan.set_defaults(takes_overrides=True)


def run(arguments: Arguments) -> int:
    from hebatron.training.inputs import check_inputs
    from hebatron.training.metrics import printable_name
    from hebatron.training.run import open_plan, open_run_chats
    from hebatron.training.runconfig import load_run_config

    speed = arguments.tokens_per_s
    if speed is not None and not 0 < speed < float("inf"):
        raise ValueError(f"plan: --tokens-per-s must be above 0 and finite, got {speed}")
    config = load_run_config(arguments.run_file, arguments.overrides)
    check_inputs(config, arguments.run_file)
    if speed is None:
        speed = measured_speed(config.run_dir)
    if config.sft is None:
        lines = describe(config, open_plan(config)[0], speed)
    else:
        lines = describe_chats(config, open_run_chats(config)[0], speed)
    print("\n".join(printable_name(line) for line in lines))
    return 0


def measured_speed(run_dir: Path) -> float | None:
    """Median tokens per second of the run's steps so far, if there are any."""
    import statistics

    from hebatron.training.metrics import METRICS, read_metrics

    if not (run_dir / METRICS).is_file():
        return None
    speeds = [record["time"]["tokens_per_s"] for record in read_metrics(run_dir) if record["kind"] == "step"]
    return statistics.median(speeds) if speeds else None


def describe(config: RunConfig, plan: Plan, tokens_per_s: float | None) -> list[str]:
    """The lines that `hebatron plan` prints."""
    from collections import Counter

    from hebatron.training.metrics import duration
    from hebatron.training.optim import step_learning_rate

    def took(tokens: int) -> str:
        return "-" if tokens_per_s is None else duration(tokens / tokens_per_s)

    steps, told = plan.steps(config.training.tokens_per_batch), plan.describe()
    by_phase = Counter(step.phase for step in steps)
    lines = [
        f"{'phase':<14}{'tokens':>14}{'share':>8}{'anchor':>8}{'documents':>11}{'row':>7}{'steps':>8}{'time':>10}"
    ]
    for phase in told["phases"]:
        lines.append(
            f"{phase['name']:<14}{phase['tokens']:>14,}{phase['tokens'] / told['tokens']:>8.1%}"
            f"{phase['anchor_share']:>8.2%}{phase['documents']:>11,}{phase['seq_len']:>7,}"
            f"{by_phase[phase['name']]:>8,}{took(phase['tokens']):>10}"
        )
    lines.append(f"{'all':<14}{told['tokens']:>14,}{'':>34}{len(steps):>8,}{took(told['tokens']):>10}")
    lines += ["", f"{'source':<30}{'tokens':>14}{'share':>8}{'documents':>11}{'times read':>12}"]
    for source in told["sources"]:
        name = f"{source['name']} (anchor)" if source["anchor"] else source["name"]
        lines.append(
            f"{name:<30}{source['tokens']:>14,}{source['tokens'] / told['tokens']:>8.1%}"
            f"{source['documents']:>11,}{source['epochs']:>12.2f}"
        )
    lines += ["", f"{'position':<14}{'batch tokens':>14}{'steps':>8}{'learning rate, first and last':>34}"]
    stages: dict[tuple[int, int], list[int]] = {}
    for step in steps:
        stages.setdefault((step.position, step.batch_tokens), []).append(step.index)
    for (position, batch), inside in stages.items():
        rates = [step_learning_rate(config, steps, index) for index in (inside[0], inside[-1])]
        name = config.phases[position].name
        lines.append(f"{name:<14}{batch:>14,}{len(inside):>8,}{rates[0]:>23.3e}{rates[1]:>11.3e}")
    lines += ["", f"order {_order(told['order'])}"]
    lines += [f"{name:<7} {told[key]}" for name, key in HASHES.items()]
    if tokens_per_s is None:
        lines.append("time: give --tokens-per-s, or train some steps first")
    else:
        lines.append(f"time at {tokens_per_s:,.0f} tokens/s, evaluation and checkpoints not counted")
    return lines


def describe_chats(config: RunConfig, chats: ChatData, tokens_per_s: float | None) -> list[str]:
    """The lines for a run over chats: the account of them, what the rows hold, steps, rates and time."""
    from hebatron.training.metrics import duration
    from hebatron.training.optim import step_learning_rate

    rows = chats.rows
    steps = rows.steps(config.training.tokens_per_batch)
    rates = [step_learning_rate(config, steps, index) for index in (0, len(steps) - 1)]
    time = "give --tokens-per-s, or train some steps first"
    if tokens_per_s is not None:
        took = duration(rows.num_tokens / tokens_per_s)
        time = f"{took} at {tokens_per_s:,.0f} tokens/s, evaluation and checkpoints not counted"
    return [
        *chats.lines(),
        f"steps: {len(steps):,} of up to {config.training.tokens_per_batch:,} tokens, "
        f"learning rate {rates[0]:.3e} first, {rates[1]:.3e} last",
        f"plan {rows.hash}",
        f"time: {time}",
    ]


HASHES = {
    "plan": "hash",
    "rows": "rows_hash",
    "anchor": "anchor_hash",
}  # rows and anchor: equal in every order


def _order(order: Any) -> str:
    return order if isinstance(order, str) else ", ".join(order)
