"""What does it cost to save the training state while training? One JSON line.

    python benchmarks/durability.py --model smollm2 --steps 4 --repeats 5

Blocks of optimizer steps, one with a save begun at its first step beside one without, in turn. A block's seconds end
when the save it began is whole, so what runs beside the steps is counted too. `ratio_at_defaults` spreads the cost over
the steps between two saves at the default train.save_every_steps and train.save_every_minutes.
"""

import argparse
import tempfile
import time
from pathlib import Path

import common
import jax
import numpy as np

from tpaw_jax.config import PackingConfig, TrainConfig
from tpaw_jax.data import packing
from tpaw_jax.runtime.host import restart_with_huge_pages
from tpaw_jax.storage import journal, ring
from tpaw_jax.training import train_step


def main() -> None:
    restart_with_huge_pages()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=common.MODELS, default="smollm2")
    parser.add_argument("--steps", type=int, default=4, help="of a block")
    parser.add_argument("--row-length", type=int, default=2048)
    parser.add_argument("--rows", type=int, default=3, help="of a step")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--directory", default=None, help="where the saves go; by default where temporary files do")
    options = parser.parse_args()
    data = common.workload(8 * options.rows, 3, 0.25, 0, common.MODELS[options.model].vocab_size)
    setup = common.set_up(options.model, PackingConfig(row_length=options.row_length), data, "dots", 256)
    rows = packing.take(setup.rows, np.arange(min(options.rows, len(setup.rows))), options.rows)
    step, state, scalars = common.make_step(setup)
    scores = common.team_scores(setup._replace(rows=rows), 1)
    batch = packing.step_batch(rows, scores, np.arange(options.rows), 1, options.rows)
    arguments = jax.device_put((*batch, scalars), train_step.input_shardings(setup.mesh))
    with tempfile.TemporaryDirectory(dir=options.directory) as place:
        kept, number = ring.open_ring(journal.open_journal(Path(place)), 3), 0

        def block(saves: bool) -> float:
            nonlocal state, number
            begun = time.perf_counter()
            for i in range(options.steps):
                state, metrics = step(state, *arguments)
                jax.block_until_ready(metrics)
                if saves and i == 0:
                    number += 1
                    ring.save_training(kept, state, 0, number)
            ring.finish_saves(kept)
            return time.perf_counter() - begun

        block(True)  # compiles
        pairs = [(block(True), block(False)) for _ in range(options.repeats)]
        size = sum(p.stat().st_size for p in Path(place).rglob("*") if p.is_file())
    c, seconds = TrainConfig(), common.spread([without / options.steps for _, without in pairs])
    interval = min(c.save_every_steps * seconds["median"], 60 * c.save_every_minutes)
    cost = common.spread([saving - without for saving, without in pairs])
    common.emit(
        benchmark="durability",
        model=options.model,
        steps_of_a_block=options.steps,
        gib_of_a_save=size / 2**30,
        step_seconds=seconds,
        seconds_of_a_save=cost,
        ratio_of_blocks=common.spread([saving / without for saving, without in pairs]),
        seconds_between_saves=interval,
        ratio_at_defaults=1 + cost["median"] / interval,
        machine=common.machine(),
    )


if __name__ == "__main__":
    main()
