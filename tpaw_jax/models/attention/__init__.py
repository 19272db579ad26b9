"""Attention over packed trees.

1. `masks`: which keys a token attends to, the dense mask, and the einsum attention that the others are tested with.
2. `tiles`: the attention on CPU.
3. `rules`: the blocks of queries and chunks of keys of the other two.
4. `gpu`: the attention on GPU, in plain XLA.
5. `tpu`: the attention on TPU, a Pallas kernel.
"""

import jax

from tpaw_jax.models.attention.gpu import gpu_attention as gpu_attention
from tpaw_jax.models.attention.masks import EINSUM as EINSUM
from tpaw_jax.models.attention.masks import SAVED as SAVED
from tpaw_jax.models.attention.masks import Attention as Attention
from tpaw_jax.models.attention.masks import Visibility as Visibility
from tpaw_jax.models.attention.masks import capped as capped
from tpaw_jax.models.attention.masks import slope as slope
from tpaw_jax.models.attention.masks import visible as visible
from tpaw_jax.models.attention.rules import CHUNKS as CHUNKS
from tpaw_jax.models.attention.tiles import TILES as TILES
from tpaw_jax.models.attention.tpu import tpu_attention as tpu_attention
from tpaw_jax.runtime.tpu import CHIPS, generation


def attention_of(device: jax.Device, chunks: int = CHUNKS) -> Attention:
    """The fast attention of a device: for TPU, with the VMEM that its generation has.

    On TPU and GPU, a matmul has `chunks` chunks of 64 keys.
    """
    name = generation(device)
    if name:
        return tpu_attention(CHIPS[name].vmem_bytes, chunks=chunks)
    return TILES if device.platform == "cpu" else gpu_attention(chunks)
