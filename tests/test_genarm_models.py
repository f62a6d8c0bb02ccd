"""GenARM on models: caches, templates, padding and vocabularies, in float64."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import log_softmax, logsumexp

from jaxalign import critics, decoding, models, policies, rewards
from jaxalign.data import encoded, preferences
from jaxalign.training import objectives
from tests.conftest import EOS, PROMPTS, alone, needs_jit, padded, tiny_lm

RNG = jax.random.key(0)


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


def guided(dtype="float64"):
    (lm, base), (arm_lm, arm) = tiny_lm(0, dtype=dtype), tiny_lm(4, dtype=dtype)
    policy = policies.tilt(policies.language_model(lm), critics.genarm(arm_lm))
    return policy, {"policy": base, "critic": arm, "beta": jnp.asarray(0.8)}, (lm, arm_lm)


def test_genarm_A12_cached_equals_uncached_token_by_token():
    """The same key draws the same tokens whether each step re-reads the whole text or goes on from the caches."""
    policy, params, (lm, arm_lm) = guided()
    prompts = padded(PROMPTS)
    drawn = decoding.sample(policy, params, RNG, prompts, max_new_tokens=5, eos_ids=())

    @jax.jit
    def uncached(tokens, mask):
        base = jax.nn.log_softmax(lm.apply(params["policy"], tokens, mask=mask).logits)
        arm = jax.nn.log_softmax(arm_lm.apply(params["critic"], tokens, mask=mask).logits)
        return jax.nn.log_softmax(base + arm / 0.8)

    for b, prompt in enumerate(PROMPTS):
        text = list(prompt)
        for t in range(5):
            batch = padded([text], side="right", extra=10 - len(text))
            expected = uncached(batch.tokens, batch.mask)[0, len(text) - 1]
            token = int(drawn.tokens[b, t])
            np.testing.assert_allclose(drawn.log_prob[b, t], expected[token], rtol=1e-9, atol=1e-9)
            text.append(token)


def test_genarm_A12_batch_invariance():
    policy, params, _ = guided()
    prompts = padded(PROMPTS)
    together = decoding.sample(policy, params, RNG, prompts, max_new_tokens=5, eos_ids=EOS)
    for b, prompt in enumerate(PROMPTS):
        # One width for all but the first, which is as it is.
        extra = 0 if b == 0 else 6 - len(prompt)
        single = padded([prompt], extra=extra)._replace(index=jnp.array([b]))
        single = decoding.sample(policy, params, RNG, single, max_new_tokens=5, eos_ids=EOS)
        np.testing.assert_array_equal(single.tokens[0], together.tokens[b])
        np.testing.assert_allclose(single.log_prob[0], together.log_prob[b], rtol=1e-9, atol=1e-9)


def test_genarm_A12_prompts_for_each_model():
    policy, params, (lm, arm_lm) = guided()
    prompts, template = padded(PROMPTS), padded([[6, *row, 6] for row in PROMPTS])
    drawn = decoding.sample(policy, params, RNG, {"policy": prompts, "critic": template}, max_new_tokens=3, eos_ids=())
    for b, prompt in enumerate(PROMPTS):
        y = drawn.tokens[b].tolist()
        for t in range(3):
            base = alone(lm, params["policy"], prompt + y[:t]).logits[-1]
            arm = alone(arm_lm, params["critic"], [6, *prompt, 6, *y[:t]]).logits[-1]
            expected = log_softmax(log_softmax(base) + log_softmax(arm) / 0.8)
            np.testing.assert_allclose(drawn.log_prob[b, t], expected[y[t]], rtol=1e-9, atol=1e-9)


def test_genarm_A12_appended_vocabulary_rows_are_cut():
    (lm, base), (wide_lm, wide) = tiny_lm(0), tiny_lm(4, vocab_size=12)
    with pytest.raises(ValueError, match="vocabulary"):
        policies.tilt(policies.language_model(lm), critics.genarm(wide_lm))
    cut_lm, cut = models.cut_vocabulary(wide_lm, wide, lm.vocab_size)
    policy = policies.tilt(policies.language_model(lm), critics.genarm(cut_lm))
    params = {"policy": base, "critic": cut, "beta": jnp.asarray(1.0)}
    drawn = decoding.sample(policy, params, RNG, padded(PROMPTS), max_new_tokens=3, eos_ids=())
    logits = alone(wide_lm, wide, PROMPTS[0]).logits[-1, : lm.vocab_size]
    base_logits = alone(lm, base, PROMPTS[0]).logits[-1]
    expected = log_softmax(log_softmax(base_logits) + log_softmax(logits))
    np.testing.assert_allclose(drawn.log_prob[0, 0], expected[drawn.tokens[0, 0]], rtol=1e-4, atol=1e-4)


def test_genarm_A13_the_sequence_reward_excludes_the_prompt_and_includes_eos():
    lm, params = tiny_lm(4, dtype="float64")
    reward = jax.jit(rewards.log_likelihood(lm))
    prompt, response = [4, 5, 6], [7, 8, 0]
    for side in ("left", "right"):
        batch = padded([prompt + response, [*prompt, 0]], side=side)
        found = reward(params, batch.tokens, batch.mask, jnp.array([3, 3]), jnp.array([0, 1]))
        logits = log_softmax(alone(lm, params, prompt + response).logits, axis=-1)
        expected = sum(logits[2 + t, y] for t, y in enumerate(response))
        np.testing.assert_allclose(found[0], expected, rtol=1e-10)
        np.testing.assert_allclose(found[1], logits[2, 0], rtol=1e-10)  # a response of length 1


def test_genarm_A13_padding_and_the_length_of_the_other_response_change_nothing_in_the_loss():
    """Pairs of unequal length, padded together, give the mean of the losses of each pair alone, unpadded."""
    lm, params = tiny_lm(4, dtype="float64", num_layers=1)
    text = [([4, 5, 6], [7, 8, 1, 2, 0], [9, 0]), ([1], [2, 0], [3, 9, 10, 8, 7, 0]), ([5, 2, 9, 9], [0], [4, 1, 0])]
    pairs = [encoded.PairTokens(*row, where="") for row in text]
    loss = jax.jit(objectives.autoregressive_reward(lm, beta_r=0.7))

    def padded_to(length):
        found, aux = loss(params, preferences.pad_pairs(pairs, length=length), None)
        return float(found), float(aux.metrics["margin"])

    def reward(prompt, response):
        logits = log_softmax(alone(lm, params, prompt + response).logits, axis=-1)
        return float(sum(logits[len(prompt) - 1 + t, y] for t, y in enumerate(response)))

    margin = np.array([reward(x, chosen) - reward(x, rejected) for x, chosen, rejected in text])
    expected = np.mean(np.log1p(np.exp(-0.7 * margin))), margin.mean()
    np.testing.assert_allclose(padded_to(8), expected, rtol=1e-7)
    np.testing.assert_allclose(padded_to(13), expected, rtol=1e-7)


@needs_jit
def test_genarm_A11_weights_of_several_rewards_change_per_prompt_without_a_new_trace():
    """Each prompt's law is the one of its own weights, and only the first of several sets of weights is traced."""
    (lm, base), (arm_lm, arm) = tiny_lm(0, dtype="float64", num_layers=1), tiny_lm(4, dtype="float64", num_layers=1)
    other = jax.tree.map(lambda x: x * 0.8, arm)
    traces = 0
    tilted = policies.tilt(policies.language_model(lm), critics.weighted_sum([critics.genarm(arm_lm)] * 2))

    def init(*arguments):
        nonlocal traces
        traces += 1
        return tilted.init(*arguments)

    policy = tilted._replace(init=init)
    prompts = padded(PROMPTS)
    read = [jax.jit(lambda p, x, m=m: m.apply(p, x.tokens, mask=x.mask).logits[:, -1]) for m in (lm, arm_lm)]
    each = [jax.nn.log_softmax(read[i](p, prompts)) for i, p in ((0, base), (1, arm), (1, other))]
    for seed in range(3):
        weights = jax.random.normal(jax.random.key(seed), (len(PROMPTS), 2))
        params = {"policy": base, "critic": {"critics": (arm, other), "weights": weights}, "beta": jnp.asarray(1.0)}
        drawn = decoding.sample(policy, params, RNG, prompts, max_new_tokens=2, eos_ids=())
        expected = jax.nn.log_softmax(each[0] + weights[:, :1] * each[1] + weights[:, 1:] * each[2])
        first = jnp.take_along_axis(expected, drawn.tokens[:, :1], axis=1)[:, 0]
        np.testing.assert_allclose(drawn.log_prob[:, 0], first, rtol=1e-9, atol=1e-9)
    assert traces == 1


def test_genarm_weak_to_strong_a_small_reward_guides_a_larger_base():
    """Sizes, heads and layers differ, the vocabulary is one: at every token the sum of both models' log-probabilities,
    and the correction Σ log Z of the pair."""
    lm, base = tiny_lm(0, dtype="float64", hidden_size=32, num_heads=8, num_kv_heads=8, intermediate_size=40)
    arm_lm, arm = tiny_lm(4, dtype="float64", num_layers=1, hidden_size=8, num_heads=2, num_kv_heads=1)
    policy = policies.tilt(policies.language_model(lm), critics.genarm(arm_lm))
    params = {"policy": base, "critic": arm, "beta": jnp.asarray(0.5)}
    prompt = PROMPTS[0]
    drawn = decoding.sample(policy, params, RNG, padded([prompt]), max_new_tokens=3, eos_ids=())
    text = prompt + drawn.tokens[0].tolist()
    log_base, log_arm = (
        log_softmax(alone(m, p, text).logits[len(prompt) - 1 : -1], axis=-1) for m, p in ((lm, base), (arm_lm, arm))
    )
    logit = log_base + log_arm / 0.5
    norm = logsumexp(logit, axis=-1)
    rows = np.arange(3)
    np.testing.assert_allclose(drawn.log_prob[0], (logit - norm[:, None])[rows, drawn.tokens[0]], rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(drawn.log_prob_ref[0], log_base[rows, drawn.tokens[0]], rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(drawn.log_norm[0], norm, rtol=1e-9, atol=1e-9)
