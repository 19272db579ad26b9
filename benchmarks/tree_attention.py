"""Is attention's TPU kernel right, does it compile, how much does it skip, and how fast can it be? JSON lines.

    python benchmarks/tree_attention.py --trees 200

Parity: rows of random trees, the kernel in interpret mode against the dense mask, values and gradients, the largest
error relative to the largest value. Pairs: of UltraChat-like rows, the (token, key) pairs that the kernel computes over
those that the mask keeps. Compiling: forward and backward for a chip of each topology, seconds, without a TPU (needs
libtpu: the extra `plan`). Schedule: the instructions (VLIW bundles, one a cycle unless memory stalls) of the compiled
kernels, and their matmul FLOPs per instruction as a share of a plain matmul's.
"""

import argparse
import collections
import os
import re
import tempfile
import time
from pathlib import Path

import common
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from tpaw_jax.config import DataConfig, PackingConfig, PolicyConfig, RunConfig, SamplingConfig
from tpaw_jax.data import packing, prefix_trees
from tpaw_jax.models.attention import EINSUM, Visibility, rules, tpu_attention
from tpaw_jax.planning import workload
from tpaw_jax.planning.workload import Workload
from tpaw_jax.runtime import host, tpu
from tpaw_jax.types import TARGET, Prompts, Ragged

HEADS, KV_HEADS, SIZE = 32, 8, 128
"""Of Llama-3.1-8B."""

PAIRS = rules.QUERIES * rules.CHUNK * rules.CHUNKS
"""Pairs of a token and a key that one matmul computes."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trees", type=int, default=200, help="at least so many in the parity check")
    parser.add_argument("--row-length", type=int, nargs="+", default=[2048, 4096, 8192, 16384])
    parser.add_argument("--topology", nargs="*", default=["v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--schedule", action="store_true", help="read the schedules, which the compiler writes slowly")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        if options.schedule:
            os.environ["LIBTPU_INIT_ARGS"] = f"--xla_jf_dump_to={directory} --xla_jf_dump_llo_text=true"
        host.quiet_libtpu(compute=False)
        parity(options.trees, options.seed)
        loads = {length: pairs(length, options.seed) for length in options.row_length}
        for topology in options.topology:
            for length, load in loads.items():
                compile_attention(topology, length)
                if options.schedule:
                    compile_matmul(topology)
                    schedule(topology, length, load, Path(directory))


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
            for attention in (tpu_attention(interpret=True), EINSUM)
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
    config = PackingConfig(row_length=length)
    sizes = np.zeros((12, 5), int)  # of a prompt, its target and up to three generations
    for of_tree in sizes:
        drawn = rng.integers(1, max(8, length // 24), 1 + rng.integers(2, 5))
        of_tree[: len(drawn)] = drawn
    x, y, *generated = (Ragged.zeros(of_part) for of_part in sizes.T)
    prompts = Prompts(np.arange(len(x), dtype=np.int32), x, y)
    sources = np.where(sizes[:, 2:] > 0, np.arange(3), prefix_trees.NONE)
    responses = {TARGET: y, **dict(enumerate(generated))}
    trees = prefix_trees.Trees(prompts, responses, prompts.ids, sources, found_in=sources, triplets=True)
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


def pairs(length: int, seed: int) -> Workload:
    """The pairs of a round of three players at the paper's lengths: those computed, and those that the mask keeps."""
    run = RunConfig(
        seed=seed,
        rounds=3,
        policy=PolicyConfig(path="none"),
        data=DataConfig(),
        sampling=SamplingConfig(),
        packing=PackingConfig(row_length=length),
    )
    load = workload.assumed(run, common.MODELS["small"], workload.SAMPLE)
    common.emit(
        benchmark="tree_attention_pairs",
        row_length=length,
        fill=load.fill,
        matmuls_of_a_block=load.computed.attended / PAIRS / (length // rules.QUERIES),
        pairs_computed_over_pairs_seen=load.computed.attended / load.row.attended,
    )
    return load


MATMUL = 1024
"""Size of the plain matmul: MATMUL x MATMUL x MATMUL."""

Instructions = collections.Counter[int]
"""Instructions of a kernel by the depth of their loop; the loop over the grid's steps is 1."""


def compile_matmul(topology: str) -> None:
    """A plain matmul in bfloat16 within VMEM."""

    def plain(a, b, out):
        out[...] = jnp.dot(a[...], b[...], preferred_element_type=jnp.float32)

    def of_device(a, b):
        return pl.pallas_call(plain, out_shape=jax.ShapeDtypeStruct((MATMUL, MATMUL), jnp.float32), name="plain")(a, b)

    mesh, by_row = mesh_of(topology)
    square = jax.ShapeDtypeStruct((mesh.size * MATMUL, MATMUL), jnp.bfloat16, sharding=by_row)
    on_rows(of_device, mesh).lower(square, square).compile()


def compile_attention(topology: str, length: int) -> None:
    """Forward and backward of a layer's attention on a row a chip, bfloat16."""
    attention = tpu_attention()

    def of_device(q, k, v, *visibility):
        context = attention.prepare(Visibility(*visibility))
        loss = lambda *x: jnp.sum(attention.attend(*x, context).astype(jnp.float32))
        return jax.grad(loss, (0, 1, 2))(q, k, v)

    mesh, by_row = mesh_of(topology)
    shape = lambda *sizes, dtype=jnp.bfloat16: jax.ShapeDtypeStruct((mesh.size, *sizes), dtype, sharding=by_row)
    row, keys = shape(length, dtype=jnp.int32), shape(length, KV_HEADS, SIZE)
    lowered = on_rows(of_device, mesh).lower(shape(length, HEADS, SIZE), keys, keys, row, row, row)
    start = time.perf_counter()
    compiled = lowered.compile()
    common.emit(
        benchmark="tree_attention_compile",
        topology=topology,
        row_length=length,
        seconds=time.perf_counter() - start,
        peak_gib=compiled.memory_analysis().peak_memory_in_bytes / 2**30,
    )


def mesh_of(topology: str) -> tuple[Mesh, NamedSharding]:
    """All devices of a topology on one axis, and the sharding of arrays over it."""
    mesh = Mesh(np.array(tpu.parse_topology(topology).devices()), ("rows",))
    return mesh, NamedSharding(mesh, P("rows"))


def on_rows(of_device, mesh: Mesh):
    """A program whose devices compute their own rows."""
    return jax.jit(jax.shard_map(of_device, mesh=mesh, in_specs=P("rows"), out_specs=P("rows"), check_vma=False))


def instructions(directory: Path, kernel: str) -> Instructions:
    """Count the instructions that the compiler last scheduled for a kernel, and remove what it has written."""
    written = sorted(directory.glob(f"*{kernel}*-final_bundles.txt"), key=lambda path: path.stat().st_mtime)
    found = re.findall(r"^ *(?:0x[0-9a-f]+|0) +(?:[A-Z]{2})? *: *((?:> *)*)", written[-1].read_text(), re.MULTILINE)
    for path in directory.glob(f"*{kernel}*"):
        path.unlink()
    return collections.Counter(loops.count(">") for loops in found)


def schedule(topology: str, length: int, load: Workload, directory: Path) -> None:
    """The instructions that a row takes per key head, and the MXU's use relative to a plain matmul's.

    The loops of a kernel, from the outside: steps of the grid, blocks of queries, matmuls. A step of the
    backward kernel has as many instructions as one of the forward kernel; the rest is the initialization of a head.
    """
    forward, backward = (instructions(directory, name) for name in ("forward_kernel", "backward_kernel"))
    plain = 2 * MATMUL**3 / sum(instructions(directory, "plain").values())  # FLOPs per instruction
    matmuls, blocks = load.computed.attended / PAIRS, length // rules.QUERIES
    flops = 2 * 2 * load.computed.attended * SIZE * (HEADS // KV_HEADS)
    once = backward[0] + backward[1] - forward[0] - forward[1]
    of_row = lambda kernel: matmuls * kernel[3] + blocks * (kernel[2] + (forward[0] + forward[1]) / 4)
    spent = {"forward": of_row(forward), "backward": of_row(backward) + once}
    common.emit(
        benchmark="tree_attention_schedule",
        topology=topology,
        row_length=length,
        instructions_of_a_matmul={"forward": forward[3], "backward": backward[3]},
        instructions_of_a_block={"forward": forward[2], "backward": backward[2]},
        instructions_of_a_row=spent,
        share_of_a_plain_matmul={
            "forward": flops / spent["forward"] / plain,
            "backward": 2.5 * flops / spent["backward"] / plain,
        },
    )


if __name__ == "__main__":
    main()
