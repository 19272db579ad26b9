"""Where does the wall time of a round go? One JSON line a round of a real run.

    python benchmarks/round.py --config configs/smollm2_gsm8k.yaml --policy.path FILE.gguf

Plays the configuration in a temporary directory, any key overridden as for `tpaw play`, and reads the timings that
every round leaves: sampling, scoring (held-out prompts too), stepping (the dry run too), compiling, packing, saving,
everything else. What the run says goes to standard error.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

import common

from tpaw_jax.cli import overrides
from tpaw_jax.config import config_file
from tpaw_jax.runtime.host import restart_with_huge_pages
from tpaw_jax.selfplay import loop, round_store


def main() -> None:
    restart_with_huge_pages()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True)
    options, rest = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as directory:
        run = config_file.load(options.config, [*overrides.read(rest), f"directory={directory}"])
        table = loop.play(run, lambda text: print(text, file=sys.stderr))
        for row in table:
            t = row["round"]
            timings = json.loads((round_store.round_directory(Path(directory), t) / "timings.json").read_text())
            report(options.config, row, timings)


def report(name: str, row: dict, timings: dict[str, float]) -> None:
    """The line of one round; shares are of its wall time."""
    whole = timings["round"] - timings.get("startup", 0.0)
    seconds = {
        "sampling": timings["sampling"],
        "scoring": timings["scoring"] + timings["held-out"],
        "stepping": timings["training"] + timings["dry run"],
        "compiling": timings["compiling"],
        "packing": timings["packing"],
        "saving": timings["saving"],
    }
    seconds["everything else"] = whole - sum(seconds.values())
    overhead = sum(seconds[stage] for stage in ("packing", "saving", "everything else"))
    common.emit(
        benchmark="round",
        config=name,
        round=row["round"],
        players=row["players"],
        triplets=row["triplets"],
        seconds=whole,
        compile_seconds=timings["compiling"],
        seconds_of=seconds,
        share_of={stage: value / whole for stage, value in seconds.items()},
        share_not_sampling_scoring_or_stepping=overhead / whole,
        machine=common.machine(),
    )


if __name__ == "__main__":
    main()
