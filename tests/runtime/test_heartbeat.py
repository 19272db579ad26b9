"""A process of a pod that fails ends all of them, with its name and the reason."""

import signal
import socket
import time

import forked
import pod_run
import pytest

from tpaw_jax.runtime import heartbeat

HOST = socket.gethostname()


def end_together(tmp_path, faults, timeout=20.0):
    """Exit codes, errors and seconds of processes that beat, of which some fail."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    start = time.monotonic()
    running = [
        forked.start(pod_run.beat, tmp_path, port, len(faults), p, fault, timeout, output=tmp_path / f"{p}.log")
        for p, fault in enumerate(faults)
    ]
    for child, fault in zip(running, faults, strict=True):
        if fault != "stopped":
            child.process.join(60)
    codes, outputs, errors = zip(*[child.finish(0) for child in running], strict=True)
    return codes, outputs, errors, time.monotonic() - start


def test_processes_that_finish_wait_for_each_other(tmp_path):
    codes, outputs, errors, _ = end_together(tmp_path, ["finishes", "finishes late"])
    assert codes == (0, 0), errors
    waited = [float(output.split()[-1]) for output in outputs]
    assert waited[0] > 1.5  # the other one slept for 2 s


@pytest.mark.parametrize("failing", [0, 1])
def test_an_error_ends_all_processes_with_its_sentence_and_its_code(tmp_path, failing):
    faults = ["waits", "waits", "waits"]
    faults[failing] = "fails"
    codes, _, errors, _ = end_together(tmp_path, faults)
    assert codes == (2, 2, 2), errors
    for process, error in enumerate(errors):
        said = f"tpaw: Process {failing} of 3 (host {HOST}) failed: the disk is full.\n"
        assert error.endswith(said) == (process != failing), error  # the command has printed its own error


def test_a_process_that_fails_last_ends_those_that_wait_for_it(tmp_path):
    codes, _, errors, _ = end_together(tmp_path, ["finishes", "fails late", "finishes"])
    assert codes == (2, 2, 2), errors
    assert all("Process 1 of 3" in errors[process] for process in (0, 2))


@pytest.mark.parametrize(("fault", "process"), [("killed", 1), ("stopped", 1), ("stopped", 0)])
def test_a_silent_process_ends_the_others_after_the_timeout(tmp_path, fault, process):
    faults = ["waits", "waits"]
    faults[process] = fault
    codes, _, errors, _ = end_together(tmp_path, faults, timeout=3.0)
    assert codes[process] == -signal.SIGKILL, errors
    assert codes[1 - process] == 69, errors
    said = f"tpaw: Process {process} of 2 (host {HOST}) has not answered for 3 s: the process was killed"
    assert said in errors[1 - process]


def test_an_error_that_follows_from_a_failure_is_not_reported_instead_of_it(tmp_path):
    """As when a collective raises because another process is gone."""
    codes, _, errors, _ = end_together(tmp_path, ["suffers", "killed"], timeout=3.0)
    assert codes[0] == 69, errors
    assert "has not answered for 3 s" in errors[0]
    assert "collective" not in errors[0]


def test_a_barrier_that_a_process_does_not_reach_ends_with_an_error(tmp_path):
    codes, _, errors, _ = end_together(tmp_path, ["barrier", "finishes late"])
    assert codes == (1, 1), errors
    assert "The processes of the pod did not meet at the same place ('here', within 1 s)" in errors[1]


def test_one_process_has_no_heartbeat():
    heartbeat.start(1.0)
    heartbeat.fail(2, "nobody else is there")
    heartbeat.await_failure()
    heartbeat.finish()
