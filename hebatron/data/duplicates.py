"""Near-duplicates by MinHash (datasketch): two texts are near if they share enough of their 5-word runs.

Compared are words alone: points, punctuation and case do not count. Similarity is the Jaccard index of the
two sets of 5-word runs, estimated from 128 permutations: its standard error at 0.8 is 0.035. 0.8 is the default:
a document with one word in ten changed at random still shares under half its runs and stays, one with a
changed header or a cut end goes. A text under 5 words is one run. The result depends on the order of the texts
and on nothing else: the first of a group is kept, and later texts are compared with kept ones alone.
"""

from __future__ import annotations

import re
import zlib
from typing import Any

import numpy as np
import numpy.typing as npt

from .hebrew import strip_points

DEFAULT_THRESHOLD = 0.8
RUN_WORDS, PERMUTATIONS, SEED = 5, 128, 1
RECALL_WEIGHTS = (0.1, 0.9)  # of false candidates and missed ones: a candidate costs one comparison
_WORD = re.compile(r"\w+")
_ODD = np.random.default_rng(SEED).integers(0, 1 << 63, RUN_WORDS, np.uint64) * np.uint64(2) + np.uint64(1)


class NearDuplicates:
    """The kept texts' signatures; memory: some 5 KB a kept document."""

    def __init__(self, threshold: float = DEFAULT_THRESHOLD) -> None:
        """threshold: smallest estimated Jaccard index of a near-duplicate, above 0 and up to 1."""
        if not 0 < threshold <= 1:
            raise ValueError(f"prepare: near_duplicates must be above 0 and at most 1, got {threshold}")
        try:
            import datasketch
        except ModuleNotFoundError as error:
            raise ValueError(
                "prepare: datasketch must be installed for near_duplicates, got none; "
                'run: pip install "hebatron[data]"'
            ) from error
        self._threshold = threshold
        options: dict[str, Any] = {"seed": SEED, "hashfunc": int, "scheme": "affine32", "gpu_mode": "disable"}
        drawn = datasketch.MinHash(
            PERMUTATIONS, **options
        ).permutations  # 14 ms; with them a signature takes 8 us
        self._new: Any = lambda: datasketch.MinHash(PERMUTATIONS, permutations=drawn, **options)
        self._index = datasketch.MinHashLSH(
            threshold=threshold, num_perm=PERMUTATIONS, weights=RECALL_WEIGHTS
        )
        self._signatures: list[Any] = []

    def add(self, text: str) -> tuple[int, float] | None:
        """The number of the kept text that this one repeats and their similarity; None: kept, as the next."""
        signature = self._new()
        signature.update_batch(run_hashes(text).tolist())
        found = [(self._signatures[n].jaccard(signature), -n) for n in self._index.query(signature)]
        if found and max(found)[0] >= self._threshold:
            similarity, number = max(found)
            return -number, float(similarity)
        self._index.insert(len(self._signatures), signature)
        self._signatures.append(signature)
        return None


def run_hashes(text: str) -> npt.NDArray[np.uint32]:
    """One 32-bit hash for each different run of 5 words."""
    words = _WORD.findall(strip_points(text).casefold())
    if not words:  # punctuation alone: equal only to itself
        return np.array([zlib.crc32(text.encode("utf-8"))], np.uint32)
    codes = np.array([zlib.crc32(word.encode("utf-8")) for word in words], np.uint64)
    run = min(RUN_WORDS, len(codes))
    count = len(codes) - run + 1
    mixed = np.zeros(count, np.uint64)
    for place in range(run):
        mixed = (mixed ^ (mixed >> np.uint64(29))) + codes[place : place + count] * _ODD[place]
    return np.unique((mixed >> np.uint64(32)).astype(np.uint32))
