"""The normaliser of pi_ref·exp(Phi(C)/beta), for exact quantiles and for ranks among the K base samples of a table.

A fresh response's rank among K base samples is uniform on 0..K without ties, so that the mean of the normaliser over
tables is a sum of K + 1 terms, whatever the reward. For one table it differs, by the masses of the gaps between its
samples, which are Dirichlet(1, …, 1).
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign import gibbs
from jaxalign._arrays import NEGATIVE, at_least_float32, with_root_derivatives
from jaxalign._checks import check_count, check_positive, is_concrete
from jaxalign.infalign import calibration, curves
from jaxalign.infalign.transforms import Transform, transformed
from jaxalign.shapes import Numbers
from jaxalign.types import Array, ArrayLike

TABLES = 4000
"""Fixed draws of the gaps of a table, at least, over which `match_kl` takes its mean."""


def log_partition(
    transform: Transform,
    beta: ArrayLike,
    *,
    samples: int | None = None,
    counts: ArrayLike | None = None,
    reference: ArrayLike | None = None,
) -> Numbers:
    """Gives log Z of the policy pi_ref·exp(Phi(C)/beta)/Z, so that its log-ratio to the base is Phi(C)/beta − log Z.

    With g_j = exp(Phi(j/K)/beta), and at most one of `samples` (with or without `counts`) and `reference` given:

        neither:            ∫ exp(Phi(c)/beta) dc, for exact quantiles of a reward without ties
        samples K:          Z_K = mean_{j=0..K} g_j, the mean over tables of K samples: right for fresh responses
        samples and counts: Σ_j (1 + n_j)·g_j/(K + 1 + M), the posterior mean for one table given M more base samples
        reference:          mean_i exp(Phi(C_{−i}(z_i))/beta), each sample of the table ranked among the others: its
                            mean is that of a table of K − 1 samples, ties included, and without ties it is Z_{K−1}

    Args:
      transform: Phi, called once; it may be −inf at 0.
      beta: > 0, any shape [...], in units of Phi per nat.
      samples: K >= 2, of the table.
      counts: [...,K+1], how many of M further base samples have rank j, 0..K, in the table.
      reference: [...,K], rewards of the table.

    Returns:
      [...], in nats; beta's shape, broadcast with that of the prompts.

    Raises:
      ValueError: arguments that do not go together, fewer than 2 samples; on concrete values beta <= 0, counts below 0,
        a NaN in the reference.
    """
    check_positive("beta", beta)
    beta = at_least_float32(beta)
    if reference is not None:
        if samples is not None or counts is not None:
            raise ValueError("reference: expected without samples and counts, found both")
        ranked = _leave_one_out(at_least_float32(reference))
        value = transformed(transform, ranked)
        return gibbs.log_partition(jnp.full(value.shape, -np.log(value.shape[-1]), value.dtype), value, beta=beta)
    if samples is None:
        if counts is not None:
            raise ValueError("counts: expected with samples, the number K of the table, found counts alone")
        c, log_base = curves.grid(beta.dtype)
        return gibbs.log_partition(log_base, transformed(transform, c).astype(beta.dtype), beta=beta)
    check_count("samples", samples, least=2, unit="of the table")
    value = transformed(transform, jnp.arange(samples + 1, dtype=beta.dtype) / samples)
    weight = jnp.ones(samples + 1, beta.dtype)
    if counts is not None:
        counts = jnp.asarray(counts)
        if counts.shape[-1:] != (samples + 1,):
            raise ValueError(f"counts: expected shape [...,{samples + 1}], a count of each rank, found {counts.shape}")
        if is_concrete(counts) and not bool((np.asarray(counts) >= 0).all()):
            raise ValueError(f"counts: expected counts >= 0, found {np.asarray(counts).min()}")
        weight = weight + counts
    inside = jnp.isfinite(value)
    log_weight = jnp.where(inside, jnp.log(weight / weight.sum(axis=-1, keepdims=True)), NEGATIVE)
    return gibbs.log_partition(log_weight, jnp.where(inside, value, 0), beta=beta)


def _leave_one_out(reference: Array) -> Array:
    """The quantile [...,K] of each sample of a table among the others, ties half."""
    count = reference.shape[-1]
    # Among all K the sample ties with itself, which counts one half.
    among_all = calibration.calibrate(reference, reference=reference) * count
    return (among_all - 0.5) / (count - 1)


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
