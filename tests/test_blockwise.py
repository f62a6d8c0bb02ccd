"""Blockwise decoding: its exact law on trees, its streams, and its states on models."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign import critics, decoding, mdp, metrics, models, policies, rewards, tree
from jaxalign.types import Critic, TokenBatch
from tests import cases, exact
from tests.conftest import EOS, PROMPTS, VOCAB, needs_jit, padded, tiny_lm

RNG = jax.random.key(0)
TREE = tree.Tree(2, 4, eos_id=0)
ARGUMENTS = {"max_new_tokens": 4, "eos_ids": EOS}
TABULAR = tree.policy(TREE)
CRITICS = {kind: tree.critic(TREE, kind) for kind in ("level", "increment")}


def chi_squared(drawn, log_law) -> tuple[float, int]:
    """(statistic, degrees of freedom) of decoded responses against a law; none outside its support."""
    index = np.asarray(tree.response_index(TREE, drawn.tokens, drawn.mask))
    assert (index >= 0).all()
    count = np.bincount(index, minlength=TREE.num_responses)
    expected = len(index) * np.exp(np.asarray(log_law, np.float64))
    inside = expected > 0
    assert count[~inside].sum() == 0
    assert expected[inside].min() > 5
    return float(((count - expected)[inside] ** 2 / expected[inside]).sum()), int(inside.sum()) - 1


def quantile(freedom: int) -> float:
    """At least the 1 − 1e-6 quantile of chi-squared (Laurent and Massart, 2000): d + 2√(dx) + 2x, x = ln 1e6."""
    x = np.log(1e6)
    return freedom + 2 * np.sqrt(freedom * x) + 2 * x


def drawn_on_tree(base, q, *, kind="level", candidates=3, block=2, count=40_000, seed=3):
    return decoding.blockwise(
        TABULAR,
        CRITICS[kind],
        {"policy": base, "critic": q},
        jax.random.key(seed),
        tree.prompts(count),
        num_samples=candidates,
        block_size=block,
        **ARGUMENTS,
    ).completions


@pytest.mark.parametrize("block", [1, 2, 3, 4])
def test_cd_T10_decoded_responses_have_the_blockwise_law(block):
    """40,000 draws at each block length (3: a shorter last block): chi-squared below its 1 − 1e-6 quantile."""
    base, reward = exact.tables(TREE, 10)
    value = tree.value(TREE, base, reward)
    law = tree.blockwise_law(TREE, base, state_score=value, reward=reward, num_samples=3, block_size=block)
    drawn = drawn_on_tree(base, tree.q_values(TREE, value, reward=reward), block=block)
    statistic, freedom = chi_squared(drawn, law)
    assert statistic < quantile(freedom)
    # Another law is told apart: that of the neighbouring block length.
    other = tree.blockwise_law(TREE, base, state_score=value, reward=reward, num_samples=3, block_size=block % 4 + 1)
    assert chi_squared(drawn, other)[0] > 2 * quantile(freedom)
    # Each response's share of the bound, on average the oracle's under this law.
    bound = metrics.blockwise_kl_bound(drawn.mask, block_size=block, num_samples=3)
    expected = float(tree.blockwise_bound(TREE, law, num_samples=3, block_size=block))
    error = bound.std() / np.sqrt(len(bound))
    assert abs(bound.mean() - expected) <= 5 * error + 1e-6
    assert float(tree.sequence_kl(law, tree.response_log_prob(TREE, base))) <= expected + 1e-6


def test_an_increment_critic_scores_a_block_by_its_sum():
    """40,000 draws against the law whose states are scored by the sum of q so far."""
    base, q = 0.5 * exact.tables(TREE, 4)[0], exact.tables(TREE, 5)[0]
    base = jax.nn.log_softmax(base)
    total = np.zeros(TREE.num_states)
    for s in range(1, TREE.num_states):
        parent, z = divmod(s - 1, 2)
        total[s] = total[parent] + q[parent, z]
    tokens, mask = TREE.responses
    paid = np.where(mask, np.asarray(q)[TREE.nodes, tokens], 0).sum(axis=1)
    law = tree.blockwise_law(
        TREE, base, state_score=jnp.asarray(total), reward=jnp.asarray(paid), num_samples=3, block_size=2
    )
    statistic, freedom = chi_squared(drawn_on_tree(base, q, kind="increment"), law)
    assert statistic < quantile(freedom)


def test_tied_scores_are_split_by_their_share():
    """Constant scores keep the first candidate: the base's own law."""
    base, _ = exact.tables(TREE, 6)
    drawn = drawn_on_tree(base, jnp.zeros_like(base))
    statistic, freedom = chi_squared(drawn, tree.response_log_prob(TREE, base))
    assert statistic < quantile(freedom)


# On models ------------------------------------------------------------------------------------------------------------


LM, BASE = tiny_lm(0, num_layers=1)
POLICY = policies.language_model(LM)
JUDGE, JUDGED = tiny_lm(1, "reward", num_layers=1)
ARGS = critics.args(JUDGE)
BOTH = {"policy": BASE, "critic": JUDGED}
REWARD = rewards.from_model(JUDGE)


def decoded(policy=POLICY, critic=ARGS, params=BOTH, rng=RNG, prompts=None, *, candidates=3, block=2, new=5, **changes):
    prompts = padded(PROMPTS) if prompts is None else prompts
    arguments = {"num_samples": candidates, "block_size": block, "max_new_tokens": new, "eos_ids": EOS} | changes
    return decoding.blockwise(policy, critic, params, rng, prompts, **arguments).completions


def assert_same(found, expected, **tolerance):
    for name in ("tokens", "mask", "finished", "truncated"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name), err_msg=name)
    for name in ("log_prob", "log_prob_ref", "log_norm", "kl"):
        np.testing.assert_allclose(getattr(found, name), getattr(expected, name), err_msg=name, **tolerance)


def test_one_candidate_is_sampling():
    """The same random numbers, block after block: candidate 0 is what `sample` draws."""
    expected = decoding.sample(POLICY, BASE, RNG, padded(PROMPTS), max_new_tokens=5, eos_ids=EOS)
    assert_same(decoded(candidates=1), expected, rtol=1e-5, atol=1e-5)


@functools.cache
def best_of_three():
    both = {"policy": BASE, "reward": JUDGED}
    return decoding.best_of_n(POLICY, REWARD, both, RNG, padded(PROMPTS), num_samples=3, max_new_tokens=5, eos_ids=EOS)


@pytest.mark.parametrize("block", [5, 9])
def test_a_block_as_long_as_the_limit_is_best_of_n(block):
    expected = best_of_three()
    assert (np.asarray(expected.info.reward).argmax(1) > 0).any()
    assert_same(decoded(block=block), expected.completions, rtol=1e-5, atol=1e-5)


def reference(prompt: list[int], index: int, *, candidates: int, block: int, new: int) -> list[int]:
    """The same decoder without caches: every candidate block drawn and scored from the whole text."""
    text: list[int] = []
    draws = jax.random.split(RNG)[1]
    while len(text) < new and not (text and text[-1] in EOS):
        options = []
        for j in range(candidates):
            option = list(text)
            while len(option) < min(len(text) + block, new) and not (option and option[-1] in EOS):
                key = jax.random.fold_in(jax.random.fold_in(jax.random.fold_in(draws, len(option)), index), j)
                mass = np.exp(np.asarray(NEXT(*right_padded(prompt + option))))
                option.append(int(np.searchsorted(np.cumsum(mass) / mass.sum(), float(jax.random.uniform(key)))))
            options.append(option)
        text = max(options, key=lambda o: float(SCORE(*right_padded(prompt + o))))
    return text


NEXT = jax.jit(lambda tokens, mask: LM.apply(BASE, tokens, mask=mask).logits[0, mask.sum() - 1])
SCORE = jax.jit(lambda tokens, mask: JUDGE.apply(JUDGED, tokens, mask=mask).head[0, mask.sum() - 1, 0])


def right_padded(text: list[int]) -> tuple[jax.Array, jax.Array]:
    batch = padded([text], side="right", extra=12 - len(text))
    return batch.tokens, batch.mask


def test_tokens_are_those_of_a_decoder_without_caches():
    """Ragged prompts, EOS inside blocks, a shorter last block: token by token, the winner's cache goes on right."""
    found = decoded(candidates=3, block=2, new=5)
    for b, prompt in enumerate(PROMPTS):
        kept = np.asarray(found.tokens[b])[np.asarray(found.mask[b])].tolist()
        assert kept == reference(prompt, b, candidates=3, block=2, new=5), b
    assert int(found.finished.sum()) > 0
    np.testing.assert_array_equal(found.truncated, ~found.finished)
    assert (np.asarray(found.tokens)[~np.asarray(found.mask)] == 0).all()


def test_log_prob_is_that_of_the_kept_tokens_under_the_policy():
    """A DPO-like policy with its reference beside it, tilted: recomputed by `decoding.log_prob`, EOS and all."""
    other = tiny_lm(7, num_layers=1)
    beside = policies.with_reference(POLICY, policies.language_model(other[0]))
    arm = tiny_lm(4, num_layers=1)
    policy = policies.tilt(beside, critics.genarm(arm[0]))
    params = {
        "policy": {"policy": BASE, "reference": other[1]},
        "critic": arm[1],
        "beta": jnp.array([0.5, 1.0, 4.0, 0.8, 1.3]),
    }
    found = decoded(policy, ARGS, {"policy": params, "critic": JUDGED})
    again = decoding.log_prob(policy, params, RNG, padded(PROMPTS), found.tokens, found.mask, eos_ids=EOS)
    assert_same(found, again, rtol=1e-4, atol=1e-4)


def test_rows_do_not_depend_on_their_neighbours_nor_on_padding():
    together = decoded()
    prompts = padded(PROMPTS, side="right", extra=3)
    assert_same(decoded(prompts=prompts), together, rtol=1e-4, atol=1e-5)
    some = jnp.array([3, 1])
    alone = decoded(prompts=TokenBatch(prompts.tokens[some], prompts.mask[some], some))
    expected = jax.tree.map(lambda x: None if x is None else x[some], together)
    assert_same(alone, expected, rtol=1e-4, atol=1e-5)


def nothing(params, tokens, mask, prompt_length, index):
    return jnp.zeros(len(tokens))


@pytest.mark.parametrize("name", ["hidden_value", "genarm", "map_scores"])
def test_every_kind_of_critic_selects_blocks(name):
    """The kept block scores highest by the critic itself, stepped over each candidate's tokens from the start."""
    case = cases.critic_cases()[name]
    prompts = padded(PROMPTS)
    n, width = 3, 2
    found = decoded(critic=case.critic, params={"policy": BASE, "critic": case.params}, new=3)
    samples = decoding.best_of_n(
        POLICY,
        nothing,
        {"policy": BASE, "reward": None},
        RNG,
        prompts,
        num_samples=n,
        max_new_tokens=width,
        eos_ids=EOS,
    ).info.samples
    each = jax.jit(lambda tokens, mask: stepped(case, prompts, tokens, mask))
    score = np.stack([each(samples.tokens[:, j], samples.mask[:, j]) for j in range(n)], axis=1)
    kept = np.asarray(samples.tokens)[np.arange(5), score.argmax(axis=1)]
    clear = np.sort(score, axis=1)
    clear = (clear[:, -1] - clear[:, -2] > 1e-4) | (score.max(1) == score[:, 0])
    assert clear.any()
    np.testing.assert_array_equal(np.asarray(found.tokens)[clear, :width], kept[clear])


def test_an_early_end_is_scored_by_the_output_it_was_drawn_from():
    """A critic that wants unlikely ends: it reads the policy's output, which a row that stands still no longer has."""
    eos = (0, 1, 2, 3)

    def score(params, rng, state, output, candidates):
        value = jnp.take_along_axis(output.log_prob, candidates, axis=1)
        return jnp.where(candidates <= 3, 100, 0) - value, state

    critic = Critic(lambda *a: jnp.zeros(5), score, lambda params, proposal, choice: proposal, "level")
    params = {"policy": BASE, "critic": None}
    n = 16
    found = decoded(critic=critic, params=params, candidates=n, block=3, new=3, eos_ids=eos)
    samples = decoding.best_of_n(
        POLICY,
        nothing,
        {"policy": BASE, "reward": None},
        RNG,
        padded(PROMPTS),
        num_samples=n,
        max_new_tokens=3,
        eos_ids=eos,
    ).info.samples
    ended = np.asarray(samples.finished)
    last = np.take_along_axis(np.asarray(samples.log_prob), np.asarray(samples.mask).sum(-1, keepdims=True) - 1, -1)
    best = (100 * ended - last[..., 0]).argmax(axis=1)
    early = ended & (np.asarray(samples.mask).sum(-1) < 3)
    assert early[np.arange(5), best].sum() >= 2
    np.testing.assert_array_equal(found.tokens, np.asarray(samples.tokens)[np.arange(5), best])


def stepped(case, prompts, tokens, mask):
    """The critic's score [B] of a beginning: the last q, or the sum of an increment critic's."""
    critic = case.critic
    state, output = POLICY.init(BASE, RNG, prompts, 3)
    inner = critic.init(case.params, RNG, prompts, 3)
    score = jnp.zeros(len(tokens))
    for t in range(tokens.shape[1]):
        q, proposal = critic.score(case.params, RNG, inner, output, None)
        new = q[jnp.arange(len(tokens)), tokens[:, t]]
        score = jnp.where(mask[:, t], new + (score if critic.kind == "increment" else 0), score)
        token = jnp.where(mask[:, t], tokens[:, t], -1)
        inner = critic.advance(case.params, proposal, token)
        state, output = POLICY.step(BASE, RNG, state, token)
    return score


def test_a_follower_head_selects_as_its_logits_do_and_weights_are_per_prompt():
    """A log weight is monotone in the logit: a sum of both, with weight 0 on one of them per prompt, is either."""
    lm, params = tiny_lm(3, "q", num_layers=1)
    spec = models.Head("q", hidden_size=12, follower=models.Follower("exceedance", beta=0.5, bound=2.0))
    follower = critics.follower(models.with_head(lm, spec))
    plain = decoded(critic=critics.value(lm), params={"policy": BASE, "critic": params})
    both = critics.weighted_sum([ARGS, follower])
    weighted = {"critics": [JUDGED, params], "weights": jnp.array([[1.0, 0.0]] * 2 + [[0.0, 1.0]] * 3)}
    mixed = decoded(critic=both, params={"policy": BASE, "critic": weighted})
    np.testing.assert_array_equal(mixed.tokens[:2], decoded().tokens[:2])
    np.testing.assert_array_equal(mixed.tokens[2:], plain.tokens[2:])


def test_each_model_reads_its_own_template():
    """The critic's: a prompt that makes it prefer another candidate; the policy's is as before."""
    other = padded([[9, *row, 2] for row in PROMPTS], side="right")
    found = decoded(prompts={"policy": padded(PROMPTS), "critic": other}, block=5)
    samples = best_of_three().info.samples
    joined = jax.jit(REWARD)
    scores = []
    for j in range(3):
        tokens, mask, length = mdp.concatenate(other, samples.tokens[:, j], samples.mask[:, j])
        scores.append(joined(JUDGED, tokens, mask, length, jnp.arange(5)))
    pick = np.argmax(np.stack(scores, axis=1), axis=1)
    assert (pick != np.asarray(best_of_three().info.reward).argmax(axis=1)).any()
    np.testing.assert_array_equal(found.tokens, samples.tokens[jnp.arange(5), pick])


def counted(policy):
    traces, steps = [], []

    def init(*arguments):
        traces.append(1)
        return policy.init(*arguments)

    def step(*arguments):
        jax.debug.callback(lambda: steps.append(1))
        return policy.step(*arguments)

    return policy._replace(init=init, step=step), traces, steps


@needs_jit
def test_values_do_not_retrace():
    policy, traces, _ = counted(POLICY)
    for seed in range(2):
        for temperature in (0.5, 2.0):
            decoded(policy, rng=jax.random.key(seed), temperature=jnp.asarray(temperature))
    assert len(traces) == 1


def test_the_loop_stops_when_every_row_is_finished():
    """A base that ends at once: one block of one token, and the winner stands still."""
    policy, _, steps = counted(tree.policy(TREE)._replace(check=None))
    table = jnp.full((TREE.num_states, 2), -50.0).at[:, 0].set(0.0)
    params = {"policy": table, "critic": table}
    critic = CRITICS["level"]._replace(check=None)
    found = decoding.blockwise(
        policy, critic, params, RNG, tree.prompts(4), num_samples=2, block_size=8, max_new_tokens=80, eos_ids=(0,)
    ).completions
    jax.block_until_ready(found)
    jax.effects_barrier()
    assert len(steps) == 2  # after the first token all stand still, and so does the winner
    np.testing.assert_array_equal(found.mask.sum(axis=1), 1)
    assert found.finished.all()


def test_bad_input_is_a_value_error_before_tracing():
    def init(*arguments):
        raise AssertionError("traced")

    policy = POLICY._replace(init=init)
    wide = tiny_lm(0, "reward", vocab_size=13, num_layers=1)
    prompts = padded(PROMPTS)
    bad = [
        ({"candidates": 0}, "num_samples: expected at least 1, found 0"),
        ({"block": 0}, "block_size: expected at least 1, found 0"),
        ({"new": 0}, "max_new_tokens: expected at least 1"),
        ({"new": 61}, "context of 64"),
        ({"critic": critics.args(wide[0])}, "one vocabulary, found 11 and 13"),
        ({"params": {"policy": BASE}}, r"params: expected entries .*\(missing critic\)"),
        ({"params": {"critic": JUDGED}}, r"params: expected entries .*\(missing policy\)"),
        ({"prompts": {"policy": prompts}}, "prompts: expected an entry 'critic'"),
        ({"prompts": {"policy": prompts, "critic": padded(PROMPTS[:2])}}, "expected 2 prompts as in"),
        ({"temperature": -1.0}, "temperature"),
        ({"eos_ids": (VOCAB,)}, "eos_ids"),
    ]
    for changes, match in bad:
        with pytest.raises(ValueError, match=match):
            decoded(policy, **changes)


def test_a_score_that_is_nan_is_refused_and_names_its_prompts():
    base, q = exact.tables(TREE, 0)[0], exact.tables(TREE, 1)[0]
    params = {"policy": base, "critic": jnp.stack([q, q * jnp.nan, q, q.at[0, 1].set(jnp.nan)])}
    prompts = tree.prompts(4)
    critic = CRITICS["level"]
    with pytest.raises(ValueError, match=r"critic: .* found NaN for prompts \[1, 3\]"):
        decoded(TABULAR, critic, params, prompts=prompts, new=4, block=1, candidates=16)
    # −inf forbids a block.
    forbidden = params | {"critic": jnp.zeros((4, *q.shape)).at[:, 0, 0].set(-jnp.inf)}
    found = decoded(TABULAR, critic, forbidden, prompts=prompts, new=4, block=1, candidates=16)
    np.testing.assert_array_equal(found.tokens[:, 0], 1)


def test_the_bound_counts_begun_blocks():
    mask = np.arange(5) < np.array([1, 2, 3, 5])[:, None]
    expected = np.array([1, 1, 2, 3]) * (np.log(4) - 3 / 4)
    np.testing.assert_allclose(metrics.blockwise_kl_bound(mask, block_size=2, num_samples=4), expected)
    np.testing.assert_array_equal(metrics.blockwise_kl_bound(mask, block_size=2, num_samples=1), 0)
    for arguments in ({"block_size": 0, "num_samples": 4}, {"block_size": 2, "num_samples": 0}):
        with pytest.raises(ValueError, match="expected at least 1"):
            metrics.blockwise_kl_bound(mask, **arguments)
