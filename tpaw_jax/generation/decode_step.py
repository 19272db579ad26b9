"""One decode step of the `Transformer`: the forward pass for one new token per slot.

Each weight is read for only a few rows, so weights are laid out for fast reading, and products that share an input are
fused. With the CPU kernels (`cpu.kernels`) the matrices are packed, and prefill uses the packed matrices too.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, PyTree

from tpaw_jax.generation import cache as kv
from tpaw_jax.generation.cpu import kernels
from tpaw_jax.generation.cpu.kernels import PackedMatrix
from tpaw_jax.models import ModelConfig, adapters, experts
from tpaw_jax.models.attention import Visibility, capped
from tpaw_jax.models.block import (
    ACTIVATIONS,
    attention_context,
    embedding_multiplier,
    kind_of_layers,
    rms_norm,
    rotary_angles,
    scaled,
    select_kind,
    stacked_by_kind,
    token_features,
    with_offset,
)
from tpaw_jax.models.layer_stacks import places_of, source_of_layers, stacks_of
from tpaw_jax.models.model_config import LAYERS
from tpaw_jax.models.parallel import Parallel
from tpaw_jax.models.rope import rotate
from tpaw_jax.models.transformer import Transformer, head_table
from tpaw_jax.types import AnyArray, PackedPrompts

Matrix = Float[Array, "F D"] | PackedMatrix
Layer = Int[Array, ""] | int


class LayerWeights(NamedTuple):
    """Parameters of one layer, or of all layers, stacked. Matrices that read the same input are concatenated."""

    attention_norm: Float[Array, "*L D"] | None  # None: the input is not normalized
    attention_post_norm: Float[Array, "*L D"] | None  # None: the output is not normalized
    qkv: Matrix  # [E, D]
    qkv_bias: Float[Array, "*L E"] | None
    q_norm: Float[Array, "*L H"] | None
    k_norm: Float[Array, "*L H"] | None
    o: Matrix  # [D, F]
    mlp_norm: Float[Array, "*L D"] | None
    mlp_post_norm: Float[Array, "*L D"] | None
    gate_up: Matrix | None  # [G, D]; None: no feed-forward computes all tokens
    down: Matrix | None  # [D, F]
    experts: "ExpertLayer | None"
    tokens: "TokenLayer | None"
    output_scale: Float[Array, "*L 1"] | None


class ExpertLayer(NamedTuple):
    """The experts of a layer."""

    router: Float[Array, "D E"]
    matrices: experts.ExpertWeights
    shared_gate: Float[Array, "D 1"] | None
    norms: dict[str, Array]  # only beside a dense feed-forward


class TokenLayer(NamedTuple):
    """A layer's own embedding of the tokens."""

    table: Float[Array, "V Q"]
    projection: Matrix  # [Q, D]
    gate: Matrix  # [Q, D]
    out: Matrix  # [D, Q]
    post_norm: Float[Array, "D"]


class DecodeWeights(NamedTuple):
    """Parameters in the form that decode steps read, matrices in the compute dtype."""

    embed: Matrix  # [V, D]
    layers: tuple[LayerWeights, ...] | LayerWeights  # a tuple, since XLA copies slices of a stack; stacked if packed
    final_norm: Float[Array, "D"]
    token_norm: Float[Array, "Q"] | None
    head: Matrix | None  # [V, D]; None: tied to `embed`

    @property
    def packed(self) -> bool:
        """Whether the matrices are packed for the CPU kernels."""
        return isinstance(self.layers, LayerWeights)

    def of_layer(self, i: Layer) -> tuple[LayerWeights, Layer | None]:
        """The weights of layer i and None; if packed, those of all layers and i, which may then be a tracer."""
        return (self.layers, i) if isinstance(self.layers, LayerWeights) else (self.layers[i], None)


def decode_weights(model: Transformer, params: PyTree[Array], packed: bool = False) -> DecodeWeights:
    """Convert a model's parameters for `decode`, with adapters merged; `packed` for the CPU kernels."""
    total = model.parallel.reduce_from_tensor
    whole = lambda p: p if model.lora is None else adapters.merged(p, model.lora.scale, total)
    layout = kernels.pack if packed else jnp.transpose
    matrix = lambda p_DF: layout(p_DF.astype(model.dtype))
    offset = model.config.norm_offset
    of_layer = lambda p: _layer_weights(whole(p), matrix, offset, model.dtype)
    places = () if packed else places_of(model.config)
    layers = [of_layer(jax.tree.map(lambda p, i=i: p[i], params[stack])) for stack, i in places]
    return DecodeWeights(
        matrix(params["embed"]["embedding"].T),
        of_layer(params[LAYERS]) if packed else tuple(layers),
        with_offset(params["final_norm"]["scale"], offset),
        params["token_norm"]["scale"] if model.config.token_features else None,
        None if model.config.tie_embeddings else matrix(head_table(params).T),
    )


def cache_widths(config: ModelConfig) -> list[int]:
    """The numbers per token of each layer that has keys of its own, K H."""
    stacks = [stacks_of(config)[place.stack] for place in places_of(config)]
    return [own.num_kv_heads * own.head_dim for own in stacks if not own.reads_keys]


def decode(
    model: Transformer,
    weights: DecodeWeights,
    tokens: Int[Array, "R S"],
    positions: Int[Array, "R S"],
    cache: kv.KVCache,
    table: kv.PageTable,
) -> tuple[Float[Array, "R S V"], kv.KVCache]:
    """Float32 logits after one new token per slot, and the cache with that token written at `positions`.

    Products take operands in the compute dtype and accumulate in float32; everything else is float32. Layers are
    unrolled: a scan needs stacked weights, and XLA copies the slices of a stack.
    """
    stacks, sources, pool = stacks_of(model.local_config), source_of_layers(model.config), iter(cache)
    angles = {stack: rotary_angles(own, positions) for stack, own in stacks.items()}
    x_MD = _embed(model, weights, tokens)
    token_inputs = _TokenInputs(x_MD, tokens.reshape(-1), weights.token_norm)
    kept: dict[int, Any] = {}  # of each layer with keys of its own
    for i, (stack, index) in enumerate(places_of(model.config)):
        own, source = stacks[stack], sources[i]
        kind = own.layer_kinds[index]
        of_kind = select_kind(angles[stack], own.kinds.index(kind) if len(own.kinds) > 1 else None)
        settings = {"angles": of_kind, "table": table, "positions": positions, "window": kind.window}
        if weights.packed:
            attend = functools.partial(_attend_with_kernel, pages=next(pool), **settings)
        elif source == i:
            attend = functools.partial(_attend, own, pages=next(pool), **settings)
        else:
            attend = functools.partial(_attend_to, own, source=kept[source], **settings)
        x_MD, result = _layer(
            own, weights.of_layer(i), x_MD, positions.shape, attend, model.parallel, token_inputs=token_inputs
        )
        kept |= {i: result} if source == i else {}
    logits = _logits(model, weights, x_MD).reshape(*tokens.shape, -1)
    return logits, tuple(result[0] for result in kept.values())


def prefill(
    model: Transformer, weights: DecodeWeights, prompts: PackedPrompts, dtype: DTypeLike
) -> tuple[Float[Array, "R N V"], tuple[Float[Array, "L R T K H"], Float[Array, "L R T K H"]]]:
    """Float32 logits after each prompt's last token, and the rows' keys and values in `dtype`; for packed weights.

    Products round like those of `decode`. Attention is the model's own, on keys and values before they are rounded.
    """
    c, rows = model.local_config, prompts.tokens.shape
    angles_of_kinds = rotary_angles(c, prompts.positions)
    visibility = Visibility(jnp.asarray(prompts.segment_ids))
    contexts = stacked_by_kind(c, lambda kind: attention_context(model.attention, visibility, kind))

    def attend(heads_RTXH, kind):
        angles, context = select_kind((angles_of_kinds, contexts), kind)
        q, k, v = _split_heads(c, heads_RTXH)
        k = rotate(k, angles)
        return model.attention.attend(rotate(q, angles), k, v, context), (k.astype(dtype), v.astype(dtype))

    def layer(x_MD, own):
        i, kind = own
        attend_to = functools.partial(attend, kind=kind)
        return _layer(c, weights.of_layer(i), x_MD, rows, attend_to, model.parallel, token_inputs=None)

    layers = jnp.arange(c.num_layers), kind_of_layers(c)
    x_MD, keys_and_values = jax.lax.scan(layer, _embed(model, weights, prompts.tokens), layers)
    last_RN = jnp.arange(rows[0])[:, None] * rows[1] + prompts.first + prompts.lengths - 1
    logits = _logits(model, weights, x_MD[last_RN.reshape(-1)])
    return logits.reshape(*last_RN.shape, -1), keys_and_values


def _embed(model: Transformer, weights: DecodeWeights, tokens: Int[AnyArray, "R S"]) -> Float[Array, "M D"]:
    name, flat = "embed/embedding", jnp.reshape(tokens, -1)
    x_MD = model.parallel.embed(weights.embed, name, flat, jnp.float32, take=_take_rows)
    return scaled(x_MD, embedding_multiplier(model.config, model.dtype))


class _TokenInputs(NamedTuple):
    """What layers with an embedding of their own need to look up and combine."""

    embedded: Float[Array, "M D"]
    tokens: Int[Array, "M"]
    scale: Float[Array, "Q"] | None


def _layer(
    c: ModelConfig,
    weights: tuple[LayerWeights, Layer | None],
    x_MD: Array,
    rows: tuple[int, ...],
    attend: Callable[..., Any],
    parallel: Parallel,
    *,
    token_inputs: _TokenInputs | None,
) -> Any:
    """One layer over tokens of shape `rows` = (R, S); `c` is the architecture of its stack.

    attend([R, S, N + 2K, H]) -> (attention output [R, S, N, H], anything that the caller wants to keep). Layers that
    compute no keys and values pass their queries alone.
    """
    w, i = weights
    product = functools.partial(_product, epsilon=c.rms_norm_eps, layer=i)
    select = lambda p: p if i is None else p[i]
    norm = lambda x, scale: rms_norm(x, select(scale), c.rms_norm_eps)
    after = lambda x, scale: scaled(x if scale is None else norm(x, scale), c.residual_multiplier)
    qkv_ME = product(x_MD, w.qkv, w.attention_norm)
    if w.qkv_bias is not None:
        qkv_ME += select(w.qkv_bias)
    heads_RSXH = _scale_heads(c, w, qkv_ME.reshape(*rows, -1, c.head_dim), norm)
    attended, kept = attend(heads_RSXH)
    out_MD = parallel.reduce_from_tensor(product(attended.reshape(len(x_MD), -1), w.o))
    x_MD += after(out_MD, w.attention_post_norm)
    out_MD = jnp.zeros((), jnp.float32)
    if w.gate_up is not None:
        gate_MF, up_MF = jnp.split(product(x_MD, w.gate_up, w.mlp_norm), 2, axis=1)
        out_MD = product(ACTIVATIONS[c.activation](gate_MF) * up_MF, w.down)
    if c.experts_beside_dense:
        out_MD = _experts_beside(c, w.experts, x_MD, out_MD, parallel)
    elif w.experts is not None:
        out_MD = parallel.reduce_from_tensor(_add_experts(c, w.experts, norm(x_MD, w.mlp_norm), out_MD))
    else:
        out_MD = parallel.reduce_from_tensor(out_MD)
    x_MD += after(out_MD, w.mlp_post_norm)
    if w.tokens is not None:
        x_MD += _of_tokens(c, w.tokens, x_MD, token_inputs)
    return x_MD if w.output_scale is None else x_MD * w.output_scale.astype(jnp.float32), kept


def _add_experts(config: ModelConfig, own: ExpertLayer, h_MD: Array, shared_MD: Array) -> Array:
    """The output of the routed experts, added to that of the shared expert if there is one."""
    routes, _ = experts.route(h_MD.astype(own.router.dtype), own.router, None, config)
    if own.shared_gate is not None:
        h_in = h_MD.astype(own.shared_gate.dtype)
        shared_MD *= jax.nn.sigmoid(jnp.dot(h_in, own.shared_gate, preferred_element_type=jnp.float32))
    return shared_MD + _mixed(config, own, h_MD, routes)


def _experts_beside(config: ModelConfig, own: Any, x_MD: Array, dense_MD: Array, parallel: Parallel) -> Array:
    """The sum of the normalized outputs of a dense feed-forward and of experts with norms of their own."""
    norm = lambda x, name: rms_norm(x, own.norms[name], config.rms_norm_eps)
    router_in = scaled(norm(x_MD, "router_norm"), config.hidden_size**-0.5)
    routes, _ = experts.route(router_in.astype(own.router.dtype), own.router, None, config)
    routes = experts.scaled_routes(routes, own.norms["expert_scale"])
    routed_MD = _mixed(config, own, norm(x_MD, "experts_norm"), routes)
    total = lambda out_MD, name: norm(parallel.reduce_from_tensor(out_MD), name)
    return total(dense_MD, "dense_post_norm") + total(routed_MD, "experts_post_norm")


def _mixed(config: ModelConfig, own: ExpertLayer, h_MD: Array, routes: experts.Routes) -> Array:
    h_in, activation = h_MD.astype(own.matrices.gate.dtype), ACTIVATIONS[config.activation]
    outputs_MXD = experts.compute(h_in, routes.experts, own.matrices, activation)
    return experts.mix(outputs_MXD.astype(jnp.float32), routes.weights)


def _of_tokens(config: ModelConfig, own: TokenLayer, x_MD: Array, token_inputs: Any) -> Array:
    """What the layer's own embedding of the tokens adds, gated by x."""
    embedded_MQ = _take_rows(own.table, token_inputs.tokens).astype(jnp.float32)
    projected_MQ = scaled(_product(token_inputs.embedded, own.projection), config.hidden_size**-0.5)
    own_MQ = token_features(projected_MQ, embedded_MQ, token_inputs.scale, config)
    gated_MQ = ACTIVATIONS[config.activation](_product(x_MD, own.gate)) * own_MQ
    return rms_norm(_product(gated_MQ, own.out), own.post_norm, config.rms_norm_eps)


def _logits(model: Transformer, weights: DecodeWeights, x_MD: Float[Array, "M D"]) -> Float[Array, "M V"]:
    tied = weights.head is None
    head = weights.embed if tied else weights.head
    logits_MV = _product(x_MD, head, weights.final_norm, model.config.rms_norm_eps)
    logits_MV = capped(scaled(logits_MV, 1 / model.config.logits_scaling), model.config.logits_cap)
    return model.parallel.whole_vocabulary(logits_MV, f"{'embed' if tied else 'head'}/embedding")


def _scale_heads(config, w, heads_RSXH, norm):
    """Queries, keys and values, with their norms and the factor of queries; queries alone if there are no others."""
    if w.q_norm is None and config.query_scale == 1.0:
        return heads_RSXH
    q, *others = _split_heads(config, heads_RSXH)
    together = lambda x: x.reshape(*x.shape[:2], -1) if config.qk_norm_all else x
    normed = lambda x, scale: x if scale is None else norm(together(x), scale).reshape(x.shape)
    q = scaled(normed(q, w.q_norm), config.query_scale)
    if config.reads_keys:
        return q
    k, v = others[0], others[0] if config.keys_as_values else others[1]
    v = rms_norm(v, None, config.rms_norm_eps) if config.value_norm else v
    return jnp.concatenate([q, normed(k, w.k_norm), v], axis=2)


def _split_heads(config, heads_RSXH):
    """Queries, keys and values, as far as there are any."""
    return jnp.split(heads_RSXH, [config.num_heads, config.num_heads + config.num_kv_heads], axis=2)


def _take_rows(table_VD, tokens_M):
    """table[tokens]. XLA's CPU backend converts an entire table of 16-bit floats to read one row, so read integers."""
    if isinstance(table_VD, PackedMatrix):
        return kernels.take(table_VD, tokens_M)
    if table_VD.dtype.itemsize != 2:
        return table_VD[tokens_M]
    as_integers = lambda table: jax.lax.bitcast_convert_type(table, jnp.uint16)[tokens_M]
    through_integers = lambda table: jax.lax.bitcast_convert_type(as_integers(table), table.dtype)
    return jax.lax.platform_dependent(table_VD, cpu=through_integers, default=lambda table: table[tokens_M])


def _attend_with_kernel(heads_RSXH, *, angles, pages, table, positions, window):
    """Attention output and the layer's pages with the new tokens, by the CPU kernel."""
    pools = pages.keys, pages.values
    attended, *pools = kernels.attend_pages(heads_RSXH, angles, *pools, table.of_slot, positions, window=window)
    return attended, (kv.LayerPages(*pools),)


def _attend(config, heads_RSXH, *, angles, pages, table, positions, window):
    """Attention output, and the layer's pages with the new tokens and their keys and values, by XLA."""
    q, k, v = _split_heads(config, heads_RSXH)
    q, k = rotate(q, angles), rotate(k, angles)
    attended = kv.attend_pages(q, k, v, pages, table, positions, window=window, cap=config.attention_cap)
    return attended, (kv.write_token(pages, table, positions, k, v), k, v)


def _attend_to(config, q_RSNH, *, source, angles, table, positions, window):
    """Attention output of queries over what `_attend` has kept of an earlier layer."""
    pages, k, v = source
    q_RSNH = rotate(q_RSNH, angles)
    return kv.attend_pages(q_RSNH, k, v, pages, table, positions, window=window, cap=config.attention_cap), None


def _product(x_MD, weight_FD, scale=None, epsilon=0.0, layer=None):
    """x times the transposed weight, in float32; with `scale`, of the RMS norm of x."""
    if isinstance(weight_FD, PackedMatrix):
        return kernels.dot(x_MD, weight_FD, scale, epsilon, layer)
    if scale is not None:
        x_MD = rms_norm(x_MD, scale, epsilon)
    x_DM = _row_major(x_MD.T).astype(weight_FD.dtype)
    return _row_major(jnp.dot(weight_FD, x_DM, preferred_element_type=jnp.float32)).T


def _row_major(x_FM):
    """`x_FM` stored row by row; XLA would otherwise choose the layout of the array's source or its use.

    On CPUs, the product of a weight [F, D] and few columns in this layout is 15 to 40 % faster than that of few rows,
    for which XLA even converts 16-bit weights to float32. On TPUs both take the same time.
    """
    return with_layout_constraint(x_FM, Layout(major_to_minor=(0, 1)))


def _layer_weights(p, matrix, norm_offset, dtype) -> LayerWeights:
    norm = lambda name: with_offset(p[name]["scale"], norm_offset) if name in p else None
    kernel = lambda *names: matrix(jnp.concatenate([p[name]["kernel"] for name in names if name in p], axis=-1))
    plain = lambda name: p[name]["kernel"].astype(dtype)
    own = tokens = None
    if "router" in p:
        matrices = experts.ExpertWeights(plain("expert_gate"), plain("expert_up"), plain("expert_down"))
        named = ("router_norm", "expert_scale", "experts_norm", "experts_post_norm", "dense_post_norm")
        norms = {name: p[name]["scale"] for name in named if name in p}
        own = ExpertLayer(plain("router"), matrices, plain("shared_gate") if "shared_gate" in p else None, norms)
    if "token_gate" in p:
        table = p["token_embedding"]["embedding"].astype(dtype)
        projection, gate, out = (kernel(name) for name in ("token_projection", "token_gate", "token_out"))
        tokens = TokenLayer(table, projection, gate, out, p["token_post_norm"]["scale"])
    return LayerWeights(
        attention_norm=norm("attention_norm"),
        attention_post_norm=norm("attention_post_norm"),
        qkv=kernel("q", "k", "v"),
        qkv_bias=jnp.concatenate([p[name]["bias"] for name in "qkv"], axis=-1) if "bias" in p["q"] else None,
        q_norm=norm("q_norm"),
        k_norm=norm("k_norm"),
        o=kernel("o"),
        mlp_norm=norm("mlp_norm"),
        mlp_post_norm=norm("mlp_post_norm"),
        gate_up=kernel("gate", "up") if "gate" in p else None,
        down=kernel("down") if "down" in p else None,
        experts=own,
        tokens=tokens,
        output_scale=p["output_scale"]["scale"] if "output_scale" in p else None,
    )
