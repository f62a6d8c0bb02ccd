"""A policy's steps along a response, which the checks of policies and critics share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign._arrays import is_supported
from jaxalign._parts import start_policy, step_policy
from jaxalign.shapes import ResponseTokens
from jaxalign.types import Array, Params, Policy, Prompts, State, StepOutput


class Numbers(NamedTuple):
    """A StepOutput without its hidden states, which no law speaks of."""

    log_prob: Array
    """[B,V]."""
    log_prob_ref: Array
    """[B,V]."""
    log_norm: Array
    """[B]."""


class Compiled:
    """A policy's init and step, each compiled once for a shape, with one key for all steps."""

    def __init__(self, policy: Policy, rng: Array, max_new_tokens: int) -> None:
        self.policy, self.rng, self.steps = policy, rng, max_new_tokens

        def init(params: Params, prompts: Prompts) -> tuple[State, StepOutput]:
            return start_policy(policy, params, rng, prompts, max_new_tokens)

        def step(params: Params, state: State, token: Array, rng: Array) -> tuple[State, StepOutput]:
            return step_policy(policy, params, rng, state, token)

        self._init, self._step = jax.jit(init), jax.jit(step)

    def init(self, params: Params, prompts: Prompts) -> tuple[State, StepOutput]:
        """(state, output) of the prompts."""
        found: tuple[State, StepOutput] = self._init(params, prompts)
        return found

    def step(self, params: Params, state: State, token: Array, rng: Array | None = None) -> tuple[State, StepOutput]:
        """(state, output) after token [B]; rng: another key than the others'."""
        found: tuple[State, StepOutput] = self._step(params, state, token, self.rng if rng is None else rng)
        return found

    def outputs(self, params: Params, prompts: Prompts, tokens: ResponseTokens) -> list[Numbers]:
        """The outputs before each of tokens [B,T]."""
        state, output = self.init(params, prompts)
        found = [numbers(output)]
        for t in range(tokens.shape[1] - 1):
            state, output = self.step(params, state, tokens[:, t])
            found.append(numbers(output))
        return found


def numbers(output: StepOutput) -> Numbers:
    """The numbers of an output that laws speak of."""
    return Numbers(output.log_prob, output.log_prob_ref, output.log_norm)


def supported_tokens(output: StepOutput, avoid: Sequence[int] = ()) -> Array:
    """A token [B] of positive probability per row: the first, second or third most probable, by turns, where there is
    one, and none of `avoid` where there is another."""
    score = np.where(np.asarray(is_supported(output.log_prob)), np.asarray(output.log_prob, np.float64), -np.inf)
    shunned = score.copy()
    shunned[:, list(avoid)] = -np.inf
    found = []
    for row, (wanted, every) in enumerate(zip(shunned, score, strict=True)):
        values = wanted if np.isfinite(wanted).any() else every
        order = np.argsort(-values)
        found.append(int(order[min(row % 3, max(0, int(np.isfinite(values).sum()) - 1))]))
    return jnp.asarray(found, jnp.int32)
