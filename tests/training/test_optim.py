"""The optimizer's groups, the schedules' values and the clipping rule."""

import math
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import nn

from hebatron import presets
from hebatron.curriculum.plan import Step
from hebatron.model import Hebatron
from hebatron.training.optim import build_optimizer, clip_gradients, decays, learning_rate, position_starts
from hebatron.training.sections import OptimizerConfig, ScheduleConfig

WSD = ScheduleConfig(name="wsd", warmup_steps=4, decay_share=0.5, floor=0.1)


def rates(config: ScheduleConfig, total: int = 20, starts: tuple[int, ...] = (0,)) -> list[float]:
    return [learning_rate(step, total, config, 1.0, starts) for step in range(total)]


def test_learning_rate_wsd_warms_holds_and_decays_towards_the_floor() -> None:
    values = rates(WSD)
    assert values[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert values[4:10] == [1.0] * 6
    assert values[10] == pytest.approx(1 - 0.9 / 11)
    assert values[-1] == pytest.approx(0.1 + 0.9 / 11)
    assert all(a >= b for a, b in pairwise(values[4:]))


def test_learning_rate_sqrt_decay_falls_faster_first() -> None:
    values = rates(replace(WSD, decay="sqrt"))
    assert values[10] == pytest.approx(1 - 0.9 * math.sqrt(1 / 11))
    assert values[-1] == pytest.approx(1 - 0.9 * math.sqrt(10 / 11))


def test_learning_rate_cosine_and_constant_end_where_they_say() -> None:
    cosine = rates(replace(WSD, name="cosine"))
    assert cosine[3] == 1.0 and 0.1 < cosine[-1] < 0.11
    assert cosine[4] + cosine[-1] == pytest.approx(1.1)  # symmetric about the half-way point
    assert rates(replace(WSD, name="constant"))[3:] == [1.0] * 17


def test_learning_rate_climbs_again_at_each_later_phase() -> None:
    config = replace(WSD, name="constant", phase_warmup_steps=3)
    values = rates(config, starts=(0, 8, 14))
    assert values[8:12] == pytest.approx([0.4, 0.7, 1.0, 1.0])
    assert values[14:17] == pytest.approx([0.4, 0.7, 1.0])
    assert values[:4] == [0.25, 0.5, 0.75, 1.0]


@pytest.mark.parametrize("total", [1, 2, 5])
def test_learning_rate_is_positive_and_finite_in_runs_shorter_than_the_warmup(total: int) -> None:
    for name in ("wsd", "cosine", "constant"):
        values = rates(ScheduleConfig(name=name, warmup_steps=5), total)  # type: ignore[arg-type]
        assert all(0 < value <= 1 for value in values)


def test_learning_rate_refuses_a_step_outside_the_run() -> None:
    with pytest.raises(ValueError, match=r"step must be in \[0, 20\), got 20"):
        learning_rate(20, 20, WSD, 1.0)


def test_decays_only_matrices_outside_norms_and_scan_parameters() -> None:
    for name, parameter in Hebatron(presets.tiny(300)).named_parameters():
        scale = "norm" in name or name.rsplit(".", 1)[-1] in ("A_log", "D", "dt_bias", "bias")
        assert decays(parameter) is not scale, name


def test_build_optimizer_has_fp32_state_for_every_parameter_at_step_zero() -> None:
    model = nn.Linear(3, 2)
    optimizer = build_optimizer(model, OptimizerConfig(weight_decay=0.3))
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.3, 0.0]
    for parameter in model.parameters():
        assert set(optimizer.state[parameter]) == {"step", "exp_avg", "exp_avg_sq"}


def test_build_optimizer_equals_plain_adamw_bitwise() -> None:
    torch.manual_seed(0)
    ours, plain = nn.Linear(5, 4, bias=False), nn.Linear(5, 4, bias=False)
    plain.load_state_dict(ours.state_dict())
    optimizers = (
        build_optimizer(ours, OptimizerConfig(learning_rate=0.01, weight_decay=0.1)),
        torch.optim.AdamW(plain.parameters(), lr=0.01, betas=(0.9, 0.95), weight_decay=0.1, fused=True),
    )
    for step in range(3):
        x = torch.randn(7, 5, generator=torch.Generator().manual_seed(step))
        for model, optimizer in zip((ours, plain), optimizers, strict=True):
            optimizer.zero_grad()
            model(x).square().sum().backward()
            optimizer.step()
    assert torch.equal(ours.weight, plain.weight)


def test_build_optimizer_refuses_parameters_that_are_not_fp32() -> None:
    with pytest.raises(ValueError, match=r"must be torch\.float32, got weight torch\.bfloat16"):
        build_optimizer(nn.Linear(2, 2, bias=False).to(torch.bfloat16), OptimizerConfig())


def test_clip_gradients_scales_to_the_norm_and_leaves_nonfinite_alone() -> None:
    model = nn.Linear(2, 1)
    model.weight.grad = torch.tensor([[3.0, 0.0]])
    model.bias.grad = torch.tensor([4.0])
    assert clip_gradients(model, 0.0) == 5.0 and model.bias.grad.item() == 4.0
    assert clip_gradients(model, 1.0) == 5.0
    assert model.bias.grad.item() == pytest.approx(0.8, rel=1e-5)
    model.bias.grad = torch.tensor([math.inf])
    assert math.isinf(clip_gradients(model, 1.0)) and model.weight.grad[0, 0].item() == pytest.approx(0.6)


class Counted(list[Step]):
    """Counts what is read of it."""

    reads = 0

    def __getitem__(self, index: Any) -> Any:
        self.reads += 1
        return super().__getitem__(index)


def test_position_starts_are_each_phases_first_step_and_read_few_of_them() -> None:
    """Every step of a run asks: walking all of them is 10**10 reads in a run of 100,000."""
    for lengths in ([1], [3, 1, 4], [0, 2, 0, 5], [30_000, 1, 70_000]):
        positions = [position for position, length in enumerate(lengths) for _ in range(length)]
        steps = Counted(Step(i, "", range(i, i + 1), at, 1) for i, at in enumerate(positions))
        expected = [(at, positions.index(at)) for at in sorted(set(positions))]
        assert position_starts(steps) == expected
        assert steps.reads <= 20 * len(lengths)  # log2(100,000) = 17
