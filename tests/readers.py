"""Every reader of files from outside, with a whole file of its kind: what may come out is a value or a sentence."""

import functools
import json
import tempfile
from pathlib import Path

import conftest
import gguf
import jax
import numpy as np
import yaml

from tpaw_jax.config import DataConfig, LoraConfig, SourceConfig, config_file
from tpaw_jax.data import dataset, templates
from tpaw_jax.generation import generation_file, policy
from tpaw_jax.models import Transformer, adapters, hub
from tpaw_jax.models.checkpoints import adapter_files
from tpaw_jax.runtime import sharding
from tpaw_jax.storage import array_files, journal
from tpaw_jax.types import Prompts

PROMPTS = Prompts(
    np.arange(3, dtype=np.int32), tuple(np.arange(2, 4, dtype=np.int32) for _ in range(3)), (np.ones(1, np.int32),) * 3
)
TOLD = (ValueError, OSError)
"""What a reader may raise; the command line makes a sentence of it and nothing else."""


@functools.cache
def template():
    return templates.make_template(hub.load_tokenizer(conftest.STORIES), DataConfig(chat_template="none"))


def read_records(path):
    source = SourceConfig(path=str(path))
    return dataset.load(DataConfig(sources=(source,), chat_template="none", holdout_prompts=0), template(), 0)


def read_model(path):
    """config.json beside whole weights."""
    directory = path.parent / "model"
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_bytes(path.read_bytes())
    return hub.load_architecture(directory)


def read_weights(path):
    """model.safetensors beside a whole config.json."""
    directory = path.parent / "weights"
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_bytes((conftest.STORIES / "config.json").read_bytes())
    (directory / "model.safetensors").write_bytes(path.read_bytes())
    return hub.load_pretrained(directory)


def read_adapter_settings(path):
    """adapter_config.json alone."""
    return adapter_files.read_settings(path.parent)


def read_adapters(path):
    """adapter_model.safetensors beside a whole adapter_config.json."""
    directory = path.parent / "adapters"
    directory.mkdir(exist_ok=True)
    (directory / "adapter_config.json").write_bytes(whole("the settings of adapters"))
    (directory / "adapter_model.safetensors").write_bytes(path.read_bytes())
    lora = policy.lora_of(LoraConfig(path=str(directory)))
    return adapter_files.load(directory, hub.load_architecture(conftest.STORIES), lora, sharding.single_device_mesh())


def read_journal(path):
    (path.parent / "journal.json").write_bytes(path.read_bytes())
    (path.parent / "journal.before.json").unlink(missing_ok=True)
    return journal.open_journal(path.parent, read_only=True)


READERS = {  # what it reads: the file's name, the reader
    "a configuration": ("run.yaml", lambda path: config_file.load(path, [])),
    "records in lines": ("records.jsonl", read_records),
    "records in an array": ("records.json", read_records),
    "records in parquet": ("records.parquet", read_records),
    "another engine's responses": (
        "given.jsonl",
        lambda path: generation_file.read(path, PROMPTS, template(), 512, 16, 0),
    ),
    "responses kept while sampling": ("sampled.part", lambda path: generation_file.read_partial([path], PROMPTS)),
    "the architecture of a model": ("config.json", read_model),
    "weights in safetensors": ("model.safetensors", read_weights),
    "the settings of adapters": ("adapter_config.json", read_adapter_settings),
    "adapters": ("adapter_model.safetensors", read_adapters),
    "a model in GGUF": ("model.gguf", lambda path: hub.load_pretrained(path)),
    "a tokenizer in GGUF": ("model.gguf", lambda path: hub.load_tokenizer(path)),
    "scores": ("scores.npz", array_files.read),
    "a journal": ("journal.other", read_journal),
}


@functools.cache
def whole(name: str) -> bytes:
    """A whole file of a kind."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / READERS[name][0]
        MAKERS[path.name](path)
        return path.read_bytes()


def check(name: str, content: bytes, place: Path) -> bool:
    """Whether a file of this content was read; anything but a value or a sentence is raised."""
    directory = Path(place) / name.replace(" ", "_").replace("'", "")
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / READERS[name][0]
    path.write_bytes(content)
    try:
        READERS[name][1](path)
    except TOLD as error:
        told = str(error).strip()
    else:
        return True
    assert told, "an error without a word"
    return False


def _records(path):
    records = [{"prompt": f"question {i}", "completion": f"answer {i}"} for i in range(4)]
    if path.suffix == ".parquet":
        import pandas

        pandas.DataFrame(records).to_parquet(path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(records))
    else:
        path.write_text("".join(json.dumps(r) + "\n" for r in records))


def _given(path):
    lines = [{"prompt_id": i, "token_ids": [5, 6, 2], "log_probs": [-0.5, -1.0, -0.25]} for i in range(3)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def _sampled(path):
    for i in range(3):
        generation_file.append(path, PROMPTS, {i: (np.ones(3, np.int32), np.zeros(3, np.float32))})


def _gguf(path):
    """Two layers' worth of nothing much: a header with a tokenizer, and small tensors."""
    writer = gguf.GGUFWriter(path, "llama")
    for name, value in {
        "embedding_length": 8,
        "feed_forward_length": 8,
        "block_count": 1,
        "attention.head_count": 2,
        "attention.head_count_kv": 1,
        "context_length": 64,
    }.items():
        writer.add_uint32(f"llama.{name}", value)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-6)
    writer.add_tokenizer_model("llama")
    writer.add_token_list([b"<unk>", b"<s>", b"</s>", b"a", b"b"])
    writer.add_token_scores([0.0] * 5)
    writer.add_token_types([2, 3, 3, 1, 1])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    shapes = {"token_embd.weight": (5, 8), "output_norm.weight": (8,)}
    shapes |= {f"blk.0.{name}.weight": (8, 8) for name in ("attn_q", "attn_output", "ffn_gate", "ffn_up", "ffn_down")}
    shapes |= {f"blk.0.{name}.weight": (4, 8) for name in ("attn_k", "attn_v")}
    shapes |= {f"blk.0.{name}.weight": (8,) for name in ("attn_norm", "ffn_norm")}
    for name, shape in shapes.items():
        writer.add_tensor(name, np.zeros(shape, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _adapters(path):
    """A file of a PEFT directory."""
    architecture = hub.load_architecture(conftest.STORIES)
    model = Transformer(architecture, lora=policy.lora_of(LoraConfig(rank=2)))
    params = model.init(jax.random.key(0), np.zeros((1, 1), np.int32))["params"]
    directory = path.parent / "saved"
    adapter_files.save(directory, architecture, adapters.split(params)[0], adapter_files.Settings(2, 8.0), "base")
    path.write_bytes((directory / path.name).read_bytes())


def _copy(name):
    return lambda path: path.write_bytes((conftest.STORIES / name).read_bytes())


def _journal(path):
    opened = journal.open_journal(path.parent)
    journal.write(opened, "round_0000/generations.npz", "sampling", 0, b"content", "same")
    path.write_bytes((path.parent / "journal.json").read_bytes())


MAKERS = {
    "run.yaml": lambda path: path.write_text(yaml.safe_dump(config_file.to_dict(conftest.small_run("x")))),
    "records.jsonl": _records,
    "records.json": _records,
    "records.parquet": _records,
    "given.jsonl": _given,
    "sampled.part": _sampled,
    "config.json": _copy("config.json"),
    "model.safetensors": _copy("model.safetensors"),
    "adapter_config.json": _adapters,
    "adapter_model.safetensors": _adapters,
    "model.gguf": _gguf,
    "scores.npz": lambda path: path.write_bytes(array_files.npz(a=np.arange(9), b=np.zeros((2, 3), np.float32))),
    "journal.other": _journal,
}
