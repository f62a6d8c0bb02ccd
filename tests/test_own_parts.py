"""What functions and models of one's own return is checked where it enters, under their names."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign import critics, decoding, policies
from tests import cases, faulty_parts
from tests.conftest import EOS, PROMPTS, VOCAB, padded
from tests.test_guards import BASE, LEVEL, LM, LM_PARAMS, OTHER, RNG, TABLE, half, sample, start

# Critics --------------------------------------------------------------------------------------------------------------


def own_critic(**changes):
    """A tabular critic with other functions in place of its own."""
    return LEVEL._replace(**changes)


def scored(change):
    def my_score(params, rng, state, output, candidates):
        return change(*LEVEL.score(params, rng, state, output, candidates))

    return own_critic(score=my_score)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (
            lambda q, p: (q[..., None], p),
            r"q: expected shape \(5, 3\), one score per row and candidate, found \(5, 3, 1\)",
        ),
        (lambda q, p: (q[:, 0], p), r"q: expected shape \(5, 3\).*found \(5,\)"),
        (lambda q, p: (q[:1], p), r"q: expected shape \(5, 3\).*found \(1, 3\)"),
        (lambda q, p: (q.astype(int), p), "q: expected floating-point numbers.*found int32"),
        (lambda q, p: q, r"expected a pair \(q, proposal\), found a"),
        (
            lambda q, p: (q, {"state": p, "t": jnp.zeros(())}),
            r"batch axis \(5\) first, found shape \(\) at \['t'\]",
        ),
    ],
)
def test_the_scores_of_a_critic_are_checked(change, match):
    critic = scored(change)
    for build, params in (
        (lambda c: policies.tilt(BASE, c, top_k=3), {"policy": TABLE, "critic": OTHER, "beta": 1.0}),
        (
            lambda c: policies.tilt(BASE, critics.map_scores(c, half), top_k=3),
            {"policy": TABLE, "critic": {"critic": OTHER, "map": None}, "beta": 1.0},
        ),
        (
            lambda c: policies.tilt(BASE, critics.weighted_sum([c]), top_k=3),
            {"policy": TABLE, "critic": {"critics": [OTHER], "weights": jnp.ones(1)}, "beta": 1.0},
        ),
        (
            lambda c: policies.tilt(BASE, critics.shaped_over_candidates(c, beta=1.0), top_k=3),
            {"policy": TABLE, "critic": {"critic": OTHER, "bound": 1.0}, "beta": 1.0},
        ),
    ):
        with pytest.raises(ValueError, match=r"critic.score \(.*my_score\)" + ".*" + match):
            start(build(critic), params)


def started(change):
    def my_init(params, rng, prompts, max_new_tokens):
        return change(LEVEL.init(params, rng, prompts, max_new_tokens))

    return own_critic(init=my_init)


def advanced(change):
    def my_advance(params, proposal, choice):
        return change(LEVEL.advance(params, proposal, choice))

    return own_critic(advance=my_advance)


def first_row(state):
    """One row for all: it broadcasts in every sum."""
    return jax.tree.map(lambda leaf: leaf[:1], state)


def growing():
    """A critic whose proposal has one more column at each token."""

    def my_init(params, rng, prompts, max_new_tokens):
        return LEVEL.init(params, rng, prompts, max_new_tokens), jnp.zeros((5, 1))

    def my_score(params, rng, state, output, candidates):
        q, proposal = LEVEL.score(params, rng, state[0], output, candidates)
        return q, (proposal, jnp.pad(state[1], ((0, 0), (0, 1))))

    def my_advance(params, proposal, choice):
        return LEVEL.advance(params, proposal[0], choice), proposal[1]

    return own_critic(init=my_init, score=my_score, advance=my_advance)


def plain(critic, params):
    """`decoding.sample` of the tilt."""
    sample(policies.tilt(BASE, critic, top_k=3), {"policy": TABLE, "critic": params, "beta": 1.0})


LOOPS = {
    "tilt": plain,
    "map_scores": lambda c, p: plain(critics.map_scores(c, half), {"critic": p, "map": None}),
    "weighted_sum": lambda c, p: plain(critics.weighted_sum([c]), {"critics": [p], "weights": jnp.ones(1)}),
    "shaped": lambda c, p: plain(critics.shaped_over_candidates(c, beta=1.0), {"critic": p, "bound": 1.0}),
    "re_control_expected": lambda c, p: sample(
        policies.re_control_expected(policies.language_model(LM), LM.logits, c, num_steps=1),
        {"policy": LM_PARAMS, "critic": p, "step_size": 0.1},
    ),
    "blockwise": lambda c, p: decoding.blockwise(
        BASE,
        c,
        {"policy": TABLE, "critic": p},
        RNG,
        padded(PROMPTS),
        num_samples=2,
        block_size=2,
        max_new_tokens=3,
        eos_ids=EOS,
    ),
}
"""Who runs a critic -> a call (critic, params)."""


@pytest.mark.parametrize("loop", LOOPS)
def test_the_states_of_a_critic_are_checked_where_they_are_made(loop):
    rows = r"batch axis \((5|10)\) first, found shape \(1,"
    dtype, weights = faulty_parts.critic("level", "dtype changes in advance"), faulty_parts.critic_params()
    for critic, params, match in (
        (started(first_row), OTHER, r"^critic.init \(.*my_init\): .*" + rows),
        (advanced(first_row), OTHER, r"^critic.advance \(.*my_advance\): .*" + rows),
        (dtype, weights, r"^critic.advance \(critic.*advance\): expected the state to keep .*float32 at .total, found"),
        (growing(), OTHER, r"^critic.(score|advance) \(.*expected the (proposal|state) to keep shape"),
    ):
        with pytest.raises(ValueError, match=match):
            LOOPS[loop](critic, params)


# Policies -------------------------------------------------------------------------------------------------------------


def fed(change):
    """A tabular policy whose init gives another output."""

    def my_init(params, rng, prompts, max_new_tokens):
        return change(*BASE.init(params, rng, prompts, max_new_tokens))

    return BASE._replace(init=my_init)


def stepped(change):
    def my_step(params, rng, state, token):
        return change(*BASE.step(params, rng, state, token))

    return BASE._replace(step=my_step)


OUTPUTS = [
    (lambda s, o: (s, o._replace(log_prob=o.log_prob[0])), r"expected log_prob of shape \(.*, V\), found \(11,\)"),
    (lambda s, o: (s, o._replace(log_prob=o.log_prob[:, None])), r"expected log_prob of shape \(.*, V\)"),
    (
        lambda s, o: (s, o._replace(log_norm=o.log_norm[:, None])),
        r"log_norm: expected shape \(5,\), one number per row",
    ),
    (lambda s, o: (s, o._replace(log_prob_ref=o.log_prob_ref[:, :2])), r"log_prob_ref: expected shape \(5, 11\)"),
    (lambda s, o: (s, o._replace(hidden=jnp.zeros(5))), r"expected hidden of shape \(5, D\) or None, found \(5,\)"),
    (lambda s, o: (s, o.log_prob), r"expected \(state, StepOutput\)"),
    (lambda s, o: o, r"expected a pair \(state, StepOutput\)"),
]


@pytest.mark.parametrize(("change", "match"), OUTPUTS)
def test_the_outputs_of_a_policy_are_checked(change, match):
    for policy, name in ((fed(change), r"policy.init \(.*my_init\)"), (stepped(change), r"policy.step \(.*my_step\)")):
        for build, params in (
            (lambda p: policies.tilt(p, LEVEL), {"policy": TABLE, "critic": OTHER, "beta": 1.0}),
            (policies.temperature, {"policy": TABLE, "temperature": 1.0}),
            (lambda p: policies.top_k(p, 2), TABLE),
            (lambda p: policies.with_reference(p, BASE), {"policy": TABLE, "reference": TABLE}),
        ):
            with pytest.raises(ValueError, match=name + ".*" + match):
                sample(build(policy), params)


def test_a_state_without_the_batch_first_is_named():
    policy = fed(lambda s, o: ((s, {"count": jnp.zeros(2)}), o))
    with pytest.raises(ValueError, match=r"policy.init .*\(5\) first, found shape \(2,\) at \[1\]\['count'\]"):
        start(policies.temperature(policy), {"policy": TABLE, "temperature": 1.0})


# Maps, heads and rewards ----------------------------------------------------------------------------------------------


def summed(map_params, q, log_prob, index):
    return q.sum(axis=-1)


def counted(map_params, q, log_prob, index):
    return (q > 0).astype(jnp.int32)


@pytest.mark.parametrize(
    ("f", "match"),
    [
        (summed, r"map_scores: f \(summed\): expected shape \(5, 11\).*found \(5,\)"),
        (counted, r"map_scores: f \(counted\): expected floating-point numbers"),
    ],
)
def test_the_map_of_scores_gives_a_score_per_candidate(f, match):
    policy = policies.tilt(BASE, critics.map_scores(LEVEL, f))
    with pytest.raises(ValueError, match=match):
        start(policy, {"policy": TABLE, "critic": {"critic": OTHER, "map": None}, "beta": 1.0})


def my_head(params, hidden):
    return hidden[:, :1]


def my_unembed(params, hidden):
    return hidden


def test_heads_and_unembeddings_are_checked():
    base = policies.language_model(LM)
    with pytest.raises(ValueError, match=r"hidden_value: head \(my_head\): expected shape \(5, 11\).*found \(5, 1\)"):
        start(policies.tilt(base, critics.hidden_value(my_head)), {"policy": LM_PARAMS, "critic": None, "beta": 1.0})
    params = {"policy": LM_PARAMS, "value": jnp.ones(16), "step_size": 0.1}
    with pytest.raises(ValueError, match=r"unembed \(my_unembed\): expected shape \(5, 11\).*found \(5, 16\)"):
        start(policies.re_control(base, my_unembed, policies.linear_value, num_steps=1), params)
    with pytest.raises(ValueError, match=r"value \(my_unembed\): expected shape \(5,\), one number per row"):
        start(policies.re_control(base, LM.logits, my_unembed, num_steps=1), params)


def columns(params, tokens, mask, prompt_length, index):
    return params[tokens].sum(axis=1, keepdims=True)


def test_transfer_q_refuses_a_reward_that_is_not_one_number_per_text():
    policy = policies.tilt(BASE, critics.transfer_q(BASE, columns, num_samples=2, lookahead=1))
    with pytest.raises(ValueError, match="columns"):
        start(policy, {"policy": TABLE, "critic": {"baseline": TABLE, "reward": TABLE[0]}, "beta": 1.0})


# A model of one's own -------------------------------------------------------------------------------------------------


class Bigrams:
    """The next token depends on the last one alone: what `types.LanguageModel` asks, and no more."""

    vocab_size, max_length, eos_ids = VOCAB, 32, EOS

    def prefill(self, params, tokens, mask, capacity):
        last = jnp.max(jnp.where(mask, jnp.arange(tokens.shape[1]), -1), axis=1)
        token = jnp.take_along_axis(tokens, last[:, None], axis=1)[:, 0]
        return jax.nn.one_hot(token, VOCAB), token

    def step(self, params, cache, token):
        token = jnp.where(token < 0, cache, token)
        return jax.nn.one_hot(token, VOCAB), token

    def logits(self, params, hidden):
        return hidden @ params


def test_a_model_of_ones_own_is_a_policy():
    lm, table = Bigrams(), jax.random.normal(RNG, (VOCAB, VOCAB))
    policy = policies.language_model(lm)
    assert policy.log_prob is None
    assert policy.eos_ids == EOS
    drawn = decoding.sample(policy, table, RNG, padded(PROMPTS), max_new_tokens=4, eos_ids=EOS)
    given = decoding.log_prob(policy, table, RNG, padded(PROMPTS), drawn.tokens, drawn.mask, eos_ids=EOS)
    before = np.stack([[row[-1], *tokens[:-1]] for row, tokens in zip(PROMPTS, drawn.tokens, strict=True)])
    expected = np.asarray(jax.nn.log_softmax(table))[before, np.asarray(drawn.tokens)]
    np.testing.assert_allclose(given.log_prob, np.where(drawn.mask, expected, 0), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(given.log_prob, drawn.log_prob, rtol=1e-5, atol=1e-6)


def test_a_model_of_ones_own_guides_and_is_guided():
    lm, table = Bigrams(), jax.random.normal(RNG, (VOCAB, VOCAB))
    policy = policies.tilt(policies.language_model(lm), critics.genarm(lm), top_k=4)
    params = policies.TiltParams(table, table, 2.0)
    drawn = decoding.sample(policy, params, RNG, padded(PROMPTS), max_new_tokens=3, eos_ids=EOS, temperature=0.5)
    assert bool(jnp.isfinite(drawn.log_prob).all())
    mixed = policies.tilt(policies.language_model(lm), critics.args(cases.tiny_lm(1, "reward")[0]))
    params = policies.TiltParams(table, cases.tiny_lm(1, "reward")[1], 1.0)
    assert bool(jnp.isfinite(sample(mixed, params).log_prob).all())


def test_the_logits_of_a_model_of_ones_own_are_checked():
    class Narrow(Bigrams):
        def logits(self, params, hidden):
            return hidden[:, :3]

    class Wide(Bigrams):
        def prefill(self, params, tokens, mask, capacity):
            return jnp.zeros((*tokens.shape, 4)), tokens[:, 0]

    with pytest.raises(ValueError, match=r"language_model: lm.logits: expected shape \(5, 11\).*found \(5, 3\)"):
        start(policies.language_model(Narrow()), None)
    with pytest.raises(ValueError, match=r"language_model: expected hidden states \[B,D\]"):
        start(policies.language_model(Wide()), None)
    with pytest.raises(ValueError, match="expected prompt and new tokens within the model's context of 32"):
        decoding.sample(
            policies.language_model(Bigrams()), jnp.ones((11, 11)), RNG, padded(PROMPTS), max_new_tokens=32, eos_ids=EOS
        )
