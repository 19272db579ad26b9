"""Attention masks of packed trees, and the einsum attention that tests compare with."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from tpaw_jax.types import AnyArray, TreeBatch


class Visibility(NamedTuple):
    """Which keys of its row a query attends to.

    These are the keys up to and including the query itself that belong to its segment and to either its own branch or
    the trunk (`branch_ids` 0, the prompt of a tree) before `prompt_end`. Without `branch_ids` and `prompt_end`, this is
    packed causal attention.
    """

    segment_ids: Int[AnyArray, "B T"]
    branch_ids: Int[AnyArray, "B T"] | None = None
    prompt_end: Int[AnyArray, "B T"] | None = None  # an index of the row, for queries of branches

    @classmethod
    def of(cls, batch: TreeBatch) -> "Visibility":
        """The visibility in the rows of a batch."""
        return cls(batch.segment_ids, batch.branch_ids, batch.prompt_end)

    def arrays(self) -> tuple[Array, Array, Array]:
        """All three fields on the device, with zeros for those that are None.

        Raises:
            ValueError: only one of `branch_ids` and `prompt_end` is given.
        """
        if (self.branch_ids is None) != (self.prompt_end is None):
            raise ValueError("Visibility: give both branch_ids and prompt_end, or neither.")
        if self.branch_ids is None or self.prompt_end is None:
            zeros = jnp.zeros_like(self.segment_ids)
            return jnp.asarray(self.segment_ids), zeros, zeros
        return jnp.asarray(self.segment_ids), jnp.asarray(self.branch_ids), jnp.asarray(self.prompt_end)


def visible(visibility: Visibility, window: int | None = None) -> Bool[Array, "B T T"]:
    """Compute the dense mask [B, query, key]. Every token attends to itself, so no query is without a key.

    With a window, only the keys of the last `window` positions are seen, that of the query included.
    """
    segments, branches, prompt_end = visibility.arrays()
    index = jnp.arange(segments.shape[1])
    of_prompt = (branches[:, None, :] == 0) & (index < prompt_end[:, :, None])
    own = branches[:, :, None] == branches[:, None, :]
    seen = (index <= index[:, None]) & (segments[:, :, None] == segments[:, None, :]) & (own | of_prompt)
    if window is None:
        return seen
    tree, branch = jax.vmap(starts)(segments, branches)
    position = index - branch + jnp.where(branches == 0, 0, prompt_end - tree)
    return seen & (position[:, :, None] - position[:, None, :] < window)


def starts(segments_T: Array, branches_T: Array) -> tuple[Array, Array]:
    """Compute for each token the start of its segment, and of its branch. The trunk starts with the segment.

    Each token of padding is a segment of its own.
    """
    index = jnp.arange(len(segments_T))
    differs = lambda x: jnp.concatenate([jnp.ones(1, bool), x[1:] != x[:-1]])
    start_of = lambda new: lax.cummax(jnp.where(new, index, 0))
    segment = jnp.where(segments_T > 0, start_of(differs(segments_T)), index)
    branch = start_of(differs(segments_T) | differs(branches_T))
    return segment, jnp.where(branches_T == 0, segment, branch)


def attend(
    queries: Float[Array, "B T N H"],
    keys: Float[Array, "B K C H"],
    values: Float[Array, "B K C H"],
    mask: Bool[Array, "B T C"],
    cap: float | None = None,
) -> Float[Array, "B T N H"]:
    """Compute grouped-query attention, softmax(q k^T / sqrt(H)) v, in O(T C) memory. Scores and softmax are float32."""
    rows, length, heads, size = queries.shape
    groups = queries.reshape(rows, length, keys.shape[1], heads // keys.shape[1], size)
    scores = jnp.einsum("btkgh,bkch->bkgtc", groups, keys, preferred_element_type=jnp.float32) * size**-0.5
    scores = jnp.where(mask[:, None, None], capped(scores, cap), jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(values.dtype)
    return jnp.einsum("bkgtc,bkch->btkgh", weights, values).reshape(rows, length, heads, size)


def capped(scores: Array, cap: float | None) -> Array:
    """Compute cap tanh(scores / cap), a soft cap (Gemma 2, arXiv 2408.00118); the scores themselves without a cap."""
    return scores if cap is None else cap * jnp.tanh(scores / cap)


def slope(capped_scores: Array, cap: float | None) -> Array | float:
    """The derivative of `capped`, from its result."""
    return 1.0 if cap is None else 1 - jnp.square(jnp.clip(capped_scores / cap, -1, 1))


class Attention(NamedTuple):
    """An implementation of attention over packed rows: a pair of functions.

    - `prepare(visibility, window=None) -> context` runs once for all layers with the same window.
    - `attend(queries [B T N H], keys [B T K H], values [B T K H], context) -> [B T N H]` runs in every layer. Models
      that cap scores pass `cap` too, see `capped`.
    """

    prepare: Callable[..., Any]
    attend: Callable[..., Array]


def _attend_rows(queries: Array, keys: Array, values: Array, mask: Array, cap: float | None = None) -> Array:
    return attend(queries, keys.swapaxes(1, 2), values.swapaxes(1, 2), mask, cap)


EINSUM = Attention(visible, _attend_rows)
"""Einsum attention under the dense mask: O(T^2) work and memory."""

SAVED = "attention"
"""`jax.ad_checkpoint` name of the residuals of attention's backward pass that are expensive to recompute."""
