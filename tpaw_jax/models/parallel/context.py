"""Context parallelism: rows that are too long for one device. Neighbours on the `fsdp` axis share them.

Each device of such a group computes a part of the tokens of every row of the group. Only attention mixes tokens: before
it, the group exchanges parts of the tokens for parts of the heads, so that each device attends with some heads over
whole rows, and back afterwards (DeepSpeed-Ulysses, arXiv 2309.14509). Attention over packed trees needs no other kernel
for that, and heads have equal work, which parts of trees do not have. Parameters stay sharded over all of `fsdp`.

Outside the model, a row belongs to the first device of its group; the rows of the others are empty (`spread`).
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh
from jaxtyping import Array, Float

from tpaw_jax.models.attention import Attention
from tpaw_jax.models.parallel.collectives import groups
from tpaw_jax.runtime import sharding
from tpaw_jax.types import TeamScores, TreeBatch


def check_groups(context: int, mesh: Mesh) -> None:
    """Check that groups of `context` devices divide the `fsdp` axis.

    Raises:
        ValueError: they do not. Names the configuration key.
    """
    if context < 1 or mesh.shape["fsdp"] % context:
        raise ValueError(f"mesh.context is {context}; it must divide the {mesh.shape['fsdp']} devices of mesh.fsdp.")


def check_heads(context: int, heads: int, kv_heads: int) -> None:
    """Check that groups of `context` devices divide a device's heads.

    Raises:
        ValueError: they do not. Names the configuration key.
    """
    if heads % context or (kv_heads % context and context % kv_heads):
        raise ValueError(
            f"mesh.context is {context}; it must divide the {heads} heads, and divide or be a multiple of the "
            f"{kv_heads} key-value heads, of a model or, with mesh.tensor, of a device."
        )


def exchanging_heads(attention: Attention, context: int) -> Attention:
    """Attention whose queries, keys and values are a device's part of the tokens, [b, T / context, heads, H].

    Its context is that of whole rows.
    """

    def attend(queries: Array, keys: Array, values: Array, whole_rows: Any, **cap: float) -> Array:
        copies = max(1, context // keys.shape[2])  # fewer key-value heads than devices: several devices have the same
        keys, values = (jnp.repeat(x, copies, axis=2) for x in (keys, values))
        split_heads = lambda x: _exchange(x, split_axis=2, concat_axis=1)
        attended = attention.attend(split_heads(queries), split_heads(keys), split_heads(values), whole_rows, **cap)
        return _exchange(attended, split_axis=1, concat_axis=2)

    def _exchange(x: Array, split_axis: int, concat_axis: int) -> Array:
        return lax.all_to_all(x, "fsdp", split_axis, concat_axis, axis_index_groups=groups(context), tiled=True)

    return Attention(attention.prepare, attend)


def own_tokens(x: Array, context: int) -> Array:
    """A device's part of the tokens of rows, [b, T, ...] -> [b, T / context, ...]."""
    size = x.shape[1] // context
    return lax.dynamic_slice_in_dim(x, _part(context) * size, size, axis=1)


def rows_of_group(batch: TreeBatch, context: int) -> TreeBatch:
    """The rows of the group, from its first device, with the predictions that read a device's own tokens.

    A part of T / context tokens is read by as many predictions as it has tokens, and once more for each response, whose
    first token is predicted from its prompt's last. Responses that lie in the trunk of a conversation may read tokens
    that others read too. There is room for each token twice; if that is too little, `triplet_weight` is NaN.
    """
    first_of_group = lambda x: lax.all_gather(x, "fsdp", axis_index_groups=groups(context))[0]
    batch = jax.tree.map(first_of_group, batch)
    size, responses = batch.tokens.shape[1] // context, batch.triplet_weight.shape[1]
    index = batch.hidden_index - _part(context) * size
    own = (index >= 0) & (index < size) & (batch.response_ids < responses)
    most = min(2 * size + responses, index.shape[1])
    lost = own.sum(axis=1, keepdims=True) > most
    order = jnp.argsort(~own, axis=1, stable=True)[:, :most]
    pick = lambda x: jnp.take_along_axis(x, order, axis=1)
    own = pick(own)
    return batch.replace(
        hidden_index=jnp.where(own, pick(index), 0),
        labels=pick(batch.labels),
        response_ids=jnp.where(own, pick(batch.response_ids), responses),
        triplet_weight=jnp.where(lost, jnp.nan, batch.triplet_weight),
    )


def total_of_group(values: Float[Array, "b R"], context: int) -> Float[Array, "b R"]:
    """Sum over the group; 0 on all devices but its first."""
    total = lax.psum(values, "fsdp", axis_index_groups=groups(context))
    return jnp.where(_part(context) == 0, total, 0)


def spread(batch: TreeBatch, context: int, mesh: Mesh) -> TreeBatch:
    """Give rows [*lead, B, ...] to the first device of each group, and empty rows to the others: B context rows."""
    empty = batch.triplet_weight.shape[-1]
    rows_first = batch.tokens.ndim - 2
    fill = lambda name: empty if name == "response_ids" else 0
    return batch.replace(**{name: _spread(x, context, mesh, rows_first, fill(name)) for name, x in vars(batch).items()})


def spread_scores(scores: TeamScores, context: int, mesh: Mesh) -> TeamScores:
    """`spread` for the scores of a batch, [*lead, J, B, R]."""
    x = scores.log_probs
    return scores.replace(log_probs=_spread(x, context, mesh, x.ndim - 2, 0))


def collect(values: Float[Array, "BC *rest"], context: int, mesh: Mesh) -> Float[Array, "B *rest"]:
    """The values of the rows that `spread` got."""
    if context == 1:
        return values
    by_device = values.reshape(sharding.row_shards(mesh, context), context, -1, *values.shape[1:])
    return by_device[:, 0].reshape(-1, *values.shape[1:])


def _spread(x: Array, context: int, mesh: Mesh, axis: int, fill: float) -> Array:
    if context == 1:
        return x
    groups_of_mesh = sharding.row_shards(mesh, context)
    of_group = x.shape[axis] // groups_of_mesh
    x = x.reshape(*x.shape[:axis], groups_of_mesh, 1, of_group, *x.shape[axis + 1 :])
    padding = [(0, 0)] * x.ndim
    padding[axis + 1] = (0, context - 1)
    x = jnp.pad(x, padding, constant_values=fill)
    return x.reshape(*x.shape[:axis], -1, *x.shape[axis + 3 :])


def _part(context: int) -> Array:
    return lax.axis_index("fsdp") % context
