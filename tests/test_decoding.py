"""Sampling, teacher-forced scoring and best-of-n: laws on trees, invariances on models, gradients."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign import critics, decoding, models, policies, rewards, rollout, tree
from jaxalign.decoding import _sampling
from jaxalign.prompts import bucket, prompt_batch
from tests import exact
from tests.conftest import EOS, PROMPTS, alone, needs_jit, padded, tiny_config, tiny_lm

RNG = jax.random.key(0)


# The draw -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("vocab", [3, 128, 129, 500])
def test_draw_inverts_the_cdf(vocab):
    """Every uniform number against numpy's inverse CDF; the boundaries of a token's interval are its own."""
    with jax.enable_x64(True):
        log_prob = jax.nn.log_softmax(jax.random.normal(jax.random.key(1), (vocab,), jnp.float64) * 2)
        uniform = np.linspace(0, 1, 4001)[:-1]
        found = rollout.draw(jnp.broadcast_to(log_prob, (4000, vocab)), jnp.asarray(uniform))
        expected = np.searchsorted(np.cumsum(np.exp(log_prob)), uniform, side="right")
        assert (np.asarray(found) == expected).mean() > 0.999  # ties of rounding at an edge


def test_draw_never_gives_a_token_of_probability_zero():
    log_prob = jnp.full((2, 300), -jnp.inf).at[:, jnp.array([7, 130, 290])].set(jnp.log(jnp.array([1e-6, 0.5, 0.5])))
    for u in (0.0, 1e-7, 0.4999999, 0.5, np.nextafter(np.float32(1), np.float32(0))):
        assert set(np.asarray(rollout.draw(log_prob, jnp.full(2, u))).tolist()) <= {7, 130, 290}


def test_exact_kl_ignores_what_has_no_mass():
    log_p = jnp.log(jnp.array([[0.5, 0.5, 0.0]]))
    np.testing.assert_allclose(rollout.exact_kl(log_p, jnp.log(jnp.array([[0.25, 0.25, 0.5]]))), np.log(2), rtol=1e-6)
    gradient = jax.grad(lambda x: rollout.exact_kl(x, jnp.log(jnp.array([[0.2, 0.3, 0.5]]))).sum())(log_p)
    assert jnp.isfinite(gradient).all()


# Laws on trees --------------------------------------------------------------------------------------------------------


def test_a_tilted_policy_samples_its_exact_law():
    """30,000 draws of a nested tilt with candidates: chi-squared below its 1 − 1e-6 quantile for the cells it has."""
    t = tree.Tree(3, 3, eos_id=0)
    base, q = exact.tables(t, 0)[0], exact.tables(t, 1)[0]
    inner = exact.tilt(t, tree.critic(t, "level"))
    policy = policies.tilt(inner, tree.critic(t, "increment"), top_k=2)
    params = {"policy": {"policy": base, "critic": q, "beta": 0.8}, "critic": q[:, ::-1], "beta": 1.5}
    n = 30_000
    drawn = decoding.sample(policy, params, jax.random.key(7), tree.prompts(n), max_new_tokens=3, eos_ids=(0,))
    count = np.bincount(tree.response_index(t, drawn.tokens, drawn.mask), minlength=t.num_responses)
    expected = n * np.exp(exact.log_law(t, policy, params))
    inside = expected > 0
    assert count[~inside].sum() == 0
    statistic = ((count - expected)[inside] ** 2 / expected[inside]).sum()
    assert inside.sum() <= 16
    assert statistic < 60.0  # 1 − 1e-6 quantile of chi-squared with 15 degrees of freedom: 58.3


def test_kl_of_completions_is_the_exact_step_kl():
    t = tree.Tree(3, 3, eos_id=0)
    with jax.enable_x64(True):
        base, q = exact.tables(t, 0)[0], exact.tables(t, 1)[0]
        policy = exact.tilt(t, tree.critic(t, "level"))
        scored = exact.completions(t, policy, {"policy": base, "critic": q, "beta": 0.8})
        law = np.exp(scored.log_prob.sum(1))
        expected = exact.kl(np.log(law), np.asarray(tree.response_log_prob(t, base)))
        np.testing.assert_allclose(law @ np.asarray(scored.kl.sum(1)), expected, rtol=1e-10)


def test_best_of_n_samples_its_exact_law():
    """30,000 draws of the best of 3 on a tree with tied rewards: chi-squared below its 1 − 1e-6 quantile."""
    t = tree.Tree(2, 3, eos_id=0)
    base, reward = exact.tables(t, 2)
    reward = jnp.round(reward * 2)
    n = 30_000
    chosen = decoding.best_of_n(
        tree.policy(t),
        tree.reward(t),
        {"policy": base, "reward": reward},
        jax.random.key(1),
        tree.prompts(n),
        num_samples=3,
        max_new_tokens=3,
        eos_ids=(0,),
    )
    count = np.bincount(
        tree.response_index(t, chosen.completions.tokens, chosen.completions.mask), minlength=t.num_responses
    )
    expected = n * np.exp(tree.best_of_n_law(tree.response_log_prob(t, base), score=reward, n=3))
    assert ((count - expected) ** 2 / np.maximum(expected, 1e-9)).sum() < 46  # 9 degrees of freedom: 45.1
    best = np.asarray(chosen.info.reward).max(axis=1)
    index = tree.response_index(t, chosen.completions.tokens, chosen.completions.mask)
    np.testing.assert_allclose(np.asarray(reward)[index], best)


def test_best_of_one_is_sampling():
    lm, params = tiny_lm(0)
    reward_lm, reward_params = tiny_lm(1, "reward")
    policy = policies.language_model(lm)
    arguments = {"max_new_tokens": 4, "eos_ids": EOS}
    one = decoding.best_of_n(
        policy,
        rewards.from_model(reward_lm),
        {"policy": params, "reward": reward_params},
        RNG,
        padded(PROMPTS),
        num_samples=1,
        **arguments,
    )
    np.testing.assert_array_equal(one.completions.tokens, one.info.samples.tokens[:, 0])
    np.testing.assert_array_equal(
        one.completions.tokens, decoding.sample(policy, params, RNG, padded(PROMPTS), **arguments).tokens
    )


def test_best_of_n_rewards_are_those_of_the_texts_and_rows_are_independent():
    with jax.enable_x64(True):
        lm, params = tiny_lm(0, dtype="float64")
        reward_lm, reward_params = tiny_lm(1, "reward", dtype="float64")
        reward, policy = rewards.from_model(reward_lm), policies.language_model(lm)
        both = {"policy": params, "reward": reward_params}
        arguments = {"num_samples": 3, "max_new_tokens": 4, "eos_ids": EOS}
        chosen = decoding.best_of_n(policy, reward, both, RNG, padded(PROMPTS), **arguments)
        score = jax.jit(reward)
        for b, prompt in enumerate(PROMPTS):
            for j in range(3):
                y = np.asarray(chosen.info.samples.tokens)[b, j][np.asarray(chosen.info.samples.mask)[b, j]].tolist()
                text = padded([prompt + y], extra=9 - len(prompt + y))
                found = score(reward_params, text.tokens, text.mask, jnp.array([len(prompt)]), jnp.array([b]))
                np.testing.assert_allclose(chosen.info.reward[b, j], found[0], rtol=1e-9)
        alone = padded([PROMPTS[3]])._replace(index=jnp.array([3]))
        single = decoding.best_of_n(policy, reward, both, RNG, alone, **arguments)
        np.testing.assert_array_equal(single.info.samples.tokens[0], chosen.info.samples.tokens[3])


# On models ------------------------------------------------------------------------------------------------------------


def nested():
    """Two nested tilts in float64: controlled decoding with a Q head, then an autoregressive reward."""
    lm, base = tiny_lm(0, dtype="float64", num_layers=1)
    q_lm, q = tiny_lm(3, "q", dtype="float64", num_layers=1)
    arm_lm, arm = tiny_lm(4, dtype="float64", num_layers=1)
    inner = policies.tilt(policies.language_model(lm), critics.value(q_lm))
    policy = policies.tilt(inner, critics.genarm(arm_lm))
    params = {
        "policy": {"policy": base, "critic": q, "beta": jnp.linspace(0.5, 1.5, 5)},
        "critic": arm,
        "beta": jnp.asarray(1.3),
    }
    return policy, params


def test_gradients_of_log_prob_under_two_nested_tilts_equal_finite_differences():
    """In base, critics and both betas, along 4 random directions each, central differences in float64."""
    with jax.enable_x64(True):
        policy, params = nested()
        tokens = jnp.array([[1, 2, 5], [3, 3, 9], [10, 4, 6], [2, 8, 1], [7, 1, 2]])
        mask = jnp.array([[1, 1, 1], [1, 1, 0], [1, 1, 1], [1, 0, 0], [1, 1, 1]], bool)
        weight = jnp.linspace(-1, 2, 5)

        @jax.jit
        def objective(params):
            scored = decoding.log_prob(policy, params, RNG, padded(PROMPTS), tokens, mask)
            return (weight * scored.log_prob.sum(1) + 0.3 * scored.kl.sum(1) - 0.2 * scored.log_norm.sum(1)).sum()

        def along(params, direction, step):
            return jax.tree.map(lambda p, d: np.asarray(p) + step * d, params, direction)

        gradient = jax.jit(jax.grad(objective))(params)
        parts = {
            "base": lambda p: p["policy"]["policy"],
            "critic": lambda p: p["policy"]["critic"],
            "arm": lambda p: p["critic"],
            "inner beta": lambda p: p["policy"]["beta"],
            "outer beta": lambda p: p["beta"],
        }
        for name, part in parts.items():
            chosen = {id(leaf) for leaf in jax.tree.leaves(part(params))}
            for seed in range(4):
                leaves, structure = jax.tree.flatten(params)
                draw = np.random.default_rng(seed)
                direction = structure.unflatten([draw.normal(size=x.shape) * (id(x) in chosen) for x in leaves])
                eps = 1e-5
                ends = [objective(along(params, direction, e)) for e in (eps, -eps)]
                expected = (ends[0] - ends[1]) / (2 * eps)
                found = sum(
                    (np.asarray(g) * d).sum()
                    for g, d in zip(jax.tree.leaves(gradient), jax.tree.leaves(direction), strict=True)
                )
                np.testing.assert_allclose(found, expected, rtol=2e-6, atol=1e-8, err_msg=name)


def test_the_parallel_form_of_a_language_model_equals_the_stepwise_form():
    with jax.enable_x64(True):
        lm, params = tiny_lm(0, dtype="float64")
        policy = policies.language_model(lm)
        tokens = jnp.array([[1, 2, 0], [3, 0, 0], [10, 4, 6], [0, 0, 0], [7, 1, 0]])
        mask = jnp.array([[1, 1, 1], [1, 1, 0], [1, 1, 1], [1, 0, 0], [1, 1, 1]], bool)
        both = [
            decoding.log_prob(p, params, RNG, padded(PROMPTS), tokens, mask, eos_ids=EOS)
            for p in (policy, policy._replace(log_prob=None))
        ]
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-12), *both)
        np.testing.assert_array_equal(both[0].finished, [True, True, False, True, True])


def test_a_response_outside_the_support_is_marked_and_gives_finite_gradients():
    lm, base = tiny_lm(0)
    policy = policies.top_k(policies.language_model(lm), 2)
    prompts = padded(PROMPTS)
    drawn = decoding.sample(policy, base, RNG, prompts, max_new_tokens=3, eos_ids=())
    start = jax.jit(policies.language_model(lm).init, static_argnums=3)
    worst = start(base, RNG, prompts, 3)[1].log_prob.argmin(axis=-1)
    tokens = drawn.tokens.at[1, 0].set(worst[1].astype(jnp.int32))
    scored = decoding.log_prob(policy, base, RNG, prompts, tokens, drawn.mask)
    np.testing.assert_array_equal(scored.in_support, [True, False, True, True, True])
    assert scored.log_prob[1, 0] < -1e18
    np.testing.assert_array_equal(scored.log_prob[1, 1:], 0)
    total = lambda p: decoding.log_prob(policy, p, RNG, prompts, tokens, drawn.mask).log_prob.sum()  # noqa: E731
    gradient = jax.jit(jax.grad(total))(base)
    assert all(bool(jnp.isfinite(g).all()) for g in jax.tree.leaves(gradient))


def test_greedy_takes_the_most_probable_token_and_ignores_the_key():
    lm, params = tiny_lm(0)
    policy = policies.language_model(lm)
    runs = [
        decoding.sample(policy, params, jax.random.key(s), padded(PROMPTS), max_new_tokens=4, eos_ids=(), temperature=0)
        for s in range(2)
    ]
    np.testing.assert_array_equal(runs[0].tokens, runs[1].tokens)
    for b, prompt in enumerate(PROMPTS):
        assert int(alone(lm, params, prompt).logits[-1].argmax()) == int(runs[0].tokens[b, 0])


def test_rows_after_eos_are_frozen_and_the_loop_stops():
    """A base that ends at once: one step is taken, whatever the limit."""
    steps = []
    t = tree.Tree(3, 3, eos_id=0)
    inner = tree.policy(t)

    def step(params, rng, state, token):
        jax.debug.callback(lambda: steps.append(1))
        return inner.step(params, rng, state, token)

    policy = inner._replace(step=step, check=None)  # the limit is beyond the horizon, and never reached
    table = jnp.full((t.num_states, 3), -50.0).at[:, 0].set(0.0)
    drawn = decoding.sample(policy, table, RNG, tree.prompts(4), max_new_tokens=50, eos_ids=(0,))
    jax.effects_barrier()
    assert len(steps) == 1
    np.testing.assert_array_equal(drawn.mask.sum(axis=1), 1)
    assert drawn.finished.all()
    assert drawn.tokens.shape == (4, 50)


def test_a_rollout_can_be_continued():
    """Two rollouts of 2 and 3 tokens are one of 5 when their draws are: greedy."""
    lm, params = tiny_lm(0)
    policy = policies.temperature(policies.language_model(lm))
    arguments = {"policy": params, "temperature": jnp.asarray(0.0)}
    prompts = padded(PROMPTS)
    state, output = jax.jit(policy.init, static_argnums=3)(arguments, RNG, prompts, 5)
    whole = rollout.rollout(policy, arguments, RNG, state, output, steps=5, eos_ids=EOS)[2]
    state, output, first, _ = rollout.rollout(policy, arguments, RNG, state, output, steps=2, eos_ids=EOS)
    second = rollout.rollout(
        policy, arguments, RNG, state, output, steps=3, eos_ids=EOS, finished=first.finished
    ).completions
    np.testing.assert_array_equal(jnp.concatenate([first.tokens, second.tokens], 1), whole.tokens)
    np.testing.assert_array_equal(jnp.concatenate([first.mask, second.mask], 1), whole.mask)
    np.testing.assert_array_equal(second.finished, whole.finished)


@needs_jit
def test_one_trace_for_each_bucket():
    """Prompts of 1 to 24 tokens: four buckets, four traces."""
    lm, params = tiny_lm(0, num_layers=1)
    traces = []
    policy = policies.language_model(lm)

    def init(*arguments):
        traces.append(1)
        return policy.init(*arguments)

    counted = policy._replace(init=init)
    lengths = [1, 3, 8, 9, 12, 13, 16, 17, 24]
    for length in lengths:
        batch = prompt_batch([[1] * length, [2]], batch_size=3)
        decoding.sample(counted, params, RNG, batch, max_new_tokens=2, eos_ids=EOS)
    assert len(traces) == len({bucket(n) for n in lengths}) == 4


@needs_jit
def test_the_compiled_step_costs_the_same_at_every_position_and_copies_no_cache():
    """FLOPs and bytes are static (position is data), K candidates read the cache once, and temporaries hold no copy of
    it: donated in, the cache is updated in place."""
    config = tiny_config(hidden_size=64, head_dim=16, max_length=2048, vocab_size=32)
    lm = models.LanguageModel(config)
    params = lm.init(jax.random.key(0))
    capacity = 1024
    _, cache = lm.prefill(params, jnp.ones((4, 8), jnp.int32), jnp.ones((4, 8), bool), capacity)
    cache_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(cache.layers))
    step = jax.jit(lm.step, donate_argnums=1).lower(params, cache, jnp.ones(4, jnp.int32)).compile()
    memory = step.memory_analysis()
    assert memory.alias_size_in_bytes >= cache_bytes
    assert memory.temp_size_in_bytes < cache_bytes / 2
    flops = {}
    for k in (1, 10):
        fn = jax.jit(lm.candidates).lower(params, cache, jnp.ones((4, k), jnp.int32)).compile()
        flops[k] = fn.cost_analysis()["flops"]
        assert fn.memory_analysis().temp_size_in_bytes < k * cache_bytes / 2
    assert 5 < flops[10] / flops[1] < 11


@needs_jit
@pytest.mark.parametrize("name", ["language_model", "args", "genarm"])
def test_the_compiled_loop_copies_no_cache(name):
    """No instruction of the compiled sampling loop copies an array of the cache's shape."""
    (lm, base), (reward_lm, reward), (arm_lm, arm) = tiny_lm(0), tiny_lm(1, "reward"), tiny_lm(4)
    policy, params = policies.language_model(lm), base
    if name == "args":
        policy = policies.tilt(policy, critics.args(reward_lm), top_k=3)
        params = {"policy": base, "critic": reward, "beta": jnp.float32(1)}
    elif name == "genarm":
        policy = policies.tilt(policy, critics.genarm(arm_lm))
        params = {"policy": base, "critic": arm, "beta": jnp.float32(1)}
    program = _sampling._sample.lower(policy, params, RNG, padded(PROMPTS), 29, EOS).compile().as_text()
    shape = "f32[5,2,33,4]"  # rows, key-value heads, prompt and new tokens, head_dim
    assert shape in program
    assert not re.findall(rf"= {re.escape(shape)}\S* copy\(", program)


def test_rollout_stops_each_row_at_its_own_limit():
    """The tokens are those of a roll-out without limits, cut; the state includes them all."""
    t = tree.Tree(3, 4, eos_id=None)
    table = exact.tables(t, 0)[0]
    policy = tree.policy(t)
    state, output = policy.init(table, RNG, tree.prompts(4), 4)
    steps = []

    def step(params, rng, state, token):
        jax.debug.callback(lambda: steps.append(None))
        return policy.step(params, rng, state, token)

    counted, limits = policy._replace(step=step), jnp.array([0, 1, 2, 9])
    shared = {"steps": 3, "eos_ids": ()}
    whole = rollout.rollout(policy, table, RNG, state, output, **shared)[2]
    for last_step in (True, False):
        steps.clear()
        after, _, cut, _ = rollout.rollout(
            counted, table, RNG, state, output, limits=limits, last_step=last_step, **shared
        )
        jax.effects_barrier()
        assert len(steps) == 3 - (not last_step)
        np.testing.assert_array_equal(cut.mask.sum(axis=1), [0, 1, 2, 3])
        np.testing.assert_array_equal(cut.tokens, jnp.where(cut.mask, whole.tokens, 0))
        if last_step:
            depth = np.asarray(t.depth)[np.asarray(after.node)[:3]]
            np.testing.assert_array_equal(depth, [0, 1, 2])
    steps.clear()
    rollout.rollout(counted, table, RNG, state, output, limits=jnp.array([1, 1, 1, 2]), last_step=False, **shared)
    jax.effects_barrier()
    assert len(steps) == 1
