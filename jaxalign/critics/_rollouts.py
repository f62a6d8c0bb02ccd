"""Roll-outs of a baseline from candidate tokens, each with a random stream of its own."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxalign import rollout
from jaxalign._arrays import is_supported, repeat_rows
from jaxalign.types import Array, Params, Policy, State, StepOutput


class Drawn(NamedTuple):
    """What was drawn after each candidate. tokens, mask [B,K,n,T]; lost [B,K,n]: the baseline cannot follow the
    candidate, or has no distribution there."""

    tokens: Array
    mask: Array
    lost: Array


def draw(
    baseline: Policy,
    params: Params,
    state: State,
    tokens: Array,
    known: Array,
    *,
    n: int,
    steps: int,
    eos_ids: tuple[int, ...],
) -> Drawn:
    """n roll-outs of up to `steps` tokens from each candidate [B,K], none in the rows of `known` [B].

    state: of `transfer_q`: "baseline" {"state", "log_prob"}, the baseline before the candidate; "length" [B] of the
    text there; "stream"; "response", whose width is the limit of a text. Tokens carry no gradient."""
    batch, count = tokens.shape
    limit, token = state["response"].shape[1], tokens.reshape(-1)
    length, known = repeat_rows((state["length"], known), count)
    ended = known | rollout.is_eos(token, eos_ids) | (length + 1 >= limit)
    # Drawn tokens carry no gradient, and the loop that draws them has none.
    model, below = jax.lax.stop_gradient((params, state["baseline"]))
    before, key = repeat_rows(below["state"], count), step_key(state)

    def step(params: Params, rng: Array, state: State, token: Array) -> tuple[State, StepOutput]:
        return baseline.step(params, jax.random.fold_in(key, jax.random.bits(rng)), state, token)

    after, output = baseline.step(model, key, before, jnp.where(ended, -1, token))
    likely = is_supported(jnp.take_along_axis(below["log_prob"], tokens, axis=1)).reshape(-1)
    lost = _stood_still(~(ended | likely), before, after)
    after, output, length, ended, lost = repeat_rows((after, output, length, ended, lost), n)
    _, _, drawn = rollout.rollout(
        baseline._replace(step=step),
        model,
        jax.random.key(0),  # the rows' streams tell the draws apart
        after,
        output,
        steps=steps,
        eos_ids=eos_ids,
        finished=ended,
        rows=_streams(state, tokens, n),
        limits=limit - length - 1,
        last_step=False,
    )
    lost |= jnp.isnan(drawn.log_prob).any(axis=1)
    text, mask = (x.reshape(batch, count, n, steps) for x in (drawn.tokens, drawn.mask))
    return Drawn(text, mask, lost.reshape(batch, count, n))


def step_key(state: State) -> Array:
    """A key for the baseline's own steps, another at each position."""
    words = jnp.append(state["stream"][0], state["length"][0].astype(jnp.uint32))
    key = jax.random.key(1)
    for i in range(3):
        key = jax.random.fold_in(key, words[i])
    return key


def _streams(state: State, tokens: Array, n: int) -> Array:
    """What names each roll-out's draws [B·K·n,5]: its prompt's stream, the position, the candidate and its number."""
    parts = (state["stream"][:, 0], state["stream"][:, 1], state["length"])
    named = [part[:, None, None] for part in parts] + [tokens[:, :, None], jnp.arange(n)[None, None, :]]
    words = jnp.broadcast_arrays(*(part.astype(jnp.uint32) for part in named))
    return jnp.stack(words, axis=-1).reshape(-1, len(words))


def _stood_still(asked: Array, before: State, after: State) -> Array:
    """Where `asked` [N], whether no leaf of the row's state has changed; the states are read if any row asks."""

    def compare() -> Array:
        still = [
            (old == new).reshape(old.shape[0], -1).all(axis=1)
            for old, new in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True)
        ]
        return asked & jnp.stack(still).all(axis=0) if still else asked

    return jax.lax.cond(asked.any(), compare, lambda: jnp.zeros_like(asked))
