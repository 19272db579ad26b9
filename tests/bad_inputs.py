"""Kinds of bad input, each a whole file of `readers` with one thing wrong, and words that its sentence must have.

`tests/test_bad_input.py` gives them to their readers; `benchmarks/bad_inputs.py` makes a table of what is said.
"""

import io
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import conftest
import numpy as np
import readers
import yaml

from tpaw_jax.config import DataConfig
from tpaw_jax.data import templates
from tpaw_jax.models import hub

USER = {"role": "user", "content": "Why?"}


class BadInput(NamedTuple):
    """One thing wrong with a file of a kind."""

    reader: str  # of readers.READERS
    wrong: str
    change: Callable[[bytes], bytes]  # of a whole file's content
    words: tuple[str, ...]  # of the sentence: the place and the field


def tell(case: BadInput, place: Path) -> str:
    """What the reader says of the file; nothing where it took it."""
    directory = place / "bad"
    directory.mkdir(exist_ok=True)
    path = directory / readers.READERS[case.reader][0]
    path.write_bytes(case.change(readers.whole(case.reader)))
    try:
        readers.READERS[case.reader][1](path)
    except readers.TOLD as error:
        return str(error).replace(f"{directory}/", "")
    return ""


def _configuration(**values) -> Callable[[bytes], bytes]:
    """The configuration with other values at keys such as train__epochs."""

    def change(content: bytes) -> bytes:
        fields = yaml.safe_load(content)
        for key, value in values.items():
            *parents, last = key.split("__")
            section = fields
            for parent in parents:
                section = section[parent]
            section[last] = value
        return yaml.safe_dump(fields).encode()

    return change


def _second_line(record) -> Callable[[bytes], bytes]:
    """The lines with another one in the second place."""
    line = record if isinstance(record, bytes) else json.dumps(record).encode()

    def change(content: bytes) -> bytes:
        lines = content.splitlines()
        return b"\n".join([lines[0], line, *lines[2:], b""])

    return change


def _fields(remove=(), **values) -> Callable[[bytes], bytes]:
    """A JSON object with other fields."""

    def change(content: bytes) -> bytes:
        fields = json.loads(content) | values
        return json.dumps({name: value for name, value in fields.items() if name not in remove}).encode()

    return change


def _experts(**changes):
    sizes = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    return _fields(model_type="qwen3_moe", **sizes, **changes)


def _gemma4(**changes):
    sizes = {"vocab_size_per_layer_input": 512, "rope_parameters": None, "global_head_dim": 16}
    return _fields(model_type="gemma4_text", hidden_act="gelu_pytorch_tanh", **{**sizes, **changes})


def _given(**values) -> Callable[[bytes], bytes]:
    """The second response of another engine with other fields."""
    record = {"prompt_id": 1, "token_ids": [5, 6, 2], "log_probs": [-0.5, -1.0, -0.25]} | values
    return _second_line({name: value for name, value in record.items() if value is not None})


def _header(change: Callable[[dict], dict]) -> Callable[[bytes], bytes]:
    """The weights with another header."""

    def changed(content: bytes) -> bytes:
        (length,) = struct.unpack("<Q", content[:8])
        header = json.dumps(change(json.loads(content[8 : 8 + length]))).encode()
        return struct.pack("<Q", len(header)) + header + content[8 + length :]

    return changed


def _without(header: dict) -> dict:
    return {name: value for name, value in header.items() if name != "model.norm.weight"}


def _renamed(header: dict) -> dict:
    return {("model.extra.weight" if n == "model.norm.weight" else n): value for n, value in header.items()}


def _reshaped(header: dict) -> dict:
    return header | {"model.norm.weight": header["model.norm.weight"] | {"shape": [8, 8]}}


def _longer(header: dict) -> dict:
    begin, end = header["model.norm.weight"]["data_offsets"]
    return header | {"model.norm.weight": header["model.norm.weight"] | {"data_offsets": [begin, end + 10**9]}}


def _at(place: int, content: bytes) -> Callable[[bytes], bytes]:
    return lambda whole: whole[:place] + content + whole[place + len(content) :]


def _put(content: bytes) -> Callable[[bytes], bytes]:
    return lambda whole: content


def _half(content: bytes) -> bytes:
    return content[: len(content) // 2]


def _replaced(old: bytes, new: bytes) -> Callable[[bytes], bytes]:
    return lambda whole: whole.replace(old, new)


def _pickled(content: bytes) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, a=np.array([{"loaded": "never"}], dtype=object))
    return buffer.getvalue()


def _parquet_without_answers(content: bytes) -> bytes:
    import pandas

    buffer = io.BytesIO()
    pandas.DataFrame({"prompt": ["Why?"]}).to_parquet(buffer)
    return buffer.getvalue()


CONFIGURATION, LINES, ARRAY, PARQUET = (
    "a configuration",
    "records in lines",
    "records in an array",
    "records in parquet",
)
GIVEN, MODEL, WEIGHTS = "another engine's responses", "the architecture of a model", "weights in safetensors"
SETTINGS, ADAPTERS = "the settings of adapters", "adapters"
GGUF, TOKENIZER, SCORES, JOURNAL = "a model in GGUF", "a tokenizer in GGUF", "scores", "a journal"

BAD_INPUTS = [
    BadInput(CONFIGURATION, "not YAML", _put(b"rounds: [1, 2"), ("run.yaml", "not valid YAML")),
    BadInput(CONFIGURATION, "a list instead of keys", _put(b"- rounds\n"), ("run.yaml", "mapping", "list")),
    BadInput(CONFIGURATION, "a misspelt key", _configuration(train__epoch=3), ("'train.epoch'", "'train.epochs'")),
    BadInput(CONFIGURATION, "an unknown section", _configuration(reward=3), ("'reward'", "Known keys")),
    BadInput(CONFIGURATION, "a value where a section is", _configuration(train=3), ("'train'", "mapping")),
    BadInput(CONFIGURATION, "text for a number", _configuration(rounds="four"), ("rounds", "'four'", "int")),
    BadInput(CONFIGURATION, "true for a number", _configuration(rounds=True), ("rounds", "True", "int")),
    BadInput(CONFIGURATION, "no rounds", _configuration(rounds=0), ("rounds", "at least 1")),
    BadInput(CONFIGURATION, "an unknown optimizer", _configuration(train__optimizer="adam"), ("optimizer", "rmsprop")),
    BadInput(CONFIGURATION, "top_p of 0", _configuration(sampling__top_p=0.0), ("sampling.top_p", "above 0")),
    BadInput(
        CONFIGURATION, "a row too short", _configuration(packing__row_length=10), ("packing.row_length", "at least")
    ),
    BadInput(CONFIGURATION, "no reward scale", _configuration(objective__lam=[]), ("objective.lam", "one value")),
    BadInput(CONFIGURATION, "no data", _configuration(data__sources=[]), ("data.sources", "is empty")),
    BadInput(CONFIGURATION, "no model", _configuration(policy__path=""), ("policy.path", "not set")),
    BadInput(
        CONFIGURATION,
        "merged DoRA",
        _configuration(policy__lora={"rank": 4, "dora": True, "merge_each_round": True}),
        ("policy.lora.merge_each_round", "dora"),
    ),
    BadInput(
        CONFIGURATION,
        "evaluation without tasks",
        _configuration(evaluation__each_round=True),
        ("evaluation.each_round", "tasks"),
    ),
    BadInput(LINES, "a line that is not JSON", _second_line(b"{'prompt': 1}"), ("line 2", "not valid JSON")),
    BadInput(LINES, "a line cut short", lambda whole: whole[:-9], ("line 4", "not valid JSON")),
    BadInput(LINES, "a byte that is not UTF-8", _second_line(b'{"prompt": "\xff"}'), ("line 2",)),
    BadInput(LINES, "half a surrogate pair", _second_line(b'{"prompt": "\\ud800", "completion": "x"}'), ("line 2",)),
    BadInput(LINES, "a number as a record", _second_line(3), ("line 2", "named fields", "int")),
    BadInput(LINES, "fields of no known shape", _second_line({"text": "hm"}), ("line 2", "'text'", "question/answer")),
    BadInput(LINES, "an empty target", _second_line({"prompt": "Why?", "completion": " "}), ("'completion'", "empty")),
    BadInput(LINES, "a target that is a number", _second_line({"prompt": "?", "completion": 4}), ("line 2", "int")),
    BadInput(LINES, "a question without answer", _second_line({"question": "Why?"}), ("line 2", "'answer'", "missing")),
    BadInput(LINES, "no assistant's turn", _second_line({"messages": [USER]}), ("line 2", "no assistant turn")),
    BadInput(LINES, "a turn without a role", _second_line({"messages": [{"content": "x"}]}), ("line 2", "turn 0")),
    BadInput(LINES, "turns that are text", _second_line({"messages": "Why?"}), ("line 2", "list of turns", "str")),
    BadInput(LINES, "no record at all", _put(b""), ("data.sources", "no prompt to train on")),
    BadInput(ARRAY, "an object, no array", _put(b'{"data": []}'), ("records.json, line 1", "'data'", "known record")),
    BadInput(ARRAY, "brackets a hundred thousand deep", _put(b"[" * 100_000), ("records.json", "not valid JSON")),
    BadInput(ARRAY, "a record of text", _put(b'[{"prompt": "a", "completion": "b"}, "c"]'), ("record 2", "str")),
    BadInput(PARQUET, "another format", _put(b"prompt,completion\n"), ("records.parquet", "could not be read")),
    BadInput(PARQUET, "cut in half", _half, ("records.parquet", "could not be read")),
    BadInput(PARQUET, "no answers", _parquet_without_answers, ("record 1", "'prompt'", "known record format")),
    BadInput(GIVEN, "a line that is not JSON", _second_line(b"5, 6, 2"), ("line 2", "not valid JSON")),
    BadInput(GIVEN, "an array, no object", _second_line([5, 6, 2]), ("line 2", "object", "list")),
    BadInput(GIVEN, "an unknown prompt", _given(prompt_id=7), ("line 2", "prompt_id", "7")),
    BadInput(GIVEN, "a prompt answered twice", _given(prompt_id=0), ("line 2", "answered in line 1")),
    BadInput(GIVEN, "a prompt not answered", lambda whole: whole[: whole.rindex(b'{"prompt')], ("1 of 3", "not")),
    BadInput(GIVEN, "a token that no vocabulary has", _given(token_ids=[5, 512]), ("line 2", "0 to 511")),
    BadInput(GIVEN, "no tokens and no text", _given(token_ids=None), ("line 2", "token_ids", "response")),
    BadInput(GIVEN, "more tokens than are allowed", _given(token_ids=[5] * 17), ("line 2", "17", "max_new_tokens")),
    BadInput(GIVEN, "too few log-probs", _given(log_probs=[-0.5]), ("line 2", "log_probs", "3")),
    BadInput(GIVEN, "a log-prob above 0", _given(log_probs=[0.5, -1, -1]), ("line 2", "log_probs", "at most 0")),
    BadInput(GIVEN, "another tokenizer's prompt", _given(prompt_token_ids=[9]), ("line 2", "another tokenizer")),
    BadInput(MODEL, "not JSON", _put(b"model_type: llama"), ("config.json", "not valid JSON")),
    BadInput(MODEL, "an unknown architecture", _fields(model_type="mamba"), ("config.json", "'mamba'", "supported")),
    BadInput(MODEL, "a missing size", _fields(remove=["hidden_size"]), ("config.json", "'hidden_size'", "missing")),
    BadInput(MODEL, "a negative size", _fields(num_hidden_layers=-5), ("'num_hidden_layers'", "-5", "positive")),
    BadInput(MODEL, "heads that cannot be shared", _fields(num_key_value_heads=3), ("config.json", "8 heads", "3")),
    BadInput(MODEL, "another activation", _fields(hidden_act="gelu"), ("hidden_act", "'gelu'", "'silu'")),
    BadInput(MODEL, "a rope type that is a list", _fields(rope_scaling={"rope_type": []}), ("rope type []", "'yarn'")),
    BadInput(
        MODEL,
        "a window from a layer that is text",
        _fields(model_type="qwen3", use_sliding_window=True, max_window_layers="2"),
        ("'max_window_layers'", "'2'"),
    ),
    BadInput(
        MODEL,
        "layers without rope at an interval of text",
        _fields(model_type="smollm3", no_rope_layer_interval="4"),
        ("'no_rope_layer_interval'", "'4'"),
    ),
    BadInput(
        MODEL,
        "yarn with theta 1",
        _fields(rope_scaling={"rope_type": "yarn", "factor": 2, "rope_theta": 1}),
        ("'rope_theta'", "yarn"),
    ),
    BadInput(
        MODEL,
        "an unknown rope",
        _fields(rope_scaling={"rope_type": "longrope"}, remove=["rope_parameters"]),
        ("'longrope'", "llama3"),
    ),
    BadInput(
        MODEL,
        "longrope with too few factors",
        _fields(
            model_type="phi3",
            rope_scaling={"type": "longrope", "short_factor": [1.0], "long_factor": [1.0]},
            original_max_position_embeddings=64,
        ),
        ("short_factor must be a list of",),
    ),
    BadInput(
        MODEL,
        "longrope of an original context of text",
        _fields(
            model_type="phi3",
            rope_scaling={"type": "longrope", "short_factor": [1.0], "long_factor": [1.0]},
            original_max_position_embeddings="4096",
        ),
        ("'original_max_position_embeddings'", "'4096'"),
    ),
    BadInput(
        MODEL,
        "more rotated features than a head has",
        _fields(model_type="phi3", partial_rotary_factor=1.5),
        ("partial_rotary_factor is 1.5", "at most 1"),
    ),
    BadInput(
        MODEL,
        "an odd number of rotated features",
        _fields(model_type="phi3", partial_rotary_factor=0.2),
        ("partial_rotary_factor is 0.2", "even number"),
    ),
    BadInput(
        MODEL,
        "a soft cap of text",
        _fields(model_type="gemma2", hidden_act="gelu_pytorch_tanh", attn_logit_softcapping="fifty"),
        ("'attn_logit_softcapping'", "'fifty'"),
    ),
    BadInput(
        MODEL,
        "no experts",
        _fields(model_type="mixtral", num_local_experts=0),
        ("'num_local_experts'", "0"),
    ),
    BadInput(
        MODEL,
        "no layer with experts",
        _experts(mlp_only_layers=[0, 1, 2, 3, 4]),
        ("mlp_only_layers is [0, 1, 2, 3, 4]", "no layer has experts"),
    ),
    BadInput(MODEL, "dense layers of text", _experts(mlp_only_layers="1"), ("mlp_only_layers is '1'", "a list")),
    BadInput(MODEL, "8-bit weights", _fields(quantization_config={"quant_method": "fp8"}), ("'fp8'", "dequantized")),
    BadInput(MODEL, "a flag of text", _fields(tie_word_embeddings="false"), ("'tie_word_embeddings'", "'false'")),
    BadInput(MODEL, "two billion layers", _fields(num_hidden_layers=2**31 - 1), ("num_hidden_layers", "10000")),
    BadInput(MODEL, "layer types that are a number", _fields(model_type="mistral", layer_types=5), ("layer_types",)),
    BadInput(
        MODEL,
        "layers of other sizes",
        _fields(per_layer_config={"1": {"head_dim": 16}}),
        ("per_layer_config is set", "llama"),
    ),
    BadInput(MODEL, "Gemma without a window", _gemma4(sliding_window=None), ("'sliding_window'", "missing")),
    BadInput(
        MODEL,
        "wide heads in a layer with a window",
        _gemma4(per_layer_config={"0": {"head_dim": 16}}),
        ("per_layer_config is about the layers 0", "without a window"),
    ),
    BadInput(MODEL, "biases in attention", _fields(attention_bias=True), ("attention_bias is true", "llama")),
    BadInput(
        MODEL,
        "attention in both directions",
        _gemma4(use_bidirectional_attention="all"),
        ("use_bidirectional_attention is 'all'",),
    ),
    BadInput(
        MODEL,
        "layers of more than two sizes",
        _gemma4(per_layer_config={"1": {"head_dim": 16}, "3": {"head_dim": 32}}),
        ("per_layer_config", "the same head_dim"),
    ),
    BadInput(
        MODEL,
        "tables of two vocabularies",
        _gemma4(vocab_size_per_layer_input=500),
        ("vocab_size_per_layer_input is 500", "512"),
    ),
    BadInput(
        MODEL,
        "keys of a layer that is not there",
        _gemma4(num_kv_shared_layers=4, layer_types=["sliding_attention"] * 5),
        ("num_kv_shared_layers is 4", "layer 4"),
    ),
    BadInput(
        MODEL,
        "a rope of some features of another kind",
        _gemma4(rope_parameters={"full_attention": {"partial_rotary_factor": 0.25}, "sliding_attention": {}}),
        ("partial_rotary_factor of 0.25", "'proportional'"),
    ),
    BadInput(WEIGHTS, "a header longer than the file", _at(0, struct.pack("<Q", 2**60)), ("model.safetensors",)),
    BadInput(WEIGHTS, "cut in half", _half, ("model.safetensors", "not a readable safetensors file")),
    BadInput(WEIGHTS, "a tensor that reaches past the end", _header(_longer), ("model.safetensors",)),
    BadInput(WEIGHTS, "a tensor that the header leaves out", _header(_without), ("model.safetensors", "not fully")),
    BadInput(WEIGHTS, "a tensor of another name", _header(_renamed), ("model.norm.weight", "missing")),
    BadInput(WEIGHTS, "a tensor of another shape", _header(_reshaped), ("model.norm.weight",)),
    BadInput(WEIGHTS, "a pickled checkpoint", _put(b"\x80\x02}q\x00."), ("model.safetensors", "not a readable")),
    BadInput(SETTINGS, "no LoRA", _fields(peft_type="IA3"), ("adapter_config.json", "peft_type is 'IA3'")),
    BadInput(SETTINGS, "a rank of text", _fields(r="8"), ("adapter_config.json", "r is '8'")),
    BadInput(SETTINGS, "ranks by module", _fields(rank_pattern={"q_proj": 4}), ("rank_pattern is {'q_proj': 4}",)),
    BadInput(SETTINGS, "a changed base", _fields(init_lora_weights="pissa"), ("init_lora_weights is 'pissa'", "base")),
    BadInput(SETTINGS, "one kind of matrix", _fields(target_parameters=["experts.down_proj"]), ("target_parameters",)),
    BadInput(ADAPTERS, "cut in half", _half, ("adapter_model.safetensors", "not a readable safetensors file")),
    BadInput(ADAPTERS, "of an unknown module", _replaced(b"q_proj", b"c_proj"), ("adapters of c_proj", "supported")),
    BadInput(ADAPTERS, "a layer too far", _replaced(b"layers.4", b"layers.7"), ("tensors are missing", "layers.4")),
    BadInput(GGUF, "another format", _put(b"PK\x03\x04"), ("model.gguf", "does not begin with GGUF")),
    BadInput(GGUF, "cut in half", _half, ("model.gguf", "not a readable GGUF file")),
    BadInput(GGUF, "2^60 tensors", _at(8, struct.pack("<Q", 2**60)), ("model.gguf", "not a readable GGUF file")),
    BadInput(GGUF, "an unknown architecture", _replaced(b"llama", b"mamba"), ("model.gguf", "'mamba'")),
    BadInput(GGUF, "no embeddings", _replaced(b"token_embd", b"token_embe"), ("model.gguf", "'token_embd.weight'")),
    BadInput(TOKENIZER, "no tokenizer", _replaced(b"tokenizer.ggml.model", b"tokenizer.ggml.modem"), ("model.gguf",)),
    BadInput(SCORES, "pickled content", _pickled, ("scores.npz", "damaged")),
    BadInput(SCORES, "cut in half", _half, ("scores.npz", "damaged")),
    BadInput(JOURNAL, "one figure changed", _replaced(b'"bytes": 7', b'"bytes": 8'), ("journal.json", "damaged")),
]


def bad_templates():
    """Chat templates that cannot be used: what is wrong, the template, words of the sentence."""
    return [
        ("a template that is no file", "missing.jinja", ("data.chat_template", "missing.jinja")),
        ("a template that is no Jinja", "{% for m in messages %}", ("chat template",)),
        ("a template that leaves answers out", "{{ messages[0].content }}", ("leaves out the assistant's text",)),
    ]


def tell_of_template(template: str) -> str:
    """What is said of a chat template; nothing where it was taken."""
    try:
        templates.make_template(hub.load_tokenizer(conftest.STORIES), DataConfig(chat_template=template))
    except readers.TOLD as error:
        return str(error)
    return ""
