"""The account of every document that was read: used, or dropped for one reason."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Place:
    """Where a document was found, and the how-manieth document read it is."""

    file: str
    line: int | None = None
    id: str | None = None
    number: int = 0

    @property
    def name(self) -> str:
        return self.file if self.line is None else f"{self.file}:{self.line}"

    def named(self) -> dict[str, Any]:
        return {"file": self.file, "line": self.line} | ({} if self.id is None else {"id": self.id})


NOWHERE = Place("")  # of a document that no file holds


@dataclass
class Ledger:
    """Every document read is used or dropped for one reason; `lines` has one JSON object for each dropped one, in the
    order they were read.

    Its file (name alone), line or row (null for .txt), reason and hash: of its cleaned text, or of its bytes where
    there is no text; its id, if it has one; for a repeat, the file, line, id and hash of the document that stays.
    """

    read: int = 0
    used: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    removed_characters: Counter[str] = field(default_factory=Counter)
    normalized: Counter[str] = field(default_factory=Counter)
    split: Counter[str] = field(default_factory=Counter)  # documents, and the pieces they became
    repeated_ids: int = 0  # used documents whose id an earlier one has: kept, their texts differ
    _lines: list[tuple[int, str]] = field(default_factory=list)

    def drop(self, reason: str, place: Place, hash: bytes, **more: Any) -> None:
        self.dropped[reason] += 1
        line = {**place.named(), "reason": reason, "hash": hash.hex(), **more}
        self._lines.append((place.number, json.dumps(line, ensure_ascii=True)))

    @property
    def lines(self) -> list[str]:
        return [line for _, line in sorted(self._lines)]

    def totals(self) -> dict[str, Any]:
        """For the index; some only where there is any, so that other corpora keep the fingerprint they always had."""
        more: dict[str, Any] = {
            "normalized": dict(sorted(self.normalized.items())),
            "split": dict(sorted(self.split.items())),
            "repeated_ids": self.repeated_ids,
        }
        return {
            "read": self.read,
            "used": self.used,
            "dropped": dict(sorted(self.dropped.items())),
            "removed_characters": {k: n for k, n in sorted(self.removed_characters.items()) if n},
            **{name: value for name, value in more.items() if value},
        }
