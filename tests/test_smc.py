"""Sequential Monte Carlo: unbiased normalisers, weights in closed form, the law of the particles, and language models.

Where something random is compared, the number is a mean of thousands of independent prompts, and the bound is 5 of its
standard errors: 6e-7 for each comparison.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign import critics, decoding, policies, rewards, tree
from jaxalign.decoding.resampling import effective_size, systematic_at
from jaxalign.types import TokenBatch
from tests import exact
from tests.conftest import EOS, PROMPTS, needs_jit, padded, tiny_lm
from tests.sampling import assert_mean, chi_square, index_of

RNG = jax.random.key(0)
TREE = tree.Tree(3, 3, eos_id=0)
BASE = tree.policy(TREE)
REWARD = tree.reward(TREE)
LEVEL = policies.tilt(BASE, tree.critic(TREE, "level"))
INCREMENT = policies.tilt(BASE, tree.critic(TREE, "increment"))
NESTED = policies.tilt(LEVEL, tree.critic(TREE, "increment"))
TOP_2 = policies.tilt(BASE, tree.critic(TREE, "level"), top_k=2)
PROPOSALS = {"base": BASE, "level": LEVEL, "increment": INCREMENT, "nested": NESTED}
BETA = 0.6


def random_q(seed: int) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), (TREE.num_states, TREE.vocab_size), jnp.result_type(float))


def proposal(name: str, base: jax.Array) -> tuple:
    """(policy, params) of a proposal whose critics are random tables: bad ones, so that the weights vary."""
    q, other = random_q(11), random_q(12)
    tilted = {"policy": base, "critic": q, "beta": 1.5}
    return PROPOSALS[name], {
        "base": base,
        "level": tilted,
        "increment": tilted,
        "nested": {"policy": tilted, "critic": other, "beta": 2.0},
    }[name]


def run(policy, params, reward, *, count: int, n: int, beta=BETA, seed: int = 0, prompts=None, below: float = 0.5):
    return decoding.smc(
        policy,
        REWARD,
        {"policy": params, "reward": reward, "beta": beta, "ess_threshold": below},
        jax.random.key(seed),
        tree.prompts(count) if prompts is None else prompts,
        num_particles=n,
        max_new_tokens=TREE.horizon,
        eos_ids=(0,),
    )


# The resampler --------------------------------------------------------------------------------------------------------


def test_smc_systematic_resampling_gives_each_particle_its_share_of_children():
    """Over a grid of uniform numbers the mean number of children is N·p to the grid's step; each is ⌊N·p⌋ or ⌈N·p⌉."""
    with jax.enable_x64(True):
        n, grid = 5, 2000
        log_weight = jnp.concatenate([jax.random.normal(RNG, (3, n)) * 2, jnp.zeros((1, n))])
        log_weight = log_weight.at[0, 0].set(-jnp.inf).at[1, n - 1].set(-jnp.inf)
        share = np.asarray(jax.nn.softmax(log_weight, axis=1)) * n
        uniform = (jnp.arange(grid) + 0.5) / grid
        index = jax.vmap(lambda u: systematic_at(log_weight, jnp.full(4, u)))(uniform)
        children = (np.asarray(index)[..., None] == np.arange(n)).sum(axis=2)
        np.testing.assert_allclose(children.mean(axis=0), share, atol=2 / grid)
        assert (np.abs(children - share) < 1 + 1e-9).all()
        np.testing.assert_array_equal(children[:, 3], 1)
        assert children[:, 0, 0].max() == children[:, 1, n - 1].max() == 0
        for u in (0.0, np.nextafter(1.0, 0.0)):
            assert (np.diff(np.asarray(systematic_at(log_weight, jnp.full(4, u))), axis=1) >= 0).all()


def test_smc_effective_size_by_hand():
    log_weight = jnp.array([[3.0, 3.0, 3.0], [-jnp.inf, 7.0, -jnp.inf], [-jnp.inf] * 3, [0.0, jnp.log(3.0), -jnp.inf]])
    np.testing.assert_allclose(effective_size(log_weight), [3, 1, 0, 1.6], rtol=1e-6)
    assert np.isnan(effective_size(jnp.array([0.0, jnp.nan])))


# Weights in closed form -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PROPOSALS)
def test_smc_with_one_particle_is_importance_sampling_with_the_exact_weight(name):
    """log w(y) = log pi_ref(y) + r(y)/beta − log pi(y) for every response drawn, and Σ pi·w over all of them is Z."""
    with jax.enable_x64(True):
        base, reward = exact.tables(TREE, 4)
        policy, params = proposal(name, base)
        found = run(policy, params, reward, count=64, n=1, below=1.0)
        log_ref, law = np.asarray(tree.response_log_prob(TREE, base)), exact.log_law(TREE, policy, params)
        weight = log_ref + np.asarray(reward) / BETA - law
        np.testing.assert_allclose(found.info.log_weight, weight[index_of(TREE, found.info.samples)], atol=1e-12)
        np.testing.assert_allclose(found.info.log_z, found.info.log_weight[:, 0], atol=1e-12)
        assert (found.info.resamplings == 0).all()
        assert not found.info.truncated_support.any()
        np.testing.assert_allclose(np.exp(law + weight).sum(), np.exp(log_ref + np.asarray(reward) / BETA).sum())
        assert len(np.unique(index_of(TREE, found.info.samples))) > 5


@pytest.mark.parametrize("name", ["level", "increment"])
def test_smc_the_weight_is_log_norm_and_the_terminal_reward_less_what_was_promised(name):
    """Σ log_norm + r/beta − q_T/beta_q for a level critic, − Σ q/beta_q for an increment; along each particle's own
    history also where it was resampled."""
    with jax.enable_x64(True):
        base, reward = exact.tables(TREE, 4)
        policy, params = proposal(name, base)
        for below in (0.0, 1.0):
            found = run(policy, params, reward, count=64, n=4, below=below)
            chosen, mask = index_of(TREE, found.info.samples), np.asarray(found.info.samples.mask)
            each = np.where(mask, np.asarray(params["critic"])[TREE.nodes[chosen], TREE.responses[0][chosen]], 0)
            last = np.take_along_axis(each, mask.sum(-1, keepdims=True) - 1, axis=-1)[..., 0]
            promised = (last if name == "level" else each.sum(-1)) / params["beta"]
            whole = np.asarray(found.info.samples.log_norm).sum(-1) + np.asarray(reward)[chosen] / BETA - promised
            scored = found.info.samples.log_prob_ref - found.info.samples.log_prob
            np.testing.assert_allclose(
                np.asarray(scored).sum(-1) + np.asarray(reward)[chosen] / BETA, whole, atol=1e-12
            )
            log_ref = np.asarray(tree.response_log_prob(TREE, base))
            np.testing.assert_allclose(found.info.samples.log_prob_ref.sum(-1), log_ref[chosen], atol=1e-12)
            np.testing.assert_allclose(found.info.reward, np.asarray(reward)[chosen])
            if below == 0:
                np.testing.assert_allclose(found.info.log_weight, whole, atol=1e-12)
                assert (found.info.resamplings == 0).all()
            else:
                assert (found.info.resamplings > 0).any()
                resampled = np.asarray(found.info.resamplings) > 0
                assert (np.abs(np.asarray(found.info.log_weight) - whole)[resampled].max(axis=1) > 1e-3).all()
            mean = np.log(np.exp(np.asarray(found.info.log_weight)).mean(axis=1))
            np.testing.assert_allclose(found.info.log_z, mean, atol=1e-12)


def test_smc_with_the_exact_soft_value_every_weight_is_z():
    """Zero variance, in float64 to 1e-11: no resampling, ESS = N, and KL is that of the optimum in the mean."""
    with jax.enable_x64(True):
        base, reward = exact.tables(TREE, 1)
        soft = tree.q_values(TREE, tree.soft_value(TREE, base, reward, beta=BETA), reward=reward)
        found = run(LEVEL, {"policy": base, "critic": soft, "beta": BETA}, reward, count=64, n=4, below=1 - 1e-9)
        log_z = jax.nn.logsumexp(tree.response_log_prob(TREE, base) + reward / BETA)
        np.testing.assert_allclose(found.info.log_weight, np.full((64, 4), log_z), atol=1e-11)
        np.testing.assert_allclose(found.info.log_z, np.full(64, log_z), atol=1e-11)
        np.testing.assert_allclose(found.info.ess, 4, atol=1e-9)
        assert (found.info.resamplings == 0).all()
        np.testing.assert_allclose(found.kl.value, found.info.reward.mean(axis=1) / BETA - log_z, atol=1e-10)


# Expectations ---------------------------------------------------------------------------------------------------------


@functools.cache
def estimates(name: str, below: float):
    """(Particles of 6,000 prompts with 4 particles each, log pi_ref [M], reward [M]), in float32."""
    base, reward = exact.tables(TREE, 4)
    policy, params = proposal(name, base)
    return run(policy, params, reward, count=6000, n=4, below=below), tree.response_log_prob(TREE, base), reward


@pytest.mark.parametrize(
    ("name", "below"), [("base", 0.5), ("level", 0.9), ("level", 1.0), ("increment", 1.0), ("nested", 1.0)]
)
def test_smc_estimates_z_without_bias(name, below):
    found, log_ref, reward = estimates(name, below)
    if name != "base":  # the base's steps carry no weight: everything is paid at the end
        assert float((found.info.resamplings > 0).mean()) > 0.05
    assert_mean(np.exp(found.info.log_z), float(np.exp(log_ref + reward / BETA).sum()))
    # A biased one is told from it: the mean of log Z-hat is below log Z.
    assert float(found.info.log_z.mean()) < np.log(float(np.exp(log_ref + reward / BETA).sum())) - 0.01


@pytest.mark.parametrize(("name", "below"), [("level", 1.0), ("nested", 1.0)])
def test_smc_weights_reproduce_the_gibbs_law_of_responses(name, below):
    """Mean over prompts of (1/N) Σ_j w_j·1[y_j = y] is pi_ref(y)·exp(r(y)/beta), for each of the 15 responses."""
    found, log_ref, reward = estimates(name, below)
    each = np.asarray(found.info.samples.mask)[..., 0] * np.exp(np.asarray(found.info.log_weight, np.float64))
    hit = index_of(TREE, found.info.samples)[..., None] == np.arange(TREE.num_responses)
    assert_mean((each[..., None] * hit).mean(axis=1), np.exp(np.asarray(log_ref) + np.asarray(reward) / BETA))


def test_smc_pick_is_drawn_by_the_weights():
    """With the exact soft value a pick is an exact draw: 6,000 picks, chi-squared with 14 degrees of freedom below its
    1 − 1e-6 quantile. With a bad critic and 4 particles it is nearer to the optimum than the proposal is."""
    base, reward = exact.tables(TREE, 4)
    target = np.exp(tree.optimal_log_prob(TREE, base, reward, beta=BETA))
    soft = tree.q_values(TREE, tree.soft_value(TREE, base, reward, beta=BETA), reward=reward)
    found = run(LEVEL, {"policy": base, "critic": soft, "beta": BETA}, reward, count=6000, n=4, below=0.5)
    assert chi_square(index_of(TREE, found.completions), target) < 56
    bad, _, _ = estimates("level", 1.0)
    law = np.exp(exact.log_law(TREE, *proposal("level", base)))
    picked = np.bincount(index_of(TREE, bad.completions), minlength=TREE.num_responses) / 6000
    assert np.abs(picked - target).sum() < 0.6 * np.abs(law - target).sum()
    assert (
        (np.asarray(found.completions.tokens)[:, None] == np.asarray(found.info.samples.tokens)).all(-1).any(-1).all()
    )


def test_smc_of_a_truncated_proposal_aims_at_the_kept_responses_and_says_so():
    """Two candidates: E[Z-hat] is the base's mass times exp(r/beta) of what can be drawn, and nothing else is drawn."""
    base, reward = exact.tables(TREE, 4)
    params = {"policy": base, "critic": random_q(11), "beta": 1.5}
    found = run(TOP_2, params, reward, count=6000, n=4, below=1.0)
    kept = np.isfinite(exact.log_law(TREE, TOP_2, params))
    mass = np.exp(np.asarray(tree.response_log_prob(TREE, base)) + np.asarray(reward) / BETA)
    assert 0 < kept.sum() < len(kept)
    assert kept[index_of(TREE, found.info.samples)].all()
    assert found.info.truncated_support.all()
    assert_mean(np.exp(found.info.log_z), mass[kept].sum())
    hit = index_of(TREE, found.info.samples)[..., None] == np.arange(TREE.num_responses)
    assert_mean((np.exp(np.asarray(found.info.log_weight))[..., None] * hit).mean(axis=1), np.where(kept, mass, 0))


def test_smc_beta_and_tables_per_prompt():
    """Three prompts of different beta and reward, 2,000 copies each: every Z is its own."""
    tables = [exact.tables(TREE, seed) for seed in (4, 5, 7)]
    base, reward = (jnp.stack(x) for x in zip(*tables, strict=True))
    beta = jnp.array([0.6, 1.0, 3.0])
    # One index is one random stream: the copies are told apart by the key.
    prompts = TokenBatch(jnp.ones((3, 1), jnp.int32), jnp.ones((3, 1), bool))
    params = {"policy": base, "critic": base[:, :, ::-1], "beta": jnp.array([1.0, 2.0, 1.5])}
    found = jax.vmap(lambda key: log_z(params, reward, beta, prompts, key))(jax.random.split(RNG, 2000))
    log_ref = jax.vmap(lambda b: tree.response_log_prob(TREE, b))(base)
    assert_mean(np.exp(found), np.exp(log_ref + reward / beta[:, None]).sum(axis=1))


def log_z(params, reward, beta, prompts, key):
    arguments = {"policy": params, "reward": reward, "beta": beta, "ess_threshold": 0.9}
    return decoding.smc(
        LEVEL, REWARD, arguments, key, prompts, num_particles=4, max_new_tokens=3, eos_ids=(0,)
    ).info.log_z


def test_smc_forbidden_responses_have_no_weight():
    base, reward = exact.tables(TREE, 4)
    allowed = TREE.responses[1].sum(1) == 3
    found = run(LEVEL, proposal("level", base)[1], jnp.where(allowed, reward, -jnp.inf), count=6000, n=4, below=1.0)
    mass = np.exp(np.asarray(tree.response_log_prob(TREE, base)) + np.asarray(reward) / BETA)
    assert_mean(np.exp(found.info.log_z), mass[allowed].sum())
    some = np.asarray(found.info.ess) > 0
    assert 0 < (~some).sum() < 6000
    assert allowed[index_of(TREE, found.completions)][some].all()
    assert (np.asarray(found.info.log_z)[~some] == -np.inf).all()
    assert np.isfinite(np.asarray(found.kl.value)[some]).all()


# Language models ------------------------------------------------------------------------------------------------------


@functools.cache
def models():
    """(policy, reward, params) of a GenARM tilt over a language model, with a model's reward."""
    (lm, base), (arm, arm_params), (judge, judge_params) = (
        tiny_lm(0, num_layers=1),
        tiny_lm(4, num_layers=1),
        tiny_lm(1, "reward", num_layers=1),
    )
    policy = policies.tilt(policies.language_model(lm), critics.genarm(arm))
    tilted = {"policy": base, "critic": arm_params, "beta": jnp.asarray(1.0)}
    params = {"policy": tilted, "reward": judge_params, "beta": jnp.linspace(0.5, 2.0, 5)}
    return policy, rewards.from_model(judge), params


def generate(policy, reward, params, prompts, seed: int = 0, n: int = 4, **changes):
    params = {"ess_threshold": 1.0, **params}
    arguments = {"num_particles": n, "max_new_tokens": 4, "eos_ids": EOS} | changes
    return decoding.smc(policy, reward, params, jax.random.key(seed), prompts, **arguments)


@needs_jit
def test_smc_of_language_models_is_traced_once_and_its_weights_are_those_of_its_texts(prompts):
    policy, reward, params = models()
    traces = []

    def init(*arguments):
        traces.append(1)
        return policy.init(*arguments)

    counted = policy._replace(init=init)
    found = generate(counted, reward, params, prompts)
    generate(counted, reward, {**params, "beta": params["beta"] * 2, "ess_threshold": 0.3}, prompts, 1)
    assert traces == [1]
    assert found.info.samples.tokens.shape == (5, 4, 4)
    assert (found.info.resamplings >= 2).all()
    base_params, base = params["policy"]["policy"], policies.language_model(tiny_lm(0, num_layers=1)[0])
    for j in range(4):
        drawn = jax.tree.map(lambda x, j=j: x[:, j], found.info.samples)
        given = decoding.log_prob(policy, params["policy"], RNG, prompts, drawn.tokens, drawn.mask, eos_ids=EOS)
        for name in ("log_prob", "log_prob_ref", "log_norm", "kl"):
            np.testing.assert_allclose(getattr(drawn, name), getattr(given, name), rtol=2e-4, atol=2e-5, err_msg=name)
        np.testing.assert_array_equal(drawn.finished, given.finished)
        alone = decoding.log_prob(base, base_params, RNG, prompts, drawn.tokens, drawn.mask).log_prob
        np.testing.assert_allclose(drawn.log_prob_ref, alone, rtol=2e-4, atol=2e-5)
        score = reward(params["reward"], *decoding.join(prompts, drawn), jnp.arange(5))
        np.testing.assert_allclose(found.info.reward[:, j], score, rtol=1e-4, atol=1e-5)
    single = generate(policy, reward, {**params, "ess_threshold": 0.0}, prompts, n=4)
    scored = (single.info.samples.log_prob_ref - single.info.samples.log_prob).sum(-1)
    np.testing.assert_allclose(
        single.info.log_weight, scored + single.info.reward / params["beta"][:, None], rtol=1e-4, atol=1e-4
    )


def test_smc_of_a_model_with_a_reference_and_of_nested_candidates(prompts):
    """The base of the weight is the reference; candidates of candidates truncate the target."""
    (lm, tuned), (_, reference), (judge, judge_params), (arm, arm_params) = (
        tiny_lm(0, num_layers=1),
        tiny_lm(7, num_layers=1),
        tiny_lm(1, "reward", num_layers=1),
        tiny_lm(4, num_layers=1),
    )
    base, reward = policies.language_model(lm), rewards.from_model(judge)
    both = policies.with_reference(base, base)
    inner = policies.tilt(base, critics.genarm(arm), top_k=4)
    nested = policies.tilt(inner, critics.args(judge), top_k=3)
    tilted = {"policy": {"policy": tuned, "critic": arm_params, "beta": 1.0}, "critic": judge_params, "beta": 2.0}
    for policy, own, below, truncated in (
        (both, {"policy": tuned, "reference": reference}, reference, False),
        (nested, tilted, tuned, True),
    ):
        arguments = {"policy": own, "reward": judge_params, "beta": 1.5, "ess_threshold": 0.0}
        found = generate(policy, reward, arguments, prompts, n=2)
        for j in range(2):
            drawn = jax.tree.map(lambda x, j=j: x[:, j], found.info.samples)
            ref = decoding.log_prob(base, below, RNG, prompts, drawn.tokens, drawn.mask).log_prob.sum(1)
            weight = ref - drawn.log_prob.sum(1) + found.info.reward[:, j] / 1.5
            np.testing.assert_allclose(found.info.log_weight[:, j], weight, rtol=1e-4, atol=1e-4)
        np.testing.assert_array_equal(found.info.truncated_support, truncated)


def test_smc_of_a_prompt_alone_is_what_it_is_in_a_batch(prompts):
    policy, reward, params = models()
    whole = generate(policy, reward, params, prompts)
    last = TokenBatch(prompts.tokens[3:4], prompts.mask[3:4], jnp.array([3]))
    alone = generate(policy, reward, {**params, "beta": params["beta"][3]}, last)
    np.testing.assert_array_equal(alone.info.samples.tokens[0], whole.info.samples.tokens[3])
    np.testing.assert_array_equal(alone.completions.tokens[0], whole.completions.tokens[3])
    np.testing.assert_allclose(alone.info.log_weight[0], whole.info.log_weight[3], rtol=1e-4, atol=1e-4)
    assert int(alone.info.resamplings[0]) == int(whole.info.resamplings[3])


def test_smc_refuses_what_is_no_request(prompts):
    policy, reward, params = models()
    for changes, message in (
        ({"n": 0}, "num_particles: expected at least 1, found 0"),
        ({"max_new_tokens": 0}, "max_new_tokens: expected at least 1"),
        ({"eos_ids": (11,)}, "eos_ids"),
    ):
        with pytest.raises(ValueError, match=message):
            generate(policy, reward, params, prompts, **changes)
    with pytest.raises(ValueError, match="beta: expected a value > 0"):
        generate(policy, reward, {**params, "beta": 0.0}, prompts)
    for below, message in (
        (1.5, r"ess_threshold: expected a value in \[0, 1\], found 1.5"),
        (float("nan"), "ess_threshold"),
        (jnp.ones(4), r"ess_threshold: expected a scalar or shape \(5,\), one per prompt, found shape \(4,\)"),
    ):
        with pytest.raises(ValueError, match=message):
            generate(policy, reward, {**params, "ess_threshold": below}, prompts)
    with pytest.raises(ValueError, match=r"beta: expected a scalar or shape \(5,\)"):
        generate(policy, reward, {**params, "beta": jnp.ones(4)}, prompts)
    with pytest.raises(ValueError, match=r"params: expected entries .*\(missing beta\)"):
        generate(policy, reward, {name: params[name] for name in ("policy", "reward")}, prompts)
    broken = rewards.from_numpy(lambda t, m, p, i: np.where(i == 3, np.nan, 0.0))
    with pytest.raises(ValueError, match=r"reward: expected numbers, found NaN for prompts \[3\]"):
        generate(policy, broken, {**params, "reward": None}, padded(PROMPTS))
