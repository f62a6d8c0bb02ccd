"""Each public function that claims a derivative, against differences: the gradient against differences of the function,
in reverse and forward mode, and the second derivative, in each order of modes, against differences of the gradient.

Float64; along a random direction in all arguments at once. What has no derivative raises.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign import decoding, infalign, tree
from tests.derivative_cases import BASE, CASES, LEVEL, RANK, ROOTS, TILT, rule_of_ranks, weighed


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


def directional(f: Callable[..., Any], at: Any, along: Any) -> Any:
    """Fourth-order central differences of f along a direction; f may give a tree."""

    def moved(step: float) -> Any:
        return f(*jax.tree.map(lambda x, d: x + step * d, at, along))

    h = 1e-4
    return jax.tree.map(lambda a, b, c, d: (8 * (b - c) - (a - d)) / (12 * h), *(moved(k * h) for k in (2, 1, -1, -2)))


def dot(a: Any, b: Any) -> jax.Array:
    return jax.tree.reduce(jnp.add, jax.tree.map(jnp.vdot, a, b))


@pytest.mark.parametrize("name", CASES)
def test_derivatives_are_those_of_differences_in_every_mode_to_second_order(name):
    f, given = CASES[name]
    at = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), given)
    leaves, structure = jax.tree.flatten(at)
    draw = np.random.default_rng(7)
    # In units of each argument, so that a small one is not moved out of its range.
    along = structure.unflatten([jnp.asarray(draw.normal(size=x.shape)) * jnp.minimum(jnp.abs(x), 1) for x in leaves])
    numbers = tuple(range(len(at)))
    value = jax.jit(lambda *x: weighed(f(*x)))
    gradient = jax.jit(jax.grad(value, numbers))

    def forward(*x: Any) -> jax.Array:
        return jax.jvp(value, x, along)[1]

    @jax.jit  # one program: each is compiled with what the others share
    def in_each_mode(*x: Any) -> dict[str, jax.Array]:
        return {
            "forward": forward(*x),
            "forward over reverse": dot(jax.jvp(gradient, x, along)[1], along),
            "forward over forward": jax.jvp(forward, x, along)[1],
            "reverse over forward": dot(jax.grad(forward, numbers)(*x), along),
            "reverse over reverse": dot(jax.grad(lambda *x: dot(gradient(*x), along), numbers)(*x), along),
        }

    slope, found = gradient(*at), in_each_mode(*at)
    size = max(1.0, float(jnp.sqrt(dot(along, along)) * jnp.sqrt(dot(slope, slope))))
    first = directional(value, at, along)
    np.testing.assert_allclose(dot(slope, along), first, rtol=1e-7, atol=1e-8 * size, err_msg="reverse")
    np.testing.assert_allclose(found.pop("forward"), first, rtol=1e-7, atol=1e-8 * size, err_msg="forward")

    second = dot(directional(gradient, at, along), along)
    size = max(size, abs(float(second)))
    for modes, curvature in found.items():
        np.testing.assert_allclose(curvature, second, rtol=1e-6, atol=1e-7 * size, err_msg=modes)


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("name", ["match_kl", "infalign.match_kl"])
def test_derivatives_of_a_root_are_right_up_to_the_third(name, order):
    f = ROOTS[name]
    for _ in range(order - 1):
        f = jax.grad(f)
    h = 1e-3
    expected = (8 * (f(0.5 + h) - f(0.5 - h)) - (f(0.5 + 2 * h) - f(0.5 - 2 * h))) / (12 * h)
    np.testing.assert_allclose(jax.grad(f)(0.5), expected, rtol=1e-7)


@pytest.mark.parametrize("mode", [jax.grad, jax.jacfwd], ids=["reverse", "forward"])
@pytest.mark.parametrize("compiled", [False, True])
def test_a_win_rate_of_samples_refuses_to_be_differentiated(mode, compiled):
    def mean(log_prob: jax.Array) -> jax.Array:
        rule = {"rank": RANK, "rule": rule_of_ranks, "n": 2, "pairs": 10}
        return infalign.sampled_win_rate(jax.random.key(0), log_prob=log_prob, log_base=BASE[0], **rule).mean

    with pytest.raises(ValueError, match="sampled_win_rate: expected no derivative"):
        mode(jax.jit(mean) if compiled else mean)(jnp.asarray(BASE[0]))


def test_the_loop_that_draws_refuses_reverse_mode():
    def drawn(beta: jax.Array) -> jax.Array:
        params = TILT | {"beta": beta}
        options = {"max_new_tokens": 2, "eos_ids": (0,)}
        return decoding.sample(LEVEL, params, jax.random.key(0), tree.prompts(2), **options).log_prob.sum()

    with pytest.raises(ValueError, match="Reverse-mode differentiation does not work"):
        jax.grad(drawn)(0.7)
