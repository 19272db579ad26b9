"""Every family in all that a round computes: packed trees, the gradient of the team loss, and rounds of self-play."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from conftest import SIMILAR, STORIES, random_conversations, small_run
from families import random_model

from tpaw_jax import models
from tpaw_jax.config import PackingConfig
from tpaw_jax.data import packing, prefix_trees
from tpaw_jax.models import TILES, Transformer, hub, layer_stacks
from tpaw_jax.objective import team_loss
from tpaw_jax.selfplay import loop
from tpaw_jax.training import logprobs
from tpaw_jax.types import TARGET

similar = lambda *names: [pytest.param(name, marks=SIMILAR) for name in names]

PLAYED = ("gemma2", "qwen3", "olmo2", "granite", "smollm3", "phi3", "qwen2-window", "mixtral", "qwen2-moe")

PAPER = {"lam": 0.1, "eta": 6.0, "gamma": 0.5}


OTHERS = (
    "smollm3",
    "gemma2",
    "llama-3.1-rope",
    "qwen2",
    "qwen3",
    "granite",
    "phi3",
    "mistral-window",
    "qwen2-window",
    "yarn",
    "gemma3",
    "mixtral",
    "qwen3-moe",
    "phi3-longrope",
    "qwen3-moe-dense",
    "gemma4-experts",
)


@pytest.fixture(params=["olmo2", "qwen2-moe", "gemma4", *similar(*OTHERS)])
def family(request, tmp_path):
    """A random transformers model, ours, and packed rows with the (prompt, response) of each of their entries."""
    theirs = random_model(request.param, tmp_path / "hf")
    config, params = models.load_pretrained(tmp_path / "hf")
    prompts, rounds = random_conversations(np.random.default_rng(2), 3, vocabulary=256, longest=40)
    sources = prefix_trees.first_sources(prompts, rounds)
    rows = packing.pack(prefix_trees.trees_of_window(prompts, rounds[::-1], sources), PackingConfig(512, 2, 24))
    texts = {TARGET: prompts.target_tokens} | {g.round: g.tokens for g in rounds}
    entries = np.argwhere(rows.prompt_index >= 0)
    pairs = [
        (prompts.prompt_tokens[i], texts[s][i])
        for i, s in zip(rows.prompt_index[tuple(entries.T)], rows.source[tuple(entries.T)], strict=True)
    ]
    return theirs, tmp_path, Transformer(config, attention=TILES), params, rows, tuple(entries.T), pairs


def torch_log_probs(model, pairs):
    """The summed log-prob of each response, one sequence at a time."""
    found = []
    for x, r in pairs:
        logits = model(torch.tensor(np.concatenate([x, r])[None], dtype=torch.long)).logits[0, len(x) - 1 : -1]
        picked = torch.log_softmax(logits, -1)[torch.arange(len(r)), torch.tensor(r, dtype=torch.long)]
        found.append(picked.sum())
    return torch.stack(found)


def test_packed_trees_have_the_log_probs_of_sequences_alone(family):
    theirs, _, model, params, rows, entries, pairs = family
    found = np.asarray(jax.jit(logprobs.make_log_prob_fn(model, 64))(params, rows.batch))[entries]
    apply = jax.jit(lambda tokens: jax.nn.log_softmax(model.apply({"params": params}, tokens)))
    length = max(len(x) + len(r) for x, r in pairs)
    alone = []
    for x, r in pairs:
        tokens = np.pad(np.concatenate([x, r]), (0, length - len(x) - len(r)))
        values = np.asarray(apply(tokens[None])[0, len(x) - 1 : len(x) + len(r) - 1])
        alone.append(values[np.arange(len(r)), r].sum())
    per_token = np.array([len(r) for _, r in pairs])
    np.testing.assert_array_less(np.abs(found - alone) / per_token, 1e-5)
    with torch.no_grad():
        np.testing.assert_array_less(np.abs(found - torch_log_probs(theirs, pairs).numpy()) / per_token, 1e-4)


def test_the_gradient_of_the_team_loss_is_torchs(family):
    theirs, directory, model, params, rows, entries, pairs = family
    batch, rng = rows.batch, np.random.default_rng(5)
    scores = np.zeros((3, *rows.prompt_index.shape), np.float32)
    with torch.no_grad():
        scores[:, *entries] = torch_log_probs(theirs, pairs).numpy() + rng.normal(0, 3, (3, len(pairs)))
    where = np.argwhere(batch.triplet_weight > 0)
    weight = batch.triplet_weight[tuple(where.T)]
    y, g = ((where[:, 0], side[tuple(where.T)]) for side in (batch.triplet_target, batch.triplet_generated))

    log_prob_fn = logprobs.make_log_prob_fn(model, 64)

    def loss(params):
        values = log_prob_fn(params, batch)
        out = team_loss(values[y], values[g], jnp.asarray(scores[:, *y]), jnp.asarray(scores[:, *g]), **PAPER)
        return jnp.sum(weight * out.per_triplet) / weight.sum()

    value, gradient = jax.jit(jax.value_and_grad(loss))(params)

    number = np.full(rows.prompt_index.shape, -1)
    number[entries] = np.arange(len(pairs))
    policy, fixed = torch_log_probs(theirs, pairs), torch.tensor(scores)
    chosen, rejected = (0.1 * (policy[number[side]] - fixed[:, *side]) for side in (y, g))
    alpha = torch.where(chosen.detach() <= 0, 6.0, 1.0)
    beta = torch.softmax(-0.5 * (chosen - rejected).detach(), 0)
    of_triplets = (beta * torch.nn.functional.softplus(rejected - alpha * chosen)).sum(0)
    expected = (torch.tensor(weight) * of_triplets).sum() / float(weight.sum())
    expected.backward()
    np.testing.assert_allclose(value, float(expected.detach()), rtol=1e-5)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.copy_(parameter.grad)
    theirs.save_pretrained(directory / "gradient")
    of_torch = models.load_pretrained(directory / "gradient")[1]
    for stack in layer_stacks.stacks_of(model.config):
        not_trained = gradient[stack].pop("output_scale", {"scale": np.zeros(1)})
        of_torch[stack].pop("output_scale", None)
        assert not np.any(not_trained["scale"])
    relative = jax.tree.map(lambda a, b: float(np.linalg.norm(a - b) / np.linalg.norm(b)), gradient, of_torch)
    assert max(jax.tree.leaves(relative)) <= 1e-4, relative


@pytest.mark.parametrize(
    "name", ["qwen3-moe", *similar("gemma3", "gemma4", "gemma4-experts", "qwen3-moe-dense", *PLAYED)]
)
def test_a_small_model_plays_three_rounds(name, tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "devices", lambda *_: jax.local_devices()[:1])
    random_model(name, tmp_path / "model", vocab_size=512, max_position_embeddings=256)
    hub.load_tokenizer(STORIES).save_pretrained(tmp_path / "model")
    summaries = loop.play(small_run(tmp_path / "run", **{"policy.path": str(tmp_path / "model")}), lambda _: None)
    assert len(summaries) == 3
    for line in summaries:
        assert line["skipped"] == 0
        assert line["largest gap"] < 1e-4
        assert line["loss"] < np.log(2)  # where policy and players agree
        assert line["chosen"] > 0 > line["rejected"]
    assert summaries[0]["held-out after"] > summaries[0]["held-out before"]
