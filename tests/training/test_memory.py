"""Rematerialization: all policies give the same step, each keeps less, and the first that fits is chosen."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_train_step import host, scalars, setup

from tpaw_jax.models.transformer import REMAT_POLICIES
from tpaw_jax.training import memory


@pytest.fixture(scope="module")
def steps(stories):
    """For each policy: the compiled step, its memory, and its result on one batch."""
    made = {}
    for remat in REMAT_POLICIES:
        step, state, inputs, _ = setup(stories, remat=remat)
        compiled = step.lower(state, *inputs, scalars(tolerance=1e-3)).compile()
        state, metrics = compiled(state, *inputs, scalars(tolerance=1e-3))
        made[remat] = (
            compiled,
            memory.needed_bytes(compiled),
            host((state.params, metrics["loss"], metrics["grad_norm"])),
        )
    return made


def test_every_policy_takes_the_same_step(steps):
    for _, _, result in steps.values():
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), result, steps["none"][2])


def test_policies_keep_less_and_less(steps):
    none, dots, head, layer = (steps[remat][1] for remat in ("none", "dots", "head", "layer"))
    assert layer < head < dots < none


def test_the_first_that_fits_is_chosen(steps):
    compile_with = lambda remat: steps[remat][0]
    for remat in ("none", "dots", "head", "layer"):
        fit = memory.choose_remat(compile_with, steps[remat][1])
        assert (fit.remat, fit.compiled, fit.needed) == (remat, *steps[remat][:2])
    with pytest.raises(ValueError, match=r"policy\.remat: the training step does not fit .* it needs .* GiB per"):
        memory.choose_remat(compile_with, steps["layer"][1] - 1)


def test_a_program_that_the_compiler_rejects_does_not_fit(steps):
    def compile_with(remat):
        if remat == "none":
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm.")
        return steps[remat][0]

    assert memory.choose_remat(compile_with, 2**40).remat == "dots"


def test_a_step_that_the_compiler_always_rejects_is_an_error():
    def compile_with(remat):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm.")

    with pytest.raises(ValueError, match="it needs more memory than the compiler can allocate"):
        memory.choose_remat(compile_with, 2**30)


def test_there_is_memory_on_this_machine():
    assert 2**20 < memory.available_bytes() < 2**50


def test_a_program_needs_at_least_its_arguments_and_temporaries():
    x = jax.ShapeDtypeStruct((256, 1024), jnp.float32)
    compiled = jax.jit(lambda x: jnp.sin(x) @ jnp.cos(x).T).lower(x).compile()
    assert memory.needed_bytes(compiled) >= x.size * 4 + 256 * 256 * 4
