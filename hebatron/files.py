"""What every writer of a durable folder needs: fsync by path, sha256 of a file, a folder that appears whole; a place
to write to, checked before the work."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path


def fsync(path: Path) -> None:
    """Flush a file's contents, or a folder's entries, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """An empty folder to fill, which takes the place of `out`, and of what was there, if the block ends well.

    Otherwise nothing is left of it, and `out` is as it was. What the block writes it must fsync itself.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    old, folder = scratch / "old", scratch / "corpus"
    try:
        folder.mkdir()
        yield folder
        try:
            if out.exists():
                out.rename(old)  # killed between these two lines, the old folder stays in `scratch`
            folder.rename(out)
        except BaseException:
            if old.exists() and not out.exists():
                old.rename(out)
            raise
        fsync(out.parent)
    finally:
        if out.exists() or not old.exists():  # never the only copy of what was there
            shutil.rmtree(scratch, ignore_errors=True)


def check_writable(path: Path, what: str) -> None:
    """Raises ValueError, before any work, where `path` cannot become a file; nothing is left there."""
    if not path.parent.is_dir():
        raise ValueError(f"{what} must be in a folder that exists, got {path}")
    if path.is_dir():
        raise ValueError(f"{what} must be a file, got the folder {path}")
    try:
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise ValueError(
            f"{what} must be in a folder that can be written to, got {path}: {error.strerror}"
        ) from error


def replace_text(path: Path, text: str) -> None:
    """Write a file so that it is there whole or as it was."""
    tmp = path.with_name(f".tmp-{path.name}")
    tmp.write_text(text, encoding="utf-8")
    fsync(tmp)
    os.replace(tmp, path)
