"""GGRO: its exact properties, on Markov tables."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign import decoding, mdp, policies, rewards
from jaxalign.decoding.stopping import entropy
from jaxalign.types import TokenBatch
from tests.conftest import VOCAB, padded, tiny_lm
from tests.ggro_toy import (
    INF,
    MARKOV,
    PROMPTS,
    RNG,
    WIDTH,
    B,
    Plain,
    T,
    V,
    _gradient,
    _one_hot_reward,
    _reward,
    assert_completions_equal,
    greedy,
    guided,
    prompt_tokens,
    toy,
)


@pytest.mark.parametrize(("rule", "threshold"), [("difference", 1.0), ("code", 1.3), ("difference", 0.0)])
def test_ggro_is_the_plain_algorithm_on_every_prompt(rule, threshold):
    """Batched, ragged, repeats found before they are decoded: tokens, segments, forced tokens and reward calls are
    those of the plain form, which scores a repeat no more often."""
    forced = 0
    for seed in range(3):
        params = toy(seed)
        found = guided(params, rule=rule, threshold=threshold)
        for b in range(B):
            plain = Plain(params, prompt_tokens(b), candidates=4, threshold=threshold, rule=rule)
            expected = plain.run()
            assert np.asarray(found.completions.tokens[b])[np.asarray(found.completions.mask[b])].tolist() == expected
            assert int(found.info.segments[b]) == len(plain.segments)
            assert int(found.info.reward_passes[b]) == plain.scored
            assert int(found.info.forced[b].sum()) == plain.forced
            np.testing.assert_allclose(found.info.reward[b], plain.segments[-1][2][0], rtol=1e-4, atol=1e-5)
            forced += plain.forced
    assert forced > 10


@pytest.mark.parametrize("threshold", [0.0, 0.9, 1.4, INF])
def test_ggro_G1_one_candidate_is_greedy_for_every_threshold(threshold):
    params = toy(1)
    found = guided(params, candidates=1, threshold=threshold)
    assert_completions_equal(found.completions, greedy(params))
    assert not found.info.forced.any()
    assert not found.info.gradient_passes.any()


def test_ggro_G2_one_token_to_choose_from_is_greedy():
    params = toy(1)
    assert_completions_equal(guided(params, top_k=1, threshold=0.7).completions, greedy(params))


@pytest.mark.parametrize("rule", ["difference", "code"])
def test_ggro_G3_the_best_of_a_segment_rises_and_is_never_below_the_greedy_form(rule):
    params = toy(2)
    chains = [guided(params, candidates=s, rule=rule) for s in range(1, 7)]
    for found in chains:
        assert bool((found.info.kept_reward >= found.info.greedy_reward - 1e-6).all())
    first = np.stack([found.info.kept_reward[:, 0] for found in chains])
    assert (np.diff(first, axis=0) >= 0).all()
    assert (np.diff(first, axis=0) > 0).any()


def test_ggro_G4_without_a_threshold_there_is_one_segment_and_the_reward_rises_with_the_candidates():
    params = toy(3)
    chains = [guided(params, candidates=s, threshold=INF) for s in (1, 2, 4, 8)]
    final = np.stack([found.info.reward for found in chains])
    assert all((found.info.segments == 1).all() for found in chains)
    assert (np.diff(final, axis=0) >= 0).all()
    assert final[-1].mean() > final[0].mean() + 0.1
    texts = [found.completions for found in chains]
    joined = [decoding.join(PROMPTS, text) for text in texts]
    np.testing.assert_allclose(final, [_reward(params["reward"], *row, None) for row in joined], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shortest", [3, 5])
def test_ggro_G5_at_threshold_zero_segments_keep_the_fewest_tokens(shortest):
    found = guided(toy(4), threshold=0.0, min_segment=shortest)
    for b in range(B):
        lengths = np.bincount(np.asarray(found.info.segment[b])[np.asarray(found.completions.mask[b])])
        assert len(lengths) == int(found.info.segments[b])
        assert (lengths[:-1] == shortest).all()
        assert (found.info.segment[b][~found.completions.mask[b]] == -1).all()
    assert int(found.info.segments.max()) > 1


def test_ggro_G6_token_gradient_is_the_one_hot_gradient_and_the_finite_difference():
    with jax.enable_x64(True):
        lm, params = tiny_lm(5, "reward", "float64", num_layers=1)
        batch = padded([[4, 5, 6, 2, 7], [7, 1, 9], [8, 9, 10, 3]], side="right")
        position, length = jnp.array([3, 1, 2]), jnp.array([2, 1, 2])
        candidates = jnp.array([[2, 5, 8, 0], [1, 4, 7, 10], [10, 3, 2, 9]])
        gain = rewards.token_gradient(lm)
        found = jax.jit(gain)(params, *batch[:2], length, position, candidates)
        table = params["transformer"]["embedding"]

        @jax.jit
        def of_one_hot(x):
            hidden = lm.hidden(params, batch.tokens, mask=batch.mask, embeddings=x @ table)
            return lm.head(params, hidden[jnp.arange(3), mdp.last_index(batch.mask)])[:, 0]

        one_hot = jax.nn.one_hot(batch.tokens, VOCAB)
        full = jax.jit(jax.grad(lambda x: of_one_hot(x).sum()))(one_hot)[jnp.arange(3), position]
        np.testing.assert_allclose(found, jnp.take_along_axis(full, candidates, axis=1), rtol=1e-9, atol=1e-12)
        for j in range(candidates.shape[1]):
            step = jnp.zeros_like(one_hot).at[jnp.arange(3), position, candidates[:, j]].set(1e-6)
            difference = (of_one_hot(one_hot + step) - of_one_hot(one_hot - step)) / 2e-6
            np.testing.assert_allclose(found[:, j], difference, rtol=1e-6, atol=1e-9)
        value, again = jax.jit(gain.with_reward)(params, *batch[:2], length, position, candidates)
        np.testing.assert_allclose(again, found, rtol=1e-12)
        np.testing.assert_allclose(value, of_one_hot(one_hot), rtol=1e-12)


@pytest.mark.parametrize("kind", ["linear", "quadratic"])
def test_ggro_G7_the_gain_is_exact_for_linear_and_quadratic_rewards(kind):
    """Neither has a term of a token with itself, so that one replacement moves the reward linearly."""
    params = toy(6)["reward"]
    if kind == "linear":
        params = params | {"G": jnp.zeros((WIDTH, WIDTH)), "v": jnp.zeros(WIDTH)}
        weight = jax.random.normal(jax.random.key(1), (V,))
    else:
        params, weight = params | {"v": jnp.zeros(WIDTH)}, jnp.zeros(V)

    def reward(one_hot, response):
        return _one_hot_reward(params, one_hot, response) + jnp.where(response[..., None], one_hot, 0).sum(1) @ weight

    batch = padded([[4, 5, 1, 2, 3], [5, 1, 2, 4]], side="right")
    response = mdp.response_part(batch.mask, jnp.array([1, 1]))
    one_hot = jax.nn.one_hot(batch.tokens, V)
    at = (jnp.arange(2), jnp.array([2, 3]))
    g = jax.grad(lambda x: reward(x, response).sum())(one_hot)[at]
    now = g[jnp.arange(2), batch.tokens[at]]
    for v in range(V):
        swapped = one_hot.at[at].set(jax.nn.one_hot(v, V))
        gained = reward(swapped, response) - reward(one_hot, response)
        np.testing.assert_allclose(g[:, v] - now, gained, rtol=1e-4, atol=1e-5)
    if kind == "quadratic":
        tokens, mask, length = batch.tokens, batch.mask, jnp.array([1, 1])
        every = jnp.broadcast_to(jnp.arange(V), (2, V))
        np.testing.assert_allclose(_gradient(params, tokens, mask, length, at[1], every), g, rtol=1e-5, atol=1e-6)


def test_ggro_G8_a_constant_per_token_changes_the_rule_of_the_code_alone():
    """Subtracting 5 per token ranks the texts of one length as before; here all have one length."""
    params = toy(7)
    moved = params | {"reward": params["reward"] | {"c": jnp.asarray(-5.0)}}
    same = {"eos_ids": (), "threshold": INF}
    for rule, equal in (("difference", True), ("code", False)):
        left, right = (guided(p, rule=rule, **same).completions.tokens for p in (params, moved))
        assert bool((left == right).all()) == equal, rule


def test_ggro_G9_the_forced_token_stands_where_its_segment_begins():
    params = toy(8)
    found = guided(params)
    text, before = found.completions, jnp.pad(found.info.segment[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
    begins = found.info.segment > before
    assert bool((begins | ~found.info.forced).all())
    assert int(found.info.forced.sum()) > 5
    scored = decoding.log_prob(MARKOV, params["policy"], RNG, PROMPTS, text.tokens, text.mask)
    np.testing.assert_allclose(scored.log_prob, text.log_prob_ref, rtol=1e-5, atol=1e-5)
    # Elsewhere the most probable token stands; a forced one is another.
    only = decoding.log_prob(policies.top_k(MARKOV, 1), params["policy"], RNG, PROMPTS, text.tokens, text.mask)
    assert (np.asarray(only.in_support) == ~np.asarray(found.info.forced.any(axis=1))).all()
    np.testing.assert_allclose(
        text.log_norm[~found.info.forced & text.mask], text.log_prob_ref[~found.info.forced & text.mask], rtol=1e-5
    )


@pytest.mark.parametrize("rule", ["difference", "code"])
def test_ggro_G10_a_repeated_candidate_stops_and_many_candidates_are_safe(rule):
    params = toy(9)
    most = guided(params, candidates=10**6, rule=rule)
    few = guided(params, candidates=3, rule=rule)
    assert bool((most.info.reward_passes <= 5 * most.info.segments).all())  # 5 tokens to begin with
    assert bool((few.info.reward_passes <= 3 * few.info.segments).all())
    assert bool((few.info.gradient_passes <= few.info.reward_passes).all())
    assert bool((most.info.reward_passes < 5 * most.info.segments).any())
    assert bool((few.info.policy_steps <= 3 * T).all())


def test_ggro_G11_eos_is_never_dropped_and_the_limit_never_exceeded():
    ended = 0
    for seed in range(4):
        params = toy(seed)
        sharp = params | {"policy": params["policy"].at[:, :, 0].add(1.5)}
        for eos_ids in ((0,), (0, 4)):
            text = guided(sharp, threshold=0.0, eos_ids=eos_ids).completions
            length = np.asarray(text.mask.sum(axis=1))
            last = np.asarray(text.tokens)[np.arange(B), length - 1]
            finished = np.isin(last, eos_ids)
            np.testing.assert_array_equal(text.finished, finished)
            assert (length[~finished] == T).all()
            inner = np.asarray(text.mask) & (np.arange(T) < length[:, None] - 1)
            assert not np.isin(np.asarray(text.tokens), eos_ids)[inner].any()
            ended += finished.sum()
    assert ended > 10


def test_ggro_G12_trying_every_token_is_at_least_as_good_from_the_same_prefix():
    """Each candidate follows from one of the top_k first tokens, so the best of all of them is never worse."""
    params, better = toy(10), 0
    found = guided(params, candidates=8)
    for b in range(B):
        plain = Plain(params, prompt_tokens(b), candidates=8, threshold=1.0)
        plain.run()
        for m, (prefix, seen, best) in enumerate(plain.segments):
            choices = np.argsort(-plain.next(prefix), kind="stable")[:5]
            each = [plain.segment(prefix, int(v))[0] for v in choices]
            assert all(form in each for form in seen)
            most = max(plain.reward(form) for form in each)
            assert best[0] <= most + 1e-6
            np.testing.assert_allclose(found.info.kept_reward[b, m], best[0], rtol=1e-4, atol=1e-5)
            better += most > best[0] + 1e-3
    assert better > 0  # the gradient does not find all of it


def test_ggro_G13_entropy_of_uniform_and_certain_and_equality_triggers():
    rows = jnp.log(jnp.array([[1 / V] * V, [1.0] + [0.0] * (V - 1)]))
    rows = jnp.where(jnp.isfinite(rows), rows, -1e20)
    np.testing.assert_allclose(entropy(rows), [math.log(V), 0], atol=1e-6)
    params = toy(0)
    uniform = params | {"policy": jnp.zeros((V, V, V))}
    # The same program computes both sides of the comparison.
    level = jax.jit(entropy)(jax.nn.log_softmax(jnp.zeros((1, V))))[0]
    at = guided(uniform, threshold=level, eos_ids=())
    above = guided(uniform, threshold=jnp.nextafter(level, jnp.float32(9)), eos_ids=())
    assert bool((at.info.segments == -(-T // 3)).all())
    assert bool((above.info.segments == 1).all())


def test_ggro_G14_the_final_reward_may_fall_with_more_candidates():
    """Greedy over segments: the reward at the end is not monotone, each segment's is (G3)."""
    fell, gained = 0, 0.0
    for seed in range(20):
        params = toy(seed)
        one, many = guided(params, candidates=1), guided(params, candidates=8)
        fell += int((many.info.reward < one.info.reward - 1e-3).sum())
        gained += float((many.info.reward - one.info.reward).sum())
    assert fell > 0
    assert gained > 0.1 * 20 * B


def test_ggro_G15_proposals_at_a_temperature_are_the_softmax_of_the_gain():
    """Any forced token pays more than none here, so the text shows each proposal; 4,000 prompts, 4.5 standard errors in
    each of ten frequencies: an error rate below 1e-4."""
    count, params = 4000, toy(0)
    g = jnp.array([0.4, -0.3, 1.2, 0.1, 0.8, -0.5])
    same = TokenBatch(jnp.tile(jnp.array([[2, 3]]), (count, 1)), jnp.ones((count, 2), bool))
    order = np.argsort(-np.asarray(params["policy"][2, 3]), kind="stable")[:5]

    def paid(params, tokens, mask, prompt_length, index):
        return (tokens[:, 2] != order[0]).astype(jnp.float32)

    def gain(params, tokens, mask, prompt_length, position, candidates):
        return params[candidates]

    given = {"policy": params["policy"], "reward": None, "gradient": g, "entropy_threshold": INF}
    for rule in ("difference", "code"):
        score = np.asarray(g)[order] - (np.asarray(g)[order[0]] if rule == "difference" else 0)
        score[0] = 0
        for temperature in (0.5, 2.0):
            found = decoding.ggro(
                MARKOV,
                paid,
                gain,
                given,
                RNG,
                same,
                num_samples=2,
                max_new_tokens=2,
                eos_ids=(),
                top_k=5,
                rule=rule,
                temperature=jnp.asarray(temperature),
            )
            expected = np.exp(score / temperature) / np.exp(score / temperature).sum()
            share = (np.asarray(found.completions.tokens[:, :1]) == order).mean(axis=0)
            error = np.sqrt(expected * (1 - expected) / count)
            assert (np.abs(share - expected) <= 4.5 * error).all(), (rule, temperature)
