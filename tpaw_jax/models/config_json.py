"""Hugging Face's config.json <-> `ModelConfig`."""

from __future__ import annotations

from typing import Any

from tpaw_jax.models.attention import RopeScaling
from tpaw_jax.models.transformer import ModelConfig

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}


def from_dict(fields: dict[str, Any], where: str) -> ModelConfig:
    """The `ModelConfig` of a parsed config.json (transformers 4 and 5 spell rope differently; both are read).

    Raises:
        ValueError: the architecture or one of its options is not supported, or a field is missing; names `where`.
    """

    def need(name: str) -> Any:
        if fields.get(name) is None:
            raise ValueError(f"{where}: the field '{name}' is missing; a {model_type} config.json needs it.")
        return fields[name]

    model_type = fields.get("model_type")
    if model_type not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise ValueError(f"{where}: model_type {model_type!r} is not supported; supported are {known}.")
    _reject_options(fields, model_type, where)
    heads = need("num_attention_heads")
    theta, scaling = _rope(fields, where)
    return ModelConfig(
        model_type=model_type,
        vocab_size=need("vocab_size"),
        hidden_size=need("hidden_size"),
        intermediate_size=need("intermediate_size"),
        num_layers=need("num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=fields.get("num_key_value_heads") or heads,
        head_dim=fields.get("head_dim") or need("hidden_size") // heads,
        rope_theta=theta,
        rope_scaling=scaling,
        rms_norm_eps=need("rms_norm_eps"),
        max_position_embeddings=need("max_position_embeddings"),
        tie_embeddings=bool(fields.get("tie_word_embeddings", False)),
        qkv_bias=model_type == "qwen2",
        qk_norm=model_type == "qwen3",
    )


def to_dict(config: ModelConfig, dtype: str) -> dict[str, Any]:
    """The config.json fields of a `ModelConfig`, in the spelling that transformers 4 and 5 both read."""
    fields: dict[str, Any] = {
        "architectures": [ARCHITECTURES[config.model_type]],
        "model_type": config.model_type,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": config.rms_norm_eps,
        "max_position_embeddings": config.max_position_embeddings,
        "tie_word_embeddings": config.tie_embeddings,
        "rope_theta": config.rope_theta,
        "torch_dtype": dtype,
    }
    if config.rope_scaling is not None:
        fields["rope_scaling"] = {"rope_type": "llama3", **config.rope_scaling._asdict()}
    if config.model_type == "mistral":
        fields["sliding_window"] = None
    return fields


def _reject_options(fields: dict[str, Any], model_type: str, where: str) -> None:
    """Raise for options that would change the function the model computes."""
    if fields.get("hidden_act", "silu") != "silu":
        raise ValueError(f"{where}: hidden_act {fields['hidden_act']!r} is not supported, only 'silu' is.")
    for option in ("attention_bias", "mlp_bias"):
        if fields.get(option):
            raise ValueError(f"{where}: {option} is true, which is not supported for {model_type}.")
    window = fields.get("sliding_window")
    uses_window = model_type == "mistral" or fields.get("use_sliding_window", False)
    if uses_window and window is not None and window < fields.get("max_position_embeddings", 0):
        raise ValueError(
            f"{where}: sliding_window is {window}, below max_position_embeddings; windowed attention is not supported."
        )


def _rope(fields: dict[str, Any], where: str) -> tuple[float, RopeScaling | None]:
    parameters = fields.get("rope_parameters") or {}
    scaling = parameters or fields.get("rope_scaling") or {}
    theta = float(parameters.get("rope_theta", fields.get("rope_theta") or 10000.0))
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind == "default":
        return theta, None
    if kind != "llama3":
        raise ValueError(f"{where}: rope type {kind!r} is not supported; supported are 'default' and 'llama3'.")
    missing = [name for name in RopeScaling._fields if name not in scaling]
    if missing:
        raise ValueError(f"{where}: the llama3 rope scaling misses {', '.join(missing)}.")
    return theta, RopeScaling(*(scaling[name] for name in RopeScaling._fields))
