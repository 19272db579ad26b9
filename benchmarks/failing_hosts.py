"""What do all hosts of a pod do when one fails: how long until every process has ended, and what do the logs say?

    python benchmarks/failing_hosts.py --timeout 10

Two processes play the demo as `tpaw demo` does on a pod. Each case makes one of them fail, and gives the seconds until
both have ended, their exit codes, and the last line of each log. One JSON line a case.
"""

import argparse
import errno
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import common

FAULT = "TPAW_FAULT"
"""Environment variable: the fault of this process, see `FAULTS`."""


class Case(NamedTuple):
    """A way to fail, and the process that does."""

    fault: str  # one of `FAULTS`, or the name of a signal
    process: int


CASES = [
    *(Case(fault, process) for fault in ("sampling", "scoring", "reading", "disk") for process in (1, 0)),
    Case("not finite", 1),
    *(Case(name, process) for name in ("SIGKILL", "SIGSTOP") for process in (1, 0)),
]


def main() -> None:
    if FAULT in os.environ:
        run_command()
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--timeout", type=float, default=10, help="--host-timeout of the processes")
    parser.add_argument("--case", nargs="+", help="only cases of these faults, or of FAULT:PROCESS")
    parser.add_argument("--restarts", type=int, default=0, help="--max-restarts; the run must then finish")
    options = parser.parse_args()
    for case in CASES:
        if not options.case or {case.fault, f"{case.fault}:{case.process}"} & set(options.case):
            common.emit(benchmark="failing_hosts", timeout=options.timeout, **measure(case, options))


def measure(case: Case, options: argparse.Namespace) -> dict[str, Any]:
    """Play until the fault and to the end of both processes."""
    with tempfile.TemporaryDirectory() as folder, socket.socket() as free:
        directory = Path(folder)
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        logs = [directory / f"{p}.log" for p in range(2)]
        running = [start(p, case, port, directory, logs[p], options) for p in range(2)]
        failed = await_fault(case, directory, running)
        codes: list[int | None] = [None, None]
        ended = [0.0, 0.0]
        while None in codes and time.time() - failed < 300:
            for p, process in enumerate(running):
                if codes[p] is None and process.poll() is not None:
                    codes[p], ended[p] = process.returncode, time.time()
            time.sleep(0.05)
        for process in running:
            process.kill()
        said = [sentences(log) for log in logs]
        finished = len(list(directory.glob("run/round_*/summary.json")))
    seconds = max(ended) - failed if None not in codes else None
    return {
        "fault": case.fault,
        "process": case.process,
        "seconds": seconds,
        "codes": codes,
        "rounds": finished,
        "said": said,
    }


def start(process: int, case: Case, port: int, directory: Path, log: Path, options: argparse.Namespace) -> Any:
    """One process, as a user starts it."""
    command = [sys.executable, __file__, "demo", "--coordinator", f"127.0.0.1:{port}", "--num-processes", "2"]
    command += ["--process-id", str(process), "--host-timeout", str(options.timeout)]
    command += ["--max-restarts", str(options.restarts), "--directory", str(directory / "run"), "--mesh.fsdp", "-1"]
    command += ["--train.max_skipped_in_a_row", "3"]
    fault = f"{case.fault}:{directory / 'failed'}" if process == case.process else "none:"
    environment = {**os.environ, FAULT: fault, "JAX_PLATFORMS": "cpu"}
    with log.open("wb") as output:
        return subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT)


def await_fault(case: Case, directory: Path, running: list[Any]) -> float:
    """Wait until the process has failed, or until it trains, and send it the signal. Returns the time of the fault."""
    metrics, marker = directory / "run" / "metrics.jsonl", directory / "failed"
    while all(process.poll() is None for process in running):
        if marker.exists():
            return marker.stat().st_mtime
        if case.fault.startswith("SIG") and metrics.exists() and metrics.read_text().count('"step"') > 5:
            (child,) = children(running[case.process].pid)
            os.kill(child, getattr(signal, case.fault))
            return time.time()
        time.sleep(0.02)
    return marker.stat().st_mtime if marker.exists() else time.time()


def children(pid: int) -> list[int]:
    """The children of a process."""
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def sentences(log: Path) -> list[str]:
    """What `tpaw` said of the end, without what it printed while it ran."""
    lines = log.read_text(errors="replace").splitlines()
    return [line for line in lines if line.startswith("tpaw: ")] or list(filter(None, lines))[-1:]


def run_command() -> None:
    """Run `tpaw` with the arguments of this process, with its fault built in."""
    from tpaw_jax import cli
    from tpaw_jax.runtime import supervisor

    fault, _, marker = os.environ[FAULT].partition(":")
    if supervisor.STATUS in os.environ and fault in FAULTS and not Path(marker).exists():
        FAULTS[fault](Path(marker))
    sys.exit(cli.main())


def fails(module: Any, name: str, marker: Path, error: Exception, calls: int = 1) -> None:
    """Make a function raise at its call number `calls`."""
    function, left = getattr(module, name), calls

    def failing(*arguments: Any, **more: Any) -> Any:
        nonlocal left
        left -= 1
        if left == 0:
            marker.touch()
            raise error
        return function(*arguments, **more)

    setattr(module, name, failing)


def while_sampling(marker: Path) -> None:
    """An exception that nothing expects, in the middle of sampling."""
    from tpaw_jax.generation import generation_file

    fails(generation_file, "append", marker, RuntimeError("injected while sampling"))


def while_scoring(marker: Path) -> None:
    """An exception that nothing expects, before the second player scores."""
    from tpaw_jax.selfplay import stages

    fails(stages, "_score_rows", marker, RuntimeError("injected while scoring"), 2)


def while_reading(marker: Path) -> None:
    """A checkpoint that this host alone cannot read."""
    from tpaw_jax.storage import ring

    fails(ring, "restore_policy", marker, OSError(errno.EIO, "Input/output error", "ring/policies/00000"))


def disk_full(marker: Path) -> None:
    """A full disk, when the first responses are written."""
    from tpaw_jax.storage import files

    def full(path: Path, content: bytes) -> None:
        marker.touch()
        with files.explain_errors(path):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    files.append = full


def not_finite(marker: Path) -> None:
    """Scores of which a process has read wrong ones: all steps are not finite."""
    import numpy as np

    from tpaw_jax.selfplay import round_store

    scores = round_store.team_scores

    def poisoned(*arguments: Any) -> Any:
        marker.touch()
        found = scores(*arguments)
        return found.replace(log_probs=found.log_probs * np.float32(np.inf))

    round_store.team_scores = poisoned


FAULTS = {
    "none": lambda marker: None,
    "sampling": while_sampling,
    "scoring": while_scoring,
    "reading": while_reading,
    "disk": disk_full,
    "not finite": not_finite,
}


if __name__ == "__main__":
    main()
