"""The model of a configuration, loaded for sampling, scoring and training: parameters, chat template, sampler."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, PyTree

from tpaw_jax import models
from tpaw_jax.config import LoraConfig, PolicyConfig, RunConfig, SamplingConfig
from tpaw_jax.data import templates
from tpaw_jax.generation import engine, slots
from tpaw_jax.generation.decoder import Decoder, decoder_of
from tpaw_jax.models import adapters, hub, quantized
from tpaw_jax.models.adapters import EXPERTS, Lora
from tpaw_jax.models.checkpoints import adapter_files
from tpaw_jax.models.rope import BY_LENGTH
from tpaw_jax.models.transformer import shard_model
from tpaw_jax.runtime import sharding

SPEED_ONLY_KEYS = frozenset({"sampling.slots", "sampling.prefill_tokens", "sampling.tensor"})
"""Configuration keys that change the speed of sampling, and its tokens at most by floating-point rounding."""


class Policy(NamedTuple):
    """A model that can sample responses and score them."""

    model: models.Transformer
    params: PyTree[Array]  # with adapters, if it has any
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
    c = config.policy
    tokenizer, vocabulary = hub.load_tokenizer(c.tokenizer or c.path), hub.load_architecture(c.path).vocab_size
    template = templates.make_template(tokenizer, config.data, vocabulary)
    architecture, params = load_parameters(c, mesh)
    architecture = for_sequences(architecture, config)
    if c.lora.used:
        params = adapters.join(params, first_adapters(config, architecture, mesh, params))
    model, decoder, sampling_mesh = sharded_models(config, architecture, params, mesh)
    stops = stop_tokens(template, hub.load_generation_config(c.path))
    sampler_with = lambda settings: slots.make_sampler(decoder, settings, stops, sampling_mesh)
    strings = config.sampling.stop_strings
    stop_fn = engine.stop_at(template.tokenizer.decode, strings) if strings else None
    return Policy(model, params, template, sampler_with(config.sampling), stop_fn, sampler_with)


def load_parameters(config: PolicyConfig, mesh: Mesh) -> tuple[models.ModelConfig, PyTree[Array]]:
    """The model at `policy.path`, without adapters; as their base, in `lora.base_dtype`.

    Raises:
        FileNotFoundError, ValueError: as `hub.load_pretrained`.
    """
    sharder, dtype = sharding.param_sharder(mesh), jnp.dtype(config.param_dtype)
    if config.lora.used and config.lora.base_dtype == "int8":
        return models.load_pretrained(config.path, dtype, sharder, quantized.quantizer(sharder))
    return models.load_pretrained(config.path, dtype, sharder)


def lora_of(config: LoraConfig, rounds: int = 1) -> Lora | None:
    """The adapters of a configuration for a run of `rounds`; None without any.

    Raises:
        ValueError: as `resolve_adapters`.
    """
    c = resolve_adapters(config)
    if not c.rank:
        return None
    names = {*c.targets, *adapters.PROJECTIONS} if "all-linear" in c.targets else {*c.targets}
    modules = tuple(sorted(adapters.PROJECTIONS.get(name, name) for name in names - {"all-linear"}))
    scale = adapters.scale_of(c.alpha, c.rank, c.rslora)
    rounds = rounds if c.merge_each_round else 1
    return Lora(rounds * c.rank, scale, modules, c.init, jnp.dtype(c.dtype), c.dora, rounds)


def resolve_adapters(config: LoraConfig, begun: LoraConfig | None = None) -> LoraConfig:
    """The configuration with rank, scale and targets of the adapters at `path`; unchanged if it has a rank.

    Args:
        config: the section `policy.lora`.
        begun: the same of the run that resumes. What is at `path` may have changed since, and does not matter.

    Raises:
        FileNotFoundError: there are no adapters at `path`.
        ValueError: they are not supported, or `config` says something else of them.
    """
    if config.rank or not config.path:
        return config
    if begun is not None and begun.path == config.path:
        found = {name: getattr(begun, name) for name in ("rank", "alpha", "rslora", "dora", "targets")}
    else:
        directory = hub.resolve(config.path)
        found = {**adapter_files.read_settings(directory)._asdict(), "targets": adapter_files.read_targets(directory)}
    for name, value in found.items():
        given = getattr(config, name)
        if given not in (value, getattr(LoraConfig(), name)):
            raise ValueError(
                f"policy.lora.{name} is {given!r}, but that of the adapters at {config.path} is {value!r}. Remove the "
                "key: it is taken from there."
            )
    if found["dora"] and EXPERTS in found["targets"]:
        raise ValueError(f"policy.lora.path: the adapters at {config.path} are DoRA's, which experts cannot have.")
    if found["dora"] and config.merge_each_round:
        raise ValueError(
            f"policy.lora.merge_each_round must be false: the adapters at {config.path} are DoRA's, which cannot be "
            "added up."
        )
    return dataclasses.replace(config, **found)


def first_adapters(
    config: RunConfig, architecture: models.ModelConfig, mesh: Mesh, base: PyTree[Array]
) -> PyTree[Array]:
    """The adapters at `policy.lora.path`, or new ones, drawn with the run's seed.

    Raises:
        FileNotFoundError: there are no adapters at `path`.
        ValueError: they do not suit the model, or it has none of the targets.
    """
    of_file, lora = None, lora_of(config.policy.lora, config.rounds)
    assert lora is not None
    if config.policy.lora.path:
        of_one_round = dataclasses.replace(lora, rank=lora.rank_of_round, rounds=1)
        of_file = adapter_files.load(hub.resolve(config.policy.lora.path), architecture, of_one_round, mesh)
        if lora.rounds == 1:
            return of_file
    model = models.Transformer(architecture, lora=lora)
    new = lambda: adapters.split(model.init(jax.random.key(config.seed), jnp.zeros((1, 1), jnp.int32))["params"])[0]
    shapes = jax.eval_shape(new)
    check_targets(lora, architecture, shapes)
    shardings = sharding.param_shardings(shapes, mesh)
    drawn = jax.jit(new, out_shardings=shardings)()
    if of_file is not None:
        return jax.jit(adapters.begun_with, out_shardings=shardings)(drawn, of_file)
    if not lora.dora:
        return drawn
    return jax.jit(adapters.with_magnitudes, out_shardings=shardings)(drawn, base)


def check_targets(lora: Lora, architecture: models.ModelConfig, shapes: PyTree[Any]) -> None:
    """Check that a model has what the adapters are for; `shapes` are the adapters that it gets.

    Raises:
        ValueError: it has no experts, or none of the projections.
    """
    if EXPERTS in lora.targets and not architecture.num_experts:
        raise ValueError(f"policy.lora.targets: this {architecture.model_type} model has no experts.")
    if not shapes:
        names = [name for name, module in adapters.PROJECTIONS.items() if module in lora.targets]
        raise ValueError(
            f"policy.lora.targets: this {architecture.model_type} model has none of the projections {', '.join(names)}."
        )


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
    dtypes = jnp.dtype(c.compute_dtype), jnp.dtype(c.param_dtype)
    whole = models.Transformer(architecture, *dtypes, remat, attention, lora=lora_of(c.lora, config.rounds))
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
