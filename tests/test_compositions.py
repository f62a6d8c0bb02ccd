"""Parts put together: what each composition gives is what its parts say."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign import critics, decoding, infalign, mdp, policies, rewards
from tests.conftest import EOS, tiny_lm

RNG = jax.random.key(0)


def model(seed: int, head: str | None = None):
    return tiny_lm(seed, head, num_layers=1)


@pytest.fixture(scope="module")
def judge():
    return model(1, "reward")


def rewards_of(judge, completions, prompts):
    return rewards.from_model(judge[0])(judge[1], *decoding.join(prompts, completions), jnp.arange(5))


def best_over_two_critics(base, judge, value, prompts, eos_ids):
    """Best-of-n over a policy that a value model and a partial-text reward guide together."""
    (lm, params), (judge_lm, judged), (value_lm, valued) = base, judge, value
    both = critics.weighted_sum([critics.args(judge_lm), critics.value(value_lm)])
    policy = policies.tilt(policies.language_model(lm), both, top_k=4)
    guided = {"policy": params, "critic": {"critics": [judged, valued], "weights": [0.3, 0.7]}, "beta": 0.5}
    return decoding.best_of_n(
        policy,
        rewards.from_model(judge_lm),
        {"policy": guided, "reward": judged},
        jax.random.key(0),
        prompts,
        num_samples=3,
        max_new_tokens=3,
        eos_ids=eos_ids,
    )


def test_best_of_n_over_two_critics(judge, prompts):
    found = best_over_two_critics(model(0), judge, model(2, "value"), prompts, EOS)
    assert found.info.samples.tokens.shape == (5, 3, 3)
    np.testing.assert_allclose(
        rewards_of(judge, found.completions, prompts), found.info.reward.max(axis=1), rtol=1e-4, atol=1e-4
    )


PHI = infalign.exponential(5)


def calibrated(base, judge, table, prompts, eos_ids):
    """A tilt by a calibrated reward: scores become quantiles of the base's rewards, and are transformed."""
    (lm, params), (judge_lm, judged) = base, judge

    def place(table, q, log_prob, index):
        return PHI(infalign.calibrate(q, reference=table[index], is_sorted=True))

    critic = critics.map_scores(critics.args(judge_lm), place)
    return decoding.sample(
        policies.tilt(policies.language_model(lm), critic, top_k=3),
        {"policy": params, "critic": {"critic": judged, "map": table}, "beta": 0.2},
        jax.random.key(0),
        prompts,
        max_new_tokens=3,
        eos_ids=eos_ids,
    )


def test_calibrated_tilt(judge, prompts):
    """Neither an increasing map of the reward nor another one for each prompt changes what is drawn."""
    table = jnp.sort(jax.random.normal(jax.random.key(3), (5, 9)), axis=1)
    drawn = calibrated(model(0), judge, table, prompts, EOS)
    lm, params = judge
    scaled = params | {"head": jax.tree.map(lambda x: 2 * x, params["head"])}
    again = calibrated(model(0), (lm, scaled), 2 * table, prompts, EOS)
    np.testing.assert_array_equal(drawn.tokens, again.tokens)
    np.testing.assert_allclose(drawn.log_prob, again.log_prob, rtol=1e-5, atol=1e-6)
    other = calibrated(model(0), judge, table + 50, prompts, EOS)  # every score is below: nothing is told apart
    base = np.asarray(other.log_prob_ref)
    assert not np.allclose(drawn.log_prob - drawn.log_norm, base - other.log_norm)


def best_with_betas(base, arm, judge, prompts, beta, eos_ids):
    """One KL weight per prompt, under best-of-n: the state is repeated, each prompt keeps its own."""
    policy = policies.tilt(policies.language_model(base[0]), critics.genarm(arm[0]))
    guided = {"policy": base[1], "critic": arm[1], "beta": beta}
    return decoding.best_of_n(
        policy,
        rewards.from_model(judge[0]),
        {"policy": guided, "reward": judge[1]},
        jax.random.key(0),
        prompts,
        num_samples=3,
        max_new_tokens=3,
        eos_ids=eos_ids,
    )


def test_beta_per_prompt(judge, prompts):
    """A prompt's samples do not depend on the other prompts' betas; a large beta is the base."""
    base, arm = model(0), model(4)
    mixed = best_with_betas(base, arm, judge, prompts, jnp.array([0.3, 1.0, 1e9, 0.3, 1e9]), EOS)
    same = best_with_betas(base, arm, judge, prompts, jnp.array([0.3, 0.2, 5.0, 9.0, 1e9]), EOS)
    for b in (0, 4):
        np.testing.assert_array_equal(mixed.info.samples.tokens[b], same.info.samples.tokens[b])
    assert (mixed.info.samples.tokens[1] != same.info.samples.tokens[1]).any()
    np.testing.assert_allclose(mixed.info.samples.kl[2], 0, atol=1e-5)
    assert mixed.info.samples.kl[0].sum() > 0.01


def distinct(tokens, mask, prompt_length, index):
    response = np.asarray(mdp.response_part(mask, prompt_length))
    return np.array([len(set(row[real].tolist())) for row, real in zip(tokens, response, strict=True)])


def most_distinct(base, prompts, eos_ids):
    """A reward written in numpy: distinct tokens of the response."""
    policy, reward = policies.language_model(base[0]), rewards.from_numpy(distinct)
    params = {"policy": base[1], "reward": None}
    key = jax.random.key(0)
    return decoding.best_of_n(policy, reward, params, key, prompts, num_samples=4, max_new_tokens=5, eos_ids=eos_ids)


def test_numpy_reward(prompts):
    found = most_distinct(model(0), prompts, EOS)
    tokens, mask = np.asarray(found.info.samples.tokens), np.asarray(found.info.samples.mask)
    for b in range(5):
        count = [len(set(tokens[b, j][mask[b, j]].tolist())) for j in range(4)]
        assert found.info.reward[b].tolist() == count
        assert len(set(np.asarray(found.completions.tokens[b])[np.asarray(found.completions.mask[b])].tolist())) == max(
            count
        )


def sample_above_tilted(base, arm, judge, prompts, eos_ids):
    """Transfer Q* whose roll-outs come from a policy that a GenARM reward already guides."""
    (lm, params), (arm_lm, arm_params), (judge_lm, judged) = base, arm, judge
    plain = policies.language_model(lm)
    guided = policies.tilt(plain, critics.genarm(arm_lm))
    critic = critics.transfer_q(guided, rewards.from_model(judge_lm), eos_ids=eos_ids, num_samples=2, lookahead=2)
    aligned = {"policy": params, "critic": arm_params, "beta": 0.5}
    return decoding.sample(
        policies.tilt(plain, critic, top_k=3),
        {"policy": params, "critic": {"baseline": aligned, "reward": judged}, "beta": 0.1},
        jax.random.key(0),
        prompts,
        max_new_tokens=3,
        eos_ids=eos_ids,
    )


def test_a_tilted_policy_is_the_baseline_of_transfer_q(judge, prompts):
    """The base alone is log_prob_ref, and at a small beta the drawn responses earn more than the base's."""
    drawn = sample_above_tilted(model(0), model(4), judge, prompts, EOS)
    alone = decoding.log_prob(policies.language_model(model(0)[0]), model(0)[1], RNG, prompts, drawn.tokens, drawn.mask)
    np.testing.assert_allclose(drawn.log_prob_ref, alone.log_prob, rtol=1e-4, atol=1e-4)
    plain = decoding.sample(
        policies.language_model(model(0)[0]), model(0)[1], RNG, prompts, max_new_tokens=3, eos_ids=EOS
    )
    assert rewards_of(judge, drawn, prompts).mean() > rewards_of(judge, plain, prompts).mean()
