"""How layers with parameters of different shapes are stacked, and how they repeat."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from tpaw_jax.models import ModelConfig, Transformer
from tpaw_jax.models.layer_stacks import cycles_of, has_one_stack, places_of, source_of_layers, stacks_of

PLAIN = ModelConfig("llama", 64, 16, 32, 6, 2, 1, 8, 1e4, 1e-5, 64, True)


def global_heads(pattern, sharing=0):
    """Layers with a window (l) and without (G)."""
    return dataclasses.replace(
        PLAIN,
        num_layers=len(pattern),
        sliding_window=4,
        window_layers=tuple(one == "l" for one in pattern),
        local_rope_theta=1e3,
        global_head_dim=16,
        global_kv_heads=1,
        kv_shared_layers=sharing,
        kv_shared_size=64 if sharing else 0,
    )


def written(cycles):
    """A cycle as its layers, * for those that are read, times its repeats."""
    short = {
        "layers": "l",
        "global_layers": "G",
        "kv_shared_layers": "s",
        "kv_shared_global_layers": "S",
        "dense_layers": "d",
    }
    return " ".join("".join(short[m.stack] + "*" * m.stores for m in c.members) + f"x{c.repeats}" for c in cycles)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (PLAIN, "lx6"),
        (global_heads("llllGllllG"), "llllGx2"),
        (global_heads("llGllGll"), "llGx2 lx2"),
        (global_heads("lG"), "lx1 Gx1"),
        (global_heads("llllG" * 7, 20), "llllGx2 lx3 l*x1 G*x1 ssssSx4"),  # Gemma 4 E2B
        (global_heads("lllllG" * 7, 18), "lllllGx3 lx4 l*x1 G*x1 sssssSx3"),  # Gemma 4 E4B
        (dataclasses.replace(PLAIN, num_experts=4, dense_layers=(True,) + (False,) * 5), "dx1 lx5"),
    ],
)
def test_layers_repeat_in_cycles(config, expected):
    assert written(cycles_of(config)) == expected


@pytest.mark.parametrize("config", [PLAIN, global_heads("llllG" * 7, 20), global_heads("llGllGll")])
def test_cycles_go_through_the_layers_in_order(config):
    order = [
        (member.stack, member.offset(repeat))
        for cycle in cycles_of(config)
        for repeat in range(cycle.repeats)
        for member in cycle.members
    ]
    assert order == list(places_of(config))
    sizes = {stack: own.num_layers for stack, own in stacks_of(config).items()}
    assert sum(sizes.values()) == config.num_layers
    assert has_one_stack(config) == (config is PLAIN)


def test_layers_without_keys_read_the_last_layer_of_their_kind():
    assert source_of_layers(global_heads("llGllGlG", 2)) == (0, 1, 2, 3, 4, 5, 4, 5)


def test_a_stack_has_the_sizes_of_its_layers():
    config = global_heads("llllG" * 7, 20)
    shapes = jax.eval_shape(Transformer(config).init, jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"]
    assert shapes["layers"]["q"]["kernel"].shape == (12, 16, 16)
    assert shapes["global_layers"]["q"]["kernel"].shape == (3, 16, 32)
    assert shapes["kv_shared_layers"]["gate"]["kernel"].shape == (16, 16, 64)
    assert "k" not in shapes["kv_shared_global_layers"]
