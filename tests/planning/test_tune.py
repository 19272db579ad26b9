"""`tpaw tune`: the search, on recorded timings, and the file that it writes."""

import pytest
import yaml
from conftest import STORIES, small_run

from tpaw_jax import cli
from tpaw_jax.config import config_file
from tpaw_jax.planning.measured import tune
from tpaw_jax.planning.measured.tune import Knob, Trial

CURRENT = {"packing.rows_per_batch": 2, "policy.remat": "dots", "policy.head_chunk": 512, "sampling.slots": 64}

KNOBS = {
    "step": [
        Knob("policy.remat", ["none", "dots", "layer"], saves_memory=True),
        Knob("packing.rows_per_batch", [1, 2, 4, 8]),
        Knob("policy.head_chunk", [256, 512, 1024]),
    ],
    "decode": [Knob("sampling.slots", [32, 64, 128, 256])],
}


def timings(settings):
    """Triplets/s of a step by (remat, rows, chunk), as on a device where remat `none` only fits two rows."""
    remat, rows, chunk = (
        {**CURRENT, **settings}[key] for key in ("policy.remat", "packing.rows_per_batch", "policy.head_chunk")
    )
    if rows > {"none": 2, "dots": 4, "layer": 8}[remat]:
        return None
    return (
        {1: 6, 2: 8, 4: 11, 8: 12}[rows]
        * {"none": 1.2, "dots": 1.0, "layer": 0.8}[remat]
        * (1.05 if chunk == 1024 else 1)
    )


class Clock:
    """Recorded timings with a limit of measurements."""

    def __init__(self, most):
        self.most, self.measured = most, []

    def measure(self, stage, settings):
        self.measured.append((stage, settings))
        if stage == "decode":
            return {32: 70.0, 64: 100.0, 128: 101.0, 256: 140.0}[settings.get("sampling.slots", 64)]
        return timings(settings)

    def has_time(self):
        return len(self.measured) < self.most


def test_the_search_finds_the_fastest_settings_that_fit():
    clock = Clock(100)
    settings, trials = tune.search(KNOBS, CURRENT, clock.measure, clock.has_time)
    fastest = max((timings(t.settings) or 0) for t in trials if t.stage == "step")
    assert timings(settings) == fastest == pytest.approx(11 * 1.05)
    assert {k: v for k, v in settings.items() if k != "sampling.slots"} == {
        "packing.rows_per_batch": 4,
        "policy.head_chunk": 1024,
    }
    assert any(trial.rate is None for trial in trials)  # 8 rows, and 4 rows without rematerialization
    measured = [(stage, sorted(s.items())) for stage, s in clock.measured]
    assert len(measured) == len({repr(m) for m in measured})  # nothing twice


def test_a_gain_within_the_noise_is_not_taken():
    settings, _ = tune.search({"decode": KNOBS["decode"]}, CURRENT, Clock(100).measure, lambda: True)
    assert settings == {}  # 128 slots are 1 % faster


def test_the_search_ends_with_its_time_and_keeps_what_it_found():
    clock = Clock(3)
    settings, trials = tune.search(KNOBS, CURRENT, clock.measure, clock.has_time)
    assert len(trials) == 3
    assert timings(settings) == max(timings(t.settings) for t in trials)


def test_the_overlay_can_be_read_after_the_runs_own_file(tmp_path):
    trials = [Trial("step", {}, 10.0), Trial("step", {"policy.head_chunk": 1024}, 12.5)]
    text = tune.overlay({"policy.head_chunk": 1024, "packing.rows_per_batch": 4}, trials)
    assert "# step: 12.5 triplets/s, as configured 10" in text
    (tmp_path / "run.yaml").write_text("policy: {path: a}\ndata: {sources: [{path: b}]}\n")
    (tmp_path / "tuned.yaml").write_text(text)
    run = config_file.load([tmp_path / "run.yaml", tmp_path / "tuned.yaml"])
    assert (run.policy.path, run.policy.head_chunk, run.packing.rows_per_batch) == ("a", 1024, 4)


def test_settings_that_the_configuration_cannot_have_are_passed_over(tmp_path):
    run = small_run(tmp_path)
    assert tune._rate(run, None, "step", {"packing.row_length": 8}, 1) is None


def test_the_command_writes_what_is_fastest_here(tmp_path, capsys):
    run, out = tmp_path / "run.yaml", tmp_path / "tuned.yaml"
    run.write_text(
        yaml.safe_dump(config_file.to_dict(small_run(tmp_path, **{"mesh.fsdp": -1, "packing.rows_per_batch": 0})))
    )
    tuned = ["tune", "--config", str(run), "--out", str(out), "--stages", "scoring", "--calls", "2", "--minutes", "5"]
    assert cli.main(tuned) == 0
    printed = capsys.readouterr().out
    assert "scoring, as configured: " in printed
    assert "scoring, packing.scoring_batches 2: " in printed
    config_file.load([run, out])
    assert cli.main([*tuned, "--minutes", "0"]) == 2
    assert "--minutes is 0; it must be above 0" in capsys.readouterr().err
    assert str(STORIES) in run.read_text()
