"""Beam search with a critic: exact laws on trees, the decoder that it is with one beam, and its blocks and groups."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign import critics, decoding, policies, tree
from tests import exact
from tests.cases import weighted_tokens
from tests.conftest import EOS, PROMPTS, padded, tiny_lm
from tests.sampling import chi_square, index_of
from tests.test_blockwise import assert_same

RNG = jax.random.key(0)
TREE = tree.Tree(3, 2, eos_id=0)
BASE, LEVEL, INCREMENT = tree.policy(TREE), tree.critic(TREE, "level"), tree.critic(TREE, "increment")
DEEP = tree.Tree(5, 5, eos_id=0)
TABULAR, CRITICS = tree.policy(DEEP), {kind: tree.critic(DEEP, kind) for kind in ("level", "increment")}
BOTH = {"policy": exact.tables(DEEP, 1)[0], "critic": exact.tables(DEEP, 2)[0]}


def searched(critic=CRITICS["level"], params=BOTH, policy=TABULAR, prompts=None, **changes):
    prompts = exact.one_prompt(4)._replace(index=jnp.arange(4)) if prompts is None else prompts
    sizes = {"width": 2, "num_samples": 2, "block_size": 2, "max_new_tokens": 5} | changes
    return decoding.beam(policy, critic, params, RNG, prompts, **sizes)


@pytest.mark.parametrize(("width", "samples"), [(2, 2), (3, 1)])
def test_the_law_by_going_through_all_draws(width, samples):
    """Beams that have ended, by EOS after one token, stand beside those that go on. 20,000 draws; 9 cells of which each
    statistic has a probability below 1e-5 of 37."""
    base, q = exact.tables(TREE, 10)[0], 2 * exact.tables(TREE, 11)[0]
    expected = exact.beam_law(TREE, base, q, width=width, samples=samples)
    sizes = {"width": width, "num_samples": samples, "block_size": 1, "max_new_tokens": 2}
    found = searched(LEVEL, {"policy": base, "critic": q}, BASE, tree.prompts(20_000), **sizes)
    assert chi_square(index_of(TREE, found.completions), np.exp(expected)) < 37
    other = exact.beam_law(TREE, base, q, width=1, samples=width * samples)
    assert chi_square(index_of(TREE, found.completions), np.exp(other)) > 100
    kl = exact.kl(np.where(np.isfinite(expected), expected, -1e9), np.asarray(tree.response_log_prob(TREE, base)))
    assert 0 < kl < found.kl.value.mean()


def test_a_beam_that_has_ended_stands_once():
    """Its copies would fill the beams of the second of three blocks, and what goes on and ends better would be lost:
    EOS first then had .43 in place of .17. 4,000 draws of 4 cells; the statistic is above 26 with a probability of
    1e-5."""
    long = tree.Tree(2, 3, eos_id=0)
    base, q = exact.tables(long, 10)[0], 2 * exact.tables(long, 26)[0]
    expected = np.exp(exact.beam_law(long, base, q, width=2, samples=2))
    np.testing.assert_allclose(expected[0], 0.1653, atol=1e-4)
    parts, sizes = (tree.critic(long, "level"), {"policy": base, "critic": q}, tree.policy(long)), {"block_size": 1}
    found = searched(*parts, tree.prompts(4000), **sizes, max_new_tokens=3)
    assert chi_square(index_of(long, found.completions), expected) < 26


@pytest.mark.parametrize("kind", ["level", "increment"])
def test_with_one_beam_it_is_blockwise_decoding(kind):
    """Bit for bit; the last block is shorter."""
    found = searched(CRITICS[kind], width=1, num_samples=3, temperature=1.3)
    prompts, sizes = exact.one_prompt(4)._replace(index=jnp.arange(4)), {"num_samples": 3, "block_size": 2}
    limits = {"max_new_tokens": 5, "temperature": 1.3}
    expected = decoding.blockwise(TABULAR, CRITICS[kind], BOTH, RNG, prompts, **sizes, **limits)
    assert_same(found.completions, expected.completions)
    np.testing.assert_array_equal(found.info.score[:, 0], expected.info.score)
    np.testing.assert_array_equal(found.info.blocks[:, 0], expected.info.blocks)
    np.testing.assert_array_equal(found.kl.value, expected.kl.value)
    assert found.kl.reference == expected.kl.reference == "tempered policy"


def test_the_first_among_equals_are_kept_and_chosen():
    """Ten searches of one beam and one sample tell the scores of all continuations, of which a search of several beams
    keeps some, in their order. The critic's scores take two values."""
    levels = jnp.broadcast_to(jnp.array([0.0, 1.0, 0.0, 1.0, 1.0]), BOTH["critic"].shape)  # of the last token alone
    params, sizes = {"policy": BOTH["policy"], "critic": levels}, {"block_size": 5}
    every = searched(params=params, groups=10, width=1, num_samples=1, **sizes).info
    tokens, score = np.asarray(every.samples.tokens), np.asarray(every.score)
    assert {len(set(row)) for row in score.tolist()} == {2}
    for width, samples in ((2, 5), (10, 1), (1, 10)):
        found = searched(params=params, width=width, num_samples=samples, **sizes)
        kept = np.sort(np.argsort(-score, axis=1, kind="stable")[:, :width], axis=1)
        expected = np.take_along_axis(tokens, kept[:, :, None], axis=1)
        np.testing.assert_array_equal(found.info.samples.tokens, expected)
        first = np.take_along_axis(score, kept, axis=1).argmax(axis=1)
        np.testing.assert_array_equal(found.completions.tokens, expected[np.arange(4), first])
    # And by a reward that is the same for all: the first beam.
    even = searched(params=params | {"reward": jnp.zeros(5)}, width=5, reward=weighted_tokens, **sizes)
    np.testing.assert_array_equal(even.completions.tokens, even.info.samples.tokens[:, 0])


def test_groups_do_not_see_each_other_and_the_reward_chooses():
    """The first group of two is the search of one, and so is a row alone; the best of all by the reward is kept."""
    alone = searched()
    params = BOTH | {"reward": jnp.sin(jnp.arange(5.0))}
    both = searched(params=params, groups=2, reward=weighted_tokens)
    np.testing.assert_array_equal(both.info.samples.tokens[:, :2], alone.info.samples.tokens)
    np.testing.assert_array_equal(both.info.score[:, :2], alone.info.score)
    # The second group draws by numbers of its own.
    assert (both.info.samples.tokens[:, 2:] != alone.info.samples.tokens).any()
    assert both.info.samples.tokens.shape == (4, 4, 5)
    best = both.info.reward.argmax(axis=1)
    np.testing.assert_array_equal(both.completions.tokens, both.info.samples.tokens[jnp.arange(4), best])
    flat = jax.tree.map(lambda x: x[:, 3], both.info.samples)
    expected = weighted_tokens(params["reward"], *decoding.join(exact.one_prompt(4), flat), None)
    np.testing.assert_allclose(both.info.reward[:, 3], expected, atol=1e-5)
    first = (alone.info.samples.tokens == alone.completions.tokens[:, None]).all(axis=-1).argmax(axis=1)
    np.testing.assert_array_equal(alone.info.score.max(axis=1), alone.info.score[jnp.arange(4), first])
    single = searched(prompts=exact.one_prompt(1)._replace(index=jnp.array([2])))
    np.testing.assert_array_equal(alone.completions.tokens[2], single.completions.tokens[0])


def test_records_scores_and_blocks_are_those_of_the_tokens():
    """On models: log-probabilities of the policy, the critic's score of the whole, whatever was dropped on the way; a
    block ends with a boundary token, at its limit or with the response, and nowhere else."""
    lm, own = tiny_lm(0, num_layers=1)
    judge, judged = tiny_lm(1, "reward", num_layers=1)
    policy, critic, prompts = policies.language_model(lm), critics.args(judge), padded(PROMPTS)
    params, sizes = {"policy": own, "critic": judged}, {"width": 3, "boundary": (2, 5, 7), "block_size": 3}
    found = searched(critic, params, policy, prompts, **sizes, max_new_tokens=6)
    every = jax.tree.map(lambda x: x.reshape((-1, *x.shape[2:])), found.info.samples)
    repeated = jax.tree.map(lambda x: jnp.repeat(x, 3, axis=0), prompts)
    tilted = policies.tilt(policy, critic), policies.TiltParams(own, judged, 1.0)
    scored = decoding.log_prob(*tilted, RNG, repeated, every.tokens, every.mask)
    np.testing.assert_allclose(every.log_prob, scored.log_prob_ref, atol=1e-4)
    total = (scored.log_prob - scored.log_prob_ref + scored.log_norm).sum(axis=1)
    np.testing.assert_allclose(found.info.score.reshape(-1), total, atol=1e-4)
    rows, inner = zip(every.tokens, every.mask, every.finished, found.info.blocks.reshape(-1), strict=True), 0
    for tokens, mask, finished, blocks in rows:
        ends, length = 0, 0
        response = tokens[mask].tolist()
        assert finished == (response[-1] in EOS)
        inner += len({2, 5, 7} & set(response[:-1]))
        for i, token in enumerate(response):
            length += 1
            if token in (2, 5, 7, *EOS) or length == 3 or i == len(response) - 1:
                ends, length = ends + 1, 0
        assert blocks == ends
    assert inner > 3  # a boundary token ends the block and not the response


def test_what_is_refused():
    for changes, match in (
        ({"width": 0}, "width: expected at least 1, found 0"),
        ({"groups": 0}, "groups: expected at least 1, found 0"),
        ({"num_samples": 0}, "num_samples: expected at least 1, found 0"),
        ({"block_size": 0}, "block_size: expected at least 1, found 0"),
        ({"boundary": (5,)}, r"boundary: expected ids in \[0, 5\), found \(5,\)"),
        ({"boundary": "\n"}, "boundary: expected a sequence of ids, found"),
        ({"critic": tree.critic(tree.Tree(7, 2), "level")}, "beam: expected one vocabulary, found 5 and 7 tokens"),
        ({"reward": weighted_tokens}, r"params: expected .*reward"),
        ({"critic": TABULAR}, "critic: expected a Critic"),
    ):
        with pytest.raises(ValueError, match=match):
            searched(**changes)
    base, q = exact.tables(TREE, 10)[0], exact.tables(TREE, 11)[0]
    with pytest.raises(ValueError, match=r"critic: expected scores that are numbers, found NaN for prompts \[0, 1\]"):
        searched(LEVEL, {"policy": base, "critic": q * jnp.nan}, BASE, tree.prompts(2), max_new_tokens=2)
