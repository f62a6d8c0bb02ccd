"""What the log-ratio of a policy to its base is fitted to: the log-ratio of the optimum, from ranks in a table.

t(y) = Phi(C(y))/beta − log Z of the prompt, in float64 on the host. A sample of the table itself has the mid-rank
(j − ½)/K, and Z is then a mean over the table, without noise. A fresh sample has rank j/K; its Z is known in the mean
over tables, and better the more fresh samples of the base there are (`infalign.log_partition`).
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign import infalign, shaping
from jaxalign.infalign.transforms import transformed
from jaxalign.training.regression_options import RegressionOptions

OFF_BY_TIES = np.log(1.1)
"""Change of log Z by ties from which prompts are told [nats]."""


class Samples(NamedTuple):
    """Scored responses; R in all, of P prompts."""

    prompt: np.ndarray
    """[R], row of the table."""
    reward: np.ndarray
    """[R]."""
    own: np.ndarray
    """[R], whether it is one of the table's."""
    base: np.ndarray
    """[R], whether the base drew it."""


class Targets(NamedTuple):
    """What is fitted."""

    target: np.ndarray
    """[R] float32, the optimum's log-ratio to the base in nats; up to a constant of the prompt where it is centred."""
    tied: int
    """Prompts whose log Z ties move by more than log 1.1, where leaving one out makes it right."""


def quantiles(reward: np.ndarray, table: np.ndarray, prompt: np.ndarray) -> np.ndarray:
    """Gives where rewards stand in the tables of their prompts, ties half.

    Args:
      reward: [R].
      table: [P,K], sorted rewards.
      prompt: [R], rows of the table.

    Returns:
      [R] in [0, 1].

    Raises:
      ValueError: a reward that is not finite.
    """
    bad = np.flatnonzero(~np.isfinite(reward))
    if bad.size:
        raise ValueError(f"reward: expected finite numbers, found {reward[bad[0]]} for prompt {prompt[bad[0]]}")
    found = np.empty(len(reward))
    order = np.argsort(prompt, kind="stable")
    for rows in np.split(order, np.flatnonzero(np.diff(prompt[order])) + 1):
        if rows.size:
            own = table[prompt[rows[0]]].astype(np.float64)
            each = reward[rows].astype(np.float64)
            found[rows] = (np.searchsorted(own, each, "left") + np.searchsorted(own, each, "right")) / (2 * len(own))
    return found


def targets(options: RegressionOptions, beta: float, table: np.ndarray, samples: Samples) -> Targets:
    """Gives what the log-ratios of responses are fitted to.

    Args:
      options: transform, bound and normaliser.
      beta: KL weight > 0.
      table: [P,K], sorted rewards of the base's samples.
      samples: the responses.

    Returns:
      Targets.

    Raises:
      ValueError: a reward that is not finite.
    """
    rank = quantiles(samples.reward, table, samples.prompt)
    if options.bound:
        return _threshold(options, beta, table, samples, rank)
    value = _values(options, rank, table.shape[1], beta)
    if options.normaliser == "centred":
        return Targets(value.astype(np.float32), 0)
    own, fresh, tied = _log_normalisers(options, beta, table, samples, value)
    log_z = np.where(samples.own, own[samples.prompt], fresh[samples.prompt])
    return Targets((value - log_z).astype(np.float32), tied)


def _values(options: RegressionOptions, rank: np.ndarray, count: int, beta: float) -> np.ndarray:
    """Phi(C)/beta of quantiles among `count` samples."""
    if options.transform == "log":
        rank = (rank * count + 0.5) / (count + 1)  # no response is at −inf
    transform = infalign.parse_transform(options.transform or "identity", beta=beta)
    with jax.enable_x64(True), jax.ensure_compile_time_eval():
        return np.asarray(transformed(transform, jnp.asarray(rank)), np.float64) / beta


def _log_normalisers(
    options: RegressionOptions, beta: float, table: np.ndarray, samples: Samples, value: np.ndarray
) -> tuple[np.ndarray, np.ndarray, int]:
    """(log Z of the table's own samples [P], of fresh ones [P], prompts that ties move)."""
    count = table.shape[1]
    among_all = quantiles(table.ravel(), table, np.repeat(np.arange(len(table)), count)).reshape(table.shape)
    own = _log_mean_exp(_values(options, among_all, count, beta))
    mean = np.full(len(table), _log_mean_exp(_values(options, np.arange(count + 1) / count, count, beta)))
    among_others = (among_all * count - 0.5) / (count - 1)
    left_out = _log_mean_exp(_values(options, among_others, count - 1, beta))
    without = _log_mean_exp(_values(options, np.arange(count) / (count - 1), count - 1, beta))
    ties = (np.diff(table, axis=1) == 0).any(axis=1)
    fresh = np.where(ties, left_out, mean)
    if options.normaliser == "posterior":
        drawn = samples.base & ~samples.own
        further = np.bincount(samples.prompt[drawn], minlength=len(table))
        # As logs: exp(Phi/beta) of a steep transform is beyond any float.
        total = np.log(count + 1) + fresh
        np.logaddexp.at(total, samples.prompt[drawn], value[drawn])
        fresh = total - np.log(count + 1 + further)
    return own, fresh, int((ties & (np.abs(left_out - without) > OFF_BY_TIES)).sum())


def _log_mean_exp(x: np.ndarray) -> np.ndarray:
    return np.asarray(np.logaddexp.reduce(x, axis=-1) - np.log(x.shape[-1]))


def _threshold(
    options: RegressionOptions, beta: float, table: np.ndarray, samples: Samples, rank: np.ndarray
) -> Targets:
    """Targets of the reward B·1[u > m], u the reward or its transformed quantile, m the leader's threshold for the
    table."""
    gain, count = options.bound / beta, table.shape[1]
    own, utility = table.astype(np.float64), samples.reward
    if options.transform:
        places = np.repeat(np.arange(len(table)), count)
        own = _values(options, quantiles(table.ravel(), table, places), count, 1.0).reshape(table.shape)
        utility = _values(options, rank, count, 1.0)
    with jax.enable_x64(True):
        threshold = np.asarray(shaping.optimal_threshold(jnp.asarray(own), gain=gain))
    above = utility > threshold[samples.prompt]
    if options.normaliser == "centred":
        return Targets(np.where(above, gain, 0.0).astype(np.float32), 0)
    exceeding, total = (own > threshold[:, None]).sum(axis=1).astype(float), np.full(len(table), float(count))
    if options.normaliser == "posterior":
        drawn = samples.base & ~samples.own
        exceeding += np.bincount(samples.prompt[drawn], weights=above[drawn], minlength=len(table))
        total += np.bincount(samples.prompt[drawn], minlength=len(table))
    share = exceeding / total
    with np.errstate(divide="ignore"):  # of no share, and of all
        log_z = np.logaddexp(np.log1p(-share), gain + np.log(share))
    return Targets((np.where(above, gain, 0.0) - log_z[samples.prompt]).astype(np.float32), 0)
