"""Adapters: what PEFT computes on torch, merged and beside their base, and PEFT's directories both ways."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
import transformers
from conftest import SIMILAR
from families import random_model
from flax import traverse_util
from safetensors.numpy import load_file, save_file

from tpaw_jax import models
from tpaw_jax.config import LoraConfig, MeshConfig
from tpaw_jax.generation.policy import lora_of
from tpaw_jax.models import Transformer, adapters, quantized
from tpaw_jax.models.checkpoints import adapter_files
from tpaw_jax.objective import team_loss
from tpaw_jax.runtime import sharding

PROMPT = 12
TOKENS = np.random.default_rng(0).integers(3, 256, (2, 40)).astype(np.int32)
TOKENS[1, :PROMPT] = TOKENS[0, :PROMPT]


EXPERTS_ALONE = {"target_modules": [], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}


def mesh_of_one():
    return sharding.make_mesh(MeshConfig(fsdp=1), jax.devices()[:1])


def of_peft(model, directory, size=0.1, **options):
    """A transformers model with random adapters of PEFT, B of the given `size`, which are saved to a directory."""
    settings = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj", "down_proj"], **options}
    torch.manual_seed(1)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **settings)).eval()
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, size)
    wrapped.save_pretrained(directory)
    return wrapped


def ours(directory, of_adapters):
    """Our model with the adapters of a directory, and its parameters."""
    config, base = models.load_pretrained(directory)
    lora = lora_of(LoraConfig(path=str(of_adapters)))
    params = adapters.join(base, adapter_files.load(of_adapters, config, lora, mesh_of_one()))
    return Transformer(config, lora=lora), params


@pytest.fixture(
    params=[
        ("llama-tied", {}),
        ("gemma4", {"use_rslora": True}),
        ("qwen2", {"use_dora": True, "target_modules": "all-linear"}),
        pytest.param(("llama-untied", {"target_modules": "all-linear"}), marks=SIMILAR),
        pytest.param(("qwen3", {"r": 3, "target_modules": ["k_proj", "o_proj", "up_proj"]}), marks=SIMILAR),
        pytest.param(("olmo2", {"target_modules": ["gate_proj"]}), marks=SIMILAR),
        pytest.param(("qwen2-moe", {"target_modules": ["q_proj", "up_proj", "gate_proj", "down_proj"]}), marks=SIMILAR),
        ("mixtral", {"target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]}),
        pytest.param(("qwen3-moe", EXPERTS_ALONE), marks=SIMILAR),
        pytest.param(("gemma4-experts", EXPERTS_ALONE), marks=SIMILAR),
        pytest.param(("smollm2", {"target_modules": "all-linear", "size": 0.01}), marks=SIMILAR),
    ],
    ids=lambda param: param[0],
)
def pair(request, tmp_path):
    """The same model and adapters, in PEFT and here."""
    name, options = request.param
    if name == "smollm2":
        models.save_pretrained(tmp_path / "base", *models.load_pretrained(request.getfixturevalue("smollm2_path")))
        base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    else:
        base = random_model(name, tmp_path / "base")
    theirs = of_peft(base, tmp_path / "adapters", **options)
    return theirs, *ours(tmp_path / "base", tmp_path / "adapters"), tmp_path


def test_logits_are_pefts(pair):
    theirs, model, params, _ = pair
    found = np.asarray(jax.jit(model.apply)({"params": params}, TOKENS))
    with torch.no_grad():
        expected = theirs(torch.tensor(TOKENS, dtype=torch.long)).logits.numpy()
        plain = theirs.get_base_model()
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)
    with theirs.disable_adapter(), torch.no_grad():  # they matter
        assert np.abs(plain(torch.tensor(TOKENS, dtype=torch.long)).logits.numpy() - expected).max() > 0.01


def test_merged_parameters_give_the_same_logits(pair):
    _, model, params, _ = pair
    whole = adapters.merged(params, model.lora.scale)
    found = jax.jit(Transformer(model.config).apply)({"params": whole}, TOKENS)
    beside = np.asarray(jax.jit(model.apply)({"params": params}, TOKENS))
    np.testing.assert_allclose(found, beside, rtol=0, atol=1e-5 * np.abs(beside).max())  # W + s A B is rounded


def test_gradients_of_a_and_b_are_pefts(pair):
    """Of the team loss of one prompt, its target and a response, with three players."""
    theirs, model, params, _ = pair
    trained, (base,) = adapters.parts(params, model.lora)
    tokens = torch.tensor(TOKENS, dtype=torch.long)
    of_torch = torch.log_softmax(theirs(tokens).logits, -1)[:, PROMPT - 1 : -1]
    policy = of_torch.gather(-1, tokens[:, PROMPT:, None]).sum((1, 2))
    players = policy.detach() + torch.tensor([[3.0, -2.0], [-1.0, 4.0], [0.5, -6.0]])
    chosen, rejected = (0.1 * (policy - players)).unbind(-1)
    alpha = torch.where(chosen.detach() <= 0, 6.0, 1.0)
    beta = torch.softmax(-0.5 * (chosen - rejected).detach(), 0)
    (beta * torch.nn.functional.softplus(rejected - alpha * chosen)).sum().backward()

    def loss(trained):
        log_probs = jax.nn.log_softmax(model.apply({"params": adapters.join(trained, base)}, TOKENS))
        picked = jnp.take_along_axis(log_probs[:, PROMPT - 1 : -1], TOKENS[:, PROMPT:, None], axis=-1)
        y, g = jnp.split(picked.sum((1, 2)), 2)
        of_players = jnp.asarray(players.numpy())
        return team_loss(y, g, of_players[:, :1], of_players[:, 1:], lam=0.1, eta=6.0, gamma=0.5).loss

    gradients = {n.replace(".default", ""): p.grad for n, p in theirs.named_parameters() if p.grad is not None}
    found = by_name(jax.jit(jax.grad(loss))(trained), adapter_files._names(model.config))
    assert len(found) == len(gradients)
    for name, gradient in found.items():
        expected = gradients[name if name in gradients else f"{name}.weight"].numpy()
        assert np.linalg.norm(gradient - expected) <= 1e-4 * np.linalg.norm(expected), name


def by_name(tree, names):
    """The gradients of adapters, by PEFT's names."""
    flat, transposed = traverse_util.flatten_dict(tree, sep="/"), adapter_files._transposed
    return adapter_files._experts_joined(
        {
            hf: transposed(np.asarray(value[place]))
            for n, value in flat.items()
            for hf, place, _ in names[n].tensors(value.shape)
        }
    )


def test_directories_go_both_ways(pair):
    theirs, model, params, tmp_path = pair
    trained, _ = adapters.parts(params, model.lora)
    settings = adapter_files.read_settings(tmp_path / "adapters")
    out = adapter_files.save(tmp_path / "ours", model.config, trained, settings, str(tmp_path / "base"))
    before, after = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("adapters", "ours"))
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        np.testing.assert_array_equal(after[name], tensor)
    fresh = random_model_again(theirs, out)
    with torch.no_grad():
        tokens = torch.tensor(TOKENS, dtype=torch.long)
        np.testing.assert_allclose(fresh(tokens).logits, theirs(tokens).logits, rtol=0, atol=1e-5)


def random_model_again(theirs, directory):
    """The base of a PEFT model with the adapters of another directory."""
    return peft.PeftModel.from_pretrained(theirs.unload(), directory).eval()


def test_new_adapters_change_nothing_and_are_drawn_as_pefts(tmp_path):
    random_model("llama-tied", tmp_path, hidden_size=256)
    config, base = models.load_pretrained(tmp_path)
    lora = lora_of(LoraConfig(rank=8, targets=("all-linear",)))
    model = Transformer(config, lora=lora)
    new = adapters.split(model.init(jax.random.key(3), TOKENS)["params"])[0]
    whole = adapters.join(base, new)
    found = model.apply({"params": whole}, TOKENS)
    np.testing.assert_array_equal(found, Transformer(config).apply({"params": base}, TOKENS))
    values = np.asarray(new["layers"]["q"]["lora_a"])
    assert values.shape == (2, 256, 8)
    assert 0.9 / 16 < np.abs(values).max() <= 1 / 16  # uniform within D**-0.5
    np.testing.assert_allclose(values.std(), 1 / 16 / 3**0.5, rtol=0.05)
    assert not np.any(new["layers"]["down"]["lora_b"])
    assert sorted(new["layers"]) == ["down", "gate", "k", "o", "q", "up", "v"]
    gaussian = Transformer(config, lora=lora_of(LoraConfig(rank=8, init="gaussian")))
    drawn = adapters.split(gaussian.init(jax.random.key(3), TOKENS)["params"])[0]
    np.testing.assert_allclose(np.asarray(drawn["layers"]["q"]["lora_a"]).std(), 1 / 8, rtol=0.05)
    assert sorted(drawn["layers"]) == ["q", "v"]


def test_scales():
    assert lora_of(LoraConfig(rank=4, alpha=6)).scale == 1.5
    assert lora_of(LoraConfig(rank=4, alpha=6, rslora=True)).scale == 3.0
    assert lora_of(LoraConfig()) is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type is 'IA3'; only LORA is supported"),
        ({"bias": "all"}, "bias is 'all', which is not supported; it must be 'none'"),
        ({"rank_pattern": {"q_proj": 3}}, "rank_pattern is {'q_proj': 3}"),
        ({"modules_to_save": ["lm_head"]}, r"modules_to_save is \['lm_head'\]"),
        ({"r": 0}, "r is 0; it must be an integer of at least 1"),
        ({"lora_alpha": "much"}, "lora_alpha is 'much'; it must be a number above 0"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa', which changes the base too"),
        ({"use_qalora": True}, "use_qalora is True, which is not supported"),
        ({"r": 5}, "tensors have the wrong shape, such as base_model.model.model.layers.0"),
    ],
)
def test_adapters_that_cannot_be_used_are_told(tmp_path, changes, message):
    of_peft(random_model("llama-tied", tmp_path / "base"), tmp_path / "adapters")
    file = tmp_path / "adapters" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    with pytest.raises(ValueError, match=message):
        ours(tmp_path / "base", tmp_path / "adapters")


def test_adapters_of_another_model_are_told(tmp_path):
    of_peft(random_model("llama-tied", tmp_path / "base"), tmp_path / "adapters")
    random_model("llama-tied", tmp_path / "deeper", num_hidden_layers=3)
    with pytest.raises(ValueError, match=r"6 tensors are missing, such as base_model\.model\.model\.layers\.2"):
        ours(tmp_path / "deeper", tmp_path / "adapters")
    file = tmp_path / "adapters" / "adapter_model.safetensors"
    tensors = load_file(file)
    save_file({name.replace("q_proj", "router"): value for name, value in tensors.items()}, file)
    with pytest.raises(ValueError, match="it has adapters of router; supported are those of q_proj"):
        ours(tmp_path / "base", tmp_path / "adapters")


def test_settings_that_contradict_a_directory_are_told(tmp_path):
    of_peft(random_model("llama-tied", tmp_path / "base"), tmp_path / "adapters")
    path = str(tmp_path / "adapters")
    with pytest.raises(ValueError, match=r"policy\.lora\.alpha is 9\.0, but that of the adapters at .* is 6\.0"):
        lora_of(LoraConfig(alpha=9.0, path=path))
    with pytest.raises(ValueError, match=r"policy\.lora\.targets is .*'o_proj'.*, but that of the adapters"):
        lora_of(LoraConfig(targets=("o_proj",), path=path))
    config, _ = models.load_pretrained(tmp_path / "base")
    with pytest.raises(ValueError, match=r"rank, scale and use_dora are \(4, 1\.5, False\), but those of policy\.lora"):
        adapter_files.load(tmp_path / "adapters", config, lora_of(LoraConfig(rank=8, path=path)), mesh_of_one())


@pytest.mark.parametrize("dora", [False, True])
def test_a_base_of_8_bits_is_close_and_computes_what_its_merged_model_does(tmp_path, dora):
    random_model("qwen2", tmp_path)
    config, base = models.load_pretrained(tmp_path)
    kernels = jax.tree.map(np.array, base["layers"])
    rounded = quantized.quantize_projections(base, sharding.param_sharder(mesh_of_one()))
    for name in adapters.PROJECTIONS.values():
        own, before = rounded["layers"][name], kernels[name]["kernel"]
        assert own["kernel"].dtype == jnp.int8
        scale = np.asarray(own["kernel_scale"])[:, None]
        np.testing.assert_allclose(np.float32(own["kernel"]) * scale, before, rtol=0, atol=0.501 * scale.max())
        np.testing.assert_array_equal(np.abs(own["kernel"]).max(axis=1), 127)
    lora = lora_of(LoraConfig(rank=4, targets=("q_proj", "down_proj"), dora=dora))
    model = Transformer(config, lora=lora)
    new = adapters.split(model.init(jax.random.key(0), TOKENS)["params"])[0]
    new = adapters.with_magnitudes(new, rounded) if dora else new
    params = adapters.join(rounded, new)
    plain = adapters.merged(rounded, lora.scale)
    found = jax.jit(model.apply)({"params": params}, TOKENS)
    np.testing.assert_allclose(found, Transformer(config).apply({"params": plain}, TOKENS), rtol=0, atol=1e-5)
    moved = jax.tree.map(lambda x: x + 0.1 * jax.random.normal(jax.random.key(1), x.shape), new)
    params = adapters.join(rounded, moved)
    found, whole = jax.jit(model.apply)({"params": params}, TOKENS), adapters.merged(params, lora.scale)
    assert {x.dtype for x in jax.tree.leaves(whole)} == {jnp.dtype("float32")}
    np.testing.assert_allclose(found, Transformer(config).apply({"params": whole}, TOKENS), rtol=0, atol=5e-5)
    assert np.abs(found - Transformer(config).apply({"params": plain}, TOKENS)).max() > 0.1
