"""Low-rank adapters (LoRA, arXiv 2106.09685): small matrices beside projections whose own weights are frozen.

A projection of x [M, D] becomes x W + scale (x A) B, with A [D, r] and B [r, F]. DoRA (arXiv 2402.09353) divides each
of its F outputs by the norm of its column of W + scale A B, and multiplies it by m, which is trained. The adapters
`lora_a`, `lora_b` and `lora_m` lie beside `kernel` in the tree of parameters; of experts, `expert_up` has B alone and
takes the A of `expert_gate`. A run trains the tree of adapters alone; `join` completes it with the base.
"""

import dataclasses
import functools
import types
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Float, PyTree

ADAPTERS = ("lora_a", "lora_b", "lora_m")
"""The names of an adapter's parameters."""

PROJECTIONS = {
    "q_proj": "q",
    "k_proj": "k",
    "v_proj": "v",
    "o_proj": "o",
    "gate_proj": "gate",
    "up_proj": "up",
    "down_proj": "down",
}
"""PEFT's names of the projections that can have an adapter, and the names of their modules here."""

EXPERTS = "experts"
"""The target that stands for the matrices of all experts, of which gate and up share A, as PEFT's gate_up_proj does."""

ROWS_SPLIT = ("o", "down")
"""Modules whose kernel is split by rows over `tensor`, so that their outputs are summed."""


@dataclasses.dataclass(frozen=True)
class Lora:
    """Which projections of a model have adapters, and what these are like."""

    rank: int  # of all rounds together
    scale: float
    targets: tuple[str, ...]  # of the values of `PROJECTIONS`, and `EXPERTS`
    init: str = "kaiming"  # of A: kaiming, uniform within D**-0.5; or gaussian, normal with deviation 1 / r. B is zero
    dtype: jnp.dtype = jnp.dtype("float32")
    dora: bool = False
    rounds: int = 1  # above 1: only columns of A and rows of B of the current round are trained, see `of_round`

    @property
    def rank_of_round(self) -> int:
        """The columns of A that a round trains."""
        return self.rank // self.rounds

    def initializer(self, batch_axis: tuple[int, ...] = ()) -> nn.initializers.Initializer:
        """The initializer of A, of which there are several along `batch_axis`."""
        if self.init == "gaussian":
            return nn.initializers.normal(1 / self.rank_of_round)
        return nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform", batch_axis=batch_axis)


def scale_of(alpha: float, rank: int, rank_stabilized: bool) -> float:
    """The scale of an adapter: alpha / r, or alpha / sqrt(r) if it is rank-stabilized (arXiv 2312.03732)."""
    return alpha / rank**0.5 if rank_stabilized else alpha / rank


class Linear(nn.Module):
    """A projection, with an adapter if the module's name is among the targets.

    `total` sums over the devices that have other rows of the kernel, if there are any.
    """

    features: int
    use_bias: bool
    dtype: DTypeLike
    param_dtype: DTypeLike
    lora: Lora | None = None
    total: Callable[[Array], Array] | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "*batch D"]) -> Float[Array, "*batch F"]:
        size, x = x.shape[-1], x.astype(self.dtype)
        kernel = self.param("kernel", nn.initializers.lecun_normal(), (size, self.features), self.param_dtype)
        bias = self.param("bias", nn.initializers.zeros, (self.features,), self.param_dtype) if self.use_bias else None
        y = jnp.dot(x, kernel.astype(self.dtype))
        if self.has_variable("params", "kernel_scale"):
            scale: Array = self.get_variable("params", "kernel_scale")
            y, kernel = (y.astype(jnp.float32) * scale).astype(self.dtype), kernel.astype(jnp.float32) * scale
        if self.lora is not None and self.name in self.lora.targets:
            y = self._adapted(x, y, kernel, self.lora)
        return y if bias is None else y + bias.astype(self.dtype)

    def _adapted(self, x, y, kernel, lora):
        a = self.param("lora_a", lora.initializer(), (x.shape[-1], lora.rank), lora.dtype)
        b = self.param("lora_b", nn.initializers.zeros, (lora.rank, self.features), lora.dtype)
        y += jnp.dot(jnp.dot(x, a.astype(self.dtype)), (lora.scale * b).astype(self.dtype))
        if not lora.dora:
            return y
        norm = lambda: column_norms(kernel, a, b, lora.scale, self.total or (lambda x: x))
        m = self.param("lora_m", lambda key, shape, dtype: norm().astype(dtype), (self.features,), lora.dtype)
        return (y.astype(jnp.float32) * (m.astype(jnp.float32) / jax.lax.stop_gradient(norm()))).astype(self.dtype)


def column_norms(
    kernel: Float[Array, "*L D F"],
    a: Float[Array, "*L D r"],
    b: Float[Array, "*L r F"],
    scale: float,
    total: Callable[[Array], Array] = lambda x: x,
) -> Float[Array, "*L F"]:
    """The norms of the columns of W + scale A B in float32, without computing A B."""
    kernel, a, b = (x.astype(jnp.float32) for x in (kernel, a, b))
    product = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)
    of_rows = a.swapaxes(-1, -2)
    squares = jnp.sum(kernel * kernel, axis=-2) + scale * jnp.sum(
        b * (2 * product(of_rows, kernel) + scale * product(product(of_rows, a), b)), axis=-2
    )
    return jnp.sqrt(total(squares))


def split(params: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The adapters of a tree of parameters, and all others: the base."""
    adapters: dict[str, Any] = {}
    base: dict[str, Any] = {}
    for name, value in params.items():
        if isinstance(value, Mapping):
            own, base[name] = split(value)
            adapters |= {name: own} if own else {}
        else:
            (adapters if name in ADAPTERS else base)[name] = value
    return adapters, base


def parts(params: PyTree[Any], lora: Any) -> tuple[PyTree[Any], tuple[PyTree[Any], ...]]:
    """What is trained of a policy, and what is frozen: the adapters and (base,) with `lora`, else all and ()."""
    if not lora:
        return params, ()
    adapters, base = split(params)
    return adapters, (base,)


def join(one: Mapping[str, Any], other: Mapping[str, Any] = types.MappingProxyType({})) -> dict[str, Any]:
    """The inverse of `split`, in either order. Where both have a leaf, it is the other's."""
    both = {name for name in other if isinstance(other[name], Mapping) and name in one}
    return {**one, **other, **{name: join(one[name], other[name]) for name in both}}


def of_round(adapters: PyTree[Array], round_number: Array | int, lora: Lora | None) -> PyTree[Array]:
    """Adapters, or their gradients, with zeros where another round trains; unchanged if all rounds train all.

    Round t trains columns [t r, (t + 1) r) of A and these rows of B, with r = `lora.rank_of_round`.
    """
    if lora is None or lora.rounds == 1:
        return adapters
    trains_r = jnp.arange(lora.rank) // lora.rank_of_round == round_number
    masks = {"lora_a": trains_r, "lora_b": trains_r[:, None]}
    return jax.tree.map_with_path(lambda path, x: jnp.where(masks[path[-1].key], x, 0), adapters)


def first_rounds(adapters: PyTree[Array], count: int, lora: Lora) -> PyTree[Array]:
    """The columns of A and rows of B that the first `count` rounds train."""
    rank = count * lora.rank_of_round
    cut = {"lora_a": lambda a: a[..., :rank], "lora_b": lambda b: b[..., :rank, :]}
    return jax.tree.map_with_path(lambda path, x: cut[path[-1].key](x), adapters)


def begun_with(new: PyTree[Array], first: PyTree[Array]) -> PyTree[Array]:
    """New adapters of several rounds, whose first columns of A and rows of B are those of other adapters."""

    def begun(path, own, other):
        rest = own[..., other.shape[-1] :] if path[-1].key == "lora_a" else own[..., other.shape[-2] :, :]
        return jnp.concatenate([other, rest], -1 if path[-1].key == "lora_a" else -2)

    return jax.tree.map_with_path(begun, new, first)


def merged(params: Mapping[str, Any], scale: float, total: Callable[[Array], Array] = lambda x: x) -> dict[str, Any]:
    """The parameters without adapters: W + scale A B in the place of W, computed in float32; no W is quantized.

    `total` sums over the devices that have other rows of the kernels in `ROWS_SPLIT`.
    """
    whole: dict[str, Any] = {}
    for name, own in params.items():
        if name == "expert_up" and "lora_b" in own:
            own = {**own, "lora_a": params["expert_gate"]["lora_a"]}
        if not isinstance(own, Mapping):
            whole[name] = own
        elif "lora_a" not in own and "kernel_scale" not in own:
            whole[name] = merged(own, scale, total)
        else:
            others = {key: value for key, value in own.items() if key not in (*ADAPTERS, "kernel_scale")}
            of_module = total if name in ROWS_SPLIT else lambda x: x
            whole[name] = {**others, "kernel": _merged_kernel(own, scale, of_module)}
    return whole


def _merged_kernel(own: Mapping[str, Array], scale: float, total: Callable[[Array], Array]) -> Array:
    """A kernel of W + scale A B, or of W alone, in the dtype of W, or float32 if that is quantized."""
    if own["kernel"].ndim > 3:  # experts of all layers: a float32 copy of one layer at a time
        return jax.lax.map(lambda of_layer: _merged_kernel(of_layer, scale, total), dict(own))
    kernel, dtype = own["kernel"].astype(jnp.float32), own["kernel"].dtype
    if "kernel_scale" in own:
        kernel, dtype = kernel * own["kernel_scale"][..., None, :], jnp.dtype("float32")
    if "lora_a" not in own:
        return kernel.astype(dtype)
    a, b = (own[name].astype(jnp.float32) for name in ("lora_a", "lora_b"))
    whole = kernel + scale * jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)
    if "lora_m" in own:
        factors = own["lora_m"].astype(jnp.float32) / column_norms(kernel, a, b, scale, total)
        whole *= factors[..., None, :]
    return whole.astype(dtype)


def with_magnitudes(adapters: Mapping[str, Any], base: Mapping[str, Any]) -> dict[str, Any]:
    """New adapters for DoRA, whose m are the norms of the base's columns, so that they change nothing."""
    if "lora_m" not in adapters:
        return {name: with_magnitudes(own, base[name]) for name, own in adapters.items()}
    kernel = _merged_kernel(base, 0.0, lambda x: x).astype(jnp.float32)
    return {**adapters, "lora_m": jnp.sqrt(jnp.sum(kernel * kernel, axis=-2)).astype(adapters["lora_m"].dtype)}
