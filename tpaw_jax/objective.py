"""The TPAW objective: implicit rewards, target and player weights, team loss.

Source: "Team-Based Self-Play With Dual Adaptive Weighting for Fine-Tuning LLMs", ACL 2026 (arXiv 2605.09922).
Every function takes the log-probs of responses, summed over their tokens, in nats. They can come from any model. The
functions work under jit, vmap and grad, and compute in float32 or higher precision.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float

Scalar = float | np.floating | Float[Array, ""]


class TeamLoss(NamedTuple):
    """The result of `team_loss`. Rewards are P_j: nats times lam. Masked players have reward 0 and beta 0."""

    loss: Float[Array, ""]
    per_triplet: Float[Array, "B"]
    alpha: Float[Array, "J B"]
    beta: Float[Array, "J B"]
    reward_target: Float[Array, "J B"]
    reward_generated: Float[Array, "J B"]


def team_loss(
    policy_target: Float[Array, "B"],
    policy_generated: Float[Array, "B"],
    player_target: Float[Array, "J B"],
    player_generated: Float[Array, "J B"],
    *,
    lam: Scalar,
    eta: Scalar,
    gamma: Scalar,
    player_mask: Bool[Array, "J"] | Bool[Array, "J B"] | None = None,
    tolerance: Scalar = 0.0,
) -> TeamLoss:
    """Compute the team loss of a batch of triplets (x, y, y_gen), judged by J frozen players::

        P_j(x, r)  = lam (log pi_theta(r|x) - log pi_theta_j(r|x))
        alpha_j    = eta if P_j(x, y) <= tolerance else 1               (target response weight)
        beta_j     = softmax_j(-gamma (P_j(x, y) - P_j(x, y_gen)))      (main player weight)
        loss       = mean over triplets of sum_j beta_j softplus(-(alpha_j P_j(x, y) - P_j(x, y_gen)))

    Gradients do not flow through alpha and beta. The paper uses tolerance 0; a positive tolerance keeps numerical
    noise around P_j = 0 from deciding alpha.

    Args:
        policy_target: log pi_theta(y|x), nats.
        policy_generated: log pi_theta(y_gen|x), nats.
        player_target: log pi_theta_j(y|x), nats, one row per player.
        player_generated: log pi_theta_j(y_gen|x), nats, one row per player.
        lam: reward scale; SPIN and DPO call it beta.
        eta: target response weight for targets whose reward is at most `tolerance`; 1 disables the weighting.
        gamma: sharpness of beta, which favors the player with the smallest margin; 0 weights players equally.
        player_mask: players to include. Triplets without any player are left out of the mean.
        tolerance: alpha is eta for rewards up to this value.
    """
    dtype = jnp.promote_types(jnp.result_type(policy_target), jnp.float32)
    policy_target, policy_generated = jnp.asarray(policy_target, dtype), jnp.asarray(policy_generated, dtype)
    player_target, player_generated = jnp.asarray(player_target, dtype), jnp.asarray(player_generated, dtype)
    mask = jnp.ones(player_target.shape, bool) if player_mask is None else player_mask
    mask = jnp.broadcast_to(mask if mask.ndim == 2 else mask[:, None], player_target.shape)

    # Mask before use, so that a missing player's values (NaN, for example) cannot reach a gradient.
    reward_target = lam * jnp.where(mask, policy_target - jnp.where(mask, player_target, 0), 0)
    reward_generated = lam * jnp.where(mask, policy_generated - jnp.where(mask, player_generated, 0), 0)

    alpha = lax.stop_gradient(jnp.where(reward_target <= tolerance, eta, 1).astype(dtype))
    beta = lax.stop_gradient(_masked_softmax(-gamma * (reward_target - reward_generated), mask))

    per_triplet = jnp.sum(beta * jax.nn.softplus(reward_generated - alpha * reward_target), axis=0)
    counted = jnp.sum(mask.any(axis=0))
    loss = jnp.sum(per_triplet) / jnp.maximum(counted, 1)
    return TeamLoss(loss, per_triplet, alpha, beta, reward_target, reward_generated)


def spin_loss(
    policy_target: Float[Array, "B"],
    policy_generated: Float[Array, "B"],
    player_target: Float[Array, "B"],
    player_generated: Float[Array, "B"],
    *,
    lam: Scalar,
) -> Float[Array, ""]:
    """Compute the SPIN loss (arXiv 2401.01335): the team loss with one player and eta = 1.

    It is the mean of softplus(-lam ((log pi(y|x) - log pi_t(y|x)) - (log pi(y_gen|x) - log pi_t(y_gen|x)))).
    """
    players = player_target[None], player_generated[None]
    return team_loss(policy_target, policy_generated, *players, lam=lam, eta=1.0, gamma=0.0).loss


def dpo_loss(
    policy_chosen: Float[Array, "B"],
    policy_rejected: Float[Array, "B"],
    reference_chosen: Float[Array, "B"],
    reference_rejected: Float[Array, "B"],
    *,
    beta: Scalar,
) -> Float[Array, ""]:
    """Compute the sigmoid DPO loss (arXiv 2305.18290): the SPIN loss with y chosen, y_gen rejected, lam = beta."""
    return spin_loss(policy_chosen, policy_rejected, reference_chosen, reference_rejected, lam=beta)


def _masked_softmax(logits: Float[Array, "J B"], mask: Bool[Array, "J B"]) -> Float[Array, "J B"]:
    """Softmax over the unmasked players; masked players get 0, also in triplets without any player."""
    top = jnp.max(jnp.where(mask, logits, -jnp.inf), axis=0, keepdims=True)
    weights = jnp.where(mask, jnp.exp(jnp.where(mask, logits - top, 0)), 0)
    return weights / jnp.maximum(jnp.sum(weights, axis=0, keepdims=True), jnp.finfo(weights.dtype).tiny)
