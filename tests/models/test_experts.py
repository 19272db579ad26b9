"""Mixture of experts: dropless dispatch on one device and on several, router losses, and checkpoints."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from conftest import SIMILAR
from families import random_model
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from safetensors.numpy import load_file, save_file
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from tpaw_jax import models
from tpaw_jax.models import Transformer, experts
from tpaw_jax.models.experts import ExpertWeights, Routes
from tpaw_jax.models.parallel import exchange
from tpaw_jax.runtime.sharding import MESH_AXES

TOKENS, EXPERTS, SIZE, FEATURES = 24, 8, 16, 12
MANY = ("mixtral", "qwen2-moe", "qwen3-moe")


def random_layer(rng):
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    matrices = ExpertWeights(*(draw(EXPERTS, SIZE, FEATURES) for _ in range(2)), draw(EXPERTS, FEATURES, SIZE))
    return draw(TOKENS, SIZE), jnp.asarray(rng.uniform(0.1, 1, (TOKENS, 3)), jnp.float32), matrices


def assignments(rng, kind):
    chosen = np.array([rng.permutation(EXPERTS)[:3] for _ in range(TOKENS)])
    if kind == "one expert":
        chosen[:] = 5
    if kind == "one device":
        chosen = np.array([2 + rng.permutation(2)[[0, 1, 0]] for _ in range(TOKENS)])
    if kind == "padding":
        chosen[rng.random(TOKENS) < 0.4] = EXPERTS
    if kind == "only padding":
        chosen[:] = EXPERTS
    return jnp.asarray(chosen, jnp.int32)


def token_by_token(h, weights, matrices, chosen):
    """Every expert computes every token, and the others count zero."""
    gate, up = (jnp.einsum("md,edf->mef", h, matrix) for matrix in matrices[:2])
    outputs = jnp.einsum("mef,efd->med", jax.nn.silu(gate) * up, matrices.down)
    per_expert = jnp.einsum("mx,mxe->me", weights, jax.nn.one_hot(chosen, EXPERTS))
    return jnp.einsum("me,med->md", per_expert, outputs)


KINDS = ["even", "one expert", "one device", "padding", "only padding"]


@pytest.mark.parametrize("devices", [1, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_no_token_is_dropped(kind, devices):
    """Outputs and all gradients, however uneven the router's choice; on four devices, tokens are exchanged."""
    rng = np.random.default_rng(0)
    inputs, chosen, d_out = random_layer(rng), assignments(rng, kind), rng.normal(size=(TOKENS, SIZE))
    mesh = Mesh(np.array(jax.devices()[:devices]).reshape(1, 1, devices, 1), MESH_AXES)
    mixed = exchange.mixed_outputs if devices > 1 else experts.mixed_outputs

    def ours(h, weights, matrices):
        apply = lambda h, weights, matrices, chosen: mixed(h, Routes(chosen, weights), matrices, jax.nn.silu)
        specs = {"in_specs": (P("expert"),) * 4, "out_specs": P("expert"), "check_vma": False}
        return jax.shard_map(apply, mesh=mesh, **specs)(h, weights, matrices, chosen)

    found, vjp = jax.vjp(jax.jit(ours), *inputs)
    expected, expected_vjp = jax.vjp(lambda *inputs: token_by_token(*inputs, chosen), *inputs)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
    d_out = jnp.asarray(d_out, jnp.float32)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), vjp(d_out), expected_vjp(d_out))


def test_an_exchange_has_as_many_rounds_as_the_fullest_pair_of_devices_needs():
    rng = np.random.default_rng(0)
    mesh = Mesh(np.array(jax.devices()[:4]).reshape(1, 1, 4, 1), MESH_AXES)
    rounds_of = jax.jit(
        jax.shard_map(
            lambda chosen: exchange._sorted(chosen, EXPERTS // 4).rounds,
            mesh=mesh,
            in_specs=P("expert"),
            out_specs=P(),
            check_vma=False,
        )
    )
    rounds = {kind: int(rounds_of(assignments(rng, kind))) for kind in KINDS}
    own = TOKENS // 4 * 3  # assignments of a device
    assert exchange.capacity(own, 4) == 2
    assert rounds["one expert"] == rounds["one device"] == own // 2
    assert rounds["only padding"] == 0
    assert rounds["even"] < own // 2


@pytest.mark.parametrize("name", ["qwen3-moe", *(pytest.param(name, marks=SIMILAR) for name in MANY[:2])])
def test_the_load_balance_loss_is_that_of_transformers_for_one_layer(name, tmp_path):
    """Divided by the experts per token; and its gradient. The z-loss is checked against its definition."""
    theirs = random_model(name, tmp_path / "hf", num_hidden_layers=1)
    config, params = models.load_pretrained(tmp_path / "hf")
    tokens = np.random.default_rng(1).integers(3, 256, (1, 60)).astype(np.int32)
    segments = (np.arange(64) < 60).astype(np.int32)[None]
    padded = np.pad(tokens, ((0, 0), (0, 4)))

    def statistics(params):
        model = Transformer(config)
        arguments = padded, np.arange(64)[None], segments
        _, variables = model.apply({"params": params}, *arguments, mutable=["router"])
        return variables["router"]["statistics"]

    ours = statistics(params)
    logits = theirs(torch.tensor(tokens), output_router_logits=True).router_logits
    loss = load_balancing_loss_func(logits, config.num_experts, config.experts_per_token) / config.experts_per_token
    np.testing.assert_allclose(ours.balance, [float(loss.detach())], rtol=1e-5)
    z = torch.mean(torch.logsumexp(logits[0], -1) ** 2)
    np.testing.assert_allclose(ours.z, [float(z.detach())], rtol=1e-5)
    assert 1 < ours.busiest[0] <= config.num_experts / config.experts_per_token

    (loss + 0.1 * z).backward()
    gate = theirs.model.layers[0].mlp.gate.weight.grad.numpy().T
    gradient = jax.grad(lambda p: jnp.sum(statistics(p).balance + 0.1 * statistics(p).z))(params)
    np.testing.assert_allclose(gradient["layers"]["router"]["kernel"][0], gate, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("name", MANY)
def test_experts_may_be_stacked_in_a_checkpoint(name, tmp_path):
    model = random_model(name, tmp_path / "hf")
    model.save_pretrained(tmp_path / "stacked", save_original_format=False)
    stored = load_file(tmp_path / "stacked" / "model.safetensors")
    assert stored["model.layers.0.mlp.experts.gate_up_proj"].ndim == 3
    config, params = models.load_pretrained(tmp_path / "hf")
    config_of_stacked, stacked = models.load_pretrained(tmp_path / "stacked")
    assert config_of_stacked == config
    jax.tree.map(np.testing.assert_array_equal, stacked, params)

    joined = "model.layers.1.mlp.experts.down_proj"
    save_file({**stored, joined: stored[joined][:, :, :-1].copy()}, tmp_path / "stacked" / "model.safetensors")
    with pytest.raises(ValueError, match=rf"1 tensors have the wrong shape: '{joined}' is"):
        models.load_pretrained(tmp_path / "stacked")


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("qwen3-moe", {"mlp_only_layers": [0]}, "3 tensors are missing: model.layers.0.mlp.down_proj.weight"),
        ("qwen2-moe", {"use_sliding_window": True}, "use_sliding_window is True, which is not supported for qwen2_moe"),
        ("qwen2-moe", {"qkv_bias": False}, "qkv_bias is False, which is not supported for qwen2_moe"),
        ("qwen3-moe", {"num_experts_per_tok": 9}, "num_experts_per_tok is 9, but a layer has only 8 experts"),
        ("mixtral", {"num_local_experts": 5}, r"6 tensors are missing: model.layers.0.block_sparse_moe.experts.4"),
    ],
)
def test_models_with_experts_that_are_not_supported_are_told(name, changes, message, tmp_path):
    random_model(name, tmp_path)
    file = tmp_path / "config.json"
    fields = json.loads(file.read_text())
    file.write_text(json.dumps(fields | changes))
    with pytest.raises(ValueError, match=message):
        models.load_pretrained(tmp_path)


def test_routers_are_rounded_to_the_compute_dtype_as_when_they_are_gathered_and_sampled(tmp_path):
    random_model("qwen2-moe", tmp_path)
    config, params = models.load_pretrained(tmp_path)
    rounded = jax.tree.map(lambda x: x, params)
    for name in ("router", "shared_gate"):
        kernel = params["layers"][name]["kernel"]
        rounded["layers"][name] = {"kernel": kernel.astype(jnp.bfloat16).astype(jnp.float32)}
        assert (rounded["layers"][name]["kernel"] != kernel).any()
    tokens = np.random.default_rng(0).integers(3, 256, (1, 40))
    logits = [Transformer(config, jnp.bfloat16).apply({"params": p}, tokens) for p in (params, rounded)]
    np.testing.assert_array_equal(*logits)


def test_products_of_experts_are_kept_if_those_of_other_matrices_are(tmp_path):
    random_model("qwen3-moe", tmp_path)
    config, params = models.load_pretrained(tmp_path)

    def computed(remat):
        loss = lambda p: Transformer(config, remat=remat).apply({"params": p}, jnp.ones((1, 32), jnp.int32)).sum()
        return str(jax.make_jaxpr(jax.grad(loss))(params)).count("ragged_dot_general[")

    assert computed("layer") == computed("dots") + 3


def test_transformers_reads_an_exported_model(tmp_path):
    model = random_model("qwen2-moe", tmp_path / "hf")
    config, params = models.load_pretrained(tmp_path / "hf")
    exported = models.save_pretrained(tmp_path / "exported", config, params)
    again = transformers.AutoModelForCausalLM.from_pretrained(exported)
    assert again.config.shared_expert_intermediate_size == 80
    for ours, theirs in zip(again.parameters(), model.parameters(), strict=True):
        assert torch.equal(ours, theirs)
