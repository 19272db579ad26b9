"""Containers of records: the same records from every kind of file, and sentences for those that cannot be read."""

import gzip
import json

import datasets
import pytest
import zstandard

from tpaw_jax.config import SourceConfig
from tpaw_jax.data.sources import read_source

RECORDS = [{"prompt": f"{i}, or 'é'?", "completion": f"so\n{i}"} for i in range(3)]
LINES = "".join(json.dumps(record) + "\n" for record in RECORDS).encode()


def read(path, **fields):
    return list(read_source(SourceConfig(str(path), **fields)))


@pytest.fixture
def folder(tmp_path):
    """The records in every kind of file."""
    table = datasets.Dataset.from_list(RECORDS)
    table.to_parquet(tmp_path / "a.parquet")
    table.to_csv(tmp_path / "a.csv")
    table.to_csv(tmp_path / "a.tsv", sep="\t")
    (tmp_path / "a.csv.gz").write_bytes(gzip.compress((tmp_path / "a.csv").read_bytes()))
    for name, content in (("a.jsonl", LINES), ("lines.json", LINES), ("array.json", json.dumps(RECORDS).encode())):
        (tmp_path / name).write_bytes(content)
        (tmp_path / f"{name}.gz").write_bytes(gzip.compress(content))
        (tmp_path / f"{name}.zst").write_bytes(zstandard.compress(content))
    return tmp_path


def test_every_kind_of_file_gives_the_same_records(folder):
    paths = sorted(folder.iterdir())
    assert len(paths) == 13
    for path in paths:
        assert [record for _, record in read(path)] == RECORDS, path


def test_the_place_of_a_record_names_its_file_and_line(folder):
    assert read(folder / "a.jsonl.gz")[1][0] == f"{folder}/a.jsonl.gz, line 2"
    assert read(folder / "a.parquet")[1][0] == f"{folder}/a.parquet, record 2"


def test_patterns_and_directories_are_read_file_by_file_in_order(tmp_path):
    for i, record in enumerate(RECORDS):
        (tmp_path / f"shard-{i}").mkdir()
        (tmp_path / f"shard-{i}" / "part.jsonl").write_text(json.dumps(record))
    (tmp_path / "README.md").write_text("not data")
    for path in (tmp_path, tmp_path / "shard-*" / "*.jsonl", tmp_path / "**" / "part.jsonl"):
        assert [record for _, record in read(path)] == RECORDS
    with pytest.raises(ValueError, match="there is no file to read"):
        read(tmp_path / "*.parquet")


def test_fields_of_other_names_are_read_and_no_others(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"q": "Why?", "a": "So.", "chosen": 1}\n{"q": "Why?"}\n')
    (_, first), (_, second) = read(tmp_path / "a.jsonl", fields={"prompt": "q", "completion": "a"})
    assert first == {"prompt": "Why?", "completion": "So."}
    assert "line 2: there is no field 'a', which data.sources reads as 'completion'; there are 'q'" in str(second)


def test_fields_that_arrow_adds_are_left_out(tmp_path):
    """Records of one Arrow column have the same fields; those that a record did not have are null."""
    calls = [{"messages": [{"role": "user", "call": {"x": 1}}]}, {"messages": [{"role": "user", "call": {"y": 2}}]}]
    datasets.Dataset.from_list(calls).to_parquet(tmp_path / "a.parquet")
    assert [record for _, record in read(tmp_path / "a.parquet")] == calls


def test_rows_of_the_wrong_length_and_damaged_files_are_told(tmp_path):
    (tmp_path / "a.csv").write_text("prompt,completion\nWhy?,So.\nWhy?\n")
    assert "a.csv, record 2: the record does not have as many values" in str(read(tmp_path / "a.csv")[1][1])
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(LINES)[:-20])
    with pytest.raises(ValueError, match=r"data source '.*a.jsonl.gz' could not be read: EOFError"):
        read(tmp_path / "a.jsonl.gz")
    (tmp_path / "a.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(ValueError, match=r"data source '.*a.parquet' could not be read"):
        read(tmp_path / "a.parquet")
