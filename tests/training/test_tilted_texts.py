"""A follower by tokens in parallel, against the tilt that is stepped through its responses."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign import critics, decoding, models, policies
from jaxalign.training import tilted_texts
from tests.conftest import padded, tiny_lm

BETA, TOP_K, STEPS = 0.7, 4, 5
PROMPTS = padded([[3, 5, 1, 7], [4], [6, 2]], side="right", extra=1)


def leader(pooling: str, pad_id: int | None):
    lm, params = tiny_lm(1, "reward", num_layers=1, eos_ids=(1,))
    head = dataclasses.replace(lm.config.head, pooling=pooling, bound=2.0)
    return models.LanguageModel(dataclasses.replace(lm.config, head=head, pad_id=pad_id)), params


@pytest.mark.parametrize(("pooling", "pad_id"), [("last", 1), ("last", 5), ("mean", 1)])
def test_log_probabilities_and_their_gradient_are_those_of_the_tilt(pooling, pad_id):
    """pad_id 1 is the EOS, 5 stands amid a response."""
    base, base_params = tiny_lm(0, num_layers=1, eos_ids=(1,))
    lm, params = leader(pooling, pad_id)
    policy = policies.tilt(policies.language_model(base), critics.args(lm), top_k=TOP_K)
    own = {"policy": base_params, "critic": params, "beta": jnp.asarray(BETA)}
    drawn = decoding.sample(policy, own, jax.random.key(3), PROMPTS, max_new_tokens=STEPS)
    tokens, mask = drawn.tokens, drawn.mask
    assert (np.asarray(tokens)[np.asarray(mask)] == pad_id).any()
    assert not np.asarray(mask).all()
    weight = jnp.asarray([1.0, -2.0, 0.5])

    def stepped(params):
        given = {**own, "critic": params}
        found = decoding.log_prob(policy, given, jax.random.key(1), PROMPTS, tokens, mask).log_prob.sum(axis=1)
        return weight @ found, found

    def parallel(params):
        found = tilted_texts.tilted_log_prob(
            lm, params, base, base_params, PROMPTS, tokens, mask, beta=BETA, top_k=TOP_K
        )
        return weight @ found, found

    wanted, values = jax.jit(jax.grad(stepped, has_aux=True))(params)
    found, others = jax.jit(jax.grad(parallel, has_aux=True))(params)
    np.testing.assert_allclose(others, values, atol=1e-5)
    np.testing.assert_allclose(others, drawn.log_prob.sum(axis=1), atol=1e-5)
    assert max(float(jnp.abs(x).max()) for x in jax.tree.leaves(wanted)) > 1e-2
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5, rtol=2e-4), found, wanted)


def test_steps_are_read_in_parts_where_there_are_many(monkeypatch):
    base, base_params = tiny_lm(0, num_layers=1)
    lm, params = leader("last", 1)
    tokens = jnp.asarray([[2, 7, 4, 1, 0], [8, 8, 2, 7, 5], [5, 1, 0, 0, 0]])
    mask = jnp.asarray([[True] * 4 + [False], [True] * 5, [True] * 2 + [False] * 3])

    def total(params):
        given = (lm, params, base, base_params, PROMPTS, tokens, mask)
        return tilted_texts.tilted_log_prob(*given, beta=BETA, top_k=TOP_K).sum()

    whole, slopes = jax.jit(jax.value_and_grad(total))(params)
    monkeypatch.setattr(tilted_texts, "TOGETHER", 2 * 3 * TOP_K)  # two of five steps
    found, others = jax.jit(jax.value_and_grad(lambda params: total(params)))(params)
    np.testing.assert_allclose(found, whole, rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), others, slopes)


def test_a_token_that_is_not_among_the_candidates_takes_the_place_of_the_last():
    base, base_params = tiny_lm(0, num_layers=1)
    lm, params = leader("last", None)
    tokens, mask = jnp.asarray([[2], [2], [2]]), jnp.ones((3, 1), bool)
    score = jax.jit(functools.partial(tilted_texts.tilted_log_prob, lm, base=base, beta=BETA, top_k=1))
    found = score(params, base_params=base_params, prompts=PROMPTS, tokens=tokens, mask=mask)
    np.testing.assert_allclose(found, 0, atol=1e-6)  # the only candidate
