"""Rotary embeddings."""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int


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
