"""Functions, tables and shapes of the user's that rewards, transforms and trees refuse, and builders traced once."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign import infalign, rewards, shaping, tree
from jaxalign.rewards import prefixes
from jaxalign.types import CheckedReward, TokenBatch
from tests.conftest import needs_jit, tiny_lm

TOKENS = jnp.array([[1, 2, 3], [4, 5, 6]])
TEXTS = (TOKENS, jnp.ones((2, 3), bool), jnp.array([1, 1]))
INDEX = jnp.array([0, 1])
PROMPTS = TokenBatch(TOKENS[:, :1], jnp.ones((2, 1), bool), INDEX)


def length(params, tokens, mask, prompt_length, index):
    return mask.sum(axis=1) - prompt_length * 1.0


WRONG = {
    "column": lambda n: jnp.zeros((n, 1)),
    "scalar": lambda n: jnp.zeros(()),
    "longer": lambda n: jnp.zeros(n + 1),
    "complex": lambda n: jnp.zeros(n, complex),
    "bool": lambda n: jnp.zeros(n, bool),
    "none": lambda n: None,
    "strings": lambda n: ["a"] * n,
    "ragged": lambda n: [[1.0]] + [1.0] * (n - 1),
}


@pytest.mark.parametrize("kind", WRONG)
def test_a_reward_that_is_not_one_number_per_text_is_named(kind):
    def bad(params, tokens, mask, prompt_length, index):
        return WRONG[kind](tokens.shape[0])

    match = r"bad: expected one real number per text, shape \(2,\)"
    with pytest.raises(ValueError, match=match):
        rewards.call_reward(bad, None, *TEXTS, INDEX)
    with pytest.raises(ValueError, match=match):
        jax.jit(rewards.weighted_sum([bad]))({"rewards": [None], "weights": jnp.ones(1)}, *TEXTS, INDEX)
    with pytest.raises(ValueError, match=match):
        rewards.map_reward(bad, lambda p, r, i: r)({"reward": None, "map": None}, *TEXTS, INDEX)
    whole = prefixes.prefix_reward(functools.partial(bad))
    with pytest.raises(ValueError, match=match):
        whole.score(None, whole.init(None, PROMPTS, 2), TOKENS[:, None, 1:], jnp.ones((2, 1, 2), bool))


@pytest.mark.parametrize("kind", WRONG)
def test_maps_and_programs_that_do_not_give_one_number_per_text_are_named(kind):
    def bad(*arguments):
        return WRONG[kind](2)

    match = r"bad: expected one real number per text, shape \(2,\)"
    with pytest.raises(ValueError, match=match):
        rewards.map_reward(length, bad)({"reward": None, "map": None}, *TEXTS, INDEX)
    for program in (rewards.from_numpy(bad), rewards.from_text(str, bad)):
        with pytest.raises(Exception, match=match):
            jax.block_until_ready(program(None, *TEXTS, INDEX))


def test_a_prefix_of_the_wrong_shape_is_named():
    whole = prefixes.whole_text(length)
    flat = whole._replace(score=lambda *a: (whole.score(*a)[0][:, 0], whole.score(*a)[1]))
    total = rewards.weighted_sum([CheckedReward(length, prefix=flat)])
    params = {"rewards": [None], "weights": jnp.ones(1)}
    state = total.prefix.init(params, PROMPTS, 2)
    with pytest.raises(ValueError, match=r"length: expected one real number per text, shape \(2, 1\), found shape"):
        total.prefix.score(params, state, TOKENS[:, None, 1:], jnp.ones((2, 1, 2), bool))


TABLES = {
    "shaped": (rewards.shaped(length), {"threshold": jnp.zeros(2), "bound": 1.0}),
    "soft": (rewards.shaped(length, sharpness=2.0), {"threshold": jnp.zeros(2), "bound": 1.0}),
    "calibrated": (rewards.calibrated(length), {"table": jnp.array([[0.0, 1.0], [2.0, 3.0]])}),
}


@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize("outside", [-1, 2])
def test_an_index_outside_a_table_is_an_error_or_nan(name, outside):
    reward, table = TABLES[name]
    params, index = {"reward": None, "map": table}, jnp.array([0, outside])
    match = "expected a table with a row for each prompt's index"
    with pytest.raises(ValueError, match=match):
        reward(params, *TEXTS, index)
    with pytest.raises(ValueError, match=match):
        reward.check(params, PROMPTS._replace(index=index), 2)
    found = jax.jit(reward)(params, *TEXTS, index)
    np.testing.assert_array_equal(np.isnan(found), [False, True])
    np.testing.assert_array_equal(jax.jit(reward)(params, *TEXTS, INDEX), reward(params, *TEXTS, INDEX))


@pytest.mark.parametrize(
    ("reward", "table", "match"),
    [
        (
            rewards.shaped(length),
            {"threshold": np.zeros((2, 1)), "bound": 1.0},
            r"threshold: expected shape \[prom",
        ),
        (rewards.shaped(length), {"threshold": np.array([0, np.nan]), "bound": 1.0}, "threshold: expected numbers"),
        (rewards.shaped(length), {"threshold": np.zeros(2), "bound": np.ones(2)}, "bound: expected one number"),
        (rewards.shaped(length), {"threshold": np.zeros(2), "bound": -1.0}, "bound: expected a value > 0"),
        (rewards.calibrated(length), {"table": np.zeros(3)}, r"table: expected shape \[prompts,K\]"),
        (rewards.calibrated(length), {"table": np.zeros((2, 1))}, "table: expected at least 2 samples"),
        (rewards.calibrated(length), {"table": np.array([[0.0, np.inf], [0, 1]])}, "table: expected finite rewards"),
        (rewards.calibrated(length), {"table": np.array([[1.0, 0.0], [0, 1]])}, "table: expected ascending rewards"),
        (rewards.calibrated(length), {"tabel": np.zeros((2, 2))}, r"params\['map'\]: expected an entry table"),
    ],
)
def test_a_table_of_the_wrong_form_is_named(reward, table, match):
    with pytest.raises(ValueError, match=match):
        reward.check({"reward": None, "map": table}, PROMPTS, 2)


def test_a_row_that_is_not_ascending_gives_nan_under_jit():
    params = rewards.MapParams(None, rewards.CalibratedParams(jnp.array([[1.0, 0.0], [0.0, 1.0]])))
    found = jax.jit(rewards.calibrated(length))(params, *TEXTS, INDEX)
    np.testing.assert_array_equal(np.isnan(found), [True, False])


def test_params_name_the_entry_and_its_path_and_may_be_named_tuples():
    total = rewards.weighted_sum([rewards.map_reward(length, lambda p, r, i: p * r), length])
    given = rewards.WeightedSumParams((rewards.MapParams(None, 2.0), None), jnp.array([1.0, 0.5]))
    same = {"rewards": [{"reward": None, "map": 2.0}, None], "weights": jnp.array([1.0, 0.5])}
    np.testing.assert_array_equal(total(given, *TEXTS, INDEX), total(same, *TEXTS, INDEX))
    with pytest.raises(ValueError, match=r"params\['rewards'\]\[0\]: .*missing map; unknown mpa"):
        total.check({**same, "rewards": [{"reward": None, "mpa": 2.0}, None]}, PROMPTS, 2)
    with pytest.raises(ValueError, match=r"params: expected entries rewards, weights; found .*unknown extra"):
        total.check({**same, "extra": 1}, PROMPTS, 2)
    with pytest.raises(ValueError, match=r"weights: expected 2 weights and as many params, found shape \(2, 2\)"):
        total.check({**same, "weights": jnp.ones((2, 2))}, PROMPTS, 2)  # weights per prompt


def test_nan_is_not_paid_zero():
    found = shaping.threshold_reward(jnp.array([jnp.nan, 2.0]), threshold=1.0, bound=3.0)
    np.testing.assert_array_equal(found, [np.nan, 3])
    np.testing.assert_array_equal(shaping.threshold_reward(jnp.ones(2), threshold=jnp.nan, bound=3.0), [np.nan] * 2)


def test_transforms_rules_and_win_rates_of_another_shape_are_named():
    for bad in (lambda c: c.sum(), lambda c: c[..., None], lambda c: None):
        for call in (
            lambda bad=bad: infalign.check_increasing(bad),
            lambda bad=bad: infalign.tilted_curve(bad, beta=1.0),
            lambda bad=bad: infalign.match_kl(bad, kl=1.0),
        ):
            with pytest.raises(ValueError, match=r"transform .*: expected real numbers of shape"):
                call()
    with pytest.raises(ValueError, match="values that do not decrease"):
        rewards.calibrated(length, transform=lambda c: -c)
    with pytest.raises(ValueError, match=r"win_rate .*: expected one real number, found shape"):
        infalign.solve(lambda prob: prob, jnp.zeros(3), beta=1.0)
    with pytest.raises(ValueError, match=r"rule .*: expected a probability per draw"):
        infalign.enumerated(jnp.full(2, 0.5), lambda drawn: jnp.ones(drawn.shape[0]), 2)


TREE = tree.Tree(2, 2, None)
LOG_REF, REWARD = jnp.full((3, 2), -np.log(2.0)), jnp.arange(4.0)


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: tree.value(TREE, REWARD, LOG_REF), r"log_policy: expected a table \[S,V\] of shape \(3, 2\)"),
        (lambda: tree.soft_value(TREE, LOG_REF, REWARD[:3], beta=1.0), r"reward: expected a table \[M\]"),
        (lambda: tree.max_value(TREE, LOG_REF[:2], REWARD), "log_ref: expected a table"),
        (lambda: tree.q_values(TREE, REWARD, reward=jnp.zeros(3)), r"values: expected a table \[S\]"),
        (lambda: tree.response_log_prob(TREE, LOG_REF[None]), "log_policy: expected a table"),
        (lambda: tree.state_log_prob(TREE, LOG_REF[:, :1]), "log_policy: expected a table"),
        (lambda: tree.policy_of(TREE, REWARD[:3]), "log_prob: expected a table"),
        (lambda: tree.optimal_log_prob(TREE, LOG_REF, jnp.zeros(()), beta=1.0), "reward: expected a table"),
        (lambda: tree.step_kl(TREE, LOG_REF, LOG_REF[:1]), "log_q: expected a table"),
        (lambda: tree.greedy_response(TREE, LOG_REF[:1]), "log_policy: expected a table"),
        (lambda: tree.blockwise_bound(TREE, REWARD[:3], num_samples=2, block_size=1), "log_prob: expected a table"),
    ],
)
def test_a_table_of_another_trees_shape_is_named(call, match):
    with pytest.raises(ValueError, match=match):
        call()


@pytest.mark.parametrize("outside", [-1, 2])
def test_a_trees_table_has_a_row_for_each_index_or_gives_nan(outside):
    prompts = tree.prompts(2)._replace(index=jnp.array([0, outside]))
    policy, table = tree.policy(TREE), jnp.stack([LOG_REF, LOG_REF])
    with pytest.raises(ValueError, match="row for each prompt's index"):
        policy.init(table, None, prompts, 2)
    _, output = jax.jit(policy.init, static_argnums=3)(table, None, prompts, 2)
    np.testing.assert_array_equal(np.isnan(output.log_prob).any(axis=1), [False, True])
    reward = tree.reward(TREE)
    text = jnp.zeros((2, 3), jnp.int32), jnp.ones((2, 3), bool), jnp.ones(2, jnp.int32), prompts.index
    found = jax.jit(reward)(jnp.ones((2, 4)), *text)
    np.testing.assert_array_equal(np.isnan(found), [False, True])
    with pytest.raises(ValueError, match="row for each prompt's index"):
        reward.check(jnp.ones((2, 4)), prompts, 2)


@needs_jit
def test_builders_called_inline_are_traced_once():
    lm, _ = tiny_lm(1, "reward", num_layers=1)
    arm, _ = tiny_lm(2, num_layers=1)
    double = lambda params, r, index: 2 * r  # noqa: E731
    numbers = lambda tokens, mask, prompt_length, index: mask.sum(1)  # noqa: E731
    count = lambda prompts, responses: [len(r) for r in responses]  # noqa: E731
    builders = {
        "from_model": lambda: rewards.from_model(lm),
        "log_likelihood": lambda: rewards.log_likelihood(arm),
        "token_gradient": lambda: rewards.token_gradient(lm),
        "from_numpy": lambda: rewards.from_numpy(numbers),
        "from_text": lambda: rewards.from_text(str, count),
        "map_reward": lambda: rewards.map_reward(rewards.from_model(lm), double),
        "shaped": lambda: rewards.shaped(rewards.from_model(lm), sharpness=2.0),
        "calibrated": lambda: rewards.calibrated(rewards.from_model(lm), transform=infalign.exponential(5.0)),
        "weighted_sum": lambda: rewards.weighted_sum([rewards.from_model(lm), rewards.from_text(str, count)]),
        "tree": lambda: tree.reward(tree.Tree(2, 2)),
    }
    for name, build in builders.items():
        traces: list[object] = []

        def use(reward, traces=traces):
            traces.append(reward)
            return jnp.zeros(())

        jitted, counts = jax.jit(use, static_argnums=0), []
        for _ in range(3):
            before = len(traces)
            jitted(build())
            counts.append(len(traces) - before)
        assert counts == [1, 0, 0], name
