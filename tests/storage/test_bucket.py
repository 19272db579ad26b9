"""What a run concludes from a bucket that cannot be used: nothing about what the bucket holds."""

import errno
import json

import aiohttp
import fsspec.exceptions
import gcsfs.retry
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import requests
from conftest import small_run

from tpaw_jax import cli
from tpaw_jax.config import MeshConfig
from tpaw_jax.runtime import sharding, supervisor
from tpaw_jax.selfplay import loop
from tpaw_jax.storage import bucket, files, journal, ring
from tpaw_jax.storage.files import CorruptedFile


def nested(error):
    try:
        raise RuntimeError("wrapped") from error
    except RuntimeError as wrapped:
        return wrapped


OUTAGES = [
    OSError("Forbidden: gs://runs/x"),
    TimeoutError(),
    ConnectionResetError(104, "Connection reset by peer"),
    fsspec.exceptions.FSTimeoutError(),
    gcsfs.retry.HttpError({"code": 503, "message": "Backend Error"}),
    requests.exceptions.ProxyError("502"),
    aiohttp.ServerDisconnectedError(),
    ValueError("ABORTED: All 32 retry attempts failed: CURL error[6] Could not resolve hostname"),
    ValueError("Error opening driver: UNAVAILABLE: CURL error[7]"),
    nested(gcsfs.retry.HttpError({"code": 500, "message": "We encountered an internal error"})),
]
NO_OUTAGES = [
    FileNotFoundError("runs/x"),
    ValueError("DATA_LOSS: Error reading: CRC-32C checksum verification failed"),
    ValueError("Found incomplete checkpoint at gs://runs/x."),
    KeyError("digests"),
    jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 1 bytes."),
]


@pytest.mark.parametrize("error", OUTAGES, ids=lambda error: type(error).__name__)
def test_failed_requests_are_no_corruption(in_bucket, error):
    assert bucket.is_outage(error)
    assert not files.is_corruption(error, in_bucket)


@pytest.mark.parametrize("error", NO_OUTAGES, ids=lambda error: type(error).__name__)
def test_other_errors_are_no_outages(in_bucket, error):
    assert not bucket.is_outage(error)
    assert files.is_corruption(error, in_bucket) == ("Out of memory" not in str(error))


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        jax.errors.JaxRuntimeError("INTERNAL: a collective failed"),
        ValueError("data.jsonl, line 3: not valid JSON"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_what_fails_in_a_run_is_not_blamed_on_its_bucket(in_bucket, monkeypatch, error):
    def fail(*_):
        raise error

    monkeypatch.setattr(loop, "open_session", fail)
    with pytest.raises(type(error)) as caught:
        loop.play(small_run(in_bucket), lambda _: None)
    assert caught.value is error


def policy():
    mesh = sharding.make_mesh(MeshConfig(fsdp=1), jax.devices()[:1])
    tree = {"layers": {"q": {"kernel": jnp.ones((2, 16, 8), jnp.float32)}}}
    return jax.device_put(tree, sharding.param_shardings(tree, mesh))


def pushed(directory):
    kept = ring.open_ring(journal.open_journal(directory), 3)
    ring.push(kept, policy(), 0)
    ring.finish_saves(kept)
    return kept


@pytest.mark.parametrize("error", OUTAGES[-2:], ids=lambda error: type(error).__name__)
def test_a_policy_that_cannot_be_fetched_is_not_taken_for_a_damaged_one(in_bucket, monkeypatch, error):
    kept = pushed(in_bucket / type(error).__name__)

    def fail(*_):
        raise error

    monkeypatch.setattr(kept.checkpointer, "restore", fail)
    with pytest.raises(bucket.BucketError, match="the bucket could not be used"):
        ring.restore_policy(kept, 0, policy())


def test_a_damaged_policy_is_found(in_bucket, monkeypatch):
    monkeypatch.setattr(ring, "SECONDS_BEFORE_READING_AGAIN", 0)
    kept = pushed(in_bucket)
    sizes = bucket.sizes(in_bucket / "ring")
    largest = in_bucket / "ring" / max(sizes, key=sizes.__getitem__)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 16
    largest.write_bytes(bytes(content))
    with pytest.raises(CorruptedFile, match="the checkpoint"):
        ring.restore_policy(kept, 0, policy())


def test_a_checkpoint_without_its_last_object_is_removed_and_saved_again(in_bucket):
    kept = pushed(in_bucket)
    path = in_bucket / "ring" / "policies" / "00000"
    (path / "commit_success.txt").unlink()
    assert kept.policies == []
    ring.remove_unfinished(kept)
    assert bucket.sizes(path) == {}
    ring.push(kept, policy(), 0)
    ring.finish_saves(kept)
    assert kept.policies == [0]
    jax.tree.map(np.testing.assert_array_equal, ring.restore_policy(kept, 0, policy()), policy())


def test_an_older_journal_is_used_if_the_newest_is_damaged_but_not_if_it_cannot_be_fetched(in_bucket, monkeypatch):
    opened = journal.open_journal(in_bucket)
    opened.config = {"rounds": 1}
    journal.save(opened)
    journal.write(opened, "round_0000/generations.npz", "sampling", 0, b"x")
    (in_bucket / "journal.json").write_bytes(b"{")
    older = journal.open_journal(in_bucket)
    assert (older.read_from, older.facts) == ("journal.before.json", {})
    fetch = bucket.read

    def fail(path, store=None):
        if path.name == "journal.json":
            raise bucket.BucketError(path, TimeoutError("no answer"))
        return fetch(path, store)

    monkeypatch.setattr(bucket, "read", fail)
    with pytest.raises(bucket.BucketError, match="TimeoutError: no answer"):
        journal.open_journal(in_bucket)


def test_a_file_that_a_kill_left_under_its_partial_name_is_finished(in_bucket, monkeypatch):
    opened = journal.open_journal(in_bucket)
    finish = files.finish_partial
    monkeypatch.setattr(files, "finish_partial", lambda path: None)  # the kill
    journal.write(opened, "round_0000/generations.npz", "sampling", 0, b"x")
    monkeypatch.setattr(files, "finish_partial", finish)
    assert not (in_bucket / "round_0000/generations.npz").exists()
    assert journal.check(journal.open_journal(in_bucket)) == {}
    assert (in_bucket / "round_0000/generations.npz").read_bytes() == b"x"
    assert not (in_bucket / "round_0000/generations.npz.partial").exists()


@pytest.mark.parametrize(
    ("error", "code"),
    [(TimeoutError("no answer"), supervisor.EXIT_CODE), (OSError("Forbidden: no access to the bucket"), 2)],
    ids=["passes", "refused"],
)
def test_a_run_that_cannot_reach_its_bucket_may_be_started_again(in_bucket, monkeypatch, capsys, error, code):
    def fail(*_):
        raise error

    monkeypatch.setattr(journal, "open_journal", lambda path, **_: bucket.read(path))
    monkeypatch.setattr(bucket, "_store", fail)
    assert cli.main(["demo", "--directory", str(in_bucket)]) == code
    assert f"{in_bucket}: the bucket could not be used ({type(error).__name__}" in capsys.readouterr().err


def test_a_quarantined_checkpoint_keeps_its_objects(in_bucket):
    kept = pushed(in_bucket)
    before = bucket.sizes(in_bucket / "ring" / "policies" / "00000")
    journal.quarantine(kept.journal, "ring/policies/00000")
    assert bucket.sizes(in_bucket / "ring" / "policies" / "00000.damaged") == before
    assert kept.policies == []
    assert json.loads((in_bucket / "journal.json").read_bytes())["facts"]["ring/policies/00000"]["lost"]


@pytest.mark.parametrize(
    ("path", "problem"),
    [
        ("s3://runs/x", "a run's directory is local or on Cloud Storage"),
        ("gs://runs/x%41", "name a bucket and a directory"),
        ("gs://runs/a*", "name a bucket and a directory"),
        ("gs://runs", "name a bucket and a directory"),
        ("gs://runs//a", "name a bucket and a directory"),
    ],
)
def test_what_cannot_be_a_run_in_a_bucket_is_refused(path, problem):
    with pytest.raises(ValueError, match=problem):
        bucket.open_path(path)
