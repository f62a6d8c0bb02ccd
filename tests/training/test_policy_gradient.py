"""Policy gradients on trees, where every response can be listed: the mean of what a method estimates is the gradient of
E[r] − beta·KL, or, where it is not, the one that its docstring says."""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxalign import advantages, decoding, gibbs, infalign, losses, training, tree
from jaxalign.training import policy_gradient
from jaxalign.types import Completions, TokenBatch
from tests import exact

BETA = 0.5
TREE = tree.Tree(3, 3, eos_id=0)
M = TREE.num_responses


@pytest.fixture(autouse=True)
def _x64():
    with jax.enable_x64(True):
        yield


def problem(t: tree.Tree = TREE) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(reference [S,V], reward [M], another policy's logits [S,V])."""
    reference, reward = exact.tables(t, 0)
    return reference, reward, exact.tables(t, 1)[0]


@functools.partial(jax.jit, static_argnums=1)
def log_probs(params: jax.Array, t: tree.Tree = TREE) -> jax.Array:
    """log pi(y_t) [M,T] of all responses."""
    nodes, (tokens, mask) = t.nodes, t.responses
    return jnp.where(mask, jax.nn.log_softmax(params)[nodes, tokens], 0)


def objective(params: jax.Array, reference: jax.Array, reward: jax.Array, t: tree.Tree = TREE) -> jax.Array:
    log_p, log_q = log_probs(params, t).sum(axis=1), log_probs(reference, t).sum(axis=1)
    return gibbs.utility(log_p, reward) - BETA * gibbs.kl(log_p, log_q)


def rloo_weights(log_p: jax.Array, total: jax.Array) -> jax.Array:
    """The mean advantage [M] of each response over the second of two samples."""
    pairs = jnp.stack(jnp.broadcast_arrays(total[:, None], total[None, :]), axis=-1)
    return (advantages.leave_one_out(pairs)[..., 0] * jnp.exp(log_p)).sum(axis=1)


def weighted(log_p: jax.Array, advantage: jax.Array) -> jax.Array:
    """Advantages under which the mean over all M rows is the mean over y ~ pi."""
    weight = len(log_p) * jnp.exp(log_p)
    return advantage * (weight if advantage.ndim == 1 else weight[:, None])


def rloo_gradient(params: jax.Array, reference: jax.Array, reward: jax.Array, t: tree.Tree = TREE) -> jax.Array:
    """The exact mean gradient of RLOO with two samples and the KL in the reward."""
    mask = jnp.asarray(t.responses[1])
    old, ref = log_probs(params, t), log_probs(reference, t)
    log_p = old.sum(axis=1)
    advantage = weighted(log_p, rloo_weights(log_p, reward - BETA * (old - ref).sum(axis=1)))

    def loss(p: jax.Array) -> jax.Array:
        return losses.policy_gradient(
            log_probs(p, t), old_log_prob=old, advantage=advantage, mask=mask, clip=0.2, whole=True
        )

    return -jax.grad(loss)(params)


def test_the_mean_gradient_of_rloo_is_that_of_the_regularised_reward():
    reference, reward, params = problem()
    np.testing.assert_allclose(
        rloo_gradient(params, reference, reward), jax.grad(objective)(params, reference, reward), atol=1e-12
    )


@pytest.mark.parametrize(("decay", "exact_value"), [(1.0, False), (0.3, True)])
def test_the_mean_gradient_of_ppo_is_that_of_the_regularised_reward(decay, exact_value):
    """With decay 1 for any value; with any decay for the exact one."""
    reference, reward, params = problem()
    mask = jnp.asarray(TREE.responses[1])
    old, ref = log_probs(params), log_probs(reference)
    log_p = old.sum(axis=1)
    if exact_value:
        paid = advantages.token_rewards(reward, log_ratio=old - ref, mask=mask, beta=BETA)
        # The value of a state: the mean of what is still to come over the responses through it.
        to_come = jnp.cumsum(paid[:, ::-1], axis=1)[:, ::-1]
        mass = jnp.where(mask, jnp.exp(log_p)[:, None], 0)
        nodes = jnp.asarray(TREE.nodes).reshape(-1)
        total = jnp.zeros(TREE.num_states).at[nodes].add((mass * to_come).reshape(-1))
        table = total / jnp.maximum(jnp.zeros(TREE.num_states).at[nodes].add(mass.reshape(-1)), 1e-30)
    else:
        table = jax.random.normal(jax.random.key(5), (TREE.num_states,))
    value = table[jnp.asarray(TREE.nodes)]
    paid = advantages.token_rewards(reward, log_ratio=old - ref, mask=mask, beta=BETA)
    advantage = weighted(log_p, advantages.gae(paid, value=value, mask=mask, decay=decay)[0])
    loss = lambda p: losses.policy_gradient(log_probs(p), old_log_prob=old, advantage=advantage, mask=mask, clip=0.2)  # noqa: E731
    np.testing.assert_allclose(-jax.grad(loss)(params), jax.grad(objective)(params, reference, reward), atol=1e-12)


def penalty_gradient(params: jax.Array, reference: jax.Array, estimator: str, t: tree.Tree = TREE) -> Any:
    """(value, gradient) of the penalty's mean over y ~ pi, the draws held fixed."""
    mask, ref = jnp.asarray(t.responses[1]), log_probs(reference, t)
    weight = jnp.exp(log_probs(params, t).sum(axis=1))

    def mean(p: jax.Array) -> jax.Array:
        each = jax.vmap(
            lambda a, b, m: losses.kl_penalty(a[None], log_prob_ref=b[None], mask=m[None], estimator=estimator)
        )
        return (weight * each(log_probs(p, t), ref, mask)).sum()

    return jax.value_and_grad(mean)(params)


def test_the_gradient_of_k2_is_that_of_the_kl():
    reference, _, params = problem()
    kl = lambda p: gibbs.kl(log_probs(p).sum(axis=1), log_probs(reference).sum(axis=1))  # noqa: E731
    np.testing.assert_allclose(penalty_gradient(params, reference, "k2")[1], jax.grad(kl)(params), atol=1e-12)


def test_k3_has_the_value_of_the_kl_and_the_gradient_of_the_other_one():
    """On one token its optimum beside E[r] is pi_j = beta·ref_j/(m − r_j), and not Gibbs'."""
    reference, reward, params = problem()
    kl = gibbs.kl(log_probs(params).sum(axis=1), log_probs(reference).sum(axis=1))
    np.testing.assert_allclose(penalty_gradient(params, reference, "k3")[0], kl, rtol=1e-12)
    flat = tree.Tree(4, 1, eos_id=None)
    reference, reward, _ = problem(flat)
    base = jnp.exp(reference[0])
    low, high = reward.max() + 1e-9, reward.max() + BETA
    for _ in range(200):
        mid = (low + high) / 2
        low, high = (mid, high) if (BETA * base / (mid - reward)).sum() > 1 else (low, mid)
    forward = jnp.log(BETA * base / (low - reward))[None]

    def gradient(params: jax.Array) -> jax.Array:
        paid = jax.grad(lambda p: gibbs.utility(log_probs(p, flat).sum(axis=1), reward))(params)
        return paid - BETA * penalty_gradient(params, reference, "k3", flat)[1]

    np.testing.assert_allclose(gradient(forward), 0, atol=1e-10)
    assert np.abs(gradient(gibbs.log_policy(reference, reward, beta=BETA))).max() > 0.01


def calibrated_problem() -> tuple[jax.Array, jax.Array, jax.Array]:
    """(reference [S,V], Phi(C) [M], the optimum's objective beta·log Z)."""
    reference, reward, _ = problem()
    mass = np.exp(np.asarray(log_probs(reference).sum(axis=1)))
    r = np.asarray(reward)
    c = (mass * ((r[:, None] > r) + 0.5 * (r[:, None] == r))).sum(axis=1)
    paid = infalign.parse_transform("exp:5")(jnp.asarray(c))
    return reference, paid, BETA * gibbs.log_partition(log_probs(reference).sum(axis=1), paid, beta=BETA)


def test_infalign_T13_the_exact_gradient_reaches_the_oracles_objective():
    reference, paid, best = calibrated_problem()
    optimizer = optax.adam(optax.cosine_decay_schedule(0.1, 400))

    @jax.jit
    def ascend(params: jax.Array) -> jax.Array:
        def step(carry: Any, _: None) -> Any:
            params, state = carry
            updates, state = optimizer.update(-rloo_gradient(params, reference, paid), state)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, optimizer.init(params)), None, length=400)[0][0]

    found = ascend(reference)
    assert 0 <= best - objective(found, reference, paid) < 1e-6
    law = log_probs(found).sum(axis=1)
    gap = gibbs.kl(law, gibbs.log_policy(log_probs(reference).sum(axis=1), paid, beta=BETA))
    # The gap identity: beta·KL(pi‖pi*) = J* − J.
    np.testing.assert_allclose(BETA * gap, best - objective(found, reference, paid), atol=1e-12)


def read_table(params: Any, rows: Any) -> Any:
    """Log-probabilities and values of tables {"policy" [S,V], "value" [S]}."""
    log_prob, value, _, _ = read_tables(params, params["policy"], rows)
    return log_prob, value


def read_tables(params: Any, reference: Any, rows: Any) -> Any:
    """As above, and of the reference's table [S,V] with the KL of each state."""
    tokens, mask = rows["tokens"], rows["mask"]

    def walk(node: jax.Array, token: jax.Array) -> Any:
        return node * TREE.vocab_size + 1 + token, node

    _, nodes = jax.lax.scan(walk, jnp.zeros(len(tokens), jnp.int32), tokens.T)
    nodes = jnp.where(mask, nodes.T, 0)
    both = (jax.nn.log_softmax(params["policy"])[nodes], jax.nn.log_softmax(reference)[nodes])
    own, ref = (jnp.take_along_axis(x, tokens[..., None], axis=-1)[..., 0] for x in both)
    return own, params["value"][nodes], ref, gibbs.kl(*both)


@pytest.mark.parametrize("algorithm", ["rloo", "ppo"])
def test_the_mean_gradient_of_the_exact_kl_is_that_of_the_regularised_reward_with_less_noise(algorithm):
    """`prepare` and `loss` on all pairs of responses, weighted by the policy's law: of the exact KL and of the one that
    is taken off the reward. PPO's value is arbitrary, at decay 1."""
    reference, reward, policy = problem()
    params = {"policy": policy, "value": jax.random.normal(jax.random.key(5), (TREE.num_states,))}
    tokens, mask = (jnp.asarray(x) for x in TREE.responses)
    log_p = log_probs(policy)
    law = jnp.exp(log_p.sum(axis=1))
    i, j = (x.reshape(-1) for x in jnp.meshgrid(jnp.arange(M), jnp.arange(M), indexing="ij"))
    pair = jnp.stack([i, j], axis=1)
    zero = jnp.zeros_like(log_p)
    drawn = Completions(tokens, mask, log_p, zero, zero, zero, mask[:, 0], mask[:, 0])
    samples = jax.tree.map(lambda x: x[pair], drawn)
    asked = TokenBatch(jnp.zeros((M * M, 1), jnp.int32), jnp.ones((M * M, 1), bool))
    chosen = decoding.BestOfNInfo(samples, reward[pair])

    def moments(kl: str) -> tuple[jax.Array, jax.Array]:
        """(mean, variance of a group summed over its entries) of the gradient."""
        method = policy_gradient.Method(algorithm, kl, decay=1.0, value_weight=0.0)
        both = read_tables if kl == "exact" else None
        look_up = lambda frozen, rows: read_tables(params, frozen, rows)[2]  # noqa: E731
        rows, _ = policy_gradient.prepare(
            method, read_table, look_up, params, reference, asked, chosen, jnp.asarray(BETA), both=both
        )
        groups = jax.tree.map(lambda x: x.reshape(M * M, 2, *x.shape[1:]), rows)
        loss = policy_gradient.loss(method, read_table, both)
        each = jax.vmap(jax.grad(lambda p, r: loss(p, r, reference)[0]), in_axes=(None, 0))(params, groups)["policy"]
        weight = (law[i] * law[j])[:, None, None]
        mean = (weight * each).sum(axis=0)
        return -mean, (weight * (each - mean) ** 2).sum()

    expected = jax.grad(objective)(policy, reference, reward)
    found = {kl: jax.jit(moments, static_argnums=0)(kl) for kl in ("exact", "reward")}
    for mean, _ in found.values():
        np.testing.assert_allclose(mean, expected, atol=1e-12)
    assert found["exact"][1] < found["reward"][1]


@pytest.mark.parametrize("once", [True, False])
def test_weights_of_a_tempered_sampler_give_the_policys_own_gradient(once):
    """Of texts of one token, listed with the sampler's law; a cut at C takes the rest of a weight away."""
    flat = tree.Tree(4, 1, eos_id=None)
    _, reward, policy = problem(flat)
    own = log_probs(policy, flat)
    drawn = jax.nn.log_softmax(own[:, 0] / 1.1)[:, None]
    mask = jnp.ones_like(own, bool)
    rows = {"mask": mask, "drawn": drawn, "old": drawn if once else own, "advantage": reward[:, None]}
    read = lambda params, rows: (log_probs(params, flat), None)  # noqa: E731

    def gradient(cap: float) -> jax.Array:
        loss = policy_gradient.loss(policy_gradient.Method("grpo"), read, once=once, sampler_clip=cap)
        weighted_rows = rows | {"advantage": rows["advantage"] * len(own) * jnp.exp(drawn)}
        return -jax.grad(lambda p: loss(p, weighted_rows, None)[0])(policy)

    expected = jax.grad(lambda p: gibbs.utility(log_probs(p, flat).sum(axis=1), reward))(policy)
    np.testing.assert_allclose(gradient(math.inf), expected, atol=1e-12)
    assert np.abs(gradient(0.0) - expected).max() > 1e-3
    assert np.abs(gradient(1.0) - expected).max() > 1e-3


@pytest.mark.parametrize("algorithm", ["rloo", "grpo"])
def test_weights_of_whole_responses_are_right_for_the_states_too(algorithm):
    """Of all responses of a tree, drawn at temperature 1.1: the weights of tokens leave the sampler's states."""
    _, reward, policy = problem()
    own, mask = log_probs(policy), jnp.asarray(TREE.responses[1])
    drawn = log_probs(policy / 1.1)
    law = M * jnp.exp(drawn.sum(axis=1))
    advantage = reward * law if algorithm == "rloo" else (reward * law)[:, None] * jnp.ones_like(own)
    rows = {"mask": mask, "drawn": drawn, "old": own, "advantage": advantage}
    read = lambda params, rows: (log_probs(params), None)  # noqa: E731

    def gradient(cap: float, kind: str) -> jax.Array:
        method = policy_gradient.Method(algorithm)
        loss = policy_gradient.loss(method, read, sampler_clip=cap, sampler_weights=kind)
        (_, aux), found = jax.value_and_grad(loss, has_aux=True)(policy, rows, None)
        assert float(aux.metrics["sampler_clipped"]) == (0 if cap == math.inf else pytest.approx(0.5, abs=0.5))
        return -found

    expected = jax.grad(lambda p: gibbs.utility(log_probs(p).sum(axis=1), reward))(policy)
    np.testing.assert_allclose(gradient(math.inf, "response"), expected, atol=1e-12)
    assert np.abs(gradient(1.0, "response") - expected).max() > 1e-3
    if algorithm == "grpo":
        assert np.abs(gradient(math.inf, "token") - expected).max() > 1e-3


def test_sampler_weights_of_tokens_are_refused_with_ratios_of_responses():
    with pytest.raises(ValueError, match="sampler_weights: expected 'token' or 'response', found 'text'"):
        policy_gradient.loss(policy_gradient.Method("grpo"), read_table, sampler_clip=2.0, sampler_weights="text")
    with pytest.raises(ValueError, match="sampler_clip: expected ratios of tokens"):
        policy_gradient.loss(policy_gradient.Method("rloo"), read_table, sampler_clip=2.0)
    with pytest.raises(ValueError, match="sampler_clip: expected a value >= 0, found -1"):
        policy_gradient.loss(policy_gradient.Method("grpo"), read_table, sampler_clip=-1.0)


def test_the_exact_kl_and_its_reader_come_together():
    with pytest.raises(ValueError, match="both: expected for the exact KL"):
        policy_gradient.loss(policy_gradient.Method("rloo", "exact"), read_table)
    with pytest.raises(ValueError, match="both: expected for the exact KL"):
        policy_gradient.loss(policy_gradient.Method("rloo", "k2"), read_table, read_tables)


@pytest.mark.parametrize("algorithm", ["rloo", "ppo"])
def test_infalign_T13_sampled_training_comes_within_the_stated_error(algorithm):
    """200 iterations of 16 prompts x 8 samples, two passes each: J − J_ref within 5 % of J* − J_ref. The optimum's
    advantage is 0.2; the noise of a last step is a fiftieth of it."""
    with jax.enable_x64(False):
        reference, paid, best = (jnp.asarray(x, jnp.float32) for x in jax.device_get(_with_x64(calibrated_problem)))
        policy, method = tree.policy(TREE), policy_gradient.Method(algorithm, value_weight=1.0)
        optimizer = optax.adam(optax.cosine_decay_schedule(0.03, 400))
        # A copy: the step gives its state away.
        params = {"policy": jnp.array(reference), "value": jnp.zeros(TREE.num_states)}
        state = training.create(params, optimizer)
        update = training.train_step(policy_gradient.loss(method, read_table), optimizer)
        look_up = lambda frozen, rows: read_table({"policy": frozen, "value": jnp.zeros(TREE.num_states)}, rows)[0]  # noqa: E731
        prepare = jax.jit(functools.partial(policy_gradient.prepare, method, read_table, look_up))
        asked = TokenBatch(jnp.zeros((16, 1), jnp.int32), jnp.ones((16, 1), bool), jnp.arange(16, dtype=jnp.int32))
        reward = tree.reward(TREE)
        table = jnp.asarray(paid)
        for i in range(200):
            rng = jax.random.fold_in(jax.random.key(0), i)
            both = {"policy": state.params["policy"], "reward": table}
            drawn = policy_gradient.collect(
                policy, reward, both, rng, asked, samples=8, max_new_tokens=TREE.horizon, eos_ids=(0,)
            )
            rows, metrics = prepare(state.params, reference, asked, drawn, jnp.asarray(BETA))
            for _ in range(2):
                state, _ = update(state, jax.tree.map(lambda x: x[None], rows), None)
        start, end = (float(objective(p, reference, table)) for p in (reference, state.params["policy"]))
    assert float(best) - end < 0.05 * (float(best) - start)
    assert float(metrics["kl"]) > 0


def _with_x64(f: Any) -> Any:
    with jax.enable_x64(True):
        return f()


def test_minibatches_are_a_partition_of_the_rows():
    rows = {"mask": jnp.ones((12, 2), bool), "tokens": jnp.arange(24).reshape(12, 2)}
    parts = policy_gradient.split(rows, jax.random.key(0), minibatches=3, accumulate=2)
    assert [part["tokens"].shape for part in parts] == [(2, 2, 2)] * 3
    seen = np.concatenate([np.asarray(part["tokens"]).reshape(-1, 2) for part in parts])
    np.testing.assert_array_equal(np.sort(seen[:, 0]), np.arange(0, 24, 2))
    with pytest.raises(ValueError, match="minibatches: expected"):
        policy_gradient.split(rows, jax.random.key(0), minibatches=5, accumulate=1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"algorithm": "reinforce"}, "algorithm: expected one of"),
        ({"kl": "k1"}, "kl: expected one of"),
        ({"clip": 0.0}, "clip: expected a value > 0"),
        ({"decay": 1.5}, "decay: expected"),
        ({"value_weight": -1.0}, "value_weight: expected"),
        ({"advantage": "best@4"}, "advantage: expected mean, or max@K"),
        ({"advantage": "max@0"}, "advantage: expected mean, or max@K"),
        ({"advantage": "max@4", "algorithm": "grpo"}, "advantage: expected max@4 with rloo, found grpo"),
    ],
)
def test_methods_refuse_what_they_do_not_know(change, message):
    with pytest.raises(ValueError, match=message):
        policy_gradient.Method(**change)
