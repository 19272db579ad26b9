"""The study: SFT, longer SFT, SPIN, TPAW, its ablations and sweeps on worked additions, arm by arm, within a budget.

    python benchmarks/study/run.py runs/study --budget-hours 2

Started again it goes on with what is missing: every arm is a run of `tpaw`, which resumes by itself. What it trains
from is made first: a model from nothing for each seed, fine-tuned until its validation accuracy is between 40 and 80 %.
Then longer SFT, SPIN and TPAW get the same search of learning rates on the validation split with the first seed; the
ablations and sweeps take TPAW's. `collect.py` makes the table.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
SEEDS = 5
SWEEP_SEEDS = 3
BAND = (0.4, 0.8)
"""Validation accuracy at which fine-tuning from nothing stops: there is room both ways."""

EPOCHS = (2, 3, 4, 5, 6, 8, 10, 13, 16)
SFT_RATE = 1e-3
RATES = (1e-6, 3e-6, 1e-5, 3e-5, 1e-4)
"""Of the search that longer SFT, SPIN and TPAW get alike."""

MAIN: dict[str, dict[str, Any]] = {
    "tpaw": {},
    "spin": {"objective.n_max": 1, "objective.opponent_rounds": 2, "objective.eta": 1},
    "without_target_weighting": {"objective.eta": 1},
    "without_player_weighting": {"objective.gamma": 0},
    "without_team": {"objective.n_max": 1},
}
SWEEPS: dict[str, dict[str, Any]] = {
    "n_max_2": {"objective.n_max": 2},
    "n_max_4": {"objective.n_max": 4},
    "eta_2": {"objective.eta": 2},
    "eta_10": {"objective.eta": 10},
    "gamma_2": {"objective.gamma": 2},
}


class Arm(NamedTuple):
    """One run: where it lies under the study's directory, its command, and the settings that make it what it is."""

    place: str
    command: str  # play or sft
    settings: dict[str, Any]


class Study:
    """The runs of a directory, and what is done of them."""

    def __init__(self, directory: Path, seconds: float) -> None:
        self.directory, self.end = directory, time.monotonic() + seconds
        self.log = directory / "hours.jsonl"

    def run(self, arm: Arm) -> list[dict[str, Any]]:
        """The rounds' lines of an arm, run unless it is done; leaves when the budget is spent."""
        place = self.directory / arm.place
        rounds = int(arm.settings.get("rounds", 4))
        lines = [place / f"round_{t:04d}" / "summary.json" for t in range(rounds)]
        if not (place / "done").exists():
            if time.monotonic() > self.end:
                raise SystemExit(f"The budget is spent; {arm.place} is the next arm. The same command goes on there.")
            begun = time.monotonic()
            self.tpaw(arm.command, {**arm.settings, "directory": place})
            self.note(arm.place, time.monotonic() - begun)
            (place / "done").touch()
        return [json.loads(line.read_text()) for line in lines]

    def tpaw(self, command: str, settings: dict[str, Any]) -> None:
        """Run a command over the study's base."""
        overrides = [word for key, value in settings.items() for word in (f"--{key}", str(value))]
        cache = {"JAX_COMPILATION_CACHE_DIR": str(self.directory / "cache"), "JAX_PLATFORMS": "cpu"}
        done = subprocess.run(
            [sys.executable, "-m", "tpaw_jax.cli", command, "--config", str(HERE / "base.yaml"), *overrides],
            cwd=ROOT,
            env=os.environ | cache | {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.5"},
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise SystemExit(f"tpaw {command} {settings}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}")

    def note(self, what: str, seconds: float) -> None:
        """Keep how long something took."""
        with self.log.open("a") as file:
            file.write(json.dumps({"arm": what, "seconds": round(seconds, 1)}) + "\n")
        print(f"{what}: {seconds:.0f} s", flush=True)

    def tasks(self) -> str:
        """The two tasks, as the value of evaluation.tasks."""
        task = "{{name: {0}, path: {1}/{0}.jsonl, answer: '([0-9]+)$', response: '([0-9]+)$', max_new_tokens: 64}}"
        return f"[{', '.join(task.format(name, self.directory) for name in ('validation', 'test'))}]"

    def common(self, seed: int) -> dict[str, Any]:
        """Settings of all arms of a seed."""
        return {
            "seed": seed,
            "data.sources": f"[{{path: {self.directory}/train.jsonl}}]",
            "evaluation.tasks": self.tasks(),
            "evaluation.each_round": True,
        }

    def theta_0(self, seed: int) -> Path:
        """The fine-tuned model of a seed: of the fewest epochs whose validation accuracy is in the band."""
        chosen = self.directory / f"theta_0_{seed}.json"
        if not chosen.exists():
            for epochs in EPOCHS:
                settings = {
                    **self.common(seed),
                    "policy.path": self.directory / f"model_{seed}",
                    "data.max_prompts": 0,
                    "train.learning_rate": SFT_RATE,
                    "train.epochs": epochs,
                    "rounds": 1,
                }
                (line,) = self.run(Arm(f"sft/seed_{seed}_epochs_{epochs}", "sft", settings))
                if line["eval/validation"] >= BAND[0]:
                    break
            if not BAND[0] <= line["eval/validation"] <= BAND[1]:
                raise SystemExit(f"Seed {seed}: no number of epochs of {EPOCHS} ends between {BAND}.")
            chosen.write_text(json.dumps({"epochs": epochs, **line}))
        epochs = json.loads(chosen.read_text())["epochs"]
        out = self.directory / f"theta_0_{seed}"
        if not out.exists():
            run = str(self.directory / f"sft/seed_{seed}_epochs_{epochs}")
            subprocess.run(
                [sys.executable, "-m", "tpaw_jax.cli", "export", "--run", run, "--out", str(out)], check=True
            )
        return out

    def arm(self, name: str, seed: int, rate: float, changes: dict[str, Any]) -> list[dict[str, Any]]:
        """An arm of self-play, or longer SFT with as many visits of every target."""
        settings = {
            **self.common(seed),
            "policy.path": self.theta_0(seed),
            "train.learning_rate": rate,
            **changes,
        }
        if name == "longer_sft":
            return self.run(
                Arm(f"{name}/seed_{seed}_rate_{rate:g}", "sft", settings | {"rounds": 1, "train.epochs": 8})
            )
        return self.run(Arm(f"{name}/seed_{seed}_rate_{rate:g}", "play", settings))

    def rate_of(self, name: str, changes: dict[str, Any]) -> float:
        """The learning rate with the best validation accuracy after the last round, of the first seed."""
        found = {rate: self.arm(name, 0, rate, changes)[-1]["eval/validation"] for rate in RATES}
        best = max(found, key=lambda rate: found[rate])
        (self.directory / f"search_{name}.json").write_text(json.dumps({"validation": found, "chosen": best}))
        return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--budget-hours", type=float, default=2.0)
    options = parser.parse_args()
    directory = options.directory.absolute()
    if not (directory / f"model_{SEEDS - 1}" / "config.json").exists():  # the last that it writes
        subprocess.run([sys.executable, str(HERE / "prepare.py"), str(directory)], check=True)
    study = Study(directory, 3600 * options.budget_hours)
    study.theta_0(0)
    rates = {name: study.rate_of(name, MAIN.get(name, {})) for name in ("longer_sft", "spin", "tpaw")}
    for seed in range(SEEDS):
        study.arm("longer_sft", seed, rates["longer_sft"], {})
        for name, changes in MAIN.items():
            study.arm(name, seed, rates["spin" if name == "spin" else "tpaw"], changes)
    for seed in range(SWEEP_SEEDS):
        for name, changes in SWEEPS.items():
            study.arm(name, seed, rates["tpaw"], changes)
    print("All arms are done.")


if __name__ == "__main__":
    main()
