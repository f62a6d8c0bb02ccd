"""Losses of values and Q functions at every token: controlled decoding, soft values, classifiers."""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp

from jaxalign._arrays import at_least_float32, column
from jaxalign.losses._masks import MAX_EXPONENT, masked
from jaxalign.shapes import Numbers, OverTokens, PerPrompt, PerToken, ResponseMask, Scalar
from jaxalign.types import Array, ArrayLike


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
      beta: the KL weight > 0, a scalar or [B], in units of reward per nat.
      max_exponent: above it the exponential goes on as its tangent, so that one sample cannot blow up the gradient; the
        loss stays convex. `clipped_share` tells how often.

    Returns:
      A scalar.
    """
    chex.assert_equal_shape([value, mask])
    d = (at_least_float32(reward)[:, None] - masked(value, mask)) / column(at_least_float32(beta))
    inside = jnp.minimum(d, max_exponent)
    each = _linex(inside) + jnp.expm1(inside) * (d - inside)
    return masked(each, mask).sum(axis=-1).mean()


@jax.custom_jvp
def _linex(d: Array) -> Array:
    """exp(d) − d − 1, a small d to its own digits."""
    small = jnp.abs(d) < 0.1
    near = jnp.where(small, d, 0)
    series = near**2 * (1 / 2 + near * (1 / 6 + near * (1 / 24 + near * (1 / 120 + near / 720))))
    return jnp.where(small, series, jnp.expm1(d) - d)


@_linex.defjvp
def _linex_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    (d,), (change,) = primals, tangents
    return _linex(d), jnp.expm1(d) * change


def clipped_share(
    value: PerToken, *, reward: PerPrompt, mask: ResponseMask, beta: ArrayLike, max_exponent: float = MAX_EXPONENT
) -> PerPrompt:
    """Gives the share of each response's tokens whose exponent (r − v_t)/beta `soft_value` clips.

    Args:
      value: [B,T], after token t.
      reward: [B].
      mask: [B,T], EOS included.
      beta: the KL weight > 0, a scalar or [B].
      max_exponent: as `soft_value`.

    Returns:
      [B] in [0, 1].
    """
    d = (at_least_float32(reward)[:, None] - masked(value, mask)) / column(at_least_float32(beta))
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
    logit = masked(logit, mask)
    each = -jnp.where(above, jax.nn.log_sigmoid(logit), jax.nn.log_sigmoid(-logit))
    return masked(each, mask).sum(axis=-1).mean()


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
    value = masked(value, mask)
    following = jnp.pad(mask[:, 1:], ((0, 0), (0, 1)))
    last = mask & ~following
    final = jnp.where(last, value - at_least_float32(reward)[:, None], 0) ** 2
    pair = mask & following
    difference = jnp.where(pair, value - jnp.pad(value[:, 1:], ((0, 0), (0, 1))), 0) ** 2
    count = jnp.maximum(pair.sum(axis=-1), 1)
    return (final.sum(axis=-1) + pair_weight * difference.sum(axis=-1) / count).mean()


def _squared(value: Array, target: Array, mask: Array) -> Array:
    """mean_b ½ Σ_t m·(value − target)²."""
    chex.assert_equal_shape([value, mask])
    difference = masked(value, mask) - masked(jnp.broadcast_to(target, mask.shape), mask)
    return 0.5 * (difference**2).sum(axis=-1).mean()
