"""Read GGUF files as if they were Hugging Face checkpoints: same tensor names, shapes and row order."""

import contextlib
import mmap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tpaw_jax.models.checkpoints.config_json import from_dict
from tpaw_jax.models.checkpoints.joined_tensors import FUSED_NAMES
from tpaw_jax.models.checkpoints.tensor_names import TENSOR_NAMES, layer_names
from tpaw_jax.models.model_config import ModelConfig
from tpaw_jax.models.rope import rope_frequencies


class Architecture(NamedTuple):
    """What sets an architecture of GGUF apart from that of Qwen2."""

    model_type: str  # of Hugging Face's config.json
    fields: Mapping[str, str] = {}  # fields of config.json, and their names in GGUF
    constants: Mapping[str, Any] = {}  # fields of config.json that GGUF does not have
    interleaved: bool = False  # the two rotary halves of the rows of q and k are interleaved
    norm_offset: float = 0.0  # what is added to the scales of norms


_WINDOW = {"sliding_window": "attention.sliding_window"}
_EXPERTS = {
    "num_experts": "expert_count",
    "num_experts_per_tok": "expert_used_count",
    "moe_intermediate_size": "expert_feed_forward_length",
}
_GRANITE = {
    "embedding_multiplier": "embedding_scale",
    "residual_multiplier": "residual_scale",
    "attention_multiplier": "attention.scale",
    "logits_scaling": "logit_scale",
}
_GEMMA2 = {name: name for name in ("attn_logit_softcapping", "final_logit_softcapping")}
_GEMMA3 = _GEMMA2 | {
    "sliding_window_pattern": "attention.sliding_window_pattern",
    "rope_local_base_freq": "rope.freq_base_swa",
}

ARCHITECTURES = {
    "llama": Architecture("llama", interleaved=True),
    "granite": Architecture("granite", _GRANITE, interleaved=True),
    "smollm3": Architecture("smollm3", interleaved=True),
    "qwen2": Architecture("qwen2"),
    "qwen3": Architecture("qwen3"),
    "qwen2moe": Architecture(
        "qwen2_moe", {**_EXPERTS, "shared_expert_intermediate_size": "expert_shared_feed_forward_length"}
    ),
    "qwen3moe": Architecture("qwen3_moe", _EXPERTS, {"norm_topk_prob": True}),
    "olmo2": Architecture("olmo2"),
    "phi3": Architecture("phi3", _WINDOW),
    "gemma2": Architecture("gemma2", _WINDOW | _GEMMA2, norm_offset=1.0),
    "gemma3": Architecture("gemma3_text", _WINDOW | _GEMMA3, {"rope_local_base_freq": 1e4}, norm_offset=1.0),
}

MIXTRAL = Architecture(
    "mixtral", {"num_local_experts": "expert_count", "num_experts_per_tok": "expert_used_count"}, interleaved=True
)
"""GGUF calls it llama, with experts."""

WIDE_BLOCKS = {"gemma2": 46, "gemma3": 62}
"""Blocks of the 27-billion models, whose attention divides by the root of D / N and not of H. GGUF does not say it."""

_VALUE_BYTES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
"""GGUF value type: size in bytes. The two types below have variable size."""

_STRING, _ARRAY = 8, 9


class GGUFSource:
    """The tensors of a GGUF file under their Hugging Face names, dequantized to float32 one at a time.

    Raises:
        ValueError: the file cannot be read, or its architecture is not supported. Names the file.
        ImportError: the gguf package is not installed.
    """

    def __init__(self, path: Path):
        self.path = path
        self._reader = _open(path)
        self._tensors = {t.name: t for t in self._reader.tensors}
        with _as_value_error(path):
            self._architecture = self._supported_architecture()
            self.config = self._config()
        self._names = self._tensors_by_name()

    def names(self) -> set[str]:
        # Tensors without a Hugging Face name keep their GGUF name, so that the loader reports them.
        known = {gguf_name for gguf_name, _ in self._names.values()}
        return self._names.keys() | (self._tensors.keys() - known - {"rope_freqs.weight"})

    def shape(self, name: str) -> tuple[int, ...]:
        gguf_name, expert = self._names[name]
        shape = tuple(int(n) for n in reversed(self._tensors[gguf_name].shape))
        if expert is not None:
            return shape[1:]
        return (1, *shape) if name.endswith("shared_expert_gate.weight") and len(shape) == 1 else shape

    def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        from gguf.quants import dequantize

        gguf_name, expert = self._names[name]
        tensor, shape = self._tensors[gguf_name], self.shape(name)
        with _as_value_error(self.path):
            data = tensor.data if expert is None else tensor.data[expert]
            if data.ndim < 2:
                values = dequantize(data, tensor.tensor_type).reshape(shape)[index]
            else:  # only the rows of the index: a device may need one of many parts
                rows = self._row_order(name, shape[0])[index[0]]
                values = dequantize(data[rows], tensor.tensor_type)[:, *index[1:]]
        if self._architecture.norm_offset and name.endswith("norm.weight"):
            values = values - np.float32(self._architecture.norm_offset)
        return values

    def _row_order(self, name: str, rows: int) -> np.ndarray:
        """Where each row of a matrix is in the file."""
        heads = {"q_proj": self.config.num_heads, "k_proj": self.config.num_kv_heads}
        projection, order = name.split(".")[-2], np.arange(rows)
        if self._architecture.interleaved and projection in heads:
            return order.reshape(heads[projection], -1, 2).swapaxes(1, 2).reshape(rows)
        return order

    def _tensors_by_name(self) -> dict[str, tuple[str, int | None]]:
        """The GGUF tensor of each Hugging Face name, and the index of the expert in it."""
        from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

        wanted = _field(self._reader, "general.architecture")
        number = next(one for one, name in MODEL_ARCH_NAMES.items() if name == wanted)
        of_gguf = get_tensor_name_map(number, self.config.num_layers)
        templates = [*TENSOR_NAMES.values(), *layer_names(self.config).values()]
        templates += FUSED_NAMES.values() if self.config.fused else []
        names: dict[str, tuple[str, int | None]] = {}
        for template in templates:
            layers, has_experts = range(self.config.num_layers), template.count("{}") == 2
            for layer in layers if "{}" in template else [0]:
                merged = template.lstrip("*").format(layer, "").replace("..", ".")
                found = of_gguf.get_name(merged, (".weight", ".bias"))
                if found is not None and found in self._tensors:
                    experts = range(self.config.num_experts) if has_experts else [None]
                    names |= {template.lstrip("*").format(layer, i): (found, i) for i in experts}
        return names

    def _supported_architecture(self) -> Architecture:
        name = _field(self._reader, "general.architecture")
        if name not in ARCHITECTURES:
            known = ", ".join(ARCHITECTURES)
            raise ValueError(f"{self.path}: GGUF architecture {name!r} is not supported; supported are {known}.")
        if "token_embd.weight" not in self._tensors:
            raise ValueError(f"{self.path}: the tensor 'token_embd.weight' is missing; a language model has one.")
        if "rope_factors_long.weight" in self._tensors:
            raise ValueError(
                f"{self.path}: rope type 'longrope' in GGUF is not supported; use the model's safetensors checkpoint."
            )
        if name == "olmo2" and _field(self._reader, "olmo2.attention.sliding_window"):
            raise ValueError(f"{self.path}: olmo2 with a sliding window (OLMo 3) is not supported.")
        return MIXTRAL if name == "llama" and _field(self._reader, "llama.expert_count") else ARCHITECTURES[name]

    def _config(self) -> ModelConfig:
        architecture, own = _field(self._reader, "general.architecture"), self._architecture
        get = lambda name, default=None: _field(self._reader, f"{architecture}.{name}", default)
        heads, hidden = get("attention.head_count"), get("embedding_length")
        fields = {
            "model_type": own.model_type,
            "vocab_size": int(self._tensors["token_embd.weight"].shape[1]),
            "hidden_size": hidden,
            "intermediate_size": get("feed_forward_length"),
            "num_hidden_layers": get("block_count"),
            "num_attention_heads": heads,
            "num_key_value_heads": get("attention.head_count_kv"),
            "head_dim": get("attention.key_length") or (hidden // heads if hidden and heads else None),
            "rms_norm_eps": get("attention.layer_norm_rms_epsilon"),
            "max_position_embeddings": get("context_length"),
            "rope_theta": get("rope.freq_base", 1e6 if architecture == "gemma3" else 1e4),
            "tie_word_embeddings": "output.weight" not in self._tensors,
            **own.constants,
            **{field: value or None for field, name in own.fields.items() if (value := get(name)) is not None},
        }
        if not get("attention.causal", True):
            raise ValueError(
                f"{self.path}: the field '{architecture}.attention.causal' is false; supported is causal attention."
            )
        if architecture in WIDE_BLOCKS:
            wide = fields["num_hidden_layers"] == WIDE_BLOCKS[architecture]
            fields["query_pre_attn_scalar"] = hidden // heads if wide else fields["head_dim"]
        turning = get("rope.dimension_count")
        if architecture == "phi3" and turning and turning < fields["head_dim"]:
            fields["partial_rotary_factor"] = turning / fields["head_dim"]
        if "rope_freqs.weight" in self._tensors:
            fields["rope_scaling"] = {
                "rope_type": "llama3",
                "factor": 32.0 if architecture == "llama" and fields["tie_word_embeddings"] else 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
            }
        elif (kind := get("rope.scaling.type")) not in (None, "none"):
            if kind != "linear":
                raise ValueError(
                    f"{self.path}: rope type {kind!r} in GGUF is not supported; use the model's safetensors checkpoint."
                )
            fields["rope_scaling"] = {"rope_type": kind, "factor": get("rope.scaling.factor")}
        config = from_dict(fields, str(self.path))
        self._check_rope_factors(config)
        return config

    def _check_rope_factors(self, config: ModelConfig) -> None:
        """Check that the stored rope factors are Llama 3's: GGUF does not store the parameters they come from."""
        if config.rope_scaling is None or config.rope_scaling.rope_type != "llama3":
            return
        stored = np.asarray(self._tensors["rope_freqs.weight"].data, np.float32).reshape(-1)
        plain = rope_frequencies(config.head_dim, config.rope_theta, None)
        scaled = rope_frequencies(config.head_dim, config.rope_theta, config.rope_scaling)
        if stored.shape != plain.shape or not np.allclose(plain / stored, scaled, rtol=1e-4):
            raise ValueError(
                f"{self.path}: the tensor 'rope_freqs.weight' does not match Llama 3's rope scaling. Use the model's "
                "safetensors checkpoint instead; its config.json has the rope parameters."
            )


def load_tokenizer(path: Path) -> Any:
    """Build a transformers tokenizer from the one stored in a GGUF file, without torch.

    Raises:
        ValueError: the file has no tokenizer, or one that transformers does not support. Names the file.
    """
    from transformers import PreTrainedTokenizerFast
    from transformers.integrations.gguf import convert_gguf_tokenizer

    reader = _open(path)
    keys = {  # transformers' name: GGUF's name
        "tokenizer_type": "model",
        "pre_tokenizer_type": "pre",
        "tokens": "tokens",
        "scores": "scores",
        "token_type": "token_type",
        "merges": "merges",
    }
    with _as_value_error(path):
        fields = {name: _field(reader, f"tokenizer.ggml.{key}") for name, key in keys.items()}
        if fields["tokens"] is None:
            raise ValueError(f"{path}: the file contains no tokenizer; set policy.tokenizer.")
        present = {name: value for name, value in fields.items() if value is not None}
        backend, _ = convert_gguf_tokenizer(_field(reader, "general.architecture"), present)
        special = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
        ids = {name: _field(reader, f"tokenizer.ggml.{key}_token_id") for name, key in special.items()}
        tokens = {name: fields["tokens"][i] for name, i in ids.items() if i is not None}
        template = _field(reader, "tokenizer.chat_template")
        return PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=template, **tokens)


def _open(path: Path) -> Any:
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise ImportError(f"{path}: reading GGUF needs the gguf package: pip install 'tpaw_jax[gguf]'.") from error
    with _as_value_error(path):
        _check_sizes(path)
        return GGUFReader(path)


@contextlib.contextmanager
def _as_value_error(path: Path) -> Iterator[None]:
    """Turn any error that a library raises on a corrupt file into a one-sentence ValueError."""
    try:
        yield
    except ValueError as error:
        raise error if str(error).startswith(str(path)) else _unreadable(path, error) from error
    except Exception as error:  # numpy, struct, tokenizers and gguf raise many types
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> ValueError:
    return ValueError(f"{path}: not a readable GGUF file ({type(error).__name__}: {error}).")


def _check_sizes(path: Path) -> None:
    """Check that all lengths and counts in the header fit the file, because GGUFReader would loop over them for ages.

    Format: github.com/ggml-org/ggml/blob/master/docs/gguf.md
    """
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        if content[:4] != b"GGUF":
            raise ValueError(f"{path}: not a readable GGUF file (it does not begin with GGUF).")
        offset = 8

        def take(size: int, what: str) -> bytes:
            nonlocal offset
            left = len(content) - offset
            if size > left:
                raise ValueError(f"{path}: not a readable GGUF file ({what} takes {size} bytes, but {left} are left).")
            offset += size
            return content[offset - size : offset]

        number = lambda what, size=8: int.from_bytes(take(size, what), "little")
        text = lambda what: take(number(what), what)

        def value(kind: int, what: str) -> None:
            if kind == _STRING:
                text(what)
            elif kind == _ARRAY:
                kind, count = number(what, 4), number(what)
                if kind in _VALUE_BYTES:
                    take(count * _VALUE_BYTES[kind], what)
                elif kind == _STRING:
                    for _ in range(min(count, len(content))):
                        text(what)
                else:
                    raise ValueError(f"{path}: not a readable GGUF file ({what} is an array of unknown type {kind}).")
            elif kind in _VALUE_BYTES:
                take(_VALUE_BYTES[kind], what)
            else:
                raise ValueError(f"{path}: not a readable GGUF file ({what} has the unknown type {kind}).")

        tensors, fields = number("the header"), number("the header")
        for _ in range(min(fields, len(content))):
            name = text("a field's name").decode(errors="replace")
            value(number(name, 4), f"the field {name!r}")
        for _ in range(min(tensors, len(content))):
            name = text("a tensor's name").decode(errors="replace")
            take(8 * number(f"the tensor {name!r}", 4) + 12, f"the tensor {name!r}")


def _field(reader: Any, name: str, default: Any = None) -> Any:
    field = reader.fields.get(name)
    return default if field is None else field.contents()
