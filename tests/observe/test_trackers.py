"""Trackers: names, steps over all rounds, a run that resumes, and a tracker that fails."""

import json
import math

import jax
import pytest
from conftest import small_run

from tpaw_jax.observe import metrics, trackers
from tpaw_jax.selfplay import loop


class Recorded:
    """A tracker that keeps what it gets."""

    def __init__(self):
        self.logged, self.closed = [], False

    def log(self, values, step):
        self.logged.append((step, dict(values)))

    def close(self):
        self.closed = True


def test_numbers_are_grouped_under_the_names_that_people_know():
    record = {
        "round": 2,
        "step": 5,
        "loss": 0.5,
        "rewards/chosen": 1.0,
        "player_3/beta": 0.25,
        "beta_entropy": 1.0,
        "tokens_per_second": 10.0,
        "held-out": None,
        "held-out after": -1.0,
        "scoring s": 3,
        "goodput": 0.9,
        "grad_norm": math.inf,
        "eval/gsm8k": 0.1,
    }
    assert trackers.grouped(record) == {
        "train/loss": 0.5,
        "rewards/chosen": 1.0,
        "players/theta_3/beta": 0.25,
        "players/beta_entropy": 1.0,
        "throughput/tokens_per_second": 10.0,
        "eval/held-out after": -1.0,
        "goodput/scoring seconds": 3.0,
        "goodput/goodput": 0.9,
        "eval/gsm8k": 0.1,
    }
    summary = {"round": 2, "loss": 0.4, "echoes": 3, "margin": 1.0}
    assert trackers.grouped(summary, "round") == {
        "round/loss": 0.4,
        "generation/copies of target": 3.0,
        "round/margin": 1.0,
    }


def test_steps_are_counted_over_all_rounds_also_after_a_restart(tmp_path):
    first, again = Recorded(), Recorded()
    for t, steps in ((0, 3), (1, 2)):
        log = metrics.open_metrics(tmp_path, t, 0, [first])
        for step in range(steps):
            log.write(round=t, step=step, loss=1.0)
    log = metrics.open_metrics(tmp_path, 1, 1, [again])
    log.write(round=1, step=1, loss=2.0)
    assert [step for step, _ in first.logged] == [0, 1, 2, 3, 4]
    assert again.logged == [(4, {"train/loss": 2.0})]
    assert metrics.steps_before(tmp_path, 2) == 5


def open_all(tmp_path, names, say=lambda text: None):
    return trackers.open_trackers(names, tmp_path / "run", {"seed": 1, "data.max_length": 48}, say)


@pytest.fixture
def local(tmp_path, monkeypatch):
    """Trackers without a network, in the test's directory."""
    (tmp_path / "run").mkdir()
    settings = {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "TRACKIO_DIR": str(tmp_path / "trackio")}
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("WANDB_PROJECT", raising=False)


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "trackio"])
def test_every_tracker_gets_names_values_and_resumed_steps(local, tmp_path, name, capfd):
    for steps in (range(3), range(2, 4)):  # the second part resumes, and logs a step again
        (tracker,) = open_all(tmp_path, [name])
        for step in steps:
            tracker.log({"train/loss": 0.5 + step}, step)
        tracker.close()
        tracker.close()
    assert [values["train/loss"] for values in READERS[name](tmp_path)] == [0.5, 1.5, 2.5, 2.5, 3.5]
    assert "Warning" not in capfd.readouterr().out


def read_tensorboard(tmp_path):
    from tensorboardX.proto.event_pb2 import Event

    found = []
    for path in sorted((tmp_path / "run" / "tensorboard").iterdir(), key=lambda path: path.stat().st_mtime_ns):
        content = path.read_bytes()
        while content:  # records of a length in 8 bytes, its checksum in 4, the data, their checksum in 4
            size = int.from_bytes(content[:8], "little")
            event, content = Event.FromString(content[12 : 12 + size]), content[16 + size :]
            found += [{value.tag: value.simple_value} for value in event.summary.value]
    return found


def wandb_records(content):
    """The records of a file in LevelDB's log format, in blocks of 32 KiB, after a header of 7 bytes."""
    place, record, block = 7, b"", 2**15
    while place + 7 < len(content):
        if block - place % block < 7:  # too little room for a part
            place += block - place % block
        size, kind = int.from_bytes(content[place + 4 : place + 6], "little"), content[place + 6]
        record += content[place + 7 : place + 7 + size]
        place += 7 + size
        if kind in (1, 4):  # whole, or the last part
            yield record
            record = b""


def read_wandb(tmp_path):
    from wandb.proto.wandb_internal_pb2 import Record

    found, ids = [], set()
    for path in sorted((tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb"), key=lambda p: p.stat().st_mtime_ns):
        for data in wandb_records(path.read_bytes()):
            record = Record.FromString(data)
            if record.WhichOneof("record_type") == "run":
                ids.add((record.run.run_id, record.run.project, record.run.display_name))
                assert {"seed", "data.max_length"} <= {item.key for item in record.run.config.update}
            if record.WhichOneof("record_type") == "history":
                items = record.history.item
                found.append({item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items})
    ((run_id, *names),) = ids
    assert names == ["tpaw_jax", "run"]
    assert run_id == (tmp_path / "run" / "tracker_id").read_text()
    return found


def read_trackio(tmp_path):
    from trackio.sqlite_storage import SQLiteStorage

    (run,) = SQLiteStorage.get_runs("tpaw_jax")
    return SQLiteStorage.get_logs("tpaw_jax", run)


READERS = {"tensorboard": read_tensorboard, "wandb": read_wandb, "trackio": read_trackio}


def test_a_tracker_that_fails_says_so_once(tmp_path):
    said = []

    def fail(values, step):
        raise OSError("no space")

    tracker = trackers._Guarded("wandb", fail, lambda: None, said.append)
    for step in range(3):
        tracker.log({"a": 1.0}, step)
    tracker.close()
    assert said == ["Warning: wandb failed and gets nothing more (OSError: no space)."]


def test_a_tracker_that_is_not_installed_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "wandb", None)
    with pytest.raises(ImportError, match=r"report_to: wandb needs wandb; pip install 'tpaw_jax\[wandb\]'"):
        open_all(tmp_path, ["wandb"])


def test_a_run_reports_every_step_and_round_and_closes_its_trackers(tmp_path, monkeypatch):
    recorded = Recorded()
    monkeypatch.setattr("tpaw_jax.selfplay.session.open_trackers", lambda *arguments: (recorded,))
    monkeypatch.setattr(jax, "devices", lambda *_: jax.local_devices()[:1])
    table = loop.play(small_run(tmp_path, rounds=2), lambda text: None)
    steps = [step for step, values in recorded.logged if "train/loss" in values]
    assert steps == list(range(sum(row["steps"] for row in table)))
    rounds = [(step, values) for step, values in recorded.logged if "round/number" in values]
    assert [values["round/number"] for _, values in rounds] == [0, 1]
    assert [step for step, _ in rounds] == [table[0]["steps"] - 1, steps[-1]]
    assert {"generation/response tokens", "goodput/goodput", "goodput/training seconds"} <= rounds[0][1].keys()
    groups = {name.split("/")[0] for _, values in recorded.logged for name in values}
    assert groups >= {"players", "throughput", "rewards"}
    assert recorded.closed
