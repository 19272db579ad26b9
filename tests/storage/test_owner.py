"""One process at a time owns a run's directory, on a disk and in a bucket."""

import json
import os
import signal
import subprocess
import sys
import threading

import pytest

from tpaw_jax.runtime import supervisor
from tpaw_jax.storage import bucket, journal, owner

quiet = lambda text: None


def die_as_owner(directory):
    """A process that owns a directory, and is killed."""
    code = """if True:
        import os, signal, sys
        from tpaw_jax.storage import bucket, owner
        with owner.owned(bucket.open_path(sys.argv[1]), print):
            os.kill(os.getpid(), signal.SIGKILL)
    """
    done = subprocess.run([sys.executable, "-c", code, str(directory)], timeout=120, check=False)
    assert done.returncode == -signal.SIGKILL


def test_only_one_process_gets_the_lock_of_a_directory(tmp_path):
    with (
        owner.owned(tmp_path / "run", quiet),
        pytest.raises(ValueError, match=rf"another process is using this directory: process {os.getpid()} on "),
        owner.owned(tmp_path / "run", quiet),
    ):
        pass
    with owner.owned(tmp_path / "run", quiet):  # free again
        pass


def test_a_killed_process_releases_its_lock(tmp_path):
    die_as_owner(tmp_path)
    with owner.owned(tmp_path, quiet):
        pass


def test_only_one_process_gets_the_lease_of_a_bucket(in_bucket):
    said = []
    with (
        owner.owned(in_bucket, quiet, seconds=2),
        pytest.raises(ValueError, match=rf"another process is using this directory: process {os.getpid()} on "),
        owner.owned(in_bucket, said.append, seconds=2),
    ):
        pass
    assert "Waiting 2 s for a sign of life" in said[0]
    assert not (in_bucket / ".held").exists()
    with owner.owned(in_bucket, quiet):
        pass


def test_of_many_that_wait_for_a_lease_one_gets_it(in_bucket):
    (in_bucket / ".held").write_bytes(b'{"process": 1, "host": "gone", "seconds": 1}')
    owners, refused, done = [], [], threading.Event()

    def own():
        try:
            with owner.owned(in_bucket, quiet, seconds=1) as own:
                own.check()
                owners.append(1)
                done.wait(20)
        except ValueError as error:
            refused.append(str(error))

    waiting = [threading.Thread(target=own) for _ in range(5)]
    for thread in waiting:
        thread.start()
    while len(refused) < 4:
        assert any(thread.is_alive() for thread in waiting)
    done.set()
    for thread in waiting:
        thread.join()
    assert (len(owners), len(refused)) == (1, 4)


def test_a_lease_is_free_at_once_if_its_owner_died_on_this_host_and_later_if_elsewhere(in_bucket):
    die_as_owner(in_bucket)
    said = []
    held = json.loads((in_bucket / ".held").read_bytes())
    with owner.owned(in_bucket, said.append, seconds=300):
        assert not said
    (in_bucket / ".held").write_bytes(json.dumps(held | {"host": "another", "seconds": 1}).encode())
    with owner.owned(in_bucket, said.append):
        assert "on another used this directory last" in said[0]


def test_one_that_has_lost_its_lease_writes_nothing_more(in_bucket):
    slow = journal.open_journal(in_bucket)
    journal.write(slow, "round_0000/generations.npz", "sampling", 0, b"first")
    fast = journal.open_journal(in_bucket)
    journal.write(fast, "round_0000/generations.npz", "sampling", 0, b"second")
    with pytest.raises(journal.TakenOver, match="another process writes here, so this one stops"):
        journal.write(slow, "round_0000/generations.npz", "sampling", 0, b"third")
    assert (in_bucket / "round_0000/generations.npz").read_bytes() == b"second"
    with pytest.raises(journal.TakenOver):
        journal.save(slow)
    assert journal.check(journal.open_journal(in_bucket)) == {}


def test_an_owner_whose_lease_was_taken_ends_at_its_next_beat(in_bucket):
    code = """if True:
        import sys, time
        from tpaw_jax.storage import bucket, journal, owner
        directory = bucket.open_path(sys.argv[1])
        with owner.owned(directory, print, seconds=2) as own:
            own.check()
            (directory / ".held").write_bytes(b'{"key": "of another"}')
            try:
                own.check()
            except journal.TakenOver:
                print("checked", flush=True)
            time.sleep(60)
    """
    done = subprocess.run([sys.executable, "-c", code, str(in_bucket)], capture_output=True, text=True, timeout=50)
    assert (done.returncode, done.stdout) == (supervisor.EXIT_CODE, "checked\n")
    assert "another process writes here, so this one stops" in done.stderr
    assert json.loads((in_bucket / ".held").read_bytes()) == {"key": "of another"}


def test_two_processes_that_write_the_same_journal_are_told_apart(in_bucket):
    one, other = journal.open_journal(in_bucket), journal.open_journal(in_bucket)
    journal.save(one)
    with pytest.raises(journal.TakenOver):
        journal.save(other)


def test_a_write_that_was_answered_too_late_meets_itself(in_bucket):
    path = in_bucket / "x"
    _, absent = bucket.read(path)
    first = bucket.replace(path, b"1", absent)
    assert bucket.replace(path, b"1", absent) == first  # sent again after a lost answer
    assert bucket.replace(path, b"2", absent) is None
    assert path.read_bytes() == b"1"
    assert bucket.replace(path, None, first)
    assert bucket.read(path)[0] is None
