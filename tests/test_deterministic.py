"""Responses that are the same in every batch: tokens and bits under `deterministic`, and what it refuses."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign import decoding, policies, rewards, rollout
from jaxalign._arrays import NEGATIVE
from jaxalign.decoding import _chunks
from jaxalign.types import TokenBatch
from tests.conftest import padded, tiny_lm

G, COUNT, T = 8, 32, 12
RNG = jax.random.key(3)
DRAW = np.random.default_rng(0)
ROWS = [DRAW.integers(1, 11, 1 + i % 11).tolist() for i in range(COUNT)]  # of the buckets 8 and 12
TOTAL = rewards.from_numpy(lambda tokens, mask, length, index: (tokens * mask).sum(axis=1).astype(np.float32))


def model(dtype: str, layers: int = 1):
    lm, params = tiny_lm(0, num_layers=layers, max_length=64, eos_ids=(2,), dtype=dtype)
    return policies.language_model(lm), jax.tree.map(lambda x: x.astype(dtype), params)


def batch(begin: int, size: int, *, side: str = "left", extra: int = 0) -> TokenBatch:
    """Prompts begin to begin + size, with the index that they have among all."""
    found = padded(ROWS[begin : begin + size], side=side, extra=extra)
    return found._replace(index=jnp.arange(begin, begin + found.tokens.shape[0]))


def same(found, expected, fields=("tokens", "mask", "log_prob", "finished")) -> None:
    for name in fields:
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name), err_msg=name)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_tokens_and_bits_are_the_same_at_any_batch_size_padding_and_width(dtype):
    policy, params = model(dtype, 2)
    limits = {"max_new_tokens": T, "deterministic": G}
    traces = _chunks.roll._cache_size()
    whole = decoding.sample(policy, params, RNG, batch(0, COUNT), **limits)
    score = lambda prompts, drawn, **how: decoding.log_prob(  # noqa: E731
        policy, params, RNG, prompts, drawn.tokens, drawn.mask, deterministic=G, **how
    )
    scored = score(batch(0, COUNT), whole)
    same(score(batch(0, COUNT), whole, exact=True), whole)
    for size, begins in ((8, (0, 8, 16, 24)), (3, (0, 15, 30)), (1, (0, 11, 31))):
        for number, begin in enumerate(begins):
            side, extra = ("left", "right")[number % 2], (0, 9)[number // 2]
            prompts = batch(begin, size, side=side, extra=extra)
            part = jax.tree.map(lambda x, b=begin, s=size: x[b : b + s], whole)
            same(decoding.sample(policy, params, RNG, prompts, **limits), part)
            expected = scored.log_prob[begin : begin + size]
            np.testing.assert_array_equal(score(prompts, part).log_prob, expected)
            # The sampler's own bits: an importance weight of the scorer against the sampler is exactly 1.
            exact = score(prompts, part, exact=True)
            same(exact, part)
            assert (np.exp(np.asarray(exact.log_prob) - np.asarray(part.log_prob)) == 1).all()
    assert _chunks.roll._cache_size() == traces + 2  # one for each bucket
    assert np.abs(np.asarray(scored.log_prob) - np.asarray(whole.log_prob)).max() < {"float32": 1e-5}.get(dtype, 0.05)


def test_samples_and_their_rewards_are_the_same_in_any_number():
    policy, params = model("bfloat16")
    limits = {"max_new_tokens": T, "deterministic": G}
    both = {"policy": params, "reward": None}
    one = decoding.sample(policy, params, RNG, batch(0, 11), **limits)
    three = decoding.sample(policy, params, RNG, batch(0, 11), num_samples=3, **limits)
    best = decoding.best_of_n(policy, TOTAL, both, RNG, batch(4, 7, side="right"), num_samples=5, **limits)
    same(jax.tree.map(lambda x: x[:, 0], three), one)
    same(jax.tree.map(lambda x: x[:, :3], best.info.samples), jax.tree.map(lambda x: x[4:], three))
    alone = decoding.best_of_n(policy, TOTAL, both, RNG, batch(6, 1, extra=3), num_samples=5, **limits)
    same(alone.completions, jax.tree.map(lambda x: x[2:3], best.completions))
    np.testing.assert_array_equal(alone.info.reward, best.info.reward[2:3])
    np.testing.assert_array_equal(
        best.info.reward.argmax(axis=1), (best.info.reward == best.info.reward.max(1)[:, None]).argmax(1)
    )
    for other in ({"chunk": 1}, {"drop": [(4, 2)]}):
        with pytest.raises(ValueError, match="deterministic: expected no chunk and no drop, found"):
            decoding.best_of_n(policy, TOTAL, both, RNG, batch(0, 2), num_samples=5, **limits, **other)


def test_other_decoders_come_in_chunks_of_prompts():
    policy, params = model("float32")
    both = {"policy": params, "reward": None, "beta": 1.0}

    def decode(prompts):
        return decoding.smc(policy, TOTAL, both, RNG, prompts, num_particles=3, max_new_tokens=4)

    whole = decoding.in_chunks(decode, batch(0, 9), 4)
    alone = decoding.in_chunks(decode, batch(7, 1, side="right", extra=5), 4)
    assert whole.completions.tokens.shape == (9, 4)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a[7:8], b), whole, alone)
    with pytest.raises(
        ValueError, match=r"decode: expected arrays whose first axis is that of 4 prompts, found .*\(\)"
    ):
        decoding.in_chunks(lambda prompts: prompts.tokens.sum(), batch(0, 3), 4)


def test_values_per_prompt_go_with_their_prompts():
    policy, params = model("float32")
    warm = policies.temperature(policy)
    heat = jnp.linspace(0.5, 1.5, 11)
    limits = {"max_new_tokens": 4, "deterministic": 4}
    whole = decoding.sample(policy, params, RNG, batch(0, 11), temperature=heat, **limits)
    inside = decoding.sample(warm, {"policy": params, "temperature": heat}, RNG, batch(0, 11), **limits)
    same(inside, whole)
    for b in (0, 9):
        found = decoding.sample(policy, params, RNG, batch(b, 1), temperature=heat[b : b + 1], **limits)
        same(found, jax.tree.map(lambda x: x[b : b + 1], whole))  # noqa: B023


def test_what_cannot_be_held_is_refused():
    policy, params = model("float32")
    limits = {"max_new_tokens": 4, "deterministic": 4}
    with pytest.raises(ValueError, match="deterministic: expected prompts whose values are known on the host"):
        jax.jit(lambda prompts: decoding.sample(policy, params, RNG, prompts, **limits))(batch(0, 2))
    with pytest.raises(ValueError, match="deterministic: expected at least 1, found 0"):
        decoding.sample(policy, params, RNG, batch(0, 2), max_new_tokens=4, deterministic=0)
    width = params["transformer"]["norm"]["scale"].shape[0]
    heat, asked = jnp.ones(width), batch(0, width)  # as many prompts as the model is wide
    with pytest.raises(
        ValueError, match=r"deterministic: expected params whose values per prompt can be told .*\(16,\)"
    ):
        decoding.sample(policy, params, RNG, asked, temperature=heat, **limits)
    tokens, mask = jnp.asarray([[2, 5]]), jnp.ones((1, 2), bool)
    with pytest.raises(ValueError, match="exact: expected tokens and a mask that are known on the host"):
        jax.jit(lambda x: decoding.log_prob(policy, params, RNG, batch(0, 1), x, mask, exact=True, deterministic=4))(
            tokens
        )
    with pytest.raises(ValueError, match="exact: expected with deterministic=G"):
        decoding.log_prob(policy, params, RNG, batch(0, 1), tokens, mask, exact=True)
    with pytest.raises(ValueError, match=r"exact: expected responses that end at their first EOS \(2,\)"):
        decoding.log_prob(policy, params, RNG, batch(0, 1), tokens, mask, exact=True, deterministic=4)


def test_scores_in_chunks_have_the_derivative_of_scores():
    policy, params = model("float32")
    tokens, mask = jnp.asarray(DRAW.integers(3, 11, (3, 4))), jnp.ones((3, 4), bool)

    def total(p, size):
        return decoding.log_prob(policy, p, RNG, batch(0, 3), tokens, mask, deterministic=size).log_prob.sum()

    found, expected = jax.grad(total)(params, 2), jax.grad(total)(params, None)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), found, expected)


def test_exact_scores_outside_the_support_are_those_of_the_scorer():
    policy, params = model("float32")
    cut, given = policies.top_k(policy, 2), params
    tokens, mask = (
        jnp.asarray(DRAW.integers(3, 11, (4, 6))),
        jnp.asarray(np.arange(6) < np.asarray([6, 4, 1, 3])[:, None]),
    )
    plain = decoding.log_prob(cut, given, RNG, batch(0, 4), tokens, mask)
    exact = decoding.log_prob(cut, given, RNG, batch(0, 4), tokens, mask, exact=True, deterministic=4)
    assert (np.asarray(plain.log_prob) == NEGATIVE).any()
    for name in ("tokens", "mask", "in_support", "finished", "truncated"):
        np.testing.assert_array_equal(getattr(exact, name), getattr(plain, name))
    for name in ("log_prob", "log_prob_ref", "log_norm", "kl"):
        np.testing.assert_allclose(getattr(exact, name), getattr(plain, name), atol=1e-5)


def test_the_margin_is_how_far_a_draw_may_move():
    log_prob = jnp.where(jnp.arange(7) % 3 == 2, NEGATIVE, jax.random.normal(jax.random.key(0), (200, 7)))
    uniform = jax.random.uniform(jax.random.key(1), (200,))
    margin, token = rollout.draw_margin(log_prob, uniform), rollout.draw(log_prob, uniform)
    at = lambda u: np.asarray(rollout.draw(log_prob, jnp.clip(u, 0, 1 - 1e-6)))  # noqa: E731
    near, far = 0.999 * margin, 1.001 * margin + 1e-6
    assert ((at(uniform + near) == token) & (at(uniform - near) == token)).all()
    assert ((at(uniform + far) != token) | (at(uniform - far) != token)).all()
    sure = jnp.asarray([[NEGATIVE, 0.0, NEGATIVE]])
    assert float(rollout.draw_margin(sure, jnp.asarray([0.3]))[0]) == 1


def test_margins_are_those_of_the_draws_of_sample():
    """Tokens whose margin is above the change of the cumulative probabilities are drawn again by changed parameters."""
    policy, params = model("float32")
    drawn = decoding.sample(policy, params, RNG, batch(0, 16), max_new_tokens=T)
    margins = np.asarray(decoding.draw_margins(policy, params, RNG, batch(0, 16), drawn.tokens, drawn.mask))
    mask = np.asarray(drawn.mask)
    assert (margins[~mask] == 1).all()
    assert 0 <= margins[mask].min() < margins[mask].mean() < 0.5
    moved = jax.tree.map(lambda x: x * 1.003, params)
    other = decoding.sample(policy, moved, RNG, batch(0, 16), max_new_tokens=1)
    first = np.asarray(other.tokens[:, 0] == drawn.tokens[:, 0])
    assert first[margins[:, 0] > 0.05].all()
