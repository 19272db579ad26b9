"""What Gemma 4 has that no other family has, from and to config.json."""

from typing import Any

from tpaw_jax.models.checkpoints.config_fields import flag, positive_int
from tpaw_jax.models.model_config import ModelConfig

GLOBAL_FIELDS = ("head_dim", "num_key_value_heads")
"""What `per_layer_config` may say about the layers without a window."""


def options_of(fields: dict[str, Any], layers: int, where: str) -> dict[str, Any]:
    """The fields of `ModelConfig` about heads of two sizes, shared keys and values, tokens' features and experts.

    Raises:
        ValueError: a number is missing or wrong, or layers differ in ways that are not supported. Names the field.
    """
    size = positive_int(fields, "intermediate_size", where, 0)
    options: dict[str, Any] = _global_heads(fields, where)
    if fields.get("num_kv_shared_layers"):
        sharing = positive_int(fields, "num_kv_shared_layers", where, 0)
        if sharing >= layers:
            raise ValueError(f"{where}: num_kv_shared_layers is {sharing}; it must be less than the {layers} layers.")
        options |= {
            "kv_shared_layers": sharing,
            "kv_shared_size": size * (1 + flag(fields, "use_double_wide_mlp", where)),
        }
    if fields.get("hidden_size_per_layer_input"):
        options["token_features"] = positive_int(fields, "hidden_size_per_layer_input", where, 0)
        table, vocabulary = fields.get("vocab_size_per_layer_input"), fields.get("vocab_size")
        if table != vocabulary:
            raise ValueError(
                f"{where}: vocab_size_per_layer_input is {table!r}; supported is vocab_size, which is {vocabulary!r}."
            )
    if flag(fields, "enable_moe_block", where):
        names = {
            "num_experts": "num_experts",
            "experts_per_token": "top_k_experts",
            "expert_size": "moe_intermediate_size",
        }
        options |= {field: positive_int(fields, name, where, 0) for field, name in names.items()}
        options |= {"normalized_experts": True, "experts_beside_dense": True}
        if options["experts_per_token"] > options["num_experts"]:
            raise ValueError(
                f"{where}: top_k_experts is {options['experts_per_token']}, but a layer has only "
                f"{options['num_experts']} experts."
            )
    return options


def _global_heads(fields: dict[str, Any], where: str) -> dict[str, Any]:
    """Heads of the layers without a window: in files of transformers 5 in `per_layer_config`, else in own fields."""
    of_layers = fields.get("per_layer_config")
    layers: list[Any] = list(of_layers.values()) if isinstance(of_layers, dict) else [None] * (of_layers is not None)
    if any(not isinstance(one, dict) or one != layers[0] or one.keys() - set(GLOBAL_FIELDS) for one in layers):
        raise ValueError(
            f"{where}: per_layer_config must give all layers without a window the same {' and '.join(GLOBAL_FIELDS)}."
        )
    heads = positive_int(fields, "num_attention_heads", where, 0)
    kv_heads = positive_int(fields, "num_key_value_heads", where, heads)
    keys_as_values = flag(fields, "attention_k_eq_v", where)
    if of_layers is not None:  # sizes that do not differ are left out
        given = {"head_dim": fields["head_dim"], "num_key_value_heads": kv_heads, **(layers[0] if layers else {})}
    else:
        own = fields.get("num_global_key_value_heads") if keys_as_values else None
        given = {"head_dim": fields["global_head_dim"], "num_key_value_heads": own or kv_heads}
    size, kv_heads = (positive_int(given, name, f"{where}, layers without a window", 0) for name in GLOBAL_FIELDS)
    own = positive_int(fields, "num_key_value_heads", where, heads)
    if kv_heads != own and not keys_as_values:
        raise ValueError(
            f"{where}: layers without a window have {kv_heads} key-value heads and the others {own}; this is supported "
            "only if attention_k_eq_v is true."
        )
    if size % 2 or heads % kv_heads:
        raise ValueError(
            f"{where}: layers without a window have a head_dim of {size} and {kv_heads} key-value heads; the first "
            f"must be even, the second must divide the {heads} heads."
        )
    return {"global_head_dim": size, "global_kv_heads": kv_heads, "keys_as_values": keys_as_values}


def check_layers(config: ModelConfig, fields: dict[str, Any], where: str) -> None:
    """Check what config.json says about single layers.

    Raises:
        ValueError: `per_layer_config` is not about the layers without a window, or a layer without keys of its own has
            none of its kind before it. Names the file and the field.
    """
    of_layers = fields.get("per_layer_config")
    without = [layer for layer, kind in enumerate(config.layer_kinds) if kind.window is None]
    if isinstance(of_layers, dict) and of_layers and sorted(map(str, of_layers)) != sorted(map(str, without)):
        raise ValueError(
            f"{where}: per_layer_config is about the layers {', '.join(map(str, of_layers))}; supported are the layers "
            f"without a window, {', '.join(map(str, without))}."
        )
    if not config.kv_shared_layers:
        return
    first = config.num_layers - config.kv_shared_layers
    own = {config.stack_of(i) for i in range(first)}
    for layer in range(first, config.num_layers):
        if config.stack_of(layer).removeprefix("kv_shared_") not in own:
            raise ValueError(
                f"{where}: num_kv_shared_layers is {config.kv_shared_layers}, so layer {layer} needs the keys and "
                "values of an earlier layer of its type, and there is none."
            )


def to_fields(config: ModelConfig, fields: dict[str, Any]) -> dict[str, Any]:
    """The fields of config.json, from those that all families have."""
    scaling: dict[str, Any] = fields.pop("rope_scaling", None) or {"rope_type": "default"}
    return fields | {
        "rope_parameters": {
            "full_attention": {**scaling, "rope_theta": fields.pop("rope_theta")},
            "sliding_attention": {"rope_type": "default", "rope_theta": fields.pop("rope_local_base_freq")},
        },
        "global_head_dim": config.global_head_dim,
        "num_global_key_value_heads": config.global_kv_heads,
        "attention_k_eq_v": config.keys_as_values,
        "num_kv_shared_layers": config.kv_shared_layers,
        "use_double_wide_mlp": config.kv_shared_size > config.intermediate_size,
        "hidden_size_per_layer_input": config.token_features,
        "vocab_size_per_layer_input": config.vocab_size,
        "enable_moe_block": bool(config.num_experts),
        "num_experts": config.num_experts or None,
        "top_k_experts": config.experts_per_token or None,
        "moe_intermediate_size": config.expert_size or None,
    }
