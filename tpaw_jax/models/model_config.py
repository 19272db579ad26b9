"""The architecture of a model, and the families of models."""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

from tpaw_jax.models.rope import BY_LENGTH, RopeScaling

LAYERS = "layers"
"""The stack of all layers, unless some have parameters of other shapes."""


class LayerKind(NamedTuple):
    """What a layer's attention sees and how it tells positions."""

    window: int | None  # positions, that of the query included; None: all before the query
    rope_theta: float | None  # None: queries and keys are not rotated
    rope_scaling: RopeScaling | None


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The architecture. Most fields have their names of Hugging Face's config.json, or of its attributes."""

    model_type: str  # a key of `FAMILIES`
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope_theta: float
    rms_norm_eps: float
    max_position_embeddings: int
    tie_embeddings: bool
    qkv_bias: bool = False
    qk_norm: bool = False  # queries and keys are normalized, each head alone
    rope_scaling: RopeScaling | None = None
    qk_norm_all: bool = False  # queries and keys are normalized, all heads together
    pre_norm: bool = True  # attention and feed-forward normalize their input
    post_norm: bool = False  # attention and feed-forward normalize their output
    norm_offset: float = 0.0  # what is added to the scales of norms
    activation: str = "silu"  # of the feed-forward, a key of `ACTIVATIONS`
    embedding_multiplier: float = 1.0
    rounded_multiplier: bool = False  # the embedding multiplier is rounded to the compute dtype
    residual_multiplier: float = 1.0  # of the output of attention and feed-forward
    attention_multiplier: float | None = None  # of queries times keys; None: H^-0.5
    logits_scaling: float = 1.0  # what logits are divided by
    attention_cap: float | None = None  # soft cap of attention's scores
    logits_cap: float | None = None  # soft cap of logits
    rotary_fraction: float = 1.0  # the share of a head's features that is rotated
    rope_length: int = 0  # tokens of the longest sequence, for the rope types of `BY_LENGTH`; not in config.json
    rope_layers: tuple[bool, ...] | None = None  # which layers rotate queries and keys; None: all
    sliding_window: int | None = None  # positions that the layers of `window_layers` see
    window_layers: tuple[bool, ...] | None = None  # None: all, if there is a window
    local_rope_theta: float | None = None  # of the layers with a window, without scaling; None: as the others
    fused: bool = False  # checkpoints hold q, k and v as one matrix, and gate and up
    num_experts: int = 0  # of each layer; 0: layers are dense
    experts_per_token: int = 0
    expert_size: int = 0  # features of an expert
    shared_expert_size: int = 0  # features of the expert that computes all tokens; 0: there is none
    normalized_experts: bool = False  # the weights of a token's experts add up to 1
    dense_layers: tuple[bool, ...] | None = None  # which layers have no experts; None: all have, or none
    experts_beside_dense: bool = False  # experts add to a feed-forward of `intermediate_size`; their router has a norm
    global_head_dim: int = 0  # head_dim of the layers without a window; 0: as the others
    global_kv_heads: int = 0  # num_kv_heads of those layers
    keys_as_values: bool = False  # those layers project no values; they take the keys before their norm
    value_norm: bool = False  # values are normalized, each head alone, without a scale
    kv_shared_layers: int = 0  # the last layers, which read keys and values of earlier ones
    kv_shared_size: int = 0  # `intermediate_size` of those layers
    reads_keys: bool = False  # all layers do so; set by `of_stack`
    output_scale: bool = False  # a number of the checkpoint, not trained, multiplies the output of a layer
    token_features: int = 0  # features of each layer's own embedding of the tokens; 0: there is none

    @property
    def positions(self) -> int:
        """Tokens of a sequence that the model is made for; the rope of some models depends on `rope_length`."""
        if self.rope_scaling is None or self.rope_scaling.rope_type not in BY_LENGTH:
            return self.max_position_embeddings
        return max(self.rope_length, int(dict(self.rope_scaling.parameters)["original_max_position_embeddings"]))

    @property
    def rotary_size(self) -> int:
        """Features of a head that are rotated."""
        return int(self.head_dim * self.rotary_fraction)

    @property
    def dense_size(self) -> int:
        """Features of the feed-forward that computes all tokens; 0 if there is none."""
        if self.num_experts and not self.experts_beside_dense:
            return self.shared_expert_size
        return self.intermediate_size

    @property
    def active_size(self) -> int:
        """Features of all feed-forwards that compute a token."""
        return self.dense_size + self.experts_per_token * self.expert_size

    @property
    def feed_forward_sizes(self) -> tuple[int, ...]:
        """The numbers of features that tensor parallelism divides."""
        return tuple(size for size in (self.dense_size, self.expert_size) if size)

    @property
    def query_scale(self) -> float:
        """What queries are multiplied by, before attention divides by the root of H."""
        return 1.0 if self.attention_multiplier is None else self.attention_multiplier * self.head_dim**0.5

    @property
    def layer_kinds(self) -> tuple[LayerKind, ...]:
        """The kind of each layer."""
        return tuple(self._kind(i) for i in range(self.num_layers))

    @property
    def kinds(self) -> tuple[LayerKind, ...]:
        """The distinct kinds of layers."""
        return tuple(dict.fromkeys(self.layer_kinds))

    def stack_of(self, layer: int) -> str:
        """The name of the stack that holds a layer's parameters. Those of a stack have the same shapes."""
        if self.dense_layers is not None and self.dense_layers[layer]:
            return "dense_layers"
        name = "global_layers" if self.global_head_dim and not self._has_window(layer) else LAYERS
        return f"kv_shared_{name}" if layer >= self.num_layers - self.kv_shared_layers else name

    def of_stack(self, stack: str) -> "ModelConfig":
        """The architecture of a model that has the layers of one stack only."""
        own = [i for i in range(self.num_layers) if self.stack_of(i) == stack]
        if len(own) == self.num_layers and stack == LAYERS:
            return self
        select = lambda of_layers: None if of_layers is None else tuple(of_layers[i] for i in own)
        of_experts = ("num_experts", "experts_per_token", "expert_size", "shared_expert_size")
        no_experts: dict[str, Any] = dict.fromkeys(of_experts, 0) if stack == "dense_layers" else {}
        shares, is_global = stack.startswith("kv_shared_"), stack.endswith("global_layers")
        return dataclasses.replace(
            self,
            num_layers=len(own),
            window_layers=select(self.window_layers),
            rope_layers=select(self.rope_layers),
            dense_layers=None,
            **no_experts,
            head_dim=self.global_head_dim if is_global else self.head_dim,
            num_kv_heads=self.global_kv_heads if is_global else self.num_kv_heads,
            global_head_dim=0,
            global_kv_heads=0,
            keys_as_values=self.keys_as_values and is_global,
            kv_shared_layers=0,
            intermediate_size=self.kv_shared_size if shares else self.intermediate_size,
            reads_keys=shares,
        )

    def _has_window(self, layer: int) -> bool:
        return self.sliding_window is not None and (self.window_layers is None or self.window_layers[layer])

    def _kind(self, layer: int) -> LayerKind:
        windowed = self._has_window(layer)
        window = self.sliding_window if windowed else None
        if self.rope_layers is not None and not self.rope_layers[layer]:
            return LayerKind(window, None, None)
        if windowed and self.local_rope_theta is not None:
            return LayerKind(window, self.local_rope_theta, None)
        return LayerKind(window, self.rope_theta, self.rope_scaling)


class Family(NamedTuple):
    """What sets a family apart from Llama."""

    architecture: str
    options: Mapping[str, Any] = {}  # fields of `ModelConfig`
    multipliers: tuple[str, ...] = ()  # numbers of config.json that are fields of `ModelConfig` too
    defaults: Mapping[str, Any] = {}  # of fields that config.json leaves out
    window: str = ""  # which layers have the sliding window: "all", "by type", "if used" (by type or from a layer on)
    full_every: int = 6  # "by type": each so many-th layer has no window, if config.json does not say
    caps: tuple[str, ...] = ()  # fields of `ModelConfig` about soft caps that the family may set
    ropes: tuple[str, ...] = ("default", "linear", "llama3", "yarn", "dynamic")
    partial_rope: bool = False  # whether config.json may say that only a part of each head is rotated
    global_heads: bool = False  # layers with and without a window have heads of their own size
    experts: Mapping[str, str] = {}  # fields of `ModelConfig` about experts, and their names in config.json


_GEMMA3: dict[str, Any] = {
    "vocab_size": 262208,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 131072,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "rope_theta": 1e6,
    "rope_local_base_freq": 1e4,
    "tie_word_embeddings": True,
}
_GEMMA2 = {
    **{name: _GEMMA3[name] for name in ("num_attention_heads", "num_key_value_heads", "head_dim", "rms_norm_eps")},
    "vocab_size": 256000,
    "max_position_embeddings": 8192,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
    "rope_theta": 1e4,
    "tie_word_embeddings": True,
}
_GEMMA_OPTIONS = {
    "post_norm": True,
    "norm_offset": 1.0,
    "activation": "gelu_pytorch_tanh",
    "rounded_multiplier": True,
}
_GEMMA4: dict[str, Any] = {
    "vocab_size": 262144,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "global_head_dim": 512,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 131072,
    "sliding_window": 512,
    "rope_parameters": {
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        "full_attention": {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1e6},
    },
    "hidden_size_per_layer_input": 256,
    "vocab_size_per_layer_input": 262144,
    "tie_word_embeddings": True,
}
_QWEN = {"sliding_window": 4096, "max_window_layers": 28}
_EXPERTS = {"num_experts": "num_experts", "experts_per_token": "num_experts_per_tok"}
_QWEN_EXPERTS = {**_EXPERTS, "expert_size": "moe_intermediate_size"}

FAMILIES = {  # by model_type
    "llama": Family("LlamaForCausalLM"),
    "mistral": Family("MistralForCausalLM", defaults={"sliding_window": 4096}, window="all"),
    "qwen2": Family("Qwen2ForCausalLM", {"qkv_bias": True}, defaults=_QWEN, window="if used"),
    "qwen3": Family("Qwen3ForCausalLM", {"qk_norm": True}, defaults=_QWEN | {"head_dim": 128}, window="if used"),
    "olmo2": Family("Olmo2ForCausalLM", {"qk_norm_all": True, "pre_norm": False, "post_norm": True}),
    "smollm3": Family("SmolLM3ForCausalLM", defaults={"tie_word_embeddings": True, "rope_theta": 2e6}),
    "phi3": Family("Phi3ForCausalLM", {"fused": True}, window="all", ropes=("default", "longrope"), partial_rope=True),
    "gemma3_text": Family(
        "Gemma3ForCausalLM",
        {**_GEMMA_OPTIONS, "qk_norm": True},
        defaults=_GEMMA3,
        window="by type",
    ),
    "gemma4_text": Family(
        "Gemma4ForCausalLM",
        {
            **_GEMMA_OPTIONS,
            "norm_offset": 0.0,
            "qk_norm": True,
            "value_norm": True,
            "output_scale": True,
            "attention_multiplier": 1.0,
        },
        defaults=_GEMMA4,
        window="by type",
        ropes=("default", "proportional"),
        global_heads=True,
        caps=("logits_cap",),
    ),
    "gemma2": Family(
        "Gemma2ForCausalLM",
        _GEMMA_OPTIONS,
        defaults=_GEMMA2,
        window="by type",
        full_every=2,
        caps=("attention_cap", "logits_cap"),
    ),
    "mixtral": Family(
        "MixtralForCausalLM",
        {"normalized_experts": True},
        defaults={"num_local_experts": 8, "num_experts_per_tok": 2, "rope_theta": 1e6},
        window="all",
        experts={**_EXPERTS, "num_experts": "num_local_experts", "expert_size": "intermediate_size"},
    ),
    "qwen2_moe": Family(
        "Qwen2MoeForCausalLM",
        {"qkv_bias": True},
        defaults={"num_experts_per_tok": 4},
        experts={**_QWEN_EXPERTS, "shared_expert_size": "shared_expert_intermediate_size"},
    ),
    "qwen3_moe": Family(
        "Qwen3MoeForCausalLM", {"qk_norm": True}, defaults={"num_experts_per_tok": 8}, experts=_QWEN_EXPERTS
    ),
    "granite": Family(
        "GraniteForCausalLM",
        multipliers=("embedding_multiplier", "residual_multiplier", "attention_multiplier", "logits_scaling"),
    ),
}
