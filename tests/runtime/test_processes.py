"""Runs of several processes on one machine: equal to a run of one process, and resumed on other devices."""

import json
import socket
import subprocess
import sys
from subprocess import PIPE, STDOUT

import numpy as np
import pytest
from conftest import ROOT, STORIES, child_environment

from tpaw_jax import models
from tpaw_jax.config import MeshConfig
from tpaw_jax.runtime import processes, sharding
from tpaw_jax.storage import files, journal, ring

SCRIPT = ROOT / "tests" / "pod_run.py"


def start(directory, processes, devices, *overrides, of_process=lambda process: ()):
    """Play a run in several processes with `devices` devices each; return their outputs and exit codes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = lambda p: [sys.executable, str(SCRIPT), *map(str, (directory, port, processes, p, devices)), *overrides]
    running = [
        subprocess.Popen([*command(p), *of_process(p)], stdout=PIPE, stderr=STDOUT, text=True, env=child_environment())
        for p in range(processes)
    ]
    try:
        return [p.communicate(timeout=400)[0] for p in running], [p.returncode for p in running]
    finally:
        for p in running:
            p.kill()


def play(directory, processes, devices, *overrides):
    outputs, codes = start(directory, processes, devices, *overrides)
    assert codes == [0] * processes, outputs
    return json.loads((directory / "table.json").read_text())


def policy(directory, round_number):
    mesh = sharding.make_mesh(MeshConfig())
    _, like = models.load_pretrained(STORIES, sharder=sharding.param_sharder(mesh))
    return ring.restore_policy(ring.open_ring(journal.open_journal(directory), 3), round_number, like)


def tokens(directory, round_number):
    arrays = files.read_arrays(directory / f"round_{round_number:04d}" / "generations.npz")
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
    for a, b in zip(map(flat, (policy(found, rounds),)), map(flat, (policy(expected, rounds),)), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5)


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
        play(tmp_path, count, devices, f"rounds={rounds}")
    assert_same_run(tmp_path, alone[0], 3)


def test_processes_sample_together_where_devices_share_a_model(alone, tmp_path):
    """Two processes of four devices, a copy of the model per two devices: one program for all, and the same tokens."""
    play(tmp_path, 2, 4, "sampling.tensor=2", "sampling.slots=4", "rounds=1")
    for a, b in zip(tokens(tmp_path, 0), tokens(alone[0], 0), strict=True):
        np.testing.assert_array_equal(a, b)


def test_processes_that_differ_are_named(tmp_path):
    differing = lambda process: (f"train.b1={0.9 - process / 10}",)
    outputs, codes = start(tmp_path, 2, 1, of_process=differing)
    assert 0 not in codes
    assert all("the configuration is" in output and "on process 1" in output for output in outputs), outputs


def test_one_process_needs_no_others():
    processes.check_same({"anything": "at all", **processes.facts_of_this_host()})
    processes.barrier("one process")
    given = processes.all_gather(values=np.arange(3))
    assert len(given) == 1
    np.testing.assert_array_equal(given[0]["values"], [0, 1, 2])
