"""The exact oracle against brute force, and the identities of its values and laws."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign import decoding, tree
from tests import exact

RAGGED, FIXED = tree.Tree(3, 3, eos_id=0), tree.Tree(3, 3, eos_id=None)


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


def enumerate_responses(t: tree.Tree) -> list[tuple[int, ...]]:
    """All responses by plain recursion."""
    out = []

    def extend(prefix):
        if len(prefix) == t.horizon or (prefix and prefix[-1] == t.eos_id):
            out.append(prefix)
        else:
            for z in range(t.vocab_size):
                extend((*prefix, z))

    extend(())
    return out


def state_of(t: tree.Tree, prefix) -> int:
    s = 0
    for z in prefix:
        s = s * t.vocab_size + 1 + z
    return s


@pytest.mark.parametrize("t", [RAGGED, FIXED, tree.Tree(2, 4, eos_id=1), tree.Tree(4, 1)])
def test_enumeration_holds_every_response_once(t):
    tokens, mask = t.responses
    found = [tuple(row[m].tolist()) for row, m in zip(tokens, mask, strict=True)]
    assert sorted(found) == sorted(enumerate_responses(t))
    for i, y in enumerate(found):
        assert [t.nodes[i, k] for k in range(len(y))] == [state_of(t, y[:k]) for k in range(len(y))]
        assert t.leaf[state_of(t, y[:-1]), y[-1]] == i
    assert (t.leaf >= 0).sum() == t.num_responses
    index = tree.response_index(t, jnp.asarray(tokens), jnp.asarray(mask))
    np.testing.assert_array_equal(index, np.arange(t.num_responses))


@pytest.mark.parametrize("t", [RAGGED, FIXED])
def test_cd_T1_backward_induction_is_the_sum_over_leaves(t):
    """V_ref, V_soft, V_TQ and max r at every reachable state against sums over the responses below it."""
    log_ref, reward = exact.tables(t, 0)
    law = np.asarray(tree.response_log_prob(t, log_ref))
    tokens, mask = t.responses
    texts = [tuple(row[m].tolist()) for row, m in zip(tokens, mask, strict=True)]
    np.testing.assert_allclose(np.exp(law).sum(), 1, rtol=1e-12)
    r, beta = np.asarray(reward), 0.7
    v, soft = tree.value(t, log_ref, reward), tree.soft_value(t, log_ref, reward, beta=beta)
    transfer, top = tree.transfer_value(t, log_ref, reward, beta=beta), tree.max_value(t, log_ref, reward)
    for depth in range(t.horizon):
        for prefix in itertools.product(range(t.vocab_size), repeat=depth):
            if t.eos_id in prefix:
                continue
            below = [i for i, y in enumerate(texts) if y[:depth] == prefix]
            p = np.exp(law[below] - np.logaddexp.reduce(law[below]))
            s, rs = state_of(t, prefix), r[below]
            np.testing.assert_allclose(v[s], p @ rs, rtol=1e-12)
            np.testing.assert_allclose(soft[s], beta * np.log(p @ np.exp(rs / beta)), rtol=1e-12)
            tilted = p * np.exp(rs / beta)
            np.testing.assert_allclose(transfer[s], tilted @ rs / tilted.sum(), rtol=1e-12)
            assert top[s] == rs.max()


@pytest.mark.parametrize("beta", [0.1, 0.5, 1.0, 3.0, 1e4])
def test_cd_T6_ordering_of_the_values(beta):
    """V_ref <= V_soft <= V_TQ <= max r, and V_TQ − V_soft = beta·KL(pi*‖pi_ref) of the future, at every state."""
    t = tree.Tree(4, 4, eos_id=0)
    log_ref, reward = exact.tables(t, 1)
    alive = t.alive
    v, soft = tree.value(t, log_ref, reward), tree.soft_value(t, log_ref, reward, beta=beta)
    transfer, top = tree.transfer_value(t, log_ref, reward, beta=beta), tree.max_value(t, log_ref, reward)
    for low, high in ((v, soft), (soft, transfer), (transfer, top)):
        assert (np.asarray(high - low)[alive] > -1e-11).all()
    optimal = tree.optimal_policy(t, log_ref, reward, beta=beta)
    # KL of the future at s, by backward induction: the value of the per-step KL as a running cost.
    step = np.asarray((jnp.exp(optimal) * (optimal - log_ref)).sum(-1))
    future = np.zeros(t.num_states * t.vocab_size + t.vocab_size + 1)
    for s in reversed(range(t.num_states)):
        if alive[s]:
            children = np.where(t.leaf[s] >= 0, 0.0, future[s * 4 + 1 + np.arange(4)])
            future[s] = step[s] + np.exp(optimal[s]) @ children
    np.testing.assert_allclose((transfer - soft)[alive], beta * future[: t.num_states][alive], atol=1e-9 * max(beta, 1))
    if beta == 1e4:
        variance = tree.value(t, log_ref, reward**2) - v**2
        np.testing.assert_allclose((soft - v)[alive], variance[alive] / (2 * beta), atol=1e-8)


def test_values_of_the_threshold_reward_in_closed_form():
    """r = B·1[u > m]: V_ref = Bp, V_soft = beta·log(1 + (k−1)p), V_TQ = B·k·p/(1 + (k−1)p), k = exp(B/beta)."""
    t = tree.Tree(4, 4, eos_id=0)
    log_ref, utility = exact.tables(t, 2)
    bound, beta = 2.0, 0.8
    reward = bound * (utility > 0.3)
    p = tree.value(t, log_ref, (utility > 0.3).astype(float))
    k = np.exp(bound / beta)
    np.testing.assert_allclose(tree.value(t, log_ref, reward), bound * p, atol=1e-12)
    np.testing.assert_allclose(tree.soft_value(t, log_ref, reward, beta=beta), beta * np.log1p((k - 1) * p), atol=1e-12)
    np.testing.assert_allclose(
        tree.transfer_value(t, log_ref, reward, beta=beta), bound * k * p / (1 + (k - 1) * p), atol=1e-12
    )


@pytest.mark.parametrize("t", [RAGGED, FIXED])
def test_the_soft_tilt_multiplies_up_to_the_gibbs_law(t):
    log_ref, reward = exact.tables(t, 3)
    for beta in (0.1, 1.0, 5.0):
        policy = tree.optimal_policy(t, log_ref, reward, beta=beta)
        law = tree.optimal_log_prob(t, log_ref, reward, beta=beta)
        np.testing.assert_allclose(tree.response_log_prob(t, policy), law, atol=1e-11)
        np.testing.assert_allclose(tree.policy_of(t, law)[t.alive], policy[t.alive], atol=1e-11)
        log_base = tree.response_log_prob(t, log_ref)
        np.testing.assert_allclose(law, exact.gibbs_law(log_base, reward, beta), atol=1e-11)
        np.testing.assert_allclose(tree.step_kl(t, policy, log_ref).sum(), tree.sequence_kl(law, log_base), rtol=1e-10)
        np.testing.assert_allclose(tree.expected(law, values=reward), tree.value(t, policy, reward)[0], rtol=1e-10)


def test_state_probabilities_and_greedy_response():
    log_ref, _ = exact.tables(RAGGED, 4)
    reach = np.exp(tree.state_log_prob(RAGGED, log_ref))
    law = np.exp(tree.response_log_prob(RAGGED, log_ref))
    tokens, mask = RAGGED.responses
    for s in range(RAGGED.num_states):
        through = ((RAGGED.nodes == s) & mask).any(axis=1)
        np.testing.assert_allclose(reach[s], law[through].sum(), atol=1e-14)
    best = tree.greedy_response(RAGGED, log_ref)
    s = 0
    for k in range(mask[best].sum()):
        assert tokens[best, k] == np.argmax(log_ref[s])
        s = s * 3 + 1 + tokens[best, k]


def test_win_rates_against_double_sums():
    t = RAGGED
    log_p = tree.response_log_prob(t, exact.tables(t, 5)[0])
    log_q = tree.response_log_prob(t, exact.tables(t, 6)[0])
    reward = jnp.round(exact.tables(t, 7)[1])
    p, q, r = np.exp(log_p), np.exp(log_q), np.asarray(reward)
    for ties in (0.0, 0.5, 1.0):
        wins = (r[:, None] > r[None]) + ties * (r[:, None] == r[None])
        np.testing.assert_allclose(tree.win_rate(log_p, log_q, reward=reward, ties=ties), p @ wins @ q, rtol=1e-12)
    np.testing.assert_allclose(tree.win_rate(log_p, log_p, reward=reward), 0.5, rtol=1e-12)


def brute_best_of_n(law: np.ndarray, score: np.ndarray, n: int) -> np.ndarray:
    """Sum over all n-tuples; ties are split evenly over the draws that tie."""
    out = np.zeros(len(law))
    for draw in itertools.product(range(len(law)), repeat=n):
        scores = score[list(draw)]
        best = [i for i, s in zip(draw, scores, strict=True) if s == scores.max()]
        for i in best:
            out[i] += np.prod(law[list(draw)]) / len(best)
    return out


@pytest.mark.parametrize("n", [1, 2, 3])
def test_best_and_worst_of_n_laws_with_ties(n):
    t = tree.Tree(3, 2, eos_id=0)
    log_law = tree.response_log_prob(t, exact.tables(t, 8)[0])
    score = jnp.round(exact.tables(t, 9)[1])
    assert len(np.unique(score)) < len(score)
    law = np.exp(log_law)
    np.testing.assert_allclose(
        np.exp(tree.best_of_n_law(log_law, score=score, n=n)), brute_best_of_n(law, np.asarray(score), n), atol=1e-13
    )
    np.testing.assert_allclose(
        np.exp(tree.worst_of_n_law(log_law, score=score, n=n)), brute_best_of_n(law, -np.asarray(score), n), atol=1e-13
    )
    kl = tree.sequence_kl(tree.best_of_n_law(log_law, score=score, n=n), log_law)
    assert float(kl) <= float(tree.best_of_n_bound(n)) + 1e-12


@pytest.mark.parametrize("seed", range(4))
def test_selecting_laws_keep_their_digits_in_float32(seed):
    """4096-odd responses of probability down to 1e-12: a difference of two prefix sums would leave no digit (NaN)."""
    t = tree.Tree(4, 6, eos_id=0)
    log_ref, reward = tree.random(jax.random.key(seed), t, dtype=jnp.float32)
    value = tree.value(t, log_ref, reward)
    narrow = tree.response_log_prob(t, log_ref)
    assert narrow.dtype == jnp.float32

    def laws(dtype):
        base, r, v = (x.astype(dtype) for x in (log_ref, reward, value))
        log_base = tree.response_log_prob(t, base)
        blocks = tree.blockwise_law(t, base, state_score=v, reward=r, num_samples=8, block_size=2)
        return [tree.best_of_n_law(log_base, score=r, n=16), tree.worst_of_n_law(log_base, score=r, n=16), blocks]

    for found, exact_law in zip(laws(jnp.float32), laws(jnp.float64), strict=True):
        assert found.dtype == jnp.float32
        seen = np.asarray(exact_law) > -70  # 0 in float32 below
        np.testing.assert_allclose(np.asarray(found)[seen], np.asarray(exact_law)[seen], atol=1e-4)
        assert not np.isnan(found).any()
        np.testing.assert_allclose(np.exp(exact_law).sum(), 1, atol=1e-12)


def test_selecting_laws_where_the_base_has_no_mass():
    log_law = jnp.log(jnp.array([0.5, 0.0, 0.5, 0.0]))
    law = tree.best_of_n_law(log_law, score=jnp.array([0.0, 1.0, 2.0, 3.0]), n=2)
    np.testing.assert_allclose(np.exp(law), [0.25, 0, 0.75, 0], atol=1e-15)
    gradient = jax.grad(lambda x: jnp.exp(tree.best_of_n_law(x, score=jnp.array([0.0, 1.0, 2.0, 3.0]), n=2))[2])(
        log_law
    )
    assert np.isfinite(gradient).all()


def test_nan_in_a_law_shows():
    law = jnp.log(jnp.array([0.5, jnp.nan, 0.5]))
    assert np.isnan(tree.expected(law, values=jnp.ones(3)))
    assert np.isnan(tree.sequence_kl(law, jnp.log(jnp.ones(3) / 3)))


def test_reward_of_a_response_that_is_none_of_the_tree_is_nan():
    """Cut short, going on after its end, or outside the vocabulary; and the complete ones keep their numbers."""
    t = tree.Tree(3, 3, eos_id=0)
    tokens = jnp.array([[1, 2, 0, 0], [1, 0, 0, 0], [1, 2, 2, 1], [1, 0, 1, 0], [7, 0, 0, 0], [1, 2, 2, 0]])
    mask = jnp.array([[1, 1, 0, 0], [1, 1, 0, 0], [1, 1, 1, 1], [1, 1, 1, 0], [1, 1, 0, 0], [1, 1, 1, 0]], bool)
    index = np.asarray(tree.response_index(t, tokens, mask))
    assert (index[[0, 2, 3, 4]] == -1).all()
    for row in (1, 5):
        ours = tuple(np.asarray(tokens[row])[np.asarray(mask[row])])
        kept = np.asarray(t.responses[0])[index[row]][np.asarray(t.responses[1])[index[row]]]
        assert ours == tuple(kept)
    table = jnp.arange(float(t.num_responses))
    length, zero = jnp.zeros(6, jnp.int32), jnp.zeros(6, jnp.int32)
    paid = np.asarray(tree.reward(t)(table, tokens, mask, length, zero))
    assert np.isnan(paid[[0, 2, 3, 4]]).all()
    np.testing.assert_array_equal(paid[[1, 5]], index[[1, 5]])
    beyond = tree.reward(t)(jnp.stack([table, table]), tokens, mask, length, jnp.array([0, 1, 0, 0, 0, 2]))
    assert np.isnan(np.asarray(beyond)[5])


def test_tables_that_do_not_fit_are_refused():
    t = tree.Tree(3, 2, eos_id=0)
    base, reward = exact.tables(t, 0)
    arguments = {"max_new_tokens": 3, "eos_ids": (0,)}
    with pytest.raises(ValueError, match="max_new_tokens: expected at most the tree's horizon of 2"):
        decoding.sample(tree.policy(t), base, exact.RNG, tree.prompts(2), **arguments)
    arguments["max_new_tokens"] = 2
    with pytest.raises(ValueError, match="params: expected a table with a row for each prompt's index"):
        decoding.sample(tree.policy(t), jnp.stack([base, base]), exact.RNG, tree.prompts(3), **arguments)
    both = {"policy": base, "reward": jnp.stack([reward, reward])}
    with pytest.raises(ValueError, match="reward: expected a table with a row for each prompt's index"):
        decoding.best_of_n(tree.policy(t), tree.reward(t), both, exact.RNG, tree.prompts(3), num_samples=2, **arguments)
    both["reward"] = reward[1:]
    with pytest.raises(ValueError, match="reward: expected a table of shape"):
        decoding.best_of_n(tree.policy(t), tree.reward(t), both, exact.RNG, tree.prompts(3), num_samples=2, **arguments)
    # A response that is cut short earns nothing that could be compared.
    both["reward"], arguments["max_new_tokens"] = reward, 1
    with pytest.raises(ValueError, match="reward: expected numbers, found NaN for prompts"):
        decoding.best_of_n(tree.policy(t), tree.reward(t), both, exact.RNG, tree.prompts(8), num_samples=2, **arguments)


def test_cd_T10_blockwise_law():
    """Against a recursion over states; N = 1 is the base; M = T by the reward is best-of-N; the bound holds and needs
    its ceiling; E[r] >= V_ref with the exact value."""
    t = tree.Tree(2, 4, eos_id=0)
    log_ref, reward = exact.tables(t, 10)
    value = tree.value(t, log_ref, reward)
    log_base = tree.response_log_prob(t, log_ref)
    law = np.exp(tree.blockwise_law(t, log_ref, state_score=value, reward=reward, num_samples=3, block_size=2))

    tokens, mask = t.responses
    texts = [tuple(row[m].tolist()) for row, m in zip(tokens, mask, strict=True)]
    number = {y: i for i, y in enumerate(texts)}
    expected = np.zeros(len(texts))

    def decode(prefix, probability):
        blocks = {}
        for y, log_p in zip(texts, np.asarray(log_base), strict=True):
            if y[: len(prefix)] == prefix:
                blocks.setdefault(y[: len(prefix) + 2], []).append(log_p)
        mass = np.array([np.exp(v).sum() for v in blocks.values()])
        score = np.array([reward[number[b]] if b in number else value[state_of(t, b)] for b in blocks])
        for b, p in zip(blocks, brute_best_of_n(mass / mass.sum(), score, 3), strict=True):
            if b in number:
                expected[number[b]] += probability * p
            else:
                decode(b, probability * p)

    decode((), 1.0)
    np.testing.assert_allclose(law, expected, atol=1e-13)
    np.testing.assert_allclose(
        tree.blockwise_law(t, log_ref, state_score=value, reward=reward, num_samples=1, block_size=2),
        log_base,
        atol=1e-12,
    )
    np.testing.assert_allclose(
        np.exp(tree.blockwise_law(t, log_ref, state_score=value, reward=reward, num_samples=3, block_size=4)),
        np.exp(tree.best_of_n_law(log_base, score=reward, n=3)),
        atol=1e-12,
    )
    assert law @ np.asarray(reward) >= value[0]


def test_cd_T10_the_bound_on_the_kl_needs_its_ceiling():
    broken = False
    for seed in range(20):
        t = tree.Tree(4, 4, eos_id=0)
        log_ref, reward = exact.tables(t, seed)
        value = tree.value(t, log_ref, reward)
        log_base = tree.response_log_prob(t, log_ref)
        for block in (2, 3):
            law = tree.blockwise_law(t, log_ref, state_score=value, reward=reward, num_samples=4, block_size=block)
            kl = float(tree.sequence_kl(law, log_base))
            assert kl <= float(tree.blockwise_bound(t, law, num_samples=4, block_size=block)) + 1e-9
            length = t.responses[1].sum(axis=1)
            broken |= kl > float(np.exp(law) @ (length / block)) * float(tree.best_of_n_bound(4))
            assert float(tree.expected(law, values=reward)) >= float(value[0]) - 1e-9
    assert broken


def test_cd_T12_continuous_rewards_approach_the_bound_from_below():
    t = tree.Tree(8, 4, eos_id=None)
    log_base = tree.response_log_prob(t, jnp.full((t.num_states, 8), -np.log(8.0)))
    reward = exact.tables(t, 0)[1]
    for n in (2, 4, 8):
        law = tree.best_of_n_law(log_base, score=reward, n=n)
        kl, bound = float(tree.sequence_kl(law, log_base)), float(tree.best_of_n_bound(n))
        assert bound - 0.01 < kl <= bound + 1e-12
        np.testing.assert_allclose(tree.win_rate(law, log_base, reward=reward), n / (n + 1), atol=1e-3)


def test_the_tabular_policy_samples_its_law():
    """20,000 samples of 13 responses: the chi-squared statistic against the exact law stays below its 1 − 1e-6
    quantile (12 degrees of freedom: 52.2)."""
    t = tree.Tree(2, 3, eos_id=0)
    log_ref, _ = exact.tables(t, 11)
    n = 20_000
    drawn = decoding.sample(tree.policy(t), log_ref, jax.random.key(5), tree.prompts(n), max_new_tokens=3, eos_ids=(0,))
    count = np.bincount(tree.response_index(t, drawn.tokens, drawn.mask), minlength=t.num_responses)
    expected = n * np.exp(tree.response_log_prob(t, log_ref))
    assert ((count - expected) ** 2 / expected).sum() < 52.2
    np.testing.assert_array_equal(drawn.finished, (np.asarray(drawn.tokens) == 0).any(axis=1, where=drawn.mask))


def test_tables_per_prompt_are_looked_up_by_index():
    t = RAGGED
    stacked = jnp.stack([exact.tables(t, seed)[0] for seed in range(3)])
    prompts = exact.one_prompt(t.num_responses)
    tokens, mask = exact.responses(t)
    for i in range(3):
        batch = prompts._replace(index=jnp.full(t.num_responses, i))
        found = decoding.log_prob(tree.policy(t), stacked, jax.random.key(0), batch, tokens, mask).log_prob.sum(1)
        np.testing.assert_allclose(found, tree.response_log_prob(t, stacked[i]), atol=1e-12)


def test_the_tabular_reward_reads_the_response_under_either_padding():
    t = RAGGED
    _, reward = exact.tables(t, 12)
    tokens, mask = exact.responses(t)
    m = t.num_responses
    length = jnp.full(m, 2)
    prompt = jnp.ones((m, 2), jnp.int32)
    right = (jnp.concatenate([prompt, tokens], 1), jnp.concatenate([prompt > 0, mask], 1))
    roll = jax.vmap(lambda row, k: jnp.roll(row, k))
    shift = 3 - mask.sum(1)
    left = tuple(roll(x, shift) for x in right)
    for pair in (right, left):
        np.testing.assert_allclose(tree.reward(t)(reward, *pair, length, jnp.arange(m)), reward)
    per_prompt = jnp.stack([reward, -reward])
    index = jnp.arange(m) % 2
    np.testing.assert_allclose(
        tree.reward(t)(per_prompt, *right, length, index), jnp.where(index == 0, reward, -reward)
    )


def test_bad_trees_are_named():
    for arguments, field in (((1, 2), "vocab_size"), ((3, 0), "horizon"), ((3, 2, 3), "eos_id"), ((9, 9), "horizon")):
        with pytest.raises(ValueError, match=field):
            tree.Tree(*arguments)
    none = jnp.zeros(1)
    with pytest.raises(ValueError, match="num_samples"):
        tree.blockwise_law(RAGGED, none, state_score=none, reward=none, num_samples=0, block_size=1)
