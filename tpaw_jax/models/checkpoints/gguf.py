"""Read GGUF files as if they were Hugging Face checkpoints: same tensor names, shapes and row order."""

import contextlib
import mmap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from tpaw_jax.models.checkpoints.config_json import from_dict
from tpaw_jax.models.model_config import ModelConfig
from tpaw_jax.models.rope import rope_frequencies

LAYER_NAMES = {  # Hugging Face name in a layer: GGUF name in a block
    "input_layernorm.weight": "attn_norm.weight",
    "self_attn.q_proj.weight": "attn_q.weight",
    "self_attn.k_proj.weight": "attn_k.weight",
    "self_attn.v_proj.weight": "attn_v.weight",
    "self_attn.o_proj.weight": "attn_output.weight",
    "self_attn.q_proj.bias": "attn_q.bias",
    "self_attn.k_proj.bias": "attn_k.bias",
    "self_attn.v_proj.bias": "attn_v.bias",
    "self_attn.q_norm.weight": "attn_q_norm.weight",
    "self_attn.k_norm.weight": "attn_k_norm.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "mlp.gate_proj.weight": "ffn_gate.weight",
    "mlp.up_proj.weight": "ffn_up.weight",
    "mlp.down_proj.weight": "ffn_down.weight",
}
GLOBAL_NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}

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
            self.config = self._config()
        self._names = dict(GLOBAL_NAMES)
        for layer in range(self.config.num_layers):
            for name, gguf_name in LAYER_NAMES.items():
                self._names[f"model.layers.{layer}.{name}"] = f"blk.{layer}.{gguf_name}"

    def names(self) -> set[str]:
        known = {name: gguf_name for name, gguf_name in self._names.items() if gguf_name in self._tensors}
        # Tensors without a Hugging Face name keep their GGUF name, so that the loader reports them.
        return set(known) | (self._tensors.keys() - set(known.values()) - {"rope_freqs.weight"})

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(int(n) for n in reversed(self._tensors[self._names[name]].shape))

    def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        from gguf.quants import dequantize

        tensor = self._tensors[self._names[name]]
        with _as_value_error(self.path):
            values = dequantize(tensor.data, tensor.tensor_type).reshape(self.shape(name))
        if self.config.model_type == "llama":  # GGUF interleaves the two rotary halves of Llama's q and k rows
            heads = {"q_proj": self.config.num_heads, "k_proj": self.config.num_kv_heads}
            for projection, count in heads.items():
                if name.endswith(f"{projection}.weight"):
                    rows, columns = values.shape
                    halves = values.reshape(count, rows // count // 2, 2, columns)
                    values = halves.swapaxes(1, 2).reshape(rows, columns)
        return values[index]

    def _config(self) -> ModelConfig:
        architecture = _field(self._reader, "general.architecture")
        if architecture not in ("llama", "qwen2", "qwen3"):
            raise ValueError(
                f"{self.path}: GGUF architecture {architecture!r} is not supported; supported are llama, qwen2, qwen3."
            )
        get = lambda name, default=None: _field(self._reader, f"{architecture}.{name}", default)
        if "token_embd.weight" not in self._tensors:
            raise ValueError(f"{self.path}: the tensor 'token_embd.weight' is missing; a language model has one.")
        fields = {
            "model_type": architecture,
            "vocab_size": int(self._tensors["token_embd.weight"].shape[1]),
            "hidden_size": get("embedding_length"),
            "intermediate_size": get("feed_forward_length"),
            "num_hidden_layers": get("block_count"),
            "num_attention_heads": get("attention.head_count"),
            "num_key_value_heads": get("attention.head_count_kv"),
            "head_dim": get("attention.key_length"),
            "rms_norm_eps": get("attention.layer_norm_rms_epsilon"),
            "max_position_embeddings": get("context_length"),
            "rope_theta": get("rope.freq_base", 10000.0),
            "tie_word_embeddings": "output.weight" not in self._tensors,
        }
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
