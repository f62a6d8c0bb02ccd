"""Layers that are computed again in the backward pass: the same numbers in less memory."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign import models
from tests.conftest import needs_jit, tiny_lm

TOKENS = jax.random.randint(jax.random.key(3), (2, 40), 0, 11)


def total(lm):
    return lambda params, tokens: jnp.sin(
        lm.hidden(params, tokens, mask=tokens > 2, at=jnp.zeros((2, 1), int) + 39)
    ).sum()


@pytest.mark.parametrize("remat", ["dots", "full"])
def test_gradients_are_those_of_the_whole_pass(remat):
    lm, params = tiny_lm(0, num_layers=3, max_length=64)
    spec = models.Lora(2)
    adapter = jax.tree.map(lambda x: x + 0.1, models.lora.init(jax.random.key(5), lm, spec))
    found, expected = (
        jax.jit(jax.value_and_grad(lambda p, a, m=m: total(m)(models.lora.attach(p, a, spec), TOKENS), (0, 1)))(
            params, adapter
        )
        for m in (dataclasses.replace(lm, remat=remat), lm)
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), found, expected)


def test_derivatives_of_the_gradient_are_right_and_forward_mode_raises():
    lm, params = tiny_lm(0, num_layers=2, max_length=64)
    move = jax.tree.map(lambda x: jnp.sin(jnp.arange(x.size, dtype=x.dtype)).reshape(x.shape), params)

    def product(lm):
        slope = jax.grad(lambda params: total(lm)(params, TOKENS))
        return jax.jit(lambda params: jax.jvp(slope, (params,), (move,))[1])(params)

    again = dataclasses.replace(lm, remat="full")
    for a, b in zip(jax.tree.leaves(product(again)), jax.tree.leaves(product(lm)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4 * float(np.abs(b).max()))
    with pytest.raises(TypeError, match="custom_vjp"):
        jax.jvp(lambda params: total(again)(params, TOKENS), (params,), (move,))


@needs_jit
@pytest.mark.parametrize(("remat", "share"), [("dots", 0.75), ("full", 0.35)])
def test_the_backward_pass_keeps_less(remat, share):
    """Bytes of temporaries as the compiler plans them, at eight layers."""
    small = {"num_layers": 8, "max_length": 256, "hidden_size": 64, "intermediate_size": 256}
    lm, _ = tiny_lm(0, **small)
    params, tokens = jax.eval_shape(lm.init, jax.random.key(0)), jax.ShapeDtypeStruct((4, 256), jnp.int32)

    def planned(lm):
        run = jax.jit(jax.grad(lambda params, tokens: jnp.sin(lm.hidden(params, tokens)).sum()))
        return run.lower(params, tokens).compile().memory_analysis().temp_size_in_bytes

    assert planned(dataclasses.replace(lm, remat=remat)) < share * planned(lm)


def test_remat_is_one_of_three():
    lm, _ = tiny_lm(0)
    with pytest.raises(ValueError, match="remat: expected one of"):
        dataclasses.replace(lm, remat="all")
