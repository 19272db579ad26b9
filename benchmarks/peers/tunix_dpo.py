"""Tunix's side of the peer comparison: DPO with one live reference. python tunix_dpo.py WORKLOAD.json BATCH STEPS

Run by ../peers.py in an environment with google-tunix. Timed from the third step on, so that nothing compiles; the
figure is of steps, float32, as the trainer comes.
"""

import json
import os
import sys
import time

os.environ.setdefault("JAX_PLATFORMS", "cpu")
import jax
import numpy as np
import optax
import tunix_model
from tunix.sft.dpo import dpo_trainer

WARM_UP = 2


def main() -> None:
    path, batch, steps = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    with open(path) as file:
        work = json.load(file)
    mesh = jax.make_mesh((1, 1), ("fsdp", "tp"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    data = Timed(batches(work, batch)[: WARM_UP + steps])
    settings = dpo_trainer.DPOTrainingConfig(
        eval_every_n_steps=10**9, max_steps=len(data.batches), max_inflight_computations=1
    )
    with mesh:
        policy, reference = (tunix_model.build(work["model"]) for _ in range(2))
        trainer = dpo_trainer.DPOTrainer(policy, reference, optax.rmsprop(5e-7), settings)
        trainer.train(data)
        jax.effects_barrier()
    seconds = time.perf_counter() - data.begun[WARM_UP]
    triplets = batch * (len(data.batches) - WARM_UP)
    print(
        json.dumps(
            {
                "contender": "tunix",
                "triplets": triplets,
                "steps_seconds": seconds,
                "triplets_per_second": triplets / seconds,
            }
        )
    )


def batches(work, size):
    """Triplets as Tunix's padded inputs: prompts to the left, responses to the right."""
    triplets = [(r["prompt"], r["target"], g) for r in work["rows"] for g in r["generated"]]

    def pad(ids, length, left):
        rest = length - len(ids)
        zeros, ones = [0] * rest, [1] * len(ids)
        return (zeros + ids, zeros + ones) if left else (ids + zeros, ones + zeros)

    made = []
    for i in range(0, len(triplets) - size + 1, size):
        columns = [[] for _ in range(6)]
        for x, y, g in triplets[i : i + size]:
            of_prompt = pad(x, work["max_prompt"], True)
            of_pair = (pad(r, work["max_response"], False) for r in (y, g))
            for column, values in zip(columns, (*of_prompt, *(v for pair in of_pair for v in pair)), strict=True):
                column.append(values)
        names = ("prompt_ids", "prompt_mask", "chosen_ids", "chosen_mask", "rejected_ids", "rejected_mask")
        arrays = (np.asarray(column, np.int32) for column in columns)
        made.append(dpo_trainer.TrainingInput(**dict(zip(names, arrays, strict=True))))
    return made


class Timed:
    """Batches that note when each was asked for."""

    def __init__(self, batches):
        self.batches, self.begun = batches, []

    def __iter__(self):
        for batch in self.batches:
            self.begun.append(time.perf_counter())
            yield batch


if __name__ == "__main__":
    main()
