"""Attention masks of packed trees, rotary embeddings, and the einsum attention that tests compare with."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
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


def visible(visibility: Visibility) -> Bool[Array, "B T T"]:
    """Compute the dense mask [B, query, key]. Every token attends to itself, so no query is without a key."""
    segments, branches, prompt_end = visibility.arrays()
    index = jnp.arange(segments.shape[1])
    of_prompt = (branches[:, None, :] == 0) & (index < prompt_end[:, :, None])
    own = branches[:, :, None] == branches[:, None, :]
    return (index <= index[:, None]) & (segments[:, :, None] == segments[:, None, :]) & (own | of_prompt)


def attend(
    queries: Float[Array, "B T N H"],
    keys: Float[Array, "B K C H"],
    values: Float[Array, "B K C H"],
    mask: Bool[Array, "B T C"],
) -> Float[Array, "B T N H"]:
    """Compute grouped-query attention, softmax(q k^T / sqrt(H)) v, in O(T C) memory. Scores and softmax are float32."""
    rows, length, heads, size = queries.shape
    groups = queries.reshape(rows, length, keys.shape[1], heads // keys.shape[1], size)
    scores = jnp.einsum("btkgh,bkch->bkgtc", groups, keys, preferred_element_type=jnp.float32) * size**-0.5
    scores = jnp.where(mask[:, None, None], scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(values.dtype)
    return jnp.einsum("bkgtc,bkch->btkgh", weights, values).reshape(rows, length, heads, size)


class Attention(NamedTuple):
    """An implementation of attention over packed rows: a pair of functions.

    - `prepare(visibility) -> context` runs once and serves all layers.
    - `attend(queries [B T N H], keys [B T K H], values [B T K H], context) -> [B T N H]` runs in every layer.
    """

    prepare: Callable[[Visibility], Any]
    attend: Callable[[Array, Array, Array, Any], Array]


def _attend_rows(queries: Array, keys: Array, values: Array, mask: Array) -> Array:
    return attend(queries, keys.swapaxes(1, 2), values.swapaxes(1, 2), mask)


EINSUM = Attention(visible, _attend_rows)
"""Einsum attention under the dense mask: O(T^2) work and memory."""

SAVED = "attention"
"""`jax.ad_checkpoint` name of the residuals of attention's backward pass that are expensive to recompute."""


class RopeScaling(NamedTuple):
    """Llama 3.1's rope scaling, `rope_type: llama3` in a Hugging Face config.json."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


def rope_frequencies(head_dim: int, theta: float, scaling: RopeScaling | None) -> np.ndarray:
    """Compute the H/2 angular frequencies of rotary embeddings, in radians per position, float32."""
    frequencies = theta ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    if scaling is not None:
        wavelength = 2 * np.pi / frequencies
        periods = scaling.original_max_position_embeddings / wavelength
        smooth = (periods - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
        smooth = np.clip(smooth, 0.0, 1.0)  # 0: long wavelength, frequency divided by the factor; 1: short, unchanged
        frequencies = (1 - smooth) * frequencies / scaling.factor + smooth * frequencies
    return frequencies.astype(np.float32)


def rope_angles(positions: Int[Array, "B T"], frequencies: np.ndarray) -> tuple[Array, Array]:
    """Compute cos and sin of position times frequency, each [B, T, H/2] float32."""
    angles = positions[..., None].astype(jnp.float32) * jnp.asarray(frequencies)
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x: Float[Array, "B T heads H"], angles: tuple[Array, Array]) -> Float[Array, "B T heads H"]:
    """Apply rotary embeddings in the half-split layout of Hugging Face checkpoints, computed in float32."""
    cos, sin = angles[0][:, :, None], angles[1][:, :, None]
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
