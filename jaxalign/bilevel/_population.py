"""The law that a finite population of particles emits, differentiated in its draws and ancestors as well."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxalign import rollout
from jaxalign._arrays import repeat_rows, take_rows
from jaxalign._parts import start_policy, step_policy
from jaxalign.decoding import resampling
from jaxalign.types import Array, Completions, Params, Policy, Prompts, State, StepOutput


class Trace(NamedTuple):
    """All random choices of a population of n particles a prompt."""

    ended: Array
    """[T,B·n] bool, which places hold a particle that has ended, before the ancestors are drawn."""
    ancestors: Array
    """[T,B,n], before each token."""
    tokens: Array
    """[T,B·n], of each place at its step; -1 where the particle has ended."""


class Population(NamedTuple):
    """What a population ended with."""

    log_weight: Array
    """[B,n], without the reward's share; differentiable."""
    log_prob: Array
    """[B], of all draws and ancestors together; differentiable."""
    tokens: Array
    """[B·n,T], each particle's own history."""
    mask: Array
    """[B·n,T] bool."""
    trace: Trace
    """Its choices."""


class _Particles(NamedTuple):
    state: State
    output: StepOutput
    finished: Array  # [B·n]
    log_weight: Array  # [B·n]
    lacking: Array  # [B·n], what the particle's own weight lacks: Σ (log_ref − log_prob − log_norm)
    tokens: Array  # [B·n,T]
    mask: Array  # [B·n,T]


def population(
    policy: Policy,
    params: Params,
    rng: Array,
    prompts: Prompts,
    *,
    n: int,
    steps: int,
    eos_ids: tuple[int, ...],
    threshold: float,
    trace: Trace | None = None,
) -> Population:
    """Runs `decoding.smc` with multinomial resampling, and tells the probability of its choices.

    Args:
      policy: the proposal.
      params: its parameters.
      rng: consumed; with a trace by policies that draw.
      prompts: B of them.
      n: particles of each.
      steps: T, the limit of a response.
      eos_ids: the ids that end one; not read with a trace.
      threshold: share of n below which the effective sample size resamples a prompt.
      trace: choices that are made again, for a derivative; None: they are drawn.

    Returns:
      A Population.
    """
    start, draws, coins, moves = jax.random.split(rng, 4)
    state, output = start_policy(policy, params, start, prompts, steps)
    batch = output.log_prob.shape[0]
    state, output = repeat_rows((state, output), n)
    rows = batch * n
    zeros = jnp.zeros(rows, output.log_prob.dtype)
    first = _Particles(
        state,
        output,
        jnp.zeros(rows, bool),
        zeros,
        zeros,
        jnp.zeros((rows, steps), jnp.int32),
        jnp.zeros((rows, steps), bool),
    )

    def step(carry: tuple[_Particles, Array], xs: Any) -> tuple[tuple[_Particles, Array], Trace]:
        now, log_prob = carry
        t, given = xs
        ended = now.finished if given is None else given.ended
        weight = (now.log_weight + jnp.where(ended, 0, now.output.log_norm)).reshape(batch, n)
        held = jax.lax.stop_gradient(weight)
        due = resampling.ess_below(t, held, jnp.full(batch, threshold))
        share = jax.nn.log_softmax(weight, axis=1)
        if given is None:
            keys = jax.random.split(jax.random.fold_in(coins, t), batch)
            ancestor = jnp.where(due[:, None], resampling.multinomial(keys, held), jnp.arange(n))
        else:
            ancestor = given.ancestors
        chosen = jnp.take_along_axis(share, ancestor, axis=1).sum(axis=1)
        log_prob = log_prob + jnp.where(due, chosen, 0)
        mean = jax.nn.logsumexp(weight, axis=1, keepdims=True) - jnp.log(n)
        weight = jnp.where(due[:, None], mean, weight).reshape(-1)
        now = take_rows(now, (jnp.arange(batch)[:, None] * n + ancestor).reshape(-1))
        if given is None:
            uniform = jax.random.uniform(jax.random.fold_in(draws, t), (rows,), now.output.log_prob.dtype)
            token = jnp.where(now.finished, -1, rollout.draw(now.output.log_prob, uniform))
        else:
            token = given.tokens
        active = token >= 0
        own = jnp.where(active, rollout.token_value(now.output.log_prob, token), 0)
        reference = jnp.where(active, rollout.token_value(now.output.log_prob_ref, token), 0)
        log_prob = log_prob + own.reshape(batch, n).sum(axis=1)
        lacking = now.lacking + jnp.where(active, reference - own - now.output.log_norm, 0)
        finished = now.finished | rollout.is_eos(token, eos_ids)
        state, output = step_policy(policy, params, jax.random.fold_in(moves, t), now.state, token)
        written = jnp.where(active, token, 0)
        after = _Particles(
            state,
            output,
            finished,
            weight,
            lacking,
            now.tokens.at[:, t].set(written),
            now.mask.at[:, t].set(active),
        )
        return (after, log_prob), Trace(ended, ancestor, token)

    total = jnp.zeros(batch, zeros.dtype)
    (last, log_prob), made = jax.lax.scan(jax.checkpoint(step), (first, total), (jnp.arange(steps), trace))
    log_weight = (last.log_weight + last.lacking).reshape(batch, n)
    return Population(log_weight, log_prob, last.tokens, last.mask, made)


def drawn(found: Population, eos_ids: tuple[int, ...]) -> Completions:
    """The histories [B,R·n,T] of the particles of R populations, leaves [R,...]."""
    each = found.log_weight.shape

    def beside(x: Array) -> Array:
        """[R,B·n,...] -> [B,R·n,...]."""
        return jnp.swapaxes(x.reshape(*each, *x.shape[2:]), 0, 1).reshape(each[1], -1, *x.shape[2:])

    tokens, mask = beside(found.tokens), beside(found.mask)
    zero = jnp.zeros(tokens.shape, found.log_weight.dtype)
    finished = (mask & rollout.is_eos(tokens, eos_ids)).any(axis=-1)
    return Completions(tokens, mask, zero, zero, zero, zero, finished, ~finished, jnp.ones(finished.shape, bool))


class Emitted(NamedTuple):
    """What R populations of each prompt emit."""

    surrogate: Array
    """[], whose gradient estimates that of the mean of `utility`."""
    utility: Array
    """[B,R], Σ w̄_i·u_i of each."""
    kl: Array
    """[B], the estimate of the target's KL to the base [nats]."""


def emitted(found: Population, reward: Array, utility: Array, *, beta: Array) -> Emitted:
    """Gives what populations emit, and a scalar for its gradient.

    The emitted particle is drawn by its weight: E[u] of one population is Σ w̄_i·u_i, whose gradient is taken as it
    stands; the choices before have the score function, with the mean of a prompt's other populations as baseline.

    Args:
      found: leaves [R,...], R >= 2 populations of each of B prompts.
      reward: [B,R·n], of the particles; differentiated.
      utility: [B,R·n].
      beta: [] or [B].

    Returns:
      An Emitted.
    """
    count, batch, n = found.log_weight.shape
    scaled, u = (x.reshape(batch, count, n) for x in (reward / jnp.reshape(beta, (-1, 1)), utility))
    log_weight = jnp.swapaxes(found.log_weight, 0, 1) + scaled
    share = jax.nn.softmax(log_weight, axis=-1)
    each = (share * u).sum(axis=-1)
    held = jax.lax.stop_gradient(each)
    others = (held.sum(axis=1, keepdims=True) - held) / (count - 1)
    kl = (share * scaled).sum(axis=-1) - (jax.nn.logsumexp(log_weight, axis=-1) - jnp.log(n))
    return Emitted((each + (held - others) * found.log_prob.T).mean(), each, kl.mean(axis=1))
