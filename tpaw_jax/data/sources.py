"""Read the raw records of a source: JSON, CSV and Parquet files, saved datasets, the Hugging Face hub."""

import csv
import gzip
import io
import itertools
import sys
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tpaw_jax.config import SourceConfig
from tpaw_jax.storage import files

COMPRESSED = (".gz", ".zst")
FILES = (".jsonl", ".json", ".csv", ".tsv", ".parquet")
"""The extensions that are read; all but the last also with one of `COMPRESSED` behind them."""

CHUNK = 1000
"""Records of a chunk."""

Located = tuple[str, Any]
"""Where a record is, 'file, line n' or 'file, record n', and the raw record."""


class Lines(NamedTuple):
    """Consecutive lines of a file of JSON lines. They are read when they are asked for."""

    path: Path
    offset: int  # bytes
    first: int  # number of the first line, from 1
    lines: int
    records: int  # lines that are not blank
    checksum: int  # CRC-32 of the lines

    @property
    def facts(self) -> str:
        """What is the same for chunks of equal content."""
        return f"{self.offset} {self.lines} {self.checksum}"

    def read(self) -> Iterator[Located]:
        """The records."""
        with self.path.open("rb") as stream:
            stream.seek(self.offset)
            yield from _read_lines(itertools.islice(stream, self.lines), self.path, self.first)


class Rows(NamedTuple):
    """Consecutive records of a dataset of the `datasets` library. They are read when they are asked for."""

    table: Any  # datasets.Dataset
    name: str  # its path or id
    first: int  # number of the first record, from 0
    records: int

    @property
    def facts(self) -> str:
        """What is the same for chunks of equal content: the size of the table, not its values."""
        return f"{self.name} {self.first} {self.records} {self.table.features} {self.table.data.nbytes}"

    def read(self) -> Iterator[Located]:
        """The records.

        Raises:
            ValueError: the table cannot be read.
        """
        try:
            rows = self.table.select(range(self.first, self.first + self.records))
            for i, raw in enumerate(rows, start=self.first + 1):
                yield f"{self.name}, record {i}", _without_nulls(raw)
        except Exception as error:  # libraries raise dozens of types; the user needs one sentence
            problem = f"{type(error).__name__}: {error}"
            raise ValueError(f"data source '{self.name}' could not be read: {problem}") from error


class Listed(NamedTuple):
    """Records of a file that can only be read as a whole."""

    located: Sequence[Located]

    @property
    def records(self) -> int:
        """Their number."""
        return len(self.located)

    @property
    def facts(self) -> str:
        """What is the same for chunks of equal content."""
        return str(zlib.crc32(repr(self.located).encode()))

    def read(self) -> Iterator[Located]:
        """The records."""
        return iter(self.located)


Chunk = Lines | Rows | Listed
"""A part of a source. Another process can read it."""


def read_source(source: SourceConfig) -> Iterator[Located]:
    """Each record of a source, see `read_chunk`.

    Raises:
        ValueError: the source cannot be read.
    """
    for chunk in split_source(source):
        yield from read_chunk(chunk, source)


def read_chunk(chunk: Chunk, source: SourceConfig) -> Iterator[Located]:
    """Each record of a chunk. One that cannot be read is a `ValueError`, so that the caller can raise or skip it."""
    for where, raw in chunk.read():
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


def split_source(source: SourceConfig) -> Iterator[Chunk]:
    """The chunks of a source, in order.

    `source.path` is a file, a pattern of files, a directory of files or of a saved dataset, or the id of a hub dataset.
    Uncompressed JSON lines, Parquet and datasets are not held in memory; other files are.

    Raises:
        ValueError: the source cannot be read.
    """
    path = Path(source.path).expanduser()
    if path.is_file():
        yield from _split_file(path)
    elif path.is_dir() and not _is_saved_dataset(path):
        yield from _split_files(sorted(p for p in path.rglob("*") if p.is_file() and _extension(p) in FILES), source)
    elif not path.exists() and any(c in source.path for c in "*?["):
        yield from _split_files(sorted(p for p in _glob(path) if p.is_file()), source)
    else:
        yield from _split_table(_load_dataset(source, path), source.path)


def _split_files(paths: list[Path], source: SourceConfig) -> Iterator[Chunk]:
    if not paths:
        raise ValueError(f"data source '{source.path}': there is no file to read ({', '.join(FILES)}, or compressed).")
    for path in paths:
        yield from _split_file(path)


def _split_file(path: Path) -> Iterator[Chunk]:
    extension = _extension(path)
    if extension not in FILES:
        raise ValueError(
            f"data source '{path}': the file extension is not one of {', '.join(FILES)}, or one of these with .gz or "
            ".zst behind it."
        )
    try:
        if extension == ".parquet":
            import datasets

            yield from _split_table(datasets.Dataset.from_parquet(str(path)), str(path))
            return
        with _open(path) as stream:
            if extension in (".csv", ".tsv"):
                yield from _split_list(_read_table(stream, path, "\t" if extension == ".tsv" else ","))
            elif stream.peek(4096).lstrip()[:1] == b"[":
                records = files.parse_json(stream.read(), path)
                yield from _split_list((f"{path}, record {i}", r) for i, r in enumerate(records, start=1))
            elif path.suffix.lower() in COMPRESSED:
                yield from _split_list(_read_lines(stream, path, 1))
            else:
                yield from _split_lines(stream, path)
    except Exception as error:  # libraries raise dozens of types; the user needs one sentence
        if isinstance(error, ValueError) and str(error).startswith(str(path)):
            raise
        raise ValueError(f"data source '{path}' could not be read: {type(error).__name__}: {error}") from error


def _split_table(table: Any, name: str) -> Iterator[Chunk]:
    for first in range(0, len(table), CHUNK):
        yield Rows(table, name, first, min(CHUNK, len(table) - first))


def _split_list(located: Iterable[Located]) -> Iterator[Chunk]:
    located = iter(located)
    while some := list(itertools.islice(located, CHUNK)):
        yield Listed(some)


def _split_lines(stream: io.BufferedReader, path: Path) -> Iterator[Chunk]:
    offset = size = lines = records = checksum = 0
    first = 1
    for line in stream:
        size, lines, records = size + len(line), lines + 1, records + bool(line.strip())
        checksum = zlib.crc32(line, checksum)
        if records == CHUNK:
            yield Lines(path, offset, first, lines, records, checksum)
            offset, first = offset + size, first + lines
            size = lines = records = checksum = 0
    if records:
        yield Lines(path, offset, first, lines, records, checksum)


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


def _read_lines(lines: Iterable[bytes], path: Path, first: int) -> Iterator[Located]:
    for number, line in enumerate(lines, start=first):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            yield where, files.parse_json(line, where)
        except ValueError as error:
            yield where, error


def _read_table(stream: io.BufferedReader, path: Path, separator: str) -> Iterator[Located]:
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
