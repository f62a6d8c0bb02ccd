"""`jaxalign.testing`: the library's own parts keep the laws, and a planted fault is found and named by its law."""

from __future__ import annotations

import jax.numpy as jnp
import pytest

from jaxalign import rewards, testing
from jaxalign.types import TokenBatch
from tests import cases
from tests.cases import tiny_lm
from tests.conftest import PROMPTS, VOCAB, padded


@pytest.fixture(scope="module")
def prompts() -> TokenBatch:
    return padded(PROMPTS)


@pytest.fixture(scope="module")
def all_critics() -> dict[str, cases.CriticCase]:
    return cases.critic_cases()


@pytest.mark.parametrize("name", cases.CRITICS)
def test_every_critic_of_the_library_keeps_the_laws(name, all_critics, prompts):
    critic, params, needs_hidden = all_critics[name]
    below = cases.base_lm() if needs_hidden else cases.Case(None, None)
    testing.check_critic(
        critic,
        params,
        prompts,
        policy=below.policy,
        policy_params=below.params,
        vocab_size=VOCAB,
        max_new_tokens=3,
        per_prompt=("weights", "beta"),
    )


@pytest.mark.parametrize("name", ["from_model", "weighted_sum", "map_reward"])
def test_every_reward_of_the_library_keeps_the_laws(name, prompts):
    lm, params = tiny_lm(1, "reward")
    model = rewards.from_model(lm)
    reward, given = {
        "from_model": (model, params),
        "weighted_sum": (
            rewards.weighted_sum((model, model)),
            {"rewards": (params, params), "weights": jnp.array([0.5, 2.0])},
        ),
        "map_reward": (
            rewards.map_reward(model, lambda params, reward, index: jnp.take(params, index) * reward),
            {"reward": params, "map": jnp.linspace(0.5, 2.0, len(PROMPTS))},
        ),
    }[name]
    testing.check_reward(reward, given, prompts, vocab_size=VOCAB)
