"""Metrics that survive kills, TensorBoard, and tables people can read."""

import json

import numpy as np
import pytest

from tpaw_jax.observe import metrics, profiling, tables


def test_records_from_the_resumed_step_on_are_dropped_and_a_torn_line_too(tmp_path):
    log = metrics.open_metrics(tmp_path, 0, 0)
    for round_number, step in ((0, 0), (0, 1), (1, 0), (1, 1), (1, 2), (2, 0)):
        log.write(round=round_number, step=step, loss=float(step))
    with log.file.path.open("ab") as file:
        file.write(b'{"step": 1}\n[1]\n{"round": \xff}\n{"round": 1, "st')
    metrics.open_metrics(tmp_path, 1, 1)
    kept = [json.loads(line) for line in log.file.path.read_text().splitlines()]
    assert [(r["round"], r["step"]) for r in kept] == [(0, 0), (0, 1), (1, 0), (2, 0)]
    assert metrics.read_metrics(tmp_path, 1) == [{"round": 1, "step": 0, "loss": 0.0}]


def test_steps_that_were_lost_count_their_seconds(tmp_path):
    log = metrics.open_metrics(tmp_path, 0, 0)
    for step in range(4):
        log.write(round=0, step=step, triplets=6.0, triplets_per_second=2.0)
    log.write(round=0, step=3, **{"held-out": 1.0})
    assert metrics.open_metrics(tmp_path, 0, 2).lost_seconds == 6.0
    assert metrics.open_metrics(tmp_path, 0, 2).lost_seconds == 0.0


def test_every_second_of_a_round_belongs_to_one_stage(monkeypatch):
    now = 100.0
    monkeypatch.setattr(profiling.time, "perf_counter", lambda: now)
    monkeypatch.setattr(profiling, "_compiled", profiling._Compiled())

    def work(seconds, compiled=0.0):
        nonlocal now
        now += seconds
        profiling._compiled.seconds += compiled

    watch = profiling.Stopwatch({"startup": 10.0})
    with watch.time("scoring"):
        work(20, compiled=8)
    with watch.time("training"):
        work(6, compiled=1)
        with watch.time("saving"):
            work(3, compiled=1)
        work(21)
        watch.add("input wait", 4)
    work(15)
    watch.add_past("lost steps", 5)
    stages = ("startup", "compiling", "scoring", "saving", "input wait", "training", "lost steps")
    assert watch.seconds == dict(zip(stages, (10, 10, 12, 2, 4, 22, 5), strict=True))
    assert watch.report()["round"] == 80
    shares = watch.shares()
    assert shares == pytest.approx(
        {
            "goodput": 34 / 80,
            "badput/training_prep": 10 / 80,
            "badput/program_startup": 10 / 80,
            "badput/data_loading_sync": 4 / 80,
            "badput/unproductive_checkpoint_restore_time": 0,
            "badput/unproductive_checkpoint_save_time": 2 / 80,
            "badput/wasted_progress_from_disruption": 5 / 80,
            "badput/custom_badput_events": 0,
            "badput/other": 15 / 80,
        }
    )


def test_compilations_are_counted():
    import jax

    watch = profiling.Stopwatch()
    with watch.time("scoring"):
        jax.jit(lambda x: x * 3.25 + 1)(np.float32(2))
    assert watch.seconds["compiling"] > 0
    assert watch.report()["round"] >= watch.seconds["compiling"] + watch.seconds["scoring"]


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
