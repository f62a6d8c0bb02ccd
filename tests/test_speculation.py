"""Speculation gives the target's law exactly, whatever the draft: by enumeration of what may be accepted and refused,
and by draws."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign import decoding, policies, tree
from jaxalign._arrays import NEGATIVE
from jaxalign.decoding._speculative import accepts, log_accept, log_residual
from jaxalign.types import Params, Policy

RAGGED = tree.Tree(3, 3, eos_id=0)
PROPOSED, SCORED = tree.policy(RAGGED), tree.critic(RAGGED, "level")
NORMAL = np.random.default_rng(11)
BASE, OTHER, Q = (jnp.asarray(NORMAL.normal(size=(13, 3))) for _ in range(3))
ADDED = tree.critic(RAGGED, "increment")


class Case(NamedTuple):
    policy: Policy
    params: Params


def tilted(critic=SCORED, top_k=None, below=PROPOSED, params=BASE, beta=0.7) -> Case:
    return Case(policies.tilt(below, critic, top_k=top_k), {"policy": params, "critic": Q, "beta": jnp.asarray(beta)})


LEVEL = tilted()
TARGETS = {
    "base": Case(PROPOSED, BASE),
    "level": LEVEL,
    "increment": tilted(ADDED),
    "two of three": tilted(top_k=2),
    "nested": tilted(ADDED, below=LEVEL.policy, params=LEVEL.params, beta=1.5),
    "mixture": Case(
        policies.mix([LEVEL.policy, PROPOSED]), {"policies": [LEVEL.params, OTHER], "weights": jnp.array([0.3, 0.7])}
    ),
    "temperature": Case(policies.temperature(LEVEL.policy), {"policy": LEVEL.params, "temperature": jnp.asarray(0.5)}),
}
DRAFTS = {
    "base": Case(PROPOSED, BASE),
    "another": Case(PROPOSED, OTHER),
    "the level target": LEVEL,
    "one token": Case(policies.top_k(PROPOSED, 1), BASE),
}


@functools.cache
def law_of(name: str, kind: str) -> np.ndarray:
    """log pi(z|s) [S,V] of a case at every state of the tree that a response may come through; elsewhere NaN."""
    policy, params = (TARGETS if kind == "target" else DRAFTS)[name]
    with jax.enable_x64(True):
        params = jax.tree.map(lambda x: jnp.asarray(np.asarray(x), jnp.float64), params)
        paths = np.array([[a, b] for a in range(3) for b in range(3)])
        state, output = policy.init(params, jax.random.key(0), tree.prompts(9), 3)
        found = np.full((13, 3), np.nan)
        node = np.zeros(9, int)
        for t in range(3):
            found[node] = output.log_prob
            if t < 2:
                state, output = policy.step(params, jax.random.key(0), state, jnp.asarray(paths[:, t]))
                node = 3 * node + 1 + paths[:, t]
    return found


class Exact(NamedTuple):
    response: dict[tuple[int, ...], float]
    rounds: float
    accepted: float
    first_round: float


def enumerate_paths(target: np.ndarray, draft: np.ndarray, tokens: int, residual=None, below=False) -> Exact:
    """The law of responses, and what is expected of rounds and accepted tokens, over all ways to accept and refuse."""
    with jax.enable_x64(True):
        ratio = np.exp(np.minimum(0, np.asarray(log_accept(jnp.asarray(target), jnp.asarray(draft)))))
        left = np.asarray((residual or log_residual)(jnp.asarray(target), jnp.asarray(draft)))
    left = np.exp(left - left.max(axis=-1, keepdims=True))
    left /= left.sum(axis=-1, keepdims=True)
    pi, d = np.exp(target), np.exp(draft)
    response: dict[tuple[int, ...], float] = {}
    counts = {"rounds": 0.0, "accepted": 0.0, "first": 0.0}

    def over(text):
        return len(text) == 3 or (text and text[-1] == 0)

    def go(text, node, mass, drafted, first):
        """From a text whose last `drafted` tokens were drafted in this round."""
        if mass == 0:
            return
        if over(text):
            response[text] = response.get(text, 0) + mass
            return
        if drafted == tokens:
            for x in range(3):
                begin((*text, x), 3 * node + 1 + x, mass * pi[node, x])
            return
        refused = 0.0
        for z in range(3):
            passed = mass * d[node, z] * ratio[node, z]
            refused += mass * d[node, z] * (1 - ratio[node, z])
            counts["accepted"] += passed
            counts["first"] += first * passed
            go((*text, z), 3 * node + 1 + z, passed, drafted + 1, first)
        for x in range(3):
            begin((*text, x), 3 * node + 1 + x, refused * left[node, x])

    def begin(text, node, mass):
        counts["rounds"] += 0 if over(text) else mass
        go(text, node, mass, 0, not text)

    if below:  # the first token is the target's own
        for x in range(3):
            begin((x,), 1 + x, pi[0, x])
    else:
        begin((), 0, 1.0)
    return Exact(response, counts["rounds"], counts["accepted"], counts["first"])


def probability(target: np.ndarray, text: tuple[int, ...]) -> float:
    node, total = 0, 0.0
    for z in text:
        total, node = total + target[node, z], 3 * node + 1 + z
    return float(np.exp(total))


def test_a_uniform_number_of_zero_accepts_no_token_of_probability_zero():
    ratio = log_accept(jnp.array([-1.0, NEGATIVE, 2 * NEGATIVE, -1.0]), jnp.array([-0.5, -0.5, -1.0, -2.0]))
    np.testing.assert_array_equal(accepts(jnp.zeros(4), ratio), [True, False, False, True])
    np.testing.assert_array_equal(accepts(jnp.full(4, 0.7), ratio), [False, False, False, True])


@pytest.mark.parametrize("name", TARGETS)
def test_the_law_over_all_ways_to_accept_is_the_targets(name):
    target = law_of(name, "target")
    for draft in DRAFTS:
        for tokens in (1, 2, 3, 4):
            found = enumerate_paths(target, law_of(draft, "draft"), tokens)
            assert sum(found.response.values()) == pytest.approx(1, abs=1e-12)
            for text, mass in found.response.items():
                assert mass == pytest.approx(probability(target, text), abs=1e-12)


def test_expected_rounds_and_accepted_tokens_are_the_reference_numbers():
    target, draft = law_of("level", "target"), law_of("base", "draft")
    wanted = {1: (1.2628, 0.8550, 0.721381), 2: (1.1293, 1.0880, 1.026353), 3: (1.1293, 1.1664, 1.104798)}
    for tokens, (rounds, accepted, first) in wanted.items():
        found = enumerate_paths(target, draft, tokens)
        assert found.rounds == pytest.approx(rounds, abs=6e-5)
        assert found.accepted == pytest.approx(accepted, abs=6e-5)
        assert found.first_round == pytest.approx(first, abs=6e-7)


def test_the_target_in_place_of_the_residual_is_another_law():
    target = law_of("level", "target")
    found = enumerate_paths(target, law_of("base", "draft"), 2, residual=lambda log_prob, log_draft: log_prob)
    first = [sum(mass for text, mass in found.response.items() if text[0] == z) for z in range(3)]
    assert 0.5 * np.abs(np.array(first) - np.exp(target[0])).sum() == pytest.approx(0.10885, abs=5e-6)


# The decoder ----------------------------------------------------------------------------------------------------------

DRAWS = 20_000


def draw(target: Case, draft: Case, tokens: int, batch: int = DRAWS, steps: int = 3, **more):
    both = {"target": target.params, "draft": draft.params}
    return decoding.speculative(
        target.policy,
        draft.policy,
        both,
        jax.random.key(tokens),
        tree.prompts(batch),
        draft_tokens=tokens,
        max_new_tokens=steps,
        **more,
    )


def assert_law(found, target: np.ndarray, exact: Exact):
    """Frequencies, rounds and accepted tokens within 4.5 standard errors: a right program fails once in 10^4 runs of
    the whole set."""
    texts = [
        tuple(row[:n].tolist())
        for row, n in zip(*map(np.asarray, (found.completions.tokens, found.completions.mask.sum(axis=1))), strict=True)
    ]
    for text in {*texts, *exact.response}:
        p = probability(target, text)
        assert abs(texts.count(text) / DRAWS - p) < 4.5 * np.sqrt(p * (1 - p) / DRAWS) + 1e-9, text
    for name in ("rounds", "accepted"):
        each = np.asarray(getattr(found.info, name))
        assert abs(each.mean() - getattr(exact, name)) < 4.5 * each.std() / np.sqrt(DRAWS) + 1e-6, name


@pytest.mark.parametrize(
    ("name", "draft", "tokens"),
    [("level", "base", 1), ("two of three", "another", 2), ("nested", "another", 4), ("mixture", "one token", 2)],
)
def test_draws_have_the_targets_law_and_its_records(name, draft, tokens):
    target = TARGETS[name]
    found = draw(target, DRAFTS[draft], tokens)
    exact = enumerate_paths(law_of(name, "target"), law_of(draft, "draft"), tokens)
    assert_law(found, law_of(name, "target"), exact)
    own = decoding.log_prob(
        target.policy,
        target.params,
        jax.random.key(0),
        tree.prompts(DRAWS),
        found.completions.tokens,
        found.completions.mask,
    )
    for field in ("log_prob", "log_prob_ref", "log_norm", "kl"):
        np.testing.assert_allclose(getattr(found.completions, field), getattr(own, field), rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(found.completions.finished, own.finished)
    np.testing.assert_allclose(found.kl.value, own.kl.sum(axis=1), rtol=1e-5, atol=1e-5)


def test_the_policy_below_serves_as_the_draft():
    found = decoding.speculative(
        LEVEL.policy,
        "below",
        {"target": LEVEL.params},
        jax.random.key(3),
        tree.prompts(DRAWS),
        draft_tokens=2,
        max_new_tokens=3,
    )
    target = law_of("level", "target")
    assert_law(found, target, enumerate_paths(target, law_of("base", "draft"), 2, below=True))


def test_a_draft_that_is_the_target_is_always_accepted():
    found = draw(LEVEL, LEVEL, 2, batch=500)
    np.testing.assert_array_equal(found.info.accepted, found.info.drafted)
    length = found.completions.mask.sum(axis=1)
    np.testing.assert_array_equal(found.info.rounds, 1 + 0 * length)  # 2 accepted and one more are a whole response


def test_a_draft_without_common_tokens_is_always_refused():
    far = Case(PROPOSED, jnp.full((13, 3), -1e20).at[:, 0].set(0.0))
    target = Case(PROPOSED, BASE.at[:, 0].set(-1e20))
    found = draw(target, far, 2, batch=500)
    assert int(found.info.accepted.sum()) == 0
    np.testing.assert_array_equal(found.info.rounds, 3)
    assert bool((found.completions.tokens > 0).all())
    assert bool(found.completions.truncated.all())


@pytest.mark.parametrize("steps", [1, 2])
def test_limits_hold_inside_a_draft(steps):
    found = draw(LEVEL, DRAFTS["another"], 4, batch=300, steps=steps)
    texts = found.completions
    assert int(texts.mask.sum(axis=1).max()) == steps
    ends = (texts.mask & (texts.tokens == 0)).any(axis=1)
    np.testing.assert_array_equal(texts.finished, ends)
    np.testing.assert_array_equal(texts.truncated, ~ends)
    assert int(found.info.drafted.max()) <= steps * found.info.rounds.max()


def test_a_row_alone_is_the_row_among_others():
    together = draw(LEVEL, DRAFTS["another"], 2, batch=12)
    for b in (0, 7, 11):
        alone = decoding.speculative(
            LEVEL.policy,
            PROPOSED,
            {"target": LEVEL.params, "draft": OTHER},
            jax.random.key(2),
            tree.prompts(1)._replace(index=jnp.array([b])),
            draft_tokens=2,
            max_new_tokens=3,
        )
        for left, right in zip(jax.tree.leaves(alone), jax.tree.leaves(together), strict=True):
            np.testing.assert_array_equal(left[0], right[b])


@pytest.mark.parametrize(
    ("draft", "changes", "message"),
    [
        (PROPOSED, {"draft_tokens": 0}, "draft_tokens: expected at least 1, found 0"),
        (tree.policy(tree.Tree(4, 3, eos_id=0)), {}, "draft: expected one vocabulary, found 3 and 4 tokens"),
        (SCORED, {}, "draft: expected a Policy, found a Critic"),
        (PROPOSED, {"prompts": {"target": tree.prompts(2), "draft": tree.prompts(3)}}, "expected 3 prompts as in"),
        (PROPOSED, {"params": {"target": LEVEL.params}}, "missing draft"),
        ("below", {}, 'expected no entry .draft. with draft="below"'),
        ("below", {"params": {"target": LEVEL.params}, "temperature": 0.5}, "temperature: expected 1 with draft"),
        ("below", {"target": PROPOSED, "params": {"target": BASE}}, "a target that is no tilt"),
    ],
)
def test_what_cannot_be_is_refused_by_name(draft, changes, message):
    given = {"target": LEVEL.policy, "params": {"target": LEVEL.params, "draft": BASE}, "prompts": tree.prompts(2)}
    given |= {"draft_tokens": 2, "max_new_tokens": 3} | changes
    target, params, prompts = (given.pop(name) for name in ("target", "params", "prompts"))
    with pytest.raises(ValueError, match=message):
        decoding.speculative(target, draft, params, jax.random.key(0), prompts, **given)
