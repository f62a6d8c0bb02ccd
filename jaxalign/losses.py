"""Training objectives, each a function on arrays that returns one number: the mean over the rows of the batch.

The prediction comes first; targets, masks and references are keyword-only, since a swap of two arrays of one shape
would go unnoticed. Pairs keep the field's order, chosen before rejected.

Nothing needs [B,L,V] at once: log-probabilities of the tokens come in, or (for the Bellman target) one chunk of
positions. Arrays whose shapes differ are AssertionErrors. Masks are double-where: an entry that is masked out may hold
NaN and leaves value and gradient finite.
"""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp

from jaxalign._arrays import at_least_float32
from jaxalign.shapes import Numbers, OverTokens, PerPrompt, PerToken, ResponseMask, Scalar
from jaxalign.types import Array, ArrayLike

__all__ = [
    "autoregressive_reward",
    "bradley_terry",
    "cd_q",
    "clipped_ratios",
    "clipped_share",
    "clipped_value",
    "dpo",
    "exceedance",
    "expected_next",
    "fudge",
    "ipo",
    "kl_penalty",
    "language_model",
    "last_and_pairs",
    "log_ratio_difference",
    "policy_gradient",
    "soft_value",
    "td",
]

MAX_EXPONENT = 20.0  # of the linex loss, and of probability ratios


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
    total = _masked(log_prob, mask).sum()
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


def fudge(value: PerToken, *, reward: PerPrompt, mask: ResponseMask) -> Scalar:
    """Gives the CD-FUDGE loss, mean_b ½ Σ_t m·(v_t − r)²: the same Monte-Carlo target for every prefix.

    It is a SUM over t: long responses weigh more. Its expected gradient is that of the error to V of the policy that
    drew y (V_ref only for y ~ pi_ref).

    Args:
      value: [B,T], v([x, y_1..y_t]), after token t.
      reward: [B].
      mask: [B,T], EOS included.

    Returns:
      A scalar.

    Source: arXiv 2310.17022.
    """
    return _squared(value, at_least_float32(reward)[:, None], mask)


def expected_next(q: OverTokens, *, log_prob_ref: OverTokens) -> Numbers:
    """Gives the mean of q over the next token, Σ_z pi_ref(z|s)·q(s,z).

    Args:
      q: [...,V], over the whole vocabulary; tokens of probability zero may hold anything.
      log_prob_ref: [...,V], in nats.

    Returns:
      [...], in units of q.
    """
    chex.assert_equal_shape([q, log_prob_ref])
    weight = jnp.exp(at_least_float32(log_prob_ref))
    return jnp.where(weight > 0, weight * jnp.where(weight > 0, q, 0), 0).sum(axis=-1)


def cd_q(value: PerToken, *, expected: PerToken, reward: PerPrompt, mask: ResponseMask) -> Scalar:
    """Gives the CD-Q loss, mean_b ½ Σ_t m·(v_t − sg(target_t))².

    target_t = r at the last token of the response (EOS, or the last kept token of a truncated one), else `expected`_t =
    Σ_z pi_ref(z|s_t)·v(s_t z), with s_t the state AFTER token t.

    Args:
      value: [B,T], v([x, y_1..y_t]), a Q head read at the token drawn.
      expected: [B,T], `expected_next` of the state after each token.
      reward: [B].
      mask: [B,T], EOS included.

    Returns:
      A scalar.

    Source: arXiv 2310.17022.
    """
    chex.assert_equal_shape([value, expected, mask])
    last = mask & ~jnp.pad(mask[:, 1:], ((0, 0), (0, 1)))
    target = jnp.where(last, at_least_float32(reward)[:, None], at_least_float32(expected))
    # The target is the same network: with its gradient, or with sampled next tokens, the minimiser is biased (T9).
    return _squared(value, jax.lax.stop_gradient(target), mask)


def td(value: PerToken, *, reward: PerPrompt, mask: ResponseMask) -> Scalar:
    """Gives the TD(0) loss, mean_b ½ Σ_t m·(v_t − sg(target_t))², target_t = v_{t+1}, or r at the last token.

    It takes one sampled successor: the same expected semi-gradient as `cd_q` when y_{t+1} ~ pi_ref.

    Args:
      value: [B,T], v([x, y_1..y_t]), after token t.
      reward: [B].
      mask: [B,T], EOS included.

    Returns:
      A scalar.
    """
    following = jnp.pad(value[:, 1:], ((0, 0), (0, 1)))
    return cd_q(value, expected=following, reward=reward, mask=mask)


def soft_value(
    value: PerToken, *, reward: PerPrompt, mask: ResponseMask, beta: ArrayLike, max_exponent: float = MAX_EXPONENT
) -> Scalar:
    """Gives the linex loss of a soft value, mean_b Σ_t m·(exp(d) − d − 1), d = (r − v_t)/beta.

    Its minimiser over y ~ pi_ref is V_soft = beta·log E[exp(r/beta)], the exact token-level solution.

    Args:
      value: [B,T], after token t.
      reward: [B].
      mask: [B,T], EOS included.
      beta: the KL weight > 0, in units of reward per nat.
      max_exponent: above it the exponential goes on as its tangent, so that one sample cannot blow up the gradient; the
        loss stays convex. `clipped_share` tells how often.

    Returns:
      A scalar.
    """
    chex.assert_equal_shape([value, mask])
    d = (at_least_float32(reward)[:, None] - _masked(value, mask)) / beta
    inside = jnp.minimum(d, max_exponent)
    each = jnp.exp(inside) * (1 + d - inside) - d - 1
    return _masked(each, mask).sum(axis=-1).mean()


def clipped_share(
    value: PerToken, *, reward: PerPrompt, mask: ResponseMask, beta: ArrayLike, max_exponent: float = MAX_EXPONENT
) -> PerPrompt:
    """Gives the share of each response's tokens whose exponent (r − v_t)/beta `soft_value` clips.

    Args:
      value: [B,T], after token t.
      reward: [B].
      mask: [B,T], EOS included.
      beta: the KL weight > 0.
      max_exponent: as `soft_value`.

    Returns:
      [B] in [0, 1].
    """
    d = (at_least_float32(reward)[:, None] - _masked(value, mask)) / beta
    return ((d > max_exponent) & mask).sum(axis=-1) / jnp.maximum(mask.sum(axis=-1), 1)


def exceedance(logit: PerToken, *, utility: PerPrompt, threshold: PerPrompt, mask: ResponseMask) -> Scalar:
    """Gives the loss of a classifier of Pr(u > m | prefix), mean_b Σ_t m_t·BCE(sigmoid(logit_t), 1[u > m]).

    Its exact token-level use is `shaping.exceedance_log_weight`.

    Args:
      logit: [B,T], after token t.
      utility: [B], u of the whole responses.
      threshold: [B], m of each prompt, in units of u.
      mask: [B,T], EOS included.

    Returns:
      A scalar.
    """
    chex.assert_equal_shape([logit, mask])
    above = (utility > threshold)[:, None]
    logit = _masked(logit, mask)
    each = -jnp.where(above, jax.nn.log_sigmoid(logit), jax.nn.log_sigmoid(-logit))
    return _masked(each, mask).sum(axis=-1).mean()


def last_and_pairs(value: PerToken, *, reward: PerPrompt, mask: ResponseMask, pair_weight: float = 1.0) -> Scalar:
    """Gives the loss of SRS-CD's value head as its authors train it.

    mean_b (v_T − r)² + c·mean over pairs (v_t − v_{t+1})²

    Only the last token of the response sees the reward; the pair term, without a stopped gradient, spreads it and is 0
    exactly when v is constant along the response.

    Args:
      value: [B,T], after token t.
      reward: [B].
      mask: [B,T], EOS included.
      pair_weight: c.

    Returns:
      A scalar.
    """
    chex.assert_equal_shape([value, mask])
    value = _masked(value, mask)
    following = jnp.pad(mask[:, 1:], ((0, 0), (0, 1)))
    last = mask & ~following
    final = jnp.where(last, value - at_least_float32(reward)[:, None], 0) ** 2
    pair = mask & following
    difference = jnp.where(pair, value - jnp.pad(value[:, 1:], ((0, 0), (0, 1))), 0) ** 2
    count = jnp.maximum(pair.sum(axis=-1), 1)
    return (final.sum(axis=-1) + pair_weight * difference.sum(axis=-1) / count).mean()


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
    difference = _masked(log_prob, mask) - _masked(old_log_prob, mask)
    if whole:
        ratio, advantage = _ratio(difference.sum(axis=-1)), at_least_float32(advantage)
        return -_clipped(ratio, advantage, clip).mean()
    ratio, advantage = _ratio(difference), _masked(advantage, mask)
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
    difference = _masked(log_prob, mask) - _masked(old_log_prob, mask)
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
    value, old_value, returns = (_masked(x, mask) for x in (value, old_value, returns))
    error = (value - returns) ** 2
    if clip < float("inf"):
        near = old_value + jnp.clip(value - old_value, -clip, clip)
        error = jnp.maximum(error, (near - returns) ** 2)
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
    ratio = _masked(log_prob, mask) - _masked(log_prob_ref, mask)
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


def _masked(x: Array, mask: Array) -> Array:
    return jnp.where(mask, at_least_float32(x), 0)


def _squared(value: Array, target: Array, mask: Array) -> Array:
    """mean_b ½ Σ_t m·(value − target)²."""
    chex.assert_equal_shape([value, mask])
    difference = _masked(value, mask) - _masked(jnp.broadcast_to(target, mask.shape), mask)
    return 0.5 * (difference**2).sum(axis=-1).mean()
