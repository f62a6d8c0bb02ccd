"""Decoding for a shaped reward: exact heads, the candidates' threshold, and the rejection sampler's law."""

from __future__ import annotations

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign import critics, decoding, models, policies, rewards, shaping, tree
from tests import exact
from tests.conftest import EOS, PROMPTS, VOCAB, padded, tiny_lm

RNG = jax.random.key(0)
SPEC = models.Follower("exceedance", beta=0.5, bound=2.0)


def with_follower(kind: str, follower: models.Follower):
    """A model with a head of the kind and its parameters, and the same head as plain values."""
    lm, params = tiny_lm(3, kind)
    head = dataclasses.replace(lm.config.head, follower=follower)
    return models.with_head(lm, head), lm, params


def scores(critic, params, candidates):
    prompts = padded(PROMPTS)
    lm, base = tiny_lm(0)
    _, output = policies.language_model(lm).init(base, RNG, prompts, 4)
    state = critic.init(params, RNG, prompts, 4)
    return critic.score(params, RNG, state, output, candidates)[0]


@pytest.mark.parametrize("kind", ["value", "q"])
@pytest.mark.parametrize("objective", ["exceedance", "soft"])
@pytest.mark.parametrize("k", [None, 3])
def test_a_follower_head_is_read_as_a_log_weight(kind, objective, k):
    spec = dataclasses.replace(SPEC, objective=objective)
    lm, plain, params = with_follower(kind, spec)
    candidates = None if k is None else jnp.tile(jnp.array([[2, 7, 0]]), (5, 1))
    value = scores(critics.value(plain), params, candidates)
    expected = shaping.exceedance_log_weight(value, gain=4.0) if objective == "exceedance" else value / 0.5
    found = scores(critics.follower(lm, beta=0.5, bound=2.0), params, candidates)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_a_follower_head_serves_one_beta_and_one_bound():
    lm, plain, params = with_follower("q", SPEC)
    for name, other in (("beta", {"beta": 1.0}), ("bound", {"bound": 3.0})):
        with pytest.raises(ValueError, match=f"{name}: expected .* which the head was trained for"):
            critics.follower(lm, **other)
    with pytest.raises(ValueError, match="trained for a shaped reward"):
        critics.follower(plain)
    with pytest.raises(ValueError, match="expected a head of values"):
        critics.value(lm)
    base, base_params = tiny_lm(0)
    policy = policies.tilt(policies.language_model(base), critics.follower(lm))
    arguments = {"policy": base_params, "critic": params, "beta": jnp.asarray(0.5)}
    with pytest.raises(ValueError, match="beta: expected 1, "):
        decoding.sample(policy, arguments, RNG, padded(PROMPTS), max_new_tokens=2, eos_ids=EOS)
    drawn = decoding.sample(policy, arguments | {"beta": 1.0}, RNG, padded(PROMPTS), max_new_tokens=2, eos_ids=EOS)
    assert np.isfinite(drawn.log_prob).all()
    summed = critics.weighted_sum([critics.follower(lm), critics.value(plain)])
    assert summed.beta == 1.0


def test_heads_for_shaped_rewards_survive_a_folder(tmp_path):
    lm, _, params = with_follower("q", SPEC)
    models.save(tmp_path / "follower", lm, params)
    loaded, found = models.load(tmp_path / "follower")
    assert loaded.config.head == lm.config.head
    chex.assert_trees_all_equal(found, params)
    reward_lm, reward_params = tiny_lm(1, "reward")
    bounded = models.with_head(reward_lm, models.Head("reward", bound=2.5))
    models.save(tmp_path / "reward", bounded, reward_params)
    loaded, found = models.load(tmp_path / "reward")
    assert loaded.config.head == models.Head("reward", bound=2.5)
    hidden = jax.random.normal(RNG, (3, 16))
    score = reward_lm.head(reward_params, hidden)
    np.testing.assert_allclose(loaded.head(found, hidden), 2.5 * jax.nn.sigmoid(score), rtol=1e-6)
    for bad in (
        {"kind": "value", "bound": 1.0},
        {"kind": "reward", "bound": 0.0},
        {"kind": "reward", "follower": SPEC},
    ):
        with pytest.raises(ValueError, match=r"bound: |follower: "):
            models.Head(**bad)
    for bad in ({"objective": "hard"}, {"beta": 0.0}, {"bound": np.inf}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            dataclasses.replace(SPEC, **bad)


@pytest.mark.parametrize("sharpness", [None, 1.5])
def test_the_threshold_over_candidates_is_solved_at_each_step(sharpness):
    """SRS-ARGS with the authors' data-dependent bound and cap, against numpy on the candidates of one state."""
    t = tree.Tree(4, 2)
    base, _ = exact.tables(t, 0)
    partial = jax.random.normal(jax.random.key(3), (t.num_states, 4)) * 2
    critic = critics.shaped_over_candidates(
        tree.critic(t, "level"), beta=0.8, sharpness=sharpness, range_factor=1.01, max_gain=np.log(2)
    )
    policy = policies.tilt(tree.policy(t), critic, top_k=3)
    params = {"policy": base, "critic": {"critic": partial, "bound": jnp.asarray(1.5)}, "beta": jnp.asarray(0.8)}
    _, output = policy.init(params, RNG, tree.prompts(1), 2)
    kept = np.argsort(-np.asarray(base[0]))[:3]
    q, weight = np.asarray(partial[0])[kept], np.exp(np.asarray(base[0]))[kept]
    bound = min(1.5, 1.01 * (q.max() - q.min()))
    gain = min(bound / 0.8, np.log(2))
    low, high = q.min(), q.max()
    for _ in range(60):
        m = (low + high) / 2
        w = weight * np.where(q >= m, np.exp(gain), 1)
        low, high = (m, high) if (w * (q - m)).sum() > 0 else (low, m)
    shaped = bound * ((q > m) if sharpness is None else 1 / (1 + np.exp(-sharpness * (q - m))))
    logit = np.log(weight) + shaped / 0.8
    expected = np.full(4, 0.0)
    expected[kept] = np.exp(logit) / np.exp(logit).sum()
    np.testing.assert_allclose(np.exp(np.maximum(output.log_prob[0], -100)), expected, atol=1e-5)


def test_equal_candidates_are_not_shaped():
    t = tree.Tree(4, 2)
    base, _ = exact.tables(t, 0)
    critic = critics.shaped_over_candidates(tree.critic(t, "level"), beta=1.0, range_factor=1.01)
    params = {"policy": base, "critic": {"critic": jnp.ones((t.num_states, 4)), "bound": 2.0}, "beta": 1.0}
    _, output = policies.tilt(tree.policy(t), critic).init(params, RNG, tree.prompts(1), 2)
    np.testing.assert_allclose(output.log_prob[0], base[0], atol=1e-6)


def rejected(t, base, reward, *, count: int, tries: int, bound: float, beta: float = 1.0, chunk: int = 8):
    arguments = {"policy": base, "reward": reward, "beta": beta, "bound": bound}
    return decoding.rejection(
        tree.policy(t),
        tree.reward(t),
        arguments,
        jax.random.key(2),
        tree.prompts(count),
        max_tries=tries,
        chunk=chunk,
        max_new_tokens=t.horizon,
        eos_ids=(0,),
    )


def test_accepted_responses_follow_the_response_level_optimum():
    """30,000 rows; chi-square with 11 degrees of freedom exceeds 48.7 with probability 1e-6."""
    t = tree.Tree(3, 3, eos_id=0)
    base, utility = exact.tables(t, 4)
    log_base = tree.response_log_prob(t, base)
    threshold = shaping.optimal_threshold(utility, log_base=log_base, gain=2.0)
    reward = shaping.threshold_reward(utility, threshold=threshold, bound=2.0)
    found = rejected(t, base, reward, count=30_000, tries=200, bound=2.0)
    assert found.info.accepted.all()
    drawn = found.completions
    count = np.bincount(tree.response_index(t, drawn.tokens, drawn.mask), minlength=t.num_responses)
    expected = 30_000 * np.exp(tree.optimal_log_prob(t, base, reward, beta=1.0))
    assert ((count - expected) ** 2 / np.maximum(expected, 1e-9)).sum() < 60
    mix = shaping.mixture(utility, log_base=log_base, threshold=threshold, gain=2.0)
    rate = np.exp(mix.log_norm - 2.0)
    # The mean of 240,000 acceptance probabilities in [0, 1]: Hoeffding at 1e-6.
    np.testing.assert_allclose(found.info.accept_rate.mean(), rate, atol=0.006)
    np.testing.assert_allclose(1 / found.info.tries.mean(), rate, rtol=0.05)
    np.testing.assert_allclose(found.info.reward, np.asarray(reward)[tree.response_index(t, drawn.tokens, drawn.mask)])


def test_rejection_is_a_function_of_prompt_and_try_alone():
    t = tree.Tree(3, 3, eos_id=0)
    base, reward = exact.tables(t, 1)
    bound = float(reward.max()) + 0.5
    runs = [rejected(t, base, reward, count=64, tries=12, bound=bound, beta=0.4, chunk=c) for c in (1, 5, 12)]
    for other in runs[1:]:
        for name in ("accepted", "tries", "reward"):
            np.testing.assert_array_equal(getattr(other.info, name), getattr(runs[0].info, name))
        chex.assert_trees_all_equal(other.completions, runs[0].completions)
    assert 0 < runs[0].info.accepted.sum() < 64
    assert (np.asarray(runs[0].info.tries)[~np.asarray(runs[0].info.accepted)] == 12).all()


NAN = {"tries": 1, "bound": float("nan")}, "bound: expected numbers"


def test_rejection_refuses_what_would_break_its_law():
    t = tree.Tree(3, 2)
    base, reward = exact.tables(t, 1)
    with pytest.raises(ValueError, match="bound: expected at least every reward"):
        rejected(t, base, reward, count=64, tries=4, bound=float(reward.max()) - 0.5)
    for bad, match in (({"tries": 0, "bound": 9.0}, "tries"), ({"tries": 1, "bound": 9.0, "beta": 0.0}, "beta"), NAN):
        with pytest.raises(ValueError, match=match):
            rejected(t, base, reward, count=2, **bad)


def test_rejection_runs_on_language_models():
    lm, params = tiny_lm(0)
    reward_lm, reward_params = tiny_lm(1, "reward")
    bounded = models.with_head(reward_lm, models.Head("reward", bound=2.0))
    found = decoding.rejection(
        policies.language_model(lm),
        rewards.from_model(bounded),
        {"policy": params, "reward": reward_params, "beta": jnp.full(5, 1.0), "bound": 2.0},
        RNG,
        padded(PROMPTS),
        max_tries=6,
        chunk=4,
        max_new_tokens=4,
        eos_ids=EOS,
    )
    assert found.completions.tokens.shape == (5, 4)
    assert (np.asarray(found.completions.tokens) < VOCAB).all()
    assert ((found.info.reward >= 0) & (found.info.reward <= 2)).all()


@pytest.mark.parametrize("sharpness", [None, 2.0])
def test_a_shaped_reward_reads_the_threshold_of_its_prompt(sharpness):
    """Rows of prompts 2, 0, 2: bound above the prompt's threshold, 0 at and below it; a sigmoid where asked."""
    plain = rewards.from_numpy(lambda tokens, mask, length, index: tokens[:, 0])
    reward = rewards.shaped(plain, sharpness=sharpness)
    tokens = jnp.array([[5], [5], [6]])
    threshold = np.array([4.0, 0.0, 5.0])
    params = {"reward": None, "map": {"threshold": jnp.array(threshold), "bound": 3.0}}
    index = jnp.array([2, 0, 2])
    found = jax.jit(reward)(params, tokens, jnp.ones((3, 1), bool), jnp.zeros(3, jnp.int32), index)
    over = np.array([5, 5, 6]) - threshold[np.asarray(index)]
    expected = 3.0 * (over > 0) if sharpness is None else 3.0 / (1 + np.exp(-sharpness * over))
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    one = params | {"map": {"threshold": jnp.asarray(5.0), "bound": 3.0}}
    found = reward(one, tokens, jnp.ones((3, 1), bool), jnp.zeros(3, jnp.int32), index)
    over = np.array([0, 0, 1])
    expected = 3.0 * (over > 0) if sharpness is None else 3.0 / (1 + np.exp(-sharpness * over))
    np.testing.assert_allclose(found, expected, rtol=1e-6)
