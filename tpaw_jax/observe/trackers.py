"""Experiment trackers: TensorBoard, Weights & Biases and trackio get the numbers of each step and of each round.

Steps are counted over all rounds. A tracker that fails does not stop the run: it says so once and gets nothing more.
"""

import importlib
import math
import os
import secrets
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, Protocol

from tpaw_jax.runtime import processes
from tpaw_jax.storage import bucket, files

PROJECT = "tpaw_jax"
"""The project of a run, unless the tracker's own environment variable names one."""

GROUPS = {
    **dict.fromkeys(("tokens_per_second", "triplets_per_second", "input_wait_share"), "throughput"),
    **dict.fromkeys(("fill", "TFLOP", "TFLOP in pairs", "saving", "GFLOP/s"), "throughput"),
    "response tokens": "generation",
    **dict.fromkeys(("held-out", "held-out before", "held-out after"), "eval"),
    "beta_entropy": "players",
    "goodput": "goodput",
}
"""The group of a metric whose name does not begin with one."""

NAMES = {
    "at limit": "generation/truncated responses",
    "echoes": "generation/copies of target",
    "sampler gap": "generation/sampler vs scorer, mean",
    "largest gap": "generation/sampler vs scorer, max",
    "alpha=eta": "rewards/target upweighted",
    "P_t at step 0": "rewards/scoring noise",
}
"""The names of a round's metrics that are abbreviated in its summary, as in the printed table."""

Log = Callable[[Mapping[str, float], int], None]
Close = Callable[[], None]


class Tracker(Protocol):
    """Gets the numbers of a run. Closing it twice does no harm."""

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Log the values of a step, which is counted over all rounds."""

    def close(self) -> None:
        """Write what is still buffered."""


class _Guarded:
    """A tracker whose failures are reported once and do not stop the run."""

    def __init__(self, name: str, log: Log, close: Close, say: Callable[[str], None]):
        self.name, self._log, self._close, self._say = name, log, close, say

    def log(self, values: Mapping[str, float], step: int) -> None:
        self._try(lambda: self._log(values, step))

    def close(self) -> None:
        self._try(self._close)
        self._log, self._close = _nothing, _nothing

    def _try(self, call: Callable[[], None]) -> None:
        try:
            call()
        except Exception as error:  # each tracker has its own types; none of them is worth a run
            self._say(f"Warning: {self.name} failed and gets nothing more ({type(error).__name__}: {error}).")
            self._log, self._close = _nothing, _nothing


def open_trackers(
    names: Collection[str], directory: Path, config: dict[str, Any], say: Callable[[str], None]
) -> tuple[Tracker, ...]:
    """Open the trackers of a run, new or resumed, in the main process.

    Args:
        names: some of tensorboard, wandb, trackio.
        directory: of the run; its name is the run's.
        config: the run's configuration, with a key for each option.
        say: receives the warning of a tracker that fails.

    Raises:
        ImportError: a tracker is not installed.
    """
    if not processes.is_main():
        return ()
    openers: dict[str, Callable[..., tuple[Log, Close]]] = {
        "tensorboard": _tensorboard,
        "wandb": _wandb,
        "trackio": _trackio,
    }
    modules = {name: _import(name) for name in openers if name in names}
    return tuple(_Guarded(name, *openers[name](module, directory, config), say) for name, module in modules.items())


def grouped(record: Mapping[str, Any], group: str = "train") -> dict[str, float]:
    """The numbers of a step's record or of a round's summary under the names of the trackers.

    Player theta_N's are `players/theta_N/...`. Names with a slash stay; others get their group of `GROUPS`, or `group`.
    Values that are missing or not finite are left out.
    """
    numbers = {}
    for name, value in record.items():
        if name in ("round", "step") or not isinstance(value, int | float) or not math.isfinite(value):
            continue
        name = NAMES.get(name, name)
        if name.startswith("player_"):
            name = name.replace("player_", "players/theta_", 1)
        elif name.endswith(" s"):
            name = f"goodput/{name.removesuffix(' s')} seconds"
        elif "/" not in name or name in GROUPS:
            name = f"{GROUPS.get(name, group)}/{name}"
        numbers[name] = float(value)
    return numbers


def _import(name: str) -> Any:
    module, extra = ("tensorboardX", "tensorboard") if name == "tensorboard" else (name, name)
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f"report_to: {name} needs {module}; pip install 'tpaw_jax[{extra}]'.") from error


def _tensorboard(module: Any, directory: Path, _: Any) -> tuple[Log, Close]:
    suffix = f".{secrets.token_hex(4)}"  # or a second start within a second would overwrite the first one's file
    writer = module.SummaryWriter(str(directory / "tensorboard"), filename_suffix=suffix)

    def log(values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            writer.add_scalar(name, value, step)

    return log, writer.close


def _wandb(module: Any, directory: Path, config: dict[str, Any]) -> tuple[Log, Close]:
    """A resumed run is the same run there. `WANDB_PROJECT`, `WANDB_NAME` and the other variables take precedence."""
    defaults = {"project": PROJECT, "name": directory.name, "run_id": _run_id(directory)}
    given = {key: value for key, value in defaults.items() if f"WANDB_{key.upper()}" not in os.environ}
    given = {"id" if key == "run_id" else key: value for key, value in given.items()}
    place = {} if bucket.is_remote(directory) else {"dir": str(directory)}
    run = module.init(config=config, **place, resume="allow", **given)
    run.define_metric("*", step_metric="step")  # wandb's own steps cannot go back to the last checkpoint

    def log(values: Mapping[str, float], step: int) -> None:
        run.log({**values, "step": step})

    return log, run.finish


def _trackio(module: Any, directory: Path, config: dict[str, Any]) -> tuple[Log, Close]:
    name = f"{directory.name}-{_run_id(directory)}"
    run = module.init(project=os.environ.get("TRACKIO_PROJECT", PROJECT), name=name, config=config, resume="allow")

    def log(values: Mapping[str, float], step: int) -> None:
        run.log(dict(values), step=step)

    return log, run.finish


def _run_id(directory: Path) -> str:
    """A name that the run keeps when it resumes, also in another place."""
    path = directory / "tracker_id"
    if not path.exists():
        files.write_bytes(path, secrets.token_hex(4).encode())
    return path.read_text()


def _nothing(*_: Any) -> None:
    pass
