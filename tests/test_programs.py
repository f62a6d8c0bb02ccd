"""Short programs as a user writes them: they run, they are short, and their results are what they say."""

from __future__ import annotations

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign import decoding, policies, rewards
from tests.conftest import EOS, PROMPTS, VOCAB, alone, tiny_lm
from tests.programs import (
    best_of_n_over_two_critics,
    beta_per_prompt,
    blockwise_on_dpo,
    calibrated_tilt,
    gradient_into_a_reward_model,
    numpy_reward,
    own_policy,
    tilted_baseline,
)

FILES = sorted(p for p in (pathlib.Path(__file__).parent / "programs").glob("*.py") if p.name != "__init__.py")
RNG = jax.random.key(0)


def model(seed: int, head: str | None = None):
    return tiny_lm(seed, head, num_layers=1)


@pytest.fixture(scope="module")
def judge():
    return model(1, "reward")


def rewards_of(judge, completions, prompts):
    return rewards.from_model(judge[0])(judge[1], *decoding.join(prompts, completions), jnp.arange(5))


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_programs_are_short(path):
    text = path.read_text().splitlines()
    assert len(text) < 25
    assert text[0].startswith('"""')


def test_best_of_n_over_two_critics(judge, prompts):
    found = best_of_n_over_two_critics.main(model(0), judge, model(2, "value"), prompts, EOS)
    assert found.info.samples.tokens.shape == (5, 3, 3)
    np.testing.assert_allclose(
        rewards_of(judge, found.completions, prompts), found.info.reward.max(axis=1), rtol=1e-4, atol=1e-4
    )


def test_calibrated_tilt(judge, prompts):
    """Neither an increasing map of the reward nor another one for each prompt changes what is drawn."""
    table = jnp.sort(jax.random.normal(jax.random.key(3), (5, 9)), axis=1)
    drawn = calibrated_tilt.main(model(0), judge, table, prompts, EOS)
    lm, params = judge
    scaled = params | {"head": jax.tree.map(lambda x: 2 * x, params["head"])}
    again = calibrated_tilt.main(model(0), (lm, scaled), 2 * table, prompts, EOS)
    np.testing.assert_array_equal(drawn.tokens, again.tokens)
    np.testing.assert_allclose(drawn.log_prob, again.log_prob, rtol=1e-5, atol=1e-6)
    other = calibrated_tilt.main(
        model(0), judge, table + 50, prompts, EOS
    )  # every score is below: nothing is told apart
    base = np.asarray(other.log_prob_ref)
    assert not np.allclose(drawn.log_prob - drawn.log_norm, base - other.log_norm)


def test_blockwise_on_dpo(judge, prompts):
    dpo, reference = model(7), model(0)
    drawn, kl = blockwise_on_dpo.main(dpo, reference, judge, prompts, EOS)
    for (lm, params), expected in ((dpo, drawn.log_prob), (reference, drawn.log_prob_ref)):
        alone = decoding.log_prob(policies.language_model(lm), params, RNG, prompts, drawn.tokens, drawn.mask)
        np.testing.assert_allclose(expected, alone.log_prob, rtol=1e-4, atol=1e-4)
    blocks = np.ceil(np.asarray(drawn.mask).sum(1) / 2)
    ratio = np.asarray((drawn.log_prob - drawn.log_prob_ref).sum(1))
    np.testing.assert_allclose(kl, ratio + blocks * (np.log(3) - 2 / 3), rtol=1e-5)


def test_beta_per_prompt(judge, prompts):
    """A prompt's samples do not depend on the other prompts' betas; a large beta is the base."""
    base, arm = model(0), model(4)
    mixed = beta_per_prompt.main(base, arm, judge, prompts, jnp.array([0.3, 1.0, 1e9, 0.3, 1e9]), EOS)
    same = beta_per_prompt.main(base, arm, judge, prompts, jnp.array([0.3, 0.2, 5.0, 9.0, 1e9]), EOS)
    for b in (0, 4):
        np.testing.assert_array_equal(mixed.info.samples.tokens[b], same.info.samples.tokens[b])
    assert (mixed.info.samples.tokens[1] != same.info.samples.tokens[1]).any()
    np.testing.assert_allclose(mixed.info.samples.kl[2], 0, atol=1e-5)
    assert mixed.info.samples.kl[0].sum() > 0.01


def test_numpy_reward(prompts):
    found = numpy_reward.main(model(0), prompts, EOS)
    tokens, mask = np.asarray(found.info.samples.tokens), np.asarray(found.info.samples.mask)
    for b in range(5):
        count = [len(set(tokens[b, j][mask[b, j]].tolist())) for j in range(4)]
        assert found.info.reward[b].tolist() == count
        assert len(set(np.asarray(found.completions.tokens[b])[np.asarray(found.completions.mask[b])].tolist())) == max(
            count
        )


def test_gradient_into_a_reward_model(prompts):
    tokens = jnp.array([[1, 2, 5], [3, 3, 9], [10, 4, 6], [2, 8, 1], [7, 1, 2]])
    mask = jnp.ones((5, 3), bool).at[1, 2].set(False)
    rate = 1e-5
    before, after, gradient = gradient_into_a_reward_model.main(model(0), model(4), prompts, tokens, mask, rate)
    squared = sum(float((g**2).sum()) for g in jax.tree.leaves(gradient))
    assert after > before
    np.testing.assert_allclose(after - before, rate * squared, rtol=0.2)


def test_own_policy(prompts):
    table = jax.random.normal(jax.random.key(3), (VOCAB, VOCAB)) * 2
    arm = model(4)
    drawn = own_policy.main(table, arm, prompts, EOS)
    lm, params = arm
    for b, prompt in enumerate(PROMPTS):
        text = list(prompt)
        for t in range(int(drawn.mask[b].sum())):
            logits = alone(lm, params, text).logits[-1]
            expected = jax.nn.log_softmax(jax.nn.log_softmax(table[text[-1]]) + jax.nn.log_softmax(logits) / 2)
            text.append(int(drawn.tokens[b, t]))
            np.testing.assert_allclose(drawn.log_prob[b, t], expected[text[-1]], rtol=1e-4, atol=1e-4)


def test_a_tilted_policy_is_the_baseline_of_transfer_q(judge, prompts):
    """The base alone is log_prob_ref, and at a small beta the drawn responses earn more than the base's."""
    drawn = tilted_baseline.main(model(0), model(4), judge, prompts, EOS)
    alone = decoding.log_prob(policies.language_model(model(0)[0]), model(0)[1], RNG, prompts, drawn.tokens, drawn.mask)
    np.testing.assert_allclose(drawn.log_prob_ref, alone.log_prob, rtol=1e-4, atol=1e-4)
    plain = decoding.sample(
        policies.language_model(model(0)[0]), model(0)[1], RNG, prompts, max_new_tokens=3, eos_ids=EOS
    )
    assert rewards_of(judge, drawn, prompts).mean() > rewards_of(judge, plain, prompts).mean()
