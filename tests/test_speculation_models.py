"""Speculation with language models: greedy tokens are the target's, and draws have its law."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign import critics, decoding, models, policies
from jaxalign.critics import _distribution
from tests.conftest import EOS, VOCAB, padded, tiny_lm
from tests.test_speculation import Case

PROMPTS = [[4, 5, 6], [7], [8, 9], [1, 2, 10, 4]]
RNG = jax.random.key(5)


@functools.cache
def model_cases() -> dict[str, tuple[Case, Case]]:
    """(target, draft) of models."""
    (lm, params), (small, few), (arm, reward), (q, values) = (
        tiny_lm(0),
        tiny_lm(9, num_layers=1),
        tiny_lm(4, num_layers=1),
        tiny_lm(3, "q", num_layers=1),
    )
    base, draft = policies.language_model(lm), Case(policies.language_model(small), few)
    summed = critics.weighted_sum([critics.genarm(arm)])
    beta = jnp.array([0.5, 1.0, 4.0, 0.8])
    inner = {"policy": params, "critic": values, "beta": jnp.asarray(2.0)}
    support = models.Distribution((-2.0, 0.0, 3.0))
    laws = models.with_head(tiny_lm(0)[0], models.Head("q", hidden_size=16, distribution=support))
    head = laws.init(jax.random.key(1))
    head |= {"head": jax.tree.map(lambda x: 30 * x, head["head"])}
    windows = tiny_lm(2, windows=(3, None), family="qwen2", qkv_bias=True)
    return {
        "windows": (Case(policies.language_model(windows[0]), windows[1]), draft),
        "genarm": (
            Case(policies.tilt(base, critics.genarm(arm)), {"policy": params, "critic": reward, "beta": beta}),
            draft,
        ),
        "laws": (
            Case(
                policies.tilt(base, critics.distribution(laws, critics.reads.soft())),
                {"policy": params, "critic": {"head": head, "read": {"beta": beta / 4}}, "beta": jnp.asarray(1.0)},
            ),
            Case(base, params),
        ),
        "values of laws": (
            Case(
                policies.tilt(base, critics.value(laws), top_k=6),
                {"policy": params, "critic": head, "beta": beta},
            ),
            Case(base, params),
        ),
        "nested": (
            Case(
                policies.tilt(policies.tilt(base, critics.value(q)), summed, top_k=5),
                {"policy": inner, "critic": {"critics": [reward], "weights": jnp.array([0.7])}, "beta": beta},
            ),
            Case(base, params),
        ),
    }


@pytest.mark.parametrize("name", ["windows", "genarm", "laws", "values of laws", "nested"])
def test_greedy_speculation_gives_the_greedy_tokens_of_a_models_target(name, monkeypatch):
    monkeypatch.setitem(_distribution._BLOCK, "q", 8)  # the laws after all tokens are read in several blocks
    target, draft = model_cases()[name]
    assert target.policy.verify is not None
    prompts = padded(PROMPTS, extra=1)
    found = decoding.speculative(
        target.policy,
        draft.policy,
        {"target": target.params, "draft": draft.params},
        RNG,
        prompts,
        draft_tokens=3,
        max_new_tokens=9,
        eos_ids=EOS,
        temperature=0.0,
    )
    plain = decoding.sample(target.policy, target.params, RNG, prompts, max_new_tokens=9, eos_ids=EOS, temperature=0.0)
    np.testing.assert_array_equal(found.completions.tokens, plain.tokens)
    np.testing.assert_array_equal(found.completions.mask, plain.mask)
    np.testing.assert_allclose(found.completions.log_norm, plain.log_norm, rtol=1e-4, atol=1e-4)
    assert 0 < int(found.info.accepted.sum()) < int(found.info.drafted.sum())


def test_draws_of_a_pair_of_models_have_the_targets_law():
    """The two tokens of 4,000 draws, beside their probabilities; 121 pairs. A right program fails once in 10^5 runs."""
    target, draft = model_cases()["genarm"]
    beta = jnp.asarray(1.5)
    params = target.params | {"beta": beta}
    row = padded([PROMPTS[0]])
    rows = row._replace(tokens=jnp.repeat(row.tokens, 4000, axis=0), mask=jnp.repeat(row.mask, 4000, axis=0))
    found = decoding.speculative(
        target.policy,
        draft.policy,
        {"target": params, "draft": draft.params},
        RNG,
        rows,
        draft_tokens=2,
        max_new_tokens=2,
        eos_ids=(),
    )
    pairs = jnp.stack(jnp.meshgrid(jnp.arange(VOCAB), jnp.arange(VOCAB), indexing="ij"), axis=-1).reshape(-1, 2)
    every = row._replace(tokens=jnp.repeat(row.tokens, 121, axis=0), mask=jnp.repeat(row.mask, 121, axis=0))
    given = decoding.log_prob(target.policy, params, RNG, every, pairs, jnp.ones(pairs.shape, bool))
    expected = 4000 * np.exp(np.asarray(given.log_prob, np.float64).sum(axis=1))
    tokens = np.asarray(found.completions.tokens)
    seen = np.bincount(tokens[:, 0] * VOCAB + tokens[:, 1], minlength=121)
    often = expected >= 5
    groups = [np.append(x[often], x[~often].sum()) for x in (seen, expected)]
    statistic, cells = ((groups[0] - groups[1]) ** 2 / groups[1]).sum(), len(groups[0]) - 1
    assert cells > 20
    assert statistic < cells + 4.5 * np.sqrt(2 * cells) + 8
    assert 0.2 < float(found.info.accepted.sum() / found.info.drafted.sum()) < 0.95
