"""GGUF files of every block format that can be written here, against the safetensors model they were made from."""

import gguf
import jax
import numpy as np
import pytest
import torch
import transformers
from gguf import GGMLQuantizationType as Q
from safetensors.numpy import load_file
from test_models import SMALL

from tpaw_jax import models
from tpaw_jax.models.checkpoints.gguf import GLOBAL_NAMES, LAYER_NAMES


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(transformers.LlamaConfig(**SMALL | {"num_hidden_layers": 1}))
    path = tmp_path_factory.mktemp("hf")
    model.save_pretrained(path)
    return path


def write_gguf(path, directory, quantization, **fields):
    """The model of `directory` as GGUF: matrices in one block format, norms in float32, q and k rows interleaved."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_uint32("llama.embedding_length", 64)
    writer.add_uint32("llama.feed_forward_length", 96)
    writer.add_uint32("llama.block_count", 1)
    writer.add_uint32("llama.attention.head_count", 4)
    writer.add_uint32("llama.attention.head_count_kv", 2)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-6)
    writer.add_uint32("llama.context_length", 8192)
    for name, value in fields.items():
        writer.add_string(name.replace("__", "."), value)
    names = GLOBAL_NAMES | {f"model.layers.0.{hf}": f"blk.0.{name}" for hf, name in LAYER_NAMES.items()}
    for hf, values in load_file(directory / "model.safetensors").items():
        for projection, heads in (("q_proj", 4), ("k_proj", 2)):
            if projection in hf:
                rows, columns = values.shape
                values = values.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)
        kind = quantization if values.ndim == 2 else Q.F32
        writer.add_tensor(names[hf], gguf.quants.quantize(np.ascontiguousarray(values), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize(
    ("quantization", "tolerance"),
    [(Q.F32, 0), (Q.F16, 1e-4), (Q.BF16, 1e-3), (Q.Q8_0, 1e-3), (Q.Q5_0, 6e-3), (Q.Q4_1, 1e-2), (Q.Q4_0, 1e-2)],
)
def test_block_formats_give_the_models_parameters(tmp_path, directory, quantization, tolerance):
    path = write_gguf(tmp_path / "model.gguf", directory, quantization)
    config, params = models.load_pretrained(path)
    expected_config, expected = models.load_pretrained(directory)
    assert (config.num_heads, config.num_kv_heads, config.tie_embeddings) == (4, 2, expected_config.tie_embeddings)
    # Weights have a standard deviation of 0.02, so these tolerances are those of the formats' steps.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=tolerance), params, expected)


def test_rope_scaling_that_is_not_supported_is_told(tmp_path, directory):
    path = write_gguf(tmp_path / "model.gguf", directory, Q.F32, llama__rope__scaling__type="yarn")
    with pytest.raises(ValueError, match="rope type 'yarn' in GGUF is not supported"):
        models.load_pretrained(path)


def test_a_damaged_file_is_told(tmp_path, directory):
    path = write_gguf(tmp_path / "model.gguf", directory, Q.F32)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"model.gguf: not a readable GGUF file"):
        models.load_pretrained(path)
