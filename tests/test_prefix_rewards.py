"""Rewards that keep a prefix equal the rewards of whole texts: alone, combined, and in the decoders that use them."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign import critics, decoding, mdp, models, policies, rewards
from jaxalign._arrays import take_rows, where_rows
from jaxalign.rewards import prefixes
from jaxalign.types import TokenBatch
from tests.cases import weighted_tokens
from tests.conftest import EOS, PROMPTS, VOCAB, padded, tiny_lm

RNG = jax.random.key(0)
B, M, T = len(PROMPTS), 2, 24
INDEX = jnp.array([3, 0, 4, 1, 2])
TOKENS = jax.random.randint(jax.random.key(1), (B, M, T), 0, VOCAB)
FEW = jnp.array([[3, 0], [2, 4], [5, 5], [1, 3], [0, 2]])
MANY = jnp.array([[T, 3], [2, T], [0, 9], [1, T], [7, T - 1]])


def model(seed: int, **changes):
    return (
        tiny_lm(seed, "reward", num_layers=1, windows=(3,), family="mistral", **changes)
        if seed % 2
        else tiny_lm(seed, "reward", num_layers=1, **changes)
    )


def classifier(pad_id: int | None = None):
    """A reward model with three labels."""
    lm, params = tiny_lm(5, "value", num_layers=1, pad_id=pad_id)
    lm = models.with_head(lm, models.Head("reward", num_labels=3, labels=("good", "true", "long")))
    head = {"score": {"kernel": jax.random.normal(jax.random.key(6), (16, 3))}}
    return lm, {"transformer": {k: v for k, v in params["transformer"].items() if k != "lm_head"}, "head": head}


def reward_cases() -> dict:
    (left, left_params), (right, right_params) = model(1), model(2)
    one, other = rewards.from_model(left), rewards.from_model(right)
    both = {"rewards": (left_params, right_params), "weights": jnp.array([0.7, -1.3])}
    table = jnp.linspace(-1.0, 1.0, B)
    (padded_lm, padded_params), (three, three_params) = model(1, pad_id=2), classifier(pad_id=EOS[0])
    weights = jnp.array([0.5, -1.0, 2.0])
    pools = models.with_head(left, models.Head("reward", pooling="mean"))
    return {
        "from_model": (one, left_params),
        "mean": (rewards.from_model(pools), left_params),
        "own_pad": (rewards.from_model(padded_lm), padded_params),
        "pad_is_eos": (rewards.from_model(model(1, pad_id=EOS[0])[0]), left_params),
        "label": (rewards.from_model(three, label="true"), three_params),
        "weighted_labels": (rewards.from_model(three, weighted=True), rewards.LabelParams(three_params, weights)),
        "shaped": (
            # map_reward of a weighted_sum
            rewards.shaped(rewards.weighted_sum([one, other]), sharpness=2.0),
            {"reward": both, "map": {"threshold": table, "bound": jnp.asarray(2.0)}},
        ),
        "whole_text": (weighted_tokens, jax.random.normal(RNG, (VOCAB,))),
    }


REWARDS = ("from_model", "mean", "own_pad", "pad_is_eos", "label", "weighted_labels", "shaped", "whole_text")


@functools.cache
def reward_case(name: str):
    built = reward_cases()
    assert tuple(built) == REWARDS
    return built[name]


def scored_whole(reward, params, prompts, before, segments, lengths):
    """[B,M] by the Reward itself, of prompts, the tokens `before` ([B] lists) and segments [B,M,T]."""
    rows = np.zeros((B * M, 3 * T), np.int32)
    real = np.zeros(rows.shape, bool)
    for b in range(B):
        for m in range(M):
            text = before[b] + np.asarray(segments[b, m, : lengths[b, m]]).tolist()
            rows[b * M + m, : len(text)], real[b * M + m, : len(text)] = text, True
    repeated = TokenBatch(*(jnp.repeat(x, M, axis=0) for x in (prompts.tokens, prompts.mask, INDEX)))
    joined = mdp.concatenate(repeated, jnp.asarray(rows), jnp.asarray(real))
    return jax.jit(reward)(params, *joined, repeated.index).reshape(B, M)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", REWARDS)
def test_a_kept_prefix_gives_the_rewards_of_the_whole_texts(name, side):
    """At the prompt, and after segments of different lengths joined it; an empty segment has the prefix's reward; rows
    may be taken and mixed; short and long segments take passes of different size."""
    reward, params = reward_case(name)
    prompts = padded(PROMPTS, side=side, extra=1)._replace(index=INDEX)
    kept = prefixes.prefix_reward(reward)
    assert (getattr(reward, "prefix", None) is None) == (name == "whole_text")
    score, commit = jax.jit(kept.score), jax.jit(kept.commit)
    state = jax.jit(kept.init, static_argnums=2)(params, prompts, 2 * T)
    before: list[list[int]] = [[] for _ in range(B)]
    for choice, lengths in ((jnp.array([0, -1, 1, 1, 0]), FEW), (jnp.array([-1, 0, 1, 0, -1]), MANY), (None, FEW)):
        mask = jnp.arange(T) < lengths[..., None]
        found, proposal = score(params, state, TOKENS, mask)
        wanted = scored_whole(reward, params, prompts, before, TOKENS, lengths)
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)
        assert float(jnp.ptp(wanted)) > 0.05
        for leaf in jax.tree.leaves((state, proposal)):
            assert leaf.shape[:1] == (B,)
        if choice is not None:
            state = commit(params, state, proposal, choice)
            for b in range(B):
                if choice[b] >= 0:
                    before[b] = before[b] + TOKENS[b, choice[b], : lengths[b, choice[b]]].tolist()
    turned = jnp.array([4, 0, 0, 3, 1])
    again = where_rows(jnp.arange(B) < 3, take_rows(state, turned), state)
    order = jnp.where(jnp.arange(B) < 3, turned, jnp.arange(B))
    np.testing.assert_allclose(score(params, again, TOKENS[order], mask[order])[0], wanted[order], rtol=1e-5, atol=1e-5)


def test_a_combination_keeps_a_prefix_where_all_its_parts_do():
    lm, _ = model(1)
    mixed = rewards.weighted_sum([rewards.from_model(lm), weighted_tokens])
    assert mixed.prefix is None
    assert rewards.shaped(weighted_tokens).prefix is None
    assert rewards.weighted_sum([rewards.from_model(lm)] * 2).prefix is not None


def test_the_gain_of_a_segment_is_the_gain_in_the_whole_text():
    lm, params = model(1)
    prompts, before = padded(PROMPTS), TOKENS[:, 0, :3]
    gain = rewards.token_gradient(lm)
    choices = jnp.arange(B * 4).reshape(B, 4) % VOCAB
    start = jax.jit(gain.prefix.reward.init, static_argnums=2)(params, prompts, 2 * T)
    first = jnp.ones((B, 1, 3), bool)
    _, proposal = jax.jit(gain.prefix.reward.score)(params, start, before[:, None], first)
    state = jax.jit(gain.prefix.reward.commit)(params, start, proposal, jnp.zeros(B, jnp.int32))
    score = jax.jit(gain.prefix.score)
    for lengths in (jnp.array([1, 4, 2, 3, 5]), jnp.array([T, 4, 2, T, 5])):
        tokens, mask = TOKENS[:, 1], jnp.arange(T) < lengths[:, None]
        found = score(params, state, tokens, mask, choices)[:2]
        text = jnp.concatenate([before, tokens], axis=1), jnp.concatenate([first[:, 0], mask], axis=1)
        joined = mdp.concatenate(prompts, *text)
        wanted = jax.jit(gain.with_reward)(params, *joined, joined[2] + 3, choices)
        for left, right in zip(found, wanted, strict=True):
            np.testing.assert_allclose(left, right, rtol=1e-5, atol=1e-5 * float(jnp.abs(right).max()))
        assert float(jnp.abs(wanted[1]).max()) > 0.01


@pytest.mark.parametrize("ragged", [True, False])
def test_passes_are_as_narrow_as_the_segments(ragged):
    """Sizes rise, hold what their rows need, and end with everything; few of them are compiled."""
    for rows, width in ((1, 1), (1, 9), (1, 32), (5, 14), (16, 32), (16, 256), (80, 21), (3, 1024)):
        sizes = prefixes._sizes(rows, width, ragged=ragged)
        assert sizes[-1] == (width, rows * width)
        assert len(sizes) <= (6 if ragged else 2)
        assert sizes == sorted(sizes, key=lambda size: size[1])
        for columns, packed in sizes:
            assert columns <= width
            assert packed <= rows * columns
    assert [packed for _, packed in prefixes._sizes(16, 32, ragged=True)] == [32, 64, 128, 256, 512]
    assert [packed for _, packed in prefixes._sizes(80, 21, ragged=False)] == [420, 1680]


def test_ggro_with_a_kept_prefix_is_ggro_on_whole_texts():
    """The same tokens, segments and calls, and rewards to 1e-5, from prompts padded on the other side."""
    (lm, params), (judge, judge_params) = tiny_lm(0, num_layers=1), model(1)
    policy, gain = policies.language_model(lm), rewards.token_gradient(judge)

    def run(gain, side):
        options = {"num_samples": 4, "max_new_tokens": T, "top_k": 5, "eos_ids": EOS}
        given = {"policy": params, "reward": judge_params, "entropy_threshold": 1.3}
        return decoding.ggro(policy, None, gain, given, RNG, padded(PROMPTS, side=side), **options)

    wanted, found = run(dataclasses.replace(gain, prefix=None), "left"), run(gain, "right")
    assert int(wanted.info.forced.sum()) > 1
    assert int(wanted.info.segments.max()) > 2
    for name in ("tokens", "mask", "finished"):
        np.testing.assert_array_equal(getattr(found.completions, name), getattr(wanted.completions, name))
    for name in ("segment", "forced", "segments", "policy_steps", "reward_passes", "gradient_passes"):
        np.testing.assert_array_equal(getattr(found.info, name), getattr(wanted.info, name), err_msg=name)
    for name in ("reward", "greedy_reward", "kept_reward"):
        np.testing.assert_allclose(
            getattr(found.info, name), getattr(wanted.info, name), rtol=1e-5, atol=1e-5, err_msg=name
        )


def test_transfer_q_with_a_kept_prefix_is_transfer_q_on_whole_texts():
    """Indirect, three roll-outs each, some ended by an EOS; after two tokens, one row standing still."""
    (lm, params), (judge, judge_params), (other, other_params) = tiny_lm(4, num_layers=1), model(1), model(2)
    reward, below = rewards.from_model(judge), rewards.from_model(other)
    given = {"baseline": params, "reward": judge_params, "baseline_reward": other_params, "beta": jnp.asarray(0.9)}
    candidates = jnp.array([[5, 0, 9], [0, 2, 3], [10, 8, 7], [4, 1, 6], [3, 9, 2]], jnp.int32)
    prefix = jnp.array([[6, 1], [2, 9], [9, -1], [5, 5], [8, 3]], jnp.int32)
    baseline = policies.language_model(lm)

    @functools.partial(jax.jit, static_argnums=(0, 1))
    def scores(critic, side, params):
        state = critic.init(params, RNG, padded(PROMPTS, side=side), 6)
        for d in range(prefix.shape[1]):
            state = critic.advance(params, state, prefix[:, d])
        blank = policies.language_model(lm).init(params["baseline"], RNG, padded(PROMPTS), 1)[1]
        return critic.score(params, RNG, state, blank, candidates)[0]

    def critic(*parts):
        return critics.transfer_q(baseline, parts[0], eos_ids=EOS, num_samples=3, baseline_reward=parts[1])

    wanted = scores(critic(*(dataclasses.replace(part, prefix=None) for part in (reward, below))), "left", given)
    found = scores(critic(reward, below), "right", given)
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)
    assert float(jnp.ptp(wanted)) > 0.05


def test_transfer_q_rolls_nothing_out_in_rows_that_stand_still():
    """A row that has ended keeps its scores: no step of the baseline is taken for it, and new candidates are scored."""
    lm, params = tiny_lm(4, num_layers=1)
    policy, stepped = policies.language_model(lm), []

    def step(params, rng, state, token):
        jax.debug.callback(lambda found: stepped.append(int((found >= 0).sum())), token)
        return policy.step(params, rng, state, token)

    critic = critics.transfer_q(policy._replace(step=step), weighted_tokens, eos_ids=(), num_samples=2)
    given = {"baseline": params, "reward": jnp.linspace(-1.0, 1.0, VOCAB)}
    prompts = padded(PROMPTS[:2])
    candidates = jnp.array([[1, 2, 3], [4, 5, 6]], jnp.int32)

    @jax.jit
    def run(choice, candidates, others):
        output = policy.init(params, RNG, prompts, 4)[1]
        q, proposal = critic.score(given, RNG, critic.init(given, RNG, prompts, 4), output, candidates)
        state = critic.advance(given, proposal, choice)
        return q, critic.score(given, RNG, state, output, others)[0]

    def taken(*arguments):
        stepped.clear()
        out = jax.block_until_ready(run(*arguments))
        jax.effects_barrier()
        return out, sum(stepped)

    (q, again), both_stand = taken(jnp.array([-1, -1]), candidates, candidates)
    np.testing.assert_array_equal(again, q)
    (q, again), one_moves = taken(jnp.array([-1, 2]), candidates, candidates)
    np.testing.assert_array_equal(again[0], q[0])
    assert float(jnp.abs(again[1] - q[1]).max()) > 1e-3
    # First scores: 2·3 candidates and two steps of 12 roll-outs. Then a token, its 3 candidates and one step of 6.
    assert (both_stand, one_moves) == (6 + 24, 6 + 24 + 1 + 3 + 6)
    others = candidates.at[0, 1].set(7)
    (q, again), asked_anew = taken(jnp.array([-1, -1]), candidates, others)
    np.testing.assert_allclose(again[0, ::2], q[0, ::2], rtol=1e-6)
    np.testing.assert_array_equal(again[1], q[1])
    assert asked_anew == 6 + 24 + 3 + 12
