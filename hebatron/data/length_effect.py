"""What length alone does to a measure of a text, and the measure without it.

A short text has fewer words to repeat, gives a compressor less to find and a model less to go on: cut the same text
shorter and it looks harder. How much shows in long documents of the corpus, measured again and again from their
beginning to a growing length. A short one's value is then read against theirs at its own length: as many standard
deviations from the mean there as the corrected value is from the mean at the full length. What length has to do with
difficulty otherwise (a law is longer than a caption) stays.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
MIN_REFERENCES = 20  # documents; the standard error of a mean is then 0.22 of the spread between them


@dataclass(frozen=True, eq=False)
class LengthEffect:
    """lengths: (K,) increasing. means, deviations: (K,) of the reference documents cut to each length."""

    lengths: Floats
    means: Floats
    deviations: Floats

    @classmethod
    def of(cls, lengths: Sequence[int], values: Floats) -> LengthEffect | None:
        """values: (documents, K), NaN where a document is shorter. Those that reach the longest of `lengths` that
        MIN_REFERENCES reach are the reference; None if not even the shortest is reached so often."""
        reached = np.flatnonzero((~np.isnan(values)).sum(0) >= MIN_REFERENCES)
        if not len(reached):
            return None
        last = int(reached[-1]) + 1
        reference = values[~np.isnan(values[:, last - 1]), :last]
        return cls(np.asarray(lengths[:last], np.float64), reference.mean(0), reference.std(0))

    def corrected(self, value: Floats, length: Floats) -> Floats:
        """The values as they would be at the full length: between `lengths` by log length, outside as at the end."""
        at, grid = np.log(np.maximum(length, 1)), np.log(self.lengths)
        mean, deviation = np.interp(at, grid, self.means), np.interp(at, grid, self.deviations)
        scale = np.divide(self.deviations[-1], deviation, out=np.ones_like(deviation), where=deviation > 0)
        result: Floats = self.means[-1] + (value - mean) * scale
        return result


def cut_values(
    texts: Sequence[Sequence[str] | str], lengths: Sequence[int], measure: Callable[..., float]
) -> Floats:
    """(texts, K): each text's beginning measured at each of `lengths`, NaN where the text is shorter."""
    rows = [[measure(text[:n]) if len(text) >= n else np.nan for n in lengths] for text in texts]
    return np.array(rows, np.float64).reshape(-1, len(lengths))


def mean_of_pieces(
    effect: LengthEffect | None,
    values: Sequence[float],
    lengths: Sequence[float],
    weights: Sequence[float],
) -> float:
    """Of a document's pieces, each corrected for its length; 0 for a document without any."""
    if not sum(weights):
        return 0.0
    each = np.asarray(values, np.float64)
    if effect is not None:
        each = effect.corrected(each, np.asarray(lengths, np.float64))
    return float(np.average(each, weights=weights))
