"""Does a pod whose processes are killed again and again, with its run in a bucket, end as one that is left alone?

    python benchmarks/killed_pod.py --kills 20

Two processes play three rounds of a small run (the embedded model) as `tpaw play` does on a pod. The run directory is
in a Cloud Storage server of the tests (tests/cloud_storage.py). One process, chosen at random, gets SIGKILL at a random
moment; when both have ended, the same commands go on. A run that finishes before the last kill is followed by another;
after the last kill, the run may finish. Compared are the checksums of all policies, scores and responses of every run
with those of an undisturbed one. One JSON line a kill, then a summary.
"""

import argparse
import contextlib
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import common
import faults

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests"))

import cloud_storage  # noqa: E402

from tpaw_jax.storage import bucket  # noqa: E402

TIMEOUT = 10
"""Seconds, the --host-timeout of the processes."""


class Pod:
    """Two processes that play."""

    def __init__(self, directory: Any, logs: Path, attempt: int) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        settings = [word for key, value in faults.SETTINGS.items() for word in (f"--{key}", str(value))]
        play = ["play", "--config", str(ROOT / "tpaw_jax" / "demo" / "demo.yaml"), "--directory", str(directory)]
        pod = ["--coordinator", f"127.0.0.1:{port}", "--num-processes", "2", "--host-timeout", str(TIMEOUT)]
        self.logs = [logs / f"{attempt}_{process}.log" for process in range(2)]
        self.processes = []
        for process, log in enumerate(self.logs):
            command = [sys.executable, "-m", "tpaw_jax.cli", *play, *pod, "--process-id", str(process), *settings]
            with log.open("wb") as output:
                self.processes.append(
                    subprocess.Popen(
                        [*command, "--mesh.fsdp", "-1", "--packing.rows_per_batch", "2"],
                        stdout=output,
                        stderr=subprocess.STDOUT,
                        cwd=ROOT,
                        env=os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONUNBUFFERED": "1"},
                    )
                )

    def await_round(self) -> bool:
        """Whether the pod began its first round before it ended."""
        while self.running():
            if "of 3 (0 to 2)" in self.logs[0].read_text():
                return True
            time.sleep(0.02)
        return False

    def running(self) -> bool:
        return all(process.poll() is None for process in self.processes)

    def kill(self, number: int) -> None:
        """SIGKILL to the process that works; its parent stays."""
        parent = self.processes[number].pid
        with contextlib.suppress(OSError):
            for child in Path(f"/proc/{parent}/task/{parent}/children").read_text().split():
                os.kill(int(child), signal.SIGKILL)

    def end(self) -> list[int]:
        """The exit codes of both processes."""
        return [process.wait(600) for process in self.processes]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--failing", type=float, default=0.0, help="share of the requests answered with status 503")
    options = parser.parse_args()
    rng, begun = random.Random(options.seed), time.perf_counter()
    server = cloud_storage.serve("--failing", str(options.failing))
    with tempfile.TemporaryDirectory() as folder, server as environment:
        os.environ.update(environment, JAX_COMPILATION_CACHE_DIR=f"{folder}/cache")
        os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
        whole, killed = (bucket.open_path(f"gs://{cloud_storage.BUCKET}/{name}") for name in ("whole", "killed_1"))
        pod = Pod(whole, Path(folder), 0)
        pod.await_round()
        playing = time.perf_counter()
        assert pod.end() == [0, 0], pod.logs[0].read_text()
        playing = time.perf_counter() - playing
        kills, attempt, runs, same = 0, 0, 1, True
        while kills < options.kills:
            attempt += 1
            pod = Pod(killed, Path(folder), attempt)
            moment, number = rng.uniform(0, playing / 3), rng.randrange(2)  # a third: the run must last for all kills
            if pod.await_round():
                time.sleep(moment)
            stage = faults.where(killed)
            hit = pod.running()
            pod.kill(number)
            since = time.perf_counter()
            codes = pod.end()
            said = [faults_line(log) for log in pod.logs]
            if hit and codes != [0, 0]:
                kills += 1
                seconds = time.perf_counter() - since
                record = {"number": kills, "process": number, "stage": stage, "seconds": seconds, "codes": codes}
                common.emit(benchmark="killed_pod", fault="kill", said=said, **record)
            elif codes == [0, 0]:
                same, runs = same and faults.results(killed) == faults.results(whole), runs + 1
                killed = bucket.open_path(f"gs://{cloud_storage.BUCKET}/killed_{runs}")
        ended = Pod(killed, Path(folder), attempt + 1)
        codes = ended.end()
        same = same and codes == [0, 0] and faults.results(killed) == faults.results(whole)
        facts = {
            "kills": kills,
            "runs": runs,
            "finished": codes == [0, 0],
            "same": same,
            "seconds": time.perf_counter() - begun,
        }
        common.emit(benchmark="killed_pod", failing=options.failing, **facts, **common.machine())


def faults_line(log: Path) -> str:
    """The last sentence of a log about its end."""
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.startswith("tpaw: ")]
    return lines[-1][:200] if lines else ""


if __name__ == "__main__":
    main()
