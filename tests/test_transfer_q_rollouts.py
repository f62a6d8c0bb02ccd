"""The roll-outs of Transfer Q*: by hand on models, their cost, their streams, their limits, bad input."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign import critics, decoding, policies, rewards, tree
from jaxalign.types import Policy, StepOutput, TokenBatch
from tests import exact
from tests.cases import tiny_lm, weighted_tokens
from tests.conftest import EOS, PROMPTS, VOCAB, needs_jit, padded

RNG = jax.random.key(0)
TREE = tree.Tree(3, 3, eos_id=0)
T = 4
CANDIDATES = jnp.array([[5, 0, 9], [0, 2, 3], [10, 8, 7], [4, 1, 6], [3, 9, 2]], jnp.int32)


@functools.cache
def greedy_baseline() -> tuple[Policy, dict]:
    lm, params = tiny_lm(4)
    return policies.temperature(policies.language_model(lm)), {"policy": params, "temperature": jnp.asarray(0.0)}


def blank(batch: int, vocab: int = VOCAB) -> StepOutput:
    """A policy's output that says nothing: the critic reads only its shape."""
    return StepOutput(jnp.zeros((batch, vocab)), jnp.zeros((batch, vocab)), jnp.zeros(batch))


@functools.partial(jax.jit, static_argnums=(0, 4))
def walked(critic, params, prompts, prefix, limit, candidates=None):
    """(q, proposal) after advancing by prefix [B,D]."""
    state = critic.init(params, RNG, prompts, limit)
    for d in range(prefix.shape[1]):
        state = critic.advance(params, state, prefix[:, d])
    batch, vocab = prefix.shape[0], critic.vocab_size
    return critic.score(params, RNG, state, blank(batch, vocab), candidates)


PREFIX = jnp.array([[6], [2], [9], [-1], [5]], jnp.int32)  # row 3 stands still


@pytest.mark.parametrize("lookahead", [None, 2, 0])
def test_transfer_q_equals_a_loop_over_candidates_that_encodes_each_text_anew(lookahead):
    """Greedy roll-outs by hand, from nothing but the models' uncached forward passes; candidate 0 is EOS."""
    lm, base = tiny_lm(4)
    reward_lm, judge = tiny_lm(1, "reward")
    critic = critics.transfer_q(
        greedy_baseline()[0], rewards.from_model(reward_lm), eos_ids=EOS, num_samples=1, lookahead=lookahead
    )
    params = {"baseline": greedy_baseline()[1], "reward": judge}
    found = walked(critic, params, padded(PROMPTS), PREFIX, T, CANDIDATES)[0]

    @jax.jit
    def following(tokens, last):
        return jnp.argmax(lm.apply(base, tokens).logits[0, last])

    @jax.jit
    def score(tokens, last):
        return reward_lm.apply(judge, tokens).head[0, last, 0]

    def at_last(f, text):
        return f(jnp.asarray([text + [0] * (12 - len(text))]), len(text) - 1)

    lengths = set()
    for b, prompt in enumerate(PROMPTS):
        before = [int(z) for z in PREFIX[b] if z >= 0]
        for k, z in enumerate(CANDIDATES[b].tolist()):
            response, drawn = [*before, z], 0
            while response[-1] not in EOS and len(response) < T and (lookahead is None or drawn < lookahead):
                response.append(int(at_last(following, prompt + response)))
                drawn += 1
            lengths.add(drawn)
            np.testing.assert_allclose(found[b, k], at_last(score, prompt + response), rtol=2e-5, atol=2e-5)
    assert max(lengths) == {None: 3, 2: 2, 0: 0}[lookahead]


def test_transfer_q_without_lookahead_is_args():
    reward_lm, judge = tiny_lm(1, "reward")
    transfer = critics.transfer_q(
        greedy_baseline()[0], rewards.from_model(reward_lm), eos_ids=EOS, num_samples=5, lookahead=0
    )
    params = {"baseline": greedy_baseline()[1], "reward": judge}
    found = walked(transfer, params, padded(PROMPTS), PREFIX, T, CANDIDATES)[0]
    np.testing.assert_allclose(
        found, walked(critics.args(reward_lm), judge, padded(PROMPTS), PREFIX, T, CANDIDATES)[0], rtol=2e-5, atol=2e-5
    )


@functools.cache
def sampling() -> tuple[Policy, dict]:
    """A base model tilted by transfer from another model, three roll-outs for each of 4 candidates."""
    (lm, base), (other_lm, other) = tiny_lm(0), tiny_lm(4)
    critic = critics.transfer_q(policies.language_model(other_lm), weighted_tokens, eos_ids=EOS, num_samples=3)
    weights = jax.random.normal(jax.random.key(5), (VOCAB,))
    params = {"policy": base, "critic": {"baseline": other, "reward": weights}, "beta": jnp.asarray(0.5)}
    return policies.tilt(policies.language_model(lm), critic, top_k=4), params


def test_transfer_q_batched_is_one_prompt_at_a_time():
    policy, params = sampling()
    together = decoding.sample(policy, params, RNG, padded(PROMPTS), max_new_tokens=T, eos_ids=EOS)
    for b, prompt in enumerate(PROMPTS):
        alone = padded([prompt], extra=4 - len(prompt))._replace(index=jnp.array([b]))
        single = decoding.sample(policy, params, RNG, alone, max_new_tokens=T, eos_ids=EOS)
        np.testing.assert_array_equal(single.tokens[0], together.tokens[b])
        np.testing.assert_allclose(single.log_prob[0], together.log_prob[b], rtol=1e-4, atol=1e-5)


def test_transfer_q_prompts_have_streams_of_their_own():
    policy, params = sampling()
    same = TokenBatch(*padded([PROMPTS[0]] * 5)[:2])
    state, _ = jax.jit(policy.init, static_argnums=3)(params, RNG, same, T)
    assert len(np.unique(np.asarray(state.q[:, 0]))) > 1
    state, _ = jax.jit(policy.init, static_argnums=3)(params, RNG, same._replace(index=jnp.full(5, 7)), T)
    assert len(np.unique(np.asarray(state.q[:, 0]))) == 1


@functools.cache
def tabular(**options):
    return critics.transfer_q(tree.policy(TREE), tree.reward(TREE), eos_ids=(0,), **{"num_samples": 2} | options)


def test_transfer_q_tilts_to_one_policy_for_each_key():
    """The noise of the roll-outs is fixed by the key: the probabilities of all responses add up to one."""
    base, reward = exact.tables(TREE, 1)
    params = {"baseline": exact.tables(TREE, 2)[0], "reward": reward}
    law = exact.tilted_law(TREE, base, tabular(), params, beta=0.5)
    np.testing.assert_allclose(np.exp(law).sum(), 1, rtol=1e-5)
    truth = tree.q_values(TREE, tree.value(TREE, params["baseline"], reward), reward=reward)
    assert exact.total_variation(law, exact.tilted_law(TREE, base, tree.critic(TREE, "level"), truth, beta=0.5)) > 0.01


def test_transfer_q_chunks_of_candidates_change_nothing():
    base, reward = exact.tables(TREE, 3)
    prompts, nothing = tree.prompts(4), jnp.zeros((4, 0), jnp.int32)
    found = [
        walked(critic, {"baseline": base, "reward": reward}, prompts, nothing, 3)[0]
        for critic in (tabular(), tabular(chunk=2), tabular(chunk=1), tabular(chunk=99))
    ]
    for other in found[1:]:
        np.testing.assert_allclose(other, found[0], rtol=1e-6)


def counted(policy: Policy) -> tuple[Policy, list[int], list[int]]:
    """(the policy, rows of each init that ran, rows of each step that ran)."""
    begun: list[int] = []
    stepped: list[int] = []

    def init(params, rng, prompts, limit):
        jax.debug.callback(lambda: begun.append(prompts.tokens.shape[0]))
        return policy.init(params, rng, prompts, limit)

    def step(params, rng, state, token):
        jax.debug.callback(lambda: stepped.append(token.shape[0]))
        return policy.step(params, rng, state, token)

    return policy._replace(init=init, step=step), begun, stepped


@pytest.mark.parametrize(("lookahead", "depths"), [(None, (3, 2, 1, 0)), (2, (2, 2, 1, 0)), (0, (0, 0, 0, 0))])
def test_transfer_q_cost_in_steps_of_the_baseline(lookahead, depths):
    """B prompts encoded once; per token one step of B·K rows, the roll-outs' remaining length less one of B·K·n, and
    one of B: k·n·T²/2 tokens a response, no prefix anew."""
    t = tree.Tree(3, 4, eos_id=None)
    baseline, begun, stepped = counted(tree.policy(t))
    critic = critics.transfer_q(baseline, weighted_tokens, eos_ids=(), num_samples=5, lookahead=lookahead)
    base = exact.tables(t, 0)[0]
    policy = policies.tilt(tree.policy(t), critic, top_k=2)
    params = {"policy": base, "critic": {"baseline": base, "reward": jnp.ones(3)}, "beta": jnp.asarray(1.0)}
    jax.block_until_ready(decoding.sample(policy, params, RNG, tree.prompts(3), max_new_tokens=4, eos_ids=()))
    jax.effects_barrier()
    if lookahead == 0:
        assert (begun, stepped) == ([], [])
        return
    expected = []
    for position, depth in enumerate(depths):
        expected += [3] * (position > 0) + [3 * 2] + [3 * 2 * 5] * max(depth - 1, 0)
    assert begun == [3]
    assert stepped == expected


@needs_jit
def test_transfer_q_is_traced_once():
    baseline, traces = tree.policy(TREE), [0]

    def init(*arguments):
        traces[0] += 1
        return baseline.init(*arguments)

    critic = critics.transfer_q(baseline._replace(init=init), tree.reward(TREE), eos_ids=(0,), num_samples=2)
    policy = policies.tilt(tree.policy(TREE), critic)
    for seed in range(2):
        base, reward = exact.tables(TREE, seed)
        params = {"policy": base, "critic": {"baseline": base, "reward": reward}, "beta": jnp.asarray(1.0 + seed)}
        decoding.sample(policy, params, jax.random.key(seed), tree.prompts(3), max_new_tokens=3, eos_ids=(0,))
    assert traces == [1]


def test_transfer_q_stops_where_every_roll_out_has_ended():
    """A baseline that ends at once: one token each, drawn without a further step."""
    t = tree.Tree(3, 4, eos_id=0)
    baseline, _, stepped = counted(tree.policy(t))
    critic = critics.transfer_q(baseline, weighted_tokens, eos_ids=(0,), num_samples=2)
    ends = jnp.broadcast_to(jnp.array([0.0, -1e20, -1e20]), (t.num_states, 3))
    params = {"baseline": ends, "reward": jnp.ones(3)}
    nothing = jnp.zeros((2, 0), jnp.int32)
    q = walked(critic, params, tree.prompts(2), nothing, 4, jnp.array([[1, 2], [2, 0]]))[0]
    jax.effects_barrier()
    assert stepped == [4, 8]  # the candidates, and one step of the roll-outs that finds them ended
    # Weights 1..L at the places of prompt, candidate and EOS.
    np.testing.assert_allclose(q * 10, [[6, 6], [6, 3]], rtol=1e-6)


def test_transfer_q_a_candidate_that_the_baseline_cannot_follow_is_nan():
    """A tilt stands still outside its candidates; a truncation moves on, and its roll-outs are sound."""
    base = exact.tables(TREE, 4)[0]
    tilted = policies.tilt(tree.policy(TREE), tree.critic(TREE, "level"), top_k=2)
    params = {"policy": base, "critic": jnp.zeros_like(base), "beta": jnp.asarray(1.0)}
    nothing = jnp.zeros((2, 0), jnp.int32)
    outside = np.asarray(base[0]) == float(base[0].min())
    for baseline, arguments in ((tilted, params), (policies.top_k(tree.policy(TREE), 2), base)):
        critic = critics.transfer_q(baseline, weighted_tokens, eos_ids=(), num_samples=2)
        q = walked(critic, {"baseline": arguments, "reward": jnp.ones(3)}, tree.prompts(2), nothing, 3)[0]
        lost = np.isnan(np.asarray(q))
        np.testing.assert_array_equal(lost, np.broadcast_to(outside & (baseline is tilted), (2, 3)))


def test_transfer_q_a_baseline_without_a_distribution_is_nan():
    """Below token 1 the baseline is NaN: its roll-outs could be scored, and would be silently wrong."""
    base, reward = exact.tables(TREE, 4)
    broken = base.at[2].set(jnp.nan)
    q = walked(tabular(), {"baseline": broken, "reward": reward}, tree.prompts(2), jnp.zeros((2, 0), jnp.int32), 3)[0]
    np.testing.assert_array_equal(np.isnan(np.asarray(q)), [[False, True, False]] * 2)


def test_transfer_q_a_candidate_beyond_the_limit_is_nan():
    base, reward = exact.tables(TREE, 4)
    full = jnp.array([[1, 1, 1], [1, 1, -1]])
    q = walked(tabular(), {"baseline": base, "reward": reward}, tree.prompts(2), full, 3)[0]
    assert np.isnan(np.asarray(q[0])).all()
    assert np.isfinite(np.asarray(q[1])).all()


def test_transfer_q_each_model_reads_its_own_template():
    """The reward's prompt is longer than the baseline's: the same roll-outs, scored after it."""
    base = exact.tables(TREE, 5)[0]
    critic = critics.transfer_q(tree.policy(TREE), weighted_tokens, eos_ids=(0,), num_samples=2)
    params = {"baseline": base, "reward": jnp.array([0.3, -1.0, 2.0])}
    nothing, short = jnp.zeros((1, 0), jnp.int32), padded([[1, 1]])
    alone = walked(critic, params, {"baseline": short, "reward": padded([[2, 1, 1]])}, nothing, 3)[0]
    other = walked(critic, params, padded([[2, 1, 1]], extra=2), nothing, 3)[0]
    np.testing.assert_allclose(alone, other, rtol=1e-6)
    assert np.abs(np.asarray(walked(critic, params, short, nothing, 3)[0] - alone)).max() > 0.01


def test_transfer_q_gradients_reach_the_rewards():
    """d log pi/d reward = the roll-outs' counts: finite differences agree; the baseline gets none."""
    t = tree.Tree(2, 2, eos_id=0)
    base, reward = exact.tables(t, 6)
    critic = critics.transfer_q(tree.policy(t), tree.reward(t), eos_ids=(0,), num_samples=3)
    policy = policies.tilt(tree.policy(t), critic)
    tokens, mask = jnp.array([[1, 1], [1, 0]], jnp.int32), jnp.ones((2, 2), bool)

    @jax.jit
    @functools.partial(jax.value_and_grad, argnums=(0, 1))
    def total(reward, baseline):
        params = {"policy": base, "critic": {"baseline": baseline, "reward": reward}, "beta": jnp.asarray(0.7)}
        return decoding.log_prob(policy, params, RNG, tree.prompts(2), tokens, mask).log_prob.sum()

    table = exact.tables(t, 7)[0]
    by_reward, by_baseline = total(reward, table)[1]
    direction = jax.random.normal(RNG, reward.shape)
    step = 0.05
    up, down = (total(reward + sign * step * direction, table)[0] for sign in (1, -1))
    numeric = (up - down) / (2 * step)
    np.testing.assert_allclose((by_reward * direction).sum(), numeric, rtol=2e-2)
    assert np.isfinite(numeric)
    assert float(jnp.abs(by_reward).max()) > 0.1
    np.testing.assert_array_equal(by_baseline, 0)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"num_samples": 0}, "num_samples: expected at least 1, found 0"),
        ({"lookahead": -1}, "lookahead: expected at least 0, found -1"),
        ({"chunk": 0}, "chunk: expected at least 1"),
        ({"eos_ids": (3,)}, r"eos_ids: expected ids in \[0, 3\), found \(3,\)"),
        ({"baseline_reward": tree.reward(tree.Tree(4, 2))}, r"one vocabulary .* found \[3, 4\]"),
    ],
)
def test_transfer_q_refuses_bad_settings(options, match):
    with pytest.raises(ValueError, match=match):
        critics.transfer_q(tree.policy(TREE), tree.reward(TREE), **{"eos_ids": (0,), "num_samples": 1} | options)


def test_transfer_q_refuses_bad_params_before_tracing():
    base, reward = exact.tables(TREE, 0)
    critic = critics.transfer_q(
        tree.policy(TREE), tree.reward(TREE), eos_ids=(0,), num_samples=1, baseline_reward=tree.reward(TREE)
    )
    whole = {"baseline": base, "reward": reward, "baseline_reward": reward, "beta": jnp.asarray(1.0)}
    policy = policies.tilt(tree.policy(TREE), critic)

    def run(critic_params, **options):
        params = {"policy": base, "critic": critic_params, "beta": jnp.asarray(1.0)}
        shared = {"max_new_tokens": 3, "eos_ids": (0,)} | options
        return decoding.sample(policy, params, RNG, tree.prompts(2), **shared)

    for name in whole:
        with pytest.raises(ValueError, match=rf"params\['critic'\]: expected entries .* \(missing {name}\)"):
            run({k: v for k, v in whole.items() if k != name})
    for changed, match in (
        ({"beta": jnp.asarray(0.0)}, "beta: expected a value > 0"),
        ({"beta": jnp.ones(3)}, r"beta: expected a scalar or shape \(2,\)"),
        ({"reward": reward[:-1]}, "reward: expected a table of shape"),
        ({"baseline": base[:-1]}, "params: expected a table of shape"),
    ):
        with pytest.raises(ValueError, match=match):
            run(whole | changed)
    with pytest.raises(ValueError, match="max_new_tokens: expected at most the tree's horizon of 3"):
        run(whole, max_new_tokens=4)
