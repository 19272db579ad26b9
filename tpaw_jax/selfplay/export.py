"""What others take from a run: a policy, for transformers and vLLM, and a round's triplets, for other trainers."""

import itertools
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from tpaw_jax import config, models
from tpaw_jax.config import config_file
from tpaw_jax.data import dataset, prefix_trees, templates
from tpaw_jax.data.prefix_trees import Trees
from tpaw_jax.generation.policy import load_parameters, lora_of, stop_tokens
from tpaw_jax.models import adapters, hub
from tpaw_jax.models.checkpoints import adapter_files
from tpaw_jax.runtime import sharding
from tpaw_jax.selfplay import round_store
from tpaw_jax.selfplay.round_store import Store
from tpaw_jax.selfplay.session import check_base
from tpaw_jax.storage import files, journal, ring
from tpaw_jax.storage.journal import Journal
from tpaw_jax.types import TARGET

TRIPLETS_AT_ONCE = 1000
"""Records that are in memory while they are written."""


def write(run: Path, round_number: int | None, out: Path, merge: bool = False) -> str:
    """Export the policy that starts `round_number`, by default the newest. Returns a sentence that says where it is.

    Adapters are written as a PEFT directory, or with `merge`, merged into the model that they belong to.

    Raises:
        FileNotFoundError: `run` holds no run.
        ValueError: the policy is not in the ring, or `out` holds something else.
    """
    opened, settings = _open(run)
    mesh = sharding.make_mesh(config.MeshConfig())  # any mesh can read what any other wrote
    policy = settings.policy
    architecture, lora = models.load_architecture(policy.path), lora_of(policy.lora, settings.rounds)
    if merge and not lora:
        raise ValueError(f"{run}: the run has no adapters, so there is nothing to merge; omit --merge.")
    kept = ring.open_ring(opened, settings.objective.n_max)
    wanted = ring.select_policy(kept, round_number)
    like, _ = adapters.parts(hub.abstract_params(architecture, jnp.dtype(policy.param_dtype), mesh, lora), lora)
    params = ring.restore_policy(kept, wanted, like)
    template = _template(settings)
    if template.chat is not None:
        template.tokenizer.chat_template = template.with_defaults()
    generation = hub.load_generation_config(policy.path)
    stops = stop_tokens(template, generation)
    generation["eos_token_id"] = stops if len(stops) > 1 else template.end_of_turn
    if lora and not merge:
        c = policy.lora
        of_adapters = adapter_files.Settings(c.rank, c.alpha, c.rslora, c.dora)
        if lora.rounds > 1:
            params, rank = adapters.first_rounds(params, max(wanted, 1), lora), max(wanted, 1) * c.rank
            of_adapters = adapter_files.Settings(rank, lora.scale * rank)
        adapter_files.save(out, architecture, params, of_adapters, policy.path, template.tokenizer)
        base = policy.path + (", rounded to 8 bits" if c.base_dtype == "int8" else "")
        return f"The adapters of round {wanted} are in {out}, a directory for PEFT. Their base is {base}."
    if lora:
        base = load_parameters(policy, mesh)[1]
        check_base(opened, (base,))
        params = adapters.merged(adapters.join(base, params), lora.scale)
        params = jax.tree.map(lambda p: p.astype(policy.param_dtype), params)
    models.save_pretrained(out, architecture, params, template.tokenizer, generation)
    return f"The policy of round {wanted} is in {out}, a directory for transformers and vLLM."


def write_triplets(run: Path, round_number: int | None, out: Path) -> str:
    """Write the triplets of D_O of a round, by default the newest that is scored, with the scores of its players.

    A record is a preference in TRL's format: `prompt`, `chosen` (the target), `rejected` (the response), as text and as
    `*_ids`, and `ref_chosen_logps`, `ref_rejected_logps` of the newest player, in nats. Beside these: `prompt_id`;
    `sampled_in`, the round that gave the response; `copies`, how often it counts; and of each of `players`, newest
    first, `chosen_logps` and `rejected_logps`.

    Args:
        run: a run directory.
        round_number: the round t.
        out: a .parquet file, or else the directory of a dataset of the `datasets` library.

    Raises:
        FileNotFoundError: `run` holds no run.
        ValueError: the round is not scored, the data are not those of the run, or `out` exists.
    """
    if out.exists():
        raise ValueError(f"{out} exists; choose another --out.")
    opened, settings = _open(run)
    template = _template(settings)
    prompts, _, report = dataset.load(settings.data, template, settings.seed)
    if report.fingerprint != opened.data_fingerprint:
        raise ValueError(f"{run}: the data files, the chat template or the tokenizer have changed since the run began.")
    store = round_store.open_store(opened, prompts)
    t, trees = _scored_round(settings, store, round_number)
    with files.explain_errors(out), tempfile.TemporaryDirectory(dir=_parent(out), prefix=".export_") as folder:
        file = Path(folder) / "triplets.parquet"
        count = _write_parquet(_triplets(store, trees, template, settings.objective.players(t)), file)
        (file if out.suffix == ".parquet" else _saved_dataset(file)).rename(out)
    players = len(settings.objective.players(t))
    return f"{count} triplets of round {t}, with the scores of {players} players, are in {out}."


def _open(run: Path) -> tuple[Journal, config.RunConfig]:
    opened = journal.open_journal(run, read_only=True)
    if not opened.config:
        raise FileNotFoundError(f"{run}: this is not a run directory; journal.json is missing.")
    return opened, config_file.parse(config.RunConfig, opened.config, str(run))


def _template(settings: config.RunConfig) -> templates.Template:
    return templates.make_template(hub.load_tokenizer(settings.policy.tokenizer or settings.policy.path), settings.data)


def _scored_round(settings: config.RunConfig, store: Store, wanted: int | None) -> tuple[int, Trees]:
    """The wanted round, or the newest, all of whose players have scored all of D_O; and D_O as trees."""
    objective = settings.objective
    for t in sorted(store.generations, reverse=True) if wanted is None else [wanted]:
        if not {t, *objective.opponents(t)} <= store.generations.keys():
            continue
        window = [store.generations[r] for r in objective.opponents(t)]
        trees = prefix_trees.trees_of_window(store.prompts, window, store.sources)
        if not any(len(round_store.missing(store, player, trees)) for player in objective.players(t)):
            return t, trees
    which = "no round is" if wanted is None else f"round {wanted} is not"
    raise ValueError(f"{store.journal.directory}: {which} sampled and scored by all its players.")


def _triplets(
    store: Store, trees: Trees, template: templates.Template, players: Sequence[int]
) -> Iterator[dict[str, Any]]:
    text = lambda ids: template.tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    for tree in trees:
        scores = {s: [float(store.scores[j][s][tree.prompt]) for j in players] for s in tree.sources}
        for target, generated, copies in tree.triplets:
            source, (chosen, rejected) = tree.sources[generated], (tree.responses[i] for i in (target, generated))
            yield {
                "prompt_id": int(store.prompts.ids[tree.prompt]),
                "prompt": text(tree.prompt_tokens),
                "chosen": text(chosen),
                "rejected": text(rejected),
                "prompt_ids": tree.prompt_tokens,
                "chosen_ids": chosen,
                "rejected_ids": rejected,
                "ref_chosen_logps": scores[TARGET][0],
                "ref_rejected_logps": scores[source][0],
                "sampled_in": source,
                "copies": copies,
                "players": players,
                "chosen_logps": scores[TARGET],
                "rejected_logps": scores[source],
            }


def _write_parquet(records: Iterator[dict[str, Any]], file: Path) -> int:
    import pyarrow as pa
    from pyarrow import parquet

    tokens, number, logps = pa.list_(pa.int32()), pa.int32(), pa.list_(pa.float32())
    types = dict.fromkeys(("prompt", "chosen", "rejected"), pa.string())
    types |= dict.fromkeys(("prompt_ids", "chosen_ids", "rejected_ids", "players"), tokens)
    types |= dict.fromkeys(("ref_chosen_logps", "ref_rejected_logps"), pa.float32())
    types |= dict.fromkeys(("prompt_id", "sampled_in", "copies"), number)
    schema, count = pa.schema(types | dict.fromkeys(("chosen_logps", "rejected_logps"), logps)), 0
    with parquet.ParquetWriter(file, schema) as writer:
        while some := list(itertools.islice(records, TRIPLETS_AT_ONCE)):
            writer.write_table(pa.Table.from_pylist(some, schema))
            count += len(some)
    return count


def _saved_dataset(file: Path) -> Path:
    """The dataset of a Parquet file, in a directory beside it."""
    import datasets

    directory = file.with_name("dataset")
    datasets.Dataset.from_parquet(str(file), cache_dir=str(file.with_name("cache"))).save_to_disk(str(directory))
    return directory


def _parent(out: Path) -> Path:
    out.parent.mkdir(parents=True, exist_ok=True)
    return out.parent
