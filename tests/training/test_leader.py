"""The leader trained through the follower's closed form: its gradient, what it reaches, token level beside response."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxalign import critics, decoding, losses, models, policies, shaping, training, tree
from jaxalign.data import encoded
from jaxalign.training import objectives, shaping_data
from tests import exact
from tests.conftest import padded, tiny_lm


def leader(bound: float = 3.0, **sizes):
    lm, params = tiny_lm(2, "reward", **sizes)
    return models.with_head(lm, models.Head("reward", bound=bound)), params


def samples(prompts: int, n: int, vocab: int = 11, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    tokens = rng.integers(1, vocab, (prompts, n, 7)).astype(np.int32)
    mask = np.arange(7) < rng.integers(3, 8, (prompts, n))[..., None]
    return {"tokens": tokens, "mask": mask, "utility": rng.normal(size=(prompts, n)).astype(np.float32)}


def test_the_gradient_of_a_million_parameters_equals_central_differences():
    """In five random directions, relative 1e-3, in float64."""
    with jax.enable_x64(True):
        config = models.Config(
            vocab_size=512,
            hidden_size=160,
            num_layers=4,
            num_heads=4,
            num_kv_heads=4,
            head_dim=40,
            intermediate_size=400,
            max_length=16,
            eos_ids=(0,),
            head=models.Head("reward", bound=3.0),
        )
        lm = models.LanguageModel(config, "float64")
        params = jax.tree.map(lambda x: x * (4 if x.ndim > 1 else 1), lm.init(jax.random.key(0)))
        assert sum(leaf.size for leaf in jax.tree.leaves(params)) > 1_000_000
        batch = samples(2, 6, vocab=512)
        loss = jax.jit(lambda p: objectives.stackelberg(lm, beta=0.7)(p, batch, None)[0])
        gradient = jax.jit(jax.grad(loss))(params)
        h = 1e-6
        for seed in range(5):
            keys = jax.random.split(jax.random.key(seed), len(jax.tree.leaves(params)))
            key_tree = jax.tree.unflatten(jax.tree.structure(params), list(keys))
            direction = jax.tree.map(lambda k, x: jax.random.normal(k, x.shape, x.dtype), key_tree, params)
            up, down = (loss(jax.tree.map(lambda x, d, s=s: x + s * h * d, params, direction)) for s in (1, -1))
            numeric = (up - down) / (2 * h)
            exact_slope = sum(jnp.vdot(g, d) for g, d in zip(*map(jax.tree.leaves, (gradient, direction)), strict=True))
            np.testing.assert_allclose(exact_slope, numeric, rtol=1e-3)


def tree_batch(t: tree.Tree, log_base, utility) -> dict:
    """All responses of a tree as the samples of one prompt (token ids moved up by one: 0 ends a response)."""
    tokens, mask = exact.responses(t)
    prompt = jnp.full((len(tokens), 1), 5, jnp.int32)
    return {
        "tokens": jnp.concatenate([prompt, tokens + 1], axis=1)[None],
        "mask": jnp.concatenate([jnp.ones_like(prompt, bool), mask], axis=1)[None],
        "utility": utility[None],
        "log_base": log_base[None],
    }


def test_with_all_responses_of_a_tree_the_gradient_is_the_exact_one():
    t = tree.Tree(3, 3)
    base, utility = exact.tables(t, 2)
    lm, params = leader()
    batch = tree_batch(t, tree.response_log_prob(t, base), utility)

    def through_the_tree(p):
        """E[u] under the token-level factors of the optimum, by backward induction of the soft value."""
        reward = objectives.group_rewards(lm, p, batch)[0]
        law = tree.response_log_prob(t, tree.optimal_policy(t, base, reward, beta=0.6))
        return tree.expected(law, values=utility)

    found = jax.jit(jax.grad(lambda p: -objectives.stackelberg(lm, beta=0.6)(p, batch, None)[0]))(params)
    expected = jax.jit(jax.grad(through_the_tree))(params)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-6)


def test_training_reaches_95_percent_of_the_optimum_where_the_reward_is_free():
    t = tree.Tree(3, 3)
    base, utility = exact.tables(t, 2)
    log_base = tree.response_log_prob(t, base)
    lm, params = leader()
    batch = jax.tree.map(lambda x: x[None], tree_batch(t, log_base, utility))
    optimizer = optax.adam(3e-3)
    step = training.train_step(objectives.stackelberg(lm, beta=1.0), optimizer)
    state = training.create(jax.tree.map(jnp.array, params), optimizer)
    for _ in range(300):
        state, metrics = step(state, batch, None)
    mean = tree.expected(log_base, values=utility)
    best = shaping.optimal_threshold(utility, log_base=log_base, gain=3.0)
    assert (metrics["utility"] - mean) / (best - mean) > 0.95
    assert metrics["utility"] <= best + 1e-5


def test_a_head_without_a_bound_is_no_leader():
    lm, _ = tiny_lm(2, "reward")
    with pytest.raises(ValueError, match="reward head with a bound"):
        objectives.stackelberg(lm, beta=1.0)


def test_score_function_and_soft_value_give_one_gradient_on_a_tree():
    """E over all responses of u·grad log pi, log pi by `decoding.log_prob` of the tilt, against the recursion."""
    t = tree.Tree(3, 3, eos_id=0)
    base, utility = exact.tables(t, 5)
    reward = jax.random.normal(jax.random.key(9), utility.shape)
    policy = exact.tilt(t, tree.critic(t, "level"))
    law = jnp.exp(tree.optimal_log_prob(t, base, reward, beta=0.8))

    def critic_table(r):
        return tree.q_values(t, tree.soft_value(t, base, r, beta=0.8), reward=r)

    def surrogate(r):
        params = {"policy": base, "critic": critic_table(r), "beta": jnp.asarray(0.8)}
        return (law * utility * exact.completions(t, policy, params).log_prob.sum(axis=1)).sum()

    def recursion(r):
        return tree.expected(tree.response_log_prob(t, tree.optimal_policy(t, base, r, beta=0.8)), values=utility)

    closed = law * (utility - (law * utility).sum()) / 0.8
    np.testing.assert_allclose(jax.grad(recursion)(reward), closed, atol=1e-5)
    np.testing.assert_allclose(jax.grad(surrogate)(reward), closed, atol=1e-5)


def test_the_score_function_moves_a_language_models_critic_towards_utility():
    """One ascent step along the estimate, from 4,096 draws, raises E[u] of a one-token process, exactly computed."""
    lm, params = tiny_lm(0)
    q_lm, q_params = tiny_lm(3, "q")
    policy = policies.tilt(policies.language_model(lm), critics.value(q_lm))
    utility = jnp.linspace(-1, 1, 11)
    prompts = padded([[4, 5, 6]] * 4096)
    arguments = {"policy": params, "critic": q_params, "beta": jnp.asarray(1.0)}
    drawn = decoding.sample(policy, arguments, jax.random.key(1), prompts, max_new_tokens=1, eos_ids=())
    one = padded([[4, 5, 6]])

    def exact_utility(critic_params):
        output = policy.init(arguments | {"critic": critic_params}, jax.random.key(0), one, 1)[1]
        return (jnp.exp(output.log_prob[0]) * utility).sum()

    def estimate(critic_params):
        scored = decoding.log_prob(
            policy, arguments | {"critic": critic_params}, jax.random.key(0), prompts, drawn.tokens, drawn.mask
        )
        return shaping.score_function(scored.log_prob.sum(axis=1), utility=utility[drawn.tokens[:, 0]])

    right, found = (jax.jit(jax.grad(f))(q_params) for f in (exact_utility, estimate))
    a, b = (jnp.concatenate([leaf.ravel() for leaf in jax.tree.leaves(g)]) for g in (right, found))
    # 4,096 draws leave a relative error of a few percent in each of ten logits' gradients.
    assert jnp.vdot(a, b) / (jnp.linalg.norm(a) * jnp.linalg.norm(b)) > 0.98
    np.testing.assert_allclose(jnp.linalg.norm(b), jnp.linalg.norm(a), rtol=0.15)


def test_stackelberg_T11_the_pair_term_is_zero_iff_the_value_is_constant():
    reward, mask = jnp.array([2.0, -1.0]), jnp.array([[True] * 4, [True, True, False, False]])
    constant = jnp.array([[2.0] * 4, [-1.0, -1.0, np.nan, 7.0]])
    assert losses.last_and_pairs(constant, reward=reward, mask=mask) == 0
    moved = constant.at[1, 0].set(1.0)
    np.testing.assert_allclose(losses.last_and_pairs(moved, reward=reward, mask=mask, pair_weight=0.5), 0.5 * 4 / 1 / 2)
    assert losses.last_and_pairs(moved, reward=reward, mask=mask, pair_weight=0.0) == 0
    gradient = jax.grad(lambda v: losses.last_and_pairs(v, reward=reward, mask=mask))(moved)
    assert np.isfinite(gradient).all()
    np.testing.assert_array_equal(gradient[1, 2:], 0)
    # No stopped gradient: both neighbours are drawn together.
    np.testing.assert_allclose(gradient[1, 0], -(gradient[1, 1]))


@pytest.mark.parametrize(
    ("count", "share", "told"),
    [
        (5, 0.0, "expected at least 2 held-out prompts, found 0 of 5"),
        (5, 0.01, "expected a validation part with rows, found none of 5 at 0.01"),
        (40, 0.03, "expected at least 2 held-out prompts, found 1 of 40"),
        (40, 0.5, None),
    ],
)
def test_too_few_prompts_to_measure_on_are_named_before_anything_is_drawn(count, share, told):
    prompts = [encoded.Prompt("", [1, i]) for i in range(count)]
    if told is None:
        shaping_data.check_held_out(prompts, validation=share, seed=0)
        return
    with pytest.raises(ValueError, match=f"validation: {told}"):
        shaping_data.check_held_out(prompts, validation=share, seed=0)
