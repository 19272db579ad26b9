"""A run that version 0.1 began, and stopped in the training of round 1, resumes and ends as version 0.1 ended it."""

import json
import shutil

import jax
import pytest
from conftest import DEMO, FIXTURES, ROOT

from tpaw_jax.config import config_file
from tpaw_jax.selfplay import loop

OLD = FIXTURES / "run_of_version_0.1"
MEASURED = ("tokens_per_second", "triplets_per_second", "input_wait_share")


def records(path):
    """The records of a metrics.jsonl by (round, step), without what is measured in seconds."""
    lines = map(json.loads, path.read_text().splitlines())
    return {(r["round"], r["step"]): {k: v for k, v in r.items() if k not in MEASURED} for r in lines}


def test_a_run_of_version_0_1_resumes(tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "devices", lambda *_: jax.local_devices()[:1])
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "demo").symlink_to(DEMO)  # where version 0.1 had the data
    (tmp_path / "tests").symlink_to(ROOT / "tests")
    monkeypatch.chdir(tmp_path)
    shutil.copytree(OLD / "run", tmp_path / "run")
    config = config_file.load(OLD / "run" / "config.yaml", [f"directory={tmp_path / 'run'}"])
    said = []
    table = loop.play(config, said.append)
    assert "Round 1: training resumes after step 3." in said
    assert [row["triplets"] for row in table] == [12, 24, 36]
    resumed, expected = records(tmp_path / "run" / "metrics.jsonl"), records(OLD / "finished_metrics.jsonl")
    assert resumed.keys() == expected.keys()
    for step, record in expected.items():
        # Machines round float32 sums differently; on the machine that made the fixture the records were equal.
        assert resumed[step] == pytest.approx(record, rel=1e-4, abs=1e-5), step
