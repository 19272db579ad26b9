"""What sampling needs from a model: prefill of packed prompts, and one decode step for all slots."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from tpaw_jax.generation import cache as paged
from tpaw_jax.generation import decode_step
from tpaw_jax.generation.cpu import kernels
from tpaw_jax.models.layer_stacks import has_one_stack
from tpaw_jax.models.transformer import Transformer
from tpaw_jax.types import PackedPrompts


class Decoder(NamedTuple):
    """A model as the sampler uses it. The cache is any pytree with leaves [R, U, ...], one entry per page.

    dtype: of the matrices in `params`; None: any
    init(shards, pages) -> cache
    prepare(params) -> weights, the form of the parameters that `decode` takes
    prefill(params, prompts) -> (logits [R, N, V] after the last token of each prompt, kv: any pytree for `place`)
    place(cache, kv, starts [R, C], pages [R, C]) -> cache, with `PAGE` tokens from each start written to its page
    decode(weights, cache, tokens [R, S], positions [R, S], table) -> (logits [R, S, V], cache)
    prefills_with_weights: whether `prefill` takes the weights of `prepare` instead of `params`
    window: the tokens that a query sees in any layer, its own included; None: all
    """

    dtype: jnp.dtype | None
    init: Callable[[int, int], PyTree[Array]]
    prepare: Callable[[PyTree[Array]], PyTree[Array]]
    prefill: Callable[[PyTree[Array], PackedPrompts], tuple[Array, PyTree[Array]]]
    place: Callable[..., PyTree[Array]]
    decode: Callable[..., tuple[Array, PyTree[Array]]]
    prefills_with_weights: bool = False
    window: int | None = None


def decoder_of(model: Transformer, cache_dtype: str = "", platform: str = "") -> Decoder:
    """The `Decoder` of a `Transformer` with a paged key-value cache.

    The cache has `cache_dtype`, by default the model's compute dtype. `platform` is the devices' platform, by default
    JAX's own. On CPUs, the C++ kernels are used if they are available, support both dtypes, and the
    model is dense, caps no scores, rotates whole heads, does not normalize values and has one stack of layers.
    """
    c, dtype = model.local_config, jnp.dtype(cache_dtype or model.dtype)
    on_cpu = (platform or jax.default_backend()) == "cpu"
    supported = not c.num_experts and c.attention_cap is None and c.rotary_size == c.head_dim
    supported = supported and has_one_stack(c) and not c.value_norm
    windows = [kind.window for kind in c.kinds if kind.window is not None]
    use_kernels = on_cpu and supported and {dtype, jnp.dtype(model.dtype)} <= kernels.DTYPES and kernels.available()

    def init(shards, pages):
        return paged.empty(decode_step.cache_widths(c), shards, pages, dtype)

    def prefill(params, prompts):
        variables, rows = {"params": params}, (prompts.tokens, prompts.positions, prompts.segment_ids)
        hidden_RTD, keys_and_values = model.apply(variables, *rows, method="prefill")
        last_RND = jax.vmap(lambda row_TD, last_N: row_TD[last_N])(hidden_RTD, prompts.first + prompts.lengths - 1)
        return model.apply(variables, last_RND, method="logits"), keys_and_values

    def prefill_with_weights(weights, prompts):
        return decode_step.prefill(model, weights, prompts, dtype)

    return Decoder(
        dtype=jnp.dtype(model.dtype),
        init=init,
        prepare=lambda params: decode_step.decode_weights(model, params, packed=use_kernels),
        prefill=prefill_with_weights if use_kernels else prefill,
        place=lambda cache, kv, starts, pages: paged.write_prompts(cache, kv[0], kv[1], starts, pages),
        decode=lambda weights, cache, tokens, positions, table: decode_step.decode(
            model, weights, tokens, positions, cache, table
        ),
        prefills_with_weights=use_kernels,
        window=max(windows) if len(windows) == len(c.kinds) else None,
    )


def decoder_from_apply_fn(apply_fn: Callable[[PyTree[Array], Array], Array]) -> Decoder:
    """A `Decoder` of any causal apply_fn(params, tokens [B, T]) -> logits [B, T, V].

    It is slow: the cache holds the tokens so far, and every step recomputes the full sequence.
    """

    def last_logits(params, tokens_BT, last_B):
        return jnp.take_along_axis(apply_fn(params, tokens_BT), last_B[:, None, None], axis=1)[:, 0]

    def prefill(params, prompts):
        tokens_RT = jnp.asarray(prompts.tokens)
        places_RNT = jnp.minimum(prompts.first[..., None] + jnp.arange(tokens_RT.shape[1]), tokens_RT.shape[1] - 1)
        tokens_RNT = jax.vmap(lambda row, places: row[places])(tokens_RT, places_RNT)
        flat = lambda x: x.reshape(-1, *x.shape[2:])
        logits_BV = last_logits(params, flat(tokens_RNT), flat(prompts.lengths) - 1)
        return logits_BV.reshape(*prompts.lengths.shape, -1), tokens_RT

    def place(cache, rows_RT, starts, pages):
        places = jnp.minimum(starts[..., None] + jnp.arange(paged.PAGE), rows_RT.shape[1] - 1)
        put = lambda old, row_T, places_CP, pages_C: old.at[pages_C].set(row_T[places_CP], mode="drop")
        return jax.vmap(put)(cache, rows_RT, places, pages)

    def decode(params, cache, tokens_RS, positions_RS, table):
        put = lambda old, page_S, offset_S, new_S: old.at[page_S, offset_S].set(new_S, mode="drop")
        cache = jax.vmap(put)(cache, paged.page_of(table, positions_RS), positions_RS % paged.PAGE, tokens_RS)
        pages_RSJ = jnp.minimum(table.of_slot, cache.shape[1] - 1)
        sequences = jax.vmap(lambda pool, pages_SJ: pool[pages_SJ])(cache, pages_RSJ).reshape(tokens_RS.size, -1)
        return last_logits(params, sequences, positions_RS.reshape(-1)).reshape(*tokens_RS.shape, -1), cache

    def init(shards: int, pages: int) -> Array:
        return jnp.zeros((shards, pages, paged.PAGE), jnp.int32)

    return Decoder(None, init, lambda params: params, prefill, place, decode)
