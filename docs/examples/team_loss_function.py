"""The team loss on a plain function: a bigram table, jit, grad, and what the loss returns.

python docs/examples/team_loss_function.py
"""

import jax
import jax.numpy as jnp

from tpaw_jax import team_loss


def log_prob(table, tokens):
    """Summed log-prob of token sequences [B, T] under a bigram table [V, V], nats, [B]."""
    return jnp.take_along_axis(jax.nn.log_softmax(table)[tokens[:, :-1]], tokens[:, 1:, None], -1).sum((1, 2))


def loss(table, players, target, generated):
    judge = lambda tokens: jax.vmap(log_prob, (0, None))(players, tokens)  # [J, B]
    policy = log_prob(table, target), log_prob(table, generated)
    out = team_loss(*policy, judge(target), judge(generated), lam=0.1, eta=6.0, gamma=0.5)
    return out.loss, out


def main():
    players = jax.random.normal(jax.random.key(0), (3, 5, 5))  # newest first
    target, generated = jax.random.randint(jax.random.key(1), (2, 4, 6), 0, 5)
    step = jax.jit(jax.value_and_grad(loss, has_aux=True))
    table = players[0]
    for i in range(31):
        (value, out), gradient = step(table, players, target, generated)
        table = table - 2.0 * gradient
        if i % 10 == 0:
            alpha, beta = out.alpha[0].mean(), out.beta[0].mean()
            print(f"step {i:2d}: loss {value:.3f}; newest player: mean alpha {alpha:.1f}, mean beta {beta:.2f}")
    assert float(value) < 0.69


if __name__ == "__main__":
    main()
