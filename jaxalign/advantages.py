"""From rewards of whole responses to weights of tokens: what a policy gradient multiplies each token's score by.

Token arrays are [b,T], right-padded responses with mask [b,T], EOS included; log-ratios log pi − log pi_ref in nats.
Advantages are data: nothing here is to be differentiated through.
"""

from __future__ import annotations

import functools
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np

from jaxalign import mdp
from jaxalign._arrays import at_least_float32, centred, column, deviation, is_flat
from jaxalign._checks import check_integer
from jaxalign.shapes import PerPrompt, PerToken, ResponseMask, Samples
from jaxalign.types import Array, ArrayLike

__all__ = [
    "adapt_beta",
    "following",
    "gae",
    "group_relative",
    "leave_one_out",
    "max_at_k",
    "min_at_k",
    "pass_at_k",
    "to_come",
    "token_rewards",
]


def token_rewards(reward: PerPrompt, *, log_ratio: PerToken, mask: ResponseMask, beta: ArrayLike) -> PerToken:
    """Gives the KL-regularised reward of each token: −beta·log(pi/pi_ref)(y_t), and r(x,y) on the last one.

    Its sum is r − beta·log(pi/pi_ref)(y), whose mean under pi is E[r] − beta·KL(pi‖pi_ref).

    Args:
      reward: [b], of whole responses.
      log_ratio: [b,T], log pi − log pi_ref of each token, in nats.
      mask: [b,T], EOS included.
      beta: the KL weight, a scalar or [b].

    Returns:
      [b,T]; 0 throughout in a row whose mask is all False, which has no token that could carry its reward.
    """
    chex.assert_equal_shape([log_ratio, mask])
    paid = -jnp.where(mask, column(at_least_float32(beta)) * at_least_float32(log_ratio), 0)
    last = jnp.arange(mask.shape[1]) == mdp.last_index(mask)[:, None]
    return paid + jnp.where(last, at_least_float32(reward)[:, None], 0)


def following(kl: PerToken, *, mask: ResponseMask) -> PerToken:
    """Gives the KL of the next state, k_{t+1}: what the draw of y_t leads to at once (arXiv 2504.10637).

    Args:
      kl: [b,T], KL(pi(·|s_t)‖pi_ref(·|s_t)) of the states that the tokens are drawn from, in nats.
      mask: [b,T], EOS included.

    Returns:
      [b,T], in nats; 0 after the last token.
    """
    return jnp.pad(jnp.where(mask, at_least_float32(kl), 0)[:, 1:], ((0, 0), (0, 1)))


def to_come(cost: PerToken) -> PerToken:
    """Gives the undiscounted cost-to-go, Σ_{t' >= t} cost_t'.

    Args:
      cost: [b,T].

    Returns:
      [b,T], in the units of cost.
    """
    return jnp.cumsum(cost[:, ::-1], axis=1)[:, ::-1]


def gae(
    reward: PerToken, *, value: PerToken, mask: ResponseMask, discount: float = 1.0, decay: float = 0.95
) -> tuple[PerToken, PerToken]:
    """Gives generalised advantage estimates and the returns that a value is fitted to.

    δ_t = r_t + discount·V(s_{t+1}) − V(s_t),   A_t = Σ_k (discount·decay)^k·δ_{t+k},   return_t = A_t + V(s_t)

    Args:
      reward: [b,T], of each token.
      value: [b,T], V(s_t) BEFORE token t is drawn; the value after the last token is 0.
      mask: [b,T], EOS included.
      discount: of later rewards.
      decay: 1 gives the return minus the value, without bias for any value; 0 one-step differences.

    Returns:
      (advantage [b,T], return [b,T]).

    Source: arXiv 1506.02438, eq. 16.
    """
    chex.assert_equal_shape([reward, value, mask])
    value = jnp.where(mask, at_least_float32(value), 0)
    following = jnp.pad(value[:, 1:], ((0, 0), (0, 1)))
    delta = jnp.where(mask, reward + discount * following - value, 0)

    def back(later: Array, now: Array) -> tuple[Array, Array]:
        found = now + discount * decay * later
        return found, found

    _, advantage = jax.lax.scan(back, jnp.zeros_like(delta[:, 0]), delta.T, reverse=True)
    advantage = jnp.where(mask, advantage.T, 0)
    return advantage, jnp.where(mask, advantage + value, 0)


def leave_one_out(reward: Samples) -> Samples:
    """Gives A_i = r_i − mean of the others' r: the baseline does not see the sample, so the gradient has no bias.

    Args:
      reward: [...,n], n >= 2 independent samples of a prompt.

    Returns:
      [...,n]; exactly 0 in a group of equal rewards.

    Raises:
      ValueError: n < 2.

    Source: RLOO, arXiv 2402.14740, eq. 7.
    """
    n = _group_size(reward)
    return centred(reward) * (n / (n - 1))


def group_relative(reward: Samples, *, epsilon: float = 1e-4) -> Samples:
    """Gives A_i = (r_i − mean)/(std + epsilon), the advantages of GRPO.

    The division by the standard deviation (of n − 1) gives every prompt the same weight whatever the scale of its
    rewards: the sum over prompts is then no longer the mean reward, and no beta fits all of them.

    Args:
      reward: [...,n], n >= 2 samples of a prompt.
      epsilon: added to the standard deviation, in units of reward.

    Returns:
      [...,n]; exactly 0 in a group whose range is rounding, at most 4 units in the last place of its largest |r|: the
      division would make advantages of size 1 of it.

    Raises:
      ValueError: n < 2.

    Source: GRPO, arXiv 2402.03300, section 4.1.2.
    """
    _group_size(reward)
    inner = centred(reward)
    return jnp.where(is_flat(reward), 0, inner / (deviation(inner, ddof=1) + epsilon))


def max_at_k(reward: Samples, *, k: int) -> Samples:
    """Gives the weights of samples in the gradient of E[max of the rewards of k draws], from n >= k of them.

    With the rewards sorted, g_0 <= … <= g_{n−1},

        A_i = Σ_{j<i} comb(j, k−2)·(g_i − g_j)/comb(n, k)

    and the SUM over the n samples of A_i·∇log pi(y_i) has the gradient's mean: the weight of a sample less a baseline
    that does not see it. All are >= 0; do not subtract their mean over the group, which would be a bias. A loss that
    is a mean over samples takes n·A. For k = 1 it is `leave_one_out` over n.

    Args:
      reward: [...,n], independent samples of a prompt, n >= 2.
      k: 1 to n.

    Returns:
      [...,n], in units of reward.

    Raises:
      ValueError: n < 2, a k that is no whole number from 1 to n.

    Source: PKPO, arXiv 2505.15201.
    """
    n = _group_size(reward)
    if not 1 <= check_integer("k", k) <= n:
        raise ValueError(f"k: expected 1 to the {n} samples of each prompt, found {k}")
    reward = at_least_float32(reward)
    if k == 1:
        return leave_one_out(reward) / n
    order = jnp.argsort(reward, axis=-1)
    ordered = jnp.take_along_axis(reward, order, axis=-1)
    apart = ordered[..., :, None] - ordered[..., None, :]
    found = (jnp.asarray(_pairs(n, k), reward.dtype) * apart).sum(axis=-1)
    return jnp.take_along_axis(found, jnp.argsort(order, axis=-1), axis=-1)


def min_at_k(reward: Samples, *, k: int) -> Samples:
    """Gives the weights of samples in the gradient of E[min of the rewards of k draws]: those of `max_at_k` of −reward,
    negated, so that all are <= 0.

    Args:
      reward: [...,n], independent samples of a prompt, n >= 2.
      k: 1 to n.

    Returns:
      [...,n], in units of reward; their sum over samples is the gradient, as for `max_at_k`.

    Raises:
      ValueError: as `max_at_k`.
    """
    return -max_at_k(-at_least_float32(reward), k=k)


def pass_at_k(reward: Samples, *, k: int) -> Samples:
    """Gives the weights of samples in the gradient of pass@k, the chance that one of k draws is right: `max_at_k` of
    1[reward > 0].

    Args:
      reward: [...,n], independent samples of a prompt, n >= 2; right where it is above 0.
      k: 1 to n.

    Returns:
      [...,n] in [0, 1]; 0 for wrong ones.

    Raises:
      ValueError: as `max_at_k`.
    """
    reward = at_least_float32(reward)
    right = jnp.where(jnp.isnan(reward), jnp.nan, (reward > 0).astype(reward.dtype))
    return max_at_k(right, k=k)


@functools.cache
def _pairs(n: int, k: int) -> np.ndarray:
    """[n,n]: comb(j, k−2)/comb(n, k) at i > j, 0 elsewhere."""
    column = np.array([math.comb(j, k - 2) / math.comb(n, k) for j in range(n)])
    return np.tril(np.broadcast_to(column, (n, n)), -1)


def _group_size(reward: Array) -> int:
    n = reward.shape[-1]
    if n < 2:
        raise ValueError(f"reward: expected at least 2 samples of each prompt, found {n}")
    return n


def adapt_beta(beta: ArrayLike, *, kl: ArrayLike, target: float, rate: float = 0.1) -> Array:
    """Adapts the KL weight to a target: beta·(1 + rate·clip(kl/target − 1, ±0.2)).

    Args:
      beta: the weight so far.
      kl: measured, in nats.
      target: the KL aimed at, in nats.
      rate: of the adaptation.

    Returns:
      The new weight: larger where the measured KL is above its target, smaller below.

    Source: arXiv 1909.08593, section 2.2.
    """
    return jnp.asarray(beta) * (1 + rate * jnp.clip(jnp.asarray(kl) / target - 1, -0.2, 0.2))
