"""What do the step and the head need of a device's memory? JSON lines, from the compiled programs' own analysis.

    python benchmarks/memory.py --model smollm2 --row-length 2048 --budget-gib 4

The team step with three players against plain SFT of the same rows, made by the same step factory; the head alone,
chunked against full logits, at vocabularies of 49,152 and 151,936; and for each rematerialization policy the longest
row whose step fits a budget. Nothing is executed.
"""

import argparse

import common
import jax
import jax.numpy as jnp
import numpy as np

from tpaw_jax.config import MeshConfig, ObjectiveConfig, PackingConfig, TrainConfig
from tpaw_jax.data import packing
from tpaw_jax.models import Transformer
from tpaw_jax.models.attention import TILES
from tpaw_jax.runtime import sharding
from tpaw_jax.training import logprobs, memory, train_step
from tpaw_jax.training.train_step import StepScalars
from tpaw_jax.types import TeamScores

GIB = 2**30
MICRO_BATCHES = 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=common.MODELS, default="smollm2")
    parser.add_argument("--row-length", type=int, nargs="+", default=[1024, 2048])
    parser.add_argument("--policies", nargs="+", default=["none", "dots", "head", "layer"])
    parser.add_argument("--budget-gib", type=float, default=4.0)
    parser.add_argument("--longest", type=int, default=32768, help="the longest row that is tried")
    options = parser.parse_args()
    for length in options.row_length:
        for remat in options.policies:
            team, sft = (needed(options.model, length, remat, players=p) for p in (3, 0))
            common.emit(
                benchmark="memory_step",
                model=options.model,
                row_length=length,
                remat=remat,
                team_of_three_gib=team / GIB,
                sft_gib=sft / GIB,
                ratio=team / sft,
                machine=common.machine(),
            )
    for vocabulary, width in ((49152, 576), (151936, 1536)):
        head(vocabulary, width)
    for remat in options.policies:
        longest = longest_row(options, remat)
        common.emit(
            benchmark="memory_longest_row",
            model=options.model,
            remat=remat,
            budget_gib=options.budget_gib,
            row_length=longest,
            machine=common.machine(),
        )


def needed(name: str, row_length: int, remat: str, players: int) -> int:
    """Bytes of the step on rows of `row_length`: the team step of `players` players, or plain SFT for none."""
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    model = Transformer(common.MODELS[name], remat=remat, attention=TILES)
    log_prob_fn = logprobs.make_log_prob_fn(model, 256)
    optimizer = train_step.make_optimizer(TrainConfig())
    if players:
        step = train_step.make_train_step(log_prob_fn, optimizer, ObjectiveConfig(), mesh)
    else:
        step = train_step.make_step(sft_loss(log_prob_fn), optimizer, mesh)
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, 8), jnp.int32))["params"])
    place = lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)
    params = jax.tree.map(place, shapes, sharding.param_shardings(shapes, mesh))
    state = train_step.abstract_state(params, optimizer, mesh)
    rows = packing.pack([], PackingConfig(row_length=row_length))
    of_team = TeamScores(np.zeros((players, *rows.prompt_index.shape), np.float32), np.ones(players, bool))
    batch = packing.step_batch(rows, of_team, np.arange(0), 1, MICRO_BATCHES)
    zero = np.float32(0)
    return memory.needed_bytes(step.lower(state, *batch, StepScalars(zero, zero, zero, np.bool_(False))).compile())


def sft_loss(log_prob_fn: logprobs.LogProbFn) -> train_step.MicroLoss:
    """Negative log-prob of all responses of the rows."""

    def loss(params, batch, scores, total, scalars):
        value = -jnp.sum(log_prob_fn(params, batch)) / total
        return value, {"triplets": jnp.sum(batch.triplet_weight), "max": jnp.zeros(())}

    return loss


def head(vocabulary: int, width: int, predictions: int = 2048) -> None:
    """The log-probs of a row's predictions with their gradients: in chunks, and through full logits."""
    hidden = jax.ShapeDtypeStruct((1, predictions, width), jnp.float32)
    table = jax.ShapeDtypeStruct((vocabulary, width), jnp.float32)
    labels = jax.ShapeDtypeStruct((1, predictions), jnp.int32)
    live = jax.ShapeDtypeStruct((1, predictions), jnp.bool_)

    def full(hidden, table, labels, live):
        log_probs = jax.nn.log_softmax(jnp.einsum("bpd,vd->bpv", hidden, table))
        return jnp.where(live, jnp.take_along_axis(log_probs, labels[..., None], axis=-1)[..., 0], 0)

    chunked = lambda *arguments: logprobs.token_log_probs(*arguments, 256)
    of = lambda function: jax.jit(jax.grad(lambda *arguments: function(*arguments).sum(), argnums=(0, 1)))
    peaks = [memory.needed_bytes(of(f).lower(hidden, table, labels, live).compile()) for f in (chunked, full)]
    inputs_and_gradients = 2 * 4 * width * (vocabulary + predictions)
    common.emit(
        benchmark="memory_head",
        vocabulary=vocabulary,
        width=width,
        predictions=predictions,
        chunked_gib=peaks[0] / GIB,
        full_gib=peaks[1] / GIB,
        ratio=peaks[1] / peaks[0],
        chunked_beyond_inputs_and_gradients_gib=(peaks[0] - inputs_and_gradients) / GIB,
        full_beyond_inputs_and_gradients_gib=(peaks[1] - inputs_and_gradients) / GIB,
        machine=common.machine(),
    )


def longest_row(options: argparse.Namespace, remat: str) -> int:
    """The longest row, in multiples of 1024 tokens, whose step fits the budget; 0 if not even 1024 does."""
    low, high = 0, options.longest // 1024
    while low < high:
        middle = (low + high + 1) // 2
        fits = needed(options.model, 1024 * middle, remat, players=3) <= options.budget_gib * GIB
        low, high = (middle, high) if fits else (low, middle - 1)
    return 1024 * low


if __name__ == "__main__":
    main()
