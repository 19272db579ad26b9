"""The learning rate of each step of a round, and its factor for steps of other sizes."""

import math

import numpy as np

from tpaw_jax.config import RunConfig, TrainConfig, of_round


def of_steps(config: TrainConfig, round_number: int, steps: int) -> np.ndarray:
    """Compute the learning rate of every step of a round, [steps] float32.

    Warm-up takes ceil(warmup_ratio * steps) steps and ends at the peak. Then the rate decays towards 0, linearly or as
    a half cosine, or stays constant. These are the schedules of transformers, shifted by one step so that no step has
    rate 0.
    """
    peak, warmup = of_round(config.learning_rate, round_number), math.ceil(config.warmup_ratio * steps)
    step = np.arange(steps)
    done = (step - warmup) / max(1, steps - warmup)
    after = {"linear": 1 - done, "cosine": 0.5 * (1 + np.cos(np.pi * done)), "constant": np.ones(steps)}
    return (peak * np.where(step < warmup, (step + 1) / max(1, warmup), after[config.schedule])).astype(np.float32)


REFERENCE_BATCH = {"sft": 128}
"""Triplets per step that learning rates are meant for, by `objective.loss`; 64 for all others, as in SPIN."""


def scale(config: RunConfig, triplets_per_step: float) -> float:
    """The factor for a step of so many triplets: 1 unless `train.batch_triplets` is auto.

    It is the square root of the ratio of batch sizes for adaptive optimizers (Malladi et al. 2022, arXiv:2205.10287),
    and the ratio for sgd (Goyal et al. 2017, arXiv:1706.02677).
    """
    if config.train.batch_triplets != "auto":
        return 1.0
    ratio = triplets_per_step / REFERENCE_BATCH.get(config.objective.loss, 64)
    return ratio if config.train.optimizer == "sgd" else math.sqrt(ratio)
