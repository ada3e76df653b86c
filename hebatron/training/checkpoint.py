"""Training checkpoints: atomic folders of safetensors and JSON, each file under a sha256 manifest.

    run_dir/checkpoints/step-000123/
        model.safetensors      parameters (fp32 masters) and persistent buffers, by the module's names; where
                               adapters train on a frozen model, these alone
        optimizer.safetensors  "<parameter>.<state>", for example "lm_head.weight.exp_avg"
        state.json             step, plan hash, resolved configurations of run and model, random generator
        manifest.json          size and sha256 of the three files above

A folder is written under a temporary name, every file and the folder are fsynced, then it is renamed and
the parent is fsynced: whatever moment the process dies at, a reader sees the old set of checkpoints or
the new one. Nothing is pickled. Everything read is checked before anything in memory changes.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ..files import file_sha256, fsync

MODEL, OPTIMIZER = "model.safetensors", "optimizer.safetensors"
STATE, MANIFEST = "state.json", "manifest.json"
FORMAT = 1
MAX_NAMES_SHOWN = 10  # a renamed layer makes hundreds of mismatches; ten are enough to see the pattern
MAX_JSON_BYTES = 16 << 20

_STEP_NAME = re.compile(r"step-(\d{6,})")
_TMP_PREFIX = ".tmp-"


class CheckpointError(ValueError):
    """A checkpoint that must not be loaded: the message names the file, what was expected and what came."""


# ---------------------------------------------------------------- writing


def save_checkpoint(
    root: Path, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, state: Mapping[str, Any]
) -> Path:
    """Write checkpoint `step` under `root`; durable when this returns. An intact one of that step is kept.

    Raises CheckpointError, before anything is written, when a tensor is not finite: the older checkpoints are the
    only good state then. Raises OSError naming the file when the disk is full; nothing half-written is left.
    """
    tensors = {MODEL: model_tensors(model), OPTIMIZER: _optimizer_tensors(model, optimizer)}
    wrong = [name for group in tensors.values() for name, tensor in group.items() if not _finite(tensor)]
    if wrong:
        shown = ", ".join(wrong[:MAX_NAMES_SHOWN])
        raise CheckpointError(
            f"checkpoint: step {step} must be finite to be saved, got NaN or Inf in {shown}"
        )
    final = root / f"step-{step:06d}"
    root.mkdir(parents=True, exist_ok=True)
    remove_stale(root)
    if final.exists():
        try:
            verify(final)
        except CheckpointError:
            shutil.rmtree(final)  # damaged: older checkpoints were used to get here again
        else:
            return final
    tmp = root / f"{_TMP_PREFIX}{final.name}"
    record = {"format": FORMAT, "step": step, "rng": _rng_to_json(), **state}
    try:
        tmp.mkdir()
        for name, group in tensors.items():
            _write_tensors(tmp / name, group)
        (tmp / STATE).write_text(json.dumps(record, indent=1, ensure_ascii=False), encoding="utf-8")
        files = {name: _entry(tmp / name) for name in (MODEL, OPTIMIZER, STATE)}
        manifest = json.dumps({"format": FORMAT, "files": files}, indent=1)
        (tmp / MANIFEST).write_text(manifest, encoding="utf-8")
        for name in (*files, MANIFEST):
            fsync(tmp / name)
        fsync(tmp)
        os.rename(tmp, final)
    except OSError as error:
        shutil.rmtree(tmp, ignore_errors=True)
        error.filename = error.filename or str(tmp)
        raise
    fsync(root)
    return final


def _finite(tensor: Tensor) -> bool:
    return not tensor.is_floating_point() or bool(torch.isfinite(tensor).all())


def _write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    try:
        save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, path)
    except SafetensorError as error:  # what safetensors makes of a full disk: "... (os error 28)"
        found = re.search(r"os error (\d+)", str(error))
        number = int(found[1]) if found else errno.EIO
        raise OSError(number, os.strerror(number), str(path)) from error


def remove_old(root: Path, step: int, keep_last: int) -> None:
    """Delete all but the newest `keep_last` checkpoints up to `step`.

    A later one was damaged, or the run would have gone on from it: it must not push out those that are intact.
    """
    for folder in [folder for folder in checkpoints(root) if step_of(folder) <= step][keep_last:]:
        # Renamed first: a half-deleted folder must not look like a damaged checkpoint.
        doomed = folder.with_name(f"{_TMP_PREFIX}old-{folder.name}")
        os.rename(folder, doomed)
        shutil.rmtree(doomed)


def remove_stale(root: Path) -> None:
    """Delete what an interrupted save or delete left behind."""
    for left in root.glob(f"{_TMP_PREFIX}*"):
        shutil.rmtree(left)


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers by name; a tied weight appears once (safetensors refuses aliases).

    Of a model with adapters on frozen weights the adapters alone: the rest is where it came from.
    """
    names = dict(model.named_parameters())
    trained = {name: parameter for name, parameter in names.items() if parameter.requires_grad}
    if 0 < len(trained) < len(names):
        return dict(trained)
    persistent = model.state_dict().keys()
    return names | {name: buffer for name, buffer in model.named_buffers() if name in persistent}


def _optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"{name}.{key}"] = value
    return tensors


def _entry(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": file_sha256(path)}


# ---------------------------------------------------------------- reading


def checkpoints(root: Path) -> list[Path]:
    """Checkpoint folders under `root`, newest first; nothing is opened."""
    if not root.is_dir():
        return []
    return sorted(
        (path for path in root.iterdir() if _STEP_NAME.fullmatch(path.name)), key=step_of, reverse=True
    )


def step_of(folder: Path) -> int:
    """The step a checkpoint folder's name states."""
    return int(folder.name.removeprefix("step-"))


def newest_valid(root: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint whose manifest holds, and one notice for each damaged one passed over.

    Raises CheckpointError when there are checkpoints and none is intact: starting again from step 0 would
    silently throw the run away.
    """
    notices: list[str] = []
    for folder in checkpoints(root):
        try:
            verify(folder)
        except CheckpointError as error:
            notices.append(f"skipped damaged {folder.name}: {error}")
        else:
            return folder, notices
    if notices:
        raise CheckpointError(
            f"checkpoint: {root} must hold an intact checkpoint, got: " + "; ".join(notices)
        )
    return None, notices


def verify(folder: Path) -> None:
    """Check that the folder holds exactly the manifest's files with the sizes and sha256 it states."""
    files = read_json(folder / MANIFEST).get("files")
    wanted = {MODEL, OPTIMIZER, STATE}
    if not isinstance(files, dict) or set(files) != wanted:
        raise CheckpointError(
            f"checkpoint: {folder / MANIFEST} must list {sorted(wanted)}, got {files!r:.200}"
        )
    present = {path.name for path in folder.iterdir()}
    if present != wanted | {MANIFEST}:
        shown = sorted(present)[:MAX_NAMES_SHOWN]
        raise CheckpointError(f"checkpoint: {folder} must hold {sorted(wanted | {MANIFEST})}, got {shown}")
    for name, entry in files.items():
        path = folder / name
        _require_regular(path)
        expected = (entry.get("bytes"), entry.get("sha256")) if isinstance(entry, dict) else (None, None)
        size = path.stat().st_size
        if size != expected[0]:
            raise CheckpointError(f"checkpoint: {path} must have {expected[0]} bytes, got {size}")
        if (digest := file_sha256(path)) != expected[1]:
            raise CheckpointError(f"checkpoint: {path} must have sha256 {expected[1]}, got {digest}")


def read_json(path: Path) -> dict[str, Any]:
    """Read one JSON object of bounded size from a regular file."""
    _require_regular(path)
    if (size := path.stat().st_size) > MAX_JSON_BYTES:
        raise CheckpointError(f"checkpoint: {path} must be at most {MAX_JSON_BYTES} bytes, got {size}")
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:  # no UTF-8, no JSON, or a number of 5,000 digits
        raise CheckpointError(f"checkpoint: {path} must be valid JSON, got {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"checkpoint: {path} must hold a JSON object, got {type(value).__name__}")
    return value


def load_state(folder: Path) -> dict[str, Any]:
    """Read and check state.json."""
    state = read_json(folder / STATE)
    if state.get("format") != FORMAT:
        raise CheckpointError(
            f"checkpoint: {folder / STATE} must have format {FORMAT}, got {state.get('format')!r}"
        )
    step = state.get("step")
    if type(step) is not int or folder.name != f"step-{step:06d}":
        raise CheckpointError(f"checkpoint: {folder / STATE} must state the step of its folder, got {step!r}")
    return state


def load_checkpoint(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Verify `folder`, then put its tensors into `model`, `optimizer` and the random generator.

    Every name, shape, dtype and value is checked before the first byte is copied. Returns state.json.
    """
    verify(folder)
    state = load_state(folder)
    rng = _rng_from_json(folder, state)
    model_targets = model_tensors(model)
    weights = _read_tensors(folder / MODEL, model_targets)
    optimizer_targets = _optimizer_tensors(model, optimizer)
    moments = _read_tensors(folder / OPTIMIZER, optimizer_targets)
    with torch.no_grad():
        for name, target in model_targets.items():
            target.copy_(weights[name])
        for name, target in optimizer_targets.items():
            target.copy_(moments[name])
    torch.set_rng_state(rng)
    return state


def load_weights(folder: Path, model: nn.Module) -> None:
    """Verify `folder`, then put its weights into `model`: all that generation and evaluation need."""
    verify(folder)
    targets = model_tensors(model)
    weights = _read_tensors(folder / MODEL, targets)
    with torch.no_grad():
        for name, target in targets.items():
            target.copy_(weights[name])


def _read_tensors(path: Path, targets: Mapping[str, Tensor]) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            names = set(file.keys())
            wrong = [f"missing {name}" for name in sorted(targets.keys() - names)]
            wrong += [f"unexpected {name}" for name in sorted(names - targets.keys())]
            loaded: dict[str, Tensor] = {}
            for name in sorted(names & targets.keys()):
                tensor, target = file.get_tensor(name), targets[name]
                if tensor.shape != target.shape or tensor.dtype != target.dtype:
                    wrong.append(
                        f"{name} must be {tuple(target.shape)} {target.dtype}, "
                        f"got {tuple(tensor.shape)} {tensor.dtype}"
                    )
                elif not _finite(tensor):
                    wrong.append(f"{name} must be finite, got NaN or Inf")
                loaded[name] = tensor
    except SafetensorError as error:
        raise CheckpointError(f"checkpoint: {path} must be a safetensors file, got {error}") from error
    if wrong:
        shown = "; ".join(f"{text:.200}" for text in wrong[:MAX_NAMES_SHOWN])
        raise CheckpointError(
            f"checkpoint: {path} must match the model, got {len(wrong)} differences: {shown}"
        )
    return loaded


def _require_regular(path: Path) -> None:
    if path.is_symlink() or not path.is_file():
        kind = "a link" if path.is_symlink() else "another kind of file" if path.exists() else "no file"
        raise CheckpointError(f"checkpoint: {path} must be a regular file, got {kind}")


def _rng_to_json() -> str:
    return torch.get_rng_state().numpy().tobytes().hex()


def _rng_from_json(folder: Path, state: Mapping[str, Any]) -> Tensor:
    expected = torch.get_rng_state().numel()
    text = state.get("rng")
    if not isinstance(text, str) or not re.fullmatch(f"[0-9a-f]{{{2 * expected}}}", text):
        raise CheckpointError(
            f"checkpoint: {folder / STATE} rng must be {expected} bytes in hex, got {text!r:.40}"
        )
    return torch.tensor(list(bytes.fromhex(text)), dtype=torch.uint8)


# ---------------------------------------------------------------- one trainer per folder


@contextmanager
def run_lock(run_dir: Path) -> Iterator[None]:
    """Hold the run folder: a second trainer is refused. The kernel drops the lock when the process dies."""
    run_dir.mkdir(parents=True, exist_ok=True)
    with (run_dir / "lock").open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                raise
            file.seek(0)
            holder = file.read().strip() or "unknown"
            raise ValueError(
                f"train: run_dir must not be in use, got {run_dir} held by process {holder}"
            ) from error
        file.seek(0)
        file.truncate()
        file.write(f"{os.getpid()}\n")
        file.flush()
        yield
