"""AdamW, learning-rate schedules and gradient clipping: the pieces a training step is built from."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import nn

from ..curriculum.plan import Step
from .sections import OptimizerConfig, RunConfig, ScheduleConfig


def decays(parameter: nn.Parameter) -> bool:
    """Whether weight decay applies: matrices only. Norms, biases and the scan's rate, skip and step bias are
    vectors: they carry scales that zero is no home for."""
    return parameter.ndim >= 2


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """Fused AdamW over the fp32 master parameters in two groups: decayed matrices, then everything else."""
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    if not named:
        raise ValueError("train: model must have a trainable parameter, got none")
    wrong = [f"{name} {parameter.dtype}" for name, parameter in named if parameter.dtype != torch.float32]
    if wrong:
        raise ValueError(f"train: master parameters must be torch.float32, got {', '.join(wrong[:10])}")
    groups = [
        {"params": [p for _, p in named if decays(p)], "weight_decay": config.weight_decay},
        {"params": [p for _, p in named if not decays(p)], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=config.learning_rate,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        fused=True,
    )
    # AdamW makes its state lazily, for parameters that have had a gradient. Made here, in the same form, a
    # checkpoint of any step has one entry per parameter and loading is a plain copy.
    for _, parameter in named:
        optimizer.state[parameter] = {
            "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
            "exp_avg": torch.zeros_like(parameter, memory_format=torch.preserve_format),
            "exp_avg_sq": torch.zeros_like(parameter, memory_format=torch.preserve_format),
        }
    return optimizer


def step_learning_rate(config: RunConfig, steps: Sequence[Step], step: int) -> float:
    """Learning rate of 0-based `step`: its position's peak under the run's schedule or its phase's own.

    The peak grows with the square root of the batch: the noise of a batch's gradient falls as its square root, and
    Adam's update is measured in units of that noise (Malladi et al. 2022, arXiv 2205.10287). Hebatron's team took
    2.9 times the rate for 8 times the batch.
    """
    if config.sft is not None:
        return learning_rate(step, len(steps), config.schedule, config.optimizer.learning_rate)
    position, here = steps[step].position, steps[step].batch_tokens
    phase, usual = config.phases[position], config.training.tokens_per_batch
    if phase.learning_rate is None:
        peak = config.optimizer.learning_rate * math.sqrt(here / usual)
    else:
        peak = phase.learning_rate * math.sqrt(here / phase.ramp(usual)[-1])
    starts = position_starts(steps)
    if phase.schedule is None:
        return learning_rate(step, len(steps), config.schedule, peak, [start for _, start in starts])
    own = replace(config.schedule, name=phase.schedule, phase_warmup_steps=0)
    start = dict(starts)[position]
    length = bisect_right(steps, position, key=lambda other: other.position) - start
    return learning_rate(step - start, length, own, peak)


def position_starts(steps: Sequence[Step]) -> list[tuple[int, int]]:
    """(phase, first step) of each phase as written: by bisection, for every step asks."""
    starts, at = [], 0
    while at < len(steps):
        starts.append((steps[at].position, at))
        at = bisect_right(steps, steps[at].position, lo=at, key=lambda other: other.position)
    return starts


def learning_rate(
    step: int, total_steps: int, config: ScheduleConfig, peak: float, phase_starts: Sequence[int] = (0,)
) -> float:
    """Learning rate of 0-based `step`: a pure function, so a resumed run needs no scheduler state.

    wsd       linear warm-up to `peak`, flat, then a linear or 1-sqrt decay to `peak * floor` over the last
              `decay_share` of the run
    cosine    warm-up, then half a cosine down to `peak * floor`
    constant  warm-up, then flat
    With `phase_warmup_steps`, each later phase starts again from `floor` and climbs in that many steps.
    """
    if not 0 <= step < total_steps:
        raise ValueError(f"learning_rate: step must be in [0, {total_steps}), got {step}")
    warmup = min(config.warmup_steps, total_steps)
    scale = _shape(step, total_steps, warmup, config)
    if step < warmup:
        scale = (step + 1) / warmup
    phase_start = phase_starts[max(bisect_right(phase_starts, step) - 1, 0)]
    since = step - phase_start
    if phase_start > 0 and since < config.phase_warmup_steps:
        climb = (since + 1) / config.phase_warmup_steps
        scale *= config.floor + (1.0 - config.floor) * climb
    return peak * scale


def _shape(step: int, total_steps: int, warmup: int, config: ScheduleConfig) -> float:
    """The schedule after warm-up. The floor is met one step past the end, so that no step runs at rate 0."""
    if config.name == "constant":
        return 1.0
    if config.name == "cosine":
        progress = (step - warmup + 1) / (total_steps - warmup + 1)
        return config.floor + (1.0 - config.floor) * 0.5 * (1.0 + math.cos(math.pi * progress))
    decay_steps = min(round(config.decay_share * total_steps), total_steps - warmup)
    into_decay = step - (total_steps - decay_steps) + 1
    if into_decay <= 0:
        return 1.0
    progress = into_decay / (decay_steps + 1)
    fall = progress if config.decay == "linear" else math.sqrt(progress)
    return 1.0 - (1.0 - config.floor) * fall


def set_learning_rate(optimizer: torch.optim.Optimizer, value: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = value


def clip_gradients(model: nn.Module, max_norm: float) -> float:
    """Scale gradients in place to a global L2 norm of at most `max_norm` (0 only measures). Returns the norm.

    A non-finite norm is returned as it is and leaves the gradients alone: the caller skips the step.
    """
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients)
    value = float(norm)
    if math.isfinite(value) and 0.0 < max_norm < value:
        torch.nn.utils.clip_grads_with_norm_(model.parameters(), max_norm, norm)
    return value
