"""The fixed batch shapes of a run: automatic configuration values are resolved from the devices."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from jax.sharding import Mesh

from tpaw_jax.config import PackingConfig, RunConfig
from tpaw_jax.data import packing
from tpaw_jax.models.attention import rules
from tpaw_jax.models.parallel.context import check_groups
from tpaw_jax.runtime import sharding, tpu

LONG_ROW = 8192
"""Tokens of a row that is long enough to waste little padding."""


def most_micro_batches(config: RunConfig) -> int:
    """Return the number of micro-batches in a step's fixed shape, enough for the data of any round."""
    return packing.most_micro_batches(config.train.batch_triplets, config.longest_triplet, config.packing)


def resolve_packing(config: RunConfig, mesh: Mesh, before: Mapping[str, Any] | None = None) -> PackingConfig:
    """Resolve `rows_per_batch` and `row_length` where they are 0 (automatic).

    That is one row for each device that rows are split over, and `LONG_ROW` tokens. A resumed run passes its previous
    packing fields as `before`, and they take precedence.

    Raises:
        ValueError: batches do not split evenly over the devices, or TPUs cannot compute the rows.
    """
    context = config.mesh.context
    check_groups(context, mesh)
    shards = sharding.row_shards(mesh, context)
    rows = config.packing.rows_per_batch or (before or {}).get("rows_per_batch") or shards
    length = config.packing.row_length or (before or {}).get("row_length") or max(LONG_ROW, config.longest_tree)
    on_tpu = tpu.generation(mesh.devices.flat[0]) is not None
    if length % context:
        raise ValueError(f"packing.row_length is {length}; it must be a multiple of mesh.context, {context}.")
    packing.check_rows(length, rows, shards, rules.QUERIES if on_tpu else 1)
    return dataclasses.replace(config.packing, rows_per_batch=rows, row_length=length)
