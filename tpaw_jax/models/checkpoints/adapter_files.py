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

from tpaw_jax.models.adapters import ADAPTERS, EXPERTS, PROJECTIONS, Lora, scale_of
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

OF_EXPERTS = ("gate_up_proj", "down_proj")
"""The parameters of a module of experts, in the order in which PEFT wraps them."""

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
    parameters = fields.get("target_parameters") or []
    named = {str(name).split(".")[-1] for name in parameters} if isinstance(parameters, list) else None
    if parameters and named != set(OF_EXPERTS):
        raise ValueError(
            f"{path}: target_parameters is {parameters!r}; supported are {' and '.join(OF_EXPERTS)}, both together."
        )
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
    modules = {name.split(".lora_")[0] for name in _names_in(directory) if ".lora_" in name}
    found = {module.removesuffix(".base_layer").split(".")[-1] for module in modules}
    unknown = sorted(found - {*PROJECTIONS, EXPERTS})
    if unknown or not found:
        raise ValueError(
            f"{directory / TENSORS}: it has adapters of {', '.join(unknown) or 'nothing'}; supported are those of "
            f"{', '.join(PROJECTIONS)} and experts. Merge it into its base with PEFT's merge_and_unload()."
        )
    return tuple(name for name in (*PROJECTIONS, EXPERTS) if name in found)


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
    present = {_text_name(name): value for name, value in _tensors(directory).items()}
    names, present = _names(config), _experts_apart(present, config, str(directory / TENSORS))
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
            whole[place] = _transposed(present[hf])
        return whole.astype(shapes[name].dtype)

    placed = {name: sharding.place(stacked(name), x.sharding) for name, x in shapes.items()}
    return traverse_util.unflatten_dict(placed, sep="/")


def save(
    path: Path, config: ModelConfig, adapters: PyTree[Array], settings: Settings, base: str, tokenizer: Any = None
) -> Path:
    """Write a directory that PEFT loads: adapters, their configuration, and a tokenizer.

    It is complete or absent, as with `hub.save_pretrained`.

    Raises:
        ValueError: PEFT cannot load these adapters of this model, or something else exists at `path`.
    """
    flat = traverse_util.flatten_dict(adapters, sep="/")
    modules = {name.split("/")[-2] for name in flat}
    _check_saved(path, config, modules)
    path = check_export(path)
    partial = path.with_name(path.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    names = _names(config, _layers_prefix(base))
    tensors = {
        hf: _transposed(np.asarray(value[place]))
        for name, value in flat.items()
        for hf, place, _ in names[name].tensors(value.shape)
    }
    tensors = {name: np.ascontiguousarray(x) for name, x in _experts_joined(tensors).items()}
    save_file(tensors, partial / TENSORS, metadata={"format": "pt"})
    (partial / TENSORS).chmod(0o644)
    (partial / CONFIG).write_text(json.dumps(_config_fields(config, modules, settings, base), indent=2) + "\n")
    if tokenizer is not None:
        tokenizer.save_pretrained(partial)
    if path.exists():
        shutil.rmtree(path)
    partial.rename(path)
    return path


def _check_saved(path: Path, config: ModelConfig, modules: set[str]) -> None:
    if config.fused:
        raise ValueError(
            f"{path}: checkpoints of {config.model_type} models join projections that have adapters of their own here, "
            "so PEFT cannot load these. Export the merged model, with --merge."
        )
    if config.model_type == "qwen3_moe" and modules & {"gate", "up", "down"}:  # PEFT 0.21 converts these names
        raise ValueError(
            f"{path}: PEFT takes gate_proj, up_proj and down_proj of a qwen3_moe model for matrices of its experts, so "
            "it cannot load these adapters of its dense layers. Export the merged model, with --merge."
        )


def _config_fields(config: ModelConfig, modules: set[str], settings: Settings, base: str) -> dict[str, Any]:
    """The content of adapter_config.json for adapters of these modules."""
    experts = [f"{_experts_module(config)}.{name}" for name in OF_EXPERTS] if "expert_gate" in modules else None
    return NEUTRAL | {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": settings.rank,
        "lora_alpha": settings.alpha,
        "lora_dropout": 0.0,
        "use_rslora": settings.rslora,
        "use_dora": settings.dora,
        "target_modules": [name for name, module in PROJECTIONS.items() if module in modules],
        "target_parameters": experts,
        "inference_mode": True,
    }


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
        elif module.endswith("/expert_gate"):
            stack, stem = module.split("/")[0], f"*{PREFIX}{layers}layers.{{}}.{_experts_module(config)}"
            for path, tensor in EXPERT_TENSORS.items():
                of_adapters[f"{stack}/{path}"] = own._replace(template=f"{stem}.{tensor}")
    return of_adapters


EXPERT_TENSORS = {
    "expert_gate/lora_a": "gate_up_proj.lora_A.weight",
    "expert_gate/lora_b": "gate_proj.lora_B.weight",
    "expert_up/lora_b": "up_proj.lora_B.weight",
    "expert_down/lora_a": "down_proj.lora_A.weight",
    "expert_down/lora_b": "down_proj.lora_B.weight",
}
"""The adapters of experts and names of tensors in the form that `_experts_apart` gives them."""


def _experts_module(config: ModelConfig) -> str:
    """The name of a layer's experts in transformers."""
    return "experts" if config.experts_beside_dense else "mlp.experts"


def _experts_apart(tensors: dict[str, np.ndarray], config: ModelConfig, where: str) -> dict[str, np.ndarray]:
    """The tensors of a file, with those of experts as `EXPERT_TENSORS` names them: A [E, r, D], B [E, F, r].

    PEFT wraps gate_up_proj and then down_proj, so the former's adapters are those of `base_layer`. It has the A of all
    experts as [E r, D] and their B as [F, r E].

    Raises:
        ValueError: a tensor cannot be divided into experts. Names it.
    """
    apart, count = {}, config.num_experts
    for name, tensor in tensors.items():
        stem, _, kind = name.partition(".lora_")
        if not stem.removesuffix(".base_layer").endswith(".experts"):
            apart[name] = tensor
            continue
        if not count:
            raise ValueError(
                f"{where}: {name} does not belong to this {config.model_type} model, which has no experts."
            )
        if tensor.ndim != 2 or tensor.shape[kind.startswith("B")] % count:
            raise ValueError(f"{where}: {name} is {tensor.shape}, which is no adapter of {count} experts.")
        of, module = OF_EXPERTS[not stem.endswith(".base_layer")], stem.removesuffix(".base_layer")
        if kind.startswith("A"):
            apart[f"{module}.{of}.lora_{kind}"] = tensor.reshape(count, -1, tensor.shape[1])
            continue
        own = tensor.reshape(len(tensor), -1, count).transpose(2, 0, 1)
        parts = {"gate_proj": own[:, : len(tensor) // 2], "up_proj": own[:, len(tensor) // 2 :]}
        for part, values in (parts if of == "gate_up_proj" else {of: own}).items():
            apart[f"{module}.{part}.lora_{kind}"] = values
    return apart


def _experts_joined(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The inverse of `_experts_apart`."""
    joined = {}
    for name, tensor in tensors.items():
        module, of_experts, own = name.partition(".experts.")
        if not of_experts:
            joined[name] = tensor
            continue
        of, kind = own.split(".lora_")
        wrapped = ".experts.lora_" if of == "down_proj" else ".experts.base_layer.lora_"
        if of == "up_proj":
            continue
        if of == "gate_proj":
            tensor = np.concatenate([tensor, tensors[f"{module}.experts.up_proj.lora_{kind}"]], axis=1)
        flat = tensor if kind.startswith("A") else tensor.transpose(1, 2, 0)
        ends = (-1, flat.shape[-1]) if kind.startswith("A") else (len(flat), -1)
        joined[f"{module}{wrapped}{kind}"] = flat.reshape(ends)
    return joined


def _transposed(x: np.ndarray) -> np.ndarray:
    """A vector as it is, or with its last two axes swapped."""
    return x if x.ndim < 2 else x.swapaxes(-2, -1)


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
