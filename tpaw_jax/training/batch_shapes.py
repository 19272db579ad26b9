"""The fixed batch shapes of a run: automatic configuration values are resolved from the devices."""

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
    """Return the number of micro-batches in a step's fixed shape, enough for the data of any round."""
    return packing.most_micro_batches(config.train.batch_triplets, config.longest_triplet, config.packing)


def resolve_packing(
    config: RunConfig, mesh: Mesh, alignment: int, before: Mapping[str, Any] | None = None
) -> PackingConfig:
    """Resolve `rows_per_batch` and `alignment` where they are 0 (automatic).

    The devices need rows for each of their shards, and `alignment`. A resumed run passes its previous packing fields as
    `before`, and they take precedence over these needs.
    """
    needs = {"rows_per_batch": sharding.row_shards(mesh), "alignment": alignment}
    return dataclasses.replace(
        config.packing,
        **{key: getattr(config.packing, key) or (before or {}).get(key) or value for key, value in needs.items()},
    )


def needed_alignment(config: RunConfig) -> int:
    """Return the alignment of prompts and responses, in tokens, that attention on this backend needs."""
    return splash_attention.alignment(config.packing.row_length) if jax.default_backend() == "tpu" else 1
