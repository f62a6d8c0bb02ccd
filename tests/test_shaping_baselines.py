"""The rewards that threshold shaping is compared with, by hand; and bad input of them all, in float64."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign import shaping


@pytest.fixture(autouse=True)
def _float64():
    """Identities hold in float64; tests of float32 pass arrays of that type."""
    with jax.enable_x64(True):
        yield


U, REFERENCE = np.array([-1.0, 1.0, 5.0]), np.array([0.0, 2.0, 4.0, 2.0])
BASELINES = {
    "raw": (shaping.raw, [-1, 1, 5]),
    "minmax": (functools.partial(shaping.minmax, bound=2.0), [-0.5, 0.5, 2.5]),
    "minmax, binding": (functools.partial(shaping.minmax, bound=2.0, range_factor=1.5), [-0.5, 0.5, 2.5]),
    "minmax, free": (functools.partial(shaping.minmax, bound=9.0, range_factor=1.5), [-1.5, 1.5, 7.5]),
    "meanstd": (shaping.meanstd, np.array([-3, -1, 3]) / np.sqrt(2)),
    "cap": (functools.partial(shaping.cap, bound=3.0), [0, 1, 3]),
    "mean_sigmoid": (
        functools.partial(shaping.mean_sigmoid, bound=2.0, sharpness=0.5),
        2 / (1 + np.exp([1.5, 0.5, -1.5])),
    ),
    "log_sigmoid": (functools.partial(shaping.log_sigmoid, quantile=0.5), -np.log1p(np.exp([3, 1, -3]))),
    "preference": (
        shaping.preference_as_reward,
        [np.mean(1 / (1 + np.exp(REFERENCE - x))) for x in U],
    ),
    # m of (0, 2, 2, 4) at gain ln 3: (0 + 2 + 2 + 3·4)/(1 + 1 + 1 + 3) = 8/3.
    "stackelberg": (functools.partial(shaping.stackelberg, bound=np.log(9), beta=2.0), [0, 0, np.log(9)]),
    "stackelberg, soft": (
        functools.partial(shaping.stackelberg, bound=np.log(9), beta=2.0, sharpness=3.0),
        np.log(9) / (1 + np.exp(8 - 3 * U)),
    ),
    "stackelberg, capped": (
        functools.partial(shaping.stackelberg, bound=np.log(9), beta=0.1, sharpness=3.0, max_gain=np.log(3)),
        np.log(9) / (1 + np.exp(8 - 3 * U)),
    ),
    "stackelberg, range": (
        functools.partial(shaping.stackelberg, bound=50.0, beta=2 / np.log(3), sharpness=3.0, range_factor=0.5),
        2 / (1 + np.exp(8 - 3 * U)),
    ),
}


@pytest.mark.parametrize("name", BASELINES)
def test_baselines_by_hand(name):
    shape, expected = BASELINES[name]
    np.testing.assert_allclose(shape(U, reference=REFERENCE), expected, rtol=1e-12, atol=1e-14)
    # Two prompts, in float32.
    rows = [np.stack([x, x]).astype(np.float32) for x in (U, REFERENCE)]
    np.testing.assert_allclose(jax.jit(shape)(rows[0], reference=rows[1]), [expected] * 2, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", BASELINES)
def test_baselines_are_finite_where_all_samples_are_the_same(name):
    with jax.enable_x64(False):
        for value in (0.0, 0.3, 7e4):
            reference = np.full((2, 10), value, np.float32)
            reward = BASELINES[name][0](reference[:, :3], reference=reference)
            assert reward.dtype == "float32"
            assert np.isfinite(reward).all()
            assert (reward == reward[0, 0]).all()
            assert np.isfinite(BASELINES[name][0](reference[:, :3] + 1, reference=reference)).all()


def test_bounds_may_differ_over_prompts():
    u, reference = np.tile(U, (2, 1)), np.tile(REFERENCE, (2, 1))
    bound = np.array([1.0, 3.0])
    for shape in (
        shaping.cap,
        shaping.minmax,
        functools.partial(shaping.minmax, range_factor=0.5),
        functools.partial(shaping.mean_sigmoid, sharpness=1.0),
        functools.partial(shaping.stackelberg, beta=1.0),
        functools.partial(shaping.stackelberg, beta=1.0, range_factor=0.5),
    ):
        each = [shape(u[i], reference=reference[i], bound=bound[i]) for i in range(2)]
        np.testing.assert_allclose(shape(u, reference=reference, bound=bound), each)


@pytest.mark.parametrize(
    ("field", "call"),
    [
        ("utility: expected finite", lambda: shaping.optimal_threshold(jnp.array([0.0, jnp.nan]), gain=1.0)),
        ("utility: expected finite", lambda: shaping.optimal_threshold(jnp.array([0.0, -jnp.inf]), gain=1.0)),
        ("utility: expected at least one", lambda: shaping.optimal_threshold(jnp.zeros((3, 0)), gain=1.0)),
        ("utility: expected at least one", lambda: shaping.optimal_threshold(1.0, gain=1.0)),
        ("gain: expected", lambda: shaping.optimal_threshold(jnp.zeros(3), gain=-1.0)),
        ("gain: expected", lambda: shaping.optimal_threshold(jnp.zeros(3), gain=jnp.nan)),
        ("gain: expected", lambda: shaping.kl_bound(-0.1)),
        (
            "log_base: expected a resp",
            lambda: shaping.optimal_threshold(jnp.zeros(2), log_base=jnp.full(2, -jnp.inf), gain=1.0),
        ),
        (
            "log_base: expected log",
            lambda: shaping.optimal_threshold(jnp.zeros(2), log_base=jnp.array([0, jnp.nan]), gain=1.0),
        ),
        (
            "log_base: expected log",
            lambda: shaping.optimal_threshold(jnp.zeros(2), log_base=jnp.array([0, jnp.inf]), gain=1.0),
        ),
        ("bound: expected", lambda: shaping.threshold_reward(jnp.zeros(3), threshold=0.0, bound=0.0)),
        (
            "bound: expected",
            lambda: shaping.soft_threshold_reward(jnp.zeros(3), threshold=0.0, bound=-1.0, sharpness=1.0),
        ),
        ("beta: expected", lambda: shaping.exceedance_soft_value(0.5, bound=1.0, beta=0.0)),
    ],
)
def test_bad_input_is_named(field, call):
    with pytest.raises(ValueError, match=field):
        call()


@pytest.mark.parametrize(
    ("utility", "log_base", "gain"),
    [
        ([0.0, np.nan, 1.0], [0.0, 0.0, 0.0], 1.0),
        ([0.0, -np.inf, 1.0], [0.0, 0.0, 0.0], 1.0),
        ([0.0, np.inf, 1.0], [0.0, 0.0, 0.0], 1.0),
        ([0.0, 1.0, 1.0], [-np.inf, -np.inf, -np.inf], 1.0),
        ([0.0, 1.0, 1.0], [0.0, np.nan, 0.0], 1.0),
        ([0.0, 1.0, 2.0], [0.0, 0.0, 0.0], -1.0),
        ([0.0, 1.0, 2.0], [0.0, 0.0, 0.0], np.nan),
    ],
)
def test_bad_input_is_nan_under_jit_and_only_in_its_row(utility, log_base, gain):
    find = jax.jit(lambda u, w, g: shaping.optimal_threshold(u, log_base=w, gain=g))
    good = ([0.0, 1.0, 2.0], [0.0, 0.0, 0.0], 1.0)
    found = find(*(jnp.asarray(pair, jnp.float32) for pair in zip(good, (utility, log_base, gain), strict=True)))
    assert np.isfinite(found[0])
    assert np.isnan(found[1])
    assert np.isnan(jax.jit(shaping.kl_bound)(-1.0))
