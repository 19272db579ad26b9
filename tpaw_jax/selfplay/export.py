"""Exporting a policy of a run's ring to a directory that transformers and vLLM load."""

from pathlib import Path

import jax.numpy as jnp

from tpaw_jax import config, models
from tpaw_jax.config import config_file
from tpaw_jax.data import templates
from tpaw_jax.generation.policy import stop_tokens
from tpaw_jax.models import hub
from tpaw_jax.runtime import sharding
from tpaw_jax.storage import journal, ring


def write(run: Path, round_number: int | None, out: Path) -> str:
    """Export the policy that starts `round_number`, by default the newest. Returns a sentence that says where it is.

    Raises:
        FileNotFoundError: `run` holds no run.
        ValueError: the policy is not in the ring, or `out` holds something else.
    """
    opened = journal.open_journal(run, read_only=True)
    if not opened.config:
        raise FileNotFoundError(f"{run}: this is not a run directory; journal.json is missing.")
    settings = config_file.parse(config.RunConfig, opened.config, str(run))
    mesh = sharding.make_mesh(config.MeshConfig())  # any mesh can read what any other wrote
    policy = settings.policy
    architecture = models.load_architecture(policy.path)
    kept = ring.open_ring(opened, settings.objective.n_max)
    wanted = ring.select_policy(kept, round_number)
    params = ring.restore_policy(kept, wanted, hub.abstract_params(architecture, jnp.dtype(policy.param_dtype), mesh))
    template = templates.make_template(hub.load_tokenizer(policy.tokenizer or policy.path), settings.data)
    if template.chat is not None:
        template.tokenizer.chat_template = template.with_defaults()
    generation = hub.load_generation_config(policy.path)
    stops = stop_tokens(template, generation)
    generation["eos_token_id"] = stops if len(stops) > 1 else template.end_of_turn
    models.save_pretrained(out, architecture, params, template.tokenizer, generation)
    return f"The policy of round {wanted} is in {out}, a directory for transformers and vLLM."
