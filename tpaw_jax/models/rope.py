"""Rotary embeddings."""

import dataclasses
import math
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How a model's rotary frequencies differ from powers of theta, `rope_scaling` in a Hugging Face config.json."""

    rope_type: str  # a key of `ROPE_FIELDS`
    parameters: tuple[tuple[str, Any], ...]  # values of its fields, by name: numbers, or tuples of numbers


ROPE_FIELDS = {  # fields of each rope type that it needs, and that it may have
    "linear": (("factor",), ()),
    "llama3": (("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"), ()),
    "yarn": (
        ("factor", "original_max_position_embeddings"),
        ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"),
    ),
    "proportional": (("partial_rotary_factor",), ("factor",)),
    "dynamic": (("factor", "original_max_position_embeddings"), ()),
    "longrope": (
        ("short_factor", "long_factor", "original_max_position_embeddings", "factor"),
        ("attention_factor",),
    ),
}

BY_LENGTH = ("dynamic", "longrope")
"""Rope types whose frequencies depend on the length of the sequence."""


def rope_frequencies(size: int, theta: float, scaling: RopeScaling | None, length: int = 0) -> np.ndarray:
    """Compute the `size` / 2 angular frequencies of rotary embeddings, in radians per position, float32.

    Args:
        size: the features of a head that are rotated.
        theta: the base of the frequencies.
        scaling: how they differ from its powers.
        length: tokens of the longest sequence, for the types of `BY_LENGTH`; up to the original context they do not
            depend on it.
    """
    if scaling is not None and scaling.rope_type == "dynamic":  # NTK-aware scaling, as in transformers
        p = dict(scaling.parameters)
        stretch = max(length, p["original_max_position_embeddings"]) / p["original_max_position_embeddings"]
        theta *= (p["factor"] * stretch - (p["factor"] - 1)) ** (size / (size - 2))
    exponents = np.arange(0, size, 2, dtype=np.float32) / np.float32(size)
    frequencies = 1 / np.float32(theta) ** exponents  # rounded as in transformers, which matters at position 4,000
    if scaling is not None and scaling.rope_type != "dynamic":
        p = dict(scaling.parameters)
        if scaling.rope_type == "linear":
            frequencies = frequencies / p["factor"]
        elif scaling.rope_type == "proportional":  # the other features turn by no angle
            turning = np.arange(size // 2) < int(p["partial_rotary_factor"] * size // 2)
            frequencies = np.where(turning, frequencies / p.get("factor", 1.0), 0.0)
        elif scaling.rope_type == "longrope":  # arXiv 2402.13753
            is_long = length > p["original_max_position_embeddings"]
            frequencies = frequencies / np.array(p["long_factor" if is_long else "short_factor"])
        else:
            kept = _kept_by_llama3(frequencies, p) if scaling.rope_type == "llama3" else _kept_by_yarn(size, theta, p)
            frequencies = (1 - kept) * frequencies / p["factor"] + kept * frequencies
    return frequencies.astype(np.float32)


def attention_factor(scaling: RopeScaling | None) -> float:
    """The factor of cosines and sines, with which yarn (arXiv 2309.00071) and longrope change the temperature of
    attention."""
    if scaling is None or scaling.rope_type not in ("yarn", "longrope"):
        return 1.0
    p = dict(scaling.parameters)
    if "attention_factor" in p:
        return p["attention_factor"]
    if scaling.rope_type == "longrope":
        grows = math.log(p["factor"]) / math.log(p["original_max_position_embeddings"])
        return math.sqrt(1 + max(0.0, grows))
    scale = lambda mscale: 0.1 * mscale * math.log(p["factor"]) + 1.0 if p["factor"] > 1 else 1.0
    if p.get("mscale") and p.get("mscale_all_dim"):
        return scale(p["mscale"]) / scale(p["mscale_all_dim"])
    return scale(1.0)


def _kept_by_llama3(frequencies: np.ndarray, p: dict[str, float]) -> np.ndarray:
    """1 for short wavelengths, whose frequency stays; 0 for long ones, whose frequency is divided by the factor."""
    wavelength = 2 * np.pi / frequencies
    periods = p["original_max_position_embeddings"] / wavelength
    smooth = (periods - p["low_freq_factor"]) / (p["high_freq_factor"] - p["low_freq_factor"])
    return np.clip(smooth, 0.0, 1.0)


def _kept_by_yarn(head_dim: int, theta: float, p: dict[str, float]) -> np.ndarray:
    """The same for yarn, by the number of rotations over the original context."""

    def index_with(rotations: float) -> float:
        context = p["original_max_position_embeddings"]
        return head_dim * math.log(context / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low, high = index_with(p.get("beta_fast") or 32), index_with(p.get("beta_slow") or 1)
    if p.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    ramp = (np.arange(head_dim // 2) - low) / (high - low if high != low else 0.001)
    return 1 - np.clip(ramp, 0.0, 1.0)


def rope_angles(positions: Int[Array, "B T"], frequencies: np.ndarray) -> tuple[Array, Array]:
    """Compute cos and sin of position times frequency, each [B, T, H/2] float32."""
    angles = positions[..., None].astype(jnp.float32) * jnp.asarray(frequencies)
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x: Float[Array, "B T heads H"], angles: tuple[Array, Array]) -> Float[Array, "B T heads H"]:
    """Apply rotary embeddings in the half-split layout of Hugging Face checkpoints, computed in float32.

    With angles for fewer than H/2 pairs, only the first features are rotated.
    """
    cos, sin = angles[0][:, :, None], angles[1][:, :, None]
    size = 2 * cos.shape[-1]
    first, second = jnp.split(x[..., :size].astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
    return rotated if size == x.shape[-1] else jnp.concatenate([rotated, x[..., size:]], axis=-1)
