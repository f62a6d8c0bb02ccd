"""GenARM, decoding part: its exact properties, on trees in float64."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign import critics, decoding, losses, policies, tree
from tests import exact

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
    policy = exact.tilt(RAGGED, increment(RAGGED))
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
    policy = exact.tilt(RAGGED, increment(RAGGED))
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
        losses.dpo(chosen, rejected, chosen_log_prob_ref=constant, rejected_log_prob_ref=constant, beta=0.3),
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


def test_genarm_A14_importance_weights_estimate_the_optimum():
    """Self-normalised weights Π Z_t over exact draws of the token rule reach E_{pi*}[r*]; without them the estimate is
    off. 20,000 draws; the bound is 5 standard errors of the weighted mean (error rate below 1e-6)."""
    base, reward = exact.tables(RAGGED, 1)
    alpha, beta_r, n = 1.0, 0.5, 20_000
    policy = exact.tilt(RAGGED, increment(RAGGED))
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
