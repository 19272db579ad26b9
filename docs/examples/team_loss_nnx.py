"""The team loss on a Flax NNX model: one gradient step per batch, three frozen checkpoints as players.

python docs/examples/team_loss_nnx.py
"""

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from tpaw_jax import team_loss

VOCABULARY, WIDTH = 32, 16


class Model(nnx.Module):
    """A causal model: the mean of the embeddings so far predicts the next token."""

    def __init__(self, rngs):
        self.embedding = nnx.Embed(VOCABULARY, WIDTH, rngs=rngs)
        self.head = nnx.Linear(WIDTH, VOCABULARY, rngs=rngs)

    def __call__(self, tokens):  # [B, T] -> logits [B, T, V]
        so_far = jnp.cumsum(self.embedding(tokens), axis=1)
        return self.head(so_far / (1 + jnp.arange(tokens.shape[1]))[:, None])


def log_prob(model, tokens, prompt_length):
    """Summed log-prob of the response that follows the prompt, nats, [B]."""
    logits = jax.nn.log_softmax(model(tokens[:, :-1]))
    picked = jnp.take_along_axis(logits, tokens[:, 1:, None], axis=-1)[..., 0]
    return picked[:, prompt_length - 1 :].sum(axis=1)


def loss(policy, players, target, generated):
    judge = lambda tokens: jnp.stack([log_prob(player, tokens, 4) for player in players])
    log_probs = log_prob(policy, target, 4), log_prob(policy, generated, 4)
    return team_loss(*log_probs, judge(target), judge(generated), lam=0.1, eta=6.0, gamma=0.5).loss


@nnx.jit
def step(policy, optimizer, players, target, generated):
    value, gradients = nnx.value_and_grad(loss)(policy, players, target, generated)
    optimizer.update(policy, gradients)
    return value


def main():
    players = [Model(nnx.Rngs(seed)) for seed in range(3)]  # newest first
    policy = nnx.clone(players[0])
    optimizer = nnx.Optimizer(policy, optax.adam(1e-2), wrt=nnx.Param)
    tokens = jax.random.randint(jax.random.key(0), (2, 8, 12), 0, VOCABULARY)
    losses = [float(step(policy, optimizer, players, *tokens)) for _ in range(20)]
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")
    assert losses[-1] < losses[0]


if __name__ == "__main__":
    main()
