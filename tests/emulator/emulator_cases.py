"""The cases of tests/emulator/cases as a library in this process, plain and checked."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

from hebatron_kernels.testing import build_emulator, emulator_lacks

HERE = Path(__file__).resolve().parent
MODES = ("eager", "lazy", "random")


@dataclass
class Statistics:
    launches: int
    switches: int
    async_operations: int
    matrix_operations: int


class Library:
    """One build of the cases."""

    def __init__(self, checked: bool):
        self._library = ctypes.CDLL(str(build_emulator(checked, "emulator_cases") / "libemulator_cases.so"))
        self._library.run_case.argtypes = [ctypes.c_char_p, ctypes.c_int, ctypes.c_uint64, ctypes.c_int]
        for name in ("run_case", "case_names"):
            getattr(self._library, name).restype = ctypes.c_char_p
        self._library.case_output.restype = ctypes.c_void_p
        self.names = self._library.case_names().decode().split()

    def run(self, name: str, mode: str = "lazy", seed: int = 0, sms: int = 3) -> str:
        """Empty when the case ran and its result was right; else the report, or "wrong: ..."."""
        report = self._library.run_case(name.encode(), MODES.index(mode), seed, sms)
        return report.decode() if report else ""

    def output(self) -> bytes:
        size = ctypes.c_uint64()
        at = self._library.case_output(ctypes.byref(size))
        return ctypes.string_at(at, size.value) if size.value else b""

    def statistics(self) -> Statistics:
        """Of the last case."""
        four = (ctypes.c_uint64 * 4)()
        self._library.case_statistics(four)
        return Statistics(*four)

    def function(self, name: str, *argument_types: type) -> Callable[..., bytes | None]:
        found = getattr(self._library, name)
        found.argtypes = argument_types
        found.restype = ctypes.c_char_p
        return found


@cache
def library(checked: bool) -> Library:
    lacks = emulator_lacks()
    if lacks is not None:
        pytest.skip(f"the emulator needs {lacks}")
    return Library(checked)


@cache
def markers() -> dict[str, str]:
    """What a report says of the line that carries each `// LINE: marker`."""
    found: dict[str, str] = {}
    for source in sorted(HERE.glob("cases/*.cu")):
        for number, line in enumerate(source.read_text().splitlines(), 1):
            for marker in re.findall(r"// LINE: (\S+)", line):
                assert marker not in found, f"{source.name}:{number}: the marker {marker} is not unique"
                found[marker] = f"tests/emulator/cases/{source.name}:{number}"
    return found
