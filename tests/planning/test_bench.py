"""`tpaw bench`: what a reading counts, and the comparison of two."""

import copy
import json
import re

import jax
import numpy as np
import pytest
from conftest import DEMO, STORIES, small_run

from tpaw_jax import cli
from tpaw_jax.generation.slots import STEPS_PER_CHUNK
from tpaw_jax.models import hub
from tpaw_jax.planning import planner, workload
from tpaw_jax.planning.measured import bench, readings


def run_of(tmp_path):
    return small_run(tmp_path, **{"mesh.fsdp": -1, "packing.rows_per_batch": 8, "packing.scoring_batches": 2})


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    """Two calls of every stage on eight devices."""
    run = run_of(tmp_path_factory.mktemp("bench"))
    said = []
    found = bench.measure(run, hub.load_architecture(STORIES), planner.STAGES, 2, said.append)
    assert [line.split(":")[0] for line in said] == [record["stage"] for record in found]
    return found


def test_every_stage_is_timed_and_the_step_comes_last(records):
    assert [record["stage"] for record in records] == ["prefill", "decode", "scoring", "step"]
    for record in records:
        assert len(record["seconds"]) == record["calls"] == 2
        assert 0 < record["fastest s"] <= record["median s"] <= record["slowest s"]
        assert record["program GiB per device"] > 0
        assert record["settings"]["devices"].startswith("8 x ")
        assert record["MFU"] is record["device peak GiB"] is None  # a CPU has no published peak, and no count of memory
    assert [record["triplets/s"] is not None for record in records] == [False, False, False, True]
    prefill, decode, scoring, step = (record["collectives GiB sent per device"] for record in records)
    assert prefill == decode == 0  # each device samples on its own
    assert step > 2 * scoring > 0  # gathers of parameters, and the reduction of their gradients
    json.dumps(records)


def test_rates_are_of_what_a_call_computes(records, tmp_path):
    of = {record["stage"]: record for record in records}
    run = run_of(tmp_path)
    assert of["decode"]["settings"]["slots"] == run.sampling.slots == 8
    new = run.sampling.slots * STEPS_PER_CHUNK
    low, high = new / of["decode"]["slowest s"], new / of["decode"]["fastest s"]
    assert low * (1 - 1e-9) <= of["decode"]["tokens/s"] <= high * (1 + 1e-9)
    places = of["step"]["settings"]["rows of a step"] * run.packing.row_length
    low, high = 0.5 * places / of["step"]["slowest s"], places / of["step"]["fastest s"]
    assert low < of["step"]["tokens/s"] <= high  # useful tokens of rows that are well filled
    assert of["step"]["tokens/s per device"] == pytest.approx(of["step"]["tokens/s"] / 8)


def test_random_rows_are_those_of_the_plan(tmp_path):
    run = run_of(tmp_path)
    prompts, window = workload.random_window(run, 512, 20)
    blank, of_responses = workload.draw_lengths(run, 20)
    assert [len(x) for x in prompts.prompt_tokens] == [len(x) for x in blank.prompt_tokens]
    assert [[len(r) for r in g.tokens] for g in window] == of_responses[::-1].tolist()
    assert [g.round for g in window] == [2, 1, 0]
    assert len({x.tobytes() for g in window for x in g.tokens}) > 50


def test_rows_can_have_the_lengths_of_the_data(tmp_path):
    run = run_of(tmp_path)
    lengths = workload.lengths_of_data(run, 512)
    prompts = len(lengths.prompts)
    assert prompts == len(lengths.targets) > 8
    drawn, of_responses = workload.draw_lengths(run, prompts, lengths)
    pairs = lambda x, y: sorted(zip(map(int, x), map(int, y), strict=True))
    assert pairs(map(len, drawn.prompt_tokens), map(len, drawn.target_tokens)) == pairs(*lengths)
    assert set(of_responses.ravel()) <= set(np.clip(lengths.targets, 2, run.sampling.max_new_tokens))
    assert len(workload.draw_lengths(run, 3 * prompts, lengths)[0]) == 3 * prompts
    setup = bench._set_up(run, hub.load_architecture(STORIES), workload.Lengths(np.full(9, 7), np.full(9, 5)))
    tokens = (np.asarray(setup.rows.batch.segment_ids) > 0).sum(axis=1)
    assert set(tokens % (7 + 4 * 4)) == {0}  # whole trees: a prompt, then all but the last token of four responses
    assert setup.load.prompt_tokens == 7 * setup.load.prompts
    assert set(bench._prefill_rows(setup)[1]) == {7}
    assert dict(bench._settings(setup))["lengths"] == "of the data"


def test_a_plan_stands_beside_the_readings(records, tmp_path):
    plan = {"devices": 8, "stages": {"step": {"predicted s": 0.5}, "scoring": {"fits": False}}}
    path = tmp_path / "plan.json"
    path.write_text(json.dumps([plan]))
    found = {record["stage"]: record for record in readings.with_predictions(records, readings.predictions(path, 8))}
    assert found["step"]["predicted s"] == 0.5
    assert found["step"]["measured / predicted"] == found["step"]["median s"] / 0.5
    assert found["scoring"]["predicted s"] is found["decode"]["measured / predicted"] is None
    for content, sentence in (
        ([{**plan, "devices": 4}], "for 4 devices; there are 8"),
        ([], "expected the plan of one topology"),
    ):
        path.write_text(json.dumps(content))
        with pytest.raises(ValueError, match=sentence):
            readings.predictions(path, 8)


def test_readings_with_predictions_calibrate_a_plan(records, tmp_path):
    path = tmp_path / "readings.jsonl"
    on_tpu = [{**record, "generation": "v5e"} for record in records]
    for predicted in (0.5, 0.25, 0.1):
        readings.write(path, readings.with_predictions(on_tpu, {"step": predicted}))
    median = next(record["median s"] for record in records if record["stage"] == "step")
    assert readings.calibration(path, "v5e") == {"step": median / 0.25}
    with pytest.raises(ValueError, match="no readings on v5p with predictions"):
        readings.calibration(path, "v5p")


def test_a_comparison_tells_what_is_faster_and_what_differs(records):
    rng = np.random.default_rng(0)
    timed = lambda stage, median: {
        "stage": stage,
        "seconds": (median * rng.normal(1, 0.02, 12)).tolist(),
        "settings": copy.deepcopy(records[0]["settings"]),
    }
    before = [timed("step", 1.0), timed("decode", 1.0), timed("scoring", 1.0), timed("prefill", 1.0)]
    after = [timed("step", 0.8), timed("decode", 1.2), timed("scoring", 1.0)]
    after[0]["settings"]["row length"] = 4096
    after[0]["settings"]["versions"]["the version of jax"] = "9"
    lines = readings.comparison(before, after).splitlines()
    assert [line.split()[0] for line in lines] == ["stage", "step", "decode", "scoring", "row", "the"]
    assert lines[5] == f"  the version of jax: {jax.__version__} before, 9 after"
    assert lines[1].endswith("faster")
    assert lines[2].endswith("slower")
    assert lines[3].endswith("no difference")
    assert lines[4].strip() == "row length: 128 before, 4096 after"
    low, high = map(float, re.search(r"([\d.]+) to ([\d.]+)", lines[1]).groups())
    assert low < 1 / 0.8 < high


def test_the_command_measures_writes_and_compares(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(jax, "devices", lambda *_: jax.local_devices()[:1])
    out = tmp_path / "a.jsonl"
    run = ["bench", "--config", str(DEMO / "demo.yaml"), "--policy.path", str(STORIES), "--stages", "scoring"]
    assert cli.main([*run, "--calls", "2", "--json", str(out)]) == 0
    assert cli.main([*run, "--calls", "2", "--json", str(out)]) == 0
    assert "row length: 1024" in capsys.readouterr().out
    assert len(readings.read(out)) == 2
    assert cli.main(["bench", "--compare", str(out), str(out)]) == 0
    assert "1.000" in capsys.readouterr().out
    refused = {
        ("bench",): "needs --config, or --compare with two files",
        ("bench", "--compare", str(out)): "--compare takes two files: BEFORE AFTER",
        (*run[:-1], "steps"): "--stages: unknown steps; choose from step, scoring, prefill, decode",
        (*run, "--calls", "0"): "--calls is 0; it must be at least 1",
        (*run, "--objective.loss", "sft", "--rounds", "1"): "measures rounds of self-play, not supervised runs or DPO",
    }
    for arguments, sentence in refused.items():
        assert cli.main(list(arguments)) == 2
        assert sentence in capsys.readouterr().err
    out.write_text("{}\n")
    assert cli.main(["bench", "--compare", str(out), str(out)]) == 2
    assert "a.jsonl, line 1: expected a reading of `tpaw bench --json`" in capsys.readouterr().err
