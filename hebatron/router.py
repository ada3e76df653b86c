"""The health of the expert layers' routers, as a whole and by language: load, entropy, dead experts, overlap.

Overlap of two languages in a layer is the sum over experts of the smaller of the two load shares: 1 where both
use the experts alike, 0 where they share none. (A published look at Qwen3-30B-A3B counted an expert overlap of
Hebrew and English of 28.9 % on average, 49 % in layer 10 and 4 % in the last layer; how it was counted is not
public, so compare the shape over layers and not the figure.)

An alarm is a line for every layer whose entropy is under ENTROPY_ALARM, or whose Hebrew and English overlap by
less than OVERLAP_ALARM. Too few tokens say nothing: a language is judged from ENOUGH_CHOICES choices an expert. A
language that a model of fresh weights has not read yet is not judged either: a base phase without Hebrew is no fault.

E experts, K experts per token, T tokens, G languages.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .model import RouterStats

ENTROPY_ALARM = 0.6  # of ln E: as if 18 of 128 experts, or 3.5 of 8, shared all the work
OVERLAP_ALARM = 0.1  # between the 29 % seen on average and the 4 % of the layer that had come apart
ENOUGH_CHOICES = 8  # per expert; an even router then shows an entropy over 0.95 all the same
PAIR = ("he", "en")
Health = dict[str, Any]


def sequence_balance_loss(logits_TE: Tensor, ids_TK: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """E * sum_e f_e P_e in each sequence, averaged over the tokens of all: 1 when every expert gets its share.

    f_e is the share of the sequence's choices that fell on expert e (no gradient), P_e the mean of its scores divided
    by their sum. The average is over tokens and not over sequences, so a document of three tokens, which cannot be
    balanced, weighs three tokens.
    """
    T, E = logits_TE.shape
    K = ids_TK.shape[1]
    scores_TE = torch.sigmoid(logits_TE)
    shares_TE = scores_TE / (scores_TE.sum(-1, keepdim=True) + 1e-20)
    if cu_seqlens is None:
        sequence_T, lengths_Q = torch.zeros_like(ids_TK[:, 0]), ids_TK.new_full((1,), T)
    else:
        token_T = torch.arange(T, device=ids_TK.device)
        sequence_T = torch.searchsorted(cu_seqlens[1:].long(), token_T, right=True)
        lengths_Q = cu_seqlens.diff().long()
    Q = lengths_Q.shape[0]
    slots = (sequence_T[:, None] * E + ids_TK).flatten()
    chosen_QE = torch.zeros(Q * E, dtype=logits_TE.dtype, device=logits_TE.device)
    chosen_QE = chosen_QE.index_add(0, slots, torch.ones_like(slots, dtype=logits_TE.dtype)).view(Q, E)
    shares_QE = torch.zeros_like(chosen_QE).index_add(0, sequence_T, shares_TE)
    per_sequence_Q = (chosen_QE * shares_QE).sum(-1) / lengths_Q.clamp(min=1)
    return per_sequence_Q.sum() * (E / (K * max(T, 1)))


def load_entropy(counts_E: Tensor) -> Tensor:
    """Entropy of the experts' shares of the tokens, divided by log E."""
    shares_E = counts_E / counts_E.sum().clamp(min=1)
    return torch.special.entr(shares_E).sum() / math.log(max(counts_E.shape[0], 2))


def router_load(counts_E: Tensor) -> dict[str, float]:
    """How evenly tokens fall on the experts of one layer.

    max_over_ideal is 1 when even and E when all go to one; entropy is that of the load over ln E, in [0, 1].
    """
    total, experts = float(counts_E.sum()), counts_E.numel()
    if total == 0:
        return {"mean": 0.0, "max_over_ideal": 0.0, "dead": 1.0, "load_entropy": 0.0}
    share_E = counts_E.double() / total
    nats = float(torch.special.entr(share_E).sum())
    return {
        "mean": total / experts,
        "max_over_ideal": float(share_E.max()) * experts,
        "dead": float((counts_E == 0).double().mean()),
        "load_entropy": nats / math.log(experts) if experts > 1 else 1.0,
    }


def overlap(a_E: Tensor, b_E: Tensor) -> float:
    """Sum over experts of the smaller load share, in [0, 1]; 0 where one of the two has no load."""
    shares = [counts_E.double() / counts_E.sum().clamp(min=1) for counts_E in (a_E, b_E)]
    return float(torch.minimum(*shares).sum())


class LanguageCounts:
    """Choices by language and layer, summed over forwards. It only reads the model's outputs."""

    def __init__(self) -> None:
        self.counts: dict[str, list[Tensor]] = {}  # language -> (E,) int64 for each expert layer

    def add(self, layers: Sequence[RouterStats], languages: Sequence[str], language_T: Tensor) -> None:
        """`language_T`: the index into `languages` of every token of this forward."""
        for layer, stats in enumerate(layers):
            experts = stats.counts.numel()
            slots_TK = language_T.to(stats.ids_TK.device)[:, None] * experts + stats.ids_TK.long()
            counts_GE = slots_TK.flatten().bincount(minlength=len(languages) * experts).cpu()
            for language, counts_E in zip(languages, counts_GE.view(len(languages), experts), strict=True):
                if not counts_E.any():
                    continue
                rows = self.counts.setdefault(
                    language, [torch.zeros_like(s.counts, device="cpu") for s in layers]
                )
                rows[layer] = rows[layer] + counts_E

    def health(self) -> Health:
        """For a record of metrics.jsonl:

        router_languages: {language: [router_load of each expert layer]}
        expert_overlap: of Hebrew and English by layer; [] where one of them did not occur
        """
        pair = [self.counts.get(language) for language in PAIR]
        overlaps = [] if pair[0] is None or pair[1] is None else [overlap(a, b) for a, b in zip(*pair)]
        by_language = {
            language: [_rounded(router_load(counts_E)) for counts_E in self.counts[language]]
            for language in sorted(self.counts)
        }
        return {"router_languages": by_language, "expert_overlap": [round(value, 4) for value in overlaps]}


def _rounded(load: Mapping[str, float]) -> dict[str, float]:
    return {key: round(value, 4) for key, value in load.items()}


def alarms(health: Health, read: Collection[str] | None = None) -> list[str]:
    """One line for each layer and language that is under a threshold; `read`: the languages to judge, None: all."""
    judged = {
        language: layers
        for language, layers in health["router_languages"].items()
        if all(load["mean"] >= ENOUGH_CHOICES for load in layers) and (read is None or language in read)
    }
    lines = [
        f"router: expert layer {layer} has a load entropy of {load['load_entropy']:.2f} ln E on {language} "
        f"(under {ENTROPY_ALARM}), {load['dead']:.0%} of its experts idle"
        for language, layers in judged.items()
        for layer, load in enumerate(layers)
        if load["load_entropy"] < ENTROPY_ALARM
    ]
    if all(language in judged for language in PAIR):
        lines += [
            f"router: expert layer {layer} shares {value:.0%} of its load between Hebrew and English "
            f"(under {OVERLAP_ALARM:.0%})"
            for layer, value in enumerate(health["expert_overlap"])
            if value < OVERLAP_ALARM
        ]
    return lines
