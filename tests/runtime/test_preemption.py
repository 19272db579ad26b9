"""Stopping on a signal."""

import os
import signal
import subprocess
import sys

import pytest

from tpaw_jax.runtime.preemption import Preempted, PreemptionNotice


def test_the_first_signal_is_noted_and_handlers_are_restored():
    before = signal.getsignal(signal.SIGTERM)
    with PreemptionNotice() as notice:
        notice.check("No signal yet")
        assert not notice.received_at(0)
        os.kill(os.getpid(), signal.SIGTERM)
        assert notice.received_at(1)
        with pytest.raises(Preempted, match="Round 3: sampling stopped; run the same command to resume there"):
            notice.check("Round 3: sampling stopped")
    assert signal.getsignal(signal.SIGTERM) == before


def test_the_second_signal_ends_the_process_at_once():
    code = """if True:
        import os, signal
        from tpaw_jax.runtime.preemption import PreemptionNotice
        with PreemptionNotice():
            os.kill(os.getpid(), signal.SIGINT)
            print("noted", flush=True)
            os.kill(os.getpid(), signal.SIGTERM)
            print("still here")
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 128 + signal.SIGTERM
    assert done.stdout == "noted\n"
    assert "SIGINT: the run stops once its current work is saved" in done.stderr
