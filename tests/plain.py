"""The plain twins: separate padded pairs, full logits, live references, one request at a time."""

import jax
import jax.numpy as jnp
import numpy as np

from tpaw_jax.objective import team_loss


def pad(sequences, length=None):
    """(prompt, response) pairs as rows of tokens, and which of them are response tokens."""
    length = length or max(len(x) + len(r) for x, r in sequences)
    tokens = np.zeros((len(sequences), length), np.int32)
    mask = np.zeros((len(sequences), length), np.float32)
    for row, (x, r) in enumerate(sequences):
        tokens[row, : len(x) + len(r)] = np.concatenate([x, r])
        mask[row, len(x) : len(x) + len(r)] = 1
    return tokens, mask


def pair_log_probs(model, params, tokens, mask):
    """Summed response log-probs of padded sequences, through full logits."""
    logits = model.apply({"params": params}, tokens)[:, :-1]
    log_probs = jax.nn.log_softmax(logits.astype(jnp.float32))
    picked = jnp.take_along_axis(log_probs, tokens[:, 1:, None], axis=-1)[..., 0]
    return jnp.sum(picked * mask[:, 1:], axis=1)


def triplets_of(prompts, window):
    """Every (x, y, y_gen) of D_O, one by one."""
    return [
        (prompts.prompt_tokens[i], prompts.target_tokens[i], g.tokens[i]) for g in window for i in range(len(prompts))
    ]


def pair_batch(triplets, length=None):
    """The two sides of triplets, targets and generations, each padded to `length` or the longest of both."""
    targets, generated = [(x, y) for x, y, _ in triplets], [(x, g) for x, _, g in triplets]
    length = length or max(len(x) + len(r) for x, r in targets + generated)
    return pad(targets, length), pad(generated, length)


def pair_loss(model, params, references, batch, **knobs):
    """The team loss of a `pair_batch` with live references."""
    both = lambda p: [pair_log_probs(model, p, *side) for side in batch]
    players = [both(p) for p in references]
    stacked = [jnp.stack(side) for side in zip(*players, strict=True)]
    return team_loss(*both(params), *stacked, **knobs).loss
