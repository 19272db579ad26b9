"""The model of a configuration, loaded for sampling, scoring and training: parameters, chat template, sampler."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, PyTree

from tpaw_jax import models
from tpaw_jax.config import RunConfig, SamplingConfig
from tpaw_jax.data import templates
from tpaw_jax.generation import engine, slots
from tpaw_jax.generation.decoder import Decoder, decoder_of
from tpaw_jax.models import hub
from tpaw_jax.models.rope import BY_LENGTH
from tpaw_jax.models.transformer import shard_model
from tpaw_jax.runtime import sharding

SPEED_ONLY_KEYS = frozenset({"sampling.slots", "sampling.prefill_tokens", "sampling.tensor"})
"""Configuration keys that change the speed of sampling, and its tokens at most by floating-point rounding."""


class Policy(NamedTuple):
    """A model that can sample responses and score them."""

    model: models.Transformer
    params: PyTree[Array]
    template: templates.Template
    sampler: slots.Sampler
    stop_fn: engine.StopFn | None  # ends a response at the configured stop strings; None without any
    sampler_with: Callable[[SamplingConfig], slots.Sampler]  # builds a sampler with other settings


def open_policy(config: RunConfig, mesh: Mesh) -> Policy:
    """Load the model and tokenizer of a configuration, split over `mesh`, and build the sampler.

    Raises:
        FileNotFoundError: there is no model at `policy.path`.
        ValueError: the model, its tokenizer or `sampling.tensor` cannot be used.
    """
    c, dtype = config.policy, jnp.dtype(config.policy.param_dtype)
    tokenizer, vocabulary = hub.load_tokenizer(c.tokenizer or c.path), hub.load_architecture(c.path).vocab_size
    template = templates.make_template(tokenizer, config.data, vocabulary)
    architecture, params = models.load_pretrained(c.path, dtype, sharding.param_sharder(mesh))
    architecture = for_sequences(architecture, config)
    model, decoder, sampling_mesh = sharded_models(config, architecture, params, mesh)
    stops = stop_tokens(template, hub.load_generation_config(c.path))
    sampler_with = lambda settings: slots.make_sampler(decoder, settings, stops, sampling_mesh)
    strings = config.sampling.stop_strings
    stop_fn = engine.stop_at(template.tokenizer.decode, strings) if strings else None
    return Policy(model, params, template, sampler_with(config.sampling), stop_fn, sampler_with)


def for_sequences(architecture: models.ModelConfig, config: RunConfig) -> models.ModelConfig:
    """The architecture for the sequences of a run: some rope types depend on the longest of them."""
    scaling = architecture.rope_scaling
    if scaling is None or scaling.rope_type not in BY_LENGTH:
        return architecture
    return dataclasses.replace(architecture, rope_length=config.longest_sequence)


def sharded_models(
    config: RunConfig, architecture: models.ModelConfig, params: PyTree[Any], mesh: Mesh
) -> tuple[models.Transformer, Decoder, Mesh]:
    """The model that scores and trains on `mesh`, and the decoder of the sampler with the sampler's mesh.

    Raises:
        ValueError: `params` cannot be sharded over a mesh, or `sampling.tensor` cannot be used.
    """
    c = config.policy
    remat = "layer" if c.remat == "auto" else c.remat
    attention = models.attention_of(mesh.devices.flat[0], c.attention_chunks)
    whole = models.Transformer(architecture, jnp.dtype(c.compute_dtype), jnp.dtype(c.param_dtype), remat, attention)
    sampling_mesh = sharding.sampling_mesh(config.sampling.tensor)
    sampling_model = shard_model(whole, params, sampling_mesh, key="sampling.tensor")
    decoder = decoder_of(sampling_model, config.sampling.cache_dtype)
    model = shard_model(whole, params, mesh, config.train.reduce_dtype, context=config.mesh.context)
    return model, decoder, sampling_mesh


def stop_tokens(template: templates.Template, generation: Mapping[str, Any]) -> list[int]:
    """The tokens that end a response.

    They are the template's end of turn, the tokenizer's EOS, and all of `eos_token_id` in generation_config.json.
    """
    given = generation.get("eos_token_id")
    given = given if isinstance(given, list) else [given]
    return sorted({template.end_of_turn, template.tokenizer.eos_token_id, *given} - {None})
