"""The normaliser of pi_ref·exp(Phi(C)/beta), for exact quantiles and for ranks among the K base samples of a table.

A fresh response's rank among K base samples is uniform on 0..K without ties, so that the mean of the normaliser over
tables is a sum of K + 1 terms, whatever the reward. For one table it differs, by the masses of the gaps between its
samples, which are Dirichlet(1, …, 1).
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from jaxalign import gibbs
from jaxalign._arrays import NEGATIVE, at_least_float32
from jaxalign._checks import check_count, check_positive, is_concrete
from jaxalign.infalign import calibration, curves
from jaxalign.infalign.transforms import Transform, transformed
from jaxalign.shapes import Numbers
from jaxalign.types import Array, ArrayLike


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
