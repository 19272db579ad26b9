"""The readings of `tpaw bench` as a table, beside a plan's predictions, and against those of another run."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tpaw_jax.observe import tables
from tpaw_jax.storage import files

Record = Mapping[str, Any]
"""What `bench.measure` returns of a stage."""

RESAMPLES = 4000
"""Bootstrap samples of a ratio of medians."""

NOT_PRINTED = ("seconds", "settings", "generation")


def table(records: Sequence[Record]) -> str:
    """The settings that all readings share, and a column of figures for each stage."""
    settings = records[0]["settings"]
    versions = ", ".join(f"{name.removeprefix('the version of ')} {value}" for name, value in _versions(settings))
    lines = [f"  {name}: {value}" for name, value in settings.items() if name != "versions"]
    columns = [{k: v for k, v in record.items() if k not in NOT_PRINTED} for record in records]
    return "\n".join([*lines, f"  versions: {versions}", tables.table(columns)])


def predictions(plan: Path, devices: int) -> dict[str, float | None]:
    """The predicted seconds of each stage in a plan, `tpaw plan --json`.

    Raises:
        ValueError: the file is not a plan of one topology, or of another number of devices.
    """
    reports = files.parse_json(plan.read_bytes(), plan)
    if not isinstance(reports, list) or len(reports) != 1 or not {"stages", "devices"} <= reports[0].keys():
        raise ValueError(f"{plan}: expected the plan of one topology, as `tpaw plan --json` writes it.")
    if reports[0]["devices"] != devices:
        raise ValueError(f"{plan}: the plan is for {reports[0]['devices']} devices; there are {devices}.")
    return {name: stage.get("predicted s") for name, stage in reports[0]["stages"].items()}


def with_predictions(records: Sequence[Record], predicted: Mapping[str, float | None]) -> list[Record]:
    """The readings with the predicted seconds of their stages, and how many times as long they took."""
    beside: list[Record] = []
    for record in records:
        seconds = predicted.get(record["stage"])
        ratio = record["median s"] / seconds if seconds else None
        beside.append({**record, "predicted s": seconds, "measured / predicted": ratio})
    return beside


def calibration(path: Path, generation: str) -> dict[str, float]:
    """How many times as long as predicted each stage took, the median of its readings on chips of a generation.

    Raises:
        ValueError: the file has no such readings with predictions.
    """
    ratios: dict[str, list[float]] = {}
    for record in read(path):
        if record.get("generation") == generation and record.get("measured / predicted"):
            ratios.setdefault(record["stage"], []).append(record["measured / predicted"])
    if not ratios:
        raise ValueError(f"{path}: no readings on {generation} with predictions; make some with `tpaw bench --json F`.")
    return {stage: float(np.median(of_stage)) for stage, of_stage in ratios.items()}


def read(path: Path) -> list[Record]:
    """The readings of a file that `tpaw bench --json` wrote.

    Raises:
        ValueError: a line is no reading; names it.
    """
    records: list[Record] = []
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        record = files.parse_json(line, f"{path}, line {number}")
        if not isinstance(record, dict) or not {"stage", "seconds", "settings"} <= record.keys():
            raise ValueError(f"{path}, line {number}: expected a reading of `tpaw bench --json`.")
        records.append(record)
    if not records:
        raise ValueError(f"{path}: the file has no readings.")
    return records


def write(path: Path, records: Sequence[Record]) -> None:
    """Append the readings to a file, one JSON object per line."""
    with path.open("a") as file:
        file.writelines(json.dumps(record) + "\n" for record in records)


def comparison(before: Sequence[Record], after: Sequence[Record]) -> str:
    """How many times as fast `after` is, by stage, with a 95 % interval; then the settings that differ.

    Calls of the same stage are pooled. The interval is a bootstrap of the ratio of medians. It covers the spread from
    call to call, not a machine that is slower on another day.
    """
    rows = [["stage", "before, s", "after, s", "times as fast", "95 % interval", "verdict"]]
    stages = [s for s in dict.fromkeys(r["stage"] for r in before) if any(r["stage"] == s for r in after)]
    for stage in stages:
        a, b = (np.concatenate([r["seconds"] for r in records if r["stage"] == stage]) for records in (before, after))
        low, high = _interval(a, b)
        verdict = "faster" if low > 1 else "slower" if high < 1 else "no difference"
        medians = float(np.median(a)), float(np.median(b))
        ratio = medians[0] / medians[1]
        rows.append([stage, *(f"{m:.4g}" for m in medians), f"{ratio:.3f}", f"{low:.3f} to {high:.3f}", verdict])
    lines = [tables.aligned(rows)]
    old, new = (_flat(records[0]["settings"]) for records in (before, after))
    differ = [key for key in old | new if old.get(key) != new.get(key)]
    lines += [f"  {key}: {old.get(key)} before, {new.get(key)} after" for key in differ]
    return "\n".join(lines)


def _flat(settings: Record) -> dict[str, Any]:
    return {key: value for key, value in settings.items() if key != "versions"} | dict(settings["versions"])


def _interval(before: np.ndarray, after: np.ndarray) -> tuple[float, float]:
    rng = np.random.default_rng(0)
    resampled = lambda x: np.median(rng.choice(x, (RESAMPLES, len(x))), axis=1)
    low, high = np.percentile(resampled(before) / resampled(after), (2.5, 97.5))
    return float(low), float(high)


def _versions(settings: Record) -> list[tuple[str, str]]:
    return [(name, value) for name, value in settings["versions"].items() if "version" in name or name == "Python"]
