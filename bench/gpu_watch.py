"""Processes of kernels that may fault or hang, each in a session of its own: heard through a file of events, a line of
JSON each, and killed with all they started when they fall silent or time is up.

{"done": ...} is a process's last event. One that ends without it has not done its work.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from common import ROOT

LATE = "out of time"
TEARDOWN_S = 10.0  # of a process that is done, or killed: the driver may hold it for seconds
Event = dict[str, Any]


running: set[subprocess.Popen[bytes]] = set()


def start(words: Sequence[str], log: Path, cwd: Path = ROOT, **environment: str) -> subprocess.Popen[bytes]:
    with log.open("ab") as file:
        process = subprocess.Popen(
            words,
            cwd=cwd,
            env=os.environ | environment,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    running.add(process)
    return process


def end_all_on_sigterm() -> None:
    """A session of its own outlives whoever started it, and a kernel that hangs would disturb what runs next."""

    def end(*_: object) -> None:
        for process in list(running):
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
        os._exit(128 + signal.SIGTERM)

    signal.signal(signal.SIGTERM, end)


def kill(process: subprocess.Popen[bytes]) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)  # what it started too
    with suppress(subprocess.TimeoutExpired):  # one that the driver does not let go of is left behind
        process.wait(TEARDOWN_S)


def said(log: Path, characters: int = 3000) -> str:
    """The end of what a process wrote."""
    if not log.exists():
        return ""
    return log.read_text(encoding="utf-8", errors="replace")[-characters:].strip()


def lines_of(events: Path) -> list[Event]:
    """Every line, but for half of one that a killed process has left."""
    found = []
    text = events.read_text(encoding="utf-8") if events.exists() else ""
    for line in text.split("\n")[:-1]:
        with suppress(json.JSONDecodeError):
            found.append(json.loads(line))
    return found


def watch(
    words: Sequence[str],
    log: Path,
    events: Path,
    take: Callable[[Event], None],
    deadline: float,
    first_s: float,
    silence_s: float,
    **environment: str,
) -> str:
    """Starts a process and hands on each of its events as it comes. "" where it said that it was done, else why it
    ended or was stopped.

    Args:
        events: may hold those of an earlier process; they are not handed on again.
        deadline: of time.monotonic().
        first_s: until the first event: torch from a cold disk, a GPU's first use.
        silence_s: between events; longer than anything should take.
    """
    before = seen = len(lines_of(events))
    process, heard, done = start(words, log, **environment), time.monotonic(), False
    while True:
        ended = process.poll() is not None  # asked before the file is read: nothing comes after that reading
        for event in (found := lines_of(events))[seen:]:
            heard, done = time.monotonic(), "done" in event
            take(event)
        seen = len(found)
        if ended or done:
            break
        late, most = time.monotonic() > deadline, silence_s if seen > before else first_s
        if late or time.monotonic() - heard > most:
            kill(process)
            return LATE if late else f"hung: nothing for {most:.0f} s"
        time.sleep(0.1)
    try:
        status = process.wait(TEARDOWN_S)
    except subprocess.TimeoutExpired:
        kill(process)
    return "" if done else f"the process ended with {status}"
