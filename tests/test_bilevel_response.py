"""The leader's gradient through a follower that is trained: implicit, unrolled and nudged, against the closed form."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign import gibbs, shaping

BASE, UTILITY, REWARD, BETA = np.log([0.5, 0.3, 0.2]), np.array([0.0, 1.0, 3.0]), np.array([0.2, 0.5, 1.0]), 0.7


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


def inner(theta, reward):
    """J = E_pi[r] − beta·KL(pi‖base), of a tabular follower whose parameters are logits."""
    log_policy = jax.nn.log_softmax(theta["logits"])
    return gibbs.utility(log_policy, reward) - BETA * gibbs.kl(log_policy, BASE)


def outer(theta, reward):
    return gibbs.utility(jax.nn.log_softmax(theta["logits"]), UTILITY)


def delivered(reward):
    return shaping.leader_utility(BASE, reward, utility=UTILITY, beta=BETA)


def at_optimum(reward=REWARD):
    return {"leader": jnp.asarray(reward), "follower": {"logits": BASE + jnp.asarray(reward) / BETA + 5.0}}


EXACT = np.exp(BASE + REWARD / BETA) / np.exp(BASE + REWARD / BETA).sum()
SLOPE = EXACT * (UTILITY - EXACT @ UTILITY) / BETA


def test_the_implicit_gradient_is_the_closed_form_s():
    found = jax.jit(lambda params: shaping.implicit(inner, outer, params, damping=1e-8))(at_optimum())
    np.testing.assert_allclose(found.value, EXACT @ UTILITY, atol=1e-12)
    np.testing.assert_allclose(found.gradient, SLOPE, atol=1e-7)
    assert found.inner_gradient < 1e-12
    assert found.residual < 1e-6
    assert found.products <= 3  # two directions of curvature, whatever the shift
    damped = shaping.implicit(inner, outer, at_optimum(), damping=1e-3)
    np.testing.assert_allclose(np.abs(damped.gradient - SLOPE).max(), 3.4e-3, atol=5e-5)


def test_an_outer_objective_of_both_players_keeps_its_direct_part():
    found = shaping.implicit(inner, lambda t, r: outer(t, r) + (r**2).sum(), at_optimum(), damping=1e-8)
    np.testing.assert_allclose(found.gradient, SLOPE + 2 * REWARD, atol=1e-7)


def test_what_is_no_optimum_is_refused_by_the_norm_of_its_gradient():
    params = at_optimum() | {"follower": {"logits": jnp.asarray(BASE)}}
    with pytest.raises(ValueError, match=r"inner_objective: expected an optimum, a gradient of norm at most 0.001"):
        shaping.implicit(inner, outer, params)
    assert np.isnan(jax.jit(lambda p: shaping.implicit(inner, outer, p))(params).gradient).all()
    told = shaping.implicit(inner, outer, params, tolerance=None)
    assert np.isfinite(told.gradient).all()
    assert told.inner_gradient > 0.05
    for name, bad in (("damping", 0.0), ("tolerance", -1.0), ("steps", 0)):
        with pytest.raises(ValueError, match=name):
            shaping.implicit(inner, outer, params, **{name: bad})


def test_a_best_response_has_the_derivatives_of_the_optimum_in_both_modes_to_second_order():
    def through(reward):
        params = {"leader": reward, "follower": jax.lax.stop_gradient(at_optimum(reward)["follower"])}
        return outer(shaping.best_response(inner, params, damping=1e-9), reward)

    r, v = jnp.asarray(REWARD), jnp.array([1.0, 2.0, 3.0])
    assert float(through(r)) == pytest.approx(float(delivered(r)), abs=1e-12)
    np.testing.assert_allclose(jax.jit(jax.grad(through))(r), SLOPE, atol=1e-6)
    np.testing.assert_allclose(jax.jit(lambda r: jax.jvp(through, (r,), (v,))[1])(r), SLOPE @ v, atol=1e-6)
    expected = (0.338270, -0.609043, 0.270773)
    np.testing.assert_allclose(jax.jit(lambda r: jax.jvp(jax.grad(through), (r,), (v,))[1])(r), expected, atol=2e-6)
    np.testing.assert_allclose(jax.jit(jax.grad(lambda r: jax.grad(through)(r) @ v))(r), expected, atol=2e-6)


@pytest.mark.parametrize(
    ("steps", "value", "error"),
    [(1, 0.952109, 0.803), (4, 1.088617, 0.617), (16, 1.382750, 0.115), (64, 1.474940, 3.5e-4)],
)
def test_an_unrolled_follower_is_the_one_that_stops_there(steps, value, error):
    start = {"leader": jnp.asarray(REWARD), "follower": {"logits": jnp.asarray(BASE)}}

    @jax.jit
    def after(reward):
        return shaping.unrolled(inner, outer, start | {"leader": reward}, steps=steps, step_size=0.5)

    found, slope = jax.value_and_grad(after)(jnp.asarray(REWARD))
    np.testing.assert_allclose(found, value, atol=1e-6)
    np.testing.assert_allclose(np.abs(slope - SLOPE).max(), error, rtol=0.02)
    h, along = 1e-5, np.array([1.0, -2.0, 0.5])
    difference = (after(REWARD + h * along) - after(REWARD - h * along)) / (2 * h)
    np.testing.assert_allclose(slope @ along, difference, atol=1e-8)


@pytest.mark.parametrize(
    ("multiplier", "one_sided", "two_sided"),
    [(10.0, 0.0395, 0.00844), (100.0, 0.00425, 8.5e-5), (1000.0, 0.000427, 8.5e-7)],
)
def test_nudged_trainings_err_as_the_multiplier_and_centred_ones_as_its_square(multiplier, one_sided, two_sided):
    def error(centred):
        def law(sign):
            return gibbs.log_policy(BASE, REWARD + sign * UTILITY / multiplier, beta=BETA)

        def surrogate(reward):
            other = law(-1 if centred else 0)
            weights = {"log_weight": law(1), "other_log_weight": other}
            return shaping.nudged(reward, reward, multiplier=multiplier, centred=centred, **weights)

        return np.abs(jax.grad(surrogate)(jnp.asarray(REWARD)) - SLOPE).max()

    np.testing.assert_allclose(error(False), one_sided, rtol=0.02)
    np.testing.assert_allclose(error(True), two_sided, rtol=0.02)


def test_common_draws_that_are_reweighted_become_the_covariance():
    draws = np.random.default_rng(0).integers(0, 3, 32)
    r, u = jnp.asarray(REWARD)[draws], jnp.asarray(UTILITY)[draws]

    def nudge(x):
        weight = u / (1e5 * BETA)
        given = {"log_weight": weight, "other_log_weight": -weight}
        return shaping.nudged(x, x, multiplier=1e5, centred=True, **given)

    expected = jax.grad(lambda x: shaping.covariance(x, utility=u, beta=BETA))(r) * 31 / 32
    np.testing.assert_allclose(jax.grad(nudge)(r), expected, atol=1e-8)
    with pytest.raises(ValueError, match="multiplier: expected a value > 0"):
        shaping.nudged(r, r, multiplier=0.0)
    with pytest.raises(ValueError, match="other_log_weight: expected the shape"):
        shaping.nudged(r, r, multiplier=1.0, other_log_weight=r[:3])
