"""ARGS: its exact properties, on trees in float64 and on models."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign import critics, decoding, models, policies, tree
from jaxalign._arrays import is_supported
from tests import exact
from tests.conftest import EOS, PROMPTS, needs_jit, padded, tiny_config, tiny_lm

TREE = tree.Tree(4, 4, eos_id=0)
RNG = jax.random.key(0)


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


def problem(seed: int):
    """(base, r(sz) [S,V] for a reward model on partial text: a random number at every prefix)."""
    return exact.tables(TREE, seed)[0], exact.tables(TREE, seed + 100)[0] * 2


def args_policy(t=TREE, top_k=None):
    return exact.tilt(t, tree.critic(t, "level"), top_k)


def greedy(base, q, lam, *, top_k=None, t=TREE) -> int:
    """The response that ARGS-greedy decodes."""
    params = {"policy": base, "critic": q, "beta": jnp.asarray(1 / lam)}
    drawn = decoding.sample(
        args_policy(t, top_k),
        params,
        RNG,
        exact.one_prompt(1),
        max_new_tokens=t.horizon,
        eos_ids=() if t.eos_id is None else (t.eos_id,),
        temperature=0.0,
    )
    return int(tree.response_index(t, drawn.tokens, drawn.mask)[0])


def law(base, q, lam, top_k=None):
    return exact.tilted_law(TREE, base, tree.critic(TREE, "level"), q, beta=1 / lam, top_k=top_k)


def test_args_A1_limits():
    for seed in range(5):
        base, q = problem(seed)
        first = tree.greedy_response(TREE, base)
        assert greedy(base, q, 1e-9) == first
        for lam in (0.5, 5.0):
            assert greedy(base, q, lam, top_k=1) == first
        # lam -> inf: argmax r inside the k most probable tokens.
        kept = jnp.where(base >= jnp.sort(base, axis=-1)[:, -2:-1], q, -1e6)
        assert greedy(base, q, 1e9, top_k=2) == tree.greedy_response(TREE, kept)


def test_args_A2_a_function_of_the_prefix_changes_nothing():
    base, q = problem(1)
    shift = exact.tables(TREE, 55)[0][:, :1] * 3
    for top_k in (None, 2):
        found, expected = law(base, q + shift, 1.5, top_k), law(base, q, 1.5, top_k)
        inside = np.isfinite(expected)
        np.testing.assert_array_equal(np.isfinite(found), inside)
        np.testing.assert_allclose(found[inside], expected[inside], atol=1e-11)
        assert greedy(base, q + shift, 1.5, top_k=top_k) == greedy(base, q, 1.5, top_k=top_k)


def test_args_A3_scaling_the_reward_is_scaling_the_weight():
    base, q = problem(2)
    np.testing.assert_allclose(law(base, 2.5 * q + 0.7, 1.1), law(base, q, 1.1 * 2.5), atol=1e-11)
    np.testing.assert_allclose(law(base, 2.5 * q + 0.7, 1.1, 2), law(base, q, 1.1 * 2.5, 2), atol=1e-11)


def test_args_A4_logits_and_log_probabilities_behave_alike():
    base, q = problem(3)
    logits = base + exact.tables(TREE, 56)[0][:, :1] * 4
    lam = 1.5
    by_logits = jax.nn.log_softmax(logits + lam * q)
    np.testing.assert_allclose(law(base, q, lam), tree.response_log_prob(TREE, by_logits), atol=1e-12)
    assert greedy(base, q, lam) == tree.greedy_response(TREE, logits + lam * q)
    # A raw probability in its place is another rule.
    assert (
        exact.total_variation(
            law(base, q, lam), tree.response_log_prob(TREE, jax.nn.log_softmax(jnp.exp(base) + lam * q))
        )
        > 0.01
    )


def test_args_stochastic_is_the_tempered_product_on_the_candidates():
    """z ~ softmax(score/temp) over k candidates = pi_ref^{1/temp}·exp(lam·r/temp), renormalised on V_k."""
    base, q = problem(4)
    temp, lam, k = 0.7, 1.5, 3
    policy = policies.temperature(args_policy(top_k=k))
    params = {"policy": {"policy": base, "critic": q, "beta": 1 / lam}, "temperature": temp}
    kept = base >= jnp.sort(base, axis=-1)[:, -k][:, None]
    table = jax.nn.log_softmax(jnp.where(kept, (base + lam * q) / temp, -jnp.inf))
    np.testing.assert_allclose(
        np.exp(exact.log_law(TREE, policy, params)), np.exp(tree.response_log_prob(TREE, table)), atol=1e-12
    )


def test_args_A5_with_values_as_rewards_it_is_controlled_decoding_and_with_soft_values_the_optimum():
    base, reward = exact.tables(TREE, 5)
    q = tree.q_values(TREE, tree.value(TREE, base, reward), reward=reward)
    np.testing.assert_allclose(
        law(base, q, 2.0), tree.response_log_prob(TREE, tree.tilted_policy(base, q, beta=0.5)), atol=1e-12
    )
    soft = tree.q_values(TREE, tree.soft_value(TREE, base, reward, beta=0.5), reward=reward)
    target = exact.gibbs_law(tree.response_log_prob(TREE, base), reward, 0.5)
    np.testing.assert_allclose(law(base, soft, 2.0), target, atol=1e-11)


def test_args_A6_one_step_is_exact_for_any_terminal_reward():
    t = tree.Tree(7, 1, eos_id=None)
    base, reward = exact.tables(t, 6)
    found = exact.tilted_law(t, base, tree.critic(t, "level"), reward[None], beta=1 / 3.0)
    np.testing.assert_allclose(found, exact.gibbs_law(base[0], reward, 1 / 3.0), atol=1e-12)


def test_args_A8_myopia_on_the_two_branch_tree():
    """r(sz) = V_ref(sz), p_left = 0.3: greedy earns 1 for ln 19 = 2.94 < lam < ln(7/3)/0.05 = 16.95, and takes the poor
    left branch (0.1) above."""
    t = tree.Tree(2, 2, eos_id=None)
    base = jnp.log(jnp.array([[0.3, 0.7], [0.5, 0.5], [0.95, 0.05]]))
    reward = jnp.array([0.1, 0.1, 0.0, 1.0])
    q = tree.q_values(t, tree.value(t, base, reward), reward=reward)
    low, high = np.log(19), np.log(7 / 3) / 0.05
    np.testing.assert_allclose((low, high), (2.94, 16.95), atol=5e-3)
    earned = {
        lam: float(reward[greedy(base, q, lam, t=t)])
        for lam in (low - 1e-3, low + 1e-3, 10, high - 1e-3, high + 1e-3, 100)
    }
    assert list(earned.values()) == pytest.approx([0.0, 1.0, 1.0, 1.0, 0.1, 0.1])


@pytest.mark.parametrize("k", [1, 2, 3])
def test_args_A9_truncation_costs_at_least_the_mass_it_cuts(k):
    base, q = problem(7)
    tokens, _ = exact.responses(TREE)
    params = {"policy": base, "critic": q, "beta": jnp.asarray(1 / 1.5)}
    scored = exact.completions(TREE, args_policy(top_k=k), params)
    order = jnp.argsort(-base, axis=-1, stable=True)[:, :k]
    node = jnp.asarray(TREE.nodes)
    kept = (order[node] == tokens[..., None]).any(-1)
    real = np.asarray(scored.mask) & (np.cumsum(~np.asarray(kept), axis=1) - ~np.asarray(kept) == 0)
    np.testing.assert_array_equal(np.asarray(is_supported(scored.log_prob))[real], np.asarray(kept)[real])
    mass = jax.nn.logsumexp(jnp.take_along_axis(base, order, axis=-1), axis=-1)[node]
    assert (np.asarray(scored.kl)[real] >= -np.asarray(mass)[real] - 1e-12).all()
    np.testing.assert_array_equal(scored.in_support, kept.all(axis=1, where=scored.mask))


# On models ------------------------------------------------------------------------------------------------------------


def models_case(k=4):
    (lm, base), (reward_lm, reward) = tiny_lm(0, dtype="float64"), tiny_lm(1, "reward", dtype="float64")
    policy = policies.tilt(policies.language_model(lm), critics.args(reward_lm), top_k=k)
    return policy, {"policy": base, "critic": reward, "beta": jnp.asarray(1 / 1.5)}, lm, reward_lm


def test_args_A7_candidates_equal_full_rescorings_and_rows_freeze_after_eos():
    """Each step of the cached decoder against k fresh passes of the reward model over the whole text."""
    policy, params, lm, reward_lm = models_case()
    drawn = decoding.sample(policy, params, RNG, padded(PROMPTS), max_new_tokens=4, eos_ids=EOS)
    width = max(map(len, PROMPTS)) + 4

    @jax.jit
    def score(tokens, mask):
        last = mask.sum(1) - 1
        base = jax.nn.log_softmax(lm.apply(params["policy"], tokens, mask=mask).logits)
        reward = reward_lm.apply(params["critic"], tokens, mask=mask).head[..., 0]
        rows = jnp.arange(len(tokens))
        return base[rows, last], reward[rows, last]

    def right_padded(rows):
        batch = padded(rows, side="right", extra=width - max(map(len, rows)))
        return batch.tokens, batch.mask

    for b, prompt in enumerate(PROMPTS):
        text = list(prompt)
        for t in range(int(drawn.mask[b].sum())):
            base = np.asarray(score(*right_padded([text] * 4))[0][0])
            candidates = np.argsort(-base)[:4]
            reward = np.asarray(score(*right_padded([[*text, int(z)] for z in candidates]))[1])
            total = base[candidates] + 1.5 * reward
            total -= np.log(np.exp(total - total.max()).sum()) + total.max()
            token = int(drawn.tokens[b, t])
            np.testing.assert_allclose(drawn.log_prob[b, t], total[candidates.tolist().index(token)], rtol=1e-8)
            text.append(token)
    after = ~np.asarray(drawn.mask)
    for field in (drawn.tokens, drawn.log_prob, drawn.kl, drawn.log_norm):
        assert (np.asarray(field)[after] == 0).all()
    ended = np.asarray(drawn.tokens)[np.arange(5), np.asarray(drawn.mask).sum(1) - 1] == 0
    np.testing.assert_array_equal(drawn.finished, ended)


@pytest.mark.parametrize("extra", [0, 3])
def test_args_A7_batched_equals_single_and_padded_equals_unpadded(extra):
    policy, params, _, _ = models_case()
    together = decoding.sample(policy, params, RNG, padded(PROMPTS, extra=extra), max_new_tokens=4, eos_ids=EOS)
    for b, prompt in enumerate(PROMPTS):
        # One width for all but the first, which is as it is.
        alone = padded([prompt], extra=0 if b == 0 else 6 - len(prompt))._replace(index=jnp.array([b]))
        single = decoding.sample(policy, params, RNG, alone, max_new_tokens=4, eos_ids=EOS)
        np.testing.assert_array_equal(single.tokens[0], together.tokens[b])
        np.testing.assert_allclose(single.log_prob[0], together.log_prob[b], rtol=1e-9, atol=1e-12)


@needs_jit
def test_a_scalar_head_over_the_whole_vocabulary_goes_in_blocks(monkeypatch):
    """Same scores and same next state as one pass over all tokens, for a block that does not divide the vocabulary;
    and memory that grows with the block, not with the vocabulary."""
    lm, params = tiny_lm(1, "reward")
    critic = critics.args(lm)
    prompts = padded(PROMPTS)
    below = policies.language_model(tiny_lm(0)[0])
    output = jax.jit(below.init, static_argnums=3)(tiny_lm(0)[1], RNG, prompts, 3)[1]
    state = jax.jit(critic.init, static_argnums=3)(params, RNG, prompts, 3)
    score, advance = jax.jit(critic.score), jax.jit(critic.advance)
    everything = jnp.broadcast_to(jnp.arange(11), (5, 11))
    expected, kept = score(params, RNG, state, output, everything)
    monkeypatch.setattr("jaxalign.critics._model_critics._BLOCK", 4)
    found, proposal = score(params, RNG, state, output, None)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    choice = jnp.array([3, -1, 0, 10, 7])
    ours, theirs = advance(params, proposal, choice), advance(params, kept, choice)
    np.testing.assert_array_equal(ours.cache.length, theirs.cache.length)
    np.testing.assert_allclose(ours.cache.layers[1].k, theirs.cache.layers[1].k, rtol=1e-4, atol=1e-5)
    monkeypatch.undo()
    wide = models.LanguageModel(tiny_config(models.Head("reward"), vocab_size=8192))

    def temporaries(whole: bool) -> int:
        def score(params, state):
            candidates = None if whole else jnp.broadcast_to(jnp.arange(8192), (5, 8192))
            below = output._replace(log_prob=jnp.zeros((5, 8192)))
            q, proposal = critics.args(wide).score(params, RNG, state, below, candidates)
            return q, critics.args(wide).advance(params, proposal, jnp.zeros(5, jnp.int32))

        weights = jax.eval_shape(wide.init, RNG)
        inside = jax.eval_shape(lambda p: critics.args(wide).init(p, RNG, prompts, 3), weights)
        return jax.jit(score).lower(weights, inside).compile().memory_analysis().temp_size_in_bytes

    assert temporaries(True) < temporaries(False) / 8
