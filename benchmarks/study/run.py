"""The study: SFT, longer SFT, SPIN, TPAW, its ablations and sweeps, arm by arm, within a budget.

    python benchmarks/study/run.py runs/study --budget-hours 2 --lanes 2
    python benchmarks/study/run.py runs/study_smollm2 --experiment chain_sum --model FILE.gguf

Started again it goes on with what is missing: every arm is a run of `tpaw`, which resumes by itself. What self-play
starts from comes first: for each seed a model fine-tuned until its validation accuracy is between 40 and 80 %. Then
SPIN, TPAW and, for the additions, longer SFT get the same search of learning rates on the validation split with the
first seed; ablations and sweeps take TPAW's, one ablation also the best of its own. `collect.py` makes the tables.
"""

import argparse
import itertools
import json
import os
import queue
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
BAND = (0.4, 0.8)
"""Validation accuracy of what self-play starts from: there is room both ways."""

TPAW: dict[str, Any] = {}
SPIN = {"objective.n_max": 1, "objective.opponent_rounds": 2, "objective.eta": 1}
ABLATIONS: dict[str, dict[str, Any]] = {
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


class Experiment(NamedTuple):
    """A model and its problems, and what is asked of them."""

    seeds: int
    epochs: tuple[int, ...]  # of fine-tuning: candidates, the middle one first
    sft_rate: float
    rates: tuple[float, ...]  # that longer SFT, SPIN and TPAW are given alike
    arms: dict[str, dict[str, Any]]
    sweeps: dict[str, dict[str, Any]]
    sweep_seeds: int
    baselines: tuple[str, ...]  # given the same search of learning rates as TPAW
    own_rate: tuple[str, ...]  # arms played at TPAW's rate that are also played at the best of a search of their own
    answer: str  # regular expression of a completion's answer
    response: str  # of a response's
    max_new_tokens: int


EXPERIMENTS = {
    "additions": Experiment(
        seeds=5,
        epochs=(2, 3, 4, 5, 6),
        sft_rate=1e-3,
        rates=(3e-7, 1e-6, 3e-6, 1e-5, 3e-5, 1e-4),
        arms={"tpaw": TPAW, "spin": SPIN, **ABLATIONS},
        sweeps=SWEEPS,
        sweep_seeds=2,
        baselines=("longer_sft", "spin"),
        own_rate=("without_target_weighting",),
        answer="([0-9]+)$",
        response="([0-9]+)$",
        max_new_tokens=64,
    ),
    "chain_sum": Experiment(
        seeds=3,
        epochs=(1, 2, 3),
        sft_rate=1e-4,
        rates=(5e-7, 3e-6, 2e-5),
        arms={"tpaw": TPAW, "spin": SPIN},
        sweeps={},
        sweep_seeds=0,
        baselines=("spin",),
        own_rate=(),
        answer="(-?[0-9]+)$",
        response="(-?[0-9]+)",
        max_new_tokens=8,
    ),
}


class Arm(NamedTuple):
    """One run: where it lies under the study's directory, its command, and the settings that make it what it is."""

    place: str
    command: str  # play or sft
    settings: dict[str, Any]


class Study:
    """The runs of a directory, and what is done of them."""

    def __init__(self, directory: Path, name: str, model: Path | None, seconds: float, lanes: int) -> None:
        self.directory, self.name, self.experiment, self.model = directory, name, EXPERIMENTS[name], model
        self.end = time.monotonic() + seconds
        self.lanes: queue.SimpleQueue[list[str]] = queue.SimpleQueue()
        for lane in range(lanes):
            cores = ",".join(map(str, range(lane, os.cpu_count() or 1, lanes)))
            self.lanes.put(["taskset", "--cpu-list", cores] if lanes > 1 else [])
        self.pool = ThreadPoolExecutor(lanes)

    def run(self, arm: Arm) -> list[dict[str, Any]]:
        """The rounds' lines of an arm, run unless it is done; leaves when the budget is spent."""
        place = self.directory / arm.place
        if not (place / "done").exists():
            if time.monotonic() > self.end:
                raise SystemExit(f"The budget is spent before {arm.place}. The same command goes on there.")
            begun = time.monotonic()
            try:
                self.tpaw(arm.command, {**arm.settings, "directory": place})
                (place / "done").touch()
            finally:
                self.note(arm.place, time.monotonic() - begun)
        return [json.loads(line.read_text()) for line in sorted(place.glob("round_*/summary.json"))]

    def tpaw(self, name: str, settings: dict[str, Any]) -> None:
        """Run a command over the experiment's base on the cores of a lane."""
        overrides = [word for key, value in settings.items() for word in (f"--{key}", str(value))]
        cache = {"JAX_COMPILATION_CACHE_DIR": str(self.directory / "cache"), "JAX_PLATFORMS": "cpu"}
        command = [sys.executable, "-m", "tpaw_jax.cli", name, "--config", str(HERE / f"{self.name}.yaml"), *overrides]
        lane = self.lanes.get()
        try:
            done = subprocess.run(
                [*lane, *command],
                cwd=ROOT,
                env=os.environ | cache | {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.5"},
                capture_output=True,
                text=True,
                check=False,
            )
        finally:
            self.lanes.put(lane)
        if done.returncode:
            raise SystemExit(f"tpaw {name} {settings}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}")

    def note(self, what: str, seconds: float) -> None:
        """Keep how long something took, to its end or until it was stopped."""
        with (self.directory / "hours.jsonl").open("a") as file:
            file.write(json.dumps({"arm": what, "seconds": round(seconds, 1)}) + "\n")
        print(f"{what}: {seconds:.0f} s", flush=True)

    def common(self, seed: int) -> dict[str, Any]:
        """Settings of all arms of a seed."""
        e = self.experiment
        task = lambda split: (
            f"{{name: {split}, path: {self.directory}/{split}.jsonl, answer: '{e.answer}', response: '{e.response}', "
            f"max_new_tokens: {e.max_new_tokens}}}"
        )
        return {
            "seed": seed,
            "data.sources": f"[{{path: {self.directory}/train.jsonl}}]",
            "evaluation.tasks": f"[{task('validation')}, {task('test')}]",
            "evaluation.each_round": True,
        }

    def theta_0(self, seed: int) -> Path:
        """The fine-tuned model of a seed: of the first number of epochs whose validation accuracy is in the band."""
        chosen, out = self.directory / f"theta_0_{seed}.json", self.directory / f"theta_0_{seed}"
        candidates, tried = self.experiment.epochs, {}
        at = len(candidates) // 2
        while not chosen.exists():
            settings = {
                **self.common(seed),
                "policy.path": self.model or self.directory / f"model_{seed}",
                "data.max_prompts": 0,
                "train.learning_rate": self.experiment.sft_rate,
                "train.epochs": candidates[at],
                "rounds": 1,
            }
            (line,) = self.run(Arm(f"sft/seed_{seed}_epochs_{candidates[at]}", "sft", settings))
            tried[candidates[at]] = line["eval/validation"]
            if BAND[0] <= line["eval/validation"] <= BAND[1]:
                chosen.write_text(json.dumps({"epochs": candidates[at], **line}))
            else:
                at += 1 if line["eval/validation"] < BAND[0] else -1
                if not 0 <= at < len(candidates) or candidates[at] in tried:
                    raise SystemExit(f"Seed {seed}: validation accuracy by epochs is {tried}, never between {BAND}.")
        if not out.exists():
            run = self.directory / f"sft/seed_{seed}_epochs_{json.loads(chosen.read_text())['epochs']}"
            command = [sys.executable, "-m", "tpaw_jax.cli", "export", "--run", str(run), "--out", str(out)]
            subprocess.run(command, check=True, cwd=ROOT, capture_output=True)
        return out

    def arm(self, name: str, seed: int, rate: float) -> list[dict[str, Any]]:
        """An arm of self-play, or longer SFT with as many passes over the prompts as four rounds of two epochs have."""
        settings = {**self.common(seed), "policy.path": self.theta_0(seed), "train.learning_rate": rate}
        command = "play"
        if name == "longer_sft":
            command, changes = "sft", {"train.epochs": 8, "rounds": 1}
        else:
            changes = {**self.experiment.arms, **self.experiment.sweeps}[name]
        return self.run(Arm(f"{name}/seed_{seed}_rate_{rate:g}", command, settings | changes))

    def search(self, names: tuple[str, ...]) -> dict[str, float]:
        """Of each arm the learning rate with the best validation accuracy after the last round, of the first seed."""
        every = list(itertools.product(names, self.experiment.rates))
        accuracy = lambda what: self.arm(what[0], 0, what[1])[-1]["eval/validation"]
        found = dict(zip(every, self.pool.map(accuracy, every), strict=True))
        best = {}
        for name in names:
            of_rate = {rate: found[name, rate] for rate in self.experiment.rates}
            best[name] = max(of_rate, key=lambda rate: of_rate[rate])
            record = {"validation": of_rate, "chosen": best[name]}
            (self.directory / f"search_{name}.json").write_text(json.dumps(record))
        return best

    def play(self) -> None:
        """Everything, in an order in which what is asked first is answered first."""
        e, seeds = self.experiment, range(self.experiment.seeds)
        fine_tuned = [self.pool.submit(self.theta_0, seed) for seed in seeds]
        fine_tuned[0].result()  # the search needs the first alone
        rates = self.search((*e.baselines, "tpaw"))
        of = lambda what: self.arm(what[0], what[1], rates.get(what[0], rates["tpaw"]))
        sweeps = [(name, seed) for seed in range(e.sweep_seeds) for name in e.sweeps]
        main = [(name, seed) for seed in seeds for name in dict.fromkeys((*e.baselines, *e.arms))]
        for one in fine_tuned:
            one.result()
        list(self.pool.map(of, main + sweeps))
        of_own = self.search(e.own_rate)
        own = lambda what: self.arm(what[0], what[1], of_own[what[0]])
        list(self.pool.map(own, [(name, seed) for seed in seeds for name in e.own_rate]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--experiment", choices=EXPERIMENTS, default="additions")
    parser.add_argument("--model", type=Path, default=None, help="of chain_sum: a directory or a .gguf file")
    parser.add_argument("--budget-hours", type=float, default=2.0, help="after which no other run begins")
    parser.add_argument("--lanes", type=int, default=1, help="runs at the same time, each on its share of the cores")
    options = parser.parse_args()
    if (options.experiment == "chain_sum") != (options.model is not None):
        parser.error("--model is needed for chain_sum, and for it alone")
    directory = options.directory.absolute()
    if not (directory / "prepared").exists():
        prepare = [sys.executable, str(HERE / "prepare.py"), str(directory), "--experiment", options.experiment]
        subprocess.run(prepare, check=True)
    model = options.model and options.model.absolute()
    Study(directory, options.experiment, model, 3600 * options.budget_hours, options.lanes).play()
    print("All arms are done.")


if __name__ == "__main__":
    main()
