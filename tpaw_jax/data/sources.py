"""Read the raw records of a source: JSON, CSV and Parquet files, saved datasets, the Hugging Face hub."""

import csv
import gzip
import io
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tpaw_jax.config import SourceConfig
from tpaw_jax.storage import files

COMPRESSED = (".gz", ".zst")
FILES = (".jsonl", ".json", ".csv", ".tsv", ".parquet")
"""The extensions that are read; all but the last also with one of `COMPRESSED` behind them."""


def read_source(source: SourceConfig) -> Iterator[tuple[str, Any]]:
    """Yield (where, raw record) for each record of a source; `where` is 'file, line n' or 'file, record n'.

    `source.path` is a file, a pattern of files, a directory of files or of a saved dataset, or the id of a hub dataset.
    A record that cannot be read is yielded as a `ValueError` in its place, so that the caller can raise or skip it.

    Raises:
        ValueError: the source cannot be read.
    """
    for where, raw in _read(source):
        if source.fields and not isinstance(raw, ValueError):
            try:
                raw = _rename(raw, source.fields, where)
            except ValueError as error:
                raw = error
        yield where, raw


def _rename(raw: Any, fields: dict[str, str], where: str) -> dict[str, Any]:
    """The fields that `source.fields` names, under our names; all others are left out."""
    if not isinstance(raw, dict):
        raise ValueError(f"{where}: expected a record with named fields, got {type(raw).__name__}.")
    for ours, theirs in fields.items():
        if theirs not in raw:
            names = ", ".join(map(repr, raw)) or "(none)"
            raise ValueError(
                f"{where}: there is no field '{theirs}', which data.sources reads as '{ours}'; there are {names}."
            )
    return {ours: raw[theirs] for ours, theirs in fields.items()}


def _read(source: SourceConfig) -> Iterator[tuple[str, Any]]:
    path = Path(source.path).expanduser()
    if path.is_file():
        yield from _read_file(path)
    elif path.is_dir() and not _is_saved_dataset(path):
        yield from _read_files(sorted(p for p in path.rglob("*") if p.is_file() and _extension(p) in FILES), source)
    elif not path.exists() and any(c in source.path for c in "*?["):
        yield from _read_files(sorted(p for p in _glob(path) if p.is_file()), source)
    else:
        loaded = _load_dataset(source, path)
        yield from ((f"{source.path}, record {i}", _without_nulls(r)) for i, r in enumerate(loaded, start=1))


def _read_files(paths: list[Path], source: SourceConfig) -> Iterator[tuple[str, Any]]:
    if not paths:
        raise ValueError(f"data source '{source.path}': there is no file to read ({', '.join(FILES)}, or compressed).")
    for path in paths:
        yield from _read_file(path)


def _read_file(path: Path) -> Iterator[tuple[str, Any]]:
    extension = _extension(path)
    if extension not in FILES:
        raise ValueError(
            f"data source '{path}': the file extension is not one of {', '.join(FILES)}, or one of these with .gz or "
            ".zst behind it."
        )
    try:
        if extension == ".parquet":
            import datasets

            rows = datasets.Dataset.from_parquet(str(path))
            yield from ((f"{path}, record {i}", _without_nulls(r)) for i, r in enumerate(rows, start=1))
            return
        with _open(path) as stream:
            if extension in (".csv", ".tsv"):
                yield from _read_table(stream, path, "\t" if extension == ".tsv" else ",")
            else:
                yield from _read_json(stream, path)
    except Exception as error:  # libraries raise dozens of types; the user needs one sentence
        if isinstance(error, ValueError) and str(error).startswith(str(path)):
            raise
        raise ValueError(f"data source '{path}' could not be read: {type(error).__name__}: {error}") from error


def _extension(path: Path) -> str:
    """The extension that says what is in a file; that of compression is left out."""
    return Path(path.stem).suffix.lower() if path.suffix.lower() in COMPRESSED else path.suffix.lower()


def _open(path: Path) -> io.BufferedReader:
    compression = path.suffix.lower()
    if compression == ".gz":
        return io.BufferedReader(gzip.open(path))  # type: ignore[arg-type]
    if compression == ".zst":
        import zstandard

        return io.BufferedReader(zstandard.open(path, "rb"))  # type: ignore[arg-type]
    return path.open("rb")


def _read_json(stream: io.BufferedReader, path: Path) -> Iterator[tuple[str, Any]]:
    """A JSON array of records, or one record a line."""
    if stream.peek(4096).lstrip()[:1] != b"[":
        yield from _read_lines(stream, path)
        return
    records = files.parse_json(stream.read(), path)
    yield from ((f"{path}, record {i}", r) for i, r in enumerate(records, start=1))


def _read_lines(stream: io.BufferedReader, path: Path) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(stream, start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            yield where, files.parse_json(line, where)
        except ValueError as error:
            yield where, error


def _read_table(stream: io.BufferedReader, path: Path, separator: str) -> Iterator[tuple[str, Any]]:
    """Comma- or tab-separated records below a line of names. All values are text."""
    csv.field_size_limit(sys.maxsize)
    lines = io.TextIOWrapper(stream, "utf-8-sig", newline="")
    for i, row in enumerate(csv.DictReader(lines, delimiter=separator), start=1):
        where = f"{path}, record {i}"
        if None in row or None in row.values():
            yield where, ValueError(f"{where}: the record does not have as many values as the first line has names.")
        else:
            yield where, row


def _glob(pattern: Path) -> Iterator[Path]:
    root = Path(pattern.anchor or ".")
    return root.glob(str(pattern.relative_to(pattern.anchor) if pattern.anchor else pattern))


def _is_saved_dataset(path: Path) -> bool:
    return (path / "state.json").exists() or (path / "dataset_dict.json").exists()


def _without_nulls(value: Any) -> Any:
    """Leave out fields without a value: Arrow gives every record of a column the fields of all."""
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_without_nulls(item) for item in value]
    return value


def _load_dataset(source: SourceConfig, path: Path) -> Any:
    """Read a saved dataset or a hub dataset with the datasets library."""
    import datasets

    try:
        if path.is_dir():
            loaded = datasets.load_from_disk(str(path))
            return loaded[source.split] if isinstance(loaded, datasets.DatasetDict) else loaded
        return datasets.load_dataset(source.path, source.subset or None, split=source.split)
    except Exception as error:  # the library raises dozens of types; the user needs one sentence
        raise ValueError(
            f"data source '{source.path}' (split '{source.split}') could not be read: {type(error).__name__}: {error}"
        ) from error
