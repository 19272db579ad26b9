"""Damage: found by its checksum wherever it is, told, and what was lost is made again as it was."""

import contextlib
import json
import os
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from conftest import small_run

from tpaw_jax.config import ObjectiveConfig, config_file
from tpaw_jax.generation.policy import open_policy
from tpaw_jax.observe.health import Diverged
from tpaw_jax.runtime import preemption, sharding
from tpaw_jax.selfplay import loop, plan, round_training, session
from tpaw_jax.storage import files, journal, recovery, ring


def flip(path):
    """One bit of the middle byte."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 16
    path.write_bytes(bytes(content))


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def remove(path):
    path.unlink()


def largest_file(checkpoint):
    return max((path for path in checkpoint.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    monkeypatch.setattr(jax, "devices", lambda *_: jax.local_devices()[:1])


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A run of three rounds, and the same prolonged to four: what a damaged copy of the first has to become."""
    three, four = tmp_path_factory.mktemp("three"), tmp_path_factory.mktemp("four") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "devices", lambda *_: jax.local_devices()[:1])
        loop.play(small_run(three), lambda _: None)
        shutil.copytree(three, four)
        loop.play(small_run(four, rounds=4), lambda _: None)
    return three, four


def policy_of(directory, round_number):
    run = small_run(directory)
    like = open_policy(run, sharding.make_mesh(run.mesh, jax.local_devices()[:1])).params
    kept = ring.open_ring(journal.open_journal(directory, read_only=True), 3)
    return ring.restore_policy(kept, round_number, like)


def assert_same(directory, whole):
    jax.tree.map(np.testing.assert_array_equal, policy_of(directory, 4), policy_of(whole, 4))
    for path in sorted(whole.glob("round_0003/*.npz")):
        ours, theirs = np.load(directory / path.relative_to(whole)), np.load(path)
        for name in theirs.files:
            np.testing.assert_array_equal(ours[name], theirs[name])


@pytest.mark.parametrize(
    ("name", "damage", "found", "made_again"),
    [
        ("ring/policies/00003", flip, "the checkpoint", ""),  # round 2 is the newest then
        ("ring/policies/00002", truncate, "instead of", "starting at round 1."),
        ("ring/policies/00001", flip, "the checkpoint", "starting at round 0."),
        ("round_0001/generations.npz", flip, "its checksum differs", "starting at round 1."),
        ("round_0002/scores_of_player_0002.npz", truncate, "bytes instead of", ""),
    ],
)
def test_what_is_damaged_is_found_and_made_again_as_it_was(runs, tmp_path, name, damage, found, made_again):
    three, four = runs
    directory, said = tmp_path / "run", []
    shutil.copytree(three, directory)
    path = directory / name
    damage(largest_file(path) if path.is_dir() else path)
    loop.play(small_run(directory, rounds=4), said.append)
    text = "\n".join(said)
    assert f"{path}: " in text
    assert found in text
    assert made_again in text
    assert ("The run regenerates them" in text) == bool(made_again)
    if "scores" in name:  # made again in rows packed otherwise: the same but for the order of sums
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), policy_of(directory, 4), policy_of(four, 4)
        )
    else:
        assert_same(directory, four)


def test_responses_are_regenerated_where_those_of_the_round_before_are_gone(runs, tmp_path):
    """Round 1 is not trained again, so it needs no responses of round 0, not even to tell its cost."""
    directory = tmp_path / "run"
    shutil.copytree(runs[0], directory)
    for t in (0, 1):
        remove(directory / f"round_{t:04d}" / "generations.npz")
    loop.play(small_run(directory, rounds=4), lambda _: None)
    assert not (directory / "round_0000" / "generations.npz").exists()
    assert_same(directory, runs[1])


def test_a_run_stops_where_file_after_file_reads_back_corrupted(tmp_path, monkeypatch):
    """Restarts for another reason in between do not count."""
    corrupted = files.CorruptedFile(tmp_path / "round_0000" / "generations.npz", "its checksum differs")
    outcomes = [corrupted, journal.RegeneratedDifferently("the regenerated one differs")] * 100
    left = iter(outcomes)

    def open_session(*_):
        raise next(left)

    monkeypatch.setattr(loop, "open_session", open_session)
    with pytest.raises(files.CorruptedFile, match="its checksum differs"):
        loop.play(small_run(tmp_path), lambda _: None)
    assert len(outcomes) - len(list(left)) == 2 * loop.MAX_CORRUPTED_FILES - 1


def test_a_strict_run_that_diverged_says_so_although_its_policy_is_regenerated_differently(tmp_path, monkeypatch):
    """The next start reads of the other policy from the journal; a restart now would play on."""

    outcomes = iter([Diverged("Round 1: every response is truncated."), AssertionError("the run plays on")])

    def finish_saves(_):
        raise journal.RegeneratedDifferently("the regenerated one differs")

    def play_rounds(*_):
        monkeypatch.setattr(ring, "finish_saves", finish_saves)
        raise next(outcomes)

    monkeypatch.setattr(loop, "play_rounds", play_rounds)
    with pytest.raises(Diverged, match="every response is truncated"):
        loop.play(small_run(tmp_path), lambda _: None, strict=True)


def test_a_damaged_training_state_is_left_and_the_round_trained_from_its_beginning(runs, tmp_path, monkeypatch):
    directory, said = tmp_path / "run", []
    notice = preemption.PreemptionNotice()
    monkeypatch.setattr(notice, "received_at", lambda step: step % (1 << 24) == 2)
    with pytest.raises(preemption.Preempted, match="Round 0: training stopped after step 3"):
        loop.play(small_run(directory, rounds=4), said.append, notice=notice)
    flip(largest_file(next((directory / "ring" / "training").iterdir())))
    loop.play(small_run(directory, rounds=4), said.append)
    assert "training/00000_00000003: the checkpoint" in "\n".join(said)
    assert_same(directory, runs[1])


JOURNALS = {  # what happens to journal.json, and the journal that the run then uses
    "flipped": (flip, "journal.before.json"),
    "removed": (remove, "journal.before.json"),
    "being replaced": (lambda path: path.rename(files.partial_path(path)), "journal.json.partial"),
}


@pytest.mark.parametrize("what", JOURNALS)
def test_a_damaged_journal_is_replaced_by_another_and_told(runs, tmp_path, what):
    (damage, other), directory, said = JOURNALS[what], tmp_path / "run", []
    shutil.copytree(runs[0], directory)
    damage(directory / "journal.json")
    loop.play(small_run(directory, rounds=4), said.append)
    assert f"journal.json is corrupted or missing; the run uses {other} instead." in "\n".join(said)
    assert_same(directory, runs[1])


def test_responses_that_are_damaged_while_their_round_trains_do_not_cost_the_training(runs, tmp_path, monkeypatch):
    """Only the summary reads them then. The next start samples them again."""
    directory, said, trained = tmp_path / "run", [], []
    shutil.copytree(runs[0], directory)
    train = round_training.train

    def damage(this, *arguments):
        trained.append(this.number)
        truncate(directory / "round_0003" / "generations.npz")
        return train(this, *arguments)

    monkeypatch.setattr(round_training, "train", damage)
    summaries = loop.play(small_run(directory, rounds=4), said.append)
    assert trained == [3]
    assert any("round_0003/generations.npz: the file is damaged" in text and "gap" in text for text in said)
    assert summaries[3]["sampler gap"] is None
    loop.play(small_run(directory, rounds=4), said.append)
    assert trained == [3]
    assert_same(directory, runs[1])


def test_a_run_without_any_whole_journal_is_refused(runs, tmp_path):
    directory = tmp_path / "run"
    shutil.copytree(runs[0], directory)
    for path in directory.glob("journal*.json"):
        path.unlink()
    with pytest.raises(ValueError, match=r"its journal\.json and journal\.before\.json are missing or damaged"):
        loop.play(small_run(directory), lambda _: None)


def test_what_cannot_be_made_as_it_was_takes_what_followed_with_it(runs, tmp_path):
    """As on a machine whose float sums differ: the journal expects other responses than the policy now gives."""
    directory, said = tmp_path / "run", []
    shutil.copytree(runs[0], directory)
    path = directory / "journal.json"
    opened = journal.open_journal(directory)
    opened.facts["round_0001/generations.npz"]["same"] = "of another machine"
    journal.save(opened)
    assert json.loads(path.read_text())["facts"]["round_0001/generations.npz"]["same"] == "of another machine"
    (directory / "round_0001" / "generations.npz").unlink()
    loop.play(small_run(directory, rounds=4), said.append)
    text = "\n".join(said)
    assert "the regenerated one differs from it" in text
    assert "ring/policies/00003" in text
    assert_same(directory, runs[1])


def test_a_policy_that_comes_out_otherwise_leaves_its_rounds_line_of_the_table(tmp_path):
    """The line is written before the policy, and is of its training; what comes after the policy goes."""
    opened = journal.open_journal(tmp_path)
    journal.write(opened, "round_0000/summary.json", "summary", 0, b"{}")
    journal.write(opened, "round_0001/generations.npz", "sampling", 1, b"responses", "same")
    facts = {"round": 0, "stage": "policy", "bytes": 0, "files": 0, "same": "as it was"}
    journal.record(opened, "ring/policies/00001", facts | {"lost": True})
    later = journal.record(opened, "ring/policies/00001", facts | {"same": "otherwise"})
    assert later == ["round_0001/generations.npz"]
    assert opened.is_complete("round_0000/summary.json")
    assert not (tmp_path / "round_0001" / "generations.npz").exists()


def test_a_run_goes_on_where_its_configuration_lacks_newer_keys(tmp_path):
    run, opened = small_run(tmp_path), journal.Journal(tmp_path)
    opened.config = config_file.to_dict(run)
    del opened.config["evaluation"], opened.config["objective"]["loss"], opened.config["data"]["responses"]
    session._check_unchanged(opened, run)
    with pytest.raises(ValueError, match=r"objective\.eta was 6\.0, is 1\.0"):
        session._check_unchanged(opened, small_run(tmp_path, **{"objective.eta": 1}))


class Killed(BaseException):
    """As SIGKILL: nothing catches it."""


OPERATIONS = [(os, "replace"), (Path, "rename"), (Path, "unlink"), (shutil, "rmtree"), (files, "write_partial")]
"""What changes the disk while a run recovers."""


@contextlib.contextmanager
def killed_before(number):
    """Raise before the operation of that number, and say how many there were."""
    done = []

    def counted(operation):
        def call(*arguments, **options):
            if len(done) == number:
                raise Killed
            done.append(operation)
            return operation(*arguments, **options)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for owner, name in OPERATIONS:
            patch.setattr(owner, name, counted(getattr(owner, name)))
        yield done


def recover(directory):
    """What opening a run does about its damage."""
    opened = journal.open_journal(directory)
    recovery.quarantine_corruption(opened, lambda _: None)
    kept = ring.open_ring(opened, 3)
    ring.remove_unfinished(kept)
    return plan.first_round(kept, ObjectiveConfig(), lambda _: None)


def remake_otherwise(directory):
    """Responses that were lost are made again and are others: what followed goes with them."""
    recover(directory)
    opened, name = journal.open_journal(directory), "round_0001/generations.npz"
    if not opened.is_complete(name):
        with contextlib.suppress(journal.RegeneratedDifferently):
            journal.write(opened, name, "sampling", 1, b"others", "of another machine")
    return recover(directory)


def what_is_there(directory):
    """What the journal says, and the content of all files that it calls whole."""
    opened = journal.open_journal(directory, read_only=True)
    paths = [directory / name for name in opened.facts if opened.is_complete(name)]
    files = [file for path in paths for file in (path.rglob("*") if path.is_dir() else [path]) if not file.is_dir()]
    return opened.facts, {str(file.relative_to(directory)): file.read_bytes() for file in files}


@pytest.mark.parametrize(
    ("names", "act", "first"),
    [
        (["round_0001/generations.npz"], recover, 1),
        (["ring/policies/00002", "round_0000/generations.npz"], recover, 0),
        (["ring/policies/00001", "ring/policies/00002", "ring/policies/00003"], recover, 0),  # begins again
        (["round_0001/generations.npz"], remake_otherwise, 0),  # of whose scores a player has left the ring
    ],
)
def test_recovery_may_be_killed_between_any_two_changes_of_the_disk(runs, tmp_path, names, act, first):
    damaged, whole = tmp_path / "damaged", tmp_path / "whole"
    shutil.copytree(runs[0], damaged)
    for name in names:
        path = damaged / name
        truncate(largest_file(path) if path.is_dir() else path)
    shutil.copytree(damaged, whole)
    with killed_before(None) as done:
        assert act(whole) == first
    assert len(done) > 3
    for number in range(len(done)):
        directory = tmp_path / "killed"
        shutil.copytree(damaged, directory)
        with killed_before(number), pytest.raises(Killed):
            act(directory)
        assert act(directory) == first
        assert what_is_there(directory) == what_is_there(whole), f"killed before change {number}"
        shutil.rmtree(directory)
