"""Losses of policies that learn from their own samples."""

from __future__ import annotations

import chex
import jax.numpy as jnp

from jaxalign._arrays import at_least_float32
from jaxalign.losses._masks import MAX_EXPONENT, masked
from jaxalign.shapes import PerPrompt, PerToken, ResponseMask, Scalar
from jaxalign.types import Array


def policy_gradient(
    log_prob: PerToken,
    *,
    old_log_prob: PerToken,
    advantage: PerToken | PerPrompt,
    mask: ResponseMask,
    clip: float,
    whole: bool = False,
) -> Scalar:
    """Gives the clipped policy-gradient loss.

    −mean_b Σ_t m·min(ρ_t·A_t, clip(ρ_t, 1 ± clip)·A_t), ρ_t = pi(y_t)/pi_old(y_t)

    Where pi = pi_old the gradient is −mean_b Σ_t A_t·∇log pi(y_t): a SUM over tokens, so that the mean over y ~ pi is
    the gradient of E[r], whatever the lengths.

    Args:
      log_prob: [b,T], of the policy, in nats.
      old_log_prob: [b,T], of the policy that drew the tokens.
      advantage: [b,T], or [b] with `whole`.
      mask: [b,T], EOS included.
      clip: > 0; inf for no clipping.
      whole: one ratio for the response, ρ = exp(Σ_t log pi − log pi_old), and A the same for all its tokens; the sum
        over t is then counted once (the clipped form of RLOO).

    Returns:
      A scalar.

    Source: PPO, arXiv 1707.06347, eq. 7.
    """
    chex.assert_equal_shape([log_prob, old_log_prob, mask])
    difference = masked(log_prob, mask) - masked(old_log_prob, mask)
    if whole:
        ratio, advantage = _ratio(difference.sum(axis=-1)), at_least_float32(advantage)
        return -_clipped(ratio, advantage, clip).mean()
    ratio, advantage = _ratio(difference), masked(advantage, mask)
    return -jnp.where(mask, _clipped(ratio, advantage, clip), 0).sum(axis=-1).mean()


def clipped_ratios(
    log_prob: PerToken, *, old_log_prob: PerToken, mask: ResponseMask, clip: float, whole: bool = False
) -> PerPrompt:
    """Gives the share of tokens (`whole`: of responses) whose ratio lies outside 1 ± clip.

    Args:
      log_prob: [b,T], of the policy, in nats.
      old_log_prob: [b,T], of the policy that drew the tokens.
      mask: [b,T], EOS included.
      clip: > 0.
      whole: one ratio for the response, as `policy_gradient`.

    Returns:
      [b] in [0, 1].
    """
    difference = masked(log_prob, mask) - masked(old_log_prob, mask)
    if whole:
        return (jnp.abs(jnp.expm1(difference.sum(axis=-1))) > clip).astype(difference.dtype)
    outside = (jnp.abs(jnp.expm1(difference)) > clip) & mask
    return outside.sum(axis=-1) / jnp.maximum(mask.sum(axis=-1), 1)


def clipped_value(
    value: PerToken, *, old_value: PerToken, returns: PerToken, mask: ResponseMask, clip: float
) -> Scalar:
    """Gives PPO's value loss, mean_b ½ Σ_t m·max((V_t − R_t)², (V_old + clip(V_t − V_old, ± clip) − R_t)²).

    Args:
      value: [b,T], V_t.
      old_value: [b,T], V_old, as it was when the tokens were drawn.
      returns: [b,T], R_t.
      mask: [b,T], EOS included.
      clip: > 0; inf for no clipping.

    Returns:
      A scalar.
    """
    chex.assert_equal_shape([value, old_value, returns, mask])
    value, old_value, returns = (masked(x, mask) for x in (value, old_value, returns))
    error = (value - returns) ** 2
    if clip < float("inf"):
        # Differences first: beside values of 1e4 a clip of .2 would be rounded.
        near = old_value - returns + jnp.clip(value - old_value, -clip, clip)
        error = jnp.maximum(error, near**2)
    return 0.5 * error.sum(axis=-1).mean()


def kl_penalty(log_prob: PerToken, *, log_prob_ref: PerToken, mask: ResponseMask, estimator: str) -> Scalar:
    """Gives a term for the loss that stands for KL(pi‖pi_ref), from y ~ pi.

    It is the mean over rows, with l_t = log pi/pi_ref(y_t), of

        "k2": ½ (Σ_t l_t)². Its gradient is (Σ l)·∇log pi(y): in the mean that of KL(pi‖pi_ref), exactly.
        "k3": Σ_t exp(−l_t) − 1 + l_t. In value it has the mean of the KL, but its gradient is the one of
              Σ_t KL(pi_ref‖pi)(s_t) at the states of pi: another optimum than Gibbs'.

    Args:
      log_prob: [b,T], of the policy, in nats.
      log_prob_ref: [b,T], of the reference.
      mask: [b,T], EOS included.
      estimator: "k2" or "k3".

    Returns:
      A scalar, in nats.

    Raises:
      ValueError: another estimator.

    Source: k3 is GRPO's, arXiv 2402.03300, eq. 4.
    """
    ratio = masked(log_prob, mask) - masked(log_prob_ref, mask)
    if estimator == "k2":
        return 0.5 * (ratio.sum(axis=-1) ** 2).mean()
    if estimator == "k3":
        return jnp.where(mask, jnp.expm1(-ratio) + ratio, 0).sum(axis=-1).mean()
    raise ValueError(f"estimator: expected 'k2' or 'k3', found {estimator!r}")


def _ratio(difference: Array) -> Array:
    # Far outside any clip; an overflow times an advantage of 0 would be NaN.
    return jnp.exp(jnp.clip(difference, -MAX_EXPONENT, MAX_EXPONENT))


def _clipped(ratio: Array, advantage: Array, clip: float) -> Array:
    return jnp.minimum(ratio * advantage, jnp.clip(ratio, 1 - clip, 1 + clip) * advantage)
