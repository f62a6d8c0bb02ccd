"""GenARM, decoding part: the exact properties of its specification (section 6), on trees in float64."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import log_softmax, logsumexp

from jaxalign import critics, decoding, losses, models, policies, rewards, tree
from jaxalign.data import preferences
from jaxalign.training import objectives
from tests import cases, exact
from tests.conftest import EOS, PROMPTS, alone, needs_jit, padded, tiny_lm

RAGGED = tree.Tree(4, 4, eos_id=0)
RNG = jax.random.key(0)


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


def increment(t: tree.Tree):
    return tree.critic(t, "increment")


def arm_of(t: tree.Tree, reward, beta_r: float):
    """The table that training converges to: the conditionals of softmax(r*/beta_r) over whole responses."""
    return tree.policy_of(t, jax.nn.log_softmax(jnp.asarray(reward) / beta_r))


def decoded(t: tree.Tree, log_base, arm, alpha: float) -> np.ndarray:
    return exact.tilted_law(t, log_base, increment(t), arm, beta=1 / alpha)


def test_genarm_A1_descent_on_the_loss_reaches_the_gibbs_law_of_the_reward():
    """With every pair drawn from Bradley-Terry in r*, token logits descend to log pi_r(y) = r*/beta_r + const."""
    t, beta_r = tree.Tree(2, 2, eos_id=0), 0.5
    _, reward = exact.tables(t, 3)
    count = reward.shape[0]
    pairs = jnp.array(list(itertools.permutations(range(count), 2)))
    weight = jax.nn.sigmoid(reward[pairs[:, 0]] - reward[pairs[:, 1]])

    def objective(logits):
        s = tree.response_log_prob(t, jax.nn.log_softmax(logits))
        each = jax.vmap(lambda w, l: losses.autoregressive_reward(s[w][None], s[l][None], beta_r=beta_r))
        return (weight * each(pairs[:, 0], pairs[:, 1])).sum()

    step = jax.jit(lambda logits: logits - 1.0 * jax.grad(objective)(logits))
    logits = jnp.zeros((t.num_states, t.vocab_size))
    for _ in range(4000):
        logits = step(logits)
    found = tree.response_log_prob(t, jax.nn.log_softmax(logits))
    np.testing.assert_allclose(found, jax.nn.log_softmax(reward / beta_r), atol=1e-8)
    optimum = arm_of(t, reward, beta_r)
    np.testing.assert_allclose(jax.grad(objective)(optimum), 0, atol=1e-12)


def test_genarm_A2_conditionals_multiply_back():
    _, reward = exact.tables(RAGGED, 0)
    law = jax.nn.log_softmax(reward / 0.5)
    np.testing.assert_allclose(tree.response_log_prob(RAGGED, tree.policy_of(RAGGED, law)), law, rtol=1e-12, atol=1e-12)


def test_genarm_A3_product_of_normalisers_corrects_the_token_rule():
    """pi*(y) = pi_dec(y)·Π_t Z_t / Z, with Σ_t log Z_t the sum of log_norm that decoding reports."""
    base, reward = exact.tables(RAGGED, 1)
    alpha, beta_r = 1.3, 0.5
    arm = arm_of(RAGGED, reward, beta_r)
    policy = policies.tilt(tree.policy(RAGGED), increment(RAGGED))
    found = exact.completions(RAGGED, policy, {"policy": base, "critic": arm, "beta": 1 / alpha})
    log_base = tree.response_log_prob(RAGGED, base)
    target = exact.gibbs_law(log_base, reward, beta_r / alpha)
    unnormalised = np.asarray(found.log_prob.sum(1) + found.log_norm.sum(1))
    log_z = np.log(np.exp(unnormalised).sum())
    np.testing.assert_allclose(unnormalised - log_z, target, atol=1e-12)


FIXED = [(2, 2), (2, 6), (4, 3), (8, 2)]


@pytest.mark.parametrize(("vocab", "horizon", "eos"), [(v, h, e) for v, h in FIXED for e in (None, 0)])
def test_genarm_A4_generic_tables_are_not_decoded_exactly(vocab, horizon, eos):
    t = tree.Tree(vocab, horizon, eos_id=eos)
    base, reward = exact.tables(t, 5)
    law = decoded(t, base, arm_of(t, reward, 0.5), 1.0)
    target = exact.gibbs_law(tree.response_log_prob(t, base), reward, 0.5)
    assert exact.total_variation(law, target) > 0.01


def additive_reward(t: tree.Tree, seed: int) -> np.ndarray:
    """Σ_t g_t(y_t): one table of token rewards per position."""
    tokens, mask = t.responses
    g = np.random.default_rng(seed).normal(size=(t.horizon, t.vocab_size))
    return np.where(mask, g[np.arange(t.horizon), tokens], 0).sum(axis=1)


def memoryless_base(t: tree.Tree, seed: int) -> jax.Array:
    """Positions independent of what came before: one row of probabilities per depth."""
    rows = jax.nn.log_softmax(jnp.asarray(np.random.default_rng(seed).normal(size=(t.horizon, t.vocab_size))))
    depth = np.repeat(np.arange(t.horizon), [t.vocab_size**d for d in range(t.horizon)])
    return rows[depth]


def uniform_base(t: tree.Tree) -> jax.Array:
    return jnp.full((t.num_states, t.vocab_size), -np.log(t.vocab_size))


def exactness(t: tree.Tree, base, reward, alpha: float, beta_r: float = 0.5) -> float:
    law = decoded(t, base, arm_of(t, reward, beta_r), alpha)
    return exact.total_variation(law, exact.gibbs_law(tree.response_log_prob(t, base), reward, beta_r / alpha))


def test_genarm_A4_exact_at_fixed_length_for_memoryless_base_with_additive_reward():
    fixed = tree.Tree(4, 3, eos_id=None)
    assert exactness(fixed, memoryless_base(fixed, 1), additive_reward(fixed, 2), 1.7) < 1e-14
    assert exactness(fixed, memoryless_base(fixed, 1), exact.tables(fixed, 2)[1], 1.7) > 0.01
    assert exactness(fixed, exact.tables(fixed, 2)[0], additive_reward(fixed, 2), 1.7) > 0.01
    ragged = tree.Tree(4, 3, eos_id=0)
    assert exactness(ragged, memoryless_base(ragged, 1), additive_reward(ragged, 2), 1.7) > 0.01


def test_genarm_A4_exact_at_fixed_length_for_uniform_base_with_weight_one():
    fixed, ragged = tree.Tree(4, 3, eos_id=None), tree.Tree(4, 3, eos_id=0)
    reward = exact.tables(fixed, 4)[1]
    assert exactness(fixed, uniform_base(fixed), reward, 1.0) < 1e-14
    assert exactness(fixed, uniform_base(fixed), reward, 2.0) > 0.01
    assert exactness(ragged, uniform_base(ragged), exact.tables(ragged, 4)[1], 1.0) > 0.01


@pytest.mark.parametrize("alpha", [0.5, 1.0, 2.5])
def test_genarm_A5_an_autoregressive_reward_that_decodes_exactly_exists(alpha):
    """pi_r(z|s) ∝ (pi*(z|s)/pi_ref(z|s))^{1/alpha}."""
    base, reward = exact.tables(RAGGED, 6)
    optimal = tree.optimal_policy(RAGGED, base, reward, beta=0.7)
    arm = jax.nn.log_softmax((optimal - base) / alpha)
    law = decoded(RAGGED, base, arm, alpha)
    target = exact.gibbs_law(tree.response_log_prob(RAGGED, base), reward, 0.7)
    assert exact.total_variation(law, target) < 1e-13


def test_genarm_A6_the_loss_of_the_token_rule_is_its_kl_to_the_optimum():
    """[E_{pi*}[r] − beta·KL(pi*)] − [E_{pi_dec}[r] − beta·KL(pi_dec)] = beta·KL(pi_dec‖pi*), beta = beta_r/alpha."""
    base, reward = exact.tables(RAGGED, 7)
    alpha, beta_r = 1.5, 0.6
    beta = beta_r / alpha
    log_base = np.asarray(tree.response_log_prob(RAGGED, base))
    law, target = decoded(RAGGED, base, arm_of(RAGGED, reward, beta_r), alpha), exact.gibbs_law(log_base, reward, beta)

    def objective(log_p):
        return float(np.exp(log_p) @ np.asarray(reward)) - beta * exact.kl(log_p, log_base)

    assert exact.kl(law, target) > 1e-3
    np.testing.assert_allclose(objective(target) - objective(law), beta * exact.kl(law, target), rtol=1e-10)


def test_genarm_A7_no_weight_is_the_base_and_one_step_is_exact():
    base, reward = exact.tables(RAGGED, 8)
    arm = arm_of(RAGGED, reward, 0.5)
    law = exact.tilted_law(RAGGED, base, increment(RAGGED), arm, beta=1e12)
    np.testing.assert_allclose(law, tree.response_log_prob(RAGGED, base), atol=1e-9)
    single = tree.Tree(6, 1, eos_id=None)
    base, reward = exact.tables(single, 8)
    for alpha in (0.3, 1.0, 4.0):
        assert exactness(single, base, reward, alpha) < 1e-14


def test_genarm_A7_weight_and_training_coefficient_enter_at_sequence_level_as_their_ratio():
    """The corrected (importance-weighted) law depends on beta_r/alpha alone; the token rule's does not."""
    base, reward = exact.tables(RAGGED, 9)
    policy = policies.tilt(tree.policy(RAGGED), increment(RAGGED))
    corrected, token_rule = [], []
    for alpha, beta_r in ((1.0, 0.5), (2.0, 1.0)):
        params = {"policy": base, "critic": arm_of(RAGGED, reward, beta_r), "beta": 1 / alpha}
        found = exact.completions(RAGGED, policy, params)
        token_rule.append(np.asarray(found.log_prob.sum(1)))
        corrected.append(np.asarray(jax.nn.log_softmax(found.log_prob.sum(1) + found.log_norm.sum(1))))
    assert exact.total_variation(*corrected) < 1e-13
    assert exact.total_variation(*token_rule) > 1e-3


def test_genarm_A8_temperature_identity():
    """softmax((log pi_ref + Σ alpha_i log pi_i)/temp) = the engine's form: the sum divided by 1 + Σ alpha_i, drawn at
    temp/(1 + Σ alpha_i); and our temperature over the tilt is that law."""
    base, reward = exact.tables(RAGGED, 10)
    arms = [arm_of(RAGGED, reward, 0.5), exact.tables(RAGGED, 11)[0]]
    alpha, temp = np.array([0.8, 1.7]), 0.7
    total = base + sum(a * arm for a, arm in zip(alpha, arms, strict=True))
    scale = 1 + alpha.sum()
    engine = jax.nn.log_softmax((total / scale) / (temp / scale))
    critic = critics.weighted_sum([increment(RAGGED)] * 2)
    policy = policies.temperature(policies.tilt(tree.policy(RAGGED), critic))
    params = {
        "policy": {"policy": base, "critic": {"critics": arms, "weights": jnp.asarray(alpha)}, "beta": 1.0},
        "temperature": temp,
    }
    np.testing.assert_allclose(
        exact.log_law(RAGGED, policy, params), tree.response_log_prob(RAGGED, engine), atol=1e-12
    )


def test_genarm_A9_loss_gradient_swap_and_limit():
    chosen, rejected, beta_r = jnp.array([-3.0, -1.0]), jnp.array([-2.5, -4.0]), 0.7
    loss = losses.autoregressive_reward(chosen, rejected, beta_r=beta_r)
    swapped = losses.autoregressive_reward(rejected, chosen, beta_r=beta_r)
    difference = chosen - rejected
    np.testing.assert_allclose(swapped, loss + beta_r * difference.mean(), rtol=1e-12)
    gradient = jax.grad(losses.autoregressive_reward)(chosen, rejected, beta_r=beta_r)
    np.testing.assert_allclose(gradient, -beta_r * jax.nn.sigmoid(-beta_r * difference) / 2, rtol=1e-12)
    np.testing.assert_allclose(losses.autoregressive_reward(chosen, rejected, beta_r=1e-12), np.log(2), rtol=1e-10)


def test_genarm_A10_is_dpo_with_a_constant_reference():
    chosen, rejected = jnp.array([-3.0, -1.0, -9.0]), jnp.array([-2.5, -4.0, -9.5])
    constant = jnp.full(3, -7.0)
    np.testing.assert_allclose(
        losses.autoregressive_reward(chosen, rejected, beta_r=0.3),
        losses.dpo(chosen, rejected, constant, constant, beta=0.3),
        rtol=1e-12,
    )


def test_genarm_A11_several_rewards_are_linear_and_order_free_and_zero_is_a_no_op():
    base, reward = exact.tables(RAGGED, 12)
    first, second = arm_of(RAGGED, reward, 0.5), exact.tables(RAGGED, 13)[0]

    def law(arms, weights):
        critic = critics.weighted_sum([increment(RAGGED)] * len(arms))
        return exact.tilted_law(RAGGED, base, critic, {"critics": arms, "weights": jnp.asarray(weights)}, beta=1.0)

    both = law([first, second], [0.8, 1.7])
    np.testing.assert_allclose(both, law([second, first], [1.7, 0.8]), atol=1e-12)
    np.testing.assert_allclose(law([first, second], [0.8, 0.0]), law([first], [0.8]), atol=1e-12)
    np.testing.assert_allclose(law([first, first], [0.5, 0.3]), law([first], [0.8]), atol=1e-12)
    by_table = tree.response_log_prob(RAGGED, jax.nn.log_softmax(base + 0.8 * first + 1.7 * second))
    np.testing.assert_allclose(both, by_table, atol=1e-12)
    nested = policies.tilt(policies.tilt(tree.policy(RAGGED), increment(RAGGED)), increment(RAGGED))
    inner = {"policy": base, "critic": first, "beta": 1 / 0.8}
    np.testing.assert_allclose(
        exact.log_law(RAGGED, nested, {"policy": inner, "critic": second, "beta": 1 / 1.7}), both, atol=1e-12
    )


def test_genarm_A11_sequence_tilt_raises_each_reward_by_its_variance():
    """d E[log pi_{r,i}]/d alpha_i = Var(log pi_{r,i}) >= 0 under the sequence-level tilt, other weights fixed."""
    base, reward = exact.tables(RAGGED, 14)
    logs = [tree.response_log_prob(RAGGED, a) for a in (arm_of(RAGGED, reward, 0.5), exact.tables(RAGGED, 15)[0])]
    log_base = tree.response_log_prob(RAGGED, base)

    def expected(alpha):
        law = jax.nn.softmax(log_base + alpha[0] * logs[0] + alpha[1] * logs[1])
        return jnp.stack([law @ logs[0], law @ logs[1]]), law

    alpha = jnp.array([0.6, 1.1])
    jacobian = jax.jacobian(lambda a: expected(a)[0])(alpha)
    law = expected(alpha)[1]
    for i in range(2):
        variance = law @ logs[i] ** 2 - (law @ logs[i]) ** 2
        np.testing.assert_allclose(jacobian[i, i], variance, rtol=1e-10)
        assert variance > 0


# On models ------------------------------------------------------------------------------------------------------------


def guided(dtype="float64"):
    (lm, base), (arm_lm, arm) = tiny_lm(0, dtype=dtype), tiny_lm(4, dtype=dtype)
    policy = policies.tilt(policies.language_model(lm), critics.autoregressive(arm_lm))
    return policy, {"policy": base, "critic": arm, "beta": jnp.asarray(0.8)}, (lm, arm_lm)


def test_genarm_A12_cached_equals_uncached_token_by_token():
    """The same key draws the same tokens whether each step re-reads the whole text or goes on from the caches."""
    policy, params, (lm, arm_lm) = guided()
    prompts = padded(PROMPTS)
    drawn = decoding.sample(policy, params, RNG, prompts, max_new_tokens=5, eos_ids=())

    @jax.jit
    def uncached(tokens, mask):
        base = jax.nn.log_softmax(lm.apply(params["policy"], tokens, mask=mask).logits)
        arm = jax.nn.log_softmax(arm_lm.apply(params["critic"], tokens, mask=mask).logits)
        return jax.nn.log_softmax(base + arm / 0.8)

    for b, prompt in enumerate(PROMPTS):
        text = list(prompt)
        for t in range(5):
            batch = padded([text], side="right", extra=10 - len(text))
            expected = uncached(batch.tokens, batch.mask)[0, len(text) - 1]
            token = int(drawn.tokens[b, t])
            np.testing.assert_allclose(drawn.log_prob[b, t], expected[token], rtol=1e-9, atol=1e-9)
            text.append(token)


def test_genarm_A12_batch_invariance():
    policy, params, _ = guided()
    prompts = padded(PROMPTS)
    together = decoding.sample(policy, params, RNG, prompts, max_new_tokens=5, eos_ids=EOS)
    for b, prompt in enumerate(PROMPTS):
        # One width for all, which is neither the batch's nor the prompt's, and two prompts as they are.
        extra = 0 if b < 2 else 6 - len(prompt)
        single = padded([prompt], extra=extra)._replace(index=jnp.array([b]))
        single = decoding.sample(policy, params, RNG, single, max_new_tokens=5, eos_ids=EOS)
        np.testing.assert_array_equal(single.tokens[0], together.tokens[b])
        np.testing.assert_allclose(single.log_prob[0], together.log_prob[b], rtol=1e-9, atol=1e-9)


def test_genarm_A12_prompts_for_each_model():
    policy, params, (lm, arm_lm) = guided()
    prompts, template = padded(PROMPTS), padded([[6, *row, 6] for row in PROMPTS])
    drawn = decoding.sample(policy, params, RNG, {"policy": prompts, "critic": template}, max_new_tokens=3, eos_ids=())
    for b, prompt in enumerate(PROMPTS):
        y = drawn.tokens[b].tolist()
        for t in range(3):
            base = alone(lm, params["policy"], prompt + y[:t]).logits[-1]
            arm = alone(arm_lm, params["critic"], [6, *prompt, 6, *y[:t]]).logits[-1]
            expected = log_softmax(log_softmax(base) + log_softmax(arm) / 0.8)
            np.testing.assert_allclose(drawn.log_prob[b, t], expected[y[t]], rtol=1e-9, atol=1e-9)


def test_genarm_A12_appended_vocabulary_rows_are_cut():
    (lm, base), (wide_lm, wide) = tiny_lm(0), tiny_lm(4, vocab_size=12)
    with pytest.raises(ValueError, match="vocabulary"):
        policies.tilt(policies.language_model(lm), critics.autoregressive(wide_lm))
    cut_lm, cut = models.cut_vocabulary(wide_lm, wide, lm.vocab_size)
    policy = policies.tilt(policies.language_model(lm), critics.autoregressive(cut_lm))
    params = {"policy": base, "critic": cut, "beta": jnp.asarray(1.0)}
    drawn = decoding.sample(policy, params, RNG, padded(PROMPTS), max_new_tokens=3, eos_ids=())
    logits = alone(wide_lm, wide, PROMPTS[0]).logits[-1, : lm.vocab_size]
    base_logits = alone(lm, base, PROMPTS[0]).logits[-1]
    expected = log_softmax(log_softmax(base_logits) + log_softmax(logits))
    np.testing.assert_allclose(drawn.log_prob[0, 0], expected[drawn.tokens[0, 0]], rtol=1e-4, atol=1e-4)


def test_genarm_A13_the_sequence_reward_excludes_the_prompt_and_includes_eos():
    lm, params = tiny_lm(4, dtype="float64")
    reward = rewards.log_likelihood(lm)
    prompt, response = [4, 5, 6], [7, 8, 0]
    for side in ("left", "right"):
        batch = padded([prompt + response, [*prompt, 0]], side=side)
        found = reward(params, batch.tokens, batch.mask, jnp.array([3, 3]), jnp.array([0, 1]))
        logits = log_softmax(alone(lm, params, prompt + response).logits, axis=-1)
        expected = sum(logits[2 + t, y] for t, y in enumerate(response))
        np.testing.assert_allclose(found[0], expected, rtol=1e-10)
        np.testing.assert_allclose(found[1], logits[2, 0], rtol=1e-10)  # a response of length 1


def test_genarm_A14_importance_weights_estimate_the_optimum():
    """Self-normalised weights Π Z_t over exact draws of the token rule reach E_{pi*}[r*]; without them the estimate is
    off. 20,000 draws; the bound is 5 standard errors of the weighted mean (error rate below 1e-6)."""
    base, reward = exact.tables(RAGGED, 1)
    alpha, beta_r, n = 1.0, 0.5, 20_000
    policy = policies.tilt(tree.policy(RAGGED), increment(RAGGED))
    params = {"policy": base, "critic": arm_of(RAGGED, reward, beta_r), "beta": 1 / alpha}
    prompts = exact.one_prompt(n)._replace(index=jnp.arange(n, dtype=jnp.int32))
    drawn = decoding.sample(policy, params, jax.random.key(3), prompts, max_new_tokens=4, eos_ids=(0,))
    r = np.asarray(reward)[np.asarray(tree.response_index(RAGGED, drawn.tokens, drawn.mask))]
    log_w = np.asarray(drawn.log_norm.sum(1))
    w = np.exp(log_w - log_w.max())
    w /= w.sum()
    target = exact.gibbs_law(tree.response_log_prob(RAGGED, base), reward, beta_r / alpha)
    truth = float(np.exp(target) @ np.asarray(reward))
    estimate = float(w @ r)
    error = float(np.sqrt((w**2 * (r - estimate) ** 2).sum()))
    ess = 1 / (w**2).sum()
    assert 0.02 < ess / n < 1
    assert abs(estimate - truth) < 5 * error + 1e-3
    assert abs(r.mean() - truth) > 5 * r.std() / np.sqrt(n)


def test_genarm_A13_padding_and_the_length_of_the_other_response_change_nothing_in_the_loss():
    """Pairs of unequal length, padded together, give the mean of the losses of each pair alone, unpadded."""
    lm, params = tiny_lm(4, dtype="float64", num_layers=1)
    text = [([4, 5, 6], [7, 8, 1, 2, 0], [9, 0]), ([1], [2, 0], [3, 9, 10, 8, 7, 0]), ([5, 2, 9, 9], [0], [4, 1, 0])]
    pairs = [preferences.PairTokens(*row, where="") for row in text]
    loss = jax.jit(objectives.autoregressive_reward(lm, beta_r=0.7))

    def padded_to(length):
        found = loss(params, preferences.pad_pairs(pairs, length=length), None)
        return float(found.loss), float(found.metrics["margin"])

    def reward(prompt, response):
        logits = log_softmax(alone(lm, params, prompt + response).logits, axis=-1)
        return float(sum(logits[len(prompt) - 1 + t, y] for t, y in enumerate(response)))

    margin = np.array([reward(x, chosen) - reward(x, rejected) for x, chosen, rejected in text])
    expected = np.mean(np.log1p(np.exp(-0.7 * margin))), margin.mean()
    np.testing.assert_allclose(padded_to(8), expected, rtol=1e-7)
    np.testing.assert_allclose(padded_to(13), expected, rtol=1e-7)


@needs_jit
def test_genarm_A11_weights_of_several_rewards_change_per_prompt_without_a_new_trace():
    """Each prompt's law is the one of its own weights, and only the first of several sets of weights is traced."""
    (lm, base), (arm_lm, arm) = tiny_lm(0, dtype="float64", num_layers=1), tiny_lm(4, dtype="float64", num_layers=1)
    other = jax.tree.map(lambda x: x * 0.8, arm)
    traces = 0
    tilted = policies.tilt(policies.language_model(lm), critics.weighted_sum([critics.autoregressive(arm_lm)] * 2))

    def init(*arguments):
        nonlocal traces
        traces += 1
        return tilted.init(*arguments)

    policy = tilted._replace(init=init)
    prompts = padded(PROMPTS)
    read = [jax.jit(lambda p, x, m=m: m.apply(p, x.tokens, mask=x.mask).logits[:, -1]) for m in (lm, arm_lm)]
    each = [jax.nn.log_softmax(read[i](p, prompts)) for i, p in ((0, base), (1, arm), (1, other))]
    for seed in range(3):
        weights = jax.random.normal(jax.random.key(seed), (len(PROMPTS), 2))
        params = {"policy": base, "critic": {"critics": (arm, other), "weights": weights}, "beta": jnp.asarray(1.0)}
        drawn = decoding.sample(policy, params, RNG, prompts, max_new_tokens=2, eos_ids=())
        expected = jax.nn.log_softmax(each[0] + weights[:, :1] * each[1] + weights[:, 1:] * each[2])
        first = jnp.take_along_axis(expected, drawn.tokens[:, :1], axis=1)[:, 0]
        np.testing.assert_allclose(drawn.log_prob[:, 0], first, rtol=1e-9, atol=1e-9)
    assert traces == 1


def test_genarm_weak_to_strong_a_small_reward_guides_a_larger_base():
    """Sizes, heads and layers differ, the vocabulary is one: at every token the sum of both models' log-probabilities,
    and the correction Σ log Z of the pair."""
    lm, base = tiny_lm(0, dtype="float64", hidden_size=32, num_heads=8, num_kv_heads=8, intermediate_size=40)
    arm_lm, arm = tiny_lm(4, dtype="float64", num_layers=1, hidden_size=8, num_heads=2, num_kv_heads=1)
    policy = policies.tilt(policies.language_model(lm), critics.autoregressive(arm_lm))
    params = {"policy": base, "critic": arm, "beta": jnp.asarray(0.5)}
    prompt = PROMPTS[0]
    drawn = decoding.sample(policy, params, RNG, padded([prompt]), max_new_tokens=3, eos_ids=())
    text = prompt + drawn.tokens[0].tolist()
    log_base, log_arm = (
        log_softmax(alone(m, p, text).logits[len(prompt) - 1 : -1], axis=-1) for m, p in ((lm, base), (arm_lm, arm))
    )
    logit = log_base + log_arm / 0.5
    norm = logsumexp(logit, axis=-1)
    rows = np.arange(3)
    np.testing.assert_allclose(drawn.log_prob[0], (logit - norm[:, None])[rows, drawn.tokens[0]], rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(drawn.log_prob_ref[0], log_base[rows, drawn.tokens[0]], rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(drawn.log_norm[0], norm, rtol=1e-9, atol=1e-9)


# Adapters of the base -------------------------------------------------------------------------------------------------

WEIGHTS = np.array([[0.6, 0.9], [0.0, 1.0], [2.0, -0.5], [0.1, 0.1], [1.0, 0.0]])
RESPONSES = jnp.array([[1, 2, 5], [3, 3, 9], [10, 4, 6], [2, 8, 1], [7, 1, 2]])
LENGTHS = jnp.arange(3) < jnp.array([3, 1, 2, 3, 3])[:, None]


@pytest.fixture(scope="module")
def separate():
    """(fused policy, its params, the tilt that it replaces, its params)."""
    with jax.enable_x64(True):
        lm, base = cases.tiny_lm(0, dtype="float64")
        fused = cases.stacked_adapters("float64")
        parts = [cases.adapter(lm, 1), cases.adapter(lm, 2, rank=1)]
        merge = jax.jit(models.lora.merge, static_argnums=2)
        merged = tuple(merge(base, part, spec) for spec, part in parts)
        tilt = policies.tilt(policies.language_model(lm), critics.weighted_sum([critics.autoregressive(lm)] * 2))
        params = {
            "policy": base,
            "critic": {"critics": merged, "weights": jnp.asarray(WEIGHTS)},
            "beta": jnp.asarray(1.0),
        }
        return fused.policy, fused.params | {"weights": jnp.asarray(WEIGHTS)}, tilt, params


def assert_same(left, right) -> None:
    for name in ("log_prob", "log_prob_ref", "log_norm", "kl"):
        np.testing.assert_allclose(getattr(left, name), getattr(right, name), rtol=1e-9, atol=1e-9, err_msg=name)


def test_genarm_A15_stacked_adapters_are_the_separate_models(separate):
    """Draws, log_prob, log_prob_ref, log_norm and KL, with weights per prompt; stepped and in parallel."""
    fused, params, tilt, tilt_params = separate
    prompts = padded(PROMPTS)
    drawn = [
        decoding.sample(policy, values, RNG, prompts, max_new_tokens=3, eos_ids=EOS)
        for policy, values in ((fused, params), (tilt, tilt_params))
    ]
    np.testing.assert_array_equal(drawn[0].tokens, drawn[1].tokens)
    assert_same(*drawn)
    expected = decoding.log_prob(tilt, tilt_params, RNG, prompts, RESPONSES, LENGTHS)
    for policy in (fused, fused._replace(log_prob=None)):
        assert_same(decoding.log_prob(policy, params, RNG, prompts, RESPONSES, LENGTHS), expected)
    assert float(jnp.abs(expected.log_prob - expected.log_prob_ref).max()) > 0.1


def test_genarm_A15_weights_are_one_set_for_all_or_one_for_each_prompt(separate):
    fused, params, _, _ = separate
    prompts = padded(PROMPTS)

    def scored(weights):
        values = params | {"weights": weights}
        return decoding.log_prob(fused, values, RNG, prompts, RESPONSES, LENGTHS).log_prob

    together = scored(WEIGHTS)
    for b in range(len(PROMPTS)):
        np.testing.assert_allclose(scored(WEIGHTS[b])[b], together[b], rtol=1e-9, atol=1e-9)


@needs_jit
def test_genarm_A15_weights_change_without_a_new_trace(separate):
    fused, params, _, _ = separate
    traces = 0

    def init(*arguments):
        nonlocal traces
        traces += 1
        return fused.init(*arguments)

    policy = fused._replace(init=init)
    drawn = [
        decoding.sample(policy, params | {"weights": w}, RNG, padded(PROMPTS), max_new_tokens=2, eos_ids=EOS)
        for w in (jnp.asarray(WEIGHTS), jnp.zeros((len(PROMPTS), 2)), -jnp.asarray(WEIGHTS))
    ]
    assert traces == 1
    np.testing.assert_allclose(drawn[1].log_prob, drawn[1].log_prob_ref, rtol=1e-12, atol=1e-12)  # no weight: the base
    np.testing.assert_allclose(drawn[1].kl, 0, atol=1e-12)
    assert float(drawn[2].kl.sum()) > 0.1


def test_genarm_A15_gradients_reach_weights_adapters_and_base(separate):
    """The stacked form has the gradient of the separate models in the weights, and one in every leaf."""
    fused, params, tilt, tilt_params = separate
    prompts = padded(PROMPTS)

    def total(policy, values):
        return decoding.log_prob(policy, values, RNG, prompts, RESPONSES, LENGTHS).log_prob.sum()

    found = jax.grad(lambda values: total(fused, values))(params)

    def by_weights(weights):
        return total(tilt, tilt_params | {"critic": tilt_params["critic"] | {"weights": weights}})

    np.testing.assert_allclose(
        found["weights"], jax.grad(by_weights)(tilt_params["critic"]["weights"]), rtol=1e-7, atol=1e-9
    )
    for leaf in jax.tree.leaves(found):
        assert bool(jnp.isfinite(leaf).all())
    assert all(float(jnp.abs(leaf).max()) > 0 for leaf in jax.tree.leaves(found["adapters"]))


def test_genarm_A15_each_adapter_reads_its_own_template(separate):
    fused, params, tilt, tilt_params = separate
    prompts = padded(PROMPTS)
    one, other = padded([[6, *row] for row in PROMPTS], side="right"), padded([[9, 9, *row, 2] for row in PROMPTS])
    scored = decoding.log_prob(fused, params, RNG, {"policy": prompts, "adapters": [one, other]}, RESPONSES, LENGTHS)
    mirrored = {"policy": prompts, "critic": {"critics": [one, other]}}
    assert_same(scored, decoding.log_prob(tilt, tilt_params, RNG, mirrored, RESPONSES, LENGTHS))


def test_genarm_A15_a_step_reads_each_weight_once(separate):
    """Products with a weight matrix in the step's program: one each where the separate models need three."""
    fused, params, tilt, tilt_params = separate
    kernels = {leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(params["policy"]) if leaf.ndim == 2}
    token = jnp.zeros(len(PROMPTS), jnp.int32)

    def products(policy, values) -> int:
        state, _ = jax.eval_shape(lambda v: policy.init(v, RNG, padded(PROMPTS), 3), values)
        program = jax.make_jaxpr(policy.step)(values, RNG, state, token)
        return count_products(program.jaxpr, kernels)

    assert products(fused, params) == 5  # qkv, out, gate_up, down of one layer, and lm_head
    assert products(tilt, tilt_params) == 15


def count_products(program, shapes) -> int:
    total = 0
    for equation in program.eqns:
        if equation.primitive.name == "dot_general":
            total += equation.invars[1].aval.shape in shapes
        for inner in (getattr(value, "jaxpr", value) for value in equation.params.values()):
            total += count_products(inner, shapes) if hasattr(inner, "eqns") else 0
    return total


def test_genarm_A15_what_does_not_fit_is_named(separate):
    fused, params, _, _ = separate
    lm = cases.tiny_lm(0, dtype="float64")[0]
    with pytest.raises(ValueError, match="m: expected at least 1 adapter, found 0"):
        policies.adapters(lm, 0)
    with pytest.raises(ValueError, match="expected a language model"):
        policies.adapters(tiny_lm(0, "reward")[0], 1)

    def run(changes, policy=fused, prompts=None):
        given = padded(PROMPTS) if prompts is None else prompts
        return decoding.sample(policy, params | changes, RNG, given, max_new_tokens=1, eos_ids=EOS)

    for changes, match in (
        ({"weights": jnp.ones(3)}, r"weights: expected shape \(2,\) or \(5, 2\), .* found \(3,\)"),
        ({"weights": jnp.array([1.0, jnp.nan])}, "weights: expected finite numbers"),
        (
            {"adapters": jax.tree.map(lambda x: x[:1], params["adapters"])},
            r"layer_0/attention/out/a: expected shape \(2, ",
        ),
    ):
        with pytest.raises(ValueError, match=match):
            run(changes)
    with pytest.raises(ValueError, match="'adapters'"):
        run({}, prompts={"policy": padded(PROMPTS)})
    with pytest.raises(ValueError, match=r"prompts\['adapters'\]\[1\]: expected token ids"):
        run({}, prompts={"policy": padded(PROMPTS), "adapters": [padded(PROMPTS), padded([[99]] * 5)]})
