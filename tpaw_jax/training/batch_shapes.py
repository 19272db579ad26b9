"""The fixed shapes of a run's batches: what the configuration leaves open is settled from the devices."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import Mesh

from tpaw_jax.config import PackingConfig, RunConfig
from tpaw_jax.data import packing
from tpaw_jax.models import splash_attention
from tpaw_jax.runtime import sharding


def most_micro_batches(config: RunConfig) -> int:
    """Micro-batches that a step has room for, whatever the rounds bring."""
    return packing.most_micro_batches(config.train.batch_triplets, config.longest_triplet, config.packing)


def settled_packing(config: RunConfig, mesh: Mesh, before: Mapping[str, Any] | None = None) -> PackingConfig:
    """Packing with rows_per_batch and alignment as stated, or as `before`, or as the devices need."""
    wanted = {"rows_per_batch": sharding.row_shards(mesh), "alignment": needed_alignment(config)}
    return dataclasses.replace(
        config.packing,
        **{key: getattr(config.packing, key) or (before or {}).get(key) or value for key, value in wanted.items()},
    )


def needed_alignment(config: RunConfig) -> int:
    """Tokens that the device's attention needs prompts and responses to be a multiple of."""
    return splash_attention.alignment(config.packing.row_length) if jax.default_backend() == "tpu" else 1
