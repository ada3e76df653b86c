"""What the kernels should reach on an H100, beside the figures of the timing table.

`must` is what we set out for, `stretch` what a kernel as good as the best published ones would give, in the unit that
the field quotes. They belong to an H100 (989 TFLOP/s, 3.35 TB/s in its data sheet); beside another GPU's figures they
are a yardstick and no verdict.
"""

from __future__ import annotations

from dataclasses import dataclass

# bytes or operations that a unit counts a millisecond
RATES = {"TFLOP/s": 1e9, "TB/s": 1e9}


@dataclass(frozen=True)
class Target:
    must: float
    stretch: float
    unit: str  # "ms", or one of RATES

    def as_row(self, bytes_moved: float, flops: float) -> dict[str, float | str]:
        """The times for a problem of this size, beside the target as it was set."""
        must_ms, stretch_ms = self.must, self.stretch
        if self.unit != "ms":
            work = (flops if self.unit == "TFLOP/s" else bytes_moved) / RATES[self.unit]
            must_ms, stretch_ms = work / self.must, work / self.stretch
        set_as = f"{self.must:g}, stretch {self.stretch:g} {self.unit}"
        return {"must_ms": round(must_ms, 5), "stretch_ms": round(stretch_ms, 5), "set_as": set_as}


def both(forward: Target, backward: Target, times: float) -> Target:
    """Of rates: forward and backward together, the backward having so many times the forward's operations."""

    def rate(f: float, b: float) -> float:
        return round((1 + times) / (1 / f + times / b), 1)

    return Target(rate(forward.must, backward.must), rate(forward.stretch, backward.stretch), forward.unit)


EXPERTS, ATTENTION = Target(480, 600, "TFLOP/s"), Target(480, 600, "TFLOP/s")
ROWS = Target(2.6, 3.0, "TB/s")  # of norms and sums of rows; at fewer tokens the launch shows
TARGETS = {
    ("moe", "16384 uniform"): EXPERTS,
    ("moe", "16384 uniform forward and backward"): both(EXPERTS, Target(420, 560, "TFLOP/s"), 2),
    ("moe", "4096 uniform"): Target(1.4, 1.1, "ms"),
    ("moe_decode", "1 uniform"): Target(0.055, 0.047, "ms"),
    ("moe_decode", "64 uniform"): Target(1.0, 0.9, "ms"),
    ("attention", "causal 65536"): ATTENTION,
    ("attention_bwd", "causal 65536 forward and backward"): both(ATTENTION, Target(330, 500, "TFLOP/s"), 2.5),
    ("attention_decode", "1x65536"): Target(0.032, 0.026, "ms"),
    ("ssd_scan", "65536 tokens in 1"): Target(1.1, 0.8, "ms"),
    ("ssd_update", "64 sequences"): Target(0.110, 0.100, "ms"),
    ("loss", "lm_head 4096x2688x131072"): Target(550, 650, "TFLOP/s"),
    ("norm", "plain 65536x2688"): ROWS,
    ("norm", "residual 65536x2688"): ROWS,
    ("norm", "gated 65536x4096"): ROWS,
    ("moe_combine", "65536"): ROWS,
    ("moe_combine", "65536 with shared, residual, norm"): ROWS,
}
# Of a whole decoding step of one sequence (bench/bench_model.py --device cuda).
DECODE_STEP = Target(3.9, 3.1, "ms")


def target(kernel: str, case: str) -> Target | None:
    return TARGETS.get((kernel.removesuffix("_sm90"), case))
