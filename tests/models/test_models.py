"""Parity with transformers, loading and export, and error messages for unusable checkpoints."""

import dataclasses
import json

import forked
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torchless
import transformers
from conftest import SIMILAR, STORIES, random_prompts
from families import GRANITE, LLAMA31_ROPE, MODELS, SMALL, random_model
from safetensors.numpy import load_file, save_file

from tpaw_jax import models
from tpaw_jax.config import SamplingConfig
from tpaw_jax.generation import engine
from tpaw_jax.generation.decoder import decoder_of
from tpaw_jax.generation.slots import make_sampler
from tpaw_jax.models import Transformer, block, hub
from tpaw_jax.models.checkpoints import config_json
from tpaw_jax.models.rope import rope_frequencies

ALIKE = ("llama-untied", "mistral", "phi3", "qwen2-window", "mixtral", "yarn-of-deepseek")


@pytest.fixture(params=[pytest.param(name, marks=SIMILAR) if name in ALIKE else name for name in MODELS])
def hugging_face(request, tmp_path):
    """A random transformers model and the directory it was saved to."""
    model = random_model(request.param, tmp_path / "hf")
    return model, tmp_path / "hf"


def torch_logits(model, tokens):
    with torch.no_grad():
        return model(torch.tensor(np.asarray(tokens))).logits.numpy()


def test_logits_equal_transformers_at_positions_0_to_4095_and_after_export(hugging_face, tmp_path):
    model, directory = hugging_face
    config, params = models.load_pretrained(directory)
    tokens = np.random.default_rng(0).integers(3, 256, (1, 4096)).astype(np.int32)
    apply = Transformer(dataclasses.replace(config, rope_length=tokens.shape[1])).apply
    ours = jax.jit(lambda p, t: apply({"params": p}, t))(params, tokens)
    assert np.abs(ours - torch_logits(model, tokens)).max() <= 1e-4

    exported = models.save_pretrained(tmp_path / "exported", config, params, max_shard_bytes=100_000)
    assert (exported / "model.safetensors.index.json").exists()
    again = transformers.AutoModelForCausalLM.from_pretrained(exported).eval()
    np.testing.assert_array_equal(torch_logits(again, tokens[:, :64]), torch_logits(model, tokens[:, :64]))
    config_again, params_again = models.load_pretrained(exported)
    assert config_again == config
    jax.tree.map(np.testing.assert_array_equal, params_again, params)


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
def test_sampled_tokens_have_the_log_probs_of_transformers(hugging_face, platform):
    """Prompts in one row, a slot that is refilled, and both ways to compute them: packed matrices, and XLA alone."""
    model, directory = hugging_face
    config, params = models.load_pretrained(directory)
    prompts = random_prompts(np.random.default_rng(6), 3, vocabulary=256, longest=150)[0]
    decoder = decoder_of(Transformer(config), platform=platform)
    sampler = make_sampler(decoder, SamplingConfig(max_new_tokens=6, slots=2), ())
    made = engine.generate(sampler, params, prompts, seed=1, round_number=0)
    for prompt, tokens, log_probs in zip(prompts.prompt_tokens, made.tokens, made.log_probs, strict=True):
        assert len(tokens) == 6
        logits = torch_logits(model, np.concatenate([prompt, tokens])[None])[0, len(prompt) - 1 : -1]
        expected = jax.nn.log_softmax(logits)[np.arange(6), tokens]
        np.testing.assert_allclose(log_probs, expected, atol=1e-4)


def test_longrope_is_exported_as_transformers_4_wants_it_and_limits_the_positions(tmp_path):
    random_model("phi3-longrope", tmp_path)
    config = models.load_architecture(tmp_path)
    fields = config_json.to_dict(config, "float32")
    assert sorted(fields["rope_scaling"]) == ["long_factor", "short_factor", "type"]
    assert fields["original_max_position_embeddings"] == config.positions == 1024
    assert dataclasses.replace(config, rope_length=2000).positions == 2000
    assert dataclasses.replace(config, rope_length=200).positions == 1024
    stretched = {**fields, "rope_scaling": {**fields["rope_scaling"], "factor": 2.0}}
    again = config_json.from_dict(stretched, "here")
    assert config_json.to_dict(again, "float32")["rope_scaling"]["factor"] == 2.0


def test_the_text_of_a_model_with_a_vision_tower_is_loaded(tmp_path):
    cls, extra = MODELS["gemma3"]
    vision = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    sizes = {"image_size": 28, "patch_size": 14}
    torch.manual_seed(3)
    config = transformers.Gemma3Config(
        text_config=cls(**SMALL | extra).to_dict(), vision_config=vision | sizes, mm_tokens_per_image=4
    )
    model = transformers.Gemma3ForConditionalGeneration(config).eval()
    model.save_pretrained(tmp_path)
    assert any("vision_tower." in name for name in load_file(tmp_path / "model.safetensors"))
    ours, params = models.load_pretrained(tmp_path)
    assert ours.model_type == "gemma3_text"
    tokens = np.random.default_rng(0).integers(3, 200, (1, 100)).astype(np.int32)
    found = Transformer(ours).apply({"params": params}, tokens)
    np.testing.assert_allclose(found, torch_logits(model, tokens), atol=1e-4)


def test_joined_matrices_of_another_shape_are_told(tmp_path):
    random_model("phi3", tmp_path)
    fields = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(fields | {"num_key_value_heads": 1}))
    with pytest.raises(
        ValueError, match=r"2 tensors have the wrong shape: 'model.layers.0.self_attn.qkv_proj.weight' is"
    ):
        models.load_pretrained(tmp_path)


def test_constants_are_rounded_only_where_transformers_rounds_them():
    x = jnp.arange(1, 200, dtype=jnp.bfloat16)
    exact = np.asarray(x, np.float32) * np.float32(0.22)
    found = block.scaled(x, 0.22)
    np.testing.assert_array_equal(found, jnp.asarray(exact, jnp.bfloat16))
    assert (found != x * jnp.bfloat16(0.22)).any()
    gemma = config_json.from_dict({**SMALL, "model_type": "gemma3_text", "hidden_size": 5376}, "here")
    assert block.embedding_multiplier(gemma, jnp.bfloat16) == 73.5
    assert block.embedding_multiplier(gemma, jnp.float32) == pytest.approx(5376**0.5)
    granite = config_json.from_dict({**SMALL, **GRANITE, "model_type": "granite", "rms_norm_eps": 1e-6}, "here")
    assert block.embedding_multiplier(granite, jnp.bfloat16) == 12.0


LEFT_OUT = {  # by transformers 4, where a value is the default of the class
    "smollm3": ("tie_word_embeddings", "layer_types"),
    "gemma3": ("rms_norm_eps", "tie_word_embeddings"),
    "qwen2-window": ("layer_types",),
}


@pytest.mark.parametrize("name", MODELS)
def test_configurations_come_back_from_what_is_written(name):
    cls, extra = MODELS[name]
    fields = cls(**SMALL | extra).to_dict()
    ours = config_json.from_dict(fields, "here")
    assert config_json.from_dict(config_json.to_dict(ours, "float32"), "there") == ours
    theirs = cls(**{k: v for k, v in config_json.to_dict(ours, "float32").items() if k != "architectures"})
    assert config_json.from_dict(theirs.to_dict(), "transformers") == ours
    left = {key: value for key, value in fields.items() if key not in LEFT_OUT.get(name, ())}
    assert config_json.from_dict(left, "short") == ours


@pytest.mark.parametrize("layers", [1, 2, 9])
def test_layers_that_are_all_alike_are_written_as_such(layers):
    small = SMALL | {"num_hidden_layers": layers}
    for fields in (
        {"model_type": "smollm3", "no_rope_layers": [1] * layers},
        {"model_type": "gemma3_text", "layer_types": ["full_attention"] * layers},
        {"model_type": "gemma3_text", "layer_types": ["sliding_attention"] * layers},
        {"model_type": "qwen3", "use_sliding_window": True, "max_window_layers": 0},
    ):
        ours = config_json.from_dict({**small, "rms_norm_eps": 1e-6, **fields}, "here")
        assert len(ours.kinds) == 1
        assert config_json.from_dict(config_json.to_dict(ours, "float32"), "there") == ours


def test_what_gemma_leaves_out_of_its_configuration_is_known():
    fields = {"hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34, "sliding_window": 1024}
    fields |= {"model_type": "gemma3_text", "rope_scaling": {"factor": 8.0, "rope_type": "linear"}}
    ours = config_json.from_dict({"model_type": "gemma3", "text_config": fields}, "here")
    theirs = transformers.Gemma3TextConfig(**fields)
    assert (ours.vocab_size, ours.num_heads, ours.num_kv_heads, ours.head_dim) == (262208, 8, 4, 256)
    assert ours.window_layers == tuple(one == "sliding_attention" for one in theirs.layer_types)
    assert [kind.rope_theta for kind in ours.kinds] == [1e4, 1e6]
    assert [kind.window for kind in ours.kinds] == [1024, None]
    assert [kind.rope_scaling is None for kind in ours.kinds] == [True, False]


def test_every_layer_equals_transformers(tmp_path):
    torch.manual_seed(1)
    for depth in (1, 2, 3):  # hidden states after each depth, through models cut to it
        model = transformers.AutoModelForCausalLM.from_config(
            transformers.Qwen3Config(**SMALL | {"num_hidden_layers": depth, "head_dim": 32})
        ).eval()
        model.save_pretrained(tmp_path / str(depth))
        config, params = models.load_pretrained(tmp_path / str(depth))
        tokens = np.random.default_rng(depth).integers(3, 256, (2, 33)).astype(np.int32)
        with torch.no_grad():
            theirs = model.model(torch.tensor(tokens)).last_hidden_state.numpy()
        ours = Transformer(config).apply({"params": params}, tokens, method="hidden")
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_packed_segments_equal_separate_sequences(stories):
    config, params = stories
    model = Transformer(config)
    rng = np.random.default_rng(0)
    parts = [rng.integers(3, 512, n).astype(np.int32) for n in (5, 9, 3)]
    tokens = np.concatenate(parts)[None]
    positions = np.concatenate([np.arange(len(p)) for p in parts])[None].astype(np.int32)
    segments = np.concatenate([np.full(len(p), i + 1) for i, p in enumerate(parts)])[None].astype(np.int32)
    apply = jax.jit(lambda *x: model.apply({"params": params}, *x)[0])
    packed = apply(tokens, positions, segments)
    alone = np.concatenate([apply(p[None]) for p in parts])
    np.testing.assert_allclose(packed, alone, atol=2e-5)


@pytest.mark.parametrize("remat", ["none", "dots", "layer"])
def test_rematerialization_changes_no_gradient(stories, remat):
    config, params = stories
    tokens = np.arange(3, 35, dtype=np.int32)[None]
    loss = lambda model, p: jnp.sum(jax.nn.log_softmax(model.apply({"params": p}, tokens))[..., 7])
    plain = jax.jit(jax.grad(lambda p: loss(Transformer(config), p)))(params)
    found = jax.jit(jax.grad(lambda p: loss(Transformer(config, remat=remat), p)))(params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), found, plain)


def test_bfloat16_compute_keeps_float32_parameters_and_logits(stories):
    config, params = stories
    tokens = np.arange(3, 19, dtype=np.int32)[None]
    full = Transformer(config).apply({"params": params}, tokens)
    half = Transformer(config, dtype=jnp.bfloat16).apply({"params": params}, tokens)
    assert half.dtype == jnp.float32
    assert np.abs(half - full).max() < 0.5
    assert np.abs(half - full).max() > 0


def test_rope_scaling_leaves_short_waves_and_slows_long_ones():
    scaling = config_json._rope({"rope_parameters": LLAMA31_ROPE}, "here")[1]
    plain, scaled = (rope_frequencies(64, 500000.0, s) for s in (None, scaling))
    np.testing.assert_allclose(scaled[0], plain[0])
    np.testing.assert_allclose(scaled[-1], plain[-1] / 8)


def test_both_spellings_of_rope_are_read():
    old = {"rope_theta": 1e5, "rope_scaling": {k: v for k, v in LLAMA31_ROPE.items() if k != "rope_theta"}}
    new = {"rope_parameters": {**LLAMA31_ROPE, "rope_theta": 1e5}}
    assert config_json._rope(old, "old") == config_json._rope(new, "new")


def broken(tmp_path, change_config=None, change_tensors=None):
    """A copy of the stories model with a changed config.json or changed tensors."""
    directory = tmp_path / "broken"
    directory.mkdir()
    fields = json.loads((STORIES / "config.json").read_text()) | (change_config or {})
    (directory / "config.json").write_text(json.dumps(fields))
    tensors = dict(load_file(STORIES / "model.safetensors"))
    if change_tensors:
        change_tensors(tensors)
    save_file(tensors, directory / "model.safetensors")
    return directory


GEMMA4 = {
    "model_type": "gemma4_text",
    "hidden_act": "gelu_pytorch_tanh",
    "rope_parameters": None,
    "global_head_dim": 16,
    "vocab_size_per_layer_input": 512,
}


@pytest.mark.parametrize(
    ("change_config", "change_tensors", "sentence"),
    [
        ({"model_type": "mamba"}, None, "model_type 'mamba' is not supported; supported are llama"),
        ({"hidden_act": "gelu"}, None, "hidden_act 'gelu' is not supported"),
        ({"attention_bias": True}, None, "attention_bias is true"),
        (
            {"quantization_config": {"quant_method": "awq"}},
            None,
            "quantization_config is set .quant_method 'awq'.*cannot",
        ),
        (
            {"model_type": "qwen3", "use_sliding_window": True, "layer_types": ["chunked_attention"] * 5},
            None,
            "layer_types must have one of full_attention, sliding_attention for each of the 5 layers",
        ),
        ({"final_logit_softcapping": 30.0}, None, "final_logit_softcapping is 30.0, which is not supported for llama"),
        ({"partial_rotary_factor": 0.75}, None, "partial_rotary_factor is 0.75; supported is 1"),
        ({"model_type": "smollm3", "no_rope_layers": [1, 0]}, None, "no_rope_layers must have a 0 or 1 for each of"),
        ({"rope_parameters": {"rope_type": "longrope"}}, None, "rope type 'longrope' is not supported"),
        ({"rope_parameters": {"rope_type": "yarn"}}, None, "yarn rope scaling needs the missing fields factor"),
        ({"hidden_size": None}, None, "the field 'hidden_size' is missing"),
        (GEMMA4, None, "tensors are missing: model.embed_tokens_per_layer.weight, model.layers.0.layer_scalar"),
        (None, lambda t: t.pop("model.norm.weight"), "1 tensors are missing: model.norm.weight"),
        (None, lambda t: t.update(extra=np.zeros(2)), "1 tensors do not belong to a llama model: extra"),
        ({"vocab_size": 500}, None, r"'model.embed_tokens.weight' is \(512, 64\) and should be \(500, 64\)"),
    ],
)
def test_unusable_checkpoints_are_named_errors(tmp_path, change_config, change_tensors, sentence):
    with pytest.raises(ValueError, match=sentence):
        models.load_pretrained(broken(tmp_path, change_config, change_tensors))


def test_a_truncated_file_is_a_named_error(tmp_path):
    directory = broken(tmp_path)
    content = (directory / "model.safetensors").read_bytes()
    (directory / "model.safetensors").write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=r"model.safetensors: not a readable safetensors file"):
        models.load_pretrained(directory)


def test_missing_files_are_named_errors(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no such file or directory, and the download .* failed"):
        models.load_pretrained("nobody/no-such-model")
    with pytest.raises(FileNotFoundError, match=r"config.json: the file is missing"):
        models.load_pretrained(tmp_path)
    (tmp_path / "config.json").write_text((STORIES / "config.json").read_text())
    (tmp_path / "pytorch_model.bin").write_bytes(b"pickled")
    with pytest.raises(FileNotFoundError, match=r"pickled .bin checkpoints are never loaded"):
        models.load_pretrained(tmp_path)


def test_directories_without_a_model_or_a_tokenizer_are_told(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"there is no tokenizer\.json; name a directory with one in policy\.tok"
    ):
        hub.load_tokenizer(broken(tmp_path))
    (tmp_path / "tokenizer.model").write_bytes(b"not SentencePiece")
    with pytest.raises(ValueError, match=r"transformers cannot load the tokenizer .*name that directory in policy.tok"):
        hub.load_tokenizer(tmp_path)
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "meta-llama/Llama-3.1-8B"}')
    (tmp_path / "tokenizer.model").unlink()
    for load in (hub.load_tokenizer, hub.load_architecture, models.load_pretrained):
        with pytest.raises(
            ValueError, match=r"this is an adapter of 'meta-llama/Llama-3\.1-8B', not a model\. Name the"
        ):
            load(tmp_path)


def test_a_shard_outside_the_directory_is_refused(tmp_path):
    directory = broken(tmp_path)
    (directory / "model.safetensors").rename(tmp_path / "outside.safetensors")
    index = {"weight_map": dict.fromkeys(load_file(tmp_path / "outside.safetensors"), "../outside.safetensors")}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="lies outside the directory"):
        models.load_pretrained(directory)


def test_loading_reads_each_parameter_once_and_in_parts(monkeypatch, stories):
    """Sharded placement asks the files for each device's slice only."""
    from tpaw_jax import config
    from tpaw_jax.runtime import sharding

    read = []
    original = hub.SafetensorsSource.read
    monkeypatch.setattr(
        hub.SafetensorsSource,
        "read",
        lambda self, n, i: read.append((n, original(self, n, i).size)) or original(self, n, i),
    )
    mesh = sharding.make_mesh(config.MeshConfig(fsdp=8))
    _, params = models.load_pretrained(STORIES, sharder=sharding.param_sharder(mesh))
    assert max(size for name, size in read if name == "model.embed_tokens.weight") == 512 * 64 // 8
    jax.tree.map(np.testing.assert_array_equal, params, stories[1])


def test_nothing_at_run_time_needs_torch(smollm2_path, tmp_path):
    """The package, a GGUF tokenizer and a template, in a process where torch cannot be found."""
    code, _, errors = forked.start(torchless.run, smollm2_path, output=tmp_path / "printed").finish()
    assert code == 0, errors[-2000:]


def test_the_hubs_cache_of_links_is_read(tmp_path, stories):
    snapshot, blobs = tmp_path / "snapshots" / "c0ffee", tmp_path / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for name in ("config.json", "model.safetensors"):
        (blobs / name[:3]).write_bytes((STORIES / name).read_bytes())
        (snapshot / name).symlink_to(blobs / name[:3])
    _, params = models.load_pretrained(snapshot)
    jax.tree.map(np.testing.assert_array_equal, params, stories[1])


def test_an_export_replaces_an_earlier_one_and_nothing_else(tmp_path, stories):
    models.save_pretrained(tmp_path / "out", *stories)
    models.save_pretrained(tmp_path / "out", *stories)
    (tmp_path / "run" / "ring").mkdir(parents=True)
    (tmp_path / "file").write_text("mine")
    for name in ("run", "file", "."):
        with pytest.raises(ValueError, match="something other than an exported model exists here"):
            models.save_pretrained(tmp_path / name, *stories)
    assert (tmp_path / "run" / "ring").exists()
