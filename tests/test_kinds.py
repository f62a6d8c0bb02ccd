"""Critics from policies, increments from levels and back, on a tree: equal laws, and tokens outside a support."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign import critics, policies, testing, tree
from jaxalign._arrays import NEGATIVE, is_supported
from jaxalign.types import StepOutput
from tests import exact
from tests.conftest import PROMPTS, padded

TREE = tree.Tree(4, 3)
LEVEL, INCREMENT = tree.critic(TREE, "level"), tree.critic(TREE, "increment")
BASE = tree.policy(TREE)


@pytest.fixture(scope="module")
def tables():
    """(log pi, log pi', q), each [S,V]."""
    base, other, q = jax.random.normal(jax.random.key(7), (3, TREE.num_states, 4), dtype=float)
    return jax.nn.log_softmax(base), jax.nn.log_softmax(other), q


@pytest.mark.parametrize("top_k", [None, 2])
def test_the_log_probability_of_a_tilt_is_the_table_of_it(tables, top_k):
    """from_policy(tilt) as a critic has the law of the table that backward induction gives for that tilt."""
    base, other, q = tables
    inner = policies.tilt(BASE, LEVEL)
    table = jax.nn.log_softmax(other + q / 0.7)
    found = exact.completions(
        TREE,
        policies.tilt(BASE, critics.from_policy(inner), top_k=top_k),
        {"policy": base, "critic": policies.TiltParams(other, q, 0.7), "beta": 1.3},
    )
    expected = exact.completions(
        TREE,
        policies.tilt(BASE, INCREMENT, top_k=top_k),
        {"policy": base, "critic": table, "beta": 1.3},
    )
    for name in ("log_prob", "log_norm", "kl"):
        np.testing.assert_allclose(getattr(found, name), getattr(expected, name), atol=2e-6, err_msg=name)


def test_levels_and_increments_are_one_law_and_one_log_norm(tables):
    base, _, q = tables
    params = {"policy": base, "critic": q, "beta": 0.7}
    for one, two in ((LEVEL, critics.increment_of(LEVEL)), (INCREMENT, critics.level_of(INCREMENT))):
        assert {one.kind, two.kind} == {"level", "increment"}
        found, other = (exact.completions(TREE, policies.tilt(BASE, critic), params) for critic in (one, two))
        for name in ("log_prob", "log_norm"):
            np.testing.assert_allclose(getattr(found, name), getattr(other, name), atol=3e-6, err_msg=name)
    back = critics.level_of(critics.increment_of(LEVEL))
    assert back.kind == "level"
    np.testing.assert_allclose(
        exact.tilted_law(TREE, base, back, q, beta=0.7), exact.tilted_law(TREE, base, LEVEL, q, beta=0.7), atol=3e-6
    )


def test_a_value_and_a_policy_in_one_sum_are_the_nested_tilts(tables):
    """V/beta + w·log pi' at once is the tilt by V of the tilt by w·log pi'."""
    base, other, q = tables
    both = critics.weighted_sum([critics.increment_of(LEVEL), critics.from_policy(BASE)])
    params = critics.WeightedSumParams([q, other], jnp.array([1 / 0.7, 0.4]))
    found = exact.tilted_law(TREE, base, both, params, beta=1.0)
    inner = policies.tilt(BASE, critics.from_policy(BASE))
    nested = policies.tilt(inner, LEVEL)
    expected = exact.log_law(
        TREE, nested, {"policy": {"policy": base, "critic": other, "beta": 1 / 0.4}, "critic": q, "beta": 0.7}
    )
    np.testing.assert_allclose(found, expected, atol=3e-6)


@pytest.mark.parametrize(("weight", "beta"), [(-1.5, 1.0), (0.5, 5.0), (0.0, 1.0)])
def test_a_token_outside_a_support_is_outside_the_sums(tables, weight, beta):
    """Whatever the sign of the weight and the size of beta; a weight of 0 takes the part away."""
    base, other, _ = tables
    cut = policies.top_k(BASE, 2)
    both = critics.weighted_sum([critics.from_policy(BASE), critics.from_policy(cut)])
    tilted = policies.tilt(BASE, both)
    params = {"policy": base, "critic": {"critics": [base, other], "weights": jnp.array([0.3, weight])}, "beta": beta}
    output = tilted.init(params, jax.random.key(0), tree.prompts(2), 3)[1]
    kept = np.sort(jax.lax.top_k(other[0], 2)[1]) if weight else np.arange(4)
    np.testing.assert_array_equal(np.flatnonzero(is_supported(output.log_prob[0])), kept)
    second = jax.nn.log_softmax(other[0, kept])  # of the two tokens that are kept
    expected = jax.nn.log_softmax(base[0, kept] + (0.3 * base[0, kept] + weight * second) / beta)
    np.testing.assert_allclose(output.log_prob[0, kept], expected, atol=2e-6)

    def total(given):
        scored = exact.completions(TREE, tilted, given)
        return jnp.where(scored.in_support[:, None], scored.log_prob, 0).sum()

    gradient = jax.grad(total)(params | {"beta": jnp.asarray(beta)})
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))


def test_a_tilt_that_leaves_no_token_is_the_policy(tables):
    """The candidates' supports do not meet: the policy below stays, and nothing is drawn outside it."""
    base = tables[0]
    none = critics.from_policy(policies.top_k(BASE, 1))
    tilted = policies.tilt(policies.top_k(BASE, 1), none)
    params = {"policy": base, "critic": -base, "beta": 0.5}
    output = tilted.init(params, jax.random.key(0), tree.prompts(1), 3)[1]
    best, worst = int(base[0].argmax()), int(base[0].argmin())
    assert best != worst
    np.testing.assert_allclose(np.exp(output.log_prob[0, best]), 1)
    assert not is_supported(output.log_prob[0, worst])


def test_a_text_outside_the_support_has_weight_zero_by_either_kind(tables):
    """Where a state's tokens are all outside the critic's support the policy below stays, and the text weighs nothing
    from there on, also where later tokens are inside."""
    base, _, q = tables
    q = q.at[2].set(NEGATIVE).at[0, 3].set(NEGATIVE)
    for one, two in ((INCREMENT, critics.level_of(INCREMENT)), (LEVEL, critics.increment_of(LEVEL))):
        found, other = (
            exact.completions(TREE, policies.tilt(BASE, critic), {"policy": base, "critic": q, "beta": 0.7})
            for critic in (one, two)
        )
        np.testing.assert_allclose(found.log_prob, other.log_prob, atol=3e-6)
        np.testing.assert_allclose(found.log_norm, other.log_norm, atol=3e-6)
        first, weight = np.asarray(found.tokens[:, 0]), np.asarray(found.log_norm.sum(axis=1))
        assert not is_supported(weight[first == 1]).any()  # these come through state 2
        assert np.abs(weight[(first == 0) | (first == 2)]).max() < 100


@pytest.mark.parametrize("kind", ["level", "increment"])
def test_blocks_outside_the_support_are_read_as_steps(tables, kind):
    """After the first token the only candidate is outside the critic's support: the score of the text so far stays."""
    base, _, q = tables
    second = (jnp.arange(TREE.num_states) > 0) & (jnp.arange(TREE.num_states) < 5)
    other = jnp.where(second[:, None], -base, base)
    critic = critics.level_of(critics.from_policy(policies.top_k(policies.tilt(BASE, LEVEL), 2)))
    critic = critics.increment_of(critic) if kind == "increment" else critic
    policy = policies.tilt(BASE, critic, top_k=1)
    params = {"policy": base, "critic": {"policy": other, "critic": 0 * q, "beta": 0.7}, "beta": 0.5}
    start, output = policy.init(params, jax.random.key(0), tree.prompts(1), 3)
    state, outputs, tokens = start, [], []
    for _ in range(3):
        tokens.append(output.log_prob.argmax(axis=-1))
        state, output = policy.step(params, jax.random.key(0), state, tokens[-1])
        outputs.append(output)
    block = jnp.stack(tokens[:2], axis=1)
    found, proposal = policy.verify(params, jax.random.key(0), start, block, jnp.ones((1, 2), bool))
    for t in range(2):
        np.testing.assert_allclose(found.log_norm[:, t], outputs[t].log_norm, atol=1e-5)
        np.testing.assert_allclose(found.log_prob[:, t], outputs[t].log_prob, atol=1e-5)
    moved = policy.accept(params, proposal, jnp.array([2]))
    output = policy.step(params, jax.random.key(0), moved, tokens[2])[1]
    np.testing.assert_allclose(output.log_norm, outputs[2].log_norm, atol=1e-5)
    assert [bool(is_supported(one.log_norm[0])) for one in outputs] == [False, True, True]


def test_the_other_kind_keeps_the_beta_and_refuses_its_own(tables):
    only = LEVEL._replace(beta=0.5)
    assert critics.increment_of(only).beta == 0.5
    assert critics.level_of(critics.increment_of(only)).beta == 0.5
    with pytest.raises(ValueError, match="critic: expected a critic of kind 'level', found 'increment'"):
        critics.increment_of(INCREMENT)
    with pytest.raises(ValueError, match="critic: expected a critic of kind 'increment', found 'level'"):
        critics.level_of(LEVEL)
    with pytest.raises(ValueError, match="critic: expected a Critic, found a Policy"):
        critics.increment_of(BASE)
    with pytest.raises(ValueError, match="policy: expected a Policy, found a Critic"):
        critics.from_policy(LEVEL)


def test_a_policy_that_draws_is_stepped_with_the_key_of_the_scoring():
    def output(rng, batch):
        log_prob = jax.nn.log_softmax(jax.random.normal(rng, (batch, 4)))
        return StepOutput(log_prob, log_prob, jnp.zeros(batch))

    random = BASE._replace(
        init=lambda params, rng, prompts, new: (jnp.zeros(3), output(rng, 3)),
        step=lambda params, rng, state, token: (state, output(rng, 3)),
        check=None,
    )
    critic, one, two = critics.from_policy(random), jax.random.key(3), jax.random.key(4)
    state = critic.init(None, one, tree.prompts(3), 3)
    q, proposal = critic.score(None, two, state, None, None)
    np.testing.assert_array_equal(q, output(one, 3).log_prob)
    moved = critic.advance(None, proposal, jnp.array([1, -1, 2]))
    q, proposal = critic.score(None, two, moved, None, None)
    np.testing.assert_array_equal(q[::2], output(two, 3).log_prob[::2])
    np.testing.assert_array_equal(q[1], output(one, 3).log_prob[1])
    np.testing.assert_array_equal(critic.score(None, one, proposal, None, None)[0], q)  # nothing is pending


def text_score_of(kind_of):
    """The score of a text: the table's last entry (level) or its sum along the text."""

    def text_score(params, prompts, tokens):
        node, total = jnp.zeros(tokens.shape[0], jnp.int32), jnp.zeros(tokens.shape[0])
        for token in tokens.T:
            q = params[node, token]
            total = q if kind_of == "level" else total + q
            node = node * 4 + 1 + token
        return total

    return text_score


@pytest.mark.parametrize("name", ["from_policy", "increment_of", "level_of"])
def test_the_laws(tables, name):
    base, other, q = tables
    critic, params, text_score = {
        # A tilt of a tilt as a critic.
        "from_policy": (
            critics.from_policy(policies.tilt(BASE, critics.from_policy(BASE))),
            policies.TiltParams(base, other, jnp.asarray(0.8)),
            None,
        ),
        "increment_of": (critics.increment_of(LEVEL), q, text_score_of("level")),
        "level_of": (critics.level_of(INCREMENT), q, text_score_of("increment")),
    }[name]
    testing.check_critic(
        critic, params, padded(PROMPTS), policy=BASE, policy_params=base, max_new_tokens=3, text_score=text_score
    )
