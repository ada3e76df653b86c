"""The loss's cases for bench/gpu_sanitize.py: ragged and small, compared with numpy."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np


def loss_cases(run: Any, random: np.random.Generator) -> Iterator[str]:
    for rows, entries, first in ((5, 113, 0), (3, 4360, 8), (2, 9001, 9000), (4, 64, 64)):
        logits = random.standard_normal((rows, entries)).astype(np.float32)
        targets = random.integers(0, entries, rows)
        targets[-1] = -100
        kept = targets >= 0
        given = {
            "rows": rows,
            "entries": entries,
            "ignore_index": -100,
            "logits_stride": entries,
            "targets": run.card.put(targets),
            "targets_stride": 1,
        }
        losses, lse, z = run.card.empty(4 * rows), run.card.empty(4 * rows), run.card.put(logits)
        run.call("cross_entropy_fwd", **given, logits=z, losses=losses, lse=lse)
        sums = np.where(kept, np.log(np.exp(logits).sum(1)), 0).astype(np.float32)
        found = sums - np.where(kept, logits[np.arange(rows), targets.clip(0)], 0)
        run.compare("lse", lse, sums, fp32=True)
        run.compare("losses", losses, found.astype(np.float32), fp32=True)
        upstream = random.standard_normal(rows).astype(np.float32)
        backward = {"first": first, "dtype": run.dtype, "lse": lse, "upstream": run.card.put(upstream)}
        run.call("cross_entropy_bwd", **given, **backward, logits=z)
        hit = np.arange(entries) + first == targets[:, None]
        grad = np.where(kept, upstream, 0)[:, None] * (np.exp(logits - sums[:, None]) - hit)
        per_row = 2 if run.dtype == "bfloat16" else 1  # gradients in the place of one row of logits
        got = run.card.get(z, (rows, per_row * entries), run.storage)[:, :entries]
        run.compare("gradient", run.card.put(got), grad.astype(np.float32))
        yield f"{rows} rows of {entries} from {first}"
