"""Calls in new processes, forked from a server that has imported the modules: importing takes seconds."""

import functools
import multiprocessing
import os
import sys
from multiprocessing import forkserver
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import conftest
import jax

MODULES = ("killed_run", "killed_sampling", "pod_run")


class Child(NamedTuple):
    process: BaseProcess
    output: Path

    def finish(self, timeout: float = 400) -> tuple[int | None, str]:
        """(exit code, standard output and error) of the process; it is killed if it does not end in time."""
        self.process.join(timeout)
        self.process.kill()
        self.process.join()
        return self.process.exitcode, self.output.read_text()


def start(function, *arguments, output: Path, devices: int = 1) -> Child:
    """Call a function of one of MODULES in a new process with so many virtual devices."""
    process = _server().Process(target=_call, args=(function, arguments, output, devices))
    process.start()
    return Child(process, output)


@functools.cache
def _server():
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(MODULES)
    here = str(Path(__file__).parent)
    environment = conftest.child_environment()
    environment["PYTHONPATH"] = os.pathsep.join((environment["PYTHONPATH"], here))
    with mock.patch.dict(os.environ, environment):
        forkserver.ensure_running()
    return context


def _call(function, arguments, output, devices):
    with output.open("w") as file:
        os.dup2(file.fileno(), sys.stdout.fileno())
        os.dup2(file.fileno(), sys.stderr.fileno())
    jax.config.update("jax_num_cpu_devices", devices)
    function(*arguments)
