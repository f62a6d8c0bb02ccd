"""The leader's problem by gradient: differentiated through the follower's closed form, where no formula is known."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxalign import gibbs
from jaxalign._arrays import at_least_float32, centred
from jaxalign._checks import check_positive, is_concrete
from jaxalign.shapes import Numbers, Samples, Scalar
from jaxalign.types import Array, ArrayLike


def leader_utility(log_base: ArrayLike, reward: ArrayLike, *, utility: ArrayLike, beta: ArrayLike) -> Numbers:
    """Gives what the leader gets for paying a reward: U(r) = E_{pi_r}[u], pi_r ∝ base·exp(r/beta).

    With n base samples and log_base = zeros it is the self-normalised estimate of the same (`effective_samples`).
    Gradient: dU/dr = pi_r·(u − U)/beta.

    Args:
      log_base: [...,n], log weights of the base, normalised or not.
      reward: [...,n], what the follower is paid.
      utility: [...,n], the leader's true utility.
      beta: > 0, scalar or [...].

    Returns:
      The utility delivered [...], in units of u.

    Raises:
      ValueError: beta <= 0.
    """
    return gibbs.utility(gibbs.log_policy(log_base, reward, beta=beta), utility)


def effective_samples(reward: ArrayLike, *, beta: ArrayLike) -> Numbers:
    """Gives the number of samples that an estimate rests on: 1/Σ w², w = softmax(r/beta).

    Args:
      reward: [...,n], of n base samples.
      beta: > 0, scalar or [...].

    Returns:
      [...], from 1 to n.

    Raises:
      ValueError: beta <= 0.
    """
    log_weight = gibbs.log_policy(jnp.zeros_like(at_least_float32(reward)), reward, beta=beta)
    return jnp.exp(-jax.nn.logsumexp(2 * log_weight, axis=-1))


def excess_kl(log_base: ArrayLike, reward: ArrayLike, *, beta: ArrayLike, budget: ArrayLike) -> Numbers:
    """Gives the KL beyond a budget, max(KL(pi_r‖base) − budget, 0).

    As a penalty with a factor above the budget's shadow price (in units of u per nat) it holds a leader to the budget
    exactly.

    Args:
      log_base: [...,n], normalised.
      reward: [...,n].
      beta: > 0, scalar or [...].
      budget: scalar or [...], in nats.

    Returns:
      [...], in nats.

    Raises:
      ValueError: beta <= 0.
    """
    log_base = at_least_float32(log_base)
    return jnp.maximum(gibbs.kl(gibbs.log_policy(log_base, reward, beta=beta), log_base) - budget, 0)


class Objective(Protocol):
    """What a leader climbs: a reward table, of log_base's shape -> a number []."""

    def __call__(self, reward: Array, /) -> Array: ...


class Leader(NamedTuple):
    """What `solve_leader` found."""

    reward: Samples
    """The table, in log_base's shape, within [0, bound]."""
    objective: Scalar
    """[], the objective at that table."""
    history: Array
    """[steps], the objective before each step."""


def solve_leader(
    log_base: ArrayLike,
    *,
    utility: ArrayLike,
    bound: ArrayLike,
    beta: ArrayLike,
    prior: ArrayLike | None = None,
    objective: Objective | None = None,
    start: ArrayLike | None = None,
    steps: int = 600,
    step_size: float = 0.05,
) -> Leader:
    """Climbs an objective of the reward table by projected gradients.

    The reward stays in [0, bound]. Over a prior on the follower's beta the best reward is not always a threshold: the
    climb starts from the best one of the n there are. Constraints and other aims enter through `objective`: a KL
    budget (`excess_kl` as a penalty), a lower quantile or the minimum over an ensemble or over groups of users (utility
    [G,...,n] and jnp.quantile over G), groups with bases of their own.

    Args:
      log_base: [...,n], log weights of the base.
      utility: [...,n], read by the default objective alone.
      bound: > 0, a scalar [reward].
      beta: > 0, a scalar, or [m] with a prior.
      prior: [m], the probability of each beta; None for one beta.
      objective: objective(reward table, of log_base's shape) -> a number; None: the mean over prompts of
        `leader_utility`, and over the prior where there is one.
      start: the reward table to start from; None: bound/2, or with a prior the best threshold reward.
      steps: of the ascent.
      step_size: the largest first step as a share of the bound, falling to 0 on a cosine.

    Returns:
      A Leader.

    Raises:
      ValueError: bound or beta <= 0; a prior that is not a law over beta's entries.
    """
    check_positive("bound", bound)
    check_positive("beta", beta)
    log_base = at_least_float32(log_base)
    if prior is not None:
        _check_prior(prior, beta)

        def at(beta: Array, reward: Array) -> Numbers:
            return leader_utility(log_base, reward, utility=utility, beta=beta)

        def expected(reward: Array) -> Numbers:
            found: Array = jnp.tensordot(
                at_least_float32(prior), jax.vmap(at, (0, None))(at_least_float32(beta), reward), axes=1
            )
            return found

        if start is None:
            start = _best_threshold(jnp.broadcast_to(at_least_float32(utility), log_base.shape), bound, expected)
        if objective is None:
            objective = lambda reward: expected(reward).mean()  # noqa: E731
    elif objective is None:
        objective = functools.partial(_mean_utility, utility=utility, log_base=log_base, beta=beta)
    optimizer = optax.adam(optax.cosine_decay_schedule(step_size, steps), b1=0.9, b2=0.99, eps=1e-20)

    def scaled(share: Array) -> Array:
        """In units of the bound, so that one step size serves all."""
        return objective(share * bound)

    def step(carry: tuple[Array, optax.OptState], _: None) -> tuple[tuple[Array, optax.OptState], Array]:
        share, state = carry
        value, gradient = jax.value_and_grad(scaled)(share)
        update, state = optimizer.update(-gradient, state)
        return (jnp.clip(optax.apply_updates(share, update), 0, 1), state), value

    first = 0.5 if start is None else jnp.clip(at_least_float32(start) / bound, 0, 1)
    first = jnp.broadcast_to(jnp.asarray(first, log_base.dtype), log_base.shape)
    (share, _), history = jax.lax.scan(step, (first, optimizer.init(first)), length=steps)
    return Leader(share * bound, scaled(share), history)


def _check_prior(prior: ArrayLike, beta: ArrayLike) -> None:
    if np.ndim(prior) != 1 or np.shape(prior) != np.shape(beta):
        raise ValueError(
            f"prior: expected a probability [m] for each beta [m], found shapes {np.shape(prior)} and {np.shape(beta)}"
        )
    if is_concrete(prior):
        law = np.asarray(prior, float)
        if not (law >= 0).all() or abs(law.sum() - 1) > 1e-4:
            raise ValueError(f"prior: expected probabilities of sum 1, found {law}")


def _best_threshold(utility: Array, bound: ArrayLike, expected: Callable[[Array], Array]) -> Array:
    """Of the n rewards that pay all responses from one on, the best of each prompt [...,n]."""
    rewards = at_least_float32(bound) * (utility >= jnp.moveaxis(utility, -1, 0)[..., None])
    best = jax.vmap(expected)(rewards).argmax(axis=0)
    return jnp.take_along_axis(rewards, best[None, ..., None], axis=0)[0]


def _mean_utility(reward: Array, *, utility: ArrayLike, log_base: Array, beta: ArrayLike) -> Array:
    return leader_utility(log_base, reward, utility=utility, beta=beta).mean()


def score_function(log_prob: Samples, *, utility: ArrayLike) -> Scalar:
    """Gives a number whose gradient is an unbiased estimate of the gradient of E_pi[u].

    It is mean_i sg(u_i − mean of the others)·log pi(y_i): REINFORCE with the leave-one-out baseline.

    Args:
      log_prob: [...,N], of N >= 2 whole responses drawn from a policy that depends on the reward (`decoding.log_prob`
        of a tilt), in nats.
      utility: [...,N].

    Returns:
      A scalar.

    Raises:
      ValueError: fewer than 2 draws.
    """
    utility = at_least_float32(utility)
    n = utility.shape[-1]
    if n < 2:
        raise ValueError(f"utility: expected at least 2 draws for a leave-one-out baseline, found {n}")
    # u_i − mean of the others, exactly 0 for equal utilities.
    advantage = centred(utility) * (n / (n - 1))
    return (jax.lax.stop_gradient(advantage) * log_prob).mean()
