"""The parent of a pod's process says how it ended, kills it if it hangs, and starts it again."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tpaw_jax.runtime import supervisor

STATUS = {"process": 1, "hosts": {"0": "first", "1": "second"}}
WRITE_STATUS = f"import os, signal, sys, time; open(os.environ['TPAW_STATUS'], 'w').write('''{json.dumps(STATUS)}'''); "


@pytest.fixture(autouse=True)
def no_pause(monkeypatch):
    monkeypatch.setattr(supervisor, "SECONDS_BETWEEN_STARTS", 0.0)


def supervise(code, restarts=0, timeout=0.1):
    return supervisor.supervise([sys.executable, "-c", code], timeout, restarts)


@pytest.mark.parametrize("code", [0, 1, 2, 75])
def test_an_exit_code_is_passed_on(code, capfd):
    assert supervise(f"raise SystemExit({code})") == code
    assert capfd.readouterr().err == ""


def test_a_failed_process_is_started_again_until_it_succeeds(tmp_path, capfd):
    log = tmp_path / "log"
    code = (
        f"import os; f = open({str(log)!r}, 'a+'); f.write('x'); f.seek(0); raise SystemExit(69 * (len(f.read()) < 3))"
    )
    assert supervise(code, restarts=5) == 0
    assert log.read_text() == "xxx"
    assert capfd.readouterr().err.splitlines() == [
        "tpaw: exit code 69; starting again, 1 of 5 times.",
        "tpaw: exit code 69; starting again, 2 of 5 times.",
    ]


@pytest.mark.parametrize("final", [2, 75, 130])
def test_bad_input_and_preemption_are_not_started_again(tmp_path, final):
    log = tmp_path / "log"
    assert supervise(f"open({str(log)!r}, 'a').write('x'); raise SystemExit({final})", restarts=5) == final
    assert log.read_text() == "x"


@pytest.mark.parametrize(
    ("number", "sentence"),
    [
        ("SIGKILL", "Process 1 (host second) was ended by SIGKILL. Was the memory of the host exhausted?"),
        ("SIGSEGV", "Process 1 (host second) was ended by SIGSEGV."),
        (
            "SIGABRT",
            "JAX has ended Process 1 (host second), most likely because process 0 (host first) is gone: it was killed, "
            "or its host or network failed. The same command on all hosts resumes the run.",
        ),
    ],
)
def test_a_process_that_a_signal_ends_is_named(number, sentence, capfd):
    assert supervise(f"{WRITE_STATUS} os.kill(os.getpid(), signal.{number})") == 69
    assert f"tpaw: {sentence}\n" in capfd.readouterr().err


def test_a_process_that_jax_ends_before_its_first_heartbeat_was_not_connected(capfd):
    assert supervise("import os; os.abort()") == 69
    assert "tpaw: JAX has ended the process before it was connected to the others. Check" in capfd.readouterr().err


def test_a_process_without_a_heartbeat_is_killed(capfd, monkeypatch):
    monkeypatch.setattr(supervisor, "GRACE", 0.5)
    start = time.monotonic()
    assert supervise(f"{WRITE_STATUS} os.kill(os.getpid(), signal.SIGSTOP)", timeout=1.0) == 69
    assert time.monotonic() - start < 30
    assert "tpaw: Process 1 (host second) was stopped or hung: it had no heartbeat for 2 s.\n" in capfd.readouterr().err


def test_signals_reach_the_process(tmp_path):
    ready = tmp_path / "ready"
    child = "import signal, sys, time; signal.signal(signal.SIGTERM, lambda *_: sys.exit(75)); "
    child += f"open({str(ready)!r}, 'w'); time.sleep(60)"
    running = supervised(child, ready.exists)
    running.send_signal(signal.SIGTERM)
    assert running.wait(30) == 75


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends a child with its parent")
def test_the_process_ends_with_its_parent(tmp_path):
    place = tmp_path / "pid"
    child = "from tpaw_jax.runtime import supervisor; supervisor.end_with_parent(); "
    child += f"import os, time; open({str(place)!r}, 'w').write(str(os.getpid()) + '.'); time.sleep(60)"
    running = supervised(child, lambda: place.exists() and place.read_text().endswith("."))
    running.kill()
    running.wait()
    pid = int(place.read_text().rstrip("."))
    deadline = time.monotonic() + 10
    while is_running(pid):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def supervised(child, is_ready):
    """A supervisor in a process of its own, once its child is ready."""
    parent = "import sys; from tpaw_jax.runtime import supervisor; sys.exit(supervisor.supervise(sys.argv[1:], 60, 3))"
    running = subprocess.Popen([sys.executable, "-c", parent, sys.executable, "-c", child])
    while not is_ready():
        assert running.poll() is None
        time.sleep(0.01)
    return running


def is_running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
