"""Attention: who sees whom, rotary positions, and the plain einsum form that every faster form is tested against."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int


class Visibility(NamedTuple):
    """Which keys of its row a query sees: those before it, of its segment, in the trunk or in its own branch.

    `branch_ids` 0 is the trunk (a tree's prompt). Without branches this is packed causal attention.
    """

    segment_ids: Int[Array, "B T"]
    branch_ids: Int[Array, "B T"] | None = None


def visible(visibility: Visibility) -> Bool[Array, "B T T"]:
    """The dense mask [B, query, key] of a `Visibility`. Every token sees itself, so no row of it is empty."""
    segments, branches = visibility
    length = segments.shape[1]
    mask = jnp.tril(jnp.ones((length, length), bool)) & (segments[:, :, None] == segments[:, None, :])
    if branches is not None:
        mask &= (branches[:, None, :] == 0) | (branches[:, :, None] == branches[:, None, :])
    return mask


def attend(
    queries: Float[Array, "B T N H"],
    keys: Float[Array, "B K C H"],
    values: Float[Array, "B K C H"],
    mask: Bool[Array, "B T C"],
) -> Float[Array, "B T N H"]:
    """Grouped-query attention, softmax(q k^T / sqrt(H)) v, with float32 scores and softmax. O(T C) memory."""
    rows, length, heads, size = queries.shape
    groups = queries.reshape(rows, length, keys.shape[1], heads // keys.shape[1], size)
    scores = jnp.einsum("btkgh,bkch->bkgtc", groups, keys, preferred_element_type=jnp.float32) * size**-0.5
    scores = jnp.where(mask[:, None, None], scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(values.dtype)
    return jnp.einsum("bkgtc,bkch->btkgh", weights, values).reshape(rows, length, heads, size)


class Attention(NamedTuple):
    """A way to compute the attention of whole packed rows.

    prepare(visibility) -> context, once for all layers
    attend(queries [B T N H], keys [B T K H], values [B T K H], context) -> [B T N H]
    """

    prepare: Callable[[Visibility], Any]
    attend: Callable[[Array, Array, Array, Any], Array]


def _attend_rows(queries: Array, keys: Array, values: Array, mask: Array) -> Array:
    return attend(queries, keys.swapaxes(1, 2), values.swapaxes(1, 2), mask)


EINSUM = Attention(visible, _attend_rows)
"""Over all pairs of a row's tokens: O(T^2) work and memory."""

SAVED = "attention"
"""The checkpoint name of what an attention's backward pass needs and is dear to compute again."""


class RopeScaling(NamedTuple):
    """Llama 3.1's frequency scaling, `rope_type: llama3` in Hugging Face's config.json."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


def rope_frequencies(head_dim: int, theta: float, scaling: RopeScaling | None) -> np.ndarray:
    """The H/2 angular frequencies of rotary embeddings, radians a position, float32."""
    frequencies = theta ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    if scaling is not None:
        wavelength = 2 * np.pi / frequencies
        periods = scaling.original_max_position_embeddings / wavelength
        smooth = (periods - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
        smooth = np.clip(smooth, 0.0, 1.0)  # 0: long waves, slowed by the factor; 1: short waves, left alone
        frequencies = (1 - smooth) * frequencies / scaling.factor + smooth * frequencies
    return frequencies.astype(np.float32)


def rope_angles(positions: Int[Array, "B T"], frequencies: np.ndarray) -> tuple[Array, Array]:
    """cos and sin of position times frequency, [B, T, H/2] float32."""
    angles = positions[..., None].astype(jnp.float32) * jnp.asarray(frequencies)
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x: Float[Array, "B T heads H"], angles: tuple[Array, Array]) -> Float[Array, "B T heads H"]:
    """Rotary embedding in the half-split layout of Hugging Face checkpoints, computed in float32."""
    cos, sin = angles[0][:, :, None], angles[1][:, :, None]
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
