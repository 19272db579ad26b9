"""Search for the settings with which a run's stages are fastest on the devices at hand.

Each key has a list of values in order. Starting from the configuration, the search moves one key at a time to a
neighbouring value, keeps what is faster, and goes on until no key helps or the time is up. A value that does not fit
into memory is tried with the next rematerialization policy, which needs less.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import yaml

from tpaw_jax.config import RunConfig, config_file
from tpaw_jax.models import REMAT_POLICIES, ModelConfig
from tpaw_jax.planning.measured import bench
from tpaw_jax.runtime import processes, sharding

GAIN = 1.02
"""The ratio of rates from which a value counts as faster: less is noise."""

STAGES = ("step", "scoring", "decode", "prefill")
"""The stages in the order in which they are tuned: a round spends most of its time in the first."""

Settings = dict[str, Any]

Measure = Callable[[str, Settings], float | None]
"""(stage, settings that differ from the configuration) -> rate of the stage; None: they cannot be used."""


class Knob(NamedTuple):
    """A key, and the values that it may take, in order."""

    key: str
    values: Sequence[Any]
    saves_memory: bool = False  # later values need less memory


class Trial(NamedTuple):
    """Settings that were measured."""

    stage: str
    settings: Settings
    rate: float | None


def knobs_of(config: RunConfig) -> dict[str, list[Knob]]:
    """The keys that change the speed of each stage, with the values to try."""
    mesh = sharding.make_mesh(config.mesh)
    shards, on_cpu = sharding.row_shards(mesh, config.mesh.context), mesh.devices.flat[0].platform == "cpu"
    batch = config.packing.rows_per_batch or shards
    around = lambda value, *factors: sorted({max(1, round(value * f)) for f in (1, *factors)})
    lengths = [n for n in (1280, 2048, 3072, 4096, 6144, 8192, 12288, 16384) if n >= config.longest_tree]
    return {
        "step": [
            Knob("policy.remat", list(REMAT_POLICIES), saves_memory=True),
            Knob("packing.rows_per_batch", [shards * n for n in around(batch // shards, 0.5, 2, 4)]),
            Knob("packing.row_length", sorted({*lengths, config.packing.row_length} - {0})),
            Knob("policy.head_chunk", around(config.policy.head_chunk, 0.25, 0.5, 2, 4)),
            *([] if on_cpu else [Knob("policy.attention_chunks", around(config.policy.attention_chunks, 0.5, 2))]),
        ],
        "scoring": [Knob("packing.scoring_batches", around(config.packing.scoring_batches, 2, 4))],
        "decode": [Knob("sampling.slots", around(config.sampling.slots, 0.25, 0.5, 2, 4))],
        "prefill": [Knob("sampling.prefill_tokens", around(config.sampling.prefill_tokens, 0.5, 2, 4))],
    }


def search(
    knobs: Mapping[str, Sequence[Knob]], current: Settings, measure: Measure, has_time: Callable[[], bool]
) -> tuple[Settings, list[Trial]]:
    """Find faster settings, stage by stage.

    Args:
        knobs: the keys of each stage.
        current: the configuration's values of these keys.
        measure: measures a stage.
        has_time: asked before each measurement but the first.

    Returns:
        The settings that differ from the configuration's, and all that was measured.
    """
    best: Settings = {}
    trials: list[Trial] = []
    for stage, of_stage in knobs.items():
        if trials and not has_time():
            break
        tried: dict[str, float | None] = {}

        def rate_of(settings: Settings, stage: str = stage, tried: dict[str, float | None] = tried) -> float | None:
            known = repr(sorted(settings.items()))
            if known not in tried:
                tried[known] = measure(stage, settings)
                trials.append(Trial(stage, settings, tried[known]))
            return tried[known]

        fastest, improved = rate_of(best) or 0.0, True
        saving = [knob for knob in of_stage if knob.saves_memory]
        while improved:
            improved = False
            for knob, direction in [(knob, direction) for knob in of_stage for direction in (1, -1)]:
                settings = _moved(best, current, knob, direction)
                while settings is not None and has_time():
                    rate = rate_of(settings)
                    if rate is None and saving and knob not in saving:
                        settings = _moved(settings, current, saving[0], 1)
                    elif rate is None or rate < GAIN * fastest:
                        break
                    else:
                        best, fastest, improved = settings, rate, True
                        settings = _moved(best, current, knob, direction)
    return best, trials


def _moved(settings: Settings, current: Settings, knob: Knob, direction: int) -> Settings | None:
    """The settings with the knob at its next value in a direction; None if there is none."""
    value = settings.get(knob.key, current[knob.key])
    place = list(knob.values).index(value) + direction if value in knob.values else 0
    if not 0 <= place < len(knob.values):
        return None
    rest = {key: v for key, v in settings.items() if key != knob.key}
    return rest if knob.values[place] == current[knob.key] else rest | {knob.key: knob.values[place]}


def tune(
    config: RunConfig, architecture: ModelConfig, stages: Sequence[str], minutes: float, calls: int, say: bench.Say
) -> tuple[Settings, list[Trial]]:
    """Search on the devices at hand for up to `minutes` minutes, with `calls` timed calls of each program."""
    knobs = {stage: of_stage for stage, of_stage in knobs_of(config).items() if stage in stages}
    values = config_file.flat(config_file.to_dict(config))
    values["packing.rows_per_batch"] = config.packing.rows_per_batch or sharding.row_shards(
        sharding.make_mesh(config.mesh), config.mesh.context
    )
    until = time.monotonic() + 60 * minutes

    def measure(stage: str, settings: Settings) -> float | None:
        rate = _rate(config, architecture, stage, settings, calls)
        shown = ", ".join(f"{key} {value}" for key, value in settings.items()) or "as configured"
        say(f"{stage}, {shown}: {'cannot be used' if rate is None else f'{rate:.4g} {UNITS[stage]}'}")
        return rate

    return search(knobs, values, measure, lambda: bool(_of_main(time.monotonic() < until)))


UNITS = {"step": "triplets/s", "scoring": "tokens/s", "decode": "tokens/s", "prefill": "tokens/s"}


def _rate(config: RunConfig, architecture: ModelConfig, stage: str, settings: Settings, calls: int) -> float | None:
    """Measure a stage. All processes return what the main one measured, so that they search alike."""
    try:
        tried = config_file.with_values(config, settings)
        (record,) = bench.measure(tried, architecture, [stage], calls, lambda line: None)
    except ValueError:  # such as rows that are too short for the longest tree
        return None
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return None
    return float(_of_main(record[UNITS[stage]]))


def _of_main(value: float) -> float:
    """The main process's value."""
    return float(processes.all_gather(value=np.array([value], np.float64))[0]["value"][0])


def overlay(settings: Settings, trials: Sequence[Trial]) -> str:
    """The settings as a YAML file to give after the run's own, with the measurements as comments."""
    sections: dict[str, Any] = {}
    for key, value in settings.items():
        section, _, name = key.partition(".")
        sections.setdefault(section, {})[name] = value
    lines = ["# Made by `tpaw tune`: give it after the run's own file, --config run.yaml tuned.yaml."]
    for stage in dict.fromkeys(trial.stage for trial in trials):
        rates = [trial.rate for trial in trials if trial.stage == stage and trial.rate is not None]
        if rates:
            lines.append(f"# {stage}: {max(rates):.4g} {UNITS[stage]}, as configured {rates[0]:.4g}")
    return "\n".join([*lines, yaml.safe_dump(sections, sort_keys=True) if sections else "{}\n"])
