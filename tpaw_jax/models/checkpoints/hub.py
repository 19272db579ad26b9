"""Load and save checkpoints: Hugging Face directories and hub ids (safetensors), and GGUF files (load only).

Tensors are read one at a time from memory-mapped files, cast, and placed with their sharding, so the host holds only
its part of one stacked parameter at a time.
"""

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jax.sharding import Mesh
from jax.typing import DTypeLike
from jaxtyping import Array, PyTree

from tpaw_jax.models.adapters import Lora
from tpaw_jax.models.checkpoints import config_json, gguf
from tpaw_jax.models.checkpoints.joined_tensors import SplitSource, join, names_in_files
from tpaw_jax.models.checkpoints.safetensors_files import SafetensorsSource, read_json, write_shards
from tpaw_jax.models.checkpoints.tensor_names import TensorName, tensor_names
from tpaw_jax.models.model_config import ModelConfig
from tpaw_jax.models.transformer import Transformer
from tpaw_jax.runtime import sharding

Sharder = Callable[[str, tuple[int, ...]], jax.sharding.Sharding]
"""(flax path, shape) -> sharding of the parameter."""


TensorSource = SafetensorsSource | SplitSource | gguf.GGUFSource
"""Tensors on disk, addressed by their Hugging Face names."""

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")
"""A directory with none of them has no tokenizer."""

DOWNLOADED_FILES = ("*.json", "*.safetensors", "*.model", "*.jinja")


def resolve(path: str | Path, patterns: Sequence[str] = DOWNLOADED_FILES) -> Path:
    """Return the local path of a model: `path` itself if it exists, else the downloaded snapshot of a hub id.

    Args:
        path: a directory, a GGUF file or a hub id, 'org/name'.
        patterns: the files to download.

    Raises:
        FileNotFoundError: the path does not exist and the download failed.
    """
    local = Path(path).expanduser()
    if local.exists():
        return local
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(path), allow_patterns=list(patterns)))
    except Exception as error:  # the hub client raises dozens of types; the user needs one sentence
        raise FileNotFoundError(
            f"{path}: no such file or directory, and the download from the Hugging Face hub failed "
            f"({type(error).__name__}: {error})."
        ) from error


def load_pretrained(
    path: str | Path,
    dtype: DTypeLike = jnp.float32,
    sharder: Sharder | None = None,
    convert: Callable[[str, Array], dict[str, Array]] = lambda name, loaded: {name: loaded},
) -> tuple[ModelConfig, PyTree[Array]]:
    """Load the architecture and parameters of a Hugging Face directory, a hub id or a GGUF file.

    Args:
        path: a directory with config.json and safetensors, `org/name` on the hub, or a `.gguf` file.
        dtype: dtype of the loaded parameters.
        sharder: (flax path, shape) -> sharding; by default, all parameters go to the first device.
        convert: (flax path, loaded parameter) -> what takes its place, before the next one is loaded.

    Raises:
        FileNotFoundError: there is no checkpoint at `path`.
        ValueError: unsupported architecture, missing or unexpected tensors, or wrong shapes. Names them.
    """
    local = resolve(path)
    source: TensorSource
    if local.suffix == ".gguf":
        source = gguf.GGUFSource(local)
        config = source.config
    else:
        config = load_architecture(local)
        source = SafetensorsSource(local)
    source = SplitSource(source, config, local)
    shapes = param_shapes(config)
    _check_tensors(source, shapes, config, local)
    names = tensor_names(config)
    params: dict[str, Array] = {}
    for name, shape in shapes.items():
        params |= convert(name, _load(source, name, names[name], shape, dtype, sharder))
    return config, traverse_util.unflatten_dict(params, sep="/")


def load_architecture(path: str | Path) -> ModelConfig:
    """Load only the architecture of a Hugging Face directory, a hub id or a GGUF file; downloads no weights."""
    local = resolve(path, ["config.json", "adapter_config.json"])
    if local.suffix == ".gguf":
        return gguf.GGUFSource(local).config
    _refuse_adapter(local)
    return config_json.from_dict(read_json(local / "config.json"), str(local / "config.json"))


def param_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Return the flax path and shape of every parameter; layers are stacked on the leading axis."""
    params = _shapes(Transformer(config))
    return {name: leaf.shape for name, leaf in traverse_util.flatten_dict(params, sep="/").items()}


def abstract_params(
    config: ModelConfig, dtype: Any, mesh: Mesh, lora: Lora | None = None
) -> PyTree[jax.ShapeDtypeStruct]:
    """The parameters' shapes, dtypes and shardings over `mesh`, without values."""
    shapes = _shapes(Transformer(config, param_dtype=jnp.dtype(dtype), lora=lora))
    placed = lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)
    return jax.tree.map(placed, shapes, sharding.param_shardings(shapes, mesh))


def _shapes(model: Transformer) -> PyTree[jax.ShapeDtypeStruct]:
    return jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]


def save_pretrained(
    path: str | Path,
    config: ModelConfig,
    params: PyTree[Array],
    tokenizer: Any = None,
    generation_config: dict[str, Any] | None = None,
    max_shard_bytes: int = 5_000_000_000,
) -> Path:
    """Write a directory that transformers and vLLM load: config, safetensors shards, generation config, tokenizer.

    The directory is complete or absent: it is written as `*.partial` and renamed at the end. An earlier export at
    `path` is replaced.

    Args:
        path: the directory to write.
        config: the architecture.
        params: the parameters, written in their dtype.
        tokenizer: a transformers tokenizer to write beside the model, if any.
        generation_config: fields of generation_config.json; they override the tokenizer's special tokens.
        max_shard_bytes: size limit of a safetensors file.

    Returns:
        The absolute path.

    Raises:
        ValueError: something other than an earlier export exists at `path`. Nothing is changed.
    """
    path = check_export(path)
    partial = path.with_name(path.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    flat = traverse_util.flatten_dict(params, sep="/")
    write_shards(partial, *join(flat, config), max_shard_bytes)
    dtype = str(flat["embed/embedding"].dtype)
    generation = dict(generation_config or {})
    special = {"bos_token_id", "eos_token_id", "pad_token_id"}
    if tokenizer is not None:
        tokenizer.save_pretrained(partial)
        ids = {name: getattr(tokenizer, name) for name in special}
        generation = {name: value for name, value in ids.items() if value is not None} | generation
    fields = config_json.to_dict(config, dtype) | {k: v for k, v in generation.items() if k in special}
    (partial / "config.json").write_text(json.dumps(fields, indent=2) + "\n")
    (partial / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
    if path.exists():
        shutil.rmtree(path)
    partial.rename(path)
    return path


def check_export(path: str | Path) -> Path:
    """Check that an export may be written to `path`, and return it as an absolute path.

    Raises:
        ValueError: something other than an earlier export exists there.
    """
    path = Path(path).absolute()
    if path.exists():
        names = {p.name for p in path.iterdir()} if path.is_dir() else {""}
        exported = {"config.json", "generation_config.json"} <= names or "adapter_config.json" in names
        earlier = exported and not any((path / n).is_dir() for n in names)
        if names and not earlier:
            raise ValueError(f"{path}: something other than an exported model exists here; choose another directory.")
    return path


def load_tokenizer(path: str | Path) -> Any:
    """Load the tokenizer of a Hugging Face directory, a hub id or a GGUF file. Never runs remote code.

    Raises:
        FileNotFoundError: there is no tokenizer.
        ValueError: it cannot be loaded, or the directory holds an adapter.
    """
    from transformers import AutoTokenizer

    local = resolve(path)
    if local.suffix == ".gguf":
        return gguf.load_tokenizer(local)
    if not any((local / name).exists() for name in TOKENIZER_FILES):
        _refuse_adapter(local)
        raise FileNotFoundError(f"{path}: there is no tokenizer.json; name a directory with one in policy.tokenizer.")
    try:
        return AutoTokenizer.from_pretrained(local)
    except Exception as error:  # transformers raises many types, and asks for packages that would not help
        raise ValueError(
            f"{path}: transformers cannot load the tokenizer ({type(error).__name__}: {str(error).splitlines()[0]}) "
            "without packages that this project does not use. Save it where they are, with "
            "AutoTokenizer.from_pretrained(...).save_pretrained(...), and name that directory in policy.tokenizer."
        ) from error


def load_generation_config(path: str | Path) -> dict[str, Any]:
    """Load a model's generation_config.json; returns {} if there is none."""
    local = resolve(path)
    file = local / "generation_config.json"
    return read_json(file) if local.is_dir() and file.exists() else {}


def _refuse_adapter(directory: Path) -> None:
    file = directory / "adapter_config.json"
    if file.exists() and not (directory / "config.json").exists():
        base = read_json(file).get("base_model_name_or_path")
        raise ValueError(
            f"{directory}: this is an adapter of {base!r}, not a model. Name the model in policy.path and the adapter "
            "in policy.lora.path, or merge the two with PEFT's merge_and_unload() and save them with the tokenizer."
        )


def _check_tensors(source: TensorSource, shapes: dict[str, tuple[int, ...]], config: ModelConfig, path: Path) -> None:
    """Check that the files contain exactly the tensors that the architecture needs, with the right shapes."""
    names = tensor_names(config)
    expected = {hf: inner for name, shape in shapes.items() for hf, _, inner in names[name].tensors(shape)}
    present = source.names()
    missing = names_in_files(expected.keys() - present, config)
    unexpected = {n for n in present - expected.keys() if not n.endswith("rotary_emb.inv_freq")}
    if config.tie_embeddings:
        unexpected.discard("lm_head.weight")  # a copy of the tied embedding; transformers ignores it too
    for layer in range(config.num_layers - config.kv_shared_layers, config.num_layers):  # transformers ignores them too
        unexpected -= {f"model.layers.{layer}.self_attn.{name}.weight" for name in ("k_proj", "v_proj", "k_norm")}
    if missing:
        raise ValueError(f"{path}: {len(missing)} tensors are missing: {_shortened(missing)}.")
    if unexpected:
        raise ValueError(
            f"{path}: {len(unexpected)} tensors do not belong to a {config.model_type} model: "
            f"{_shortened(sorted(unexpected))}."
        )
    wrong = [
        f"'{name}' is {source.shape(name)} and should be {shape}"
        for name, shape in expected.items()
        if source.shape(name) != shape
    ]
    if wrong:
        raise ValueError(f"{path}: {len(wrong)} tensors have the wrong shape: {_shortened(wrong)}.")


def _load(
    source: TensorSource, name: str, stored: TensorName, shape: tuple[int, ...], dtype: Any, sharder: Sharder | None
) -> Array:
    """Load one parameter: read each device's part from the files, cast it and place it."""
    tensors = {place: tensor for tensor, place, _ in stored.tensors(shape)}
    stacked = stored.axes

    def read_part(index: Any) -> np.ndarray:
        places = [range(*i.indices(n)) for i, n in zip(index, shape, strict=True)]
        inner = stored.in_file(tuple(index[stacked:]))
        out = np.empty([len(along) for along in places], dtype)
        for where in np.ndindex(out.shape[:stacked]):
            place = tuple(along[i] for along, i in zip(places, where, strict=False))
            values = source.read(tensors[place], inner)
            out[where] = values.swapaxes(-1, -2) if stored.transposed else values
        return out

    sharding = sharder(name, shape) if sharder else jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.make_array_from_callback(shape, sharding, read_part)


def _shortened(names: list[str], limit: int = 5) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
