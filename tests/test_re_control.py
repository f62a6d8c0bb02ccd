"""RE-Control: its exact properties, on trees with hidden states."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign import gibbs, losses, policies, tree
from jaxalign.rollout import exact_kl
from jaxalign.types import Policy
from tests import exact

TREE = tree.Tree(3, 4, eos_id=None)  # 40 prefixes
RAGGED = tree.Tree(3, 3, eos_id=0)
WIDTH = 8
RNG = jax.random.key(0)


@pytest.fixture
def float64():
    with jax.enable_x64(True):
        yield


def featured(t: tree.Tree) -> Policy:
    """pi(·|s) = softmax(W·h(s)); params {"hidden" [S,D], "W" [D,V]}."""
    below = tree.policy(t)

    def with_hidden(params, state, output):
        node = jnp.where(state.node < t.num_states, state.node, 0)
        return state, output._replace(hidden=params["hidden"][node])

    def init(params, rng, prompts, max_new_tokens):
        return with_hidden(params, *below.init(params["hidden"] @ params["W"], rng, prompts, max_new_tokens))

    def step(params, rng, state, token):
        return with_hidden(params, *below.step(params["hidden"] @ params["W"], rng, state, token))

    return Policy(init, step, None, None, t.vocab_size)


def unembed(params, hidden):
    return hidden @ params["W"]


def problem(t: tree.Tree, seed: int):
    """(params of the featured policy, log pi_ref [S,V], reward [M])."""
    keys = jax.random.split(jax.random.key(seed), 3)
    hidden = jax.random.normal(keys[0], (t.num_states, WIDTH))
    params = {"hidden": hidden, "W": jax.random.normal(keys[1], (WIDTH, t.vocab_size)) / WIDTH**0.5}
    return params, jax.nn.log_softmax(hidden @ params["W"]), jax.random.normal(keys[2], (t.num_responses,))


def relu_net(params, hidden):
    return jax.nn.relu(hidden @ params["in"] + params["bias"]) @ params["out"]


def relu_params(seed: int, width: int = 32):
    keys = jax.random.split(jax.random.key(seed), 3)
    return {
        "in": jax.random.normal(keys[0], (WIDTH, width)) / WIDTH**0.5,
        "bias": jax.random.normal(keys[1], (width,)),
        "out": jax.random.normal(keys[2], (width,)) / width**0.5,
    }


@functools.cache
def edited(t: tree.Tree, value, steps: int, max_norm: float | None = None):
    """edit(params, value params, step_size) -> (log pi' [S,V], KL to the base [S]), every state at once."""
    policy = policies.re_control(_states(t), unembed, value, num_steps=steps, max_norm=max_norm)

    @jax.jit
    def table(params, weights, step_size):
        given = {"policy": params, "value": weights, "step_size": step_size}
        output = policy.init(given, RNG, tree.prompts(t.num_states), 1)[1]
        return output.log_prob, exact_kl(output.log_prob, output.log_prob_ref), output.log_norm

    return table


def _states(t: tree.Tree) -> Policy:
    """`featured` with one row per state, row s in state s."""
    policy = featured(t)

    def init(params, rng, prompts, max_new_tokens):
        state, output = policy.init(params, rng, prompts, max_new_tokens)
        log_prob = jax.nn.log_softmax(params["hidden"] @ params["W"])
        return state, output._replace(log_prob=log_prob, log_prob_ref=log_prob, hidden=params["hidden"])

    return policy._replace(init=init)


@pytest.mark.parametrize("t", [TREE, RAGGED])
def test_re_control_R2_a_linear_value_is_one_constant_bias_of_the_logits(t, float64):
    """Static editing: pi_ref·exp(n·eta·(W a)_z)/Z in every state, with the log_norm of that tilt (law 5)."""
    params, log_ref, _ = problem(t, 0)
    direction = jax.random.normal(jax.random.key(9), (WIDTH,))
    policy = policies.re_control(featured(t), unembed, policies.linear_value, num_steps=7)
    found = exact.completions(t, policy, {"policy": params, "value": direction, "step_size": 0.11})
    bias = 0.77 * direction @ params["W"]
    tilted = exact.tilt(t, tree.critic(t, "increment"))
    table = jnp.broadcast_to(bias, log_ref.shape)
    expected = exact.completions(t, tilted, {"policy": log_ref, "critic": table, "beta": 1.0})
    for name in ("log_prob", "log_prob_ref", "log_norm", "kl"):
        np.testing.assert_allclose(getattr(found, name), getattr(expected, name), rtol=0, atol=1e-13, err_msg=name)
    law = jax.nn.log_softmax(log_ref + bias)[t.nodes, t.responses[0]]
    np.testing.assert_allclose(found.log_prob, np.where(t.responses[1], law, 0), rtol=0, atol=1e-13)


def test_re_control_R3_within_one_linear_region_only_the_product_of_steps_and_size_matters(float64):
    params, _, _ = problem(TREE, 1)
    weights = relu_params(1)
    total = 1e-3
    far = params["hidden"] + total * jax.vmap(jax.grad(lambda h: relu_net(weights, h[None])[0]))(params["hidden"])
    pattern = [(h @ weights["in"] + weights["bias"]) > 0 for h in (params["hidden"], far)]
    inside = np.asarray((pattern[0] == pattern[1]).all(axis=1))
    assert inside.sum() > 30
    one, many = (edited(TREE, relu_net, n)(params, weights, total / n)[0] for n in (1, 5))
    np.testing.assert_allclose(one[inside], many[inside], rtol=0, atol=1e-13)
    # Across regions the path matters.
    one, many = (edited(TREE, relu_net, n)(params, weights, 5.0 / n)[0] for n in (1, 5))
    assert float(jnp.abs(one - many).max()) > 1e-2


def test_re_control_R3_the_ascent_has_no_maximum_and_a_norm_cap_stops_it(float64):
    """The hacking curve: V goes on growing in proportion to the steps and the entropy collapses."""
    params, log_ref, _ = problem(TREE, 2)
    weights = relu_params(2)
    entropy = [float(-(np.exp(log_ref) * np.asarray(log_ref)).sum(1).mean())]
    for steps in (30, 300):
        log_prob = edited(TREE, relu_net, steps)(params, weights, 0.5)[0]
        entropy.append(float(-jnp.where(log_prob > -700, jnp.exp(log_prob) * log_prob, 0).sum(1).mean()))
    assert entropy[0] > entropy[1] > entropy[2]
    assert entropy[2] < 0.25 * entropy[0]
    gradient = jax.jit(jax.grad(lambda h: relu_net(weights, h).sum()))
    h, values = params["hidden"], []
    for j in range(300):
        h = h + 0.5 * gradient(h)
        if j in (99, 199, 299):
            values.append(float(relu_net(weights, h).mean()))
    np.testing.assert_allclose(values[2] - values[1], values[1] - values[0], rtol=0.05)
    assert values[0] > 10 * float(jnp.abs(relu_net(weights, params["hidden"])).mean())
    # A change d moves the logits by at most |W_z|·|d|: the KL is bounded whatever the steps.
    cap = 0.1
    kl = edited(TREE, relu_net, 300, cap)(params, weights, 0.5)[1]
    reach = cap * jnp.linalg.norm(params["hidden"], axis=1) * jnp.linalg.norm(params["W"], axis=0).max()
    assert bool((kl <= 2 * reach).all())
    assert float(kl.max()) < 0.2 < float(edited(TREE, relu_net, 300)(params, weights, 0.5)[1].max())
    # Under a linear value the capped edit is the cap's length along the direction.
    direction = jax.random.normal(jax.random.key(3), (WIDTH,))
    d = cap * jnp.linalg.norm(params["hidden"], axis=1, keepdims=True) * direction / jnp.linalg.norm(direction)
    capped = edited(TREE, policies.linear_value, 300, cap)(params, direction, 0.5)[0]
    np.testing.assert_allclose(capped, jax.nn.log_softmax(log_ref + d @ params["W"]), rtol=0, atol=1e-12)


def test_re_control_R4_small_steps_raise_the_value_and_the_kl_is_half_the_variance(float64):
    params, log_ref, _ = problem(TREE, 3)
    weights = relu_params(3)
    gradient = jax.grad(lambda h: relu_net(weights, h).sum())
    h, before = params["hidden"], relu_net(weights, params["hidden"])
    for _ in range(5):
        h = h + 1e-4 * gradient(h)
        after = relu_net(weights, h)
        assert bool((after >= before).all())
        before = after
    shift = (h - params["hidden"]) @ params["W"]
    log_prob, kl, _ = edited(TREE, relu_net, 5)(params, weights, 1e-4)
    np.testing.assert_allclose(log_prob, jax.nn.log_softmax(log_ref + shift), rtol=0, atol=1e-13)
    probability = jnp.exp(log_ref)
    variance = (probability * shift**2).sum(1) - (probability * shift).sum(1) ** 2
    np.testing.assert_allclose(kl, variance / 2, rtol=1e-3)
    assert float(kl.min()) > 0


def table_objective(t: tree.Tree, log_ref, reward, stop: bool, terminal: str):
    """E over y ~ pi_ref of the loss of a table of values [S] of the states that the tokens are drawn from."""
    nodes, mask = jnp.asarray(t.nodes), jnp.asarray(t.responses[1])
    weight = jnp.exp(tree.response_log_prob(t, log_ref))
    last = mask & ~jnp.pad(mask[:, 1:], ((0, 0), (0, 1)))

    def objective(table):
        v = table[nodes]
        if stop and terminal == "last":
            each = jax.vmap(lambda v, r, m: losses.td(v[None], reward=r[None], mask=m[None]))(v, reward, mask)
            return weight @ each
        following = jnp.pad(v[:, 1:], ((0, 0), (0, 1)))
        pairs = jnp.where(mask & ~last, v - (jax.lax.stop_gradient(following) if stop else following), 0)
        at = v[:, 0] if terminal == "first" else jnp.where(last, v, 0).sum(1)
        return 0.5 * weight @ ((pairs**2).sum(1) + (at - reward) ** 2)

    return objective


def fixed_point(t: tree.Tree, objective) -> np.ndarray:
    """Where the (semi-)gradient, which is affine in the table, is zero: values of the states that are reached."""
    gradient, alive = jax.grad(objective), t.alive
    zero = jnp.zeros(t.num_states)
    # A Jacobian would not see what is stopped.
    offset, moved = gradient(zero), jax.vmap(gradient)(jnp.eye(t.num_states))
    matrix = (moved - offset).T
    return np.linalg.solve(np.asarray(matrix)[alive][:, alive], -np.asarray(offset)[alive])


@pytest.mark.parametrize("t", [TREE, RAGGED])
def test_re_control_R6_the_fixed_point_of_td_is_the_value_of_the_base(t, float64):
    """On every response of the base, terminal target on the last state; in expectation the gradient is that of CD-Q's
    exact mean."""
    _, log_ref, reward = problem(t, 4)
    truth = np.asarray(tree.value(t, log_ref, reward))
    objective = table_objective(t, log_ref, reward, True, "last")
    np.testing.assert_allclose(fixed_point(t, objective), truth[t.alive], rtol=0, atol=1e-12)
    reach = jnp.exp(tree.state_log_prob(t, log_ref))

    def bellman(table):
        target = jax.lax.stop_gradient(gibbs.utility(log_ref, tree.q_values(t, table, reward=reward)))
        return 0.5 * jnp.where(jnp.asarray(t.alive), reach * (table - target) ** 2, 0).sum()

    table = jax.random.normal(jax.random.key(5), (t.num_states,))
    np.testing.assert_allclose(jax.grad(objective)(table), jax.grad(bellman)(table), rtol=0, atol=1e-12)


def test_re_control_R7_a_terminal_target_on_the_first_state_teaches_a_constant(float64):
    """The official code's index: V = E[r|x] in every state, no signal per token."""
    _, log_ref, reward = problem(RAGGED, 5)
    truth = np.asarray(tree.value(RAGGED, log_ref, reward))[RAGGED.alive]
    wrong = fixed_point(RAGGED, table_objective(RAGGED, log_ref, reward, False, "first"))
    np.testing.assert_allclose(wrong, truth[0], rtol=0, atol=1e-10)
    assert np.abs(wrong - truth).max() > 0.3


def test_re_control_R7_without_a_stopped_gradient_the_value_is_biased(float64):
    _, log_ref, reward = problem(RAGGED, 5)
    truth = np.asarray(tree.value(RAGGED, log_ref, reward))[RAGGED.alive]
    biased = fixed_point(RAGGED, table_objective(RAGGED, log_ref, reward, False, "last"))
    assert np.abs(biased - truth).max() > 0.1


def random_features(params, hidden):
    return jnp.tanh(hidden @ params["in"] + params["bias"]) @ params["out"]


def fitted(params, truth, seed: int):
    """V with 64 random features, equal to `truth` in all 40 states."""
    keys = jax.random.split(jax.random.key(seed + 100), 2)
    weights = {"in": jax.random.normal(keys[0], (WIDTH, 64)), "bias": jax.random.normal(keys[1], (64,))}
    features = jnp.tanh(params["hidden"] @ weights["in"] + weights["bias"])
    weights["out"] = jnp.linalg.lstsq(features, truth)[0]
    np.testing.assert_allclose(features @ weights["out"], truth, rtol=0, atol=1e-8)
    return weights


def expected_table(t: tree.Tree, steps: int):
    critic = tree.critic(t, "level")
    # Row s holds state s; the critic's node follows the policy's.
    rows = critic._replace(init=lambda p, r, b, n: critic.init(p, r, b, n)._replace(node=jnp.arange(t.num_states)))
    policy = policies.re_control_expected(_states(t), unembed, rows, num_steps=steps)

    @jax.jit
    def table(params, q, step_size):
        given = {"policy": params, "critic": q, "step_size": step_size}
        return policy.init(given, RNG, tree.prompts(t.num_states), 1)[1].log_prob

    return table


def test_re_control_R9_the_value_gradient_has_no_guarantee_and_the_expected_q_has(float64):
    """V fitted exactly in all states, small steps: the edit raises E_{pi'}[V_ref(sz)] in about half of 20·40 states
    (0.54 here), ascent on E_{pi_d}[Q] in all."""
    oracle = expected_table(TREE, 5)
    by_value, by_q = [], []
    for seed in range(20):
        params, log_ref, reward = problem(TREE, seed)
        truth = tree.value(TREE, log_ref, reward)
        q = tree.q_values(TREE, truth, reward=reward)
        gain = lambda log_prob, q=q, truth=truth: np.asarray(gibbs.utility(log_prob, q) - truth)  # noqa: E731
        by_value.append(gain(edited(TREE, random_features, 5)(params, fitted(params, truth, seed), 1e-3)[0]))
        by_q.append(gain(oracle(params, q, 1e-2)))
    share = [float((np.stack(x) > 0).mean()) for x in (by_value, by_q)]
    print(f"states with a raised value: by grad V {share[0]:.3f}, by grad E[Q] {share[1]:.3f}")
    assert 0.4 < share[0] < 0.75
    assert share[1] == 1


def test_re_control_R10_a_tilt_always_gains_and_an_edit_need_not(float64):
    params, log_ref, reward = problem(TREE, 6)
    truth = tree.value(TREE, log_ref, reward)
    q = tree.q_values(TREE, truth, reward=reward)
    for lam in (0.1, 1.0, 10.0):
        assert bool((gibbs.utility(tree.tilted_policy(log_ref, q, beta=1 / lam), q) >= truth - 1e-12).all())
    log_prob = edited(TREE, random_features, 5)(params, fitted(params, truth, 6), 1e-3)[0]
    assert bool((gibbs.utility(log_prob, q) < truth - 1e-6).any())


def test_re_control_expected_q_follows_the_tree_and_its_law_is_better(float64):
    """Through decoding on the whole tree: the critic moves with the text, and the reward of the law rises."""
    params, log_ref, reward = problem(RAGGED, 7)
    q = tree.q_values(RAGGED, tree.value(RAGGED, log_ref, reward), reward=reward)
    policy = policies.re_control_expected(featured(RAGGED), unembed, tree.critic(RAGGED, "level"), num_steps=3)
    law = exact.log_law(RAGGED, policy, {"policy": params, "critic": q, "step_size": 0.3})
    np.testing.assert_allclose(np.exp(law).sum(), 1, rtol=1e-12)
    # By hand: ∇g = W^T (pi ⊙ (Q − g)).
    d = jnp.zeros((RAGGED.num_states, WIDTH))
    for _ in range(3):
        p = jax.nn.softmax((params["hidden"] + d) @ params["W"])
        d = d + 0.3 * (p * (q - (p * q).sum(1, keepdims=True))) @ params["W"].T
    table = jax.nn.log_softmax((params["hidden"] + d) @ params["W"])
    np.testing.assert_allclose(law, tree.response_log_prob(RAGGED, table), rtol=0, atol=1e-12)
    assert float(np.exp(law) @ np.asarray(reward)) > float(tree.value(RAGGED, log_ref, reward)[0]) + 0.05
