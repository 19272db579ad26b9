"""One further token a slot: the decoder as it is run when every weight is read for few rows.

Activations stand feature first, [D, M]: products of a weight [F, D] with few columns run 15 to 40 % faster than those
of few rows with [D, F] on CPU (XLA reads the weight along its rows), and are the same to a TPU. Where it can, a CPU has
its matrices packed (`cpu_kernels`).
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.experimental.layout import Layout, with_layout_constraint
from jaxtyping import Array, Float, Int, PyTree

from tpaw_jax.models import cache as kv
from tpaw_jax.models import cpu_kernels
from tpaw_jax.models.attention import rotate
from tpaw_jax.models.cpu_kernels import PackedMatrix
from tpaw_jax.models.transformer import Transformer, head_table, rms_norm, rotary_angles

Matrix = Float[Array, "F D"] | PackedMatrix


class LayerWeights(NamedTuple):
    """One layer's parameters: products that read the same input are one, their outputs end to end."""

    attention_norm: Float[Array, "D"]
    qkv: Matrix  # [E, D]
    qkv_bias: Float[Array, "E"] | None
    q_norm: Float[Array, "H"] | None
    k_norm: Float[Array, "H"] | None
    o: Matrix  # [D, F]
    mlp_norm: Float[Array, "D"]
    gate_up: Matrix  # [G, D]
    down: Matrix  # [D, F]


class DecodeWeights(NamedTuple):
    """Parameters as decoding reads them: in the compute dtype, each layer's its own."""

    embed: Matrix  # [V, D]
    layers: tuple[LayerWeights, ...]
    final_norm: Float[Array, "D"]
    head: Matrix | None  # [V, D]; None where it is `embed`


def decode_weights(model: Transformer, params: PyTree[Array], packed: bool = False) -> DecodeWeights:
    """The parameters of a model for `decode`, matrices packed or not."""
    params = jax.tree.map(lambda p: p.astype(model.dtype), params)
    of_layer = lambda i: jax.tree.map(lambda p: p[i], params["layers"])
    matrix = lambda p_DF: cpu_kernels.pack(p_DF) if packed else p_DF.T
    return DecodeWeights(
        matrix(params["embed"]["embedding"].T),
        tuple(_layer_weights(of_layer(i), matrix) for i in range(model.config.num_layers)),
        params["final_norm"]["scale"],
        None if model.config.tie_embeddings else matrix(head_table(params).T),
    )


def decode(
    model: Transformer,
    weights: DecodeWeights,
    tokens: Int[Array, "R S"],
    positions: Int[Array, "R S"],
    cache: kv.KVCache,
    table: kv.PageTable,
) -> tuple[Float[Array, "R S V"], kv.KVCache]:
    """Float32 logits after one further token a slot, and the cache with it written at `positions`.

    Products read their operands in the compute dtype and are summed in float32; all else is float32. Layers stand one
    after the other, not under a scan, whose slices of stacked weights XLA copies for every token.
    """
    c, split, shape = model.local_config, model.parallel, tokens.shape
    norm = lambda x_DM, scale: rms_norm(x_DM, scale[:, None], c.rms_norm_eps, axis=0)
    angles = rotary_angles(c, positions)
    x_MD = split.embed(weights.embed, "embed/embedding", tokens.reshape(-1), jnp.float32, take=_rows)
    x_DM, layers = _feature_first(x_MD.T), []
    for w, layer in zip(weights.layers, cache, strict=True):
        qkv_EM = _product(w.qkv, norm(x_DM, w.attention_norm))
        if w.qkv_bias is not None:
            qkv_EM += w.qkv_bias[:, None]
        heads_RSXH = _feature_first(qkv_EM).T.reshape(*shape, -1, c.head_dim)
        q, k, v = jnp.split(heads_RSXH, [c.num_heads, c.num_heads + c.num_kv_heads], axis=2)
        if w.q_norm is not None and w.k_norm is not None:
            q, k = rms_norm(q, w.q_norm, c.rms_norm_eps), rms_norm(k, w.k_norm, c.rms_norm_eps)
        attended, layer = _attend(q, k, v, angles, layer, table, positions, native=isinstance(w.qkv, PackedMatrix))
        layers.append(layer)
        x_DM += split.total(_product(w.o, _feature_first(attended.reshape(x_DM.shape[1], -1).T)))
        gate_FM, up_FM = jnp.split(_product(w.gate_up, norm(x_DM, w.mlp_norm)), 2)
        x_DM += split.total(_product(w.down, nn.silu(gate_FM) * up_FM))
    head_VD = weights.embed if weights.head is None else weights.head
    logits_VM = _product(head_VD, norm(x_DM, weights.final_norm))
    logits_MV = _feature_first(logits_VM).T
    name = "embed/embedding" if weights.head is None else "head/embedding"
    return split.whole_vocabulary(logits_MV, name).reshape(*shape, -1), tuple(layers)


def _rows(table_VD, tokens_M):
    """table[tokens]. XLA's CPU backend widens a whole table of 16-bit floats to read a row of it, but not integers."""
    if isinstance(table_VD, PackedMatrix):
        return cpu_kernels.take(table_VD, tokens_M)
    if table_VD.dtype.itemsize != 2:
        return table_VD[tokens_M]
    as_integers = lambda table: jax.lax.bitcast_convert_type(table, jnp.uint16)[tokens_M]
    of_integers = lambda table: jax.lax.bitcast_convert_type(as_integers(table), table.dtype)
    return jax.lax.platform_dependent(table_VD, cpu=of_integers, default=lambda table: table[tokens_M])


def _attend(q, k, v, angles, layer, table, positions, native: bool):
    """What the queries find in the cache, and the cache with their tokens in it."""
    if native:
        found = cpu_kernels.attend_pages(q, k, v, angles, layer.keys, layer.values, table.of_slot, positions)
        return found[0], kv.LayerPages(*found[1:])
    q, k = rotate(q, angles), rotate(k, angles)
    return kv.attend_pages(q, k, v, layer, table, positions), kv.write_token(layer, table, positions, k, v)


def _product(weight_FD, x_DM):
    if isinstance(weight_FD, PackedMatrix):
        return cpu_kernels.dot(weight_FD, x_DM)
    return jnp.dot(weight_FD, x_DM.astype(weight_FD.dtype), preferred_element_type=jnp.float32)


def _feature_first(x_FM):
    """`x_FM` in memory as it is written: left to itself XLA lays it out as what it is made of or turned into.

    Products of other layouts are several times slower on CPU, where 16-bit weights would even be widened first.
    """
    return with_layout_constraint(x_FM, Layout(major_to_minor=(0, 1)))


def _layer_weights(p, matrix) -> LayerWeights:
    kernel = lambda *names: matrix(jnp.concatenate([p[name]["kernel"] for name in names], axis=1))
    bias = jnp.concatenate([p[name]["bias"] for name in "qkv"]) if "bias" in p["q"] else None
    return LayerWeights(
        attention_norm=p["attention_norm"]["scale"],
        qkv=kernel("q", "k", "v"),
        qkv_bias=bias,
        q_norm=p["q_norm"]["scale"] if "q_norm" in p else None,
        k_norm=p["k_norm"]["scale"] if "k_norm" in p else None,
        o=kernel("o"),
        mlp_norm=p["mlp_norm"]["scale"],
        gate_up=kernel("gate", "up"),
        down=kernel("down"),
    )
