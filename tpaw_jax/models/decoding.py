"""One further token a slot: the decoder as it is run when every weight is read for few rows.

Activations stand feature first, [D, M]: products of a weight [F, D] with few columns run 15 to 40 % faster than those
of few rows with [D, F] on CPU (XLA reads the weight along its rows), and are the same to a TPU. Where it can, a CPU has
its matrices packed (`cpu_kernels`), and computes prompts with them too.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.experimental.layout import Layout, with_layout_constraint
from jaxtyping import Array, Float, Int, PyTree

from tpaw_jax.models import cache as kv
from tpaw_jax.models import cpu_kernels
from tpaw_jax.models.attention import Visibility, rotate
from tpaw_jax.models.cpu_kernels import PackedMatrix
from tpaw_jax.models.transformer import Transformer, head_table, rms_norm, rotary_angles
from tpaw_jax.types import AnyArray, PackedPrompts

Matrix = Float[Array, "F D"] | PackedMatrix


class LayerWeights(NamedTuple):
    """One layer's parameters, or all layers', stacked: products that read the same input are one, end to end."""

    attention_norm: Float[Array, "*L D"]
    qkv: Matrix  # [E, D]
    qkv_bias: Float[Array, "*L E"] | None
    q_norm: Float[Array, "*L H"] | None
    k_norm: Float[Array, "*L H"] | None
    o: Matrix  # [D, F]
    mlp_norm: Float[Array, "*L D"]
    gate_up: Matrix  # [G, D]
    down: Matrix  # [D, F]


class DecodeWeights(NamedTuple):
    """Parameters as decoding reads them, in the compute dtype."""

    embed: Matrix  # [V, D]
    layers: tuple[LayerWeights, ...] | LayerWeights  # each its own, since XLA copies slices of a stack; or all, packed
    final_norm: Float[Array, "D"]
    head: Matrix | None  # [V, D]; None where it is `embed`

    @property
    def packed(self) -> bool:
        """Whether matrices are packed."""
        return isinstance(self.embed, PackedMatrix)

    def of_layer(self, i: Int[Array, ""] | int) -> LayerWeights:
        """The weights of layer i, which must be known to the program where they are not packed."""
        if not isinstance(self.layers, LayerWeights):
            return self.layers[i]
        is_matrix = lambda p: isinstance(p, PackedMatrix)
        return jax.tree.map(lambda p: p.of_layer(i) if is_matrix(p) else p[i], self.layers, is_leaf=is_matrix)


def decode_weights(model: Transformer, params: PyTree[Array], packed: bool = False) -> DecodeWeights:
    """The parameters of a model for `decode`, matrices packed or not."""
    params = jax.tree.map(lambda p: p.astype(model.dtype), params)
    of_layer = lambda i: jax.tree.map(lambda p: p[i], params["layers"])
    matrix = lambda p_DF: cpu_kernels.pack(p_DF) if packed else p_DF.T
    of_layers = [_layer_weights(of_layer(i), matrix) for i in range(0 if packed else model.config.num_layers)]
    return DecodeWeights(
        matrix(params["embed"]["embedding"].T),
        _layer_weights(params["layers"], matrix) if packed else tuple(of_layers),
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
    angles = rotary_angles(model.config, positions)
    x_DM, layers = _embedded(model, weights, tokens), []
    for i, pages in enumerate(cache):
        attend = functools.partial(_attend_pages, angles, pages, table, positions, weights.packed)
        x_DM, pages = _layer(model, weights.of_layer(i), x_DM, positions.shape, attend)
        layers.append(pages)
    return _logits(model, weights, x_DM).reshape(*tokens.shape, -1), tuple(layers)


def prefill(
    model: Transformer, weights: DecodeWeights, prompts: PackedPrompts, dtype: jnp.dtype
) -> tuple[Float[Array, "R N V"], tuple[Float[Array, "L R T K H"], Float[Array, "L R T K H"]]]:
    """Float32 logits after the last token of each prompt, and the rows' keys and values in `dtype`, of packed weights.

    It is rounded as `decode` is; attention is the model's own, in float32.
    """
    c, rows = model.local_config, prompts.tokens.shape
    angles = rotary_angles(c, prompts.positions)
    context = model.attention.prepare(Visibility(jnp.asarray(prompts.segment_ids)))

    def attend(q, k, v):
        k = rotate(k, angles)
        return model.attention.attend(rotate(q, angles), k, v, context), (k.astype(dtype), v.astype(dtype))

    def layer(x_DM, i):
        return _layer(model, weights.of_layer(i), x_DM, rows, attend)

    x_DM, keys_and_values = jax.lax.scan(layer, _embedded(model, weights, prompts.tokens), jnp.arange(c.num_layers))
    last_RN = jnp.arange(rows[0])[:, None] * rows[1] + prompts.first + prompts.lengths - 1
    logits = _logits(model, weights, x_DM[:, last_RN.reshape(-1)])
    return logits.reshape(*last_RN.shape, -1), keys_and_values


def _embedded(model: Transformer, weights: DecodeWeights, tokens: Int[AnyArray, "R S"]) -> Float[Array, "D M"]:
    name, flat = "embed/embedding", jnp.reshape(tokens, -1)
    return _feature_first(model.parallel.embed(weights.embed, name, flat, jnp.float32, take=_rows).T)


def _layer(model: Transformer, w: LayerWeights, x_DM: Array, rows: tuple[int, ...], attend: Callable[..., Any]) -> Any:
    """A layer over the tokens of `rows` [R, S]; attend(q, k, v), each [R, S, heads, H] -> (what q finds, anything)."""
    c, split = model.local_config, model.parallel
    norm = lambda x_DM, scale: rms_norm(x_DM, scale[:, None], c.rms_norm_eps, axis=0)
    qkv_EM = _product(w.qkv, norm(x_DM, w.attention_norm))
    if w.qkv_bias is not None:
        qkv_EM += w.qkv_bias[:, None]
    heads_RSXH = _feature_first(qkv_EM).T.reshape(*rows, -1, c.head_dim)
    q, k, v = jnp.split(heads_RSXH, [c.num_heads, c.num_heads + c.num_kv_heads], axis=2)
    if w.q_norm is not None and w.k_norm is not None:
        q, k = rms_norm(q, w.q_norm, c.rms_norm_eps), rms_norm(k, w.k_norm, c.rms_norm_eps)
    attended, kept = attend(q, k, v)
    x_DM += split.total(_product(w.o, _feature_first(attended.reshape(x_DM.shape[1], -1).T)))
    gate_FM, up_FM = jnp.split(_product(w.gate_up, norm(x_DM, w.mlp_norm)), 2)
    return x_DM + split.total(_product(w.down, nn.silu(gate_FM) * up_FM)), kept


def _logits(model: Transformer, weights: DecodeWeights, x_DM: Float[Array, "D M"]) -> Float[Array, "M V"]:
    tied = weights.head is None
    normed_DM = rms_norm(x_DM, weights.final_norm[:, None], model.config.rms_norm_eps, axis=0)
    logits_VM = _product(weights.embed if tied else weights.head, normed_DM)
    return model.parallel.whole_vocabulary(_feature_first(logits_VM).T, f"{'embed' if tied else 'head'}/embedding")


def _rows(table_VD, tokens_M):
    """table[tokens]. XLA's CPU backend widens a whole table of 16-bit floats to read a row of it, but not integers."""
    if isinstance(table_VD, PackedMatrix):
        return cpu_kernels.take(table_VD, tokens_M)
    if table_VD.dtype.itemsize != 2:
        return table_VD[tokens_M]
    as_integers = lambda table: jax.lax.bitcast_convert_type(table, jnp.uint16)[tokens_M]
    of_integers = lambda table: jax.lax.bitcast_convert_type(as_integers(table), table.dtype)
    return jax.lax.platform_dependent(table_VD, cpu=of_integers, default=lambda table: table[tokens_M])


def _attend_pages(angles, pages, table, positions, native, q, k, v):
    """What the queries find in the cache, and a layer of the cache with their tokens in it."""
    if native:
        found = cpu_kernels.attend_pages(q, k, v, angles, pages.keys, pages.values, table.of_slot, positions)
        return found[0], kv.LayerPages(*found[1:])
    q, k = rotate(q, angles), rotate(k, angles)
    return kv.attend_pages(q, k, v, pages, table, positions), kv.write_token(pages, table, positions, k, v)


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
    kernel = lambda *names: matrix(jnp.concatenate([p[name]["kernel"] for name in names], axis=-1))
    bias = jnp.concatenate([p[name]["bias"] for name in "qkv"], axis=-1) if "bias" in p["q"] else None
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
