"""Do adapters learn in rounds as all parameters do? JSON lines: a search of learning rates, then three rounds of each.

    python benchmarks/adapters_rounds.py --policy.path SMOLLM2.gguf

Plays configs/smollm2_gsm8k.yaml (keys can be overridden as for `tpaw play`) with all parameters, with adapters of rank
16 on all projections, and with these and `merge_each_round`. Each way takes the rate whose first round ends with the
best log-prob of the held-out targets. All runs of the search train on the same sampled responses.
"""

import argparse
import functools
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import common

from tpaw_jax.cli import overrides
from tpaw_jax.config import config_file
from tpaw_jax.generation import completions
from tpaw_jax.runtime import sharding
from tpaw_jax.runtime.host import restart_with_huge_pages
from tpaw_jax.selfplay import loop

CONFIG = Path(__file__).parent.parent / "configs" / "smollm2_gsm8k.yaml"

ADAPTERS = ["policy.lora.rank=16", "policy.lora.alpha=32", "policy.lora.targets=[all-linear]"]
WAYS = {
    "all parameters": [],
    "adapters": ADAPTERS,
    "adapters, merged each round": [*ADAPTERS, "policy.lora.merge_each_round=true"],
}
RATES = {"all parameters": (1e-6, 2e-6, 4e-6, 8e-6), "adapters": (5e-5, 1e-4, 2e-4, 4e-4)}
"""The search of each way; merged adapters take the rate of the others, because their first rounds are alike."""

METRICS = ("triplets", "chosen", "rejected", "margin", "held-out before", "held-out after", "response tokens")
"""Of a round's summary: rewards in nats times lam, held-out log-prob in nats a token."""


def main() -> None:
    restart_with_huge_pages()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default=CONFIG)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    options, rest = parser.parse_known_args()
    settings = overrides.read(rest)
    with tempfile.TemporaryDirectory() as folder:
        played = functools.partial(play, options.config, settings, Path(folder))
        run, responses = config_file.load(options.config, settings), Path(folder) / "responses.jsonl"
        completions.answer(run, sharding.make_mesh(run.mesh), responses, say=say)
        searched = {way: way if way in RATES else "adapters" for way in options.ways}
        best = {way: search(way, played, responses) for way in dict.fromkeys(searched.values())}
        for way in options.ways:
            rate = best[searched[way]]
            for row in played(way, rate):
                report("adapters_rounds", way, rate, row)


def search(way: str, played: Callable[..., list[dict[str, Any]]], responses: Path) -> float:
    """The rate whose first round ends with the best held-out log-prob; a line for each rate."""
    found = {}
    for rate in RATES[way]:
        (row,) = played(way, rate, responses)
        report("adapters_rounds_search", way, rate, row)
        found[row["held-out after"]] = rate
    return found[max(found)]


def play(
    config: str | Path, settings: list[str], folder: Path, way: str, rate: float, responses: Path | None = None
) -> list[dict[str, Any]]:
    """The summaries of three rounds, or of the first on these responses. The last has half the rate."""
    rates = f"train.learning_rate=[{rate},{rate},{rate / 2}]"
    rounds = ["rounds=1"] if responses else []
    directory = f"directory={folder / f'{way} {rate} {responses is None}'}"
    run = config_file.load(config, [*settings, *WAYS[way], rates, *rounds, directory])
    return loop.play(run, say, responses)


def say(text: str) -> None:
    print(text, file=sys.stderr)


def report(benchmark: str, way: str, rate: float, row: dict[str, Any]) -> None:
    """The line of a round."""
    metrics = {name: row[name] for name in METRICS}
    common.emit(benchmark=benchmark, way=way, learning_rate=rate, round=row["round"], **metrics)


if __name__ == "__main__":
    main()
