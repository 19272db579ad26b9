"""Team-based self-play fine-tuning of language models (TPAW) in JAX.

The names in `__all__` are the public surface; each is imported from its folder when it is first used. Read
`objective.py`, `types.py` and `selfplay/loop.py` to understand the package.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_PUBLIC = {
    "config": ("ObjectiveConfig", "PackingConfig", "RunConfig", "SamplingConfig", "TrainConfig", "load"),
    "data.packing": ("Rows", "Tree", "pack", "step_batch", "trees_of_window"),
    "generation.decoder": ("Decoder", "decoder_from_apply_fn", "decoder_of"),
    "generation.engine": ("generate",),
    "generation.slots": ("Sampler", "make_sampler"),
    "models": ("ModelConfig", "Transformer", "load_pretrained", "save_pretrained"),
    "objective": ("TeamLoss", "dpo_loss", "spin_loss", "team_loss"),
    "selfplay.loop": ("play",),
    "training.logprobs": ("from_apply_fn", "make_log_prob_fn"),
    "training.scoring": ("make_scorer", "score"),
    "training.train_step": (
        "StepScalars",
        "by_triplet",
        "init_state",
        "make_optimizer",
        "make_step",
        "make_train_step",
    ),
    "types": ("Generations", "Prompts", "TeamScores", "TrainState", "TreeBatch"),
}
_FOLDER_OF = {name: folder for folder, names in _PUBLIC.items() for name in names}

__all__ = sorted(_FOLDER_OF)


def __getattr__(name: str) -> Any:
    if name not in _FOLDER_OF:
        raise AttributeError(f"module 'tpaw_jax' has no attribute {name!r}")
    value = getattr(import_module(f"tpaw_jax.{_FOLDER_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
