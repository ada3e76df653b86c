"""Named curricula: the phases of a published recipe, scaled by one number.

    phases = hebatron_phases(1e-4, {"formal": {...}, "colloquial": {...}, "long": {...}}, tokens_per_batch=65_536)

In a run file (runconfig.py resolves it; phases written there come first, a base for instance):

    [curriculum]
    preset = "hebatron"
    scale = 1e-4
    sources = { formal = { law = 1.0 }, colloquial = { forums = 1.0 }, long = { books = 1.0 } }
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from .phases import Phase

# Of the model card of Hebatron (arXiv 2605.11255): name, tokens at scale 1
HEBATRON_TOKENS = {"formal": 75_500_000_000, "colloquial": 3_360_000_000, "long": 20_400_000_000}
LONG_SEQ_LEN, SHORT_OF_LONG = 65_536, 8  # the other phases' rows: 8,192
MIN_ROWS = (
    16  # of a phase: with fewer, one row is over 6 % of it and no share of anchor or source can be kept
)


def hebatron_phases(
    scale: float,
    sources: Mapping[str, Mapping[str, float]],
    *,
    tokens_per_batch: int,
    max_seq_len: int = LONG_SEQ_LEN,
    anchor_share: float = 0.25,
    batch_ramp: int = 8,
    max_epochs: float | None = None,
) -> tuple[Phase, ...]:
    """Hebatron's three phases, easy to hard: formal, colloquial, long-context.

    Published: the phases, their tokens (75.5, 3.36 and 20.4 billion), rows of 65,536 in the last, an anchor of the
    base model's English and reasoning data in every phase, sequences of 8 K in batches of 2 M tokens that were
    raised about eightfold, with sqrt(8) = 2.8 times the learning rate (tellings differ: 10.5 M or 16.5 M).
    Not published, so our choice: that the counts include the anchor; its share (25 %, as the sister project
    DictaLM-3.0 mixed Hebrew and English); that the batch is raised half-way through the formal phase, in one step;
    learning rate and schedule, which stay the run's.

    Args:
        scale: a phase has floor(its tokens x scale) tokens; 1 is the paper's run.
        sources: of "formal", "colloquial" and "long", the weights of each as in Phase.
        tokens_per_batch: the run's; batches before the raise hold tokens_per_batch // batch_ramp. The learning rate
            belongs to tokens_per_batch and is smaller before by sqrt(batch_ramp) (optim.step_learning_rate).
        max_seq_len: rows of the long phase hold min(65,536, max_seq_len) tokens, those of the others an eighth of it.
        anchor_share, max_epochs: of every phase.
        batch_ramp: 1 for no raise.
    Raises: ValueError, with the scale or the lengths that would do, where a phase would have under 16 rows or a batch
        not one row.
    """
    if not 0 < scale < math.inf:
        raise ValueError(f"curriculum: scale must be above 0 and finite, got {scale}")
    if max_seq_len < SHORT_OF_LONG:
        raise ValueError(f"curriculum: max_seq_len must be at least {SHORT_OF_LONG}, got {max_seq_len}")
    if batch_ramp < 1:
        raise ValueError(f"curriculum: batch_ramp must be at least 1, got {batch_ramp}")
    if sorted(sources) != sorted(HEBATRON_TOKENS):
        raise ValueError(f"curriculum: sources must be of {', '.join(HEBATRON_TOKENS)}, got {list(sources)}")
    long = min(LONG_SEQ_LEN, max_seq_len)
    first_batch = tokens_per_batch // batch_ramp
    if first_batch < long // SHORT_OF_LONG or tokens_per_batch < long:
        raise ValueError(
            f"curriculum: tokens_per_batch must hold a row of {long} tokens and, divided by batch_ramp = "
            f"{batch_ramp}, one of {long // SHORT_OF_LONG}, got {tokens_per_batch}"
        )
    phases = []
    for name, full in HEBATRON_TOKENS.items():
        seq_len, tokens = long if name == "long" else long // SHORT_OF_LONG, math.floor(full * scale)
        if tokens < MIN_ROWS * seq_len:
            raise ValueError(
                f"curriculum: scale must give phase {name!r} at least {MIN_ROWS} rows of {seq_len} tokens, "
                f"got {tokens} tokens at {scale}; raise it to {MIN_ROWS * seq_len / full:.3g}, or lower max_seq_len"
            )
        ramp = (first_batch, tokens_per_batch) if name == "formal" and batch_ramp > 1 else None
        own = dict(sources[name])
        phases.append(Phase(name, own, tokens, seq_len, anchor_share, max_epochs, batch_tokens=ramp))
    return tuple(phases)


CURRICULA = {"hebatron": hebatron_phases}
