"""The chats of a run, opened from its [sft] section: encoded, a share held out, the rest packed into rows.

    data = open_chats(config.sft, tokenizer, seed=0, held_out_tokens=20_000)

A chat's side depends on the hash of its messages alone, as a document's does on its text: the same chat in two files
is on one side. What is held out is measured as nats per learnt token, by task and by language.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..evaluation.evaluate import evaluating
from ..model import Hebatron
from ..router import LanguageCounts
from ..tokenizer import Tokenizer
from ..training.sections import SftConfig
from .chats import ChatEncoder, ChatLedger, Sample, encode_chats
from .sft import ChatRows, pack_chats
from .template import open_template


@dataclass(frozen=True, eq=False)
class ChatData:
    """encoder: of prompts too. ledger: what became of each chat read. unseen: how many of the used are in no row;
    held_out: those of them that are measured."""

    encoder: ChatEncoder
    ledger: ChatLedger
    rows: ChatRows
    unseen: int
    held_out: list[Sample]

    def record(self) -> dict[str, Any]:
        """For metrics.jsonl: the account of every chat, and what the rows hold, in all, by task and by language."""
        ledger = self.ledger
        return {
            "kind": "chats",
            "step": 0,
            "read": ledger.read,
            "used": ledger.used,
            "dropped": dict(sorted(ledger.dropped.items())),
            "truncated": ledger.truncated,
            "held_out": self.unseen,
            "measured": len(self.held_out),
            "rows": self.rows.describe(),
        }

    def lines(self) -> list[str]:
        """The same, to be read."""
        ledger, told = self.ledger, self.rows.describe()
        dropped = ", ".join(f"{count:,} {reason}" for reason, count in sorted(ledger.dropped.items()))
        lines = [
            f"chats: {ledger.read:,} read, {ledger.used:,} used ({ledger.truncated:,} of them truncated, "
            f"{self.unseen:,} held out, {len(self.held_out):,} of those measured), dropped: {dropped or 'none'}",
            f"rows: {told['rows']:,} of {told['seq_len']:,} tokens, {told['fill']:.1%} full",
            f"{'':<30}{'readings':>10}{'tokens':>12}{'learnt':>12}{'masked':>9}",
        ]
        return lines + [
            f"{name:<30}{group['samples']:>10,}{group['tokens']:>12,}{group['learnt']:>12,}"
            f"{group['masked_share']:>9.1%}"
            for name, group in told["groups"].items()
        ]


def open_chats(config: SftConfig, tokenizer: Tokenizer, seed: int, held_out_tokens: int) -> ChatData:
    """Read, encode, split and pack; the tokenizer takes the template along, into whatever folder it is saved.

    Args:
        seed: of the order of the chats.
        held_out_tokens: kept of the held-out chats of each task, the first by hash.
    Raises: ValueError naming the file, the chat or the option.
    """
    template = open_template(config.template, tokenizer)
    encoder = ChatEncoder(tokenizer, template)
    samples, ledger = encode_chats(
        config.chats, encoder, config.seq_len + 1, truncation=config.truncation, bad=config.bad
    )
    seen = [s for s in samples if int(s.digest[:16], 16) % 1000 >= config.held_out_permille]
    unseen = [s for s in samples if int(s.digest[:16], 16) % 1000 < config.held_out_permille]
    if not seen:
        raise ValueError(
            f"sft.chats must leave a chat to train on, got {ledger.read} read, {len(unseen)} held out, "
            f"dropped: {dict(ledger.dropped) or 'none'}"
        )
    _refuse_held_out("task_weights", config.task_weights, [s.task for s in seen], [s.task for s in unseen])
    _refuse_held_out("lang_weights", config.lang_weights, [s.lang for s in seen], [s.lang for s in unseen])
    rows = pack_chats(
        seen,
        config.seq_len,
        epochs=config.epochs,
        task_weights=config.task_weights,
        lang_weights=config.lang_weights,
        seed=seed,
    )
    tokenizer.chat_template = template.text
    return ChatData(encoder, ledger, rows, len(unseen), _first_by_hash(unseen, held_out_tokens))


def _refuse_held_out(
    name: str, weights: Mapping[str, float], seen: Sequence[str], unseen: Sequence[str]
) -> None:
    """A weight of what is not read at all; of a name that is nowhere, pack_chats speaks."""
    for key in sorted((weights.keys() & set(unseen)) - set(seen)):
        raise ValueError(
            f"sft.{name} must name what is trained on, got {key!r}: held out by sft.held_out_permille "
            f"{'is its one chat' if unseen.count(key) == 1 else f'are all {unseen.count(key)} chats of it'}"
        )


def _first_by_hash(samples: Sequence[Sample], max_tokens: int) -> list[Sample]:
    """Of each task the samples of lowest hash, at most `max_tokens` of them, but one at least."""
    room: dict[str, int] = defaultdict(lambda: max_tokens)
    kept = []
    for sample in sorted(samples, key=lambda sample: sample.digest):
        first = sample.task not in room
        if first or len(sample.ids) <= room[sample.task]:
            room[sample.task] -= len(sample.ids)
            kept.append(sample)
    return kept


def chat_loss(
    model: Hebatron, samples: Sequence[Sample], batch_tokens: int, routing: LanguageCounts | None = None
) -> dict[str, float]:
    """Mean nats per learnt token: "all", "task/<name>" and "lang/<name>"; {} without samples.

    Args:
        batch_tokens: of one forward; at least the longest sample's.
        routing: takes the experts chosen for these chats, by their languages.
    The model is left as it was found: mode, counts, gradients and random generators.
    """
    nats: dict[str, float] = defaultdict(float)
    learnt: dict[str, int] = defaultdict(int)
    with evaluating(model):
        for group, rows in _grouped(samples, batch_tokens):
            for row in range(rows.num_rows):
                batch = rows.batch(range(row, row + 1))
                output = model(
                    batch.input_ids.to(model.device),
                    cu_seqlens=batch.cu_seqlens.to(model.device),
                    labels=batch.labels.to(model.device),
                    loss_reduction="sum",
                )
                for name in group:
                    nats[name] += float(output.loss)
                    learnt[name] += int((batch.labels != -100).sum())
                if routing is not None:
                    routing.add(output.aux, *rows.token_languages(batch.rows))
    return {name: nats[name] / learnt[name] for name in sorted(nats)}


def _grouped(samples: Sequence[Sample], batch_tokens: int) -> Iterator[tuple[tuple[str, str, str], ChatRows]]:
    """The names that samples count for, and rows of the samples that count for the same."""
    groups: dict[tuple[str, str], list[Sample]] = defaultdict(list)
    for sample in samples:
        groups[sample.task, sample.lang].append(sample)
    for (task, lang), members in sorted(groups.items()):
        yield ("all", f"task/{task}", f"lang/{lang}"), pack_chats(members, batch_tokens)
