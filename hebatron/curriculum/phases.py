"""What a curriculum is written as: phases, their sources, the anchor and the order (build.py has the rules)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from ..spelling import did_you_mean

ORDERS = ("forward", "reversed", "shuffled")
EpochLimits = float | dict[str, float] | None  # for all sources, by source, none
OLD_ORDERS = {"easy_to_hard": "forward"}  # names that older run files use


@dataclass(frozen=True)
class Phase:
    """One phase: what is read, and how the positions that it is written for are trained.

    anchor_share, batch_tokens, learning_rate and schedule belong to the phase's place in the run, whatever `order`
    puts there; schedule keeps [schedule]'s warm-up, decay and floor. max_epochs is a number for all sources or a table
    by source (None, or not in the table: no limit) and counts tokens whatever name they were read by, for "corpus"
    those of all its sources together, and earlier phases': a limit of 2 for "he" or "he/wiki" counts what phases read
    as the other."""

    name: str  # what order and the metrics call it
    sources: dict[str, float]  # weights by "corpus" or "corpus/source", anchor rows apart; 0: not used
    tokens: int  # that bear loss, the anchor's included
    seq_len: int  # of a row
    anchor_share: float = 0.0  # of the tokens
    max_epochs: EpochLimits = None  # refuse a plan that has read a source more often by the phase's end
    pinned: bool = False  # stays in its place whatever the order
    batch_tokens: int | tuple[int, ...] | None = None  # of a step, not training's; several: in equal shares
    learning_rate: float | None = None  # the peak at the last batch size, instead of optimizer.learning_rate
    schedule: Literal["wsd", "cosine", "constant"] | None = None  # over the phase's own steps, not the run's

    def __post_init__(self) -> None:
        where = f"Phase: {self.name!r}"
        if not self.name:
            raise ValueError("Phase: name must not be empty, got ''")
        if self.seq_len < 1:
            raise ValueError(f"{where} seq_len must be at least 1, got {self.seq_len}")
        if self.tokens < self.seq_len:
            raise ValueError(f"{where} tokens must be at least seq_len = {self.seq_len}, got {self.tokens}")
        if not 0 <= self.anchor_share < 1:
            raise ValueError(f"{where} anchor_share must be in [0, 1), got {self.anchor_share}")
        check_limits(f"{where} max_epochs", self.max_epochs, self.sources)
        if self.learning_rate is not None and not 0 < self.learning_rate < math.inf:
            raise ValueError(f"{where} learning_rate must be above 0 and finite, got {self.learning_rate}")
        if self.batch_tokens == () or any(batch < self.seq_len for batch in self.ramp(self.seq_len)):
            raise ValueError(
                f"{where} batch_tokens must be at least seq_len = {self.seq_len}, each, got {self.batch_tokens}"
            )
        check_weights(f"{where} sources", self.sources)

    @property
    def num_rows(self) -> int:
        return self.tokens // self.seq_len

    def ramp(self, default: int) -> tuple[int, ...]:
        """Tokens of one step in each equal share of the phase."""
        if self.batch_tokens is None:
            return (default,)
        return (self.batch_tokens,) if isinstance(self.batch_tokens, int) else self.batch_tokens


@dataclass(frozen=True)
class Curriculum:
    """anchor: weights like a phase's sources. order: "forward" (as written), "reversed", "shuffled" (by the seed) or
    phase names; "easy_to_hard" is an older name of forward. anchor_max_epochs: like a phase's max_epochs, for
    what the anchor reads in the whole run."""

    phases: tuple[Phase, ...]
    anchor: dict[str, float] = field(default_factory=dict)
    order: str | tuple[str, ...] = "forward"
    seed: int = 0
    anchor_max_epochs: EpochLimits = None

    def __post_init__(self) -> None:
        names = [phase.name for phase in self.phases]
        if not names or len(set(names)) < len(names):
            raise ValueError(f"Curriculum: phases must be at least one, with different names, got {names}")
        if any(phase.anchor_share for phase in self.phases):
            check_weights("Curriculum: anchor", self.anchor)
        check_limits("Curriculum: anchor_max_epochs", self.anchor_max_epochs, self.anchor)
        if isinstance(self.order, str):
            if self.order not in (*ORDERS, *OLD_ORDERS):
                raise ValueError(
                    'Curriculum: order must be "forward", "reversed", "shuffled" or a tuple of phase names, '
                    f"got {self.order!r}{did_you_mean(self.order, (*ORDERS, *OLD_ORDERS))}"
                )
        elif sorted(self.order) != sorted(names):
            raise ValueError(f"Curriculum: order must name each of {names} once, got {list(self.order)}")

    @property
    def order_name(self) -> str:
        """forward, reversed, shuffled or named."""
        return OLD_ORDERS.get(self.order, self.order) if isinstance(self.order, str) else "named"

    def phase_order(self) -> list[int]:
        """Indices of the phases in the order they run; pinned phases keep their place."""
        if not isinstance(self.order, str):
            return [[phase.name for phase in self.phases].index(name) for name in self.order]
        free = [i for i, phase in enumerate(self.phases) if not phase.pinned]
        moved = iter(free[::-1] if self.order_name == "reversed" else free)
        return [i if phase.pinned else next(moved) for i, phase in enumerate(self.phases)]


def check_weights(what: str, weights: Mapping[str, float]) -> None:
    if not all(math.isfinite(w) and w >= 0 for w in weights.values()) or not sum(weights.values()) > 0:
        raise ValueError(f"{what} must have finite weights >= 0, one of them above 0, got {dict(weights)}")
    for name in weights:
        if "/" in name and name.split("/", 1)[0] in weights:
            raise ValueError(f"{what} must not name a corpus and one of its sources, got {sorted(weights)}")


def check_limits(what: str, limits: EpochLimits, sources: Mapping[str, float]) -> None:
    given = limits.values() if isinstance(limits, dict) else [] if limits is None else [limits]
    if any(not limit > 0 for limit in given):
        raise ValueError(f"{what} must be above 0, got {limits}")
    unknown = sorted(limits.keys() - sources.keys()) if isinstance(limits, dict) else []
    if unknown:
        raise ValueError(f"{what} must be by the names of the sources {sorted(sources)}, got {unknown}")


def epoch_limit(limits: EpochLimits, source: str) -> float:
    """How often this source may be read; inf where nothing limits it."""
    limit = limits.get(source) if isinstance(limits, dict) else limits
    return math.inf if limit is None else limit
