"""What the benchmarks share: the machine in words, spreads, the matmul peak of a model, workloads, a set-up."""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tpaw_jax.config import MeshConfig, ObjectiveConfig, PackingConfig, TrainConfig
from tpaw_jax.data import packing, prefix_trees
from tpaw_jax.generation.cpu import kernels
from tpaw_jax.models import ModelConfig, Transformer
from tpaw_jax.models.attention import TILES
from tpaw_jax.planning.workload import MEDIANS, SPREADS
from tpaw_jax.runtime import sharding
from tpaw_jax.training import logprobs, scoring, train_step
from tpaw_jax.training.train_step import StepScalars
from tpaw_jax.types import NOTHING, Generations, Prompts, Ragged, TeamScores

MODELS = {  # Llama's architecture with random weights
    "smollm2": ModelConfig("llama", 49152, 576, 1536, 30, 9, 3, 64, 100000.0, 1e-5, 8192, True),
    "small": ModelConfig("llama", 16384, 384, 1024, 8, 6, 2, 64, 10000.0, 1e-5, 8192, True),  # of the peer comparison
    "tiny": ModelConfig("llama", 512, 64, 172, 2, 4, 2, 16, 10000.0, 1e-5, 8192, True),  # for a look whether it runs
}

CAPS = {"prompt": 128, "target": 128, "generated": 64}
"""The longest of each at a quarter of the paper's scale: 512 prompt tokens, 1024 in all, 256 new ones."""


def fullest_row_length(trees: prefix_trees.Trees, config: PackingConfig, lengths: Sequence[int]) -> int:
    """The row length of `lengths` that needs the fewest tokens in total for a fixed set of trees.

    Raises:
        ValueError: the longest tree exceeds all `lengths`.
    """
    longest = int(trees.sizes.tokens.max())
    fitting = [length for length in sorted(lengths) if length >= longest]
    if not fitting:
        raise ValueError(
            f"The longest tree has {longest} tokens, more than every row length in {list(lengths)}; add a longer one."
        )
    total_tokens = lambda n: n * len(packing.pack(trees, dataclasses.replace(config, row_length=n)))
    return min(fitting, key=total_tokens)


class Setup(NamedTuple):
    """A model with packed data: all that a step or a scoring pass needs."""

    model: Transformer
    params: Any
    prompts: Prompts
    generations: list[Generations]
    trees: prefix_trees.Trees
    rows: packing.Rows
    mesh: Any
    log_prob_fn: logprobs.LogProbFn


def machine() -> dict[str, Any]:
    """The machine and the versions that a figure belongs to."""
    cpu = [
        line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
    ]
    gib = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    return {
        "cpu": cpu[0] if cpu else "unknown",
        "cores": os.cpu_count(),
        "memory_gib": round(gib, 1),
        "backend": jax.default_backend(),
        "jax": jax.__version__,
        "tpaw_jax": importlib.metadata.version("tpaw_jax"),
        "huge_pages": "hugetlb=1" in os.environ.get("GLIBC_TUNABLES", ""),
    }


def emit(**record: Any) -> None:
    """Print one JSON line; floats to four digits."""
    print(json.dumps({k: _short(v) for k, v in record.items()}), flush=True)


def seconds_of(call: Callable[[], Any]) -> float:
    """Seconds until the results of `call` are there."""
    start = time.perf_counter()
    jax.block_until_ready(call())
    return time.perf_counter() - start


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, least and most of some readings, and how many there are."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "repeats": len(values)}


def lengths(prompts: int, generations: int, scale: float, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """UltraChat-like lengths of x [N], y [N] and the generated responses [N, K], tokens: log-normal, cut as SPIN cuts.

    Scale 1 is the paper's (medians 160, 280, 240), 0.25 that of the peer comparison.
    """
    rng, quarter = np.random.default_rng(seed), 4 * scale

    def of(median: float, sigma: float, cap: float, count: int) -> np.ndarray:
        drawn = rng.lognormal(np.log(median * scale), sigma, count)
        return np.clip(np.round(drawn), 4, cap * quarter).astype(int)

    counts = (prompts, prompts, prompts * generations)
    x, y, g = (of(*one) for one in zip(MEDIANS, SPREADS, CAPS.values(), counts, strict=True))
    return x, y, g.reshape(prompts, generations)


def workload(prompts: int, rounds: int, scale: float, seed: int, vocabulary: int) -> tuple[Prompts, list[Generations]]:
    """Random tokens of `lengths`: prompts with targets, and a response of each of `rounds` rounds, newest first."""
    rng = np.random.default_rng((seed, 1))
    ids = lambda sizes: Ragged.of(rng.integers(10, vocabulary, n).astype(np.int32) for n in sizes)
    x, y, g = lengths(prompts, rounds, scale, seed)
    data = Prompts(np.arange(prompts, dtype=np.int32), ids(x), ids(y))
    return data, [Generations(t, ids(g[:, t]), NOTHING) for t in reversed(range(rounds))]


def set_up(name: str, config: PackingConfig, data: tuple[Prompts, list[Generations]], remat: str, chunk: int) -> Setup:
    """A random model of `MODELS` and `data` in rows, float32, on one device."""
    prompts, generations = data
    trees = prefix_trees.trees_of_window(prompts, generations, prefix_trees.first_sources(prompts, generations))
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    model = Transformer(MODELS[name], remat=remat, attention=TILES)
    shardings = sharding.param_shardings(jax.eval_shape(lambda: _init(model)), mesh)
    params = jax.jit(lambda: _init(model), out_shardings=shardings)()
    log_prob_fn = logprobs.make_log_prob_fn(model, chunk)
    return Setup(model, params, prompts, generations, trees, packing.pack(trees, config), mesh, log_prob_fn)


def team_scores(setup: Setup, rows_per_batch: int, players: int = 3) -> TeamScores:
    """Scores of `players` players: the policy itself, then ones that differ from it by a few nats."""
    scored = scoring.score(scoring.make_scorer(setup.log_prob_fn, setup.mesh), setup.params, setup.rows, rows_per_batch)
    return TeamScores(np.stack([scored + 3 * (-1) ** j * (j > 0) for j in range(players)]), np.ones(players, bool))


def make_step(setup: Setup) -> tuple[train_step.TrainStep, Any, StepScalars]:
    """The team step, a fresh state whose parameters are a copy, and scalars of a first step."""
    optimizer = train_step.make_optimizer(TrainConfig())
    step = train_step.make_train_step(setup.log_prob_fn, optimizer, ObjectiveConfig(), setup.mesh)
    state = train_step.init_state(jax.tree.map(jnp.copy, setup.params), optimizer, setup.mesh)
    return step, state, StepScalars(np.float32(1e-7), np.float32(0.1), np.float32(0), np.bool_(False))


def matmul_peak(
    model: ModelConfig, tokens: int, backward: bool, repeats: int = 5, dtype: Any = jnp.float32, packed: bool = False
) -> dict[str, float]:
    """GFLOP/s of the model's own matmuls alone, of `dtype`, as a pass over `tokens` tokens mixes them.

    Each weight's product forward and, with `backward`, its two products backward; the head on blocks of 4096 entries.
    By XLA or, with `packed`, forward by `cpu_kernels`. `median` and `best` are of the repeats of each product.
    """
    c, attention = model, model.num_heads * model.head_dim
    shapes = {  # (inputs, outputs): times in the model
        (c.hidden_size, attention): c.num_layers,
        (c.hidden_size, c.num_kv_heads * c.head_dim): 2 * c.num_layers,
        (attention, c.hidden_size): c.num_layers,
        (c.hidden_size, c.intermediate_size): 2 * c.num_layers,
        (c.intermediate_size, c.hidden_size): c.num_layers,
        (c.hidden_size, min(4096, c.vocab_size)): c.vocab_size / min(4096, c.vocab_size),
    }
    work, typical, best = 0.0, 0.0, 0.0
    for (k, n), times in shapes.items():
        x, w, y = (jnp.ones(shape, dtype) for shape in ((tokens, k), (k, n), (tokens, n)))
        of = lambda equation: functools.partial(jnp.einsum, equation)
        products: list[Any] = [(of("mk,kn->mn"), x, w)]
        products += [(of("mn,kn->mk"), y, w), (of("mk,mn->kn"), x, y)] * backward
        for function, a, b in [(kernels.dot, x, kernels.pack(w))] if packed else products:
            product = jax.jit(function)
            jax.block_until_ready(product(a, b))
            readings = [seconds_of(lambda p=product, a=a, b=b: p(a, b)) for _ in range(repeats)]
            work += times * 2 * tokens * k * n
            typical, best = typical + times * statistics.median(readings), best + times * min(readings)
    return {"median": work / typical / 1e9, "best": work / best / 1e9}


def run_contender(
    environments: Path, environment: str, script: str, arguments: list[str], variables: dict[str, str] | None = None
) -> dict[str, Any]:
    """The line that `peers/<script>` printed, alone in its virtual environment; in this one where it is named ""."""
    python = environments / environment / "bin" / "python" if environment else Path(sys.executable)
    if not python.exists():
        sys.exit(f"{python}: there is no such environment; `make peers` builds it.")
    kept = {k: v for k, v in os.environ.items() if k not in ("GLIBC_TUNABLES", "PYTHONPATH")}
    kept |= {"JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1", **(variables or {})}
    command = [str(python), str(Path(__file__).parent / "peers" / script), *arguments]
    done = subprocess.run(command, env=kept, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{script} failed: {' '.join(command)}\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def _init(model: Transformer) -> Any:
    return model.init(jax.random.key(0), jnp.zeros((1, 8), jnp.int32))["params"]


def _short(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _short(v) for k, v in value.items()}
    return float(f"{value:.4g}") if isinstance(value, float) else value
