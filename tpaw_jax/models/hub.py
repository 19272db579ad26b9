"""Checkpoints in and out: Hugging Face directories and hub ids (safetensors) and GGUF files <-> flax parameters.

Names are one table. Parameters are read tensor by tensor from memory-mapped files, cast and placed with their sharding,
so the host holds one stacked parameter's part at a time.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jaxtyping import Array, PyTree
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from tpaw_jax.models import config_json, gguf
from tpaw_jax.models.transformer import ModelConfig, Transformer
from tpaw_jax.storage import files

TENSOR_NAMES = {  # flax path: Hugging Face name; {} is the layer, * marks a kernel stored transposed, [out, in]
    "embed/embedding": "model.embed_tokens.weight",
    "layers/attention_norm/scale": "model.layers.{}.input_layernorm.weight",
    "layers/q/kernel": "*model.layers.{}.self_attn.q_proj.weight",
    "layers/k/kernel": "*model.layers.{}.self_attn.k_proj.weight",
    "layers/v/kernel": "*model.layers.{}.self_attn.v_proj.weight",
    "layers/o/kernel": "*model.layers.{}.self_attn.o_proj.weight",
    "layers/q/bias": "model.layers.{}.self_attn.q_proj.bias",
    "layers/k/bias": "model.layers.{}.self_attn.k_proj.bias",
    "layers/v/bias": "model.layers.{}.self_attn.v_proj.bias",
    "layers/q_norm/scale": "model.layers.{}.self_attn.q_norm.weight",
    "layers/k_norm/scale": "model.layers.{}.self_attn.k_norm.weight",
    "layers/mlp_norm/scale": "model.layers.{}.post_attention_layernorm.weight",
    "layers/gate/kernel": "*model.layers.{}.mlp.gate_proj.weight",
    "layers/up/kernel": "*model.layers.{}.mlp.up_proj.weight",
    "layers/down/kernel": "*model.layers.{}.mlp.down_proj.weight",
    "final_norm/scale": "model.norm.weight",
    "head/embedding": "lm_head.weight",
}
INDEX_FILE = "model.safetensors.index.json"

Sharder = Callable[[str, tuple[int, ...]], jax.sharding.Sharding]


class TensorSource(Protocol):
    """Named tensors on disk, under their Hugging Face names."""

    def names(self) -> set[str]: ...
    def shape(self, name: str) -> tuple[int, ...]: ...
    def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray: ...


class SafetensorsSource:
    """The tensors of one safetensors file or of an index of shards; reads touch only the bytes asked for."""

    def __init__(self, directory: Path):
        index = directory / INDEX_FILE
        single = directory / "model.safetensors"
        if index.exists():
            files = _read_json(index).get("weight_map", {})
            if not isinstance(files, dict) or not all(isinstance(file, str) for file in files.values()):
                raise ValueError(f"{index}: weight_map is no object of tensors and the files that hold them.")
            shards = {name: directory / file for name, file in files.items()}
        elif single.exists():
            shards = dict.fromkeys(_open_shard(single).keys(), single)
        else:
            raise FileNotFoundError(
                f"{directory}: neither model.safetensors nor {INDEX_FILE} is there; "
                "pickled .bin checkpoints are never loaded, convert them to safetensors first."
            )
        for name, path in shards.items():  # by name only: the hub's cache holds links to files elsewhere
            if path.parent != directory or path.name in ("", ".."):
                raise ValueError(f"{index}: the shard of '{name}' lies outside the directory: {path}.")
        opened = {path: _open_shard(path) for path in sorted(set(shards.values()))}
        for name, path in shards.items():
            if name not in opened[path].keys():  # noqa: SIM118 (safe_open has no __contains__)
                raise ValueError(f"{path}: the tensor '{name}' is missing, though {INDEX_FILE} places it there.")
        self._slices = {name: opened[path].get_slice(name) for name, path in shards.items()}

    def names(self) -> set[str]:
        return set(self._slices)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._slices[name].get_shape())

    def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        return self._slices[name][index]


WANTED = ("*.json", "*.safetensors", "*.model", "*.jinja")
"""Files that are fetched from a hub."""


def resolve(path: str | Path, wanted: Sequence[str] = WANTED) -> Path:
    """The local place of a model: a directory, a GGUF file, or the snapshot of a hub id ('org/name'), downloaded.

    Raises:
        FileNotFoundError: nothing is there and no hub could deliver it.
    """
    local = Path(path).expanduser()
    if local.exists():
        return local
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(path), allow_patterns=list(wanted)))
    except Exception as error:  # the hub client raises dozens of types; the user needs one sentence
        raise FileNotFoundError(
            f"{path}: no such directory or file, and the hub did not deliver it ({type(error).__name__}: {error})."
        ) from error


def load_pretrained(
    path: str | Path, dtype: jnp.dtype = jnp.float32, sharder: Sharder | None = None
) -> tuple[ModelConfig, PyTree[Array]]:
    """The architecture and parameters of a Hugging Face directory, a hub id or a GGUF file.

    Args:
        path: a directory with config.json and safetensors, `org/name` on the hub, or a `.gguf` file.
        dtype: what the parameters are cast to.
        sharder: (flax path, shape) -> sharding; without it everything goes to the default device.

    Raises:
        FileNotFoundError: nothing to load there.
        ValueError: unsupported architecture, missing or surplus tensors, or wrong shapes; names them.
    """
    place = resolve(path)
    source: TensorSource
    if place.suffix == ".gguf":
        source = gguf.GGUFSource(place)
        config = source.config
    else:
        config = load_architecture(place)
        source = SafetensorsSource(place)
    shapes = param_shapes(config)
    _check(source, shapes, config, place)
    params = {name: _place(source, name, shape, dtype, sharder) for name, shape in shapes.items()}
    return config, traverse_util.unflatten_dict(params, sep="/")


def load_architecture(path: str | Path) -> ModelConfig:
    """The architecture alone, of a directory with config.json, a hub id or a GGUF file; weights are not fetched."""
    place = resolve(path, ["config.json"])
    if place.suffix == ".gguf":
        return gguf.GGUFSource(place).config
    return config_json.from_dict(_read_json(place / "config.json"), str(place / "config.json"))


def param_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every parameter's flax path and shape; layers are stacked on the leading axis."""
    tokens = jnp.zeros((1, 1), jnp.int32)
    variables = jax.eval_shape(Transformer(config).init, jax.random.key(0), tokens)
    return {name: leaf.shape for name, leaf in traverse_util.flatten_dict(variables["params"], sep="/").items()}


def save_pretrained(
    path: str | Path,
    config: ModelConfig,
    params: PyTree[Array],
    tokenizer: Any = None,
    generation_config: dict[str, Any] | None = None,
    max_shard_bytes: int = 5_000_000_000,
) -> Path:
    """Write a directory that transformers and vLLM load: config, safetensors shards, generation config, tokenizer.

    The directory appears whole or not at all: it is written aside and renamed. Only an earlier export is replaced.

    Raises:
        ValueError: something else is at `path`; nothing is touched.
    """
    path = check_export(path)
    aside = path.with_name(path.name + ".partial")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    flat = traverse_util.flatten_dict(params, sep="/")
    _write_shards(aside, flat, max_shard_bytes)
    dtype = str(flat["embed/embedding"].dtype)
    generation = dict(generation_config or {})
    special = {"bos_token_id", "eos_token_id", "pad_token_id"}
    if tokenizer is not None:
        tokenizer.save_pretrained(aside)
        found = {name: getattr(tokenizer, name) for name in special}
        generation = {name: value for name, value in found.items() if value is not None} | generation
    fields = config_json.to_dict(config, dtype) | {k: v for k, v in generation.items() if k in special}
    (aside / "config.json").write_text(json.dumps(fields, indent=2) + "\n")
    (aside / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
    if path.exists():
        shutil.rmtree(path)
    aside.rename(path)
    return path


def check_export(path: str | Path) -> Path:
    """The place of an export, made absolute.

    Raises:
        ValueError: something that is not an earlier export is there.
    """
    path = Path(path).absolute()
    if path.exists():
        names = {p.name for p in path.iterdir()} if path.is_dir() else {""}
        earlier = {"config.json", "generation_config.json"} <= names and not any((path / n).is_dir() for n in names)
        if names and not earlier:
            raise ValueError(f"{path}: something other than an exported model is there; choose another directory.")
    return path


def load_tokenizer(path: str | Path) -> Any:
    """The tokenizer beside a model: of a directory, of a hub id, or inside a GGUF file. Remote code is never run."""
    from transformers import AutoTokenizer

    place = resolve(path)
    if place.suffix == ".gguf":
        return gguf.load_tokenizer(place)
    return AutoTokenizer.from_pretrained(place)


def load_generation_config(path: str | Path) -> dict[str, Any]:
    """generation_config.json beside a model, or nothing where there is none."""
    place = resolve(path)
    file = place / "generation_config.json"
    return _read_json(file) if place.is_dir() and file.exists() else {}


def _check(source: TensorSource, shapes: dict[str, tuple[int, ...]], config: ModelConfig, place: Path) -> None:
    """Raise unless the files hold exactly the tensors that the architecture needs, in their shapes."""
    expected = {hf: shape for name, stacked in shapes.items() for hf, shape in _files(name, stacked)}
    there = source.names()
    missing = sorted(expected.keys() - there)
    surplus = {n for n in there - expected.keys() if not n.endswith("rotary_emb.inv_freq")}
    if config.tie_embeddings:
        surplus.discard("lm_head.weight")  # a copy of the tied table, ignored by transformers too
    if missing:
        raise ValueError(f"{place}: {len(missing)} tensors are missing: {_some(missing)}.")
    if surplus:
        raise ValueError(
            f"{place}: {len(surplus)} tensors have no place in a {config.model_type} model: {_some(sorted(surplus))}."
        )
    wrong = [
        f"'{name}' is {source.shape(name)} and should be {shape}"
        for name, shape in expected.items()
        if source.shape(name) != shape
    ]
    if wrong:
        raise ValueError(f"{place}: {len(wrong)} tensors have the wrong shape: {_some(wrong)}.")


def _files(name: str, shape: tuple[int, ...]) -> list[tuple[str, tuple[int, ...]]]:
    """The Hugging Face names and file shapes of one flax parameter, layer by layer."""
    hf = TENSOR_NAMES[name]
    if "{}" in hf:
        return [(hf.lstrip("*").format(layer), _file_shape(hf, shape[1:])) for layer in range(shape[0])]
    return [(hf.lstrip("*"), _file_shape(hf, shape))]


def _file_shape(hf: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    return shape[::-1] if hf.startswith("*") else shape


def _place(source: TensorSource, name: str, shape: tuple[int, ...], dtype: Any, sharder: Sharder | None) -> Array:
    """One parameter, each device's part read from the files, cast and placed."""
    hf, files = TENSOR_NAMES[name], [file for file, _ in _files(name, shape)]
    turned = hf.startswith("*")

    def part(index: Any) -> np.ndarray:
        if "{}" not in hf:
            return source.read(files[0], index).astype(dtype)
        layers = range(*index[0].indices(shape[0]))
        inner = index[1:][::-1] if turned else index[1:]
        extent = [len(range(*i.indices(n))) for i, n in zip(index, shape, strict=True)]
        out = np.empty(extent, dtype)
        for row, layer in enumerate(layers):
            values = source.read(files[layer], inner)
            out[row] = values.T if turned else values
        return out

    sharding = sharder(name, shape) if sharder else jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.make_array_from_callback(shape, sharding, part)


def _write_shards(directory: Path, flat: dict[str, Array], max_shard_bytes: int) -> None:
    """model.safetensors, or numbered shards and their index where the parameters exceed one shard."""
    plan: list[list[tuple[str, str, int | None]]] = [[]]  # shards of (Hugging Face name, flax name, layer)
    room = max_shard_bytes
    for name, value in flat.items():
        files = _files(name, value.shape)
        size = value.nbytes // len(files)
        for layer, (hf, _) in enumerate(files):
            if size > room and plan[-1]:
                plan.append([])
                room = max_shard_bytes
            plan[-1].append((hf, name, layer if "{}" in TENSOR_NAMES[name] else None))
            room -= size
    weight_map = {}
    for number, entries in enumerate(plan, start=1):
        file = "model.safetensors" if len(plan) == 1 else f"model-{number:05d}-of-{len(plan):05d}.safetensors"
        tensors = {}
        for hf, name, place in entries:
            tensor = np.asarray(flat[name] if place is None else flat[name][place])
            tensors[hf] = np.ascontiguousarray(tensor.T if TENSOR_NAMES[name].startswith("*") else tensor)
            weight_map[hf] = file
        save_file(tensors, directory / file, metadata={"format": "pt"})
        (directory / file).chmod(0o644)  # the library writes for its owner alone; servers run as someone else
    if len(plan) > 1:
        total = sum(value.nbytes for value in flat.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (directory / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n")


def _open_shard(path: Path) -> Any:
    try:
        return safe_open(path, framework="np")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: not a readable safetensors file ({error}).") from error


def _read_json(path: Path) -> dict[str, Any]:
    if not path.exists():
        raise FileNotFoundError(f"{path}: the file is missing; a model directory needs it.")
    fields = files.parse_json(path.read_bytes(), path)
    if not isinstance(fields, dict):
        raise ValueError(f"{path}: a JSON object was expected, not {type(fields).__name__}.")
    return fields


def _some(names: list[str], most: int = 5) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
