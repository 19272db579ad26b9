"""GGUF files of every block format that can be written here, against the safetensors model they were made from."""

import gguf
import jax
import numpy as np
import pytest
import torch
import transformers
from families import SMALL, random_model
from gguf import GGMLQuantizationType as Q
from safetensors.numpy import load_file

from tpaw_jax import models
from tpaw_jax.models.checkpoints.gguf import GGUFSource


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
        writer.add_key_value(name.replace("__", "."), value, gguf.GGUFValueType.get_type(value))
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 1)
    for hf, values in load_file(directory / "model.safetensors").items():
        for projection, heads in (("q_proj", 4), ("k_proj", 2)):
            if projection in hf:
                rows, columns = values.shape
                values = values.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)
        kind = quantization if values.ndim == 2 else Q.F32
        name = names.get_name(hf, (".weight",))
        writer.add_tensor(name, gguf.quants.quantize(np.ascontiguousarray(values), kind), raw_dtype=kind)
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


def test_attention_in_both_directions_is_told(tmp_path, directory):
    path = write_gguf(tmp_path / "model.gguf", directory, Q.F32, llama__attention__causal=False)
    with pytest.raises(ValueError, match=r"'llama.attention.causal' is false"):
        models.load_pretrained(path)


@pytest.mark.parametrize("name", ["embed_tokens", "layers.0.self_attn.q_proj", "layers.0.self_attn.k_proj"])
def test_a_part_of_a_matrix_is_that_part_of_the_whole(name, tmp_path, directory):
    source = GGUFSource(write_gguf(tmp_path / "model.gguf", directory, Q.Q8_0))
    name = f"model.{name}.weight"
    whole = source.read(name, (slice(None), slice(None)))
    for part in [(slice(8, 24), slice(None)), (slice(None), slice(16, 48)), (slice(3, 9), slice(1, 5))]:
        np.testing.assert_array_equal(source.read(name, part), whole[part])


def test_a_damaged_file_is_told(tmp_path, directory):
    path = write_gguf(tmp_path / "model.gguf", directory, Q.F32)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"model.gguf: not a readable GGUF file"):
        models.load_pretrained(path)


ARCHITECTURES = {  # family of `families.MODELS`: architecture, and fields beside the common ones
    "granite": (
        "granite",
        {"embedding_scale": 12.0, "residual_scale": 0.22, "attention.scale": 0.0156, "logit_scale": 8.0},
    ),
    "smollm3": ("smollm3", {}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {"attention.key_length": 32}),
    "olmo2": ("olmo2", {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}),
    "phi3": ("phi3", {}),
    "gemma2": (
        "gemma2",
        {
            "attention.key_length": 32,
            "attention.sliding_window": 40,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 3.0,
        },
    ),
    "gemma3": (
        "gemma3",
        {
            "attention.key_length": 32,
            "attention.sliding_window": 40,
            "rope.scaling.type": "linear",
            "rope.scaling.factor": 8.0,
        },
    ),
    "mixtral": ("llama", {"expert_count": 4, "expert_used_count": 2, "rope.freq_base": 1e6}),
    "qwen2-moe": (
        "qwen2moe",
        {
            "expert_count": 8,
            "expert_used_count": 3,
            "expert_feed_forward_length": 48,
            "expert_shared_feed_forward_length": 80,
        },
    ),
    "qwen3-moe": (
        "qwen3moe",
        {
            "attention.key_length": 32,
            "expert_count": 8,
            "expert_used_count": 3,
            "expert_feed_forward_length": 48,
        },
    ),
}
CHANGES = {  # what GGUF does not say is as llama.cpp assumes it
    "smollm3": {"num_hidden_layers": 4, "no_rope_layers": [1, 1, 1, 0]},
    "gemma2": {"query_pre_attn_scalar": 32},
    "gemma3": {
        "num_hidden_layers": 6,
        "query_pre_attn_scalar": 32,
        "layer_types": ["sliding_attention"] * 5 + ["full_attention"],
    },
}


def as_converted(architecture, name, values, config):
    """A tensor as llama.cpp's convert_hf_to_gguf.py writes it."""
    if architecture in ("gemma2", "gemma3") and name.endswith("norm.weight"):
        return values + 1
    if architecture in ("llama", "granite", "smollm3"):
        for projection, heads in (("q_proj", config.num_heads), ("k_proj", config.num_kv_heads)):
            if projection in name:
                halves = values.reshape(heads, 2, -1, values.shape[-1])
                return halves.swapaxes(1, 2).reshape(values.shape)
    return values


@pytest.mark.parametrize("family", ARCHITECTURES)
def test_every_architecture_gives_the_parameters_and_options_of_its_family(family, tmp_path):
    (architecture, fields), directory = ARCHITECTURES[family], tmp_path / "hf"
    random_model(family, directory, **CHANGES.get(family, {}))
    expected, params = models.load_pretrained(directory)
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", architecture)
    common = {
        "embedding_length": expected.hidden_size,
        "feed_forward_length": expected.intermediate_size,
        "block_count": expected.num_layers,
        "attention.head_count": expected.num_heads,
        "attention.head_count_kv": expected.num_kv_heads,
        "attention.layer_norm_rms_epsilon": expected.rms_norm_eps,
        "context_length": expected.max_position_embeddings,
        "rope.freq_base": expected.rope_theta,
    }
    add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    for name, value in (common | fields).items():
        add[type(value)](f"{architecture}.{name}", value)
    number = next(one for one, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names, experts = gguf.get_tensor_name_map(number, expected.num_layers), {}
    exported = models.save_pretrained(tmp_path / "exported", expected, params)  # with experts apart
    for hf, values in load_file(exported / "model.safetensors").items():
        values, apart = as_converted(architecture, hf, values, expected), hf.split(".experts.")
        if len(apart) == 2:
            number, rest = apart[1].split(".", 1)
            experts.setdefault(f"{apart[0]}.experts.{rest}", {})[int(number)] = values
        elif not (expected.tie_embeddings and hf == "lm_head.weight"):
            writer.add_tensor(names.get_name(hf, (".weight", ".bias")), np.ascontiguousarray(values))
    for hf, of_experts in experts.items():
        writer.add_tensor(names.get_name(hf, (".weight",)), np.stack([of_experts[i] for i in range(len(of_experts))]))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    config, found = models.load_pretrained(tmp_path / "model.gguf")
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), found, params)
    tokens = np.random.default_rng(0).integers(3, 256, (1, 100)).astype(np.int32)
    logits = lambda config, params: models.Transformer(config).apply({"params": params}, tokens)
    np.testing.assert_allclose(logits(config, found), logits(expected, params), atol=1e-5)
