"""What bench/gpu_check.sh knows so far, and where it is written: every few seconds into bench/results (from the build
on) and the folder of --keep, so that a run which is stopped from outside leaves what it has."""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gpu_tiles
from common import ROOT
from gpu_table import README, RESULTS, generated, rewritten

LOG_BYTES = 300_000  # of each log in the folder of --keep: its end
SAVED_EVERY_S = 5.0


def tree_commit() -> str:
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=10"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:  # a machine without git
        return "unknown"
    return done.stdout.strip() or "unknown"


class Record:
    """The steps' findings, which may come from several threads, and the clock of the step that is going on."""

    def __init__(self, options: argparse.Namespace, work: Path) -> None:
        self.dry, self.work, self.keep = options.dry_run, work, options.keep
        self.commit = options.commit or tree_commit()
        self.checks: list[dict[str, Any]] = []
        self.steps: list[dict[str, Any]] = []
        self.skipped: list[str] = []
        self.facts: dict[str, Any] = {"machine": {}, "kernels": {}, "toolkit": 0, "compilers": {}}
        self.timings: dict[str, Any] = {}
        self.doing = ""  # the step; where a record still names one, it was stopped there
        self.path: Path | None = None  # in bench/results, once the GPU is known
        self.lock = threading.Lock()
        self.deadline = 0.0

    def left(self) -> float:
        return max(self.deadline - time.monotonic(), 0.0)

    def check(self, kernel: str, check: str, passed: bool, detail: str = "", name: str = "") -> None:
        self.checks.append(
            {"kernel": kernel, "check": check, "name": name, "passed": passed, "detail": detail}
        )

    def contents(self) -> dict[str, Any]:
        machine = self.facts["machine"]
        return {
            "gpu": machine.get("gpu", "DRY RUN"),
            "arch": machine.get("arch", "sm_90"),
            "date": time.strftime("%Y-%m-%d", time.gmtime()),
            "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "doing": self.doing,
            "torch": machine.get("torch", "-"),
            "toolkit": self.facts["toolkit"],
            "compilers": self.facts["compilers"],
            "dry_run": self.dry,
            "commit": self.commit,
            "command": "bench/gpu_check.sh " + " ".join(sys.argv[1:]),
            "machine": machine,
            "kernels": self.facts["kernels"],
            "steps": list(self.steps),
            "checks": list(self.checks),
            "skipped": list(self.skipped),
            "ceilings": self.timings.get("ceilings", {}),
            "timings": list(self.timings.get("rows", [])),
        }

    def save(self) -> None:
        """Each file whole or not at all: the process may be killed in between."""
        with self.lock:
            found = self.contents()
            if self.path is None and not self.dry and found["machine"]:
                self.path = result_path(RESULTS, found)
            places = [self.path] if self.path is not None else []
            if self.keep is not None:
                places.append(self.keep / "so_far.json")
                _replace(self.keep / "logs.txt", "".join(map(_end, sorted(self.work.glob("*.log")))))
            for place in places:
                _replace(place, json.dumps(found, indent=1) + "\n")

    @contextmanager
    def saved(self) -> Iterator[None]:
        """Every few seconds while this lasts, and at its end."""
        over = threading.Event()

        def again() -> None:
            while not over.wait(SAVED_EVERY_S):
                self.save()

        thread = threading.Thread(target=again, daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()
            self.save()

    def conclude(self) -> str:
        """The record finished, the evidence table, the README's table and that of tiles."""
        from hebatron_kernels import _evidence  # here: the build before it may have made the modules anew

        self.doing = ""
        if self.dry:
            return self._conclude_dry()
        self.save()
        if self.path is None:
            raise RuntimeError("no GPU was seen: there is nothing to record")
        for kernel, said in _evidence.record(self.path).items():
            print(f"evidence: {kernel}: {said}")
        README.write_text(rewritten(README.read_text(encoding="utf-8"), generated()), encoding="utf-8")
        gpu_tiles.main(str(self.path))
        for path in (self.path, README, gpu_tiles.TILES, _evidence.TABLE) if self.keep is not None else ():
            shutil.copy2(path, self.keep / path.name)
        return str(self.path.relative_to(ROOT))

    def _conclude_dry(self) -> str:
        from hebatron_kernels import _evidence

        path = result_path(self.work, self.contents())
        _replace(path, json.dumps(self.contents(), indent=1) + "\n")
        try:
            _evidence.record(path)
        except ValueError as refusal:
            print(f"evidence, as it must: {refusal}")
        else:
            raise RuntimeError("the evidence table took a dry run")
        rewritten(README.read_text(encoding="utf-8"), generated(self.work))
        tiles = gpu_tiles.measured(self.timings.get("rows", []), 1)
        gpu_tiles.rewritten(gpu_tiles.TILES.read_text(encoding="utf-8"), tiles)
        if self.keep is not None:
            shutil.copy2(path, self.keep / path.name)
        return "refused as evidence, table made and thrown away"


def result_path(folder: Path, found: dict[str, Any]) -> Path:
    """A second run of a day on one GPU does not write over the first."""
    gpu = re.sub(r"[^a-z0-9]+", "-", found["gpu"].lower().removeprefix("nvidia ")).strip("-")
    stem = f"{found['date']}-{gpu}"
    names = (f"{stem}.json", *(f"{stem}-{i}.json" for i in range(2, 1000)))
    return next(folder / name for name in names if not (folder / name).exists())


def _replace(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(path.name + ".new")
    draft.write_text(text, encoding="utf-8")
    draft.replace(path)


def _end(log: Path) -> str:
    return f"\n==== {log.name}\n{log.read_bytes()[-LOG_BYTES:].decode(errors='replace')}"
