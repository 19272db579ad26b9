"""Safetensors files: a checkpoint's tensors are read one at a time, and written in shards."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Array
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from tpaw_jax.models.checkpoints.joined_tensors import Joined
from tpaw_jax.models.checkpoints.tensor_names import TensorName, text_name
from tpaw_jax.storage import files

INDEX_FILE = "model.safetensors.index.json"


class SafetensorsSource:
    """The tensors of one safetensors file or several shards. Reading a slice touches only its bytes.

    Raises:
        FileNotFoundError: the directory has no safetensors file and no index of shards.
        ValueError: the index is invalid, or a file cannot be read or lacks a tensor. Names the file.
    """

    def __init__(self, directory: Path):
        index = directory / INDEX_FILE
        single = directory / "model.safetensors"
        if index.exists():
            weight_map = read_json(index).get("weight_map", {})
            if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
                raise ValueError(f"{index}: weight_map must be an object that maps tensor names to file names.")
            shards = {name: directory / file for name, file in weight_map.items()}
        elif single.exists():
            shards = dict.fromkeys(_open_shard(single).keys(), single)
        else:
            raise FileNotFoundError(
                f"{directory}: the directory has neither model.safetensors nor {INDEX_FILE}; "
                "pickled .bin checkpoints are never loaded, convert them to safetensors first."
            )
        for name, path in shards.items():  # compare names, not resolved paths: the hub's cache consists of links
            if path.parent != directory or path.name in ("", ".."):
                raise ValueError(f"{index}: the shard of '{name}' lies outside the directory: {path}.")
        opened = {path: _open_shard(path) for path in sorted(set(shards.values()))}
        for name, path in shards.items():
            if name not in opened[path].keys():  # noqa: SIM118 (safe_open has no __contains__)
                raise ValueError(f"{path}: the tensor '{name}' is missing, but {INDEX_FILE} lists it in this file.")
        named = {own: name for name in shards if (own := text_name(name)) is not None}
        self._slices = {own: opened[shards[name]].get_slice(name) for own, name in named.items()}

    def names(self) -> set[str]:
        return set(self._slices)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._slices[name].get_shape())

    def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        return self._slices[name][index]


def write_shards(
    directory: Path, flat: Mapping[str, Array | Joined], names: Mapping[str, TensorName], max_shard_bytes: int
) -> None:
    """Write model.safetensors, or numbered shards and an index if the parameters exceed `max_shard_bytes`."""
    shards: list[list[tuple[str, str, tuple[int, ...]]]] = [[]]  # of (Hugging Face name, flax name, place in it)
    bytes_left = max_shard_bytes
    for name, value in flat.items():
        parts = names[name].tensors(value.shape)
        size = value.nbytes // len(parts)
        for hf, place, _ in parts:
            if size > bytes_left and shards[-1]:
                shards.append([])
                bytes_left = max_shard_bytes
            shards[-1].append((hf, name, place))
            bytes_left -= size
    weight_map = {}
    for number, entries in enumerate(shards, start=1):
        file = "model.safetensors" if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors = {}
        for hf, name, place in entries:
            value = flat[name]
            tensor = value.tensor(place) if isinstance(value, Joined) else np.asarray(value[place])
            tensors[hf] = np.ascontiguousarray(tensor.swapaxes(-1, -2) if names[name].transposed else tensor)
            weight_map[hf] = file
        save_file(tensors, directory / file, metadata={"format": "pt"})
        (directory / file).chmod(0o644)  # safetensors writes mode 0600, but servers often run as another user
    if len(shards) > 1:
        total = sum(value.nbytes for value in flat.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (directory / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object of a model directory.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not JSON, or not an object. Names the file.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path}: the file is missing; a model directory must have it.")
    fields = files.parse_json(path.read_bytes(), path)
    if not isinstance(fields, dict):
        raise ValueError(f"{path}: the file must contain a JSON object, not {type(fields).__name__}.")
    return fields


def _open_shard(path: Path) -> Any:
    try:
        return safe_open(path, framework="np")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: not a readable safetensors file ({error}).") from error
