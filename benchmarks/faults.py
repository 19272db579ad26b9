"""Does a run that is disturbed end as the undisturbed one? One JSON line a fault, then a summary of each kind.

    python benchmarks/faults.py --kills 100 --damages 30 --disk
    python benchmarks/faults.py --kills 100 --damages 30 --bucket

Plays a small run of three rounds (the embedded model) as `tpaw play` does. A kill is SIGKILL at a random moment of the
run, after which the same command goes on. A damage is done to a file of a run that was killed while it trained or
sampled; the next run must name the file. With `--disk` (Linux, as root) the run lies on a small file system in memory,
which is filled in each stage, is too small from the start, or can only be read, or the process may open few files; it
goes on when that is mended. With `--bucket` the run is in a bucket of tests/cloud_storage.py.

Compared are the checksums of all policies, scores and responses at the end. Redone work is what both processes spent on
rounds beyond the undisturbed one, which counts the loading of programs, and the optimizer steps they took beyond its.
"""

import argparse
import contextlib
import itertools
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import common

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests"))

import cloud_storage  # noqa: E402

from tpaw_jax.storage import bucket, journal  # noqa: E402

SETTINGS = {
    "data.max_prompts": 16,
    "data.holdout_prompts": 4,
    "data.max_prompt_length": 24,
    "data.max_length": 48,
    "sampling.max_new_tokens": 16,
    "sampling.slots": 8,
    "packing.row_length": 128,
    "train.batch_triplets": 8,
    "train.save_every_steps": 2,
    "sample_texts": 0,
}
KINDS = {
    "one bit flipped": lambda path: _with(
        path, lambda c: c[: len(c) // 2] + bytes([c[len(c) // 2] ^ 16]) + c[len(c) // 2 + 1 :]
    ),
    "cut in half": lambda path: _with(path, lambda c: c[: len(c) // 2]),
    "emptied": lambda path: path.write_bytes(b""),
    "removed": lambda path: path.unlink(),
}
BEING_SAMPLED = "round_0001/sampled_0000"
FILES = {  # of a run killed in training (round 2), but what is sampled in sampling
    "newest policy": "ring/policies/00002",
    "another player": "ring/policies/00001",
    "training state": "ring/training",
    "responses of this round": "round_0002/generations.npz",
    "responses of the round before": "round_0001/generations.npz",
    "scores": "round_0002/scores_of_player_0001.npz",
    "journal": "journal.json",
    "responses being sampled": BEING_SAMPLED,
}
STAGES = ("sampling", "scoring", "training", "pushing")
"""Of a run, in which the disk is filled."""

SHARES = (0.15, 0.45, 0.75)
"""Sizes of a file system that is too small from the start, as shares of what a whole run takes."""


class Ended(NamedTuple):
    """A process that has ended."""

    code: int
    text: str  # what it said
    seconds: float  # since it began
    playing: float  # since it said what its first round starts from


class Play:
    """A process that plays."""

    def __init__(self, directory: Path, open_files: int | None = None) -> None:
        settings = [word for key, value in SETTINGS.items() for word in (f"--{key}", str(value))]
        command = [
            sys.executable,
            "-m",
            "tpaw_jax.cli",
            "play",
            "--config",
            str(ROOT / "tpaw_jax" / "demo" / "demo.yaml"),
        ]
        descriptor, name = tempfile.mkstemp(suffix=".log", dir=tempfile.gettempdir())
        self.log = Path(name)
        self.begun = time.perf_counter()
        self.process = subprocess.Popen(
            [*command, "--directory", str(directory), *settings],
            stdout=descriptor,
            stderr=subprocess.STDOUT,
            cwd=ROOT,
            env=os.environ | {"GLIBC_TUNABLES": "", "JAX_PLATFORMS": "cpu", "PYTHONUNBUFFERED": "1"},
            preexec_fn=open_files and (lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (open_files, open_files))),
        )
        os.close(descriptor)
        self.first = 0.0

    def wait_until(self, there) -> bool:
        """Whether `there()` came true before the process ended."""
        while self.process.poll() is None:
            if not self.first and "of 3 (0 to 2)" in self.log.read_text():
                self.first = time.perf_counter()
            if there():
                return True
            time.sleep(0.005)
        return False

    def kill(self) -> Ended:
        self.process.send_signal(signal.SIGKILL)
        return self.end()

    def end(self) -> Ended:
        self.wait_until(lambda: False)
        code, now, text = self.process.wait(), time.perf_counter(), self.log.read_text()
        self.log.unlink()
        return Ended(code, text, now - self.begun, now - self.first if self.first else 0.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--damages", type=int, default=30)
    where_to = parser.add_mutually_exclusive_group()
    where_to.add_argument("--disk", action="store_true")
    where_to.add_argument("--bucket", action="store_true")
    parser.add_argument(
        "--lanes", type=int, default=1, help="runs that are killed at the same time; seconds are then theirs"
    )
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    os.environ["JAX_PLATFORMS"] = "cpu"
    with tempfile.TemporaryDirectory(prefix="faults-") as place, serving(options.bucket) as environment:
        os.environ.update(environment)
        os.environ["JAX_COMPILATION_CACHE_DIR"] = f"{place}/cache"
        os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
        of = lambda name: bucket.open_path(
            f"gs://{cloud_storage.BUCKET}/{name}" if options.bucket else f"{place}/{name}"
        )
        Play(of("first")).end()  # fills the compilation cache
        undisturbed = Play(of("whole")).end()
        assert undisturbed.code == 0, undisturbed.text
        emit(
            fault="none",
            playing=undisturbed.playing,
            seconds=undisturbed.seconds,
            **common.machine(),
        )
        with ThreadPoolExecutor(options.lanes) as lanes:
            longest = undisturbed.playing * options.lanes
            of_number = lambda n: kill(n, of, undisturbed, random.Random(options.seed * 1000 + n), longest)
            told(list(lanes.map(of_number, range(options.kills))))
        damages(options.damages, of, environment)
        if options.disk:
            full_disks(of)
            read_only(of)
            few_files(of)


def kill(number: int, of, undisturbed: Ended, rng: random.Random, longest: float) -> dict:
    """Kill a run at a random moment within so many seconds since its first round began, and bring it back.

    Where it had ended by then, another one is killed sooner.
    """
    directory = of(f"killed_{number}")
    while True:
        play, moment = Play(directory), rng.uniform(0, longest)
        play.wait_until(lambda: play.first)  # noqa: B023
        if play.wait_until(lambda: time.perf_counter() >= play.first + moment):  # noqa: B023
            break
        longest = min(longest, play.end().playing)
        remove(directory)
    killed, stage, steps = play.kill(), where(directory), steps_logged(directory)
    ended = Play(directory).end()
    record = {
        "number": number,
        "stage": stage,
        "killed": killed.code == -signal.SIGKILL,
        "finished": ended.code == 0,
        "same": ended.code == 0 and results(directory) == results(of("whole")),
        "seconds redone": max(0.0, killed.playing + ended.playing - undisturbed.playing),
        "steps redone": max(0, steps - goes_on_after(ended.text)) if stage == "training" else 0,
    }
    emit(fault="kill", **record)
    remove(directory)
    return record


def told(records: list[dict]) -> None:
    """The line of all kills."""
    stages = [r["stage"] for r in records if r["killed"]]
    if records:
        emit(
            fault="kill, all",
            kills=sum(r["killed"] for r in records),
            stages={name: stages.count(name) for name in sorted(set(stages))},
            finished=sum(r["finished"] for r in records),
            same=sum(r["same"] for r in records),
            seconds_redone=common.spread([r["seconds redone"] for r in records]),
            steps_redone=common.spread([float(r["steps redone"]) for r in records]),
        )


def damages(count: int, of, environment: dict[str, str]) -> None:
    """Damage a file of a killed run, each kind of file in each way, and bring it back."""
    sampling, training = Play(of("sampling")), Play(of("training"))
    assert sampling.wait_until(lambda: bytes_sampled(of("sampling")) > 2000), "was not seen sampling"
    sampling.kill()
    assert training.wait_until(lambda: saved_in_training(of("training"), round_number=2)), "was not seen training"
    training.kill()
    records = []
    every = [
        (*file, *kind)
        for file, kind in itertools.product(FILES.items(), KINDS.items())
        if "sampled" not in file[1] or kind[0] in ("one bit flipped", "cut in half")  # without blocks it is as unbegun
    ]
    for name, file, kind, damage in every[:count]:
        directory = of("damaged")
        copy(of("sampling" if "sampled" in file else "training"), directory, environment)
        found = sizes_below(directory)
        path = directory / max((name for name in found if name.startswith(file)), key=found.__getitem__)
        damage(path)
        ended = Play(directory).end()
        named = next((line for line in ended.text.splitlines() if file in line and line.startswith(str(directory))), "")
        record = {
            "file": name,
            "kind": kind,
            "found": bool(named),
            "finished": ended.code == 0,
            "same": ended.code == 0 and results(directory) == results(of("whole")),
            "said": named.replace(f"{directory}/", "")[:300],
        }
        records.append(record)
        emit(fault="damage", **record)
        remove(directory)
    if records:
        counts = {key: sum(r[key] for r in records) for key in ("found", "finished", "same")}
        emit(fault="damage, all", damages=len(records), **counts)


def full_disks(of) -> None:
    """Fill the disk in each stage, or have too little room from the start; then make room and play on."""
    whole = sum(p.stat().st_size for p in of("whole").rglob("*") if p.is_file())
    for stage, share in (*((stage, 8.0) for stage in STAGES), *((None, share) for share in SHARES)):
        directory = of("small")
        directory.mkdir()
        kib = int(share * whole / 1024)
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={kib}k", "tmpfs", str(directory)], check=True)
        try:
            play = Play(directory / "run")
            if stage is not None and play.wait_until(lambda: where(directory / "run") == stage):  # noqa: B023
                fill(directory / "ballast")
            full = play.end()
            stage = where(directory / "run")
            (directory / "ballast").unlink(missing_ok=True)
            subprocess.run(["mount", "-o", f"remount,size={8 * whole // 1024}k", str(directory)], check=True)
            mended("full disk", full, stage, directory / "run", of)
        finally:
            subprocess.run(["umount", str(directory)], check=True)
            directory.rmdir()


def read_only(of) -> None:
    """Go on with a run that was killed in training where the disk can only be read; then where it can be written."""
    directory = of("read_only")
    directory.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", str(directory)], check=True)
    try:
        play = Play(directory / "run")
        play.wait_until(lambda: where(directory / "run") == "training")
        play.kill()
        subprocess.run(["mount", "-o", "remount,ro", str(directory)], check=True)
        stopped, stage = Play(directory / "run").end(), where(directory / "run")
        subprocess.run(["mount", "-o", "remount,rw", str(directory)], check=True)
        mended("read-only disk", stopped, stage, directory / "run", of)
    finally:
        subprocess.run(["umount", str(directory)], check=True)
        directory.rmdir()


def few_files(of) -> None:
    """A process that may open so few files that it begins and cannot write its first checkpoint."""
    for number in (14, 16):
        directory = of(f"files_{number}")
        stopped = Play(directory, number).end()
        mended("too many open files", stopped, where(directory), directory, of)
        remove(directory)


def mended(fault: str, stopped: Ended, stage: str, directory: Path, of) -> None:
    """The line of a run that the system stopped, and its end once what stopped it is mended."""
    ended = Play(directory).end()
    emit(
        fault=fault,
        stage=stage,
        code=stopped.code,
        said=next((line for line in stopped.text.splitlines() if line.startswith("tpaw: ")), "").replace(
            str(directory), "…"
        ),
        finished=ended.code == 0,
        same=ended.code == 0 and results(directory) == results(of("whole")),
    )


def fill(path: Path) -> None:
    """Write until the disk is full."""
    with path.open("wb", buffering=0) as file:
        for block in (1 << 16, 1 << 12, 1):
            try:
                while True:
                    file.write(bytes(block))
            except OSError:
                continue


def results(directory: Path) -> dict[str, str]:
    """Checksums of policies, scores and responses, each checked against its file."""
    opened = journal.open_journal(directory, read_only=True)
    damaged = journal.check(opened)
    return {
        name: "damaged" if name in damaged else facts["same"] or facts["sha256"]
        for name, facts in opened.facts.items()
        if facts["stage"] in ("sampling", "scoring", "policy") and opened.is_complete(name)
    }


def saved_in_training(directory: Path, round_number: int) -> bool:
    """Whether the journal has a complete training state of a round."""
    try:
        opened = journal.open_journal(directory, read_only=True)
    except ValueError:
        return False
    return any(
        name.startswith(f"ring/training/{round_number:05d}_") for name in opened.facts if opened.is_complete(name)
    )


def where(directory: Path) -> str:
    """The stage that a run is in, by what is there."""
    try:
        opened = journal.open_journal(directory, read_only=True)
        names = [name for name in opened.facts if opened.is_complete(name)]
    except ValueError:
        names = []
    newest = max((int(n[-5:]) for n in names if n.startswith("ring/policies")), default=None)
    if newest is None:
        return "beginning"
    if f"round_{newest:04d}/generations.npz" not in names:
        return "sampling"
    scored = [n for n in names if n.startswith(f"round_{newest:04d}/scores")]
    if len(scored) < min(newest + 1, 3):
        return "scoring"
    return "pushing" if f"round_{newest:04d}/summary.json" in names else "training"


def steps_logged(directory: Path) -> int:
    """Steps of the newest round in the log."""
    log = directory / "metrics.jsonl"
    lines = log.read_text().splitlines() if log.exists() else []
    rounds = [line.split(",")[0] for line in lines]
    return rounds.count(rounds[-1]) if rounds else 0


def goes_on_after(text: str) -> int:
    """The step after which the first round that is resumed goes on."""
    told = text.split("training resumes after step ")
    return int(told[1].split(".")[0]) if len(told) > 1 else 0


def emit(**facts: Any) -> None:
    """Print a result; those of runs in a bucket are of another benchmark."""
    common.emit(benchmark="faults_bucket" if "STORAGE_EMULATOR_HOST" in os.environ else "faults", **facts)


def serving(in_bucket: bool) -> contextlib.AbstractContextManager[dict[str, str]]:
    return cloud_storage.serve() if in_bucket else contextlib.nullcontext({})


def remove(directory: Path) -> None:
    if bucket.is_remote(directory):
        bucket.remove_tree(directory)
    else:
        shutil.rmtree(directory)


def copy(source: Path, target: Path, environment: dict[str, str]) -> None:
    if bucket.is_remote(source):
        prefix = lambda path: f"{os.fspath(path).removeprefix('gs://').partition('/')[2]}/"
        cloud_storage.copy_all(environment, prefix(source), prefix(target))
    else:
        shutil.copytree(source, target)


def bytes_sampled(directory: Path) -> int:
    """Bytes of responses that are being sampled in round 1."""
    try:
        return sum(size for name, size in sizes_below(directory).items() if name.startswith(BEING_SAMPLED))
    except FileNotFoundError:  # removed meanwhile
        return 0


def sizes_below(directory: Path) -> dict[str, int]:
    if bucket.is_remote(directory):
        return bucket.sizes(directory)
    return {p.relative_to(directory).as_posix(): p.stat().st_size for p in directory.rglob("*") if p.is_file()}


def _with(path: Path, change) -> None:
    path.write_bytes(change(path.read_bytes()))


if __name__ == "__main__":
    main()
