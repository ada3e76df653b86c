"""Rows of .parquet and .arrow files, and what `datasets` downloads; pyarrow and datasets are the extra `data`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

TABLE_SUFFIXES = (".parquet", ".arrow")
BATCH_ROWS = 1024


def _missing(package: str, error: ModuleNotFoundError) -> ValueError:
    return ValueError(
        f'prepare: {package} must be installed to read this, got none; run: pip install "hebatron[data]" ({error})'
    )


def downloaded(name: str) -> list[Path]:
    """The .arrow files of NAME or NAME@SPLIT, as `datasets` keeps them; of every split, sorted, without a SPLIT."""
    try:
        import datasets
    except ModuleNotFoundError as error:
        raise _missing("datasets", error) from error
    path, _, split = name.partition("@")
    if not path:
        raise ValueError("prepare: hf: must be followed by a name, got none")
    if "[" in split:  # its files hold the rows outside the slice too
        raise ValueError(f"prepare: hf: must name whole splits, got {split}")
    loaded = datasets.load_dataset(path, split=split or None)
    parts = [loaded[key] for key in sorted(loaded)] if isinstance(loaded, dict) else [loaded]
    files = [Path(entry["filename"]) for part in parts for entry in part.cache_files]
    if not files:
        raise ValueError(f"prepare: hf:{name} must have files on disk, got none")
    return files


def rows(path: Path, fields: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Each row's `fields` that the file has; strings as undecoded bytes, so that one broken text is one row's fault."""
    try:
        import pyarrow
        import pyarrow.ipc
        import pyarrow.parquet
    except ModuleNotFoundError as error:
        raise _missing("pyarrow", error) from error
    try:
        if path.suffix == ".parquet":
            with pyarrow.parquet.ParquetFile(path) as table:
                names = [name for name in table.schema_arrow.names if name in fields]
                yield from _batch_rows(table.iter_batches(BATCH_ROWS, columns=names), names)
        else:  # a stream, which is what `datasets` writes
            with pyarrow.memory_map(str(path)) as file, pyarrow.ipc.open_stream(file) as stream:
                names = [name for name in stream.schema.names if name in fields]
                yield from _batch_rows(stream, names)
    except (pyarrow.ArrowException, OSError) as error:
        kind = path.suffix.removeprefix(".")
        raise ValueError(f"prepare: {path} must be a whole {kind} file, got {error}") from error


def _batch_rows(batches: Iterable[Any], names: Sequence[str]) -> Iterator[dict[str, Any]]:
    for batch in batches:
        columns = [_values(batch.column(name)) for name in names]
        for number in range(batch.num_rows):
            yield {name: column[number] for name, column in zip(names, columns, strict=True)}


def _values(column: Any) -> list[Any]:
    import pyarrow

    if pyarrow.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if pyarrow.types.is_string(column.type) or pyarrow.types.is_large_string(column.type):
        column = column.cast(pyarrow.large_binary())
    values: list[Any] = column.to_pylist()
    return values
