"""Team-based self-play fine-tuning of language models (TPAW) in JAX.

The names in `__all__` are the public surface; each is imported from its module when it is first used. Inside the
package, folders import each other's modules. A folder imports only from those listed before it:

    objective    the paper's loss on one page       types       the pytrees of a round
    config/      every option of a run              runtime/    devices, processes, preemption
    storage/     files, journal, checkpoints        observe/    metrics, tables, traces, warnings
    data/        records to packed prefix trees     models/     the transformer and its checkpoints
    generation/  sampling                           training/   log-probs, scoring, the train step
    evaluation/  exact match, lm-eval               selfplay/   the loop over rounds
    report/      the HTML report                    planning/   memory and time on a TPU, predicted
    cli/         the commands                       demo/       the model and the data of `tpaw demo`

Start with `objective`, `types` and `selfplay/loop`.
"""

from importlib import import_module
from importlib.metadata import version
from typing import Any

_PUBLIC = {
    "config": ("ObjectiveConfig", "PackingConfig", "RunConfig", "SamplingConfig", "TrainConfig", "load"),
    "data.packing": ("Rows", "pack", "step_batch"),
    "data.prefix_trees": ("Tree", "Trees", "trees_of_window"),
    "generation.decoder": ("Decoder", "decoder_from_apply_fn", "decoder_of"),
    "generation.engine": ("generate",),
    "generation.slots": ("Sampler", "make_sampler"),
    "models": ("ModelConfig", "Transformer", "load_pretrained", "save_pretrained"),
    "objective": ("TeamLoss", "dpo_loss", "spin_loss", "team_loss"),
    "selfplay.loop": ("play",),
    "training.logprobs": ("from_apply_fn", "make_log_prob_fn", "make_routed_log_prob_fn"),
    "training.scoring": ("make_scorer", "score"),
    "training.train_step": (
        "RouterLosses",
        "StepScalars",
        "by_triplet",
        "init_state",
        "make_optimizer",
        "make_step",
        "make_train_step",
    ),
    "types": ("Generations", "Prompts", "Ragged", "TeamScores", "TrainState", "TreeBatch"),
}
_MODULE_OF = {name: module for module, names in _PUBLIC.items() for name in names}

__all__ = sorted(_MODULE_OF)


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return version("tpaw_jax")
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'tpaw_jax' has no attribute {name!r}")
    value = getattr(import_module(f"tpaw_jax.{_MODULE_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
