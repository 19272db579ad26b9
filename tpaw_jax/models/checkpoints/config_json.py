"""The architecture of a model from and to Hugging Face's config.json."""

from typing import Any

from tpaw_jax.models.checkpoints import gemma4
from tpaw_jax.models.checkpoints.config_fields import flag, positive_int, positive_number, required
from tpaw_jax.models.model_config import FAMILIES, Family, ModelConfig
from tpaw_jax.models.rope import ROPE_FIELDS, RopeScaling

GEMMA = ("gemma2", "gemma3_text", "gemma4_text")

MOST_LAYERS = 10_000
"""More than any model has; a larger number in config.json is a mistake that would fill the host's memory."""

LONGROPE_FACTORS = ("short_factor", "long_factor")

CAPS = {"attention_cap": "attn_logit_softcapping", "logits_cap": "final_logit_softcapping"}
"""Fields of `ModelConfig` about soft caps, and their names in config.json."""


def from_dict(fields: dict[str, Any], where: str) -> ModelConfig:
    """Build a `ModelConfig` from a parsed config.json, as written by transformers 4 or 5.

    Args:
        fields: the content of config.json.
        where: the file's name, for error messages.

    Raises:
        ValueError: the architecture or one of its options is not supported, a field is missing, or a number is not
            positive. Names `where` and the field.
    """
    fields = _of_supported_family(fields, where)
    model_type = fields["model_type"]
    positive = lambda name, default=0: positive_int(fields, name, where, default)
    heads, hidden = positive("num_attention_heads"), positive("hidden_size")
    kv_heads, head_dim = positive("num_key_value_heads", heads), _head_dim(fields, where)
    if heads % kv_heads:
        raise ValueError(f"{where}: num_key_value_heads is {kv_heads}; it must divide the model's {heads} heads.")
    if head_dim % 2:
        raise ValueError(f"{where}: head_dim is {head_dim}; rotary embeddings need an even number.")
    family, layers = FAMILIES[model_type], positive("num_hidden_layers")
    if layers > MOST_LAYERS:
        raise ValueError(f"{where}: num_hidden_layers is {layers}; at most {MOST_LAYERS} are supported.")
    ropes, local_theta = _rope_of_layers(fields, where)
    theta, scaling = _rope(ropes, where)
    config = ModelConfig(
        model_type=model_type,
        vocab_size=positive("vocab_size"),
        hidden_size=hidden,
        intermediate_size=positive("intermediate_size"),
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        rope_theta=theta,
        rope_scaling=scaling,
        rotary_fraction=_rotary_fraction(fields, where),
        rms_norm_eps=positive_number(required(fields, "rms_norm_eps", where), "rms_norm_eps", where),
        max_position_embeddings=positive("max_position_embeddings"),
        tie_embeddings=flag(fields, "tie_word_embeddings", where),
        rope_layers=_rope_layers(fields, layers, where) if model_type == "smollm3" else None,
        local_rope_theta=local_theta,
        **family.options,
        **_windows(fields, family, layers, where),
        **(gemma4.options_of(fields, layers, where) if family.global_heads else _experts(fields, family, where)),
        **_multipliers_and_caps(fields, family, where),
    )
    if family.global_heads:
        gemma4.check_layers(config, fields, where)
    return config


def _multipliers_and_caps(fields: dict[str, Any], family: Family, where: str) -> dict[str, Any]:
    """The fields of `ModelConfig` about multipliers and soft caps."""
    number = lambda name: float(positive_number(required(fields, name, where), name, where))
    options: dict[str, Any] = {name: number(name) for name in family.multipliers}
    options |= {field: _cap(fields, CAPS[field], where) for field in family.caps}
    if fields["model_type"] in GEMMA:
        options["embedding_multiplier"] = float(fields["hidden_size"]) ** 0.5
    if fields["model_type"] in GEMMA and "attention_multiplier" not in family.options:
        options["attention_multiplier"] = number("query_pre_attn_scalar") ** -0.5
    return options


def _of_supported_family(fields: dict[str, Any], where: str) -> dict[str, Any]:
    """The fields of the text model, with the defaults of its family, if all of them are supported."""
    model_type, text = fields.get("model_type"), fields.get("text_config")
    if model_type in ("gemma3", "gemma4") and isinstance(text, dict):  # beside towers that are left out
        above: dict[str, Any] = {
            name: fields[name] for name in ("quantization_config", "tie_word_embeddings") if name in fields
        }
        model_type = f"{model_type}_text"
        fields = {**text, **above, "model_type": model_type}
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        known = ", ".join(FAMILIES)
        raise ValueError(f"{where}: model_type {model_type!r} is not supported; supported are {known}.")
    given = {name: value for name, value in fields.items() if value is not None or name != "rope_parameters"}
    fields = {**FAMILIES[model_type].defaults, **given}
    _reject_options(fields, model_type, where)
    return fields


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
        "hidden_act": config.activation,
        "rms_norm_eps": config.rms_norm_eps,
        "max_position_embeddings": config.max_position_embeddings,
        "tie_word_embeddings": config.tie_embeddings,
        "rope_theta": config.rope_theta,
        "torch_dtype": dtype,
        "pad_token_id": None,  # some families' default is beyond a smaller vocabulary
        **{name: getattr(config, name) for name in FAMILIES[config.model_type].multipliers},
        **_fields_of_layers(config),
        **{name: getattr(config, field) for field, name in FAMILIES[config.model_type].experts.items()},
    }
    if config.num_experts and FAMILIES[config.model_type].experts and config.model_type != "mixtral":
        dense = [i for i, is_dense in enumerate(config.dense_layers or ()) if is_dense]
        fields |= {"norm_topk_prob": config.normalized_experts, "decoder_sparse_step": 1, "mlp_only_layers": dense}
    if config.rope_scaling is not None:
        fields |= _rope_fields(config.rope_scaling, config.max_position_embeddings)
    if config.rotary_fraction != 1.0:
        fields["partial_rotary_factor"] = config.rotary_fraction
    fields |= {CAPS[field]: getattr(config, field) for field in FAMILIES[config.model_type].caps}
    if config.model_type in GEMMA:
        fields["hidden_activation"] = fields.pop("hidden_act")
    if FAMILIES[config.model_type].global_heads:
        fields = gemma4.to_fields(config, fields)
    elif config.model_type in GEMMA:
        scalar = (config.attention_multiplier or 1.0) ** -2
        fields["query_pre_attn_scalar"] = round(scalar) if abs(scalar - round(scalar)) < 1e-6 * scalar else scalar
    return fields


def _rope_fields(scaling: RopeScaling, positions: int) -> dict[str, Any]:
    parameters: dict[str, Any] = {name: list(x) if isinstance(x, tuple) else x for name, x in scaling.parameters}
    if scaling.rope_type == "dynamic":
        parameters.pop("original_max_position_embeddings")
    if scaling.rope_type != "longrope":
        return {"rope_scaling": {"rope_type": scaling.rope_type, **parameters}}
    original = parameters.pop("original_max_position_embeddings")  # transformers 4 allows exactly three fields for Phi
    if parameters["factor"] == positions / original:
        parameters.pop("factor")
    return {"rope_scaling": {"type": "longrope", **parameters}, "original_max_position_embeddings": original}


def _fields_of_layers(config: ModelConfig) -> dict[str, Any]:
    """The fields about windows and rope that differ between layers."""
    rule, window = FAMILIES[config.model_type].window, config.sliding_window
    if config.model_type == "smollm3":
        return {"no_rope_layers": [int(rotates) for rotates in config.rope_layers or [True] * config.num_layers]}
    if rule == "all":
        return {"sliding_window": window}
    if not rule or (rule == "if used" and window is None):
        return {}
    windowed = [kind.window is not None for kind in config.layer_kinds]
    fields: dict[str, Any] = {"sliding_window": window}
    fields["layer_types"] = ["sliding_attention" if one else "full_attention" for one in windowed]
    if rule == "if used":
        return fields | {"use_sliding_window": True, "max_window_layers": windowed.index(True)}
    return fields if config.local_rope_theta is None else fields | {"rope_local_base_freq": config.local_rope_theta}


def _reject_options(fields: dict[str, Any], model_type: str, where: str) -> None:
    """Reject options that would change what the model computes."""
    quantized = fields.get("quantization_config")
    if quantized:
        method = quantized.get("quant_method") if isinstance(quantized, dict) else quantized
        raise ValueError(
            f"{where}: quantization_config is set (quant_method {method!r}), but quantized weights cannot be trained; "
            "use the checkpoint that they were made from, or one with dequantized weights."
        )
    wanted = FAMILIES[model_type].options.get("activation", "silu")
    activation = fields.get("hidden_activation") or fields.get("hidden_act", wanted)
    if activation != wanted:
        raise ValueError(f"{where}: hidden_act {activation!r} is not supported; supported is {wanted!r}.")
    refused = ["use_bidirectional_attention", *(CAPS[field] for field in CAPS.keys() - set(FAMILIES[model_type].caps))]
    for option in sorted(refused):
        of_images = option == "use_bidirectional_attention" and fields.get(option) == "vision"
        if fields.get(option) and not of_images:
            raise ValueError(f"{where}: {option} is {fields[option]!r}, which is not supported for {model_type}.")
    for option in ("attention_bias", "mlp_bias"):
        if flag(fields, option, where):
            raise ValueError(f"{where}: {option} is true, which is not supported for {model_type}.")
    if fields.get("per_layer_config") is not None and not FAMILIES[model_type].global_heads:
        raise ValueError(f"{where}: per_layer_config is set, which is not supported for {model_type}.")


def _windows(fields: dict[str, Any], family: Family, layers: int, where: str) -> dict[str, Any]:
    """The fields of `ModelConfig` about sliding windows."""
    types = fields.get("layer_types")
    if not family.window:
        if fields["model_type"] == "smollm3" and flag(fields, "use_sliding_window", where):
            raise ValueError(f"{where}: use_sliding_window is true, which is not supported for smollm3.")
        return {}
    if family.window == "if used" and not flag(fields, "use_sliding_window", where):
        return {}
    if family.window != "by type" and fields.get("sliding_window") is None:
        return {}
    window = positive_int(fields, "sliding_window", where, 0)
    if family.window == "all":
        if types is not None and (not isinstance(types, list) or set(map(str, types)) != {"sliding_attention"}):
            raise ValueError(f"{where}: layer_types is set, which is not supported for {fields['model_type']}.")
        return {"sliding_window": window}
    if types is None and family.window == "by type":
        pattern = positive_int(fields, "sliding_window_pattern", where, family.full_every)
        types = ["full_attention" if (i + 1) % pattern == 0 else "sliding_attention" for i in range(layers)]
    elif types is None:
        first = fields.get("max_window_layers")
        if type(first) is not int:
            raise ValueError(f"{where}: the field 'max_window_layers' is {first!r}; an integer was expected.")
        types = ["full_attention" if i < first else "sliding_attention" for i in range(layers)]
    if family.global_heads and isinstance(types, list):  # as in transformers
        types = [*types[:-1], "full_attention"]
    known = ("full_attention", "sliding_attention")
    if not isinstance(types, list) or len(types) != layers or any(one not in known for one in types):
        raise ValueError(f"{where}: layer_types must have one of {', '.join(known)} for each of the {layers} layers.")
    windowed = tuple(one == "sliding_attention" for one in types)
    if not any(windowed) and family.window == "if used":
        return {}
    return {"sliding_window": window} | ({} if all(windowed) else {"window_layers": windowed})


def _experts(fields: dict[str, Any], family: Family, where: str) -> dict[str, Any]:
    """The fields of `ModelConfig` about experts."""
    if not family.experts:
        return {}
    if "num_local_experts" in fields:  # transformers 5 knows the number under this name too
        fields = {"num_experts": fields["num_local_experts"], **fields}
    model_type = fields["model_type"]
    supported_options = {"use_sliding_window": False} | ({"qkv_bias": True} if model_type == "qwen2_moe" else {})
    for option, supported in supported_options.items():
        if model_type != "mixtral" and fields.get(option, supported) != supported:
            raise ValueError(f"{where}: {option} is {fields[option]!r}, which is not supported for {model_type}.")
    options: dict[str, Any] = {field: positive_int(fields, name, where, 0) for field, name in family.experts.items()}
    if options["experts_per_token"] > options["num_experts"]:
        raise ValueError(
            f"{where}: num_experts_per_tok is {options['experts_per_token']}, but a layer has only "
            f"{options['num_experts']} experts."
        )
    if "normalized_experts" not in family.options:
        options["normalized_experts"] = flag(fields, "norm_topk_prob", where)
    return options | _dense_layers(fields, where)


def _dense_layers(fields: dict[str, Any], where: str) -> dict[str, Any]:
    """Which layers of a mixture of experts have none: those of mlp_only_layers, and all but every n-th layer."""
    layers, given = positive_int(fields, "num_hidden_layers", where, 0), fields.get("mlp_only_layers") or []
    every = positive_int(fields, "decoder_sparse_step", where, 1)
    if not isinstance(given, list) or any(type(one) is not int for one in given):
        raise ValueError(f"{where}: mlp_only_layers is {given!r}; a list of the numbers of layers was expected.")
    dense = tuple(i in given or (i + 1) % every != 0 for i in range(layers))
    if all(dense):
        raise ValueError(
            f"{where}: mlp_only_layers is {given!r} and decoder_sparse_step is {every}, so no layer has experts."
        )
    return {"dense_layers": dense} if any(dense) else {}


def _rope_of_layers(fields: dict[str, Any], where: str) -> tuple[dict[str, Any], float | None]:
    """The fields with the rope of layers without a window, and theta of those with one if it may differ."""
    if "rope_local_base_freq" not in fields and not FAMILIES[fields["model_type"]].global_heads:
        return fields, None
    parameters, local = fields.get("rope_parameters"), {"rope_theta": fields.get("rope_local_base_freq")}
    if isinstance(parameters, dict) and "full_attention" in parameters:
        whole, windowed = parameters["full_attention"], parameters.get("sliding_attention") or {}
        if not isinstance(whole, dict) or not isinstance(windowed, dict):
            raise ValueError(f"{where}: full_attention and sliding_attention of rope_parameters must be JSON objects.")
        turned = whole.get("partial_rotary_factor")
        if turned not in (None, 1, 1.0) and whole.get("rope_type", "default") == "default":
            raise ValueError(
                f"{where}: full_attention has a partial_rotary_factor of {turned!r} with the rope type 'default'; "
                "supported is 'proportional'."
            )
        fields = {**fields, "rope_parameters": whole}
        local |= windowed
    theta, scaling = _rope({"model_type": fields["model_type"], "rope_parameters": local}, where)
    if scaling is not None:
        raise ValueError(f"{where}: sliding_attention has the rope type {scaling.rope_type!r}; supported is 'default'.")
    return fields, float(theta)


def _rope(fields: dict[str, Any], where: str) -> tuple[float, RopeScaling | None]:
    scaling = fields.get("rope_scaling") or fields.get("rope_parameters") or {}
    if not isinstance(scaling, dict):
        raise ValueError(f"{where}: rope_parameters or rope_scaling is not a JSON object.")
    theta = positive_number(scaling.get("rope_theta", fields.get("rope_theta") or 10000.0), "rope_theta", where)
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    kind = "longrope" if kind == "su" else kind  # its name in early files of Phi-3
    supported = FAMILIES[fields["model_type"]].ropes if "model_type" in fields else ("default", *ROPE_FIELDS)
    if not isinstance(kind, str) or kind not in supported:
        known = ", ".join(map(repr, supported))
        raise ValueError(f"{where}: rope type {kind!r} is not supported; supported are {known}.")
    if kind == "default":
        return theta, None
    needed, optional = ROPE_FIELDS[kind]
    context = fields.get("max_position_embeddings")
    if kind == "dynamic":
        scaling = {**scaling, "original_max_position_embeddings": context}
    elif kind != "linear":  # as in transformers
        positions = fields.get("original_max_position_embeddings")
        given = scaling.get("original_max_position_embeddings", context)
        scaling = {**scaling, "original_max_position_embeddings": positions or given}
    if kind == "longrope":
        original = positive_int(scaling, "original_max_position_embeddings", where, 0)
        if original == 1:
            raise ValueError(f"{where}: the field 'original_max_position_embeddings' is 1; longrope needs more than 1.")
        positions = positive_int(fields, "max_position_embeddings", where, 0)
        scaling["factor"] = scaling.get("factor") or positions / original
    missing = [name for name in needed if scaling.get(name) is None]
    if missing:
        raise ValueError(f"{where}: {kind} rope scaling needs the missing fields {', '.join(missing)}.")
    if kind == "yarn" and theta <= 1:
        raise ValueError(f"{where}: the field 'rope_theta' is {theta!r}; yarn needs more than 1.")
    given = {name: scaling[name] for name in needed} | {name: scaling[name] for name in optional if scaling.get(name)}
    if kind == "proportional" and positive_number(given["partial_rotary_factor"], "partial_rotary_factor", where) > 1:
        share = given["partial_rotary_factor"]
        raise ValueError(f"{where}: partial_rotary_factor is {share!r}; it must be at most 1.")
    truncate = scaling.get("truncate", True)
    if type(truncate) is not bool:
        raise ValueError(f"{where}: the field 'truncate' is {truncate!r}; true or false was expected.")
    given.pop("truncate", None)
    lists = {name: _factors(given.pop(name), name, fields, where) for name in LONGROPE_FACTORS if name in given}
    numbers = {name: positive_number(value, name, where) for name, value in given.items()}
    return theta, RopeScaling(kind, tuple((numbers | lists | ({} if truncate else {"truncate": False})).items()))


def _factors(value: Any, name: str, fields: dict[str, Any], where: str) -> tuple[float, ...]:
    """The factors of longrope, one for each pair of rotated features."""
    size = int(_head_dim(fields, where) * _rotary_fraction(fields, where)) // 2
    if not isinstance(value, list | tuple) or len(value) != size:
        raise ValueError(f"{where}: {name} must be a list of {size} numbers, one for each pair of rotated features.")
    return tuple(float(positive_number(one, name, where)) for one in value)


def _head_dim(fields: dict[str, Any], where: str) -> int:
    heads, hidden = (positive_int(fields, name, where, 0) for name in ("num_attention_heads", "hidden_size"))
    return positive_int(fields, "head_dim", where, max(1, hidden // heads))


def _rotary_fraction(fields: dict[str, Any], where: str) -> float:
    """The share of a head's features that is rotated."""
    parameters = fields.get("rope_parameters") or fields.get("rope_scaling") or {}
    within = parameters.get("partial_rotary_factor") if isinstance(parameters, dict) else None
    partial = within or fields.get("partial_rotary_factor")
    if partial in (None, 1, 1.0):
        return 1.0
    if not FAMILIES[fields["model_type"]].partial_rope:
        raise ValueError(f"{where}: partial_rotary_factor is {partial!r}; supported is 1, the whole head.")
    if positive_number(partial, "partial_rotary_factor", where) > 1:
        raise ValueError(f"{where}: partial_rotary_factor is {partial!r}; it must be at most 1.")
    if int(_head_dim(fields, where) * partial) % 2:
        raise ValueError(f"{where}: partial_rotary_factor is {partial!r}; it must give an even number of features.")
    return float(partial)


def _rope_layers(fields: dict[str, Any], layers: int, where: str) -> tuple[bool, ...] | None:
    given, interval = fields.get("no_rope_layers"), positive_int(fields, "no_rope_layer_interval", where, 4)
    given = [int((i + 1) % interval != 0) for i in range(layers)] if given is None else given
    if not isinstance(given, list) or len(given) != layers or any(one not in (0, 1) for one in given):
        raise ValueError(f"{where}: no_rope_layers must have a 0 or 1 for each of the {layers} layers.")
    return None if all(given) else tuple(map(bool, given))


def _cap(fields: dict[str, Any], name: str, where: str) -> float | None:
    return float(positive_number(fields[name], name, where)) if fields.get(name) else None
