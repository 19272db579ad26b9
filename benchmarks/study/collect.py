"""What the study found: a line of CSV a run and round, tables with intervals, the report's page and two of its plots.

    python benchmarks/study/collect.py runs/study --out benchmarks/results/study

An interval is Student's t over seeds, 95 %; a difference is paired by seed.
"""

import argparse
import csv
import json
import shutil
import statistics
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

import scipy.stats

from tpaw_jax.report import run_report

COLUMNS = {  # of a run's line of a round: what it is called here
    "eval/test": "test accuracy",
    "eval/validation": "validation accuracy",
    "chosen": "target reward",
    "rejected": "reward of responses",
    "margin": "margin",
    "alpha=eta": "share of alpha = eta",
    "beta_entropy": "beta entropy",
    "held-out after": "held-out log-prob",
    "response tokens": "response tokens of D_t",
    "echoes": "share of D_t equal to target",
}

PICTURES = ("rounds_eval_test.png", "rounds_chosen.png")
"""Plots of the report that are kept beside the tables."""

BASELINES = ("longer_sft", "spin")
OWN_RATE = ", own rate"
"""Of the name of an ablation at the best rate of its own search."""

Arms = dict[str, dict[int, list[dict[str, Any]]]]
"""The lines of an arm's runs, by arm and seed."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--out", type=Path, required=True, help="a directory")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    lines = rounds(options.directory)
    with (options.out / "study.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["arm", "seed", "rate", "round", *COLUMNS.values()])
        writer.writeheader()
        writer.writerows(lines)
    of = chosen(lines, options.directory)
    if not of:
        raise SystemExit(
            f"{options.directory}: the search of learning rates is not finished; there is study.csv alone."
        )
    parts = [search(options.directory), table(of), differences(of), by_round(of), gains(of), hours(options.directory)]
    (options.out / "study.md").write_text("\n".join(parts))
    print("\n".join(parts))
    write_report(of, options.directory, options.out)


def write_report(of: Arms, directory: Path, out: Path) -> None:
    """The page of the main arms, seeds as bands, and its plots of accuracy and target reward."""
    arms = [arm for arm in of if not arm.startswith(("n_max", "eta", "gamma", "longer_sft"))]
    run = lambda arm, seed, lines: directory / arm.removesuffix(OWN_RATE) / f"seed_{seed}_rate_{lines[0]['rate']}"
    places = [f"{arm}={run(arm, *of_seed)}" for arm in arms for of_seed in of[arm].items()]
    with tempfile.TemporaryDirectory() as pictures:
        page = out / "report.html"
        run_report.write(places, page, Path(pictures))
        page.write_text(page.read_text().replace(f"{directory.absolute()}/", ""))  # a page for other machines
        for name in PICTURES:
            shutil.copy(Path(pictures) / name, out / name)


def rounds(directory: Path) -> list[dict[str, Any]]:
    """A line of every round of every finished run; round 0 of self-play also has theta_0 as round -1."""
    found = []
    for done in sorted(directory.glob("*/seed_*/done")):
        run, arm = done.parent, done.parent.parent.name
        _, seed, of, value = run.name.split("_")
        log = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        for summary in sorted(run.glob("round_*/summary.json")):
            line = json.loads(summary.read_text())
            entropy = [
                step["beta_entropy"] for step in log if step["round"] == line["round"] and "beta_entropy" in step
            ]
            line["beta_entropy"] = statistics.mean(entropy) if entropy else None
            if "echoes" in line:
                prompts = json.loads((run / "round_0000" / "summary.json").read_text())["triplets"]  # a triplet each
                line["echoes"] /= prompts
            which = {"arm": arm, "seed": int(seed), "rate": value if of == "rate" else ""}
            if line["round"] == 0:
                before = {name: line[f"{name} before"] for name in ("eval/test", "eval/validation")}
                found.append({**which, "round": -1, **_renamed(before | {"held-out after": line["held-out before"]})})
            found.append({**which, "round": line["round"], **_renamed(line)})
    return found


def chosen(lines: list[dict[str, Any]], directory: Path) -> Arms:
    """By arm and seed, the rounds of the runs at the rate that the search has chosen: an arm's own, or TPAW's.

    An ablation with a search of its own is there at both.
    """
    rate_of = lambda arm: json.loads((directory / f"search_{arm}.json").read_text())["chosen"]
    searched = {path.stem.removeprefix("search_") for path in directory.glob("search_*.json")}
    found: Arms = defaultdict(dict)
    for line in (line for line in lines if line["arm"] != "sft"):
        arm, rate = line["arm"], float(line["rate"])
        if arm not in BASELINES and "tpaw" in searched and rate == rate_of("tpaw"):
            found[arm].setdefault(line["seed"], []).append(line)
        if arm in searched - {"tpaw"} and rate == rate_of(arm):
            name = arm if arm in BASELINES else arm + OWN_RATE
            found[name].setdefault(line["seed"], []).append(line)
    return found


def search(directory: Path) -> str:
    """The learning rates that were tried, with their validation accuracy after the last round."""
    rows = []
    for path in sorted(directory.glob("search_*.json")):
        found = json.loads(path.read_text())
        cells = [
            f"**{v:.3f}**" if float(rate) == found["chosen"] else f"{v:.3f}" for rate, v in found["validation"].items()
        ]
        rows.append([path.stem.removeprefix("search_"), *cells])
        head = ["validation accuracy by learning rate, seed 0", *found["validation"]]
    return _markdown(head, rows) if rows else ""


def table(of: Arms) -> str:
    """Every arm after its last round: means over seeds with intervals; what it gained is paired by seed."""
    names = ["test accuracy", "held-out log-prob", "target reward", "margin", "share of alpha = eta", "beta entropy"]
    names += ["response tokens of D_t", "share of D_t equal to target"]
    rows = []
    for arm, seeds in of.items():
        last = [of_seed[-1] for of_seed in seeds.values()]
        gained = _interval([of_seed[-1]["test accuracy"] - of_seed[0]["test accuracy"] for of_seed in seeds.values()])
        rows.append([arm, str(len(last)), gained, *(_interval([one.get(name) for one in last]) for name in names)])
    start = [of_seed[0] for of_seed in of.get("tpaw", {}).values()]
    rows.insert(0, ["theta_0", str(len(start)), "", _interval([one["test accuracy"] for one in start])])
    return _markdown(["arm, after the last round", "seeds", "gained over theta_0", *names], rows)


def differences(of: Arms) -> str:
    """TPAW's test accuracy less each other arm's and theta_0's, and the p-value of a paired t-test."""
    last = {arm: {seed: lines[-1]["test accuracy"] for seed, lines in seeds.items()} for arm, seeds in of.items()}
    tpaw = last.pop("tpaw", {})
    last = {"theta_0": {seed: lines[0]["test accuracy"] for seed, lines in of.get("tpaw", {}).items()}, **last}
    rows = []
    for arm, seeds in last.items():
        apart = [tpaw[seed] - seeds[seed] for seed in sorted(set(tpaw) & set(seeds))]
        if len(apart) > 1:
            p = scipy.stats.ttest_1samp(apart, 0).pvalue if len(set(apart)) > 1 else float("nan")
            rows.append([arm, str(len(apart)), _interval(apart), f"{p:.3f}"])
    return _markdown(["TPAW less", "seeds", "test accuracy", "p"], rows)


def gains(of: Arms) -> str:
    """What each round adds to the test accuracy: TPAW's first two are without some of their players."""
    rows = []
    for arm, seeds in of.items():
        trained = range(1, min(map(len, seeds.values())))
        value = lambda of_seed, t: of_seed[t]["test accuracy"]
        apart = [[value(x, t) - value(x, t - 1) for x in seeds.values()] for t in trained]
        if len(apart) > 1:
            rows.append([f"{arm}, {len(seeds)} seeds", *map(_interval, apart)])
    most = max(map(len, rows), default=1)
    return _markdown(["test accuracy gained in", *(f"round {t}" for t in range(most - 1))], rows)


def by_round(of: Arms) -> str:
    """Test accuracy and target reward of the arms round by round, means over seeds."""
    rows = []
    for arm, seeds in of.items():
        for name in ("test accuracy", "target reward"):
            every = sorted({line["round"] for of_seed in seeds.values() for line in of_seed})
            values = [
                [x[name] for s in seeds.values() for x in s if x["round"] == t and x.get(name) is not None]
                for t in every
            ]
            means = [f"{statistics.mean(v):.3f}" if v else "" for v in values]
            rows.append([f"{arm}, {len(seeds)} seeds: {name}", *means])
    most = max(map(len, rows), default=1)
    return _markdown(["by round", "theta_0", *(f"theta_{t}" for t in range(1, most - 1))], rows)


def hours(directory: Path) -> str:
    """How long all arms took together."""
    log = directory / "hours.jsonl"
    lines = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    spent = sum(line["seconds"] for line in lines) / 3600
    return f"{len({line['arm'] for line in lines})} runs in {spent:.2f} hours.\n"


def _renamed(line: dict[str, Any]) -> dict[str, Any]:
    return {called: line.get(name) for name, called in COLUMNS.items()}


def _interval(values: list[Any]) -> str:
    """Mean and half of the 95 % interval."""
    there = [value for value in values if value is not None]
    if not there:
        return ""
    if len(there) == 1:
        return f"{there[0]:.3f}"
    half = scipy.stats.t.ppf(0.975, len(there) - 1) * statistics.stdev(there) / len(there) ** 0.5
    return f"{statistics.mean(there):.3f} ± {half:.3f}"


def _markdown(head: list[str], rows: list[list[str]]) -> str:
    width = len(head)
    cells = [head, ["---"] * width, *([*row, *[""] * (width - len(row))] for row in rows)]
    return "\n".join("| " + " | ".join(row) + " |" for row in cells) + "\n"


if __name__ == "__main__":
    main()
