"""Finished rounds of one run or several -> one HTML page that needs nothing else, and its plots as pictures.

Runs of one name, or that differ in nothing but directory and seed, are one group: curves are their mean, bands their
least and most.
"""

from __future__ import annotations

import dataclasses
import html
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from tpaw_jax import config
from tpaw_jax.config import config_file, of_round
from tpaw_jax.observe import monitoring
from tpaw_jax.report import figures
from tpaw_jax.report.figures import Series
from tpaw_jax.report.page import PAGE
from tpaw_jax.selfplay import triplets
from tpaw_jax.storage import files, journal
from tpaw_jax.types import TARGET

IGNORED = {"directory", "seed", "sample_texts", "tensorboard"}
"""Keys in which the runs of a group may differ."""

STAGES = ("sampling", "scoring", "training", "evaluation", "held-out", "dry run", "packing", "ring", "other")


@dataclasses.dataclass(frozen=True)
class RunRecord:
    """What a run has left on disk."""

    directory: Path
    name: str  # that it was given; may be empty
    config: dict[str, Any]  # by key, flat
    settings: config.RunConfig
    summaries: list[dict[str, Any]]  # one a finished round
    steps: list[dict[str, Any]]
    samples: dict[int, list[dict[str, str]]]  # by round
    seconds: dict[int, dict[str, float]]  # by round and stage
    lengths: dict[int, np.ndarray]  # of responses, tokens, by round
    margins: dict[int, np.ndarray]  # nats times lam, by round; see _margins

    @property
    def called(self) -> str:
        """Its directory's name, after the one that it was given."""
        return f"{self.name}, {self.directory.name}" if self.name else self.directory.name


def read(place: str) -> RunRecord:
    """A run as its directory tells it, DIRECTORY or NAME=DIRECTORY; another process may be playing it.

    Raises:
        FileNotFoundError: no run is there.
    """
    name, _, path = ("", "", place) if Path(place).is_dir() or "=" not in place else place.partition("=")
    directory = Path(path)
    opened = journal.open_journal(directory, reading=True)
    if not opened.config:
        raise FileNotFoundError(f"{directory}: no run is there (journal.json is missing).")
    settings = config_file.parse(config.RunConfig, opened.config, str(directory))
    every = {t: triplets.round_directory(directory, t) for t in range(settings.rounds)}
    rounds = {t: place for t, place in every.items() if (place / "summary.json").exists()}
    lengths = {}
    for file in opened.names("sampling"):
        lengths[opened.facts[file]["round"]] = files.read_arrays(directory / file)["lengths"]
    lines = lambda path: [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    whole = lambda path: json.loads(path.read_text()) if path.exists() else {}
    return RunRecord(
        directory=directory,
        name=name,
        config=config_file.flat(config_file.to_dict(settings)),
        settings=settings,
        summaries=[whole(place / "summary.json") for place in rounds.values()],
        steps=[r for t in rounds for r in monitoring.read_metrics(directory, t) if "loss" in r],
        samples={t: lines(place / "samples.jsonl") for t, place in rounds.items()},
        seconds={t: whole(place / "timings.json") for t, place in rounds.items()},
        lengths=lengths,
        margins=_margins(opened, settings),
    )


def _margins(opened: journal.Journal, settings: config.RunConfig) -> dict[int, np.ndarray]:
    """Of theta_(t+1) against theta_t on the responses that are new in D_t, where the scores of both are kept.

    A response that equals its target has a margin of 0 and no scores of its own.
    """
    found: dict[tuple[int, int], dict[int, float]] = {}  # (player, source): by prompt
    for name in opened.names("scoring"):
        arrays = files.read_arrays(opened.directory / name)
        player = int(name[-8:-4])
        for prompt, source, value in zip(arrays["prompt_index"], arrays["source"], arrays["log_probs"], strict=True):
            found.setdefault((player, int(source)), {})[int(prompt)] = float(value)
    margins = {}
    for t in range(settings.rounds):
        needed = [found.get((player, source), {}) for player in (t + 1, t) for source in (TARGET, t)]
        prompts = sorted(set.intersection(*(set(values) for values in needed)))
        if prompts:
            new_y, new_g, old_y, old_g = (np.array([values[i] for i in prompts]) for values in needed)
            margins[t] = of_round(settings.objective.lam, t) * ((new_y - old_y) - (new_g - old_g))
    return margins


def groups(runs: Sequence[RunRecord]) -> dict[str, list[RunRecord]]:
    """Runs by what they are called: the name given, the values in which groups differ, or the directory."""
    by_config: dict[str, list[RunRecord]] = {}
    for run in runs:
        same = {key: value for key, value in run.config.items() if key not in IGNORED}
        by_config.setdefault(run.name or json.dumps(same, sort_keys=True, default=str), []).append(run)
    apart = [group[0].config for group in by_config.values()]
    keys = sorted({k for one in apart for k in one if k not in IGNORED and len({str(o.get(k)) for o in apart}) > 1})
    named: dict[str, list[RunRecord]] = {}
    for group in by_config.values():
        values = ", ".join(f"{key.split('.')[-1]} {_plain(group[0].config.get(key))}" for key in keys)
        named[group[0].name or values or group[0].directory.name] = group
    return named


def write(places: Sequence[str], out: Path, pictures: Path | None = None) -> int:
    """Write the page of some runs, and with `pictures` each plot as PNG there; returns how many plots it has.

    Raises:
        FileNotFoundError: no run is in one of the directories.
        ValueError: none of them has finished a round.
    """
    runs = [read(place) for place in places]
    if not any(run.summaries for run in runs):
        raise ValueError(f"{runs[0].directory}: no round is finished yet; there is nothing to report.")
    named, shown = groups(runs), next(run for run in runs if run.summaries)
    plots = [*_of_rounds(named), *_of_steps(named), *_of_first(shown)]
    if pictures is not None:
        pictures.mkdir(parents=True, exist_ok=True)
        for name, figure in plots:
            figures.png(figure, pictures / f"{name}.png")
    body = [
        f"<h1>{html.escape(', '.join(named))}</h1>",
        f"<p>{len(runs)} {'run' if len(runs) == 1 else 'runs'} in {len(named)} "
        f"{'group' if len(named) == 1 else 'groups'}; bands reach from the least to the most of a group's runs.</p>",
        '<h2>Rounds</h2><div class="tables">',
        *(_table(name, run, run is runs[0] or len(runs) < 4) for name, group in named.items() for run in group),
        '</div><h2>Curves</h2><div class="plots">',
        *(f"<figure>{figures.svg(figure)}</figure>" for _, figure in plots),
        "</div>",
        *_samples(shown),
        "<h2>Configuration</h2>",
        *(_configuration(run) for run in runs),
    ]
    files.write_bytes(out, PAGE.replace("<!-- body -->", "\n".join(body)).encode())
    return len(plots)


BEFORE = {"held-out after": "held-out before"}
"""What a value of theta_(t+1) is called of theta_0; of tasks it is the name with ` before`."""

OF_RESPONSES = ("response tokens", "echoes")
"""Values of D_t, which theta_t has sampled."""


def _of_rounds(named: dict[str, list[RunRecord]]) -> list[tuple[str, Any]]:
    """Plots over rounds trained: what is in the summaries of every group."""
    tasks = sorted({t.name for group in named.values() for t in group[0].settings.evaluation.tasks})
    wanted = [
        ("held-out after", "Held-out targets", "nats a token"),
        *((f"eval/{task}", f"{task}: exact match", "share right") for task in tasks),
        ("margin", "Margin, last epoch", "nats times lam"),
        ("chosen", "Target reward, last epoch", "nats times lam"),
        ("rejected", "Reward of responses, last epoch", "nats times lam"),
        ("alpha=eta", "Targets weighted by eta, newest player", "share"),
        ("response tokens", "Mean response", "tokens"),
        ("echoes", "Responses equal to their target", "responses"),
    ]

    def values(run: RunRecord, key: str) -> list[float]:
        row = [np.nan] * (run.settings.rounds + 1)
        for summary in run.summaries:
            trained = summary["round"] + (key not in OF_RESPONSES)
            row[trained] = _number(summary.get(key))
            if summary["round"] == 0 and key not in OF_RESPONSES:
                row[0] = _number(summary.get(BEFORE.get(key, f"{key} before")))
        return row

    return _plots("rounds", wanted, named, values, "rounds trained", True)


def _of_steps(named: dict[str, list[RunRecord]]) -> list[tuple[str, Any]]:
    """Plots over all optimizer steps, one round after the other."""
    wanted = [
        ("loss", "Loss", "nats"),
        ("rewards/chosen", "Target reward", "nats times lam"),
        ("rewards/margins", "Margin", "nats times lam"),
        ("logps/chosen", "Log-prob of targets", "nats"),
        ("grad_norm", "Gradient norm", ""),
    ]
    values = lambda run, key: [_number(step.get(key)) for step in run.steps]
    return _plots("steps", wanted, named, values, "steps", False)


def _plots(
    kind: str,
    wanted: Sequence[tuple[str, str, str]],
    named: dict[str, list[RunRecord]],
    values: Callable[[RunRecord, str], list[float]],
    xlabel: str,
    marks: bool,
) -> list[tuple[str, Any]]:
    """A plot of each (key, title, unit) that any run has `values` of, a line with a band for each group."""
    plots = []
    for key, title, unit in wanted:
        series = []
        for name, group in named.items():
            rows = [values(run, key) for run in group]
            most = max(map(len, rows))
            together = np.array([row + [np.nan] * (most - len(row)) for row in rows])
            if not np.isnan(together).all():  # as it is of no values at all
                series.append(Series(name, range(most), together))
        if series:
            file = re.sub(r"\W+", "_", f"{kind}_{key}")
            plots.append((file, figures.lines(title, xlabel, unit, series, marks)))
    return plots


def _of_first(run: RunRecord) -> list[tuple[str, Any]]:
    """Plots of one run: its players, how margins and lengths are spread, where the time went."""
    plots = []
    for key, title, unit in (
        ("reward_target", "Target reward by player", "nats times lam"),
        ("beta", "Player weight", "beta"),
    ):
        players = sorted({name.split("/")[0] for step in run.steps for name in step if name.endswith(f"/{key}")})
        series = [
            Series(
                f"theta_{p.split('_')[1]}",
                range(len(run.steps)),
                np.array([[_number(s.get(f"{p}/{key}")) for s in run.steps]]),
            )
            for p in players
        ]
        if series:
            plots.append((f"players_{key}", figures.lines(title, "steps", unit, series)))
    if run.margins:
        of = {f"theta_{t + 1} on D_{t} ({len(values)} new)": values for t, values in run.margins.items()}
        plots.append(("margins", figures.histograms("Margins of new responses, last policy", "nats times lam", of)))
    if run.lengths:
        of = {f"D_{t}": values for t, values in run.lengths.items()}
        plots.append(("lengths", figures.histograms("Lengths of responses", "tokens", of)))
    timed = [(t, seconds) for t, seconds in run.seconds.items() if seconds]
    if timed:
        parts = {s: [seconds.get(s, 0.0) for _, seconds in timed] for s in STAGES if any(s in of for _, of in timed)}
        plots.append(
            ("seconds", figures.stacked("Where the time went", "seconds", [f"round {t}" for t, _ in timed], parts))
        )
    return plots


def _table(name: str, run: RunRecord, unfolded: bool) -> str:
    """The table of rounds of a run, one column a round."""
    names = list(dict.fromkeys(key for summary in run.summaries for key in summary if key != "round"))
    cell = lambda value: "–" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
    head = "".join(f"<th>round {summary['round']}</th>" for summary in run.summaries)
    rows = [
        f"<tr><th>{html.escape(key)}</th>" + "".join(f"<td>{cell(s.get(key))}</td>" for s in run.summaries) + "</tr>"
        for key in names
    ]
    title = f"{name}, seed {run.settings.seed}" if name != run.directory.name else name
    table = f"<table><thead><tr><th></th>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"
    begun = f"<details{' open' if unfolded else ''}><summary>{html.escape(title)}</summary>"
    return f'{begun}<div class="wide">{table}</div></details>'


def _samples(run: RunRecord) -> list[str]:
    """Prompts with their target and the answers of all rounds side by side."""
    count = min(map(len, run.samples.values()), default=0)
    if not count:
        return []
    card = lambda title, text: f"<div><h4>{html.escape(title)}</h4><p>{html.escape(text)}</p></div>"
    found = [f"<h2>Answers</h2><p>Of {html.escape(run.called)}.</p>"]
    for i in range(count):
        first = next(iter(run.samples.values()))[i]
        answers = [card(f"theta_{t}", of_round[i]["response"]) for t, of_round in run.samples.items()]
        found.append(
            f'<section class="sample"><p class="prompt">{html.escape(first["prompt"])}</p><div class="answers">'
            f"{card('target', first['target'])}{''.join(answers)}</div></section>"
        )
    return found


def _configuration(run: RunRecord) -> str:
    settings = html.escape(yaml.safe_dump(config_file.to_dict(run.settings), sort_keys=False))
    path = run.directory / "versions.json"
    versions = json.loads(path.read_text()) if path.exists() else {}
    stated = html.escape("\n".join(f"{name}: {version}" for name, version in versions.items()))
    return f"<details><summary>{html.escape(run.called)}</summary><pre>{settings}\n{stated}</pre></details>"


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) else float("nan")


def _plain(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
