"""Gross misuses that a type checker must report. A line with an "error" comment is one; every other is right.

tests/test_typing.py runs mypy on this file; nothing imports it.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxalign import critics, decoding, policies, prompt_batch, rewards
from jaxalign.types import Array, Critic, LanguageModel, Params, Policy, Prompts, Reward, State, StepOutput

rng = jax.random.key(0)
prompts = prompt_batch([[1, 2], [3]])
weights: dict[str, Array] = {"table": jnp.zeros((4, 4))}

# Policies -------------------------------------------------------------------------------------------------------------


def init(params: Params, rng: Array, prompts: Prompts, max_new_tokens: int) -> tuple[State, StepOutput]:
    raise NotImplementedError


def step(params: Params, rng: Array, state: State, token: Array) -> tuple[State, StepOutput]:
    raise NotImplementedError


def init_with_swapped_names(
    rng: Array, params: Params, prompts: Prompts, max_new_tokens: int
) -> tuple[State, StepOutput]:
    raise NotImplementedError


def step_with_one_more(params: Params, rng: Array, state: State, token: Array, limit: int) -> tuple[State, StepOutput]:
    raise NotImplementedError


def step_without_a_state(params: Params, rng: Array, state: State, token: Array) -> StepOutput:
    raise NotImplementedError


policy = Policy(init, step)
Policy(step, init)  # error: init and step are swapped
Policy(init_with_swapped_names, step)  # error: rng before params
Policy(init, step_with_one_more)  # error: an argument that no decoder gives
Policy(init, step_without_a_state)  # error: the new state is not given back

# Critics --------------------------------------------------------------------------------------------------------------


def critic_init(params: Params, rng: Array, prompts: Prompts, max_new_tokens: int) -> State:
    raise NotImplementedError


def score(
    params: Params, rng: Array, state: State, output: StepOutput, candidates: Array | None
) -> tuple[Array, State]:
    raise NotImplementedError


def score_of_all(params: Params, rng: Array, state: State, output: StepOutput) -> tuple[Array, State]:
    raise NotImplementedError


def advance(params: Params, proposal: State, choice: Array) -> State:
    raise NotImplementedError


critic = Critic(critic_init, score, advance, "level")
Critic(critic_init, score, advance, "levels")  # error: no such kind
Critic(critic_init, score_of_all, advance, "level")  # error: candidates are not taken
Critic(critic_init, advance, score, "level")  # error: score and advance are swapped
Critic(critic_init, score, advance)  # error: the kind is missing

# Rewards --------------------------------------------------------------------------------------------------------------


def length(params: Params, tokens: Array, mask: Array, prompt_length: Array, index: Array) -> Array:
    return mask.sum(axis=1) - prompt_length


def of_texts(prompts: list[str], responses: list[str]) -> list[float]:
    return [float(len(response)) for response in responses]


right: Reward = length
wrong: Reward = of_texts  # error: a function of texts is not a Reward; rewards.from_text makes one
rewards.map_reward(of_texts, lambda params, reward, index: reward)  # error: the same, as an argument

# Models ---------------------------------------------------------------------------------------------------------------


class NoStep:
    vocab_size = 4
    max_length = 8
    eos_ids: tuple[int, ...] = (0,)

    def prefill(self, params: Params, tokens: Array, mask: Array, capacity: int) -> tuple[Array, State]:
        raise NotImplementedError

    def logits(self, params: Params, hidden: Array) -> Array:
        raise NotImplementedError


class Complete(NoStep):
    def step(self, params: Params, cache: State, token: Array) -> tuple[Array, State]:
        raise NotImplementedError


model: LanguageModel = Complete()
policies.language_model(Complete())
policies.language_model("folder")  # error: a path is not a model; models.load gives one
policies.language_model(NoStep())  # error: a method is missing
critics.args("folder")  # error: a path is not a model
critics.genarm(weights)  # error: parameters are not a model

# Decoding -------------------------------------------------------------------------------------------------------------

policies.tilt(policy, critic)
policies.tilt(critic, policy)  # error: the policy comes first
decoding.sample(policy, weights, rng, prompts, max_new_tokens=4, eos_ids=(0,))
decoding.sample(weights, policy, rng, prompts, max_new_tokens=4, eos_ids=(0,))  # error: the policy comes first
decoding.sample(policy, weights, rng, prompts, max_tokens=4, eos_ids=(0,))  # error: no such keyword
decoding.sample(policy, weights, rng, prompts, "greedy", max_new_tokens=4, eos_ids=(0,))  # error: one too many
decoding.sample(policy, weights, rng, prompts, max_new_tokens="four", eos_ids=(0,))  # error: a string for a number
