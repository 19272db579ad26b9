"""Convert between Hugging Face's config.json and `ModelConfig`."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from tpaw_jax.models.rope import ROPE_FIELDS, RopeScaling
from tpaw_jax.models.transformer import ModelConfig


class Family(NamedTuple):
    """What sets a family apart from Llama."""

    architecture: str
    options: Mapping[str, Any] = {}  # fields of `ModelConfig`
    multipliers: tuple[str, ...] = ()  # numbers of config.json that are fields of `ModelConfig` too


FAMILIES = {  # by model_type
    "llama": Family("LlamaForCausalLM"),
    "mistral": Family("MistralForCausalLM"),
    "qwen2": Family("Qwen2ForCausalLM", {"qkv_bias": True}),
    "qwen3": Family("Qwen3ForCausalLM", {"qk_norm": True}),
    "olmo2": Family("Olmo2ForCausalLM", {"qk_norm_all": True, "post_norm": True}),
    "smollm3": Family("SmolLM3ForCausalLM"),
    "phi3": Family("Phi3ForCausalLM", {"fused": True}),
    "granite": Family(
        "GraniteForCausalLM",
        multipliers=("embedding_multiplier", "residual_multiplier", "attention_multiplier", "logits_scaling"),
    ),
}


WINDOWED = ("mistral", "phi3")
"""The families that use `sliding_window` if it is there; others need `use_sliding_window`."""


def from_dict(fields: dict[str, Any], where: str) -> ModelConfig:
    """Build a `ModelConfig` from a parsed config.json, as written by transformers 4 or 5.

    Args:
        fields: the content of config.json.
        where: the file's name, for error messages.

    Raises:
        ValueError: the architecture or one of its options is not supported, a field is missing, or a number is not
            positive. Names `where` and the field.
    """
    model_type = fields.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        known = ", ".join(FAMILIES)
        raise ValueError(f"{where}: model_type {model_type!r} is not supported; supported are {known}.")
    _reject_options(fields, model_type, where)
    positive = lambda name, default=0: _positive_int(fields, name, where, default)
    heads, hidden = positive("num_attention_heads"), positive("hidden_size")
    kv_heads, head_dim = positive("num_key_value_heads", heads), positive("head_dim", max(1, hidden // heads))
    if heads % kv_heads:
        raise ValueError(f"{where}: num_key_value_heads is {kv_heads}; it must divide the model's {heads} heads.")
    if head_dim % 2:
        raise ValueError(f"{where}: head_dim is {head_dim}; rotary embeddings need an even number.")
    theta, scaling = _rope(fields, where)
    family = FAMILIES[model_type]
    number = lambda name: float(_positive_number(_required(fields, name, where), name, where))
    options: dict[str, Any] = {**family.options, **{name: number(name) for name in family.multipliers}}
    return ModelConfig(
        model_type=model_type,
        vocab_size=positive("vocab_size"),
        hidden_size=hidden,
        intermediate_size=positive("intermediate_size"),
        num_layers=positive("num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        rope_theta=theta,
        rope_scaling=scaling,
        rms_norm_eps=_positive_number(_required(fields, "rms_norm_eps", where), "rms_norm_eps", where),
        max_position_embeddings=positive("max_position_embeddings"),
        tie_embeddings=bool(fields.get("tie_word_embeddings", False)),
        rope_layers=_rope_layers(fields, positive("num_hidden_layers"), where) if model_type == "smollm3" else None,
        **options,
    )


def to_dict(config: ModelConfig, dtype: str) -> dict[str, Any]:
    """Build the config.json fields of a `ModelConfig`, in the form that transformers 4 and 5 both read."""
    fields: dict[str, Any] = {
        "architectures": [FAMILIES[config.model_type].architecture],
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
        "pad_token_id": None,  # some families' default is beyond a smaller vocabulary
        **{name: getattr(config, name) for name in FAMILIES[config.model_type].multipliers},
    }
    if config.rope_scaling is not None:
        fields["rope_scaling"] = {"rope_type": config.rope_scaling.rope_type, **dict(config.rope_scaling.parameters)}
    if config.model_type in WINDOWED:
        fields["sliding_window"] = None
    if config.rope_layers is not None:
        fields["no_rope_layers"] = [int(rotates) for rotates in config.rope_layers]
    return fields


def _reject_options(fields: dict[str, Any], model_type: str, where: str) -> None:
    """Reject options that would change what the model computes."""
    quantized = fields.get("quantization_config")
    if quantized:
        method = quantized.get("quant_method") if isinstance(quantized, dict) else quantized
        raise ValueError(
            f"{where}: quantization_config is set (quant_method {method!r}), but quantized weights cannot be trained; "
            "use the checkpoint that they were made from, or one with dequantized weights."
        )
    if fields.get("hidden_act", "silu") != "silu":
        raise ValueError(f"{where}: hidden_act {fields['hidden_act']!r} is not supported; supported is 'silu'.")
    for option in ("attention_bias", "mlp_bias"):
        if fields.get(option):
            raise ValueError(f"{where}: {option} is true, which is not supported for {model_type}.")
    window = fields.get("sliding_window")
    uses_window = model_type in WINDOWED or fields.get("use_sliding_window", False)
    longest = fields.get("max_position_embeddings")
    numbers = type(window) in (int, float) and type(longest) in (int, float)
    if uses_window and window is not None and (not numbers or window < longest):
        raise ValueError(
            f"{where}: sliding_window is {window!r}, but must be at least max_position_embeddings ({longest!r}); "
            "windowed attention is not supported."
        )


def _rope(fields: dict[str, Any], where: str) -> tuple[float, RopeScaling | None]:
    parameters = fields.get("rope_parameters") or {}
    scaling = parameters or fields.get("rope_scaling") or {}
    if not isinstance(parameters, dict) or not isinstance(scaling, dict):
        raise ValueError(f"{where}: rope_parameters or rope_scaling is not a JSON object.")
    theta = _positive_number(parameters.get("rope_theta", fields.get("rope_theta") or 10000.0), "rope_theta", where)
    partial = parameters.get("partial_rotary_factor", fields.get("partial_rotary_factor"))
    if partial not in (None, 1, 1.0):
        raise ValueError(f"{where}: partial_rotary_factor is {partial!r}; supported is 1, the whole head.")
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind == "default":
        return theta, None
    if kind not in ROPE_FIELDS:
        known = ", ".join(map(repr, ("default", *ROPE_FIELDS)))
        raise ValueError(f"{where}: rope type {kind!r} is not supported; supported are {known}.")
    needed, optional = ROPE_FIELDS[kind]
    if kind == "yarn":  # as in transformers
        scaling = {"original_max_position_embeddings": fields.get("max_position_embeddings"), **scaling}
    missing = [name for name in needed if scaling.get(name) is None]
    if missing:
        raise ValueError(f"{where}: {kind} rope scaling needs the missing fields {', '.join(missing)}.")
    given = [name for name in (*needed, *optional) if scaling.get(name) is not None]
    number = lambda name: bool(scaling[name]) if name == "truncate" else _positive_number(scaling[name], name, where)
    return theta, RopeScaling(kind, tuple((name, number(name)) for name in given))


def _rope_layers(fields: dict[str, Any], layers: int, where: str) -> tuple[bool, ...] | None:
    given, interval = fields.get("no_rope_layers"), fields.get("no_rope_layer_interval") or 4
    given = [int((i + 1) % interval != 0) for i in range(layers)] if given is None else given
    if not isinstance(given, list) or len(given) != layers or not all(one in (0, 1) for one in given):
        raise ValueError(f"{where}: no_rope_layers must have a 0 or 1 for each of the {layers} layers.")
    return None if all(given) else tuple(map(bool, given))


def _required(fields: dict[str, Any], name: str, where: str) -> Any:
    if fields.get(name) is None:
        raise ValueError(f"{where}: the field '{name}' is missing; a {fields['model_type']} config.json needs it.")
    return fields[name]


def _positive_int(fields: dict[str, Any], name: str, where: str, default: int) -> int:
    """A field; `default`, unless it is 0, replaces one that is absent, null or 0."""
    value = (fields.get(name) or default) if default else _required(fields, name, where)
    if type(value) is not int or not 0 < value < 2**31:
        raise ValueError(f"{where}: the field '{name}' is {value!r}; a positive integer was expected.")
    return value


def _positive_number(value: Any, name: str, where: str) -> Any:
    if type(value) not in (int, float) or not 0 < value < 1e30:
        raise ValueError(f"{where}: the field '{name}' is {value!r}; a positive number was expected.")
    return value
