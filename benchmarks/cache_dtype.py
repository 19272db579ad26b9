"""How far does a bfloat16 cache move the log-probs of sampled tokens? One JSON line.

    python benchmarks/cache_dtype.py --config configs/smollm2_gsm8k.yaml --policy.path FILE [--prompts 32]

The first prompts of a run are answered twice, with keys and values kept in float32 and in bfloat16, all else alike.
Tokens are compared up to the first that differs: nats a token, at the mean and at most.
"""

import argparse

import common
import numpy as np

from tpaw_jax.cli import overrides
from tpaw_jax.config import config_file
from tpaw_jax.data import dataset
from tpaw_jax.generation import engine
from tpaw_jax.generation.policy import open_policy
from tpaw_jax.runtime import sharding
from tpaw_jax.types import Generations


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True)
    parser.add_argument("--prompts", type=int, default=32)
    options, rest = parser.parse_known_args()
    whole, half = (
        answered(options.config, overrides.read(rest), options.prompts, of) for of in ("float32", "bfloat16")
    )
    gaps, alike = [], 0
    for a, b, p, q in zip(whole.tokens, half.tokens, whole.log_probs, half.log_probs, strict=True):
        same = int(np.argmin(np.append(a[: len(b)] == b[: len(a)], False)))
        gaps += np.abs(p[:same] - q[:same]).tolist()
        alike += same == len(a) == len(b)
    common.emit(
        benchmark="cache_dtype",
        responses=len(whole.tokens),
        alike=alike,
        tokens=sum(map(len, whole.tokens)),
        tokens_compared=len(gaps),
        mean_gap=float(np.mean(gaps)),
        largest_gap=max(gaps),
        machine=common.machine(),
    )


def answered(config: str, overrides: list[str], count: int, cache_dtype: str) -> Generations:
    """Responses to the first `count` prompts, with keys and values kept in `cache_dtype`."""
    run = config_file.load(config, [*overrides, f"sampling.cache_dtype={cache_dtype}"])
    player = open_policy(run, sharding.make_mesh(run.mesh))
    prompts, *_ = dataset.load(run.data, player.template, run.seed)
    some = prompts.take(range(min(count, len(prompts))))
    return engine.generate(player.sampler, player.params, some, seed=run.seed, round_number=0)


if __name__ == "__main__":
    main()
