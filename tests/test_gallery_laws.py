"""What the files of examples/gallery bind for eval.decode, where it is one Policy: its equation at the first token,
from the log-probabilities of tiny models."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign import critics, evaluation, gibbs, infalign, policies, prompt_batch, shaping
from jaxalign._arrays import NEGATIVE
from tests.cases import tiny_lm
from tests.conftest import VOCAB
from tests.gallery_files import module
from tests.test_gallery_build import given

__all__ = ["given"]  # a fixture

PROMPTS, KEY, S = prompt_batch([[1, 2, 3], [4, 5]]), jax.random.key(0), 0.5


class First(dict):
    """Role -> log-probabilities [B,V] of the first token, or values [B,V] of value, value_one and value_two; "laws"
    [B,V,3] after each token, and of the "prompt" [B,3]."""

    def __getattr__(self, name):
        return self[name]


@pytest.fixture(scope="module")
def unlike(given):
    """(What a method receives: unlike models in the roles of one method, what they say of the first token)."""
    other, value = tiny_lm(5), tiny_lm(6, "q")
    roles = dict(given.models) | {"amateur": other, "two": other, "value_two": value}
    first = First(base=start(given.policy, given.params).log_prob)
    for name in ("expert", "amateur"):
        first[name] = start(policies.language_model(roles[name][0]), roles[name][1]).log_prob
    for name in ("value", "value_two"):
        critic, params = critics.value(roles[name][0]), roles[name][1]
        first[name] = critic.score(params, KEY, critic.init(params, KEY, PROMPTS, 4), None, None)[0]
    first |= {"aligned": first.expert, "one": first.expert, "other": first.expert, "two": first.amateur}
    first["value_one"] = first.value
    lm, params = roles["laws"]
    every = jnp.broadcast_to(jnp.arange(VOCAB), (2, VOCAB))
    _, cache = lm.prefill(params, PROMPTS.tokens, PROMPTS.mask, 8)
    first["laws"] = lm.head(params, lm.candidates(params, cache, every)[0])
    first["prompt"] = critics.laws(lm, params, PROMPTS)
    return given._replace(models=roles, strength=S), first


def start(policy, params):
    return policy.init(params, KEY, PROMPTS, 4)[1]


def among(base, q, kept):
    return jnp.where(kept, base + q, NEGATIVE)


def product(first):
    return (1 - S) * first.base + S * first.aligned


def contrasted(first):
    return among(first.base, -S * first.amateur, first.base >= first.base.max(-1, keepdims=True) + np.log(0.1))


def filtered(first):
    return among(first.base, 0, first.value >= jnp.minimum(first.value.max(-1, keepdims=True), S))


def typical(first):
    p = np.exp(np.asarray(first.base))
    order = np.argsort(np.abs((p * first.base).sum(-1, keepdims=True) - first.base), axis=1, kind="stable")
    mass = np.take_along_axis(p, order, 1)
    kept = np.zeros(p.shape, bool)
    np.put_along_axis(kept, order, np.cumsum(mass, 1) - mass < S, 1)
    return among(first.base, 0, kept)


def least_favourable(first):
    """The weights of two values at which D(w) is least, on a fine grid."""
    share = jnp.linspace(0, 1, 4001)[:, None, None]
    q = (share * first.value_one + (1 - share) * first.value_two) / S
    best = jax.nn.logsumexp(first.base + q, axis=-1).argmin(axis=0)
    return first.base + q[best, jnp.arange(2)]


def budget(first):
    beta = gibbs.match_kl(first.base, first.value, kl=jnp.full(2, S))
    return first.base + first.value / beta[:, None]


SUPPORT = jnp.array([0.0, 1.0, 2.0])


def weighed(first, omega):
    """The tilt by log Σ_i p_i(z)·omega_i, omega [B,3]."""
    return first.base + jnp.log((jnp.exp(first.laws) * omega[:, None]).sum(-1))


def pessimistic(first):
    p = np.exp(np.asarray(first.prompt))
    low, high = np.full((2, 1), -9.0), np.full((2, 1), 2.0)
    for _ in range(60):
        middle = (low + high) / 2
        above = (p * np.maximum(0, SUPPORT - middle)).sum(-1, keepdims=True) > S
        low, high = np.where(above, middle, low), np.where(above, high, middle)
    return weighed(first, jnp.maximum(0, SUPPORT - low))


def of_places(first):
    p = jnp.exp(first.prompt)
    return weighed(first, jnp.exp(infalign.exponential(5.0)(jnp.cumsum(p, -1) - p / 2) / S))


def follower(first):
    threshold = shaping.optimal_threshold(SUPPORT, log_base=first.prompt, gain=S)[:, None]
    share = jnp.clip(SUPPORT - threshold + 0.5, 0, 1)  # cells of width 1
    return weighed(first, 1 + np.expm1(S) * share)


def of_budget(first):
    beta = gibbs.match_kl(first.prompt, SUPPORT, kl=jnp.full(2, S))
    return weighed(first, jnp.exp(SUPPORT / beta[:, None]))


EQUATIONS = {
    "proxy_tuning": lambda first: first.base + S * (first.expert - first.amateur),
    "dera": product,
    "mod": lambda first: S * first.one + (1 - S) * first.two,
    "contrastive_decoding": contrasted,
    "value_filter": filtered,
    "robust_objectives": least_favourable,
    "genarm_objectives": lambda first: first.base + S * first.one + (1 - S) * first.two,
    "kl_budget": budget,
    "mixture": lambda first: jnp.log((1 - S) * jnp.exp(first.base) + S * jnp.exp(first.other)),
    "min_p": lambda first: among(first.base, 0, first.base >= first.base.max(-1, keepdims=True) + np.log(S)),
    "typical": typical,
    "pessimism_by_tokens": pessimistic,
    "infalign_by_tokens": of_places,
    "srs_cd": follower,
    "kl_per_response": of_budget,
}


@pytest.mark.parametrize("name", EQUATIONS)
def test_a_method_binds_its_models_and_strength_as_its_equation_says(name, unlike, monkeypatch):
    own, first = unlike
    monkeypatch.setattr(evaluation, "sampled", lambda given, policy, params: start(policy, params))
    found = module(name).build(own)
    expected = jax.nn.log_softmax(EQUATIONS[name](first))
    np.testing.assert_allclose(jnp.exp(found.log_prob), jnp.exp(expected), atol=2e-4)
    np.testing.assert_allclose(jnp.exp(found.log_prob_ref), jnp.exp(first.base), atol=1e-5)
    assert float(jnp.abs(jnp.exp(found.log_prob) - jnp.exp(first.base)).max()) > 1e-3
