"""GGUF files seen as Hugging Face checkpoints: the same tensor names, shapes and row order."""

from __future__ import annotations

import contextlib
import mmap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from tpaw_jax.models.attention import rope_frequencies
from tpaw_jax.models.config_json import from_dict
from tpaw_jax.models.transformer import ModelConfig

LAYER_NAMES = {  # Hugging Face name within a layer: GGUF name within a block
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

_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
"""Bytes of the kinds of a field's value; `_STRING` and `_ARRAY` have sizes of their own."""

_STRING, _ARRAY = 8, 9


class GGUFSource:
    """A GGUF file's tensors under their Hugging Face names, dequantised one at a time to float32."""

    def __init__(self, path: Path):
        self.path = path
        self._reader = _open(path)
        self._tensors = {t.name: t for t in self._reader.tensors}
        with _readable(path):
            self.config = self._config()
        self._names = dict(GLOBAL_NAMES)
        for layer in range(self.config.num_layers):
            for name, gguf_name in LAYER_NAMES.items():
                self._names[f"model.layers.{layer}.{name}"] = f"blk.{layer}.{gguf_name}"

    def names(self) -> set[str]:
        known = {name: gguf_name for name, gguf_name in self._names.items() if gguf_name in self._tensors}
        return set(known) | (self._tensors.keys() - set(known.values()) - {"rope_freqs.weight"})

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(int(n) for n in reversed(self._tensors[self._names[name]].shape))

    def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        from gguf.quants import dequantize

        tensor = self._tensors[self._names[name]]
        with _readable(self.path):
            values = dequantize(tensor.data, tensor.tensor_type).reshape(self.shape(name))
        if self.config.model_type == "llama":  # GGUF interleaves the rotary halves of Llama's q and k rows
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
            raise ValueError(f"{self.path}: the tensor 'token_embd.weight' is missing; this is not a language model.")
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
            fields["rope_scaling"] = {"rope_type": kind}  # refused below, by name
        config = from_dict(fields, str(self.path))
        self._check_rope_factors(config)
        return config

    def _check_rope_factors(self, config: ModelConfig) -> None:
        """GGUF stores Llama 3.1's rope scaling as factors alone; they must be the published ones."""
        if config.rope_scaling is None:
            return
        stored = np.asarray(self._tensors["rope_freqs.weight"].data, np.float32).reshape(-1)
        plain = rope_frequencies(config.head_dim, config.rope_theta, None)
        scaled = rope_frequencies(config.head_dim, config.rope_theta, config.rope_scaling)
        if stored.shape != plain.shape or not np.allclose(plain / stored, scaled, rtol=1e-4):
            raise ValueError(
                f"{self.path}: the tensor 'rope_freqs.weight' is not Llama 3's published rope scaling; "
                "use the safetensors checkpoint, whose config.json states it."
            )


def load_tokenizer(path: Path) -> Any:
    """The tokenizer that a GGUF file describes, as a transformers one; torch is not needed.

    Raises:
        ValueError: the file describes none, or one that transformers does not know; names it.
    """
    from transformers import PreTrainedTokenizerFast
    from transformers.integrations.gguf import convert_gguf_tokenizer

    reader = _open(path)
    about = {  # transformers' name: GGUF's name
        "tokenizer_type": "model",
        "pre_tokenizer_type": "pre",
        "tokens": "tokens",
        "scores": "scores",
        "token_type": "token_type",
        "merges": "merges",
    }
    with _readable(path):
        stated = {name: _field(reader, f"tokenizer.ggml.{key}") for name, key in about.items()}
        if stated["tokens"] is None:
            raise ValueError(f"{path}: the file holds no tokenizer; name one in policy.tokenizer.")
        found = {name: value for name, value in stated.items() if value is not None}
        backend, _ = convert_gguf_tokenizer(_field(reader, "general.architecture"), found)
        special = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
        ids = {name: _field(reader, f"tokenizer.ggml.{key}_token_id") for name, key in special.items()}
        tokens = {name: stated["tokens"][i] for name, i in ids.items() if i is not None}
        template = _field(reader, "tokenizer.chat_template")
        return PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=template, **tokens)


def _open(path: Path) -> Any:
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise ImportError(f"{path}: reading GGUF needs the gguf package; pip install 'tpaw_jax[gguf]'.") from error
    with _readable(path):
        _check_sizes(path)
        return GGUFReader(path)


@contextlib.contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Whatever a library makes of a file that is not as it says becomes one sentence."""
    try:
        yield
    except ValueError as error:
        raise error if str(error).startswith(str(path)) else _unreadable(path, error) from error
    except Exception as error:  # numpy, struct, tokenizers and gguf raise many types
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> ValueError:
    return ValueError(f"{path}: not a readable GGUF file ({type(error).__name__}: {error}).")


def _check_sizes(path: Path) -> None:
    """Check that what a header announces fits into the file: the reader would look for it without end.

    The layout is that of github.com/ggml-org/ggml/blob/master/docs/gguf.md.
    """
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        if content[:4] != b"GGUF":
            raise ValueError(f"{path}: not a readable GGUF file (it does not begin with GGUF).")
        place = 8

        def take(size: int, what: str) -> bytes:
            nonlocal place
            if size > len(content) - place:
                left = len(content) - place
                raise ValueError(f"{path}: not a readable GGUF file ({what} takes {size} bytes, {left} are left).")
            place += size
            return content[place - size : place]

        number = lambda what, size=8: int.from_bytes(take(size, what), "little")
        text = lambda what: take(number(what), what)

        def value(kind: int, what: str) -> None:
            if kind == _STRING:
                text(what)
            elif kind == _ARRAY:
                kind, count = number(what, 4), number(what)
                if kind in _SIZES:
                    take(count * _SIZES[kind], what)
                elif kind == _STRING:
                    for _ in range(min(count, len(content))):
                        text(what)
                else:
                    raise ValueError(f"{path}: not a readable GGUF file ({what} is an array of unknown kind {kind}).")
            elif kind in _SIZES:
                take(_SIZES[kind], what)
            else:
                raise ValueError(f"{path}: not a readable GGUF file ({what} is of unknown kind {kind}).")

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
