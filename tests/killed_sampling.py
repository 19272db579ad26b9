"""Sampling of 64 prompts, in a process that may be killed in the middle, for test_engine.py."""

import os
import signal

import conftest
import numpy as np

from tpaw_jax import models
from tpaw_jax.config import SamplingConfig
from tpaw_jax.generation import engine, generation_file
from tpaw_jax.generation.decoder import decoder_of
from tpaw_jax.generation.slots import make_sampler
from tpaw_jax.models import Transformer
from tpaw_jax.models.transformer import shard_model


def answer(stories, path, temperature, slots, mesh=None, die_after=None):
    """The generations of 64 prompts, kept in `path` as they come and not sampled again if they are there."""
    prompts = conftest.random_prompts(np.random.default_rng(7), 64)[0]
    config = SamplingConfig(max_new_tokens=40, slots=slots, temperature=temperature)
    model = Transformer(stories[0])
    model = model if mesh is None else shard_model(model, stories[1], mesh)
    sampler = make_sampler(decoder_of(model), config, (1, 403), mesh)

    def keep(responses):
        generation_file.append(path, prompts, responses)
        if die_after is not None and len(generation_file.read_partial([path], prompts)) >= die_after:
            os.kill(os.getpid(), signal.SIGKILL)

    generation_file.repair(path)
    before = generation_file.read_partial([path], prompts)
    return engine.generate(sampler, stories[1], prompts, seed=3, round_number=2, finished=before, on_finished=keep)


def die_sampling(path, temperature):
    """Die by SIGKILL after 20 responses."""
    answer(models.load_pretrained(conftest.STORIES), path, temperature, slots=4, die_after=20)
