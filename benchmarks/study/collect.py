"""What the study found: one CSV line a run and round, tables with intervals, and the figures behind each question.

    python benchmarks/study/collect.py runs/study --out benchmarks/results/study

Accuracies are of the test split. An interval over seeds is Student's t of the runs; a difference is paired by seed.
"""

import argparse
import csv
import json
import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any

import scipy.stats

COLUMNS = {  # of a run's line of a round: what it is called here
    "eval/test": "test accuracy",
    "eval/validation": "validation accuracy",
    "chosen": "target reward",
    "rejected": "reward of responses",
    "margin": "margin",
    "alpha=eta": "share of alpha = eta",
    "beta_entropy": "beta entropy",
    "held-out after": "held-out log-prob",
    "response tokens": "response tokens",
    "echoes": "responses equal to target",
}

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
    parts = [search(options.directory), table(of), differences(of), by_round(of), hours(options.directory)]
    (options.out / "study.md").write_text("\n".join(parts))
    print("\n".join(parts))


def rounds(directory: Path) -> list[dict[str, Any]]:
    """A line of every round of every finished run; round 0 of self-play also has theta_0 as round -1."""
    found = []
    for done in sorted(directory.glob("*/seed_*/done")):
        run, arm = done.parent, done.parent.parent.name
        _, seed, _, rate = run.name.split("_")
        log = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        for summary in sorted(run.glob("round_*/summary.json")):
            line = json.loads(summary.read_text())
            entropy = [
                step["beta_entropy"] for step in log if step["round"] == line["round"] and "beta_entropy" in step
            ]
            line["beta_entropy"] = statistics.mean(entropy) if entropy else None
            which = {"arm": arm, "seed": int(seed), "rate": rate}
            if line["round"] == 0:
                before = {name: line[f"{name} before"] for name in ("eval/test", "eval/validation")}
                found.append({**which, "round": -1, **_renamed(before | {"held-out after": line["held-out before"]})})
            found.append({**which, "round": line["round"], **_renamed(line)})
    return found


def chosen(lines: list[dict[str, Any]], directory: Path) -> Arms:
    """By arm and seed, the rounds of the runs at the rate that the search has chosen: an arm's own, or TPAW's."""
    found: Arms = defaultdict(dict)
    for line in lines:
        searched = directory / f"search_{line['arm']}.json"
        searched = searched if searched.exists() else directory / "search_tpaw.json"
        if (
            line["arm"] != "sft"
            and searched.exists()
            and float(line["rate"]) == json.loads(searched.read_text())["chosen"]
        ):
            found[line["arm"]].setdefault(line["seed"], []).append(line)
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
    """Every arm after its last round: means over seeds with intervals."""
    names = ["test accuracy", "held-out log-prob", "target reward", "margin", "share of alpha = eta", "beta entropy"]
    names += ["response tokens", "responses equal to target"]
    rows = []
    for arm, seeds in of.items():
        last = [of_seed[-1] for of_seed in seeds.values()]
        rows.append([arm, str(len(last)), *(_interval([one.get(name) for one in last]) for name in names)])
    start = [of_seed[0] for of_seed in of.get("tpaw", {}).values()]
    rows.insert(0, ["theta_0", str(len(start)), _interval([one["test accuracy"] for one in start])])
    return _markdown(["arm, after the last round", "seeds", *names], rows)


def differences(of: Arms) -> str:
    """TPAW's test accuracy less each other arm's, paired by seed, and the p-value of a paired t-test."""
    rows = []
    for arm, seeds in of.items():
        both = sorted(set(seeds) & set(of.get("tpaw", {})))
        if arm == "tpaw" or len(both) < 2:
            continue
        last = lambda name, seed: of[name][seed][-1]["test accuracy"]
        apart = [last("tpaw", seed) - last(arm, seed) for seed in both]
        p = scipy.stats.ttest_1samp(apart, 0).pvalue if len(set(apart)) > 1 else float("nan")
        rows.append([arm, str(len(both)), _interval(apart), f"{p:.3f}"])
    return _markdown(["TPAW less", "seeds", "test accuracy", "p"], rows)


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
            rows.append([f"{arm}: {name}", *(f"{statistics.mean(v):.3f}" if v else "" for v in values)])
    most = max(map(len, rows), default=1)
    return _markdown(["by round", "theta_0", *(f"theta_{t}" for t in range(1, most - 1))], rows)


def hours(directory: Path) -> str:
    """How long all arms took together."""
    log = directory / "hours.jsonl"
    seconds = [json.loads(line)["seconds"] for line in log.read_text().splitlines()] if log.exists() else []
    return f"{len(seconds)} runs in {sum(seconds) / 3600:.2f} hours.\n"


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
