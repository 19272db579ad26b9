"""Write the finished rounds of one or several runs as one self-contained HTML page, and optionally its plots as PNG.

Runs with the same given name, or whose configurations differ only in `IGNORED` keys such as the seed, form a group. A
curve is the mean of a group's runs, its band spans their minimum and maximum.
"""

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
from tpaw_jax.observe import metrics
from tpaw_jax.report import figures
from tpaw_jax.report.figures import Series
from tpaw_jax.report.page import PAGE
from tpaw_jax.selfplay import round_store
from tpaw_jax.storage import array_files, bucket, files, journal
from tpaw_jax.types import TARGET

IGNORED = {"directory", "seed", "sample_texts", "tensorboard", "report_to"}
"""Configuration keys in which the runs of a group may differ."""

STAGES = (
    *("startup", "sampling", "scoring", "training", "evaluation", "held-out", "dry run", "compiling", "packing"),
    *("input wait", "saving", "ring", "restoring", "lost steps", "other"),
)
"""The stages of a round in the order of the report; `ring` is `saving` in runs of version 0.1."""


@dataclasses.dataclass(frozen=True)
class RunRecord:
    """The files of a run directory that the report needs."""

    directory: Path
    name: str  # given on the command line; may be empty
    config: dict[str, Any]  # flat: by key
    settings: config.RunConfig
    summaries: list[dict[str, Any]]  # one per finished round
    steps: list[dict[str, Any]]  # the step records of metrics.jsonl
    samples: dict[int, list[dict[str, str]]]  # by round
    seconds: dict[int, dict[str, float]]  # by round and stage
    lengths: dict[int, np.ndarray]  # response lengths in tokens, by round
    margins: dict[int, np.ndarray]  # nats times lam, by round; see _margins

    @property
    def label(self) -> str:
        """The given name, if any, and the directory's name."""
        return f"{self.name}, {self.directory.name}" if self.name else self.directory.name


def read(run: str) -> RunRecord:
    """Read a run from 'DIRECTORY' or 'NAME=DIRECTORY'. Another process may be training it.

    Raises:
        FileNotFoundError: the directory does not contain a run.
    """
    name, equals, path = run.partition("=")
    if not equals or "://" in name or Path(run).is_dir():
        name, path = "", run
    directory = bucket.open_path(path)
    opened = journal.open_journal(directory, read_only=True)
    if not opened.config:
        raise FileNotFoundError(f"{directory}: this is not a run directory (journal.json is missing).")
    settings = config_file.parse(config.RunConfig, opened.config, str(directory))
    directories = {t: round_store.round_directory(directory, t) for t in range(settings.rounds)}
    rounds = {t: path for t, path in directories.items() if (path / "summary.json").exists()}
    lengths = {}
    for file in opened.names("sampling"):
        lengths[opened.facts[file]["round"]] = array_files.read(directory / file, "lengths")["lengths"]
    lines = lambda path: [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    load = lambda path: json.loads(path.read_text()) if path.exists() else {}
    return RunRecord(
        directory=directory,
        name=name,
        config=config_file.flat(config_file.to_dict(settings)),
        settings=settings,
        summaries=[load(path / "summary.json") for path in rounds.values()],
        steps=[r for t in rounds for r in metrics.read_metrics(directory, t) if "loss" in r],
        samples={t: lines(path / "samples.jsonl") for t, path in rounds.items()},
        seconds={t: load(path / "timings.json") for t, path in rounds.items()},
        lengths=lengths,
        margins=_margins(opened, settings),
    )


def _margins(opened: journal.Journal, settings: config.RunConfig) -> dict[int, np.ndarray]:
    """Reward margins of theta_(t+1) against theta_t on the new responses of D_t, for rounds with scores of both.

    Left out: responses that equal their target (margin 0), which have no scores of their own.
    """
    scores: dict[tuple[int, int], dict[int, float]] = {}  # (player, source) -> prompt -> log-prob in nats
    for name in opened.names("scoring"):
        arrays = array_files.read(opened.directory / name)
        player = int(name[-8:-4])
        for prompt, source, value in zip(arrays["prompt_index"], arrays["source"], arrays["log_probs"], strict=True):
            scores.setdefault((player, int(source)), {})[int(prompt)] = float(value)
    margins = {}
    for t in range(settings.rounds):
        needed = [scores.get((player, source), {}) for player in (t + 1, t) for source in (TARGET, t)]
        prompts = sorted(set.intersection(*(set(values) for values in needed)))
        if prompts:
            new_y, new_g, old_y, old_g = (np.array([values[i] for i in prompts]) for values in needed)
            margins[t] = of_round(settings.objective.lam, t) * ((new_y - old_y) - (new_g - old_g))
    return margins


def groups(runs: Sequence[RunRecord]) -> dict[str, list[RunRecord]]:
    """Group runs by given name or configuration.

    A group's name is the given name, or the configuration values in which the groups differ, or the directory's name.
    """
    by_config: dict[str, list[RunRecord]] = {}
    for run in runs:
        same = {key: value for key, value in run.config.items() if key not in IGNORED}
        by_config.setdefault(run.name or json.dumps(same, sort_keys=True, default=str), []).append(run)
    configs = [group[0].config for group in by_config.values()]
    differs = lambda key: key not in IGNORED and len({str(c.get(key)) for c in configs}) > 1
    keys = sorted({key for c in configs for key in c if differs(key)})
    named: dict[str, list[RunRecord]] = {}
    for group in by_config.values():
        values = ", ".join(f"{key.split('.')[-1]} {_plain(group[0].config.get(key))}" for key in keys)
        named[group[0].name or values or group[0].directory.name] = group
    return named


def write(directories: Sequence[str], out: Path, pictures: Path | None = None) -> int:
    """Write the page, and with `pictures` also each plot as a PNG into that directory. Returns the number of plots.

    Args:
        directories: the runs, each as for `read`.
        out: the HTML file.
        pictures: a directory, created if it is missing.

    Raises:
        FileNotFoundError: one of the directories does not contain a run.
        ValueError: none of the runs has finished a round.
    """
    runs = [read(directory) for directory in directories]
    if not any(run.summaries for run in runs):
        raise ValueError(f"{runs[0].directory}: no round is finished yet; there is nothing to report.")
    named, first = groups(runs), next(run for run in runs if run.summaries)
    plots = [*_round_plots(named), *_step_plots(named), *_run_plots(first)]
    if pictures is not None:
        pictures.mkdir(parents=True, exist_ok=True)
        for name, figure in plots:
            figures.png(figure, pictures / f"{name}.png")
    body = [
        f"<h1>{html.escape(', '.join(named))}</h1>",
        f"<p>{len(runs)} {'run' if len(runs) == 1 else 'runs'} in {len(named)} "
        f"{'group' if len(named) == 1 else 'groups'}. Curves are means over a group's runs; bands span the minimum "
        "and maximum.</p>",
        '<h2>Rounds</h2><div class="tables">',
        *(_table(name, run, run is runs[0] or len(runs) < 4) for name, group in named.items() for run in group),
        '</div><h2>Curves</h2><div class="plots">',
        *(f"<figure>{figures.svg(figure)}</figure>" for _, figure in plots),
        "</div>",
        *_samples(first),
        "<h2>Configuration</h2>",
        *(_configuration(run) for run in runs),
    ]
    files.write_bytes(out, PAGE.replace("<!-- body -->", "\n".join(body)).encode())
    return len(plots)


BEFORE = {"held-out after": "held-out before"}
"""Where round 0's summary has theta_0's value of a key; for other keys it is the key with ` before` appended."""

OF_RESPONSES = ("response tokens", "echoes")
"""Keys that describe D_t, sampled by theta_t; all others describe the trained theta_(t+1)."""


def _round_plots(named: dict[str, list[RunRecord]]) -> list[tuple[str, Any]]:
    """Plots of the groups' summaries over the number of trained rounds."""
    tasks = sorted({t.name for group in named.values() for t in group[0].settings.evaluation.tasks})
    wanted = [
        ("held-out after", "Held-out log-prob", "nats per token"),
        *((f"eval/{task}", f"{task}: exact match", "share correct") for task in tasks),
        ("margin", "Reward margin, last epoch", "nats times lam"),
        ("chosen", "Target reward, last epoch", "nats times lam"),
        ("rejected", "Response reward, last epoch", "nats times lam"),
        ("alpha=eta", "Targets upweighted, newest player", "share of triplets"),
        ("response tokens", "Mean response length", "tokens"),
        ("echoes", "Copies of the target", "responses"),
    ]

    def values(run: RunRecord, key: str) -> list[float]:
        row = [np.nan] * (run.settings.rounds + 1)
        for summary in run.summaries:
            trained = summary["round"] + (key not in OF_RESPONSES)
            row[trained] = _number(summary.get(key))
            if summary["round"] == 0 and key not in OF_RESPONSES:
                row[0] = _number(summary.get(BEFORE.get(key, f"{key} before")))
        return row

    return _plots("rounds", wanted, named, values, xlabel="rounds trained", marks=True)


def _step_plots(named: dict[str, list[RunRecord]]) -> list[tuple[str, Any]]:
    """Plots of the groups' step metrics over the optimizer steps of all rounds in sequence."""
    wanted = [
        ("loss", "Loss", "nats"),
        ("rewards/chosen", "Target reward", "nats times lam"),
        ("rewards/margins", "Reward margin", "nats times lam"),
        ("logps/chosen", "Log-prob of targets", "nats"),
        ("grad_norm", "Gradient norm", ""),
    ]
    values = lambda run, key: [_number(step.get(key)) for step in run.steps]
    return _plots("steps", wanted, named, values, xlabel="steps", marks=False)


def _plots(
    kind: str,
    wanted: Sequence[tuple[str, str, str]],
    named: dict[str, list[RunRecord]],
    values: Callable[[RunRecord, str], list[float]],
    *,
    xlabel: str,
    marks: bool,
) -> list[tuple[str, Any]]:
    """One plot (file name, figure) per wanted (key, title, unit), with one line and band per group.

    `values` gives a run's values of a key; keys that no run has are left out.
    """
    plots = []
    for key, title, unit in wanted:
        series = []
        for name, group in named.items():
            rows = [values(run, key) for run in group]
            longest = max(map(len, rows))
            padded = np.array([row + [np.nan] * (longest - len(row)) for row in rows])
            if not np.isnan(padded).all():  # without any value, all() is True as well
                series.append(Series(name, range(longest), padded))
        if series:
            file = re.sub(r"\W+", "_", f"{kind}_{key}")
            plots.append((file, figures.lines(title, xlabel, unit, series, marks)))
    return plots


def _run_plots(run: RunRecord) -> list[tuple[str, Any]]:
    """Plots of one run: its players, the distributions of margins and lengths, and the time per stage."""
    plots = [
        *_player_plot(run, "reward_target", "Target reward by player", "nats times lam"),
        *_player_plot(run, "beta", "Player weight", "beta"),
    ]
    if run.margins:
        labelled = {f"theta_{t + 1} on D_{t} ({len(values)} new)": values for t, values in run.margins.items()}
        figure = figures.histograms("Reward margins against the previous policy", "nats times lam", labelled)
        plots.append(("margins", figure))
    if run.lengths:
        labelled = {f"D_{t}": values for t, values in run.lengths.items()}
        plots.append(("lengths", figures.histograms("Response lengths", "tokens", labelled)))
    timed = {f"round {t}": seconds for t, seconds in run.seconds.items() if seconds}
    if timed:
        stages = [stage for stage in STAGES if any(stage in seconds for seconds in timed.values())]
        parts = {stage: [seconds.get(stage, 0.0) for seconds in timed.values()] for stage in stages}
        plots.append(("seconds", figures.stacked("Time per stage", "seconds", list(timed), parts)))
    return plots


def _player_plot(run: RunRecord, key: str, title: str, unit: str) -> list[tuple[str, Any]]:
    """A plot of one metric over the steps with one line per player; empty if no step has the metric."""
    players = sorted({name.split("/")[0] for step in run.steps for name in step if name.endswith(f"/{key}")})
    values = lambda player: np.array([[_number(step.get(f"{player}/{key}")) for step in run.steps]])
    series = [Series(f"theta_{p.split('_')[1]}", range(len(run.steps)), values(p)) for p in players]
    return [(f"players_{key}", figures.lines(title, "steps", unit, series))] if series else []


def _table(name: str, run: RunRecord, unfolded: bool) -> str:
    """A run's table of rounds as HTML: one column per round, one row per key of summary.json."""
    names = list(dict.fromkeys(key for summary in run.summaries for key in summary if key != "round"))
    cell = lambda value: "–" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
    head = "".join(f"<th>round {summary['round']}</th>" for summary in run.summaries)
    rows = [
        f"<tr><th>{html.escape(key)}</th>" + "".join(f"<td>{cell(s.get(key))}</td>" for s in run.summaries) + "</tr>"
        for key in names
    ]
    title = f"{name}, seed {run.settings.seed}" if name != run.directory.name else name
    table = f"<table><thead><tr><th></th>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"
    opening = f"<details{' open' if unfolded else ''}><summary>{html.escape(title)}</summary>"
    return f'{opening}<div class="wide">{table}</div></details>'


def _samples(run: RunRecord) -> list[str]:
    """Sample prompts as HTML, with the target and every round's response side by side."""
    count = min(map(len, run.samples.values()), default=0)
    if not count:
        return []
    card = lambda title, text: f"<div><h4>{html.escape(title)}</h4><p>{html.escape(text)}</p></div>"
    sections = [f"<h2>Sample responses</h2><p>Run: {html.escape(run.label)}.</p>"]
    for i in range(count):
        first = next(iter(run.samples.values()))[i]
        responses = [card(f"theta_{t}", samples[i]["response"]) for t, samples in run.samples.items()]
        sections.append(
            f'<section class="sample"><p class="prompt">{html.escape(first["prompt"])}</p><div class="answers">'
            f"{card('target', first['target'])}{''.join(responses)}</div></section>"
        )
    return sections


def _configuration(run: RunRecord) -> str:
    settings = html.escape(yaml.safe_dump(config_file.to_dict(run.settings), sort_keys=False))
    path = run.directory / "versions.json"
    versions = json.loads(path.read_text()) if path.exists() else {}
    listed = html.escape("\n".join(f"{name}: {version}" for name, version in versions.items()))
    return f"<details><summary>{html.escape(run.label)}</summary><pre>{settings}\n{listed}</pre></details>"


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) else float("nan")


def _plain(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
