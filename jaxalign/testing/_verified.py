"""The law of policies that read several tokens at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign._blocks import accept_policy, verify_policy
from jaxalign.testing import _laws
from jaxalign.testing._laws import errors_break
from jaxalign.testing._steps import Compiled, numbers, supported_tokens
from jaxalign.types import Array, Params, Prompts, State, StepOutput


class Same(Protocol):
    """Compares what was found with what was expected, in some rows."""

    def __call__(self, law: int, when: str, found: Any, expected: Any, rows: Sequence[int] | None = None) -> None: ...


def check_blocks(run: Compiled, params: Params, prompts: Prompts, same: Same) -> None:
    """Law 18 along a response of a policy that has `verify`: outputs after each token of a block are those of steps;
    accepting some of it is as many steps; a row without real tokens, and one that accepts none, stand still.

    A policy whose outputs depend on the key is left out: its blocks draw with other keys than its steps."""
    policy = run.policy
    if policy.verify is None:
        return
    state, output = run.init(params, prompts)
    states, outputs, drawn = [state], [output], []
    for _ in range(run.steps):
        drawn.append(supported_tokens(outputs[-1], policy.eos_ids or ()))
        state, output = run.step(params, states[-1], drawn[-1])
        states.append(state)
        outputs.append(output)
    other = run.step(params, states[0], drawn[0], jax.random.fold_in(run.rng, 1))[1]
    if not np.allclose(other.log_prob, outputs[1].log_prob, rtol=1e-3, atol=1e-3):
        return
    tokens = jnp.stack(drawn, axis=1)
    batch, width = tokens.shape[0], tokens.shape[1] - 1
    frozen = jnp.arange(batch) == batch - 1
    counts = jnp.where(frozen, 0, jnp.arange(batch) % (width + 1))
    mask = jnp.broadcast_to(~frozen[:, None], (batch, width))

    def block(params: Params, state: State, tokens: Array) -> tuple[StepOutput, State]:
        found, proposal = verify_policy(policy, params, run.rng, state, tokens, mask)
        return found._replace(hidden=None), accept_policy(policy, params, proposal, counts)

    with errors_break(18, "verify and accept", ValueError, TypeError):
        found, accepted = jax.jit(block)(params, states[0], tokens[:, :-1])
    _laws.assert_same_form("after accept", accepted, states[0], "state")
    for t in range(width):
        one = numbers(StepOutput(found.log_prob[:, t], found.log_prob_ref[:, t], found.log_norm[:, t]))
        when = f"the output after token {t} of a block beside that of the step"
        same(18, when, one, numbers(outputs[t + 1]), range(batch - 1))
    following = jnp.take_along_axis(tokens, counts[:, None], axis=1)[:, 0]
    after = numbers(run.step(params, accepted, following)[1])
    for b in range(batch):
        count = int(counts[b])
        when = f"a step after {count} of {width} tokens were accepted beside step {count + 1}"
        same(18, when, after, numbers(outputs[count + 1]), [b])
