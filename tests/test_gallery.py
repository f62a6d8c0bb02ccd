"""The methods of examples/gallery: each against its exact law on a tree, each built as eval.decode builds it."""

from __future__ import annotations

import importlib.util
import itertools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign import critics, decoding, evaluation, policies, prompt_batch, rewards, shaping, tree
from jaxalign.types import Completions, Decoded, Policy, StepOutput
from tests import exact, write_methods
from tests.cases import tiny_lm
from tests.sampling import assert_mean, chi_square, index_of
from tests.test_eval_decode import arguments, folders, methods, rows_of, tokenizer

__all__ = ["folders"]  # a fixture

FILES = {path.stem: path for path in write_methods.FILES}
TREE = tree.Tree(3, 3)
BASE, LEVEL = tree.policy(TREE), tree.critic(TREE, "level")
ONE = tree.Tree(3, 1, eos_id=None)
FROM_ONE, REWARD_ONE = tree.policy(ONE), tree.reward(ONE)
P, R = np.array([0.5, 0.3, 0.2]), np.array([0.0, 1.0, 2.0])


def module(name):
    """A file of the gallery, as `--method file:build` imports it."""
    spec = importlib.util.spec_from_file_location(f"gallery_{name}", FILES[name])
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


def normalised(x):
    return jax.nn.log_softmax(jnp.asarray(x, jnp.float32))


@pytest.fixture(scope="module")
def tables():
    """Tree C: base, draft and q of 13 states, in this order."""
    draw = np.random.default_rng(11)
    base, draft, q = (draw.normal(size=(13, 3)) for _ in range(3))
    return normalised(base), normalised(draft), jnp.asarray(q, jnp.float32)


def law(table):
    return np.asarray(tree.response_log_prob(TREE, normalised(table)))


def close(found, expected, atol=1e-5):
    np.testing.assert_allclose(np.exp(found), np.exp(expected), atol=atol)


def drawn(decode, policy_tree, size=4000):
    """The numbers of the responses of so many prompts, which share tables."""
    prompts = tree.prompts(size)
    return decode(jax.random.key(5), prompts, max_new_tokens=policy_tree.horizon)


def assert_law(found, expected, t=TREE, most=45):
    """Pearson's statistic of draws against a law of at most 16 cells: 45 has a probability of 1e-4 under it."""
    assert chi_square(index_of(t, found), np.exp(expected)) < most


# Per token: whole laws, nothing is drawn ------------------------------------------------------------------------------


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


def exact_last(q):
    """q of each response's last token, its terminal reward."""
    tokens, mask = TREE.responses
    last = mask.sum(1) - 1
    rows = np.arange(len(tokens))
    return np.asarray(q)[TREE.nodes[rows, last], tokens[rows, last]]


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


# Whole responses: laws of n-tuples, and draws against them ------------------------------------------------------------


def of_tuples(p, weight, n):
    """The law of the one of n independent draws of p that is picked by weight(tuple) [n]."""
    found = np.zeros(len(p))
    for each in itertools.product(range(len(p)), repeat=n):
        w = weight(np.array(each))
        np.add.at(found, np.array(each), np.prod(p[list(each)]) * w / w.sum())
    return found


@pytest.mark.parametrize(("n", "expected"), [(2, [0.354523, 0.341591, 0.303886]), (3, [0.293308, 0.343186, 0.363506])])
def test_soft_best_of_n(n, expected):
    np.testing.assert_allclose(of_tuples(P, lambda i: np.exp(R[i]), n), expected, atol=1e-6)
    params = {"policy": jnp.log(P)[None], "reward": jnp.asarray(R), "beta": 1.0}
    found = drawn(lambda *a, **k: module("soft_best_of_n").method(FROM_ONE, REWARD_ONE, params, *a, n, **k), ONE)
    assert_law(found.completions, np.log(expected), ONE, most=18)


def test_guided_draft():
    draft, expected = np.array([0.2, 0.3, 0.5]), [0.189139, 0.296235, 0.514626]
    np.testing.assert_allclose(of_tuples(draft, lambda i: P[i] / draft[i] * np.exp(R[i]), 2), expected, atol=1e-6)
    both = policies.ReferenceParams(jnp.log(draft)[None], jnp.log(P)[None])
    params = {"policy": both, "reward": jnp.asarray(R), "beta": 1.0}
    build = module("guided_draft").method
    found = drawn(lambda *a, **k: build(FROM_ONE, FROM_ONE, REWARD_ONE, params, *a, 2, **k), ONE)
    assert_law(found.completions, np.log(expected), ONE, most=18)
    assert_mean(np.exp(np.asarray(found.info.log_z)), (P * np.exp(R)).sum())


def test_inference_time_pessimism():
    """l is exact: the mean weight is 1; the law is that of n-tuples."""
    made = module("inference_time_pessimism")

    def weight(i):
        return np.asarray(made.weights(jnp.asarray(R[i], jnp.float32)[None], 0.8))[0]

    np.testing.assert_allclose(made.weights(jax.random.normal(jax.random.key(0), (7, 9)), 0.8).mean(1), 1, rtol=1e-5)
    expected = of_tuples(P, weight, 3)
    params = {"policy": jnp.log(P)[None], "reward": jnp.asarray(R)}
    found = drawn(lambda *a, **k: made.method(FROM_ONE, REWARD_ONE, 0.8, params, *a, num_samples=3, **k), ONE)
    assert_law(found.completions, np.log(expected), ONE, most=18)


def test_power_by_quest(tables):
    b = tables[0]
    params = {"policy": b, "reward": b, "beta": 1 / 3}
    found = drawn(lambda *a, **k: module("power_by_quest").method(BASE, params, *a, 32, **k), TREE)
    power = 4 * law(b) - np.log(np.exp(4 * law(b)).sum())
    count = np.bincount(index_of(TREE, found.completions), minlength=len(power)) / 4000
    assert 0.5 * np.abs(count - np.exp(power)).sum() <= 0.06
    cold = exact.log_law(TREE, policies.temperature(BASE), {"policy": b, "temperature": 0.25})
    np.testing.assert_allclose(exact.total_variation(cold, power), 0.277, atol=5e-4)


def test_power_by_smc(tables):
    b = tables[0]
    params = {"policy": policies.TemperatureParams(b, 0.25), "reward": b, "beta": 1 / 3}
    found = drawn(lambda *a, **k: module("power_by_smc").method(BASE, params, *a, 4, **k), TREE)
    assert_mean(np.exp(np.asarray(found.info.log_z)), np.exp(4 * law(b)).sum())


def test_twisted_smc(tables):
    """Any critic has E Z^ = Z; the exact soft value makes every weight Z."""
    b, _, q = tables
    reward = jnp.asarray(exact_last(q))
    z = (np.exp(law(b)) * np.exp(np.asarray(reward) / 0.7)).sum()
    soft = tree.q_values(TREE, tree.soft_value(TREE, b, reward=reward, beta=0.7), reward=reward)
    build, paid = module("twisted_smc").method, tree.reward(TREE)
    for critic, size in ((q, 4000), (soft, 20)):
        params = {"policy": policies.TiltParams(b, critic, 0.7), "reward": reward, "beta": 0.7}
        found = drawn(lambda *a, params=params, **k: build(BASE, LEVEL, paid, params, *a, 4, **k), TREE, size)
        if size == 20:
            np.testing.assert_allclose(np.exp(found.info.log_z), z, rtol=1e-4)
        else:
            assert_mean(np.exp(np.asarray(found.info.log_z)), z)


def test_infalign_tilt(tables):
    """E Z^ = Σ b exp(C/beta), C the place of the reward among a table of base rewards."""
    b, _, q = tables
    reward = exact_last(q)
    table = np.sort(reward[[0, 2, 3, 5, 7, 9]]).astype(np.float32)
    c = np.array([((table < r).sum() + (table <= r).sum()) / 2 / len(table) for r in reward.astype(np.float32)])
    own = {"reward": jnp.asarray(reward, jnp.float32), "map": {"table": jnp.tile(table, (4000, 1))}}
    params = {"policy": b, "reward": own, "beta": 0.5}
    found = drawn(lambda *a, **k: module("infalign_tilt").method(BASE, tree.reward(TREE), params, *a, 4, **k), TREE)
    assert_mean(np.exp(np.asarray(found.info.log_z)), (np.exp(law(b)) * np.exp(c / 0.5)).sum())


def test_cards_without_a_threshold_is_the_base(tables):
    """Every segment passes; nothing more is known of its law, and tests/test_cards.py has its acceptance."""
    b = tables[0]
    own = {"reward_threshold": -1e3, "entropy_threshold": 0.9, "beta": 1.0}
    params = {"policy": b, "reward": jnp.zeros(TREE.num_responses), **own}
    found = drawn(lambda *a, **k: module("cards").method(BASE, zero_reward, params, *a, **k), TREE)
    assert_law(found.completions, law(b))


def zero_reward(params, tokens, mask, prompt_length, index):
    return jnp.zeros(tokens.shape[0])


def test_weak_to_strong_search(tables):
    b, e, a = tables[0], tables[1], normalised(tables[2])
    ratio = e - a
    states = jnp.zeros(13)
    for s, z in itertools.product(range(4), range(3)):
        states = states.at[3 * s + 1 + z].set(states[s] + ratio[s, z])
    reward = tree.response_log_prob(TREE, e) - tree.response_log_prob(TREE, a)
    expected = tree.blockwise_law(TREE, b, state_score=states, reward=reward, num_samples=2, block_size=2)
    params = {"policy": b, "critic": {"critics": [e, a], "weights": jnp.array([1.0, -1.0])}}
    build = module("weak_to_strong_search").method
    found = drawn(lambda *args, **k: build(BASE, BASE, BASE, params, *args, num_samples=2, block_size=2, **k), TREE)
    assert_law(found.completions, expected)


def test_ensemble_lower_bound(tables):
    b, _, q = tables
    one, two = (jnp.asarray(exact_last(x)) for x in (q, q[:, ::-1]))
    score = (one + two) / 2 - 1.5 * jnp.abs(one - two) / 2
    expected = tree.best_of_n_law(jnp.asarray(law(b)), score=score, n=3)
    params = {"policy": b, "reward": {"rewards": [one, two]}}
    build, each = module("ensemble_lower_bound").method, [tree.reward(TREE)] * 2
    found = drawn(lambda *a, **k: build(BASE, each, 1.5, params, *a, num_samples=3, **k), TREE)
    assert_law(found.completions, expected)


def test_conformal_threshold_and_its_coverage(tables):
    """V along a response is what the tilt adds up to; over 200 splits of 99 and 100 the share cut is at most a."""
    made, (b, _, q) = module("conformal_threshold"), tables
    assert made.method(jnp.arange(99.0), 0.1) == 9
    assert made.method(jnp.arange(5.0), 0.1) == -jnp.inf
    completions = exact.completions(TREE, BASE, b)
    params = policies.TiltParams(b, q, 1.0)
    prompts = exact.one_prompt(len(completions.tokens))
    least = made.least_value(BASE, LEVEL, params, exact.RNG, prompts, completions.tokens, completions.mask)
    tokens, mask = TREE.responses
    np.testing.assert_allclose(least, np.where(mask, np.asarray(q)[TREE.nodes, tokens], np.inf).min(1), atol=1e-5)
    draw, p = np.random.default_rng(0), np.exp(law(b))
    cut = []
    for _ in range(200):
        runs = np.asarray(least)[draw.choice(len(p), size=199, p=p / p.sum())] + 1e-4 * draw.normal(size=199)
        cut.append((runs[99:] < float(made.method(jnp.asarray(runs[:99]), 0.1))).mean())
    # Without ties the share is k/(n + 1) = .1.
    assert_mean(np.array(cut), 0.1, errors=4)


# As eval.decode builds them -------------------------------------------------------------------------------------------

COUNTS = ("soft_best_of_n", "power_by_quest", "power_by_smc", "weak_to_strong_search", "ensemble_lower_bound")
COUNTS += ("inference_time_pessimism", "guided_draft")


@pytest.fixture(scope="module")
def given():
    """What a method receives: a tiny base, and models of every name that the gallery asks for."""
    lm, params = tiny_lm(0)
    reward_lm, reward_params = tiny_lm(1, "reward")
    roles = {name: tiny_lm(4) for name in ("expert", "amateur", "aligned", "one", "two", "arm", "draft", "other")}
    roles |= {name: tiny_lm(3, "q") for name in ("value", "value_one", "value_two")}
    roles |= dict.fromkeys(("reward", "reward_one", "reward_two"), (reward_lm, reward_params))
    limits = {"max_new_tokens": 4, "eos_ids": (0,), "temperature": 1.0}
    proxy = rewards.from_model(reward_lm)
    return evaluation.MethodInputs(
        policies.language_model(lm), params, proxy, reward_params, tokenizer(), limits, 0.5, roles
    )


@pytest.mark.parametrize("name", FILES)
def test_every_method_is_traced_as_eval_decode_builds_it(given, name):
    """Shapes and kinds of what it gives; nothing is compiled."""
    own = given._replace(strength=2.0 if name in COUNTS else 0.5)
    draw = module(name).build(own)
    prompts = prompt_batch([[1, 2, 3], [4, 5]])._replace(index=jnp.arange(2, dtype=jnp.int32))
    found = jax.eval_shape(lambda: draw(jax.random.key(0), prompts))
    completions = found.completions if isinstance(found, Decoded) else found
    assert isinstance(completions, Completions)
    assert completions.tokens.shape == (2, 4)


def test_a_method_of_the_gallery_in_eval_decode(folders, tmp_path, monkeypatch):
    """GenARM of one objective at weight 1 is the built-in GenARM at beta 1, token by token; models come by name."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(FILES["genarm_objectives"].parent))
    named = ["--with-model", f"one={folders['arm']}", "--with-model", f"two={folders['base']}"]
    specs = methods("genarm_objectives:build@1,0.5", f"genarm:{folders['arm']}@1")
    from eval import decode

    decode.main(arguments(folders, tmp_path / "out", *specs, *named))
    rows = {(row["method"].split(":")[0], row["beta"]): row for row in rows_of(tmp_path / "out")}
    assert rows["genarm_objectives", 1.0]["kl"] == rows["genarm", 1.0]["kl"]
    assert rows["genarm_objectives", 0.5]["kl"] != rows["genarm", 1.0]["kl"]
    for wrong, match in (("one", "expected NAME=DIR"), ("two=x", "each name once")):
        with pytest.raises(ValueError, match=f"with_model: {match}|with_model: .*{match}"):
            decode.main(arguments(folders, tmp_path / "wrong", *specs, *named, "--with-model", wrong))
    with pytest.raises(ValueError, match=r"with_model: expected one=DIR, which the method reads, found \[\]"):
        decode.main(arguments(folders, tmp_path / "none", *methods("genarm_objectives:build@1")))


# The page -------------------------------------------------------------------------------------------------------------


def test_the_page_of_methods_is_that_of_the_files():
    assert write_methods.PAGE.read_text() == write_methods.written()


@pytest.mark.parametrize("name", FILES)
def test_a_method_says_its_source_equation_use_and_cost_in_ten_lines(name):
    entry = write_methods.entry(pathlib.Path(FILES[name]))
    assert all(entry.fields[field] for field in write_methods.FIELDS)
    assert entry.body.count("\n") <= 11
