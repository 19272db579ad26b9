"""The sampling engine around a model of your own: slots, refills and stop tokens come with it.

python docs/examples/generate_apply_fn.py
"""

import jax
import numpy as np

import tpaw_jax

VOCABULARY, STOP = 16, 0


def apply_fn(table, tokens):
    """Your causal model: tokens [B, T] -> logits [B, T, V]. The engine recomputes the sequence in every step."""
    return table[tokens]


def main():
    table = jax.random.normal(jax.random.key(0), (VOCABULARY, VOCABULARY))
    rng = np.random.default_rng(0)
    asked = tuple(rng.integers(1, VOCABULARY, rng.integers(2, 6)).astype(np.int32) for _ in range(6))
    prompts = tpaw_jax.Prompts(np.arange(6, dtype=np.int32), prompt_tokens=asked, target_tokens=asked)

    config = tpaw_jax.SamplingConfig(max_new_tokens=12, slots=4, temperature=0.7)
    sampler = tpaw_jax.make_sampler(tpaw_jax.decoder_from_apply_fn(apply_fn), config, stop_tokens=[STOP])
    responses = tpaw_jax.generate(sampler, table, prompts, seed=0, round_number=0)
    for prompt, tokens, log_probs in zip(asked, responses.tokens, responses.log_probs, strict=True):
        print(f"{prompt} -> {tokens}, {log_probs.sum():.2f} nats")

    one_slot = tpaw_jax.SamplingConfig(max_new_tokens=12, slots=1, temperature=0.7)
    again = tpaw_jax.make_sampler(tpaw_jax.decoder_from_apply_fn(apply_fn), one_slot, stop_tokens=[STOP])
    same = tpaw_jax.generate(again, table, prompts, seed=0, round_number=0)
    assert all(np.array_equal(a, b) for a, b in zip(responses.tokens, same.tokens, strict=True))


if __name__ == "__main__":
    main()
