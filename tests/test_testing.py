"""`jaxalign.testing`: the library's own parts keep the laws, and a planted fault is found and named by its law."""

from __future__ import annotations

import jax.numpy as jnp
import pytest

from jaxalign import rewards, testing
from jaxalign.prompts import any_prompts
from jaxalign.types import TokenBatch
from tests import faulty_parts
from tests.cases import tiny_lm
from tests.conftest import PROMPTS, VOCAB, padded


@pytest.fixture(scope="module")
def prompts() -> TokenBatch:
    return padded(PROMPTS)


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


# Planted faults ------------------------------------------------------------------------------------------------------


def check_policy(prompts, fault=""):
    testing.check_policy(
        faulty_parts.policy(fault),
        faulty_parts.policy_params(),
        prompts,
        max_new_tokens=3,
        increments=faulty_parts.policy_increments,
    )


def check_critic(prompts, kind, fault=""):
    testing.check_critic(
        faulty_parts.critic(kind, fault),
        faulty_parts.critic_params(),
        prompts,
        max_new_tokens=3,
        text_score=faulty_parts.text_score(kind),
        per_prompt=("scale",),
    )


def check_reward(prompts, fault=""):
    testing.check_reward(faulty_parts.reward(fault), faulty_parts.reward_params(), prompts, vocab_size=VOCAB)


def assert_named(law, check, *arguments):
    """The check raises an AssertionError that begins with the law's number and name, and says what was seen."""
    with pytest.raises(AssertionError) as caught:
        check(*arguments)
    message = str(caught.value)
    start = f"law {law} ({testing.LAWS[law]}): "
    assert message.startswith(start)
    assert len(message) > len(start) + 10
    assert "\n" not in message


def test_sound_parts_keep_the_laws(prompts):
    check_policy(prompts)
    check_critic(prompts, "level")
    check_critic(prompts, "increment")
    check_reward(prompts)


@pytest.mark.parametrize("fault", faulty_parts.POLICY_FAULTS)
def test_a_fault_of_a_policy_is_named(fault, prompts):
    assert_named(faulty_parts.POLICY_FAULTS[fault], check_policy, prompts, fault)


@pytest.mark.parametrize("fault", faulty_parts.CRITIC_FAULTS)
def test_a_fault_of_a_critic_is_named(fault, prompts):
    kind = "increment" if fault == "sums in place of increments" else "level"
    assert_named(faulty_parts.CRITIC_FAULTS[fault], check_critic, prompts, kind, fault)


@pytest.mark.parametrize(
    ("fault", "function"),
    [("one row at init", "init"), ("one row after advance", "advance"), ("dtype changes in advance", "advance")],
)
def test_a_state_is_checked_where_it_is_made(fault, function, prompts):
    with pytest.raises(AssertionError, match=rf"critic.{function} \(critic.<locals>.{function}\): expected"):
        check_critic(prompts, "level", fault)


@pytest.mark.parametrize("fault", faulty_parts.REWARD_FAULTS)
def test_a_fault_of_a_reward_is_named(fault, prompts):
    assert_named(faulty_parts.REWARD_FAULTS[fault], check_reward, prompts, fault)


def test_every_law_has_a_planted_fault():
    found = [*faulty_parts.POLICY_FAULTS.values(), *faulty_parts.CRITIC_FAULTS.values()]
    assert {*found, *faulty_parts.REWARD_FAULTS.values()} == set(testing.LAWS)


def test_a_wrong_kind_needs_the_score_of_a_text(prompts):
    """The wrong kind is taken at its word without `text_score`, and found with it."""
    wrong = faulty_parts.critic("level")._replace(kind="increment")
    params = faulty_parts.critic_params()
    testing.check_critic(wrong, params, prompts, max_new_tokens=3)
    with pytest.raises(AssertionError, match="law 12"):
        testing.check_critic(wrong, params, prompts, max_new_tokens=3, text_score=faulty_parts.text_score("level"))


def test_what_cannot_be_checked_is_named(prompts):
    part, params = faulty_parts.policy(), faulty_parts.policy_params()
    one = TokenBatch(prompts.tokens[:1], prompts.mask[:1])
    with pytest.raises(ValueError, match="prompts: expected at least two"):
        testing.check_policy(part, params, one)
    with pytest.raises(ValueError, match="max_new_tokens: expected at least 3"):
        testing.check_policy(part, params, prompts, max_new_tokens=2)
    with pytest.raises(ValueError, match="vocab_size: expected V"):
        testing.check_critic(
            faulty_parts.critic("level")._replace(vocab_size=None), faulty_parts.critic_params(), prompts
        )


@pytest.mark.parametrize("token", range(VOCAB))
def test_a_reward_that_counts_a_token_beyond_the_mask_is_found_whatever_the_token(token, prompts):
    counted = lambda params, tokens, mask, prompt_length, index: (tokens == token).sum(axis=1) * 1.0  # noqa: E731
    with pytest.raises(AssertionError, match=r"law (7|15)"):
        testing.check_reward(counted, None, prompts, vocab_size=VOCAB)


@pytest.mark.parametrize("token", range(VOCAB))
def test_a_critic_that_counts_a_token_of_the_padding_is_found_whatever_the_token(token, prompts):
    sound = faulty_parts.critic("level")

    def init(params, rng, given, max_new_tokens):
        state = sound.init(params, rng, given, max_new_tokens)
        batch = any_prompts(given)
        return state, 1.0 * (batch.tokens == token).sum(axis=1)

    def score(params, rng, state, output, candidates):
        q, proposal = sound.score(params, rng, state[0], output, candidates)
        return q + state[1][:, None], (proposal, state[1])

    def advance(params, proposal, choice):
        return sound.advance(params, proposal[0], choice), proposal[1]

    counting = sound._replace(init=init, score=score, advance=advance)
    with pytest.raises(AssertionError, match="law 7"):
        testing.check_critic(counting, faulty_parts.critic_params(), prompts, max_new_tokens=3)
