"""Runs of several processes on one machine: equal to a run of one process, and resumed on other devices."""

import json
import os
import socket

import forked
import numpy as np
import pod_run
import pytest
from conftest import STORIES, small_run

from tpaw_jax import models
from tpaw_jax.config import MeshConfig
from tpaw_jax.generation.policy import lora_of
from tpaw_jax.generation.slots import STEPS_PER_CHUNK
from tpaw_jax.models import adapters, hub
from tpaw_jax.planning.measured import readings
from tpaw_jax.runtime import processes, sharding
from tpaw_jax.storage import array_files, journal, ring


def start(directory, count, devices, of_process=lambda process: {}, call=pod_run.play, **settings):
    """Play a run in `count` processes with `devices` devices each; return their exit codes, outputs and errors."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    of_all = [(directory, port, count, p, settings | of_process(p)) for p in range(count)]
    output = lambda p: directory.with_name(f"{directory.name}_{p}.log")
    running = [forked.start(call, *of, output=output(p), jax_num_cpu_devices=devices) for p, of in enumerate(of_all)]
    return zip(*[child.finish() for child in running], strict=True)


def play(directory, count, devices, **settings):
    codes, _, errors = start(directory, count, devices, **settings)
    assert not any(codes), errors
    return json.loads((directory / "table.json").read_text())


def policy(directory, round_number):
    mesh = sharding.make_mesh(MeshConfig())
    _, like = models.load_pretrained(STORIES, sharder=sharding.param_sharder(mesh))
    return ring.restore_policy(ring.open_ring(journal.open_journal(directory), 3), round_number, like)


def tokens(directory, round_number):
    arrays = array_files.read(directory / f"round_{round_number:04d}" / "generations.npz")
    return arrays["tokens"], arrays["lengths"]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Three rounds of one process with one device."""
    directory = tmp_path_factory.mktemp("alone")
    return directory, play(directory, 1, 1)


def assert_same_run(found, expected, rounds):
    for t in range(rounds):
        for a, b in zip(tokens(found, t), tokens(expected, t), strict=True):
            np.testing.assert_array_equal(a, b)
    a, b = (flat(policy(directory, rounds)) for directory in (found, expected))
    difference, moved = a - b, b - flat(models.load_pretrained(STORIES)[1])
    assert rms(difference) < 3e-4 * rms(moved)
    # Adam turns the rounding of a gradient that is almost 0 into a step, so a few values may differ more.
    assert np.abs(difference).max() < 0.1 * np.abs(moved).max()


def rms(x):
    return np.sqrt(np.mean(np.square(x, dtype=np.float64)))


def flat(tree):
    import jax

    return np.concatenate([np.asarray(leaf).ravel() for leaf in jax.tree.leaves(tree)])


def test_two_processes_of_four_devices_play_the_rounds_of_one_device(alone, tmp_path):
    expected, table = alone
    played = play(tmp_path, 2, 4)
    assert_same_run(tmp_path, expected, 3)
    for a, b in zip(played, table, strict=True):
        assert a["triplets"] == b["triplets"]
        np.testing.assert_allclose(a["loss"], b["loss"], rtol=1e-5)


def test_a_run_resumes_with_other_devices_and_processes(alone, tmp_path):
    """Round 0 on eight devices, round 1 in two processes of two, round 2 on one device."""
    for rounds, (count, devices) in enumerate([(1, 8), (2, 2), (1, 1)], start=1):
        play(tmp_path, count, devices, rounds=rounds)
    assert_same_run(tmp_path, alone[0], 3)


def test_processes_sample_together_where_devices_share_a_model(alone, tmp_path):
    """Two processes of four devices, a copy of the model per two devices: one program for all, and the same tokens."""
    play(tmp_path, 2, 4, **{"sampling.tensor": 2, "sampling.slots": 4, "rounds": 1})
    for a, b in zip(tokens(tmp_path, 0), tokens(alone[0], 0), strict=True):
        np.testing.assert_array_equal(a, b)


def test_two_processes_train_adapters_as_one_device_does(tmp_path):
    settings = {"policy.lora.rank": 4, "policy.lora.base_dtype": "int8", "train.learning_rate": 1e-3, "rounds": 1}
    tables, policies = [], []
    for name, count, devices in (("alone", 1, 1), ("pod", 2, 4)):
        tables.append(play(tmp_path / name, count, devices, **settings)[0])
        kept = ring.open_ring(journal.open_journal(tmp_path / name), 3)
        policies.append([flat(ring.restore_policy(kept, t, adapters_of(settings))) for t in (0, 1)])
    np.testing.assert_array_equal(policies[0][0], policies[1][0])
    np.testing.assert_allclose(tables[0]["loss"], tables[1]["loss"], rtol=1e-5)
    moved, difference = policies[0][1] - policies[0][0], policies[0][1] - policies[1][1]
    assert rms(difference) < 3e-4 * rms(moved)


def adapters_of(settings):
    """The shapes of a run's adapters on this process's devices."""
    lora = lora_of(small_run("", **settings).policy.lora)
    mesh = sharding.make_mesh(MeshConfig())
    return adapters.split(hub.abstract_params(models.load_architecture(STORIES), np.float32, mesh, lora))[0]


def test_processes_that_differ_are_named(tmp_path):
    differing = lambda process: {"train.b1": 0.9 - process / 10}
    codes, _, errors = start(tmp_path, 2, 1, of_process=differing)
    assert 0 not in codes
    assert all("the configuration is" in error and "on process 1" in error for error in errors), errors


def test_steps_that_are_not_finite_stop_all_processes_and_leave_the_whole_batch(tmp_path):
    settings = {"train.max_skipped_in_a_row": 3, "objective.tolerance": 0, "rounds": 1}
    codes, _, errors = start(tmp_path / "run", 2, 2, call=pod_run.play_not_finite, **settings)
    assert not any(codes), errors
    first, second = ((tmp_path / f"run_{process}.txt").read_text() for process in range(2))
    assert first == second
    assert "not finite in 3 steps in a row" in first
    (saved,) = (tmp_path / "run" / "round_0000").glob("not_finite_step_*.npz")
    assert str(saved) in first
    arrays = np.load(saved)
    assert arrays["tokens"].shape[1] == 8  # rows of a batch: those of both processes


def test_one_process_needs_no_others():
    processes.check_same({"anything": "at all", **processes.facts_of_this_host()})
    processes.barrier("one process")
    given = processes.all_gather(values=np.arange(3))
    assert len(given) == 1
    np.testing.assert_array_equal(given[0]["values"], [0, 1, 2])


@pytest.mark.parametrize(
    "tensor",
    [
        pytest.param(
            1, marks=pytest.mark.skipif("TPAW_ALL_TESTS" not in os.environ, reason="15 s of what 2 tests too")
        ),
        2,
    ],
)
def test_two_processes_measure_together(tmp_path, tensor):
    codes, _, errors = start(tmp_path / "bench", 2, 2, call=pod_run.measure, **{"sampling.tensor": tensor})
    assert not any(codes), errors
    records = readings.read(tmp_path / "bench.jsonl")
    assert [record["stage"] for record in records] == ["prefill", "decode", "scoring", "step"]
    for record in records:
        assert record["settings"]["processes"] == 2
        assert record["settings"]["mesh"] == {"data": 1, "fsdp": 4, "expert": 1, "tensor": 1}
        assert record["tokens/s"] == pytest.approx(4 * record["tokens/s per device"])
    new = 2 * 8 * STEPS_PER_CHUNK  # in the slots of both processes
    assert new / records[1]["slowest s"] <= records[1]["tokens/s"] * (1 + 1e-9)
    assert records[1]["tokens/s"] <= new / records[1]["fastest s"] * (1 + 1e-9)
