"""The ring: the newest N_max policies, on any mesh, none removed before its successor is complete."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tpaw_jax.config import MeshConfig, ObjectiveConfig, TrainConfig
from tpaw_jax.runtime import sharding
from tpaw_jax.storage import journal, ring
from tpaw_jax.training import train_step


def policy(value, mesh=None):
    tree = {"layers": {"q": {"kernel": jnp.full((2, 16, 8), value, jnp.float32)}}, "final_norm": {"scale": jnp.ones(4)}}
    mesh = mesh or sharding.make_mesh(MeshConfig(fsdp=1), jax.devices()[:1])
    return jax.device_put(tree, sharding.param_shardings(tree, mesh))


def test_the_newest_players_are_kept_in_order(tmp_path):
    kept = ring.open_ring(journal.open_journal(tmp_path), 3)
    for t in range(5):
        ring.push(kept, policy(float(t)), t)
        ring.finish_saves(kept)
        assert kept.policies == list(range(max(0, t - 2), t + 1))
        assert ObjectiveConfig().players(t) == kept.policies[::-1]
    restored = ring.restore_policy(kept, 3, policy(0.0))
    assert (np.asarray(restored["layers"]["q"]["kernel"]) == 3).all()


def test_an_old_policy_stays_until_its_successor_is_complete(tmp_path):
    kept = ring.open_ring(journal.open_journal(tmp_path), 1)
    ring.push(kept, policy(0.0), 0)
    ring.finish_saves(kept)
    ring.push(kept, policy(1.0), 1)
    assert 0 in kept.policies  # the save of policy 1 is not finished
    ring.finish_saves(kept)
    assert kept.policies == [1]


def test_a_policy_is_restored_on_another_mesh(tmp_path):
    kept = ring.open_ring(journal.open_journal(tmp_path), 3)
    eight = sharding.make_mesh(MeshConfig(fsdp=8))
    ring.push(kept, policy(7.0, eight), 0)
    ring.finish_saves(kept)
    for mesh in (sharding.make_mesh(MeshConfig(fsdp=2), jax.devices()[:2]), eight):
        like = policy(0.0, mesh)
        restored = ring.restore_policy(kept, 0, like)
        jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, np.asarray(b)), restored, policy(7.0))
        assert restored["layers"]["q"]["kernel"].sharding == like["layers"]["q"]["kernel"].sharding


def test_training_states_replace_each_other_and_are_removed_with_their_round(tmp_path):
    kept = ring.open_ring(journal.open_journal(tmp_path), 3)
    mesh = sharding.make_mesh(MeshConfig(fsdp=1), jax.devices()[:1])
    state = train_step.init_state(policy(1.0), train_step.make_optimizer(TrainConfig()), mesh)
    ring.push(kept, policy(0.0), 0)
    for step in (2, 4):
        ring.save_training(kept, state.replace(step=jnp.int32(step)), 0, step)
    ring.finish_saves(kept)
    assert kept.training_states == [(0, 4)]
    assert int(ring.restore_training(kept, 0, 4, state).step) == 4
    ring.push(kept, policy(1.0), 1)
    ring.finish_saves(kept)
    assert kept.training_states == []


def test_incomplete_checkpoints_are_removed_and_corrupted_ones_reported(tmp_path):
    kept = ring.open_ring(journal.open_journal(tmp_path), 3)
    ring.push(kept, policy(0.0), 0)
    ring.finish_saves(kept)
    (tmp_path / "ring" / "policies" / "00001.orbax-checkpoint-tmp-7").mkdir()
    (tmp_path / "ring" / "policies" / "00000.removed").mkdir()
    assert ring.open_ring(journal.open_journal(tmp_path), 3).policies == [0]
    ring.remove_unfinished(kept)
    assert [p.name for p in (tmp_path / "ring" / "policies").iterdir()] == ["00000"]
    for file in (tmp_path / "ring" / "policies" / "00000").rglob("*"):
        if file.is_file():
            file.write_bytes(b"")
    with pytest.raises(ValueError, match="policies/00000: the checkpoint cannot be read"):
        ring.restore_policy(kept, 0, policy(0.0))


def test_a_reader_changes_nothing_of_a_run_that_regenerates_a_policy(tmp_path):
    kept = ring.open_ring(journal.open_journal(tmp_path), 3)
    for t in range(2):
        ring.push(kept, policy(float(t)), t)
        ring.finish_saves(kept)
    kept.journal.facts["ring/policies/00000"] |= {"lost": True, "same": "what was lost"}
    journal.save(kept.journal)
    reader = ring.open_ring(journal.open_journal(tmp_path, read_only=True), 3)
    restored = ring.restore_policy(reader, 0, policy(1.0))
    assert (np.asarray(restored["layers"]["q"]["kernel"]) == 0).all()
    assert ring.open_ring(journal.open_journal(tmp_path), 3).policies == [0, 1]
