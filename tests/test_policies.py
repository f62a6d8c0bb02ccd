"""Transforms of a policy and combinators of rewards: values by hand, reductions, templates."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign import critics, decoding, policies, rewards, tree
from jaxalign._arrays import is_supported
from tests import exact
from tests.conftest import EOS, PROMPTS, alone, padded, tiny_lm

RNG = jax.random.key(0)
PROBABILITY = jnp.array([0.05, 0.4, 0.3, 0.05, 0.2])
TREE = tree.Tree(5, 1, eos_id=None)


def first(policy, params):
    """The first step's output for one prompt on a one-step tree."""
    return policy.init(params, RNG, tree.prompts(1), 1)[1]


def base_table():
    return jnp.log(PROBABILITY)[None]


def test_top_k_keeps_exactly_k_and_breaks_ties_by_id():
    out = first(policies.top_k(tree.policy(TREE), 4), base_table())
    np.testing.assert_array_equal(is_supported(out.log_prob[0]), [True, True, True, False, True])
    np.testing.assert_allclose(jnp.exp(out.log_prob[0]), np.array([0.05, 0.4, 0.3, 0, 0.2]) / 0.95, atol=1e-6)
    np.testing.assert_allclose(out.log_norm, np.log(0.95), rtol=1e-5)


@pytest.mark.parametrize(("p", "kept"), [(0.3, [1]), (0.4, [1]), (0.41, [1, 2]), (0.9, [1, 2, 4]), (1.0, range(5))])
def test_top_p_keeps_the_smallest_nucleus(p, kept):
    out = first(policies.top_p(tree.policy(TREE)), {"policy": base_table(), "top_p": p - 1e-6})
    assert np.flatnonzero(is_supported(out.log_prob[0])).tolist() == list(kept)
    np.testing.assert_allclose(jnp.exp(out.log_prob).sum(), 1, rtol=1e-5)


@pytest.mark.parametrize("p", [0.2, 0.9, 0.999])
def test_top_p_of_a_large_vocabulary_is_that_of_a_full_sort(p):
    """Rows whose nucleus is short, and rows whose nucleus is longer than what is looked at first."""
    t = tree.Tree(1000, 1, eos_id=None)
    logits = jax.random.normal(jax.random.key(0), (2, 1, 1000)) * jnp.array([3.0, 0.1])[:, None, None]
    for table in (logits[:1], logits):
        policy = policies.top_p(tree.policy(t))
        out = policy.init({"policy": table, "top_p": p}, RNG, tree.prompts(len(table)), 1)[1]
        for b, row in enumerate(np.asarray(jax.nn.softmax(table[:, 0]))):
            order = np.argsort(-row, kind="stable")
            count = int((np.cumsum(row[order]) - row[order] < p).sum())
            kept = np.flatnonzero(is_supported(out.log_prob[b]))
            assert abs(len(kept) - count) <= 1  # rounding of the prefix sum at the edge
            assert set(order[: count - 1]) <= set(kept) <= set(order[: count + 1])


def test_temperature_by_hand():
    out = first(policies.temperature(tree.policy(TREE)), {"policy": base_table(), "temperature": 0.5})
    np.testing.assert_allclose(jnp.exp(out.log_prob[0]), PROBABILITY**2 / (PROBABILITY**2).sum(), rtol=1e-5)
    np.testing.assert_allclose(out.log_norm, np.log((PROBABILITY**2).sum()), rtol=1e-5)


def test_a_large_beta_is_the_base_and_one_candidate_is_greedy():
    with jax.enable_x64(True):
        t = tree.Tree(4, 3, eos_id=0)
        base, q = exact.tables(t, 0)[0], exact.tables(t, 1)[0]
        law = exact.tilted_law(t, base, tree.critic(t, "level"), q, beta=1e12)
        np.testing.assert_allclose(law, tree.response_log_prob(t, base), atol=1e-9)
        law = exact.tilted_law(t, base, tree.critic(t, "level"), q, beta=0.3, top_k=1)
        assert int(np.argmax(law)) == tree.greedy_response(t, base)
        assert law.max() == 0


def test_the_exact_soft_value_gives_log_z_first_and_zero_after():
    with jax.enable_x64(True):
        t = tree.Tree(4, 4, eos_id=0)
        base, reward = exact.tables(t, 2)
        soft = tree.q_values(t, tree.soft_value(t, base, reward, beta=0.7), reward=reward)
        policy = exact.tilt(t, tree.critic(t, "level"))
        scored = exact.completions(t, policy, {"policy": base, "critic": soft, "beta": 0.7})
        log_z = jax.nn.logsumexp(tree.response_log_prob(t, base) + reward / 0.7)
        np.testing.assert_allclose(scored.log_norm[:, 0], log_z, atol=1e-12)
        np.testing.assert_allclose(scored.log_norm[:, 1:], 0, atol=1e-12)


@pytest.mark.parametrize("kind", ["level", "increment"])
def test_sums_of_log_norm_are_importance_weights_of_any_critic(kind):
    """E_pi'[exp(Σ log_norm)] = E_ref[exp(score/beta)], score the last level or the summed increments."""
    with jax.enable_x64(True):
        t = tree.Tree(3, 3, eos_id=0)
        base, q = exact.tables(t, 3)[0], exact.tables(t, 4)[0]
        policy = exact.tilt(t, tree.critic(t, kind))
        scored = exact.completions(t, policy, {"policy": base, "critic": q, "beta": 0.8})
        tokens, mask = exact.responses(t)
        each = jnp.where(mask, q[jnp.asarray(t.nodes), tokens], 0)
        last = mask.sum(1) - 1
        score = each[jnp.arange(len(last)), last] if kind == "level" else each.sum(1)
        found = jnp.exp(scored.log_prob.sum(1)) @ jnp.exp(scored.log_norm.sum(1))
        expected = jnp.exp(tree.response_log_prob(t, base)) @ jnp.exp(score / 0.8)
        np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_with_reference_measures_kl_to_the_other_model():
    (lm, tuned), (_, reference) = tiny_lm(0), tiny_lm(7)
    policy = policies.with_reference(policies.language_model(lm), policies.language_model(lm))
    params = {"policy": tuned, "reference": reference}
    prompts = padded(PROMPTS)
    drawn = decoding.sample(policy, params, RNG, prompts, max_new_tokens=3, eos_ids=EOS)
    plain = decoding.sample(policies.language_model(lm), tuned, RNG, prompts, max_new_tokens=3, eos_ids=EOS)
    np.testing.assert_array_equal(drawn.tokens, plain.tokens)
    assert (plain.kl == 0).all()
    assert (drawn.kl[:, 0] > 0).all()
    given = decoding.log_prob(policies.language_model(lm), reference, RNG, prompts, drawn.tokens, drawn.mask)
    np.testing.assert_allclose(drawn.log_prob_ref, given.log_prob, rtol=1e-4, atol=1e-5)


def test_map_scores_sees_candidates_log_probabilities_and_prompt():
    seen = []

    def f(params, q, log_prob, index):
        seen.append((q.shape, log_prob.shape, index.shape))
        return q * params["scale"][index][:, None] + log_prob

    t = tree.Tree(4, 2, eos_id=0)
    base, q = exact.tables(t, 0)[0], exact.tables(t, 1)[0]
    critic = critics.map_scores(tree.critic(t, "level"), f)
    policy = policies.tilt(tree.policy(t), critic, top_k=2)
    params = {"policy": base, "critic": {"critic": q, "map": {"scale": jnp.array([1.0, 0.0, 3.0])}}, "beta": 1.0}
    state, output = policy.init(params, RNG, tree.prompts(3), 2)
    assert seen == [((3, 2), (3, 2), (3,))]
    kept = state.candidates[0]
    for b, scale in enumerate((1.0, 0.0, 3.0)):
        logit = 2 * base[0, kept] + scale * q[0, kept]
        np.testing.assert_allclose(output.log_prob[b, kept], jax.nn.log_softmax(logit), rtol=1e-5)


# Rewards --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["left", "right"])
def test_model_rewards_read_the_last_real_token(side):
    lm, params = tiny_lm(1, "reward")
    batch = padded(PROMPTS, side=side, extra=2)
    length = jnp.ones(5, jnp.int32)
    found = jax.jit(rewards.from_model(lm))(params, batch.tokens, batch.mask, length, jnp.arange(5))
    for b, prompt in enumerate(PROMPTS):
        expected = alone(lm, params, prompt).head[-1, 0]
        np.testing.assert_allclose(found[b], expected, rtol=1e-4, atol=1e-6)
    with pytest.raises(ValueError, match="scalar head"):
        rewards.from_model(tiny_lm(0)[0])


def test_reward_combinators_under_jit():
    lm, params = tiny_lm(1, "reward")
    model = rewards.from_model(lm)
    length = rewards.from_numpy(lambda tokens, mask, prompt_length, index: mask.sum(1) - prompt_length)
    text = rewards.from_text(
        lambda ids: " ".join(map(str, ids)), lambda prompts, responses: [len(r.split()) for r in responses]
    )
    shifted = rewards.map_reward(model, lambda table, r, index: r + table[index])
    total = rewards.weighted_sum([shifted, length, text])
    batch = padded(PROMPTS)
    values = {"rewards": [{"reward": params, "map": jnp.arange(5.0)}, None, None], "weights": [2.0, 0.5, 0.25]}
    prompt_length = jnp.array([1, 1, 1, 2, 1])
    found = jax.jit(total)(values, batch.tokens, batch.mask, prompt_length, jnp.arange(5))
    plain = model(params, batch.tokens, batch.mask, prompt_length, jnp.arange(5))
    expected = 2 * (plain + jnp.arange(5)) + 0.75 * (batch.mask.sum(1) - prompt_length)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="weights"):
        total({**values, "weights": [1.0]}, batch.tokens, batch.mask, prompt_length, jnp.arange(5))
    wrong = rewards.from_numpy(lambda *_: np.zeros(2))
    with pytest.raises(Exception, match="one real number per text"):
        jax.block_until_ready(wrong(None, batch.tokens, batch.mask, prompt_length, jnp.arange(5)))


# Supports -------------------------------------------------------------------------------------------------------------


def test_a_high_temperature_keeps_a_truncation():
    """NEGATIVE/4 alone would count as inside the support, and be scored as a token of probability zero is not."""
    policy = policies.temperature(policies.top_k(tree.policy(TREE), 2))
    params = {"policy": base_table(), "temperature": 4.0}
    out = first(policy, params)
    assert is_supported(out.log_prob).sum() == 2
    tokens = jnp.argsort(base_table()[0])[:1][None]
    scored = decoding.log_prob(policy, params, RNG, tree.prompts(1), tokens, tokens >= 0)
    assert not scored.in_support[0]


@pytest.mark.parametrize("p", [0.3, 0.9, 0.999, 1.0])
@pytest.mark.parametrize("vocab", [700, 50_000])
def test_a_wide_nucleus_is_the_sorted_one(vocab, p):
    """Near-uniform rows, whose nucleus is wider than the tokens that are looked at first, against a sort."""
    logits = 0.3 * jax.random.normal(jax.random.key(vocab), (3, vocab))
    logits = logits.at[1].set(jnp.round(logits[1], 1))  # many equal tokens
    log_prob = jax.nn.log_softmax(logits)
    t = tree.Tree(vocab, 1, eos_id=None)
    policy = policies.top_p(tree.policy(t)._replace(check=None))
    out = policy.init({"policy": log_prob[:, None], "top_p": p}, RNG, tree.prompts(3), 1)[1]
    kept = np.asarray(is_supported(out.log_prob))
    for row, mask in zip(np.asarray(log_prob, np.float64), kept, strict=True):
        order = np.argsort(-row, kind="stable")
        mass = np.exp(row[order])
        expected = np.cumsum(mass) - mass < p
        count = int(expected.sum())
        # Sums of 50,000 float32 numbers: the edge may lie a few tokens off, but the order is by probability, then id.
        assert abs(int(mask.sum()) - count) <= 5 if p < 1 else mask.all()
        assert mask[order[: int(mask.sum())]].all()
    np.testing.assert_allclose(np.exp(np.where(kept, out.log_prob, -np.inf)).sum(-1), 1, rtol=1e-4)
