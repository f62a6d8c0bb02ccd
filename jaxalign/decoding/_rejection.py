"""Rejection: exact draws from the response-level optimum of a bounded reward, or from the base above a threshold."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign import rollout
from jaxalign._arrays import repeat_rows, where_rows
from jaxalign._checks import entry, is_concrete
from jaxalign.decoding._best_of_n import check_scores, open_request, score_completions
from jaxalign.decoding._sampling import streams
from jaxalign.prompts import prompt_index
from jaxalign.types import Array, ArrayLike, Completions, Params, Policy, Prompts, Reward


class Rejection(NamedTuple):
    """completions: Completions [B,T], the first draw that was accepted (the last draw where none was); accepted [B];
    tries [B]: draws up to and including it; reward [B]; accept_rate [B]: mean acceptance probability of the first chunk
    of draws, an unbiased estimate of exp(−bound/beta)·Z."""

    completions: Completions
    accepted: Array
    tries: Array
    reward: Array
    accept_rate: Array


def rejection(
    policy: Policy,
    reward: Reward,
    params: Params,
    rng: Array,
    prompts: Prompts,
    *,
    tries: int,
    max_new_tokens: int,
    eos_ids: tuple[int, ...],
    temperature: ArrayLike = 1.0,
    chunk: int = 8,
) -> Rejection:
    """y ~ pi(y)·exp(r(y)/beta)/Z exactly: draws from the policy, each accepted with probability exp((r − bound)/beta).

    params {"policy", "reward", "beta": scalar or [B] > 0, "bound": scalar or [B], at least every reward}. With the
    threshold reward this is the exact sampler of Stackelberg shaping: accepted with probability 1 above the threshold
    and e^(−bound/beta) below. The law holds for rows that were accepted; a row that was not after `tries` draws is
    marked, its response is an ordinary draw. Expected number of tries: exp(bound/beta)/Z.

    chunk: draws per prompt at a time (B·chunk caches), cut to `tries`; draw j depends on rng, the prompt's index and j
    alone. ValueError: tries < 1, beta <= 0, a reward above the bound (the law would be cut there), and those of
    `best_of_n`.
    """
    if tries < 1 or chunk < 1:
        raise ValueError(f"tries: expected at least 1 try and a chunk of at least 1, found {tries} and {chunk}")
    asked = open_request(
        policy, reward, params, prompts, max_new_tokens, eos_ids, temperature, per_prompt=("beta", "bound")
    )
    found, highest = _rejection(
        asked.policy,
        reward,
        asked.params,
        rng,
        asked.prompts,
        tries,
        max_new_tokens,
        asked.eos_ids,
        min(chunk, tries),
        _exponential,
        False,
    )
    bound = asked.params["bound"]
    check_scores(found.reward[:, None])
    if is_concrete(highest, bound):
        # A reward that is its bound up to rounding is not above it.
        slack = 1e-5 * np.maximum(1, np.abs(np.asarray(bound)))
        bad = np.flatnonzero(np.asarray(highest) > np.asarray(bound) + slack).tolist()
        if bad:
            most = np.asarray(highest)[bad]
            raise ValueError(f"bound: expected at least every reward, found up to {most} for prompts {bad}")
    return found


def _exponential(params: Params, score: Array) -> Array:
    """log of the acceptance probability [B,n] of rewards [B,n]."""
    return (score - params["bound"][:, None]) / params["beta"][:, None]


def _above(params: Params, score: Array) -> Array:
    """As `_exponential`, of a threshold: certain from it on, never below. NaN is accepted, so that it shows."""
    return jnp.where(score < params["threshold"][:, None], -jnp.inf, 0).astype(score.dtype)


def first_above(
    policy: Policy,
    reward: Reward,
    params: Params,
    rng: Array,
    prompts: Prompts,
    *,
    tries: int,
    max_new_tokens: int,
    eos_ids: tuple[int, ...],
    temperature: ArrayLike = 1.0,
    chunk: int = 8,
) -> Rejection:
    """The first draw y ~ pi whose reward reaches a threshold: pi(y | r(y) >= threshold) exactly, for rows that were
    accepted; best-of-n that stops when it is good enough.

    params {"policy", "reward", "threshold": scalar or [B]}. A row without an accepted draw after `tries` is marked, and
    its response is the best of its draws (the first among equals). accept_rate is the share of the first chunk's draws
    that reach the threshold, an unbiased estimate of p = Pr(r >= threshold); 1/p is the expected number of tries and
    −log p the KL to the policy. The other arguments as `rejection`.

    ValueError: tries < 1, a threshold that is NaN, and those of `best_of_n`.
    """
    if tries < 1 or chunk < 1:
        raise ValueError(f"tries: expected at least 1 try and a chunk of at least 1, found {tries} and {chunk}")
    threshold = entry(params, "threshold")
    if is_concrete(threshold) and np.isnan(np.asarray(threshold)).any():
        raise ValueError(f"threshold: expected numbers, found {np.asarray(threshold)}")
    asked = open_request(
        policy, reward, params, prompts, max_new_tokens, eos_ids, temperature, per_prompt=("threshold",)
    )
    found, _ = _rejection(
        asked.policy,
        reward,
        asked.params,
        rng,
        asked.prompts,
        tries,
        max_new_tokens,
        asked.eos_ids,
        min(chunk, tries),
        _above,
        True,
    )
    check_scores(found.reward[:, None])
    return found


@functools.partial(jax.jit, static_argnums=(0, 1, 5, 6, 7, 8, 9, 10))
def _rejection(
    policy: Policy,
    reward: Reward,
    params: Params,
    rng: Array,
    prompts: Prompts,
    tries: int,
    max_new_tokens: int,
    eos_ids: tuple[int, ...],
    chunk: int,
    acceptance: Callable[[Params, Array], Array],
    fall_back: bool,
) -> tuple[Rejection, Array]:
    """acceptance(params, rewards [B,n]) -> log-probabilities. fall_back: a row that accepts none keeps the best of its
    draws, not the last."""
    start, draws, coins = jax.random.split(rng, 3)
    index = prompt_index(prompts)
    batch = index.shape[0]
    state, output = policy.init(params["policy"], start, prompts["policy"], max_new_tokens)
    state, output = repeat_rows((state, output), chunk)
    judged = repeat_rows(prompts["reward"], chunk)

    def draw(number: Array, done: Array) -> Any:
        """Draws `number` [chunk] of every prompt that is not done: completions, rewards, log acceptance [B,chunk]."""
        _, _, drawn = rollout.rollout(
            policy,
            params["policy"],
            draws,
            state,
            output,
            steps=max_new_tokens,
            eos_ids=eos_ids,
            finished=jnp.repeat(done, chunk),
            rows=streams(index, number),
            last_step=False,
        )
        score = score_completions(reward, params["reward"], judged, drawn).reshape(batch, chunk)
        log_accept = acceptance(params, score)
        return jax.tree.map(lambda x: x.reshape((batch, chunk, *x.shape[1:])), drawn), score, log_accept

    def coin(number: Array) -> Array:
        keys = jax.vmap(lambda i: jax.vmap(lambda j: jax.random.fold_in(jax.random.fold_in(coins, i), j))(number))
        return jax.vmap(jax.vmap(jax.random.uniform))(keys(index))

    def round_(carry: Any) -> Any:
        begin, found, highest = carry
        number = begin + jnp.arange(chunk, dtype=jnp.int32)
        drawn, score, log_accept = draw(number, found.accepted)
        allowed = number < tries
        # NaN is accepted, so that it shows.
        accept = ~(jnp.log(coin(number)) >= log_accept) & allowed
        hit = accept.any(axis=1)
        last = jnp.minimum(tries - begin, chunk) - 1
        spent = jnp.where(hit, jnp.argmax(accept, axis=1), last)
        pick = spent
        if fall_back:
            pick = jnp.where(hit, spent, jnp.argmax(jnp.where(allowed, score, -jnp.inf), axis=1))
        chosen = jax.tree.map(lambda x: x[jnp.arange(batch), pick], drawn)
        # Of a fixed number of draws: a mean up to the accepted one would depend on where it stopped.
        rate = jnp.where(begin == 0, jnp.exp(jnp.minimum(log_accept, 0)).mean(axis=1), found.accept_rate)
        new = Rejection(chosen, hit, found.tries + spent + 1, score[jnp.arange(batch), pick], rate)
        if fall_back:
            worse = ~hit & (begin > 0) & (new.reward <= found.reward)
            new = where_rows(worse, found._replace(tries=new.tries), new)
        merged = where_rows(found.accepted, found, new)
        top = jnp.where(allowed, score, -jnp.inf).max(axis=1)
        return begin + chunk, merged, jnp.where(found.accepted, highest, jnp.maximum(highest, top))

    shapes = jax.eval_shape(lambda: draw(jnp.arange(chunk, dtype=jnp.int32), jnp.zeros(batch, bool)))
    empty = jax.tree.map(lambda s: jnp.zeros((batch, *s.shape[2:]), s.dtype), shapes[0])
    score_type = shapes[1].dtype
    first = Rejection(
        empty,
        jnp.zeros(batch, bool),
        jnp.zeros(batch, jnp.int32),
        jnp.zeros(batch, score_type),
        jnp.zeros(batch, shapes[2].dtype),
    )
    carry = (jnp.zeros((), jnp.int32), first, jnp.full(batch, -jnp.inf, score_type))
    _, found, highest = jax.lax.while_loop(lambda c: (c[0] < tries) & ~c[1].accepted.all(), round_, carry)
    return found, highest
