"""Steps to look at: a loss far above the last ones of its phase, or one that is not finite, with what it read.

The rule, a pure function of the step records of metrics.jsonl, so that a resumed run says what an uninterrupted one
says: the loss is over mean + SIGMAS * sigma of the phase's last WINDOW losses, given ENOUGH of them; sigma is at least
SIGMA_FLOOR of the mean. A spike joins the window after it was judged, so a loss that stays up stops being one.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Iterable
from typing import TYPE_CHECKING

from .metrics import Record

if TYPE_CHECKING:
    from ..chat.sft import ChatRows
    from ..curriculum.plan import Plan

WINDOW = 100  # steps: a phase's own drift over them is small beside its noise
ENOUGH = 20
SIGMAS = 6.0  # with 20 losses of normal noise one step in 160,000 by chance (Student's t, 19 degrees)
SIGMA_FLOOR = 0.01  # of the mean: losses that hardly vary do not make a spike of 1 %


def spike(losses: Iterable[float], loss: float) -> str | None:
    """In what way `loss` stands out from the phase's `losses` before it; None if it does not."""
    window = list(losses)[-WINDOW:]
    if len(window) < ENOUGH:
        return None
    mean = math.fsum(window) / len(window)
    sigma = max(statistics.stdev(window), SIGMA_FLOOR * abs(mean))
    if loss <= mean + SIGMAS * sigma:
        return None
    return (
        f"loss {loss:.4f} is {(loss - mean) / sigma:.1f} sigma over the {mean:.4f} of the phase's last "
        f"{len(window)} steps"
    )


class LossWatch:
    """Follows a run's step records; started from those that are in metrics.jsonl already."""

    def __init__(self, records: Iterable[Record]) -> None:
        self.phase: str | None = None
        self.losses: deque[float] = deque(maxlen=WINDOW)
        for record in records:
            if record["kind"] == "step":
                self._judge(record)

    def see(self, record: Record, plan: Plan | ChatRows, rows: range) -> Record | None:
        """The alarm of this step, whose rows are given, or None: a record for metrics.jsonl."""
        what = self._judge(record)
        if what is None:
            return None
        head = {"kind": "alarm", "step": record["step"], "phase": record["phase"], "what": what}
        return {**head, "rows": [rows.start, rows.stop - 1], "documents": plan.documents(rows)}

    def _judge(self, record: Record) -> str | None:
        if record["phase"] != self.phase:
            self.phase = record["phase"]
            self.losses.clear()
        if record["skipped"]:
            return "loss or gradient not finite: the step was skipped"
        what = spike(self.losses, record["loss"])
        self.losses.append(record["loss"])
        return what
