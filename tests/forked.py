"""Calls in new processes, forked from a server that has imported the modules: importing takes seconds."""

import functools
import multiprocessing
import os
import runpy
import sys
from multiprocessing import forkserver
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import jax

MODULES = (
    "forked",
    "killed_run",
    "killed_sampling",
    "pod_run",
    "torchless",
    "tpaw_jax.cli",
    "tpaw_jax.planning.planner",
)


class Child(NamedTuple):
    process: BaseProcess
    output: Path  # a file

    def finish(self, timeout: float = 400) -> tuple[int | None, str, str]:
        """(exit code, standard output, standard error) of the process; it is killed if it does not end in time."""
        self.process.join(timeout)
        self.process.kill()
        self.process.join()
        return self.process.exitcode, self.output.read_text(), _errors(self.output).read_text()


def start(function, *arguments, output: Path, environment: dict[str, str] | None = None, **config) -> Child:
    """Call a function in a new process, which exits with what it returns; it has one device unless `config` says more.

    Args:
        function: one of an importable module.
        output: the file of what it prints.
        environment: variables of its own.
        config: settings of JAX.
    """
    config = {"jax_num_cpu_devices": 1} | config
    process = _server().Process(target=_call, args=(function, arguments, output, environment or {}, config))
    process.start()
    return Child(process, output)


def run_script(script: Path, *arguments: str) -> None:
    """Run a Python script as a command does."""
    sys.argv = [str(script), *arguments]
    sys.path.insert(0, str(script.parent))
    runpy.run_path(str(script), run_name="__main__")


@functools.cache
def _server():
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(MODULES)
    here = Path(__file__).parent
    paths = [str(here / "without_torch"), str(here), *filter(None, [os.environ.get("PYTHONPATH")])]
    # With GLIBC_TUNABLES set, no process restarts for huge pages.
    with mock.patch.dict(os.environ, GLIBC_TUNABLES="", PYTHONPATH=os.pathsep.join(paths)):
        forkserver.ensure_running()
    return context


def _call(function, arguments, output, environment, config):
    os.environ.update(environment)
    for path, stream in ((output, sys.stdout), (_errors(output), sys.stderr)):
        with path.open("w") as file:
            os.dup2(file.fileno(), stream.fileno())
    for name, value in config.items():
        jax.config.update(name, value)
    sys.exit(function(*arguments))


def _errors(output):
    return output.with_name(output.name + ".errors")
