"""Adapters in PEFT's format: a directory with adapter_config.json and adapter_model.safetensors."""

import json
import math
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jax.sharding import Mesh
from jaxtyping import Array, PyTree
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from tpaw_jax.models.adapters import ADAPTERS, PROJECTIONS, Lora, scale_of
from tpaw_jax.models.checkpoints.hub import abstract_params, check_export
from tpaw_jax.models.checkpoints.safetensors_files import read_json
from tpaw_jax.models.checkpoints.tensor_names import TensorName, tensor_names, text_name
from tpaw_jax.models.model_config import ModelConfig
from tpaw_jax.runtime import sharding

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"

PREFIX = "base_model.model."
"""What PEFT puts before the names of the base's modules."""

NEUTRAL: dict[str, Any] = {
    "bias": "none",
    "modules_to_save": None,
    "rank_pattern": {},
    "alpha_pattern": {},
    "layers_to_transform": None,
    "layer_replication": None,
    "target_parameters": None,
    "trainable_token_indices": None,
    "lora_bias": False,
    "fan_in_fan_out": False,
}
"""Fields of adapter_config.json that change what an adapter is, and their values in a plain one."""

VARIANTS = (
    "alora_invocation_tokens",
    "use_qalora",
    "use_bdlora",
    "arrow_config",
    "kasa_config",
    "monteclora_config",
    "velora_config",
)
"""Fields of variants of LoRA that compute something else."""

INITS = (None, True, False, "gaussian", "eva", "orthogonal")
"""The values of init_lora_weights that leave the base as it is."""


class Settings(NamedTuple):
    """What adapter_config.json says."""

    rank: int
    alpha: float
    rslora: bool = False
    dora: bool = False


def read_settings(directory: Path) -> Settings:
    """Read adapter_config.json.

    Raises:
        FileNotFoundError: there is none.
        ValueError: the adapter is not a plain LoRA, or a field is malformed. Names the field.
    """
    path = directory / CONFIG
    fields: Any = read_json(path)
    kind, rank, alpha = fields.get("peft_type"), fields.get("r"), fields.get("lora_alpha")
    if kind != "LORA":
        raise ValueError(f"{path}: peft_type is {kind!r}; only LORA is supported.")
    for name, neutral in {**NEUTRAL, **dict.fromkeys(VARIANTS)}.items():
        if (fields.get(name) or neutral) != neutral:
            raise ValueError(f"{path}: {name} is {fields[name]!r}, which is not supported; it must be {neutral!r}.")
    if fields.get("init_lora_weights") not in INITS:
        raise ValueError(
            f"{path}: init_lora_weights is {fields['init_lora_weights']!r}, which changes the base too. Convert the "
            "adapter to a plain one where it was trained, with PEFT's path_initial_model_for_weight_conversion."
        )
    if type(rank) is not int or rank < 1:
        raise ValueError(f"{path}: r is {rank!r}; it must be an integer of at least 1.")
    if type(alpha) not in (int, float) or not 0 < alpha < math.inf:
        raise ValueError(f"{path}: lora_alpha is {alpha!r}; it must be a number above 0.")
    return Settings(rank, float(alpha), bool(fields.get("use_rslora")), bool(fields.get("use_dora")))


def read_targets(directory: Path) -> tuple[str, ...]:
    """The projections that have adapters, by their names in `PROJECTIONS`, from the names of the tensors.

    Raises:
        ValueError: other modules have adapters, or there are none.
    """
    found = {name.split(".lora_")[0].split(".")[-1] for name in _names_in(directory) if ".lora_" in name}
    unknown = sorted(found - PROJECTIONS.keys())
    if unknown or not found:
        raise ValueError(
            f"{directory / TENSORS}: it has adapters of {', '.join(unknown) or 'nothing'}; supported are those of "
            f"{', '.join(PROJECTIONS)}. Merge it into its base with PEFT's merge_and_unload()."
        )
    return tuple(name for name in PROJECTIONS if name in found)


def load(directory: Path, config: ModelConfig, lora: Lora, mesh: Mesh) -> PyTree[Array]:
    """Read the adapters of a model, in the dtype of `lora`.

    Raises:
        ValueError: the adapters are not those of `lora`, or tensors are missing, have another shape or do not belong
            to the model. Names them.
    """
    settings = read_settings(directory)
    found = settings.rank, scale_of(settings.alpha, settings.rank, settings.rslora), settings.dora
    if found != (lora.rank, lora.scale, lora.dora):
        raise ValueError(
            f"{directory / CONFIG}: rank, scale and use_dora are {found}, but those of policy.lora are "
            f"{(lora.rank, lora.scale, lora.dora)}. Remove rank, alpha, rslora and dora: they are taken from there."
        )
    shapes = traverse_util.flatten_dict(abstract_params(config, jnp.float32, mesh, lora), sep="/")
    shapes = {name: x for name, x in shapes.items() if name.endswith(ADAPTERS)}
    names, present = _names(config), {_text_name(name): value for name, value in _tensors(directory).items()}
    expected = {hf: inner for name, x in shapes.items() for hf, _, inner in names[name].tensors(x.shape)}
    wrong = [name for name, shape in expected.items() if name in present and present[name].shape != shape]
    for problem, tensors in (
        ("are missing", expected.keys() - present.keys()),
        (f"do not belong to this {config.model_type} model", present.keys() - expected.keys()),
        ("have the wrong shape", wrong),
    ):
        if tensors:
            raise ValueError(f"{directory / TENSORS}: {len(tensors)} tensors {problem}, such as {min(tensors)}.")

    def stacked(name: str) -> np.ndarray:
        whole = np.empty(shapes[name].shape, np.float32)
        for hf, place, _ in names[name].tensors(whole.shape):
            whole[place] = present[hf].T
        return whole.astype(shapes[name].dtype)

    placed = {name: sharding.place(stacked(name), x.sharding) for name, x in shapes.items()}
    return traverse_util.unflatten_dict(placed, sep="/")


def save(
    path: Path, config: ModelConfig, adapters: PyTree[Array], settings: Settings, base: str, tokenizer: Any = None
) -> Path:
    """Write a directory that PEFT loads: adapters, their configuration, and a tokenizer.

    It is complete or absent, as with `hub.save_pretrained`.

    Raises:
        ValueError: checkpoints of this model join projections, or something else exists at `path`.
    """
    if config.fused:
        raise ValueError(
            f"{path}: checkpoints of {config.model_type} models join projections that have adapters of their own here, "
            "so PEFT cannot load these. Export the merged model, with --merge."
        )
    path = check_export(path)
    partial = path.with_name(path.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    names, flat = _names(config, _layers_prefix(base)), traverse_util.flatten_dict(adapters, sep="/")
    tensors = {
        hf: np.ascontiguousarray(np.asarray(value[place]).T)
        for name, value in flat.items()
        for hf, place, _ in names[name].tensors(value.shape)
    }
    save_file(tensors, partial / TENSORS, metadata={"format": "pt"})
    (partial / TENSORS).chmod(0o644)
    modules = {name.split("/")[-2] for name in flat}
    fields = NEUTRAL | {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": settings.rank,
        "lora_alpha": settings.alpha,
        "lora_dropout": 0.0,
        "use_rslora": settings.rslora,
        "use_dora": settings.dora,
        "target_modules": [name for name, module in PROJECTIONS.items() if module in modules],
        "inference_mode": True,
    }
    (partial / CONFIG).write_text(json.dumps(fields, indent=2) + "\n")
    if tokenizer is not None:
        tokenizer.save_pretrained(partial)
    if path.exists():
        shutil.rmtree(path)
    partial.rename(path)
    return path


def _names(config: ModelConfig, layers: str = "model.") -> dict[str, TensorName]:
    """The tensors of each adapter, by flax path."""
    of_adapters = {}
    for name, own in tensor_names(config).items():
        module, _, leaf = name.rpartition("/")
        if leaf == "kernel" and module.split("/")[-1] in PROJECTIONS.values():
            stem = PREFIX + layers + own.template.lstrip("*").removeprefix("model.").removesuffix(".weight")
            of_adapters[f"{module}/lora_a"] = own._replace(template=f"*{stem}.lora_A.weight")
            of_adapters[f"{module}/lora_b"] = own._replace(template=f"*{stem}.lora_B.weight")
            of_adapters[f"{module}/lora_m"] = own._replace(template=f"{stem}.lora_magnitude_vector")
    return of_adapters


def _text_name(name: str) -> str:
    """The name of a tensor as if its base had no towers for images and sound."""
    return PREFIX + (text_name(name.removeprefix(PREFIX)) or name)


def _layers_prefix(base: str) -> str:
    """What the names of a base's layers begin with in transformers."""
    path = Path(base) / "config.json"
    return "model.language_model." if path.exists() and "text_config" in read_json(path) else "model."


def _names_in(directory: Path) -> list[str]:
    with _opened(directory) as file:
        return list(file.keys())


def _tensors(directory: Path) -> dict[str, np.ndarray]:
    with _opened(directory) as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (safe_open has no __iter__)


def _opened(directory: Path) -> Any:
    path = directory / TENSORS
    if not path.exists():
        raise FileNotFoundError(f"{path}: the file is missing; a PEFT directory must have it.")
    try:
        return safe_open(path, framework="np")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: not a readable safetensors file ({error}).") from error
