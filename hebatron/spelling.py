"""What an unknown word may have meant."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any


def did_you_mean(word: Any, choices: Iterable[Any]) -> str:
    """The end of an error message: the choice closest to `word`, or nothing where none is close."""
    close = difflib.get_close_matches(str(word), [str(choice) for choice in choices], n=1)
    return f"; did you mean {close[0]!r}?" if close else ""
