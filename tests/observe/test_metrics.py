"""Metrics that survive kills, TensorBoard, and tables people can read."""

import json

import numpy as np
import pytest

from tpaw_jax.observe import metrics, profiling, tables


def test_records_from_the_resumed_step_on_are_dropped_and_a_torn_line_too(tmp_path):
    log = metrics.open_metrics(tmp_path, 0, 0)
    for round_number, step in ((0, 0), (0, 1), (1, 0), (1, 1), (1, 2), (2, 0)):
        log.write(round=round_number, step=step, loss=float(step))
    with log.path.open("ab") as file:
        file.write(b'{"step": 1}\n[1]\n{"round": \xff}\n{"round": 1, "st')
    metrics.open_metrics(tmp_path, 1, 1)
    kept = [json.loads(line) for line in log.path.read_text().splitlines()]
    assert [(r["round"], r["step"]) for r in kept] == [(0, 0), (0, 1), (1, 0), (2, 0)]
    assert metrics.read_metrics(tmp_path, 1) == [{"round": 1, "step": 0, "loss": 0.0}]


def test_missing_players_leave_no_metrics():
    fetched = {"loss": np.float32(2), "player/beta": np.array([0.75, 0.25, 0.0], np.float32)}
    record = metrics.step_record(fetched, players=[4, 3])
    assert record == {"loss": 2.0, "player_4/beta": 0.75, "player_3/beta": 0.25}


def test_tables_have_one_column_a_record():
    text = tables.table([{"round": 0, "loss": 0.693147}, {"round": 1, "loss": None}])
    assert text.splitlines() == ["  round       0  1", "  loss   0.6931  -"]


SUMMARIES = [
    {"round": 0, "players": 1, "loss": 0.5, "alpha=eta": 0.25, "eval/sums": 0.75, "goodput": 0.5, "training s": 2.0},
    {"round": 1, "players": 2, "loss": 0.25, "alpha=eta": None, "eval/sums": 0.5, "goodput": 0.25, "training s": 1.5},
]


def test_the_table_of_rounds_groups_the_main_metrics_under_plain_labels():
    assert tables.round_table(SUMMARIES).splitlines() == [
        "  round                      0     1",
        "  data",
        "    players                  1     2",
        "  rewards",
        "    loss                   0.5  0.25",
        "    target upweighted, %    25     -",
        "    eval/sums             0.75   0.5",
    ]
    assert "no finished round" in tables.round_table([])


def test_the_verbose_table_has_every_key_of_the_summaries():
    lines = tables.round_table(SUMMARIES, verbose=True).splitlines()
    assert lines[-3:] == [
        "  cost",
        "    goodput, %              50    25",
        "    training, seconds        2   1.5",
    ]


def test_chosen_steps_of_every_stage_are_traced_once(tmp_path):
    profiler = profiling.Profiler(tmp_path, profiling.parse_steps("steps=1:2"))
    for stage in ("scoring", "training", "scoring"):
        with profiler.stage(stage):
            for _ in range(2):
                with profiler.step():
                    pass
    traced = [path.relative_to(tmp_path).parts[0] for path in tmp_path.rglob("*.xplane.pb")]
    assert sorted(traced) == ["scoring_0000", "training_0000"]
    for wrong in ("10:13", "steps=3:3", "steps=5:2"):
        with pytest.raises(ValueError, match="steps=10:13"):
            profiling.parse_steps(wrong)
