"""Is the splash kernel under the tree's rule right, how much does it skip, and does it compile for TPUs? JSON lines.

    python benchmarks/tree_attention.py --trees 200

Parity: rows of random trees, kernel in interpret mode against the dense mask, values and gradients, the largest error
relative to the largest value. Blocks: of UltraChat-like rows, the share of causal attention's blocks that are skipped.
Compiling: forward and backward for a chip of each topology, seconds, without a TPU (needs libtpu: the extra `plan`).
"""

import argparse
import time

import common
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from tpaw_jax.config import DataConfig, PackingConfig, PolicyConfig, RunConfig, SamplingConfig
from tpaw_jax.data import packing, prefix_trees
from tpaw_jax.models import splash_attention as splash
from tpaw_jax.models.attention import EINSUM, Visibility
from tpaw_jax.planning import workload
from tpaw_jax.runtime import host, tpu


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trees", type=int, default=200, help="at least so many in the parity check")
    parser.add_argument("--row-length", type=int, nargs="+", default=[2048, 4096, 8192, 16384], help="of the blocks")
    parser.add_argument("--topology", nargs="*", default=["v5e:2x2", "v5p:2x2x1", "v6e:2x2"])
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    host.quiet_libtpu(compute=False)
    parity(options.trees, options.seed)
    for length in options.row_length:
        blocks(length, options.seed)
    for topology in options.topology:
        compile_times(topology, options.row_length)


def parity(trees: int, seed: int) -> None:
    """The largest errors over rows of so many random trees of one to three generations."""
    errors: dict[str, float] = {"values": 0.0, "gradients": 0.0}
    compared, rows, turn = 0, 0, 0
    while compared < trees:
        length, shape = ((256, (4, 2)), (1024, (2, 1)), (2048, (2, 2)))[turn % 3]
        batch, count = random_rows(seed + turn, length)
        visibility = Visibility.of(batch)
        found, expected = (
            values_and_gradients(attention, visibility, seed + turn, *shape)
            for attention in (splash.splash_attention(interpret=True), EINSUM)
        )
        relative = lambda a, b: float(jnp.max(jnp.abs(a - b)) / jnp.max(jnp.abs(b)))
        errors["values"] = max(errors["values"], relative(found[0], expected[0]))
        errors["gradients"] = max(errors["gradients"], *map(relative, found[1], expected[1]))
        compared, rows, turn = compared + count, rows + len(batch.segment_ids), turn + 1
    common.emit(
        benchmark="tree_attention_parity",
        trees=compared,
        rows=rows,
        largest_relative_error=errors,
        machine=common.machine(),
    )


def random_rows(seed: int, length: int) -> tuple[packing.TreeBatch, int]:
    """Packed rows of random trees, and how many trees they hold."""
    rng = np.random.default_rng(seed)
    config = PackingConfig(row_length=length, alignment=splash.alignment(length))
    trees = []
    for i in range(12):
        sizes = rng.integers(1, max(8, length // 24), 1 + rng.integers(2, 5))
        x, *responses = (np.ones(n, np.int32) for n in sizes)
        triplets = tuple((0, k, 1) for k in range(1, len(responses)))
        trees.append(prefix_trees.Tree(i, x, tuple(range(-1, len(responses) - 1)), tuple(responses), triplets))
    return packing.pack(trees, config).batch, len(trees)


def values_and_gradients(attention, visibility, seed, heads, kv_heads, size=64):
    """What attention gives for random queries, keys and values, and the gradients of a random sum of it."""
    rows, length = visibility.segment_ids.shape
    rng = np.random.default_rng(seed)
    shapes = [(rows, length, n, size) for n in (heads, kv_heads, kv_heads, heads)]
    q, k, v, weight = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes)
    weight *= (visibility.segment_ids > 0)[..., None, None]
    context = attention.prepare(Visibility(*map(jnp.asarray, visibility)))

    def weighted(*x):
        out = attention.attend(*x, context)
        return jnp.sum(weight * out), weight * out

    gradients, out = jax.jit(jax.grad(weighted, (0, 1, 2), has_aux=True))(q, k, v)
    return out, gradients


def blocks(length: int, seed: int) -> None:
    """The attention blocks of a round of three players at the paper's lengths, against causal attention's."""
    run = RunConfig(
        seed=seed,
        rounds=3,
        policy=PolicyConfig(path="none"),
        data=DataConfig(),
        sampling=SamplingConfig(),
        packing=PackingConfig(row_length=length, alignment=splash.alignment(length)),
    )
    load = workload.assumed(run, common.MODELS["small"], workload.SAMPLE)
    common.emit(
        benchmark="tree_attention_blocks",
        row_length=length,
        fill=load.fill,
        skipped_of_causal=1 - load.blocks,
        pairs_computed_over_pairs_seen=load.computed.attended / load.row.attended,
    )


def compile_times(topology: str, lengths: list[int]) -> None:
    """Forward and backward of a layer's attention on a row a chip, Llama-3.1-8B's heads, bfloat16."""
    devices = tpu.parse_topology(topology).devices()
    mesh = Mesh(np.array(devices), ("rows",))
    by_row = NamedSharding(mesh, P("rows"))
    attention = splash.splash_attention()

    def of_device(q, k, v, *visibility):
        context = attention.prepare(Visibility(*visibility))
        loss = lambda *x: jnp.sum(attention.attend(*x, context).astype(jnp.float32))
        return jax.grad(loss, (0, 1, 2))(q, k, v)

    program = jax.jit(jax.shard_map(of_device, mesh=mesh, in_specs=P("rows"), out_specs=P("rows"), check_vma=False))
    for length in lengths:
        shape = lambda *sizes, dtype=jnp.bfloat16: jax.ShapeDtypeStruct((len(devices), *sizes), dtype, sharding=by_row)
        row = shape(length, dtype=jnp.int32)
        lowered = program.lower(shape(length, 32, 128), shape(length, 8, 128), shape(length, 8, 128), row, row, row)
        start = time.perf_counter()
        compiled = lowered.compile()
        common.emit(
            benchmark="tree_attention_compile",
            topology=topology,
            row_length=length,
            seconds=time.perf_counter() - start,
            peak_gib=compiled.memory_analysis().peak_memory_in_bytes / 2**30,
        )


if __name__ == "__main__":
    main()
