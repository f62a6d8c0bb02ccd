"""beta for a KL where quantiles are ranks in a table: in the mean over tables of K base samples.

The masses of the gaps between K samples are Dirichlet(1, …, 1), whatever the reward, and the policy tilted by the rank
is a law over the K + 1 gaps.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign._arrays import with_root_derivatives
from jaxalign._checks import check_count, is_concrete
from jaxalign.infalign.transforms import Transform, transformed
from jaxalign.types import Array

TABLES = 4000
"""Fixed draws of the gaps of a table, at least, over which `match_kl` takes its mean."""


@functools.cache
def _log_gaps(samples: int) -> np.ndarray:
    """log masses [draws,K+1] of the gaps between K uniform draws; fixed."""
    size = samples + 1
    drawn = np.random.default_rng(0).dirichlet(np.ones(size), size=-(-TABLES // size))
    # Gaps are exchangeable: in all rotations of a draw the mean mass of each gap is exact, which takes most of the
    # noise off the steep transforms, whose KL hangs on one gap.
    turned = (np.arange(size)[:, None] + np.arange(size)) % size
    return np.log(drawn[:, turned].reshape(-1, size))


def match_table_kl(transform: Transform, *, kl: Array, samples: int) -> Array:
    """`curves.match_kl` of a table of K samples: the mean KL over tables, which costs more than exact quantiles do."""
    check_count("samples", samples, least=2, unit="of the table")
    value = transformed(transform, jnp.arange(samples + 1, dtype=kl.dtype) / samples).astype(kl.dtype)
    if is_concrete(value) and not np.isfinite(np.asarray(value)).all():
        raise ValueError("transform: expected finite values at the ranks 0..K, found none at 0 (log: smooth the ranks)")
    spread = jax.lax.stop_gradient(value.max() - value.min())
    log_t = _log_inverse(value / jnp.where(spread > 0, spread, 1), jnp.asarray(_log_gaps(samples), kl.dtype), kl)
    if is_concrete(log_t) and np.isnan(np.asarray(log_t)).any():
        most = np.log(samples) + np.euler_gamma
        raise ValueError(
            f"kl: expected a KL that the transform reaches on the {samples + 1} ranks of a table of {samples} samples "
            f"(at most about {most:.2f} nats), found {np.asarray(kl)}"
        )
    return spread * jnp.exp(-log_t)


def _mean_kl(value: Array, log_gaps: Array, log_t: Array) -> tuple[Array, Array]:
    """(KL, dKL/dlog t) of the tilted gaps, means over tables, for log t []."""
    theta = (value - jax.lax.stop_gradient(value.max())) * jnp.exp(log_t)
    log_z = jax.nn.logsumexp(log_gaps + theta, axis=-1, keepdims=True)
    prob = jnp.exp(log_gaps + theta - log_z)
    mean = (prob * theta).sum(axis=-1, keepdims=True)
    return (mean - log_z).mean(), (prob * (theta - mean) ** 2).sum(axis=-1).mean()


@jax.jit
def _log_inverse(value: Array, log_gaps: Array, kl: Array) -> Array:
    """log(1/beta) [...] of values [K+1] of range 1 and kl [...]; NaN where no root is within reach."""

    def one(kl: Array) -> Array:
        fixed, goal = jax.lax.stop_gradient((value, kl))

        def halve(_: int, bracket: tuple[Array, Array]) -> tuple[Array, Array]:
            low, high = bracket
            middle = (low + high) / 2
            below = _mean_kl(fixed, log_gaps, middle)[0] < goal
            return jnp.where(below, middle, low), jnp.where(below, high, middle)

        bracket = jnp.asarray(np.log(1e-4), kl.dtype), jnp.asarray(np.log(1e8), kl.dtype)
        low, high = jax.lax.fori_loop(0, 60 if kl.dtype == jnp.float64 else 34, halve, bracket)
        root = (low + high) / 2
        found, slope = _mean_kl(fixed, log_gaps, root)
        reached = (jnp.abs(found - goal) < 1e-3 * goal) & (slope > 0)

        def step(log_t: Array) -> Array:
            found, slope = _mean_kl(value, log_gaps, log_t)
            return (kl - found) / jnp.where(slope > 0, slope, 1)

        return jnp.where(reached, with_root_derivatives(jnp.where(reached, root, 0), step), jnp.nan)

    found: Array = jax.lax.map(one, kl.reshape(-1))
    return found.reshape(kl.shape)
