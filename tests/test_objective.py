"""The team loss: the specification's vectors, its exact identities, and its behavior under transformations."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import FIXTURES
from hypothesis import given, settings
from hypothesis import strategies as st

from tpaw_jax.objective import dpo_loss, spin_loss, team_loss

CASES = json.loads((FIXTURES / "team_loss.json").read_text())
PAPER = {"lam": 0.1, "eta": 6.0, "gamma": 0.5}
ARRAYS = ("policy_target", "policy_generated", "player_target", "player_generated")


def random_arrays(seed, players=3, triplets=5, scale=30.0):
    rng = np.random.default_rng(seed)
    shapes = [(triplets,), (triplets,), (players, triplets), (players, triplets)]
    return [jnp.asarray(-100 + scale * rng.normal(size=shape), jnp.float32) for shape in shapes]


@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float32, 1e-5), (np.float64, 1e-12)])
@pytest.mark.parametrize("case", range(len(CASES)))
def test_vectors_of_the_specification(case, dtype, tolerance):
    inputs, expected = CASES[case]["inputs"], CASES[case]["expected"]
    with jax.enable_x64(dtype == np.float64):
        arrays = [jnp.asarray(np.asarray(inputs[name], dtype)) for name in ARRAYS]
        knobs = {name: inputs[name] for name in PAPER}
        loss = lambda *a: (team_loss(*a, **knobs).loss, team_loss(*a, **knobs))
        (_, out), gradients = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(*arrays)
        # Log-probs of hundreds of nats are rounded when they are stored, before anything is computed with them.
        largest = max(float(jnp.abs(a).max()) for a in arrays)
        rounding = np.finfo(dtype).eps * largest * knobs["lam"] * knobs["eta"]
        found = {**out._asdict(), "grad_target": gradients[0], "grad_generated": gradients[1]}
        for name, value in expected.items():
            value = np.asarray(value)
            scale = np.abs(value).max() if value.size else 1.0
            np.testing.assert_allclose(
                found[name], value, rtol=tolerance, atol=tolerance * scale + rounding, err_msg=name
            )


def test_one_player_without_target_weighting_is_spin_and_dpo():
    target, generated, *players = random_arrays(0, players=1)
    loss = team_loss(target, generated, *players, lam=0.1, eta=1.0, gamma=0.5).loss
    logits = 0.1 * ((target - players[0][0]) - (generated - players[1][0]))
    by_hand = -jnp.mean(jax.nn.log_sigmoid(logits))
    np.testing.assert_allclose(loss, by_hand, rtol=1e-6)
    np.testing.assert_allclose(spin_loss(target, generated, players[0][0], players[1][0], lam=0.1), by_hand, rtol=1e-6)
    np.testing.assert_allclose(dpo_loss(target, generated, players[0][0], players[1][0], beta=0.1), by_hand, rtol=1e-6)


def test_gamma_zero_gives_uniform_beta():
    out = team_loss(*random_arrays(1), lam=0.1, eta=6.0, gamma=0.0)
    np.testing.assert_allclose(out.beta, 1 / 3, rtol=1e-6)


def test_eta_one_gives_alpha_one():
    assert (team_loss(*random_arrays(2), lam=0.1, eta=1.0, gamma=0.5).alpha == 1).all()


def test_at_a_rounds_first_step_the_newest_player_has_reward_zero_and_alpha_eta():
    target, generated, player_target, player_generated = random_arrays(3)
    player_target, player_generated = player_target.at[0].set(target), player_generated.at[0].set(generated)
    out = team_loss(target, generated, player_target, player_generated, **PAPER)
    assert (out.reward_target[0] == 0).all()
    assert (out.reward_generated[0] == 0).all()
    assert (out.alpha[0] == PAPER["eta"]).all()


def test_the_worst_separating_player_gets_most_attention():
    target = generated = jnp.zeros(1)
    player_target = jnp.asarray([[0.0], [40.0]])  # the second player finds the target drifting
    out = team_loss(target, generated, player_target, jnp.zeros((2, 1)), **PAPER)
    # margins 0 and -4; beta = softmax(0, 2); alpha = eta for both
    np.testing.assert_allclose(out.beta[:, 0], np.exp([0.0, 2.0]) / np.exp([0.0, 2.0]).sum(), rtol=1e-6)
    expected = out.beta[0, 0] * np.log(2) + out.beta[1, 0] * np.log1p(np.exp(24.0))
    np.testing.assert_allclose(out.loss, expected, rtol=1e-6)


def test_weights_are_constants_to_the_gradient():
    target, generated, *players = random_arrays(4)
    out = team_loss(target, generated, *players, **PAPER)

    def with_fixed_weights(target, generated):
        reward_target, reward_generated = 0.1 * (target - players[0]), 0.1 * (generated - players[1])
        return jnp.mean(jnp.sum(out.beta * jax.nn.softplus(reward_generated - out.alpha * reward_target), axis=0))

    found = jax.grad(lambda t, g: team_loss(t, g, *players, **PAPER).loss, argnums=(0, 1))(target, generated)
    expected = jax.grad(with_fixed_weights, argnums=(0, 1))(target, generated)
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)


@pytest.mark.parametrize("gap", [1e4, -1e4])
def test_gaps_of_ten_thousand_nats_stay_finite(gap):
    zeros = jnp.zeros((3, 2))
    value, gradients = jax.value_and_grad(lambda t, g: team_loss(t, g, zeros, zeros, **PAPER).loss, argnums=(0, 1))(
        jnp.full(2, gap), jnp.full(2, -gap)
    )
    assert np.isfinite([value, *gradients[0], *gradients[1]]).all()


@pytest.mark.parametrize("present", [1, 2])
def test_masked_players_count_nothing_whatever_they_hold(present):
    target, generated, player_target, player_generated = random_arrays(5)
    alone = team_loss(target, generated, player_target[:present], player_generated[:present], **PAPER)
    poisoned = [p.at[present:].set(jnp.nan) for p in (player_target, player_generated)]
    mask = jnp.arange(3) < present
    for shaped in (mask, jnp.broadcast_to(mask[:, None], player_target.shape)):
        loss, gradient = jax.value_and_grad(
            lambda t, m: team_loss(t, generated, *poisoned, player_mask=m, **PAPER).loss, allow_int=True
        )(target, shaped)
        np.testing.assert_allclose(loss, alone.loss, rtol=1e-6)
        assert np.isfinite(gradient).all()


def test_a_triplet_without_players_counts_neither_in_sum_nor_mean():
    arrays = random_arrays(6, triplets=2)
    mask = jnp.asarray([[True, False]] * 3)
    first = team_loss(*(a[..., :1] for a in arrays), **PAPER)
    both = team_loss(*arrays, player_mask=mask, **PAPER)
    np.testing.assert_allclose(both.loss, first.loss, rtol=1e-6)
    assert both.per_triplet[1] == 0


def test_tolerance_decides_alpha_for_rewards_in_the_noise():
    target = jnp.asarray([1e-4, -1e-4, 1.0])
    zeros = jnp.zeros((1, 3))
    strict = team_loss(target, target, zeros, zeros, **PAPER)
    tolerant = team_loss(target, target, zeros, zeros, **PAPER, tolerance=2e-5)
    np.testing.assert_array_equal(strict.alpha[0], [1, 6, 1])
    np.testing.assert_array_equal(tolerant.alpha[0], [6, 6, 1])


def test_bfloat16_log_probs_are_reduced_in_float32():
    arrays = [a.astype(jnp.bfloat16) for a in random_arrays(7)]
    out = team_loss(*arrays, **PAPER)
    expected = team_loss(*(a.astype(jnp.float32) for a in arrays), **PAPER)
    assert out.loss.dtype == jnp.float32
    assert out.loss == expected.loss


def test_vmap_over_batches_equals_one_at_a_time():
    arrays = [jnp.stack(pair) for pair in zip(random_arrays(8), random_arrays(9), strict=True)]
    together = jax.vmap(lambda *a: team_loss(*a, **PAPER).loss)(*arrays)
    single = [team_loss(*(a[i] for a in arrays), **PAPER).loss for i in range(2)]
    np.testing.assert_allclose(together, single, rtol=1e-6)


seeds = st.integers(0, 2**31 - 1)


@settings(deadline=None, max_examples=30)
@given(seed=seeds, shift=st.floats(-50, 50))
def test_shifting_a_player_leaves_its_margin_and_beta(seed, shift):
    target, generated, player_target, player_generated = random_arrays(seed)
    before = team_loss(target, generated, player_target, player_generated, **PAPER)
    moved = [p.at[1].add(shift) for p in (player_target, player_generated)]
    after = team_loss(target, generated, *moved, **PAPER)
    np.testing.assert_allclose(after.beta, before.beta, atol=2e-4)


@settings(deadline=None, max_examples=30)
@given(seed=seeds, order=st.permutations(range(3)))
def test_permuting_players_permutes_weights_and_leaves_the_loss(seed, order):
    target, generated, *players = random_arrays(seed)
    before = team_loss(target, generated, *players, **PAPER)
    after = team_loss(target, generated, *(p[jnp.asarray(order)] for p in players), **PAPER)
    np.testing.assert_array_equal(after.alpha, before.alpha[jnp.asarray(order)])
    np.testing.assert_allclose(after.beta, before.beta[jnp.asarray(order)], rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(after.loss, before.loss, rtol=1e-5)


@settings(deadline=None, max_examples=30)
@given(seed=seeds, eta=st.floats(1, 20), gamma=st.floats(0, 5), lam=st.floats(0.01, 2))
def test_beta_is_a_distribution_and_alpha_has_two_values(seed, eta, gamma, lam):
    out = team_loss(*random_arrays(seed), lam=lam, eta=eta, gamma=gamma)
    np.testing.assert_allclose(out.beta.sum(axis=0), 1, rtol=1e-5)
    assert set(np.unique(out.alpha)) <= {np.float32(1), np.float32(eta)}
    assert np.isfinite(out.loss)
    assert out.loss >= 0
