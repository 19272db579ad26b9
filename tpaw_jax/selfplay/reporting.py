"""What a run says of its rounds: what each starts from and should take, its texts, its line of the table."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, PyTree

from tpaw_jax.config import of_round
from tpaw_jax.data import packing
from tpaw_jax.observe import health, monitoring
from tpaw_jax.runtime import processes
from tpaw_jax.selfplay import triplets
from tpaw_jax.selfplay.session import Session
from tpaw_jax.storage import files, journal
from tpaw_jax.training import cost, train_step


def rounds_table(directory: Path, rounds: int) -> list[dict[str, Any]]:
    """The table of the finished rounds."""
    files = [triplets.round_directory(directory, t) / "summary.json" for t in range(rounds)]
    return [json.loads(file.read_text()) for file in files if file.exists()]


def finish_round(
    session: Session,
    store: triplets.Store,
    rows: packing.Rows,
    players: list[int],
    scored: cost.Work,
    trained: dict[str, Any],
    watch: monitoring.Stopwatch,
    t: int,
) -> list[str]:
    """Write the round's line of the table and say it, with what the round computed and saved; also what went wrong."""
    trees, pairs = _round_work(session, store, players)
    computed, in_pairs = cost.flops(session.model, trees.total), cost.flops(session.model, pairs.total)
    done = cost.flops(session.model, scored + trees.training * trained["share"])  # by this process
    seconds = watch.seconds
    busy = seconds["scoring"] + seconds["training"]
    session.say(
        f"Measured: {done / 1e12:.3g} TFLOP in {busy:.3g} s of scoring and training, {done / busy / 1e9:.3g} GFLOP/s; "
        f"padded pairs with {len(players)} live references compute {in_pairs / computed:.1f} x as much."
    )
    mean, last = last_epoch(session, t)
    lengths, longest = [len(g) for g in store.generations[t].tokens], session.config.longest_response
    summary = {
        "round": t,
        "players": len(players),
        "triplets": int(rows.triplets.sum()),
        "steps": trained["steps"],
        "fill": rows.fill,
        "P_t at step 0": trained["noise"],
        "loss": mean("loss"),
        "chosen": mean("rewards/chosen"),
        "rejected": mean("rewards/rejected"),
        "margin": mean("rewards/margins"),
        "accuracy": mean("rewards/accuracies"),
        "alpha=eta": mean(f"player_{t}/alpha_is_eta"),
        "skipped": int(last["skipped"]),
        "response tokens": float(np.mean(lengths)),
        "at limit": float(np.mean(np.array(lengths) >= longest)),
        "echoes": store.copies_of_target(t),
        **_sampler_gap(store, t),
        "held-out before": trained["held-out before"],
        "held-out after": trained["held-out after"],
        **trained["evaluated"],
        "TFLOP": computed / 1e12,
        "TFLOP in pairs": in_pairs / 1e12,
        "saving": in_pairs / computed,
        "GFLOP/s": done / busy / 1e9,
        "goodput": watch.goodput,
        **{f"{stage} s": round(value, 2) for stage, value in seconds.items() if stage not in ("ring", "other")},
    }
    content = (json.dumps(summary, indent=2) + "\n").encode()
    journal.write(session.journal, f"{triplets.round_name(t)}/summary.json", "summary", t, content)
    session.say(monitoring.table([summary]) + "\n")
    wrong = health.warnings(summary, len(session.prompts), longest)
    for sentence in wrong:
        session.say(f"Warning: {sentence}")
    return wrong


def last_epoch(session: Session, t: int) -> tuple[Callable[[str], float], dict[str, float]]:
    """The mean of a metric over the triplets of a round's last epoch, and the last step's record."""
    processes.barrier("the round's steps are logged")
    records = [r for r in monitoring.read_metrics(session.directory, t) if "loss" in r]
    if not records:
        raise ValueError(f"{session.directory / 'metrics.jsonl'}: it has no step of round {t}, which was trained.")
    of_epoch = records[-max(1, len(records) // session.config.train.epochs) :]
    weights = [r["triplets"] for r in of_epoch]
    return lambda name: float(np.average([r[name] for r in of_epoch], weights=weights)), records[-1]


def evaluated(session: Session, policy: PyTree[Array], watch: monitoring.Stopwatch, when: str = "") -> dict[str, float]:
    """The share right of every task, by name; nothing where rounds are not evaluated."""
    if session.evaluator is None:
        return {}
    with watch.time("evaluation"):
        kept = "what the round has trained is kept"
        results = session.evaluator.results(
            policy, lambda requests, tokens: session.notice.check(f"Evaluation stopped; {kept}")
        )
    for result in results:
        session.say(str(result))
    return {f"eval/{result.name}{when}": result.accuracy for result in results}


def _sampler_gap(store: triplets.Store, t: int) -> dict[str, float | None]:
    """How far the sampler's and the scorer's log-probs of D_t are apart, nats a token: mean and largest of a response.

    They come from two programs, a cache and another batch; more than rounding between them means a fault in one.
    """
    generations, scores = store.generations[t], store.scores[t]
    gaps = [
        abs(float(scores[int(source)][i]) - float(log_probs.sum())) / len(log_probs)
        for i, (source, log_probs) in enumerate(zip(store.sources[t], generations.log_probs, strict=True))
        if not np.isnan(log_probs).any()
    ]
    return {"sampler gap": float(np.mean(gaps)) if gaps else None, "largest gap": max(gaps, default=None)}


def _round_work(session: Session, store: triplets.Store, players: list[int]) -> tuple[cost.RoundWork, cost.RoundWork]:
    return cost.round_work(session.prompts, store.generations, store.sources, players, session.config)


def expected_cost(session: Session, store: triplets.Store, players: list[int]) -> str:
    """A sentence: what scoring and training should compute, in trees and in padded pairs with live references."""
    trees, pairs = _round_work(session, store, players)
    tera = lambda work: f"{cost.flops(session.model, work) / 1e12:.3g}"
    return (
        f"Expected: {tera(trees.total)} TFLOP in trees ({tera(trees.scoring)} scoring, {tera(trees.training)} "
        f"training; {trees.total.tokens:.3g} token places); as padded pairs with {len(players)} live references "
        f"{tera(pairs.total)} TFLOP ({pairs.total.tokens:.3g} places), "
        f"{cost.flops(session.model, pairs.total) / cost.flops(session.model, trees.total):.1f} x as much."
    )


def space(session: Session) -> str:
    """A sentence where the disk may not hold what a round writes: its policy, its training states, old and new."""
    state = train_step.abstract_state(session.like, session.optimizer, session.mesh)
    size = lambda tree: sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))
    needed = size(session.like) + 2 * size(state) + 8 * session.config.sampling.max_new_tokens * len(session.prompts)
    free = shutil.disk_usage(session.directory).free
    if free >= needed:
        return ""
    return (
        f"Warning: {session.directory} has {free / 2**30:.3g} GiB of space left, and the round may write up to "
        f"{needed / 2**30:.3g} GiB. Where it runs out of space the run stops, and goes on when there is room."
    )


def manifest(session: Session, t: int, players: list[int]) -> str:
    """What a round starts from."""
    c, size, opponents = session.config, len(session.prompts), session.config.objective.opponents(t)
    place = c.policy.path if t == 0 else session.directory / "ring" / "policies" / f"{t:05d}"
    facts = {
        "policy from": f"theta_{t} = {place}",
        "players": ", ".join(f"theta_{j}" for j in players),
        "opponents": ", ".join(f"D_{j}" for j in opponents),
        "triplets": f"{size * len(opponents)} = {size} prompts x {len(opponents)} rounds",
        "learning rate": f"{of_round(c.train.learning_rate, t):g} ({c.train.optimizer}, {c.train.schedule})",
        "lam, eta, gamma": f"{of_round(c.objective.lam, t):g}, {c.objective.eta:g}, {c.objective.gamma:g}",
    }
    return monitoring.manifest(t, c.rounds, facts)


def save_texts(session: Session, store: triplets.Store, t: int) -> None:
    """The first prompts with their target and response as text, in samples.jsonl and shown."""
    decode = lambda tokens: session.template.tokenizer.decode(tokens, skip_special_tokens=True)
    chosen = range(min(session.config.sample_texts, len(session.prompts)))
    texts = [
        {
            "prompt": decode(session.prompts.prompt_tokens[i]),
            "target": decode(session.prompts.target_tokens[i]),
            "response": decode(store.generations[t].tokens[i]),
        }
        for i in chosen
    ]
    lines = "".join(json.dumps(text, ensure_ascii=False) + "\n" for text in texts)
    files.write_bytes(triplets.round_directory(session.directory, t) / "samples.jsonl", lines.encode())
    for text in texts:
        session.say("\n".join(f"  {name:<8}  {_short(value)}" for name, value in text.items()))


def _short(text: str, most: int = 160) -> str:
    line = " ".join(text.split())
    return line if len(line) <= most else line[: most - 1] + "…"
