"""The methods of examples/gallery that are one Policy: each against its exact law on a tree, nothing is drawn."""

from __future__ import annotations

import types
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign import critics, decoding, infalign, models, policies, prompt_batch, shaping, tree
from jaxalign.types import Policy, StepOutput
from tests import exact, reward_laws
from tests.gallery_files import (
    BASE,
    FROM_ONE,
    LEVEL,
    ONE,
    REWARD_ONE,
    TREE,
    P,
    R,
    close,
    exact_last,
    law,
    module,
    normalised,
    tables,
)

__all__ = ["tables"]  # a fixture


def test_proxy_tuning(tables):
    b, e, a = tables
    policy = module("proxy_tuning").method(BASE, BASE, BASE)
    given = policies.TiltParams(b, critics.WeightedSumParams([e, normalised(a)], jnp.array([1.5, -1.5])), 1.0)
    close(exact.log_law(TREE, policy, given), law(b + 1.5 * (e - normalised(a))))


def test_dera_is_the_gibbs_law_of_one_token_alone(tables):
    """Aligned with reward q at beta .7: at l = 2 the product is b exp(2q/.7) of each state; over whole responses the
    law at beta .35 is another."""
    b, _, q = tables
    soft = 0.7 * jnp.log(jnp.exp(b + q / 0.7).sum(-1))
    aligned = b + q / 0.7 - soft[:, None] / 0.7
    policy, weights = module("dera").method(BASE, BASE), jnp.array([-1.0, 2.0])
    found = exact.log_law(TREE, policy, {"policies": [b, aligned], "weights": weights})
    close(found, law(b + 2 * q / 0.7))
    reward = 0.7 * (law(aligned) - law(b))  # whose optimum at .7 is the aligned model
    assert exact.total_variation(found, exact.gibbs_law(law(b), reward, 0.35)) > 0.01
    one = tree.Tree(3, 1, eos_id=None)
    single = {"policies": [b[:1], aligned[:1]], "weights": weights}
    close(exact.log_law(one, module("dera").method(FROM_ONE, FROM_ONE), single), normalised(b[0] + 2 * q[0] / 0.7))


def test_mod(tables):
    b, e, a = tables
    policy = module("mod").method([BASE] * 3)
    weights = jnp.array([0.2, 0.5, 0.3])
    found = exact.log_law(TREE, policy, {"policies": [b, e, normalised(a)], "weights": weights})
    close(found, law(0.2 * b + 0.5 * e + 0.3 * normalised(a)))


def test_contrastive_decoding(tables):
    b, e, _ = tables
    policy = module("contrastive_decoding").method(BASE, BASE)
    given = {
        "policy": {"policy": b, "min_p": 0.4},
        "critic": {"critics": [e], "weights": jnp.array([-0.5])},
        "beta": 1.0,
    }
    plausible = b >= b.max(-1, keepdims=True) + np.log(0.4)
    assert 13 < plausible.sum() < 39
    close(exact.log_law(TREE, policy, given), law(jnp.where(plausible, b - 0.5 * e, -1e20)))


def test_value_filter_and_its_bound(tables):
    """Good is q of the last token > 0; V its probability under the base: the bound of Ville's inequality."""
    b, _, q = tables
    good = np.asarray(exact_last(q)) > 0
    states = tree.value(TREE, b, reward=jnp.asarray(good, jnp.float32))
    value = tree.q_values(TREE, states, reward=jnp.asarray(good, jnp.float32))
    policy, c = module("value_filter").method(BASE, LEVEL), 0.3
    given = {"policy": b, "critic": {"critic": value, "map": jnp.asarray(c)}, "beta": 1.0}
    kept = value >= jnp.minimum(value.max(-1, keepdims=True), c)
    close(exact.log_law(TREE, policy, given), law(jnp.where(kept, b, -1e20)))
    values, drawn = jnp.array([[0.2, 0.5, 0.1], [0.95, 0.1, 0.92], [0.2, 0.5, 0.1]]), jnp.zeros((3, 3))
    none = module("value_filter").keep(0.9, values, drawn.at[2, 1].set(-1e20), None)
    np.testing.assert_array_equal(none == 0, [[False, True, False], [True, False, True], [True, False, False]])
    tokens, mask = TREE.responses
    least = np.where(mask, np.asarray(value)[TREE.nodes, tokens], np.inf).min(1)
    p = np.exp(law(b))
    cut = p[good & (least <= c)].sum() / p[good].sum()
    assert 0 <= cut <= c / (p * good).sum() + 1e-9


def test_robust_objectives():
    """The literal numbers at lam 1/4 = 1/beta and lam 4 are those of the pool; here the law of a tree of one token."""
    policy = module("robust_objectives").method(FROM_ONE, [tree.critic(ONE, "level")] * 2)
    values = [jnp.array([[1.0, 0.0, 0.0]]), jnp.array([[0.0, 1.0, 0.5]])]
    critic = {"critics": values, "pool": {"beta": 1.0}}
    found = exact.completions(ONE, policy, {"policy": jnp.log(P)[None], "critic": critic, "beta": 1.0})
    tilted = np.exp(np.asarray(found.log_prob).sum(1))
    np.testing.assert_allclose([tilted @ np.asarray(v)[0] for v in values], 0.45573, atol=1e-5)
    np.testing.assert_allclose(found.log_norm[0], 0.445325, atol=1e-5)


def test_genarm_with_several_objectives(tables):
    b, e, a = tables
    policy = module("genarm_objectives").method(BASE, [BASE, BASE])
    given = {"policy": b, "critic": {"critics": [e, normalised(a)], "weights": jnp.array([0.6, 0.9])}, "beta": 1.0}
    close(exact.log_law(TREE, policy, given), law(b + 0.6 * e + 0.9 * normalised(a)))


def test_genarm_weights_of_each_prompt(tables):
    """weights [B,m]: each response under its own."""
    b, e, a = tables
    tokens, _ = exact.responses(TREE)
    policy = module("genarm_objectives").method(BASE, [BASE, BASE])
    weights = jax.random.uniform(jax.random.key(2), (len(tokens), 2))
    given = {"policy": b, "critic": {"critics": [e, normalised(a)], "weights": weights}, "beta": 1.0}
    found = np.asarray(exact.completions(TREE, policy, given).log_prob).sum(axis=1)
    expected = [law(b + w[0] * e + w[1] * normalised(a))[i] for i, w in enumerate(weights)]
    close(found, expected, atol=1e-6)


def test_srs_args(tables):
    """Each state's threshold is that of its own candidates."""
    b, _, q = tables
    threshold = shaping.optimal_threshold(q, log_base=b, gain=0.6 / 0.5)
    given = {"policy": b, "critic": {"critic": q, "bound": 0.6}, "beta": 0.5}
    found = exact.log_law(TREE, module("srs_args").method(BASE, LEVEL, 0.5, None), given)
    close(found, law(b + 0.6 * (q > threshold[:, None]) / 0.5))


def test_lookahead_past_the_end_is_the_reward():
    """One token ends the response, so that the roll-out adds nothing: the law is b exp(r/beta)."""
    policy = module("lookahead").method(FROM_ONE, REWARD_ONE, 1, 3)
    critic = {"baseline": jnp.log(P)[None], "reward": jnp.asarray(R)}
    found = exact.log_law(ONE, policy, {"policy": jnp.log(P)[None], "critic": critic, "beta": 0.8})
    close(found, exact.gibbs_law(np.log(P), R, 0.8))


def test_kl_budget(tables):
    b, _, q = tables
    found = exact.completions(TREE, module("kl_budget").method(BASE, LEVEL), {"policy": b, "critic": q, "kl": 0.1})
    np.testing.assert_allclose(np.asarray(found.kl)[np.asarray(found.mask)], 0.1, atol=2e-5)


def test_mixture(tables):
    b, e, _ = tables
    found = exact.log_law(
        TREE, module("mixture").method([BASE, BASE]), {"policies": [b, e], "weights": jnp.array([0.3, 0.7])}
    )
    close(found, np.log(0.3 * np.exp(law(b)) + 0.7 * np.exp(law(e))))


@pytest.mark.parametrize("name", ["min_p", "typical"])
def test_kept_sets(tables, name):
    b = tables[0]
    entropy = -(jnp.exp(b) * b).sum(-1, keepdims=True)
    order = np.argsort(np.abs(-b - entropy), axis=1, kind="stable")
    mass = np.take_along_axis(np.exp(np.asarray(b)), order, 1)
    short = np.cumsum(mass, 1) - mass < 0.6
    kept = np.zeros((13, 3), bool)
    np.put_along_axis(kept, order, short, 1)
    if name == "min_p":
        kept = np.asarray(b >= b.max(-1, keepdims=True) + np.log(0.6))
    found = exact.log_law(TREE, module(name).method(BASE), {"policy": b, name: 0.6})
    close(found, law(jnp.where(kept, b, -1e20)))


def prompted() -> Policy:
    """A policy whose table [P,V,V] is chosen by the prompt's first token, and read at the last token of the text."""

    def output(params, state):
        log_prob = jax.nn.log_softmax(params[state[:, 0], state[:, 1]])
        return StepOutput(log_prob, log_prob, jnp.zeros(log_prob.shape[0]))

    def init(params, rng, prompts, max_new_tokens):
        at = prompts.mask.argmax(axis=1)
        first = jnp.take_along_axis(prompts.tokens, at[:, None], axis=1)[:, 0]
        state = jnp.stack([first, prompts.tokens[:, -1]], axis=1)
        return state, output(params, state)

    def step(params, rng, state, token):
        state = state.at[:, 1].set(jnp.where(token < 0, state[:, 1], token))
        return state, output(params, state)

    return Policy(init, step)


@pytest.mark.parametrize("name", ["classifier_free_guidance", "conditioned_arm"])
def test_methods_with_prompts_of_their_own(name):
    """The tables of two prompts, at each of which the rule is written out; g = 0 is the base."""
    base, table = prompted(), jax.nn.log_softmax(jax.random.normal(jax.random.key(3), (2, 3, 3)))
    x, other = prompt_batch([[0, 2]], length=2), prompt_batch([[1, 2]], length=2)
    for g in (0.8, 0.0):
        if name == "conditioned_arm":
            policy, prompts = module(name).method(base, base), {"policy": x, "critic": other}
            given, expected = {"policy": table, "critic": table, "beta": 1 / (g + 1)}, table[0] + (g + 1) * table[1]
        else:
            policy, prompts = module(name).method(base), {"policy": x, "critic": {"critics": [x, other]}}
            critic = {"critics": [table, table], "weights": jnp.array([g, -g])}
            given, expected = {"policy": table, "critic": critic, "beta": 1.0}, table[0] + g * (table[0] - table[1])
        found = decoding.log_prob(policy, given, exact.RNG, prompts, jnp.array([[1, 0, 2]]), jnp.ones((1, 3), bool))
        rows = jax.nn.log_softmax(expected)[jnp.array([2, 1, 0]), jnp.array([1, 0, 2])]
        np.testing.assert_allclose(found.log_prob[0], rows, atol=1e-5)


# Readings of a head of laws: the law of whole responses, token by token, on tree B ------------------------------------


class TreeLaws(NamedTuple):
    """A model whose head gives the law of the reward from each prefix of tree B; params: the log-laws [121,K]."""

    vocab_size: int = 3
    max_length: int = 99

    @property
    def config(self):
        law = models.Distribution(reward_laws.ATOMS, mode="atoms")
        return types.SimpleNamespace(head=models.Head("value", distribution=law))

    def prefill(self, params, tokens, mask, capacity):
        root = jnp.zeros(tokens.shape[0], jnp.int32)
        return root[:, None], root

    def step(self, params, cache, token):
        cache = jnp.where(token < 0, cache, 3 * cache + 1 + token)
        return cache[:, None], cache

    def candidates(self, params, cache, tokens):
        entries = 3 * cache[:, None] + 1 + tokens
        return entries[..., None], entries

    def commit(self, cache, entries, choice):
        chosen = jnp.take_along_axis(entries, jnp.maximum(choice, 0)[:, None], axis=1)[:, 0]
        return jnp.where(choice < 0, cache, chosen)

    def head(self, params, hidden):
        return params[hidden[..., 0]]


def by_tokens(numbers, made, *more):
    """The law of the responses that a method of a head of laws decodes on tree B."""
    laws = np.maximum(reward_laws.log_of(reward_laws.laws("B", reward_laws.ATOMS)), -1e20)
    base = jnp.asarray(reward_laws.world("B").log_ref, jnp.float32)
    critic = critics.DistributionParams(jnp.asarray(laws, jnp.float32), numbers)
    policy = made.method(tree.policy(reward_laws.TREE), TreeLaws(), *more)
    return exact.log_law(reward_laws.TREE, policy, policies.TiltParams(base, critic, 1.0))


def test_pessimism_by_tokens():
    """l is -.63369 where the mean of max(0, r - l) is beta = .7."""
    reward = reward_laws.world("B").reward
    level = optimize_level(np.exp(reward_laws.world("B").log_base), reward, 0.7)
    np.testing.assert_allclose(level, -0.63369, atol=5.5e-6)
    found = by_tokens({"beta": 0.7}, module("pessimism_by_tokens"))
    close(found, reward_laws.reweighed("B", np.maximum(0, reward - level)), atol=1e-6)


def optimize_level(p, reward, beta):
    """l with E max(0, r - l) = beta, by bisection."""
    low, high = -20.0, 20.0
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if p @ np.maximum(0, reward - middle) > beta else (low, middle)
    return (low + high) / 2


def test_infalign_by_tokens():
    p, reward = np.exp(reward_laws.world("B").log_base), reward_laws.world("B").reward
    place = (reward[:, None] > reward) @ p + (reward[:, None] == reward) @ p / 2
    found = by_tokens({"beta": 0.3}, module("infalign_by_tokens"), infalign.exponential(5.0))
    close(found, reward_laws.reweighed("B", np.exp(np.expm1(5 * place) / np.expm1(5) / 0.3)), atol=1e-6)


def test_srs_cd():
    """The threshold is that of the prompt's law, found before the first token."""
    world = reward_laws.world("B")
    threshold = float(shaping.optimal_threshold(world.reward, log_base=world.log_base, gain=3.0))
    found = by_tokens({"bound": 3.0, "beta": 1.0}, module("srs_cd"))
    close(found, reward_laws.reweighed("B", np.exp(3.0 * (world.reward > threshold))), atol=1e-6)


def test_kl_per_response():
    """The budget is the KL of the whole response, at the beta of the optimum."""
    found = by_tokens({"nats": 0.5}, module("kl_per_response"))
    close(found, reward_laws.reweighed("B", np.exp(reward_laws.world("B").reward / 1.03554)), atol=1e-5)
    np.testing.assert_allclose(reward_laws.mean_and_kl("B", found)[1], 0.5, atol=1e-5)
