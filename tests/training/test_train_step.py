"""The team step: accumulation, schedules, skipped steps, dry runs, the step-0 hazard, several devices."""

import contextlib
import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import transformers
from conftest import SIMILAR, random_prompts
from jax.sharding import PartitionSpec as P

from tpaw_jax.config import MeshConfig, ObjectiveConfig, PackingConfig, RunConfig, TrainConfig
from tpaw_jax.data import packing, prefix_trees
from tpaw_jax.models import EINSUM, TILES, Transformer, adapters, quantized, shard_model
from tpaw_jax.models.adapters import Lora
from tpaw_jax.models.parallel import collectives, context
from tpaw_jax.runtime import sharding, tpu
from tpaw_jax.training import batch_shapes, learning_rate, logprobs, scoring, train_step
from tpaw_jax.training.train_step import StepScalars
from tpaw_jax.types import TeamScores, TreeBatch


def setup(
    stories,
    devices=1,
    rows_per_batch=2,
    most=4,
    compute=jnp.float32,
    remat="layer",
    mesh=None,
    sum_over_data=False,
    attention=TILES,
    loss="team",
    lora=None,
    **train,
):
    prompts, rounds = random_prompts(np.random.default_rng(0), 10)
    trees = prefix_trees.trees_of_window(prompts, rounds[::-1], prefix_trees.first_sources(prompts, rounds))
    rows = packing.pack(trees, PackingConfig(row_length=128, max_responses_per_row=12))
    meshed, mesh = mesh, sharding.make_mesh(mesh or MeshConfig(fsdp=devices), jax.devices()[:devices])
    shared_by = 1 if meshed is None else meshed.context
    model = Transformer(stories[0], dtype=compute, remat=remat, attention=attention, lora=lora)
    model = shard_model(model, stories[1], mesh, context=shared_by)
    how = model.parallel._replace(sum_over_data=sum_over_data)
    model = model.clone(parallel=how)
    log_prob_fn = logprobs.make_log_prob_fn(model, 64)
    config = TrainConfig(**{"optimizer": "adamw", "epsilon": 1e-4, **train})
    optimizer = train_step.make_optimizer(config)
    params = jax.device_put(stories[1], sharding.param_shardings(stories[1], mesh))
    params = jax.tree.map(jnp.copy, params)  # the step donates them
    scorer = scoring.make_scorer(log_prob_fn, mesh, context=shared_by)
    scored = scoring.score(scorer, params, rows, rows_per_batch)
    scores = TeamScores(np.stack([scored, scored + 3, scored - 2]), np.ones(3, bool))
    router = train_step.RouterLosses(balance=0.3, z=0.05) if model.config.num_experts else None
    step = train_step.make_train_step(
        logprobs.make_routed_log_prob_fn(model, 64) if router else log_prob_fn,
        optimizer,
        ObjectiveConfig(loss=loss),
        mesh,
        summed_over_data=how.summed_over_data(),
        context=shared_by,
        router=router,
        lora=lora,
    )
    inputs = packing.step_batch(rows, scores, np.arange(len(rows)), rows_per_batch, most)
    trained, frozen = adapters.parts(params, lora)
    of_state = (lambda *inputs: step(*inputs, *frozen)) if frozen else step
    return of_state, train_step.init_state(trained, optimizer, mesh), inputs, scores


def random_params(config):
    return jax.jit(Transformer(config).init)(jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"]


def scalars(learning_rate=1e-3, dry_run=False, tolerance=0.0):
    return StepScalars(np.float32(learning_rate), np.float32(0.1), np.float32(tolerance), np.bool_(dry_run))


def host(tree):
    return jax.tree.map(np.array, tree)


def assert_close(a, b, **tolerance):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **tolerance), a, b)


def test_micro_batches_change_nothing(stories):
    results = []
    for size, most in ((8, 1), (1, 9)):  # one batch of rows, and one row at a time with room to spare
        step, state, inputs, _ = setup(stories, rows_per_batch=size, most=most)
        assert inputs[2] == -(-7 // size) or inputs[2] <= most
        state, metrics = step(state, *inputs, scalars())
        results.append((host(state.params), host(metrics)))
    for params, metrics in results[1:]:
        assert_close(params, results[0][0], rtol=1e-5, atol=1e-6)
        assert_close(metrics, results[0][1], rtol=1e-4, atol=1e-5)


def test_the_step_learns(stories):
    step, state, inputs, _ = setup(stories)
    losses = []
    for _ in range(8):
        state, metrics = step(state, *inputs, scalars(learning_rate=3e-4))
        losses.append(float(metrics["loss"]))
    assert losses[-1] < 0.8 * losses[0]
    assert int(state.step) == 8


def test_metrics_at_the_first_step_are_those_of_theta_t(stories):
    step, state, inputs, _ = setup(stories)
    _, metrics = step(state, *inputs, scalars())
    assert float(metrics["newest_max_abs_reward"]) == 0
    np.testing.assert_array_equal(metrics["player/alpha_is_eta"], [1, 1, 0])  # rewards 0, -0.3 and 0.2
    np.testing.assert_allclose(metrics["player/reward_target"], [0, -0.3, 0.2], atol=1e-5)
    np.testing.assert_allclose(metrics["player/margin"], 0, atol=1e-5)
    np.testing.assert_allclose(metrics["player/beta"], 1 / 3, rtol=1e-5)
    np.testing.assert_allclose(metrics["beta_entropy"], np.log(3), rtol=1e-5)
    assert float(metrics["triplets"]) == 30


@pytest.mark.parametrize(("compute", "remat"), [("float32", "layer"), ("float32", "none"), ("bfloat16", "layer")])
def test_scores_and_step_agree_within_the_noise_that_a_dry_run_measures(stories, compute, remat):
    """The step-0 hazard: a dry run measures the rounding noise, and a tolerance of twice that covers all triplets."""
    step, state, inputs, _ = setup(stories, compute=jnp.dtype(compute), remat=remat)
    before = host(state)
    state, metrics = step(state, *inputs[:2], np.int32(1), scalars(dry_run=True))
    noise = float(metrics["newest_max_abs_reward"])
    assert noise < (1e-5 if compute == "float32" else 0.2)
    jax.tree.map(np.testing.assert_array_equal, host(state), before)
    _, metrics = step(state, *inputs, scalars(tolerance=2 * noise))
    assert float(metrics["player/alpha_is_eta"][0]) == 1.0


def test_a_step_that_is_not_finite_is_skipped_and_counted(stories):
    step, state, inputs, _ = setup(stories)
    batch, scores, used = inputs
    before = host(state.params)
    for count, poison in ((1, np.nan), (2, np.inf)):
        bad = scores.replace(log_probs=np.full_like(scores.log_probs, poison))
        state, metrics = step(state, batch, bad, used, scalars())
        assert int(metrics["skipped"]) == int(metrics["skipped_in_a_row"]) == count
    jax.tree.map(np.testing.assert_array_equal, host(state.params), before)
    state, metrics = step(state, *inputs, scalars())
    assert int(metrics["skipped"]) == 2
    assert int(metrics["skipped_in_a_row"]) == 0
    assert int(state.step) == 3


def test_rounds_with_fewer_players_run_the_same_program(stories):
    from tpaw_jax.observe.profiling import compile_log

    step, state, (batch, scores, used), _ = setup(stories)
    with compile_log() as compiled:
        for present in (1, 2, 3):
            mask = np.broadcast_to(np.arange(3) < present, scores.player_mask.shape)
            state, metrics = step(state, batch, scores.replace(player_mask=mask), used, scalars())
            assert np.isfinite(metrics["loss"])
    assert [name for name, _ in compiled].count("jit(step)") == 1


@pytest.mark.parametrize("optimizer", ["rmsprop", "adamw", "adafactor", "lion", "sgd"])
def test_scaling_a_unit_rate_is_the_optimizer_itself(optimizer):
    config = TrainConfig(optimizer=optimizer, weight_decay=0.1, max_grad_norm=1e9)
    rate, rng = 3e-3, np.random.default_rng(0)
    params = {"w": jnp.asarray(rng.normal(size=(256, 130)), jnp.float32)}
    direct = {
        "rmsprop": lambda: optax.rmsprop(rate, decay=0.99, eps=1e-8, eps_in_sqrt=False),
        "adamw": lambda: optax.adamw(rate, weight_decay=0.1),
        "adafactor": lambda: optax.adafactor(rate),
        "lion": lambda: optax.lion(rate, b1=0.9, b2=0.999, weight_decay=0.1),
        "sgd": lambda: optax.sgd(rate, momentum=0.9),
    }[optimizer]()
    unit = train_step.make_optimizer(config)
    state, direct_state = unit.init(params), direct.init(params)
    for _ in range(3):
        gradient = {"w": jnp.asarray(rng.normal(size=(256, 130)), jnp.float32)}
        ours, state = unit.update(gradient, state, params)
        theirs, direct_state = direct.update(gradient, direct_state, params)
        np.testing.assert_allclose(rate * ours["w"], theirs["w"], rtol=1e-5, atol=1e-9)


def test_rmsprop_is_torchs():
    import torch

    rng = np.random.default_rng(0)
    start, gradients = rng.normal(size=7).astype(np.float32), rng.normal(size=(4, 7)).astype(np.float32)
    theirs = torch.nn.Parameter(torch.tensor(start))
    peer = torch.optim.RMSprop([theirs], lr=1e-2)
    unit = train_step.make_optimizer(TrainConfig(max_grad_norm=1e9))
    params = jnp.asarray(start)
    state = unit.init(params)
    for gradient in gradients:
        theirs.grad = torch.tensor(gradient)
        peer.step()
        update, state = unit.update(jnp.asarray(gradient), state, params)
        params = params + 1e-2 * update
    np.testing.assert_allclose(params, theirs.detach().numpy(), rtol=1e-5)


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
def test_schedules_are_transformers_one_step_earlier(schedule):
    import torch

    name = {"constant": "constant_with_warmup"}.get(schedule, schedule)
    steps, warmup = 40, 4
    peer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2.0)
    scheduler = transformers.get_scheduler(name, peer, num_warmup_steps=warmup, num_training_steps=steps)
    theirs = []
    for _ in range(steps + 1):
        theirs.append(scheduler.get_last_lr()[0])
        peer.step()
        scheduler.step()
    config = TrainConfig(schedule=schedule, learning_rate=(1.0, 2.0))
    ours = learning_rate.of_steps(config, round_number=7, steps=steps)
    np.testing.assert_allclose(ours[:warmup], theirs[1 : warmup + 1], rtol=1e-6)
    np.testing.assert_allclose(ours[warmup:], theirs[warmup:steps], rtol=1e-6)
    assert (ours > 0).all()


def test_bfloat16_parameters_keep_float32_moments(stories):
    half = stories[0], jax.tree.map(lambda p: p.astype(jnp.bfloat16), stories[1])
    step, state, inputs, _ = setup(half)
    state, metrics = jax.eval_shape(step, state, *inputs, scalars())
    assert {p.dtype for p in jax.tree.leaves(state.params)} == {jnp.dtype(jnp.bfloat16)}
    moments = [m for m in jax.tree.leaves(state.opt_state) if m.ndim > 1]
    assert {m.dtype for m in moments} == {jnp.dtype(jnp.float32)}
    assert metrics["loss"].dtype == jnp.float32


def test_bfloat16_parameters_follow_a_float32_master_copy(stories):
    """Updates far below bfloat16's resolution: one alone changes almost no parameter, but they add up."""
    half = stories[0], jax.tree.map(lambda p: p.astype(jnp.bfloat16), stories[1])
    step, state, inputs, _ = setup(half, optimizer="sgd", b1=0.0)
    flat = lambda tree: np.concatenate([np.float32(x).ravel() for x in jax.tree.leaves(host(tree))])
    start, losses = flat(state.params), []
    for _ in range(40):
        state, metrics = step(state, *inputs, scalars(learning_rate=2e-3, tolerance=0.5))
        losses.append(float(metrics["loss"]))
        if len(losses) == 1:
            assert np.mean(flat(state.params) != start) < 0.05
            assert np.mean(flat(state.master) != start) > 0.5
            one_update = np.median(np.abs(flat(state.master) - start))
    rounded = jax.tree.map(lambda p: p.astype(jnp.bfloat16), state.master)
    np.testing.assert_array_equal(flat(state.params), flat(rounded))
    assert np.median(np.abs(flat(state.master) - start)) > 5 * one_update
    assert losses[-1] < 0.9 * losses[0]


def test_scoring_in_larger_batches_gives_the_same_scores(stories):
    from tpaw_jax.observe.profiling import compile_log
    from tpaw_jax.training.logprobs import make_log_prob_fn

    prompts, rounds = random_prompts(np.random.default_rng(5), 27)
    trees = prefix_trees.trees_of_window(prompts, rounds, prefix_trees.first_sources(prompts, rounds))
    rows = packing.pack(trees, PackingConfig(row_length=128, max_responses_per_row=12))
    mesh = sharding.make_mesh(MeshConfig(fsdp=1), jax.devices()[:1])
    scorer = scoring.make_scorer(make_log_prob_fn(Transformer(stories[0], attention=TILES), 64), mesh)
    one = scoring.score(scorer, stories[1], rows, 2)
    with compile_log() as compiled:
        many = scoring.score(scorer, stories[1], rows, 2, batches_at_once=4)
    assert len(rows) % 8  # some rows are left for the small batches
    np.testing.assert_allclose(many, one, rtol=1e-6, atol=1e-5)
    assert len(compiled) == 1  # the large shape; the small one is compiled already


def test_a_users_model_trains_on_one_device_without_a_mesh(stories):
    expected_step, state, inputs, scores = setup(stories)
    settled = scalars(tolerance=1e-3)  # the margins are rounding only: the tolerance decides alike in both programs
    expected, metrics = expected_step(state, *inputs, settled)

    def apply_fn(params, tokens, positions, mask):
        dense = Transformer(stories[0], attention=EINSUM._replace(prepare=lambda _: mask))
        return dense.apply({"params": params}, tokens, positions)

    log_prob_fn = logprobs.from_apply_fn(apply_fn)
    prompts, rounds = random_prompts(np.random.default_rng(0), 10)
    rows = packing.pack(prefix_trees.trees_of_window(prompts, rounds[::-1]), PackingConfig(128, 2, 12))
    scored = scoring.score(scoring.make_scorer(log_prob_fn), stories[1], rows, 2)
    np.testing.assert_allclose(scored, scores.log_probs[0], rtol=1e-5, atol=1e-4)
    optimizer = train_step.make_optimizer(TrainConfig(optimizer="adamw", epsilon=1e-4))
    step = train_step.make_train_step(log_prob_fn, optimizer, ObjectiveConfig())
    state = train_step.init_state(jax.tree.map(jnp.copy, stories[1]), optimizer)
    found, found_metrics = step(state, *inputs, settled)
    np.testing.assert_array_equal(found_metrics["player/alpha_is_eta"], metrics["player/alpha_is_eta"])
    assert_close(found_metrics["loss"], metrics["loss"], rtol=1e-4)
    assert_close(host(found.params), host(expected.params), rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module")
def steps_of_one_device(stories):
    return five_steps(*setup(stories, rows_per_batch=8, most=1))


def five_steps(step, state, inputs, scores):
    losses = []
    for _ in range(5):
        state, metrics = step(state, *inputs, scalars(learning_rate=1e-4, tolerance=1e-3))  # above rounding errors
        losses.append(float(metrics["loss"]))
    return losses, state.params, scores.log_probs


@pytest.mark.parametrize(
    ("mesh", "remat", "sum_over_data"),
    [
        (MeshConfig(fsdp=8), "layer", False),
        (MeshConfig(data=2, fsdp=2, tensor=2), "layer", True),
        (MeshConfig(data=2, fsdp=4), "dots", True),
        pytest.param(MeshConfig(fsdp=2, tensor=4), "none", False, marks=SIMILAR),
        pytest.param(MeshConfig(data=4, fsdp=1, tensor=2), "head", True, marks=SIMILAR),
    ],
    ids=str,
)
def test_eight_devices_take_the_steps_of_one(stories, steps_of_one_device, mesh, remat, sum_over_data, monkeypatch):
    """Whatever the forward pass keeps, and wherever the gradients are summed over `data`."""
    if remat == "dots":  # as for a large model, whose `o` is sent alone
        monkeypatch.setattr(collectives, "SENT_ALONE", 0)
    run = setup(stories, 8, 8, 1, remat=remat, mesh=mesh, sum_over_data=sum_over_data)
    losses, params, log_probs = five_steps(*run)
    kernel = params["layers"]["q"]["kernel"]
    assert kernel.addressable_shards[0].data.shape == (5, 64 // mesh.fsdp, 64 // mesh.tensor)
    np.testing.assert_allclose(losses, steps_of_one_device[0], rtol=1e-5)
    np.testing.assert_allclose(log_probs, steps_of_one_device[2], rtol=1e-5, atol=1e-4)
    assert_close(host(params), host(steps_of_one_device[1]), rtol=0, atol=1e-5)


GEMMA = {
    "post_norm": True,
    "norm_offset": 1.0,
    "activation": "gelu_pytorch_tanh",
    "sliding_window": 20,
    "window_layers": (True, True, False, True, False),
    "local_rope_theta": 1e3,
    "rope_layers": None,
}
GEMMA4 = {  # layers 0, 1 and 2 have keys; 3 reads those of 1, 4 those of 2
    "model_type": "gemma4_text",
    "post_norm": True,
    "qk_norm": True,
    "value_norm": True,
    "output_scale": True,
    "attention_multiplier": 1.0,
    "sliding_window": 20,
    "window_layers": (True, True, False, True, False),
    "local_rope_theta": 1e3,
    "rope_layers": None,
    "global_head_dim": 16,
    "global_kv_heads": 2,
    "kv_shared_layers": 2,
    "kv_shared_size": 344,
    "token_features": 16,
}
GEMMA4_EXPERTS = GEMMA4 | {
    "keys_as_values": True,
    "kv_shared_layers": 0,
    "token_features": 0,
    "num_experts": 8,
    "experts_per_token": 3,
    "expert_size": 32,
    "experts_beside_dense": True,
}
EXPERTS = {
    "model_type": "qwen2_moe",
    "num_experts": 8,
    "experts_per_token": 3,
    "expert_size": 32,
    "shared_expert_size": 48,
    "rope_layers": None,
}
DENSE_FIRST = EXPERTS | {"dense_layers": (True,) + (False,) * 4}


@pytest.mark.parametrize(
    ("mesh", "options"),
    [
        pytest.param(
            MeshConfig(data=2, fsdp=4),
            {"model_type": "olmo2", "pre_norm": False, "post_norm": True, "qk_norm_all": True},
            marks=SIMILAR,
        ),
        pytest.param(
            MeshConfig(fsdp=4, tensor=2),
            {"residual_multiplier": 0.22, "attention_multiplier": 0.1, "logits_scaling": 3.0},
            marks=SIMILAR,
        ),
        pytest.param(MeshConfig(fsdp=4, tensor=2), GEMMA, marks=SIMILAR),
        (MeshConfig(fsdp=8, context=2), GEMMA),
        (MeshConfig(data=2, fsdp=2, tensor=2), GEMMA4),
        pytest.param(MeshConfig(fsdp=8), GEMMA4, marks=SIMILAR),
        pytest.param(MeshConfig(fsdp=8, context=2), GEMMA4, marks=SIMILAR),
        pytest.param(MeshConfig(fsdp=2, expert=2, tensor=2), GEMMA4_EXPERTS, marks=SIMILAR),
        pytest.param(MeshConfig(fsdp=4, expert=2), DENSE_FIRST, marks=SIMILAR),
        pytest.param(MeshConfig(fsdp=2, expert=4), EXPERTS, marks=SIMILAR),
        pytest.param(MeshConfig(expert=8), EXPERTS, marks=SIMILAR),
        pytest.param(MeshConfig(data=2, fsdp=2, expert=2), EXPERTS, marks=SIMILAR),
        pytest.param(MeshConfig(fsdp=4, tensor=2), EXPERTS, marks=SIMILAR),
        (MeshConfig(fsdp=2, expert=2, tensor=2), EXPERTS),
        pytest.param(MeshConfig(fsdp=8, context=2), EXPERTS, marks=SIMILAR),
    ],
    ids=lambda x: x.get("model_type", "llama") if isinstance(x, dict) else None,
)
def test_eight_devices_take_the_steps_of_one_for_layers_of_other_families(stories, mesh, options):
    """Layers that differ in their rope, or in their window and rope; experts with a shared one and router losses."""
    config = dataclasses.replace(stories[0], **{"rope_layers": (True, False, True, False, False), **options})
    params = jax.tree.map(lambda p: p + 0.05 * jax.random.normal(jax.random.key(1), p.shape), random_params(config))
    alone = five_steps(*setup((config, params), rows_per_batch=8, most=1))
    rows, remat = 8 // mesh.context, "layer" if mesh.context == 1 else "dots"
    losses, trained, log_probs = five_steps(*setup((config, params), 8, rows, 8 // rows, remat=remat, mesh=mesh))
    np.testing.assert_allclose(losses, alone[0], rtol=1e-5)
    np.testing.assert_allclose(log_probs, alone[2], rtol=1e-5, atol=1e-4)
    assert_close(host(trained), host(alone[1]), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("mesh", "targets", "options"),
    [
        (MeshConfig(data=2, fsdp=2, tensor=2), ("down", "gate", "k", "o", "q", "up", "v"), {"dora": True}),
        (MeshConfig(fsdp=4, tensor=2), ("o", "v"), {"int8": True}),
        pytest.param(MeshConfig(fsdp=8), ("q", "v"), {}, marks=SIMILAR),
        pytest.param(MeshConfig(fsdp=8, context=2), ("k", "o", "up"), {"dora": True}, marks=SIMILAR),
        pytest.param(MeshConfig(fsdp=4, tensor=2), ("k", "down"), GEMMA4, marks=SIMILAR),
        (MeshConfig(fsdp=2, expert=2, tensor=2), ("experts", "q"), EXPERTS),
        pytest.param(MeshConfig(fsdp=2, expert=4), ("experts", "o"), EXPERTS, marks=SIMILAR),
        pytest.param(MeshConfig(data=2, fsdp=4), ("experts",), EXPERTS, marks=SIMILAR),
        pytest.param(MeshConfig(fsdp=4, expert=2), ("experts",), DENSE_FIRST, marks=SIMILAR),
        pytest.param(MeshConfig(fsdp=4, tensor=2), ("experts", "v"), GEMMA4_EXPERTS, marks=SIMILAR),
        pytest.param(MeshConfig(fsdp=8, context=2), ("experts",), EXPERTS, marks=SIMILAR),
        pytest.param(MeshConfig(fsdp=8), ("experts",), EXPERTS | {"num_experts": 4}, marks=SIMILAR),
    ],
    ids=str,
)
def test_eight_devices_train_adapters_as_one_does(stories, mesh, targets, options):
    lora = Lora(4, 1.5, targets, dora="dora" in options)
    options, in_8_bits = {k: v for k, v in options.items() if k not in ("dora", "int8")}, "int8" in options
    config = dataclasses.replace(stories[0], **options)
    whole = jax.jit(Transformer(config, lora=lora).init)(jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"]
    base = whole if options else adapters.join(whole, stories[1])
    params = jax.tree.map(lambda p: p + 0.05 * jax.random.normal(jax.random.key(1), p.shape), base)
    if in_8_bits:
        params = quantized.quantize_projections(params, sharding.param_sharder(sharding.single_device_mesh()))
    alone = five_steps(*setup((config, params), rows_per_batch=8, most=1, lora=lora))
    rows, remat = 8 // mesh.context, "layer" if mesh.context == 1 else "dots"
    more = {"remat": remat, "mesh": mesh, "lora": lora, "sum_over_data": mesh.data > 1}
    losses, trained, log_probs = five_steps(*setup((config, params), 8, rows, 8 // rows, **more))
    start, _ = adapters.split(params)
    assert jax.tree.structure(start) == jax.tree.structure(trained)
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), host(start), host(trained))
    assert min(jax.tree.leaves(moved)) > 1e-5
    np.testing.assert_allclose(losses, alone[0], rtol=1e-5)
    np.testing.assert_allclose(log_probs, alone[2], rtol=1e-5, atol=1e-4)
    assert_close(host(trained), host(alone[1]), rtol=0, atol=1e-5)


def test_a_round_trains_its_own_adapters_as_if_earlier_ones_were_merged(stories):
    """With weight decay, which must not move the earlier ones either."""
    of_both, of_one = Lora(6, 1.5, ("down", "q", "v"), rounds=2), Lora(3, 1.5, ("down", "q", "v"))
    whole = jax.jit(Transformer(stories[0], lora=of_both).init)(jax.random.key(0), jnp.zeros((1, 4), jnp.int32))
    new = adapters.split(whole["params"])[0]
    moved = jax.tree.map(lambda p: p + 0.05 * jax.random.normal(jax.random.key(1), p.shape), new)
    start = jax.tree.map(lambda a, b: a + b, adapters.of_round(moved, 0, of_both), adapters.of_round(new, 1, of_both))
    earlier = adapters.first_rounds(start, 1, of_both)
    merged = adapters.merged(adapters.join(stories[1], earlier), of_both.scale)
    of_round_1 = lambda path, p: p[..., 3:] if path[-1].key == "lora_a" else p[..., 3:, :]
    later = host(jax.tree.map_with_path(of_round_1, start))
    finals, losses = [], []
    for params, lora in ((adapters.join(stories[1], start), of_both), (adapters.join(merged, later), of_one)):
        step, state, inputs, _ = setup((stories[0], params), rows_per_batch=8, most=1, lora=lora, weight_decay=0.1)
        for _ in range(5):
            state, metrics = step(state, *inputs, scalars()._replace(round_number=np.int32(1)))
            losses.append((float(metrics["loss"]), float(metrics["grad_norm"])))
        finals.append(state.params)
    np.testing.assert_allclose(losses[:5], losses[5:], rtol=1e-4)
    jax.tree.map(np.testing.assert_array_equal, host(adapters.first_rounds(finals[0], 1, of_both)), host(earlier))
    found, moved = jax.tree.map_with_path(of_round_1, finals[0]), jax.tree.map(lambda a, b: a - b, finals[1], later)
    assert_close(host(found), host(finals[1]), rtol=0, atol=1e-5)
    assert min(float(jnp.abs(m).max()) for m in jax.tree.leaves(moved)) > 1e-3


def test_weight_decay_leaves_what_is_not_trained(stories):
    config = dataclasses.replace(stories[0], **GEMMA4)
    params = random_params(config)
    before = host(params)
    step, state, inputs, _ = setup((config, params), rows_per_batch=8, most=1, weight_decay=0.5)
    after = host(step(state, *inputs, scalars())[0].params)
    for stack in ("layers", "global_layers", "kv_shared_layers", "kv_shared_global_layers"):
        np.testing.assert_array_equal(after[stack]["output_scale"]["scale"], before[stack]["output_scale"]["scale"])
        assert (after[stack]["q_norm"]["scale"] != before[stack]["q_norm"]["scale"]).any()


@pytest.mark.parametrize(
    ("options", "mesh", "message"),
    [
        ({}, MeshConfig(expert=2), "mesh.expert is 2; .* and this llama model has none"),
        (EXPERTS, MeshConfig(expert=8, fsdp=1), None),
        (EXPERTS | {"num_experts": 6}, MeshConfig(fsdp=2, expert=4), "mesh.expert is 4; .* qwen2_moe model has 6"),
        (EXPERTS, MeshConfig(fsdp=4, expert=2, context=2), "mesh.context is 2 and mesh.expert is 2"),
        (EXPERTS | {"expert_size": 33}, MeshConfig(fsdp=4, tensor=2), "its 48 and 33 feed-forward features"),
    ],
)
def test_meshes_that_do_not_suit_the_experts_are_told(stories, options, mesh, message):
    config = dataclasses.replace(stories[0], **options)
    params = jax.eval_shape(Transformer(config).init, jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"]
    told = contextlib.nullcontext() if message is None else pytest.raises(ValueError, match=message)
    with told:
        shard_model(Transformer(config), params, sharding.make_mesh(mesh), context=mesh.context)


@pytest.mark.parametrize("objective", ["team", pytest.param("sft", marks=SIMILAR)])
def test_router_losses_do_not_depend_on_micro_batches(stories, objective):
    """Rows are averaged by their triplets, or for SFT by their tokens; what is reported, always by triplets."""
    config = dataclasses.replace(stories[0], **EXPERTS)
    params = random_params(config)
    found = []
    for size, most in ((8, 1), (1, 9)):
        step, state, inputs, _ = setup((config, params), rows_per_batch=size, most=most, loss=objective)
        found.append(step(state, *inputs, scalars(dry_run=True))[1])
    for name in ("loss", "grad_norm", "router/balance", "router/z", "router/busiest"):
        np.testing.assert_allclose(found[0][name], found[1][name], rtol=1e-5)
    losses = 0.3 * found[0]["router/balance"] + 0.05 * found[0]["router/z"]
    without = train_step.RouterLosses(0.0, 0.0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_step, "RouterLosses", lambda **_: without)
        step, state, inputs, _ = setup((config, params), rows_per_batch=8, most=1, loss=objective)
    alone = step(state, *inputs, scalars())[1]["loss"]
    np.testing.assert_allclose(alone + losses, found[0]["loss"], rtol=1e-5 if objective == "team" else 1e-2)
    assert found[0]["loss"] > alone + 0.3  # at least the balance loss of an even load


def test_a_norm_of_all_heads_cannot_be_split_over_devices(stories):
    config = dataclasses.replace(stories[0], model_type="olmo2", qk_norm_all=True)
    mesh = sharding.make_mesh(MeshConfig(fsdp=4, tensor=2))
    with pytest.raises(ValueError, match=r"mesh.tensor is 2; it must be 1 for olmo2 models"):
        shard_model(Transformer(config), stories[1], mesh)


@pytest.mark.parametrize(
    ("mesh", "rows", "attention", "remat"),
    [
        pytest.param(MeshConfig(fsdp=8, context=4), 2, TILES, "layer", marks=SIMILAR, id="a row for four devices"),
        pytest.param(
            MeshConfig(fsdp=8, context=8), 1, TILES, "dots", marks=SIMILAR, id="more devices than key-value heads"
        ),
        pytest.param(MeshConfig(data=2, fsdp=4, context=2), 8, EINSUM, "none", marks=SIMILAR, id="two rows a group"),
        (MeshConfig(fsdp=4, tensor=2, context=2), 2, TILES, "head"),
    ],
)
def test_devices_that_share_rows_take_the_steps_of_one(stories, steps_of_one_device, mesh, rows, attention, remat):
    """Context parallelism: fewer rows than devices."""
    run = setup(stories, 8, rows, -(-8 // rows), mesh=mesh, attention=attention, remat=remat)
    losses, params, log_probs = five_steps(*run)
    assert params["layers"]["q"]["kernel"].addressable_shards[0].data.shape == (5, 64 // mesh.fsdp, 64 // mesh.tensor)
    np.testing.assert_allclose(losses, steps_of_one_device[0], rtol=1e-5)
    np.testing.assert_allclose(log_probs, steps_of_one_device[2], rtol=1e-5, atol=1e-4)
    assert_close(host(params), host(steps_of_one_device[1]), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("mesh", "row_length", "problem"),
    [
        (MeshConfig(fsdp=8, context=3), 128, "mesh.context is 3; it must divide the 8 devices of mesh.fsdp"),
        (MeshConfig(fsdp=4, data=2, context=8), 128, "mesh.context is 8; it must divide the 4 devices of mesh.fsdp"),
        (MeshConfig(fsdp=8, context=8), 100, "packing.row_length is 100; it must be a multiple of mesh.context, 8"),
    ],
)
def test_rows_that_cannot_be_shared_are_refused(mesh, row_length, problem):
    config = RunConfig(mesh=mesh, packing=PackingConfig(row_length=row_length))
    with pytest.raises(ValueError, match=problem):
        batch_shapes.resolve_packing(config, sharding.make_mesh(mesh))


def test_a_batch_has_a_row_for_each_group_of_devices():
    mesh = MeshConfig(fsdp=8, context=4)
    config = RunConfig(mesh=mesh, packing=PackingConfig(rows_per_batch=0))
    assert batch_shapes.resolve_packing(config, sharding.make_mesh(mesh)).rows_per_batch == 2


def test_heads_that_cannot_be_shared_are_refused(stories):
    mesh = sharding.make_mesh(MeshConfig(fsdp=8))
    twelve_heads = dataclasses.replace(stories[0], num_heads=12, num_kv_heads=6)
    with pytest.raises(
        ValueError, match=r"mesh\.context is 4; it must divide the 12 heads, and divide or be a multiple"
    ):
        shard_model(Transformer(twelve_heads), stories[1], mesh, context=4)


def test_predictions_that_a_part_has_no_room_for_are_no_numbers():
    """A part of 2 tokens of a row of 8 has room for 2 x 2 + 2 predictions: for six, but not for seven."""
    mesh = sharding.make_mesh(MeshConfig(fsdp=4), jax.devices()[:4])

    def weights(predictions):
        ids = np.full((1, 8), 2, np.int32)
        ids[0, :predictions] = 0
        zeros = np.zeros((1, 8), np.int32)
        weight = np.ones((1, 2), np.float32)
        batch = TreeBatch(zeros, zeros, zeros, zeros, zeros, zeros, zeros, ids, weight * 0, weight * 0, weight)
        batch = jax.tree.map(lambda x: np.concatenate([x] * 4), batch)
        share = jax.shard_map(
            lambda b: context.rows_of_group(b, 4).triplet_weight, mesh=mesh, in_specs=P("fsdp"), out_specs=P("fsdp")
        )
        return np.asarray(share(batch))

    assert np.isfinite(weights(6)).all()
    assert np.isnan(weights(7)[0]).all()


@pytest.mark.parametrize(
    "sum_over_data", [pytest.param(False, marks=SIMILAR, id="after the loop"), pytest.param(True, id="in the loop")]
)
def test_two_slices_take_the_steps_of_one_device(stories, steps_of_one_device, monkeypatch, sum_over_data):
    monkeypatch.setattr(tpu, "slice_count", lambda devices: 2 if len(devices) == 8 else 1)
    mesh = MeshConfig(data=4, fsdp=2)
    step, *inputs = setup(stories, 8, 8, 1, mesh=mesh, sum_over_data=sum_over_data)
    lowered = step.lower(inputs[0], *inputs[1], scalars()).as_text()
    groups = re.findall(r"all_reduce.*replica_groups = dense<\[(\[.*?\])\]>", lowered)
    across = [group for group in groups if set(re.findall(r"\d, \d", group)) == {"0, 4", "1, 5", "2, 6", "3, 7"}]
    kernels, others = (2 * 4, 4) if sum_over_data else (7, 4)  # attention's as one; one layer is outside of the loop
    assert len(across) == kernels + others
    losses, params, _ = five_steps(step, *inputs)
    np.testing.assert_allclose(losses, steps_of_one_device[0], rtol=1e-5)
    assert_close(host(params), host(steps_of_one_device[1]), rtol=0, atol=1e-5)


def test_the_gradients_that_are_summed_early_are_those_that_only_a_gather_makes(stories):
    """The table of a tied model is looked up too, and norms are not gathered: both are summed after the loop."""
    mesh = sharding.make_mesh(MeshConfig(data=2, fsdp=4), jax.devices()[:8])
    how = shard_model(Transformer(stories[0]), stories[1], mesh).parallel
    assert how.summed_over_data() == frozenset()
    early = how._replace(sum_over_data=True).summed_over_data()
    assert early == {f"layers/{name}/kernel" for name in ("q", "k", "v", "o", "gate", "up", "down")}
