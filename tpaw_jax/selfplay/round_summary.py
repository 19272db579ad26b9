"""What a run reports of a round: its inputs, its expected cost, sample texts, and its summary."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from tpaw_jax.config import of_round
from tpaw_jax.data.packing import Rows
from tpaw_jax.observe import health, metrics, tables, trackers
from tpaw_jax.runtime import processes
from tpaw_jax.selfplay import round_store
from tpaw_jax.selfplay.round_store import Store, round_directory, round_name
from tpaw_jax.selfplay.round_training import Trained
from tpaw_jax.selfplay.session import Round, Session
from tpaw_jax.storage import bucket, files, journal
from tpaw_jax.training import cost, train_step
from tpaw_jax.training.cost import RoundWork, Work


def read_all(directory: Path, rounds: int) -> list[dict[str, Any]]:
    """The summaries of the finished rounds."""
    paths = [round_directory(directory, t) / "summary.json" for t in range(rounds)]
    return [json.loads(path.read_text()) for path in paths if path.exists()]


def finish(
    this: Round, store: Store, rows: Rows, scored: Work, trained: Trained, evaluated: dict[str, float]
) -> list[str]:
    """Write and print the summary of a trained round. Returns the warnings of `health`."""
    session, t, seconds = this.session, this.number, this.watch.seconds
    with this.watch.time("other"):
        trees, pairs = _work(this, store)
        computed, in_pairs = cost.flops(session.model, trees.total), cost.flops(session.model, pairs.total)
        done = cost.flops(session.model, scored + trees.training * trained.share)
        busy = seconds["scoring"] + seconds["training"]
        session.say(
            f"Measured: {done / 1e12:.3g} TFLOP in {busy:.3g} s of scoring and training, {done / busy / 1e9:.3g} "
            f"GFLOP/s. Padded pairs with {_references(this)} in each step need "
            f"{in_pairs / computed:.1f} x as much."
        )
        summary = {
            "round": t,
            "players": len(this.players),
            "triplets": int(rows.triplets.sum()),
            "steps": trained.steps,
            "fill": rows.fill,
            "P_t at step 0": trained.noise,
            **_training_metrics(this),
            **_response_metrics(this, store),
            "held-out before": trained.held_out_before,
            "held-out after": trained.held_out_after,
            **evaluated,
            "TFLOP": computed / 1e12,
            "TFLOP in pairs": in_pairs / 1e12,
            "saving": in_pairs / computed,
            "GFLOP/s": done / busy / 1e9,
            **this.watch.shares(),
            **{f"{stage} s": round(value, 2) for stage, value in seconds.items() if stage != "other"},
        }
        write(session, summary)
        return warn(session, health.warnings(summary, len(session.prompts), session.config.longest_response))


def write(session: Session, summary: dict[str, Any]) -> None:
    """Write a round's `summary.json`, and print it as a table."""
    content = (json.dumps(summary, indent=2) + "\n").encode()
    journal.write(session.journal, f"{round_name(summary['round'])}/summary.json", "summary", summary["round"], content)
    steps = metrics.steps_before(session.directory, summary["round"] + 1)
    for tracker in session.trackers:
        tracker.log({**trackers.grouped(summary, "round"), "round/number": summary["round"]}, max(0, steps - 1))
    session.say(tables.round_table([summary], session.verbose) + "\n")


def warn(session: Session, warnings: list[str]) -> list[str]:
    """Print warnings, and return them."""
    for warning in warnings:
        session.say(f"Warning: {warning}")
    return warnings


def last_epoch(session: Session, t: int) -> tuple[Callable[[str], float], dict[str, float]]:
    """A function that averages a metric over the triplets of a round's last epoch, and the record of its last step."""
    processes.barrier("the round's steps are logged")
    records = [r for r in metrics.read_metrics(session.directory, t) if "loss" in r]
    if not records:
        raise ValueError(
            f"{session.directory / 'metrics.jsonl'}: round {t} was trained, but none of its steps is there."
        )
    epoch = records[-max(1, len(records) // session.config.train.epochs) :]
    weights = [r["triplets"] for r in epoch]
    return lambda name: float(np.average([r[name] for r in epoch], weights=weights)), records[-1]


def manifest(this: Round) -> str:
    """A round's inputs: policy, players, opponents, number of triplets, and hyper-parameters."""
    session, t = this.session, this.number
    c, size, opponents = session.config, len(session.prompts), session.config.objective.opponents(t)
    path = c.policy.path if t == 0 else session.directory / "ring" / "policies" / f"{t:05d}"
    facts = {
        "policy": f"theta_{t}, from {path}",
        "players": ", ".join(f"theta_{j}" for j in this.players),
        "opponents": ", ".join(f"D_{j}" for j in opponents),
        "triplets": f"{size * len(opponents)} = {size} prompts x {len(opponents)} rounds",
        "learning rate": f"{of_round(c.train.learning_rate, t):g} ({c.train.optimizer}, {c.train.schedule})",
        "lam, eta, gamma": f"{of_round(c.objective.lam, t):g}, {c.objective.eta:g}, {c.objective.gamma:g}",
    }
    return tables.named_values(f"Round {t} of {c.rounds} (0 to {c.rounds - 1})", facts)


def expected_cost(this: Round, store: Store) -> str:
    """A sentence: FLOPs of scoring and training, as packed trees and as padded pairs with references in each step."""
    trees, pairs = _work(this, store)
    tera = lambda work: f"{cost.flops(this.session.model, work) / 1e12:.3g}"
    ratio = cost.flops(this.session.model, pairs.total) / cost.flops(this.session.model, trees.total)
    return (
        f"Expected: {tera(trees.total)} TFLOP ({tera(trees.scoring)} scoring, {tera(trees.training)} training) over "
        f"{trees.total.tokens:.3g} tokens. Padded pairs with {_references(this)} in each step would "
        f"need {tera(pairs.total)} TFLOP over {pairs.total.tokens:.3g} tokens, {ratio:.1f} x as much."
    )


def disk_warning(session: Session) -> str:
    """A sentence if the disk may not hold what a round writes: its policy and two training states, old and new."""
    if bucket.is_remote(session.directory):
        return ""
    state = train_step.abstract_state(session.like, session.optimizer, session.mesh)
    size = lambda tree: sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))
    needed = size(session.like) + 2 * size(state) + 8 * session.config.sampling.max_new_tokens * len(session.prompts)
    free = shutil.disk_usage(session.directory).free
    if free >= needed:
        return ""
    return (
        f"Warning: {session.directory} has {free / 2**30:.3g} GiB of free space, and the round may write up to "
        f"{needed / 2**30:.3g} GiB. If the disk fills up, the run stops; free some space and run it again to resume."
    )


def save_texts(session: Session, store: Store, t: int) -> None:
    """Write the first prompts with target and response as text to `samples.jsonl`, and print them."""
    decode = lambda tokens: session.template.tokenizer.decode(tokens, skip_special_tokens=True)
    texts = [
        {
            "prompt": decode(session.prompts.prompt_tokens[i]),
            "target": decode(session.prompts.target_tokens[i]),
            "response": decode(store.generations[t].tokens[i]),
        }
        for i in range(min(session.config.sample_texts, len(session.prompts)))
    ]
    files.write_json_lines(round_directory(session.directory, t) / "samples.jsonl", texts)
    for text in texts:
        session.say("\n".join(f"  {name:<8}  {_shorten(value)}" for name, value in text.items()))


def _training_metrics(this: Round) -> dict[str, float]:
    """Means over the triplets of the last epoch."""
    mean, last = last_epoch(this.session, this.number)
    return {
        "loss": mean("loss"),
        "chosen": mean("rewards/chosen"),
        "rejected": mean("rewards/rejected"),
        "margin": mean("rewards/margins"),
        "accuracy": mean("rewards/accuracies"),
        "alpha=eta": mean(f"player_{this.number}/alpha_is_eta"),
        "skipped": int(last["skipped"]),
    }


def _response_metrics(this: Round, store: Store) -> dict[str, float | None]:
    """Lengths of D_t in tokens, copies of the target, and the mean and largest of `_sampler_gaps`."""
    t, session = this.number, this.session
    lengths, gaps = store.generations[t].tokens.lengths, _sampler_gaps(this, store)
    mean_and_largest = np.array([np.mean(gaps), max(gaps)] if gaps else [])
    gap = processes.all_gather(gap=mean_and_largest)[0]["gap"].tolist()  # not every process may have read them
    return {
        "response tokens": float(np.mean(lengths)),
        "at limit": float(np.mean(lengths >= session.config.longest_response)),
        "echoes": store.copies_of_target(t),
        "sampler gap": gap[0] if gap else None,
        "largest gap": gap[1] if gap else None,
    }


def _sampler_gaps(this: Round, store: Store) -> list[float]:
    """How far the sampler's log-probs of each response are from the scorer's, in nats per token.

    The two come from different programs and batches, one with a key-value cache. A gap beyond rounding means a bug in
    one of them. Responses without the sampler's log-probs are left out.
    """
    t, scores = this.number, store.scores[this.number]
    try:
        sampled = round_store.sampler_log_probs(store, t)
    except files.CorruptedFile as error:  # the round is trained, so the summary does without them
        this.session.say(
            f"Warning: {error} The next start renames it. The gap of the sampler's log-probs is not known."
        )
        return []
    return [
        abs(float(scores[int(source)][i]) - float(log_probs.sum())) / len(log_probs)
        for i, (source, log_probs) in enumerate(zip(store.sources[t], sampled, strict=True))
        if not np.isnan(log_probs).any()
    ]


def _work(this: Round, store: Store) -> tuple[RoundWork, RoundWork]:
    session = this.session
    return cost.round_work(session.prompts, store.generations, store.sources, this.players, session.config)


def _references(this: Round) -> str:
    count = len(this.players)
    return f"{count} reference model{'s' if count > 1 else ''}"


def _shorten(text: str, most: int = 160) -> str:
    line = " ".join(text.split())
    return line if len(line) <= most else line[: most - 1] + "…"
