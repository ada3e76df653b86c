"""The folders that a run file reads: one that is missing is named with the command that makes it."""

from __future__ import annotations

import tomllib
from pathlib import Path

from .sections import RunConfig


def check_inputs(config: RunConfig, run_file: Path) -> None:
    """Raises ValueError for the first input that is not there, before anything is opened.

    What a run leaves is made by the run file beside `run_file` that has its run_dir, or by the quickstart; corpora and
    tokenizers by `hebatron data prepare`.
    """
    data, prepare = config.data, "hebatron data prepare TEXT... --out"
    needed: list[tuple[str, Path | None, str | None]] = [
        ("data.tokenizer", data.tokenizer, f"{prepare} CORPUS --train-tokenizer {data.tokenizer}"),
        ("model.path", config.model.path, None),
        ("anchor_kl.base", config.anchor_kl.base, None),
    ]
    for section in ("corpora", "held_out"):
        for i, corpus in enumerate(getattr(data, section)):
            made = f"{prepare} {corpus.path} --tokenizer {data.tokenizer}"
            needed.append((f"data.{section}[{i}].path", corpus.path, made))
    for i, chats in enumerate(config.sft.chats if config.sft else ()):
        needed.append((f"sft.chats[{i}]", chats, None))
    for place, path, command in needed:
        if path is not None and not path.exists():
            command = _run_command(path, run_file) or command
            told = f"; make it with: {command}" if command else ""
            where = "" if path.is_absolute() else f" in {Path.cwd()}"
            raise ValueError(f"{run_file}: {place} must exist, got {path}, which is not there{where}{told}")


def _run_command(path: Path, run_file: Path) -> str | None:
    if Path("runs/quickstart") in path.parents:
        return "hebatron quickstart"
    for file in sorted(run_file.parent.glob("*.toml")):
        try:
            run_dir = tomllib.loads(file.read_text(encoding="utf-8")).get("run_dir")
        except (tomllib.TOMLDecodeError, UnicodeDecodeError):
            continue  # not this one's fault
        if isinstance(run_dir, str) and Path(run_dir) in path.parents:
            return f"hebatron train {file}"
    return None
