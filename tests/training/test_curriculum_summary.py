"""The standard error in the tables of bench/curriculum/summary.py."""

import importlib.util
import math
from pathlib import Path
from typing import Any

import pytest

PATH = Path(__file__).parents[2] / "bench" / "curriculum" / "summary.py"


@pytest.fixture(scope="module")
def summary() -> Any:
    spec = importlib.util.spec_from_file_location("curriculum_summary", PATH)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_items_that_all_seeds_share_are_not_counted_once_a_seed(summary: Any) -> None:
    """Seeds that answer alike say no more than one; seeds that differ leave the error of the items' means."""
    one, none = {"right": {"s": "1100"}}, {"right": {"s": "0000"}}
    error = 100 * math.sqrt(4 * 0.25 / 3 / 4)
    for seeds in (1, 2, 5):
        runs = {"a": dict.fromkeys(range(seeds), one), "b": dict.fromkeys(range(seeds), none)}
        assert summary.difference(runs, "a", "b", ["s"]) == ([50.0] * seeds, pytest.approx(error))
    runs = {"a": {0: one, 1: {"right": {"s": "0011"}}}, "b": {0: none, 1: none}}
    assert summary.difference(runs, "a", "b", ["s"]) == ([50.0, 50.0], 0.0)
