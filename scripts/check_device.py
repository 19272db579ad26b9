"""Check on the devices at hand that the fast programs give what their plain twins give. Prints a line per check.

    python scripts/check_device.py

Attention and its gradients against the dense mask, the chunked head against full logits, cached decoding against
recomputing each sequence, and a train step whose loss falls. Exits with 1 if a check fails.
"""

import sys

import jax
import jax.numpy as jnp
import numpy as np

from tpaw_jax.config import ObjectiveConfig, PackingConfig, SamplingConfig, TrainConfig
from tpaw_jax.data import packing, prefix_trees
from tpaw_jax.generation import engine, slots
from tpaw_jax.generation.decoder import decoder_of
from tpaw_jax.models import EINSUM, ModelConfig, Transformer, Visibility, attention_of
from tpaw_jax.runtime import sharding
from tpaw_jax.training import logprobs, train_step
from tpaw_jax.training.train_step import StepScalars
from tpaw_jax.types import Generations, Prompts, TeamScores

MODEL = ModelConfig("llama", 512, 256, 512, 2, 4, 2, 64, 10000.0, 1e-5, 4096, False)
ROWS = PackingConfig(row_length=512, rows_per_batch=1)
TOLERANCE = 2e-2
"""Relative to the largest value: accelerators multiply float32 matrices in fewer bits by default."""


def main() -> None:
    print(f"{len(jax.devices())} x {jax.devices()[0].device_kind}, jax {jax.__version__}")
    rng = np.random.default_rng(0)
    ids = lambda count: rng.integers(3, MODEL.vocab_size, count).astype(np.int32)
    prompts = Prompts(np.arange(8, dtype=np.int32), *(tuple(ids(n) for n in rng.integers(8, 60, 8)) for _ in range(2)))
    window = [Generations(t, tuple(ids(n) for n in rng.integers(8, 60, 8)), ()) for t in (1, 0)]
    rows = packing.pack(prefix_trees.trees_of_window(prompts, window), ROWS)
    attention = attention_of(jax.devices()[0])
    model = Transformer(MODEL, attention=attention)
    params = jax.jit(lambda: Transformer(MODEL).init(jax.random.key(0), jnp.zeros((1, 8), jnp.int32))["params"])()
    passed = [
        check("attention and its gradients", attention_error(attention, rows)),
        check("log-probs of packed trees, chunked head", log_prob_error(model, params, rows)),
        check("cached decoding, share of other tokens", decoding_error(model, params, prompts), 0.05),
        check("change of the loss over three steps", step_error(model, params, rows), -0.01),
    ]
    sys.exit(not all(passed))


def check(name: str, error: float, tolerance: float = TOLERANCE) -> bool:
    """Print an error and whether it is within its tolerance."""
    passed = bool(error <= tolerance)
    print(f"{'ok    ' if passed else 'FAILED'}  {name}: {error:.2e}, at most {tolerance:g} expected", flush=True)
    return passed


def relative(found, expected) -> float:
    """The largest difference over all leaves, relative to the largest value of each."""
    error = lambda a, b: float(jnp.max(jnp.abs(a - b)) / jnp.max(jnp.abs(b)))
    return max(map(error, jax.tree.leaves(found), jax.tree.leaves(expected)))


def attention_error(attention, rows) -> float:
    """Values and gradients of attention against the dense mask."""
    visibility = Visibility(*map(jnp.asarray, Visibility.of(rows.batch)))
    shape = (*visibility.segment_ids.shape, MODEL.num_heads, MODEL.head_dim)
    keys = jax.random.split(jax.random.key(1), 4)
    q, k, v, weight = (jax.random.normal(key, shape) for key in keys)
    k, v = k[:, :, : MODEL.num_kv_heads], v[:, :, : MODEL.num_kv_heads]
    weight *= (visibility.segment_ids > 0)[..., None, None]

    def weighted(one, *x):
        out = weight * one.attend(*x, one.prepare(visibility))
        return jnp.sum(out), out

    run = lambda one: jax.jit(jax.grad(lambda *x: weighted(one, *x), (0, 1, 2), has_aux=True))(q, k, v)
    return relative(run(attention), run(EINSUM))


def log_prob_error(model, params, rows) -> float:
    """Log-probs of all responses against the dense mask and a head in one chunk."""
    run = lambda one, chunk: jax.jit(logprobs.make_log_prob_fn(one, chunk))(params, rows.batch)
    return relative(run(model, 64), run(Transformer(MODEL, attention=EINSUM), ROWS.row_length))


def decoding_error(model, params, prompts) -> float:
    """Share of greedily decoded tokens that a full forward pass would not choose."""
    settings = SamplingConfig(temperature=0, max_new_tokens=16, slots=4)
    sampler = slots.make_sampler(decoder_of(model), settings, [], sharding.sampling_mesh(1))
    sampled = engine.generate(sampler, params, prompts, seed=0, round_number=0)
    apply, differ, total = jax.jit(lambda p, x: model.apply({"params": p}, x)), 0, 0
    for x, y in zip(prompts.prompt_tokens, sampled.tokens, strict=True):
        whole = np.zeros((1, 128), np.int32)
        whole[0, : len(x) + len(y)] = np.concatenate([x, y])
        chosen = np.asarray(jnp.argmax(apply(params, whole)[0], axis=-1))[len(x) - 1 : len(x) - 1 + len(y)]
        differ, total = differ + int((chosen != y).sum()), total + len(y)
    return differ / total


def step_error(model, params, rows) -> float:
    """The change of the loss over three steps; it should be negative."""
    mesh = sharding.single_device_mesh()
    log_prob_fn, optimizer = logprobs.make_log_prob_fn(model, 64), train_step.make_optimizer(TrainConfig())
    step = train_step.make_train_step(log_prob_fn, optimizer, ObjectiveConfig(), mesh)
    state = train_step.init_state(jax.tree.map(jnp.copy, params), optimizer, mesh)
    scored = np.asarray(jax.jit(log_prob_fn)(params, rows.batch))
    scores = TeamScores(np.stack([scored] * 3), np.ones(3, bool))
    batch = packing.step_batch(rows, scores, np.arange(len(rows)), 1, len(rows))
    losses = []
    for _ in range(3):
        scalars = StepScalars(np.float32(1e-3), np.float32(0.1), np.float32(1e-3), np.bool_(False))
        state, metrics = step(state, *batch, scalars)
        losses.append(float(metrics["loss"]))
    return losses[-1] - losses[0]


if __name__ == "__main__":
    main()
