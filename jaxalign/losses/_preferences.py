"""Losses of texts and of pairs of them: language models, reward models, preferences."""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp

from jaxalign._arrays import at_least_float32
from jaxalign.losses._masks import masked
from jaxalign.shapes import PerPrompt, PerToken, ResponseMask, Scalar
from jaxalign.types import ArrayLike


def language_model(log_prob: PerToken, *, mask: ResponseMask, count: ArrayLike | None = None) -> Scalar:
    """Gives the negative log-likelihood per token, −Σ_{b,t} m·log pi(y_t|y_<t) / count.

    Args:
      log_prob: [B,T], of each token, in nats.
      mask: [B,T], True on the tokens that count.
      count: tokens to divide by; those of the mask when None. A caller that accumulates gradients over micro-batches
        passes the large batch's count, so that the sum is the large batch's loss.

    Returns:
      A scalar, in nats per token.
    """
    chex.assert_equal_shape([log_prob, mask])
    total = masked(log_prob, mask).sum()
    return -total / (jnp.maximum(mask.sum(), 1) if count is None else count)


def bradley_terry(chosen: PerPrompt, rejected: PerPrompt) -> Scalar:
    """Gives the pairwise ranking loss of a reward model, mean −log sigmoid(r_w − r_l).

    Args:
      chosen: [B], rewards of the preferred responses.
      rejected: [B], of the others.

    Returns:
      A scalar.
    """
    chex.assert_equal_shape([chosen, rejected])
    return -jax.nn.log_sigmoid(at_least_float32(chosen) - at_least_float32(rejected)).mean()


def autoregressive_reward(chosen_log_prob: PerPrompt, rejected_log_prob: PerPrompt, *, beta_r: ArrayLike) -> Scalar:
    """Gives GenARM's loss of an autoregressive reward model.

    mean −log sigmoid(beta_r·(log pi_r(y_w|x) − log pi_r(y_l|x)))

    Args:
      chosen_log_prob: [B], of the preferred responses, summed over response tokens, EOS included and without length
        normalisation, in nats.
      rejected_log_prob: [B], of the others, likewise.
      beta_r: > 0, the scale of the reward.

    Returns:
      A scalar.

    Source: GenARM, arXiv 2410.08193, eq. 5.
    """
    chex.assert_equal_shape([chosen_log_prob, rejected_log_prob])
    difference = at_least_float32(chosen_log_prob) - at_least_float32(rejected_log_prob)
    return -jax.nn.log_sigmoid(beta_r * difference).mean()


def dpo(
    chosen_log_prob: PerPrompt,
    rejected_log_prob: PerPrompt,
    *,
    chosen_log_prob_ref: PerPrompt,
    rejected_log_prob_ref: PerPrompt,
    beta: ArrayLike,
    label_smoothing: float = 0.0,
) -> Scalar:
    """Gives the DPO loss, mean −(1−e)·log sigmoid(beta·Δ) − e·log sigmoid(−beta·Δ).

    Δ is the difference of the two log-ratios to the reference (`log_ratio_difference`).

    Args:
      chosen_log_prob, rejected_log_prob: [B], of the policy, summed over response tokens, in nats.
      chosen_log_prob_ref, rejected_log_prob_ref: [B], of the reference.
      beta: > 0.
      label_smoothing: e, the share of labels taken to be wrong.

    Returns:
      A scalar.

    Source: DPO, arXiv 2305.18290, eq. 7.
    """
    logit = beta * log_ratio_difference(
        chosen_log_prob, rejected_log_prob, chosen_ref=chosen_log_prob_ref, rejected_ref=rejected_log_prob_ref
    )
    right, wrong = -jax.nn.log_sigmoid(logit), -jax.nn.log_sigmoid(-logit)
    return ((1 - label_smoothing) * right + label_smoothing * wrong).mean()


def ipo(
    chosen_log_prob: PerPrompt,
    rejected_log_prob: PerPrompt,
    *,
    chosen_log_prob_ref: PerPrompt,
    rejected_log_prob_ref: PerPrompt,
    beta: ArrayLike,
) -> Scalar:
    """Gives the IPO loss, mean (Δ − 1/(2·beta))², Δ as in `dpo`.

    Args:
      chosen_log_prob, rejected_log_prob: [B], of the policy, summed over response tokens, in nats.
      chosen_log_prob_ref, rejected_log_prob_ref: [B], of the reference.
      beta: > 0.

    Returns:
      A scalar.

    Source: IPO, arXiv 2310.12036, eq. 17.
    """
    difference = log_ratio_difference(
        chosen_log_prob, rejected_log_prob, chosen_ref=chosen_log_prob_ref, rejected_ref=rejected_log_prob_ref
    )
    return ((difference - 1 / (2 * jnp.asarray(beta))) ** 2).mean()


def log_ratio_difference(
    chosen: PerPrompt, rejected: PerPrompt, *, chosen_ref: PerPrompt, rejected_ref: PerPrompt
) -> PerPrompt:
    """Gives Δ = log(pi/pi_ref)(y_w) − log(pi/pi_ref)(y_l), the implicit reward margin over beta.

    Args:
      chosen: [B], log-probabilities of the preferred responses under the policy, in nats.
      rejected: [B], of the others.
      chosen_ref: [B], as `chosen`, under the reference.
      rejected_ref: [B], as `rejected`, under the reference.

    Returns:
      [B], in nats.
    """
    chex.assert_equal_shape([chosen, rejected, chosen_ref, rejected_ref])
    chosen, rejected, chosen_ref, rejected_ref = map(at_least_float32, (chosen, rejected, chosen_ref, rejected_ref))
    return (chosen - chosen_ref) - (rejected - rejected_ref)
