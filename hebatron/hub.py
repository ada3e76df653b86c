"""Checkpoints in the hub's layout: config.json and safetensors, read and written shard by shard.

Names on disk are the hub's (`backbone.*`, one tensor per expert); in memory an expert layer is two 3-D tensors. A
checkpoint is untrusted input: no pickle, no code, no file outside its folder, and nothing is guessed. Whatever does
not fit the config is refused before a weight is read.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .config import ModelConfig, read_json
from .files import fsync
from .model import AtLeastFloat32, Experts, Hebatron, check_dtype

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
ORIGINAL = "hebatron.json"  # what an export had to change in config.json; read by ModelConfig.load
FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
SHARD_BYTES = 5_000_000_000
TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "merges.txt", "tokenizer.model", "chat_template.jinja"),
)


def hub_tensors(model: Hebatron) -> dict[str, Tensor]:
    """Every tensor of a checkpoint by its hub name, in layer order: views of the model's own parameters."""
    tensors: dict[str, Tensor] = {}
    experts = {name for name, module in model.named_modules() if isinstance(module, Experts)}
    for name, tensor in model.state_dict(keep_vars=True).items():
        owner, _, leaf = name.rpartition(".")
        if owner in experts:
            for index, matrix in enumerate(tensor.detach().unbind(0)):
                tensors[f"{owner}.{index}.{leaf}.weight"] = matrix
        else:
            tensors[name] = tensor.detach()
    return tensors


def kept_names(model: Hebatron, names: Iterable[str]) -> set[str]:
    """Those of the tensors that stay at least fp32 in memory, packed or not."""
    owners = {name for name, module in model.named_modules() if isinstance(module, AtLeastFloat32)}
    return {name for name in names if name.rpartition(".")[0] in owners}


def from_pretrained(
    folder: str | Path, dtype: torch.dtype | None = None, device: torch.device | str | None = None
) -> Hebatron:
    """Load a model from a folder in the hub's layout.

    Args:
        folder: with config.json and model.safetensors, or an index and its shards.
        dtype: of the parameters; None: as the embeddings are stored, fp16 as fp32. Decays, step biases and routers
            are fp32 at least.
        device: where to load to; None: the CPU.

    Raises:
        ValueError: a file is missing, damaged or leads out of the folder; tensors are missing, unknown, of another
            shape or not floating (up to 10 are named); a weight is NaN or infinite.
    """
    root = Path(folder)
    if not root.is_dir():
        absent = "" if root.exists() else ", which does not exist"
        raise ValueError(f"from_pretrained: folder must be a folder, got {str(folder)!r}{absent}")
    if dtype is not None:
        check_dtype("from_pretrained: dtype", dtype)
    root = root.resolve()
    _plain_file(root, "config.json")
    if os.path.lexists(root / ORIGINAL):
        _plain_file(root, ORIGINAL)
    model = Hebatron(ModelConfig.load(root), device="meta")
    expected = {name: tuple(tensor.shape) for name, tensor in hub_tensors(model).items()}
    shards, index = _find_shards(root)
    stored = _check_tensors(root, shards, index, expected, model.config.tie_word_embeddings)
    own = stored["backbone.embeddings.weight"]
    model.to(dtype or (torch.float32 if own == torch.float16 else own)).to_empty(device=device or "cpu")
    model.tie()
    kept = kept_names(model, stored)
    model.stored_dtypes = {n: stored[n] for n in kept if stored[n].itemsize < 4}
    targets = hub_tensors(model)
    tied_head = None
    for file in shards:
        with _open(file) as shard:
            for name in shard.keys():
                if name == "lm_head.weight" and model.config.tie_word_embeddings:
                    tied_head = file  # the same memory as the embeddings: compared below
                elif name in targets:
                    targets[name].copy_(_finite(file, name, shard.get_tensor(name)))
    if tied_head is not None:
        with _open(tied_head) as shard:
            head = _finite(tied_head, "lm_head.weight", shard.get_tensor("lm_head.weight"))
        if not torch.equal(head.to(targets["lm_head.weight"]), targets["lm_head.weight"]):
            raise ValueError(
                f"{tied_head}: lm_head.weight must equal the embeddings it is tied to, got other values"
            )
    return model


def save_pretrained(
    model: Hebatron, folder: str | Path, dtype: torch.dtype | None = None, shard_bytes: int = SHARD_BYTES
) -> None:
    """Write a checkpoint in the hub's layout; the folder appears whole or not at all.

    Args:
        model: what to write.
        folder: new or empty.
        dtype: of the tensors; None: as they are. Those kept at fp32 are written so, but in a narrower dtype where
            that is asked for and they came in it.
        shard_bytes: the most a file holds (a larger single tensor is a file of its own).

    Raises:
        ValueError: the folder is in use, or a weight is NaN or infinite.
        OSError: a file cannot be written, by its name.
    """
    with _new_folder(folder) as target:
        _write_weights(model, target, dtype, shard_bytes)
        _write_json(target / "config.json", _hub_config(model, dtype))


def export_hf(
    model: Hebatron,
    tokenizer_folder: str | Path | None,
    out: str | Path,
    dtype: torch.dtype | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write a folder that transformers and the serving engines open as it is.

    transformers clamps the step at `time_step_min` instead of `time_step_limit`; the exported config says in that
    field what this model computes with, and hebatron.json keeps the original.

    Args:
        model: what to write.
        tokenizer_folder: its tokenizer's files are copied; None: none.
        out: new or empty.
        dtype, shard_bytes: as in `save_pretrained`.
    """
    config = model.config
    low, high = config.time_step_limit
    if high != math.inf:
        raise ValueError(
            f"export_hf: time_step_limit must have no upper limit, transformers knows none, got {high}"
        )
    source = None if tokenizer_folder is None else Path(tokenizer_folder)
    if source is not None and not (source / "tokenizer.json").is_file():
        raise ValueError(f"export_hf: tokenizer_folder must hold tokenizer.json, got {str(source)!r}")
    with _new_folder(out) as target:
        _write_weights(model, target, dtype, shard_bytes)
        _write_json(target / "config.json", _hub_config(model, dtype) | {"time_step_min": low})
        _write_json(target / ORIGINAL, {"config": {"time_step_min": config.time_step_min}})
        write_generation_config(config, target)
        for name in TOKENIZER_FILES if source is not None else ():
            if source is not None and (source / name).is_file():
                shutil.copyfile(source / name, target / name)


def write_generation_config(config: ModelConfig, folder: Path) -> None:
    """Which tokens begin, pad and end a text, where transformers and the serving engines look for them."""
    tokens: dict[str, Any] = {"bos_token_id": config.bos_token_id, "pad_token_id": config.pad_token_id}
    tokens["eos_token_id"] = list(config.eos_token_ids) or None
    _write_json(folder / "generation_config.json", {n: v for n, v in tokens.items() if v is not None})


# ---- reading


def _find_shards(root: Path) -> tuple[list[Path], dict[str, str] | None]:
    """The files, and of which file the index says each tensor is."""
    if (root / SINGLE).exists():
        return [_plain_file(root, SINGLE)], None
    if not (root / INDEX).exists():
        pickles = [
            f.name for f in sorted(root.iterdir()) if f.suffix in (".bin", ".pt", ".pth", ".pkl", ".ckpt")
        ]
        found = f"only {pickles[0]}; pickled weights are never opened, convert them" if pickles else "neither"
        raise ValueError(f"{root}: must hold {SINGLE} or {INDEX}, got {found}")
    weight_map = read_json(_plain_file(root, INDEX)).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(
            f"{root / INDEX}: weight_map must be an object with entries, got {type(weight_map).__name__}"
        )
    for name in weight_map.values():
        plain = isinstance(name, str) and name.endswith(".safetensors") and not set(name) & set("/\\\0")
        if not plain:
            raise ValueError(
                f"{root / INDEX}: weight_map must name .safetensors files of this folder, got {name!r}"
            )
    return [_plain_file(root, name) for name in sorted(set(weight_map.values()))], weight_map


def _plain_file(root: Path, name: str) -> Path:
    """A regular file in the folder. A link must stay in the folder or, in the hub's cache, in its repository."""
    file = root / name
    if not file.is_file():
        raise ValueError(
            f"{root}: {name} must be a file, found {'something else' if file.exists() else 'none'}"
        )
    home = root.parents[1] if root.parent.name == "snapshots" else root
    if home not in file.resolve().parents:
        raise ValueError(f"{root}: {name} must not lead out of {home}, got a link to {file.resolve()}")
    return file


@contextmanager
def _open(file: Path) -> Iterator[Any]:
    _check_length(file)
    try:
        with safe_open(file, framework="pt", device="cpu") as shard:
            yield shard
    except SafetensorError as error:
        raise ValueError(f"{file}: must be a whole safetensors file, got {error}") from None


def _check_length(file: Path) -> None:
    """The header says where the last tensor ends: name both sizes when the file is shorter or longer."""
    size = file.stat().st_size
    with file.open("rb") as f:
        header_bytes = int.from_bytes(f.read(8), "little") if size >= 8 else size
        if 8 + header_bytes > size:
            raise ValueError(
                f"{file}: must hold a header of {header_bytes:,} bytes, got {size:,} bytes in all"
            )
        if header_bytes > 100_000_000:
            raise ValueError(f"{file}: header must be at most 100,000,000 bytes, got {header_bytes:,}")
        try:
            header = json.loads(f.read(header_bytes))
            ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
            expected = 8 + header_bytes + max(ends, default=0)
        except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError):
            raise ValueError(f"{file}: header must be a safetensors header, got something else") from None
    if expected != size:
        raise ValueError(f"{file}: must have {expected:,} bytes by its header, got {size:,}")


def _check_tensors(
    root: Path,
    shards: list[Path],
    index: dict[str, str] | None,
    expected: dict[str, tuple[int, ...]],
    tied: bool,
) -> dict[str, torch.dtype]:
    """Compare every name, shape and dtype with the config and every place with the index, before anything is loaded."""
    stored: dict[str, torch.dtype] = {}
    problems: list[str] = []
    ignored = 0
    for file in shards:
        with _open(file) as shard:
            for name in shard.keys():
                view = shard.get_slice(name)
                shape, dtype = tuple(view.get_shape()), view.get_dtype()
                if name.startswith("mtp."):
                    ignored += 1
                elif name not in expected:
                    problems.append(f"{name} is not in this model")
                elif index is not None and index.get(name) != file.name:
                    problems.append(f"{name} is in {file.name}, the index says {index.get(name)}")
                elif shape != expected[name]:
                    problems.append(f"{name} has shape {shape}, the config says {expected[name]}")
                elif dtype not in FLOATS:
                    problems.append(f"{name} has dtype {dtype}")
                else:
                    stored[name] = FLOATS[dtype]
    named = {problem.split(" ", 1)[0] for problem in problems}
    promised = [name for name in index or () if not name.startswith("mtp.")]
    needed = [name for name in expected if name != "lm_head.weight" or not tied]
    there = stored.keys() | named
    problems += [f"{name} is missing" for name in dict.fromkeys(needed + promised) if name not in there]
    if problems:
        shown = "; ".join(problems[:10]) + (f"; and {len(problems) - 10} more" if len(problems) > 10 else "")
        raise ValueError(
            f"{root}: tensors must be those of config.json, got {len(problems)} that differ: {shown}"
        )
    if ignored:
        warnings.warn(
            f"{root}: {ignored} mtp.* tensors are ignored; there is no multi-token prediction", stacklevel=4
        )
    return stored


def _finite(file: Path | str, name: str, tensor: Tensor) -> Tensor:
    if not bool(torch.isfinite(tensor).all()):
        raise ValueError(f"{file}: {name} must be finite, got NaN or infinity")
    return tensor


# ---- writing


def _hub_config(model: Hebatron, dtype: torch.dtype | None) -> dict[str, Any]:
    stored = dtype or model.backbone.embeddings.weight.dtype
    hub = model.config.to_hub() | {"torch_dtype": str(stored).removeprefix("torch.")}
    hub.pop("dtype", None)
    return hub


def _write_weights(model: Hebatron, folder: Path, dtype: torch.dtype | None, shard_bytes: int) -> None:
    tensors = hub_tensors(model)
    kept = kept_names(model, tensors)
    rest = dtype or model.backbone.embeddings.weight.dtype

    def written(name: str) -> torch.dtype:
        if name not in kept:
            return dtype or tensors[name].dtype
        return rest if model.stored_dtypes.get(name) == rest else torch.promote_types(rest, torch.float32)

    shards: list[list[str]] = [[]]
    room = shard_bytes
    for name, tensor in tensors.items():
        size = tensor.numel() * written(name).itemsize
        if size > room and shards[-1]:
            shards.append([])
            room = shard_bytes
        shards[-1].append(name)
        room -= size
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, 1):
        file = SINGLE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        # copies, because an expert is a view of a larger tensor; one shard at a time is in memory twice
        copies = {n: tensors[n].to("cpu", written(n), copy=True).contiguous() for n in names}
        for name, tensor in copies.items():
            _finite(file, name, tensor)
        try:
            save_file(copies, folder / file, metadata={"format": "pt"})
        except SafetensorError as error:  # how a full disk comes
            raise OSError(f"{folder / file}: must be written whole, got {error}") from None
        weight_map |= {name: file for name in names}
    if len(shards) > 1:
        total = sum(t.numel() * written(name).itemsize for name, t in tensors.items())
        _write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _write_json(file: Path, value: dict[str, Any]) -> None:
    file.write_text(json.dumps(value, indent=2, sort_keys=True, allow_nan=False) + "\n", encoding="utf-8")


@contextmanager
def _new_folder(folder: str | Path) -> Iterator[Path]:
    """A folder beside the wanted one, flushed and renamed to it when the block succeeds and removed when it fails."""
    target = Path(folder).absolute()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"{target}: must be a new or empty folder, got one in use")
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        for path in [*temporary.iterdir(), temporary]:
            fsync(path)
        temporary.rename(target)
        fsync(target.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
