"""Rejection: exact draws from the response-level optimum of a bounded reward, or from the policy above a threshold."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign import rollout
from jaxalign._arrays import repeat_rows, where_rows
from jaxalign._checks import is_concrete
from jaxalign._parts import start_policy
from jaxalign._programs import tells_programs
from jaxalign.decoding import _kl
from jaxalign.decoding.requests import (
    Decode,
    EosIds,
    Request,
    Tokenizer,
    check_scores,
    count,
    open_request,
    score_completions,
    streams,
)
from jaxalign.prompts import prompt_index
from jaxalign.types import Array, ArrayLike, Completions, Decoded, Params, Policy, Prompts, Reward, TextReward


class RejectionParams(NamedTuple):
    """Parameters of `rejection`; a dict of the same names is accepted."""

    policy: Params
    """The policy's."""
    reward: Params
    """The reward's."""
    beta: ArrayLike
    """The KL weight [reward], a scalar or [B], > 0."""
    bound: ArrayLike
    """At least every reward, a scalar or [B]."""


class FirstAboveParams(NamedTuple):
    """Parameters of `first_above`; a dict of the same names is accepted."""

    policy: Params
    """The policy's."""
    reward: Params
    """The reward's."""
    reward_threshold: ArrayLike
    """The reward that a response has to reach, a scalar or [B]."""


class RejectionInfo(NamedTuple):
    """How the draws of each prompt went."""

    accepted: Array
    """[B] bool: whether a draw was accepted within max_tries."""
    tries: Array
    """[B]: draws up to and including the accepted one."""
    reward: Array
    """[B] of the response."""
    accept_rate: Array
    """[B]: mean acceptance probability of the first chunk of draws."""


@tells_programs
def rejection(
    policy: Policy,
    reward: Reward | TextReward,
    params: Params,
    rng: Array,
    prompts: Prompts,
    *,
    max_tries: int,
    max_new_tokens: int,
    eos_ids: EosIds = None,
    temperature: ArrayLike = 1.0,
    chunk: int = 8,
    tokenizer: Tokenizer | Decode | None = None,
) -> Decoded[RejectionInfo]:
    """Draws y ~ pi(y)·exp(r(y)/beta)/Z exactly: responses of the policy, each accepted with probability
    exp((r − bound)/beta).

    With the threshold reward this is the exact sampler of Stackelberg shaping: accepted with probability 1 above the
    threshold and e^(−bound/beta) below. The law holds for rows that were accepted; a row that was not after max_tries
    draws is marked, and its response is its last draw. Expected number of tries: exp(bound/beta)/Z.

    Args:
      params: RejectionParams, or {"policy", "reward", "beta", "bound"}.
      max_tries: >= 1, draws per prompt at most.
      chunk: draws per prompt at a time (B·chunk caches), cut to max_tries. Draw j depends on rng, the prompt's index
        and j alone.
      policy, reward, rng, prompts, max_new_tokens, eos_ids, temperature, tokenizer: as `best_of_n`.

    Returns:
      Decoded: the accepted responses [B,T]; as KL an unbiased estimate of E[r]/beta − log Z, the KL to the policy, NaN
      in rows without an accepted draw; RejectionInfo, whose accept_rate estimates exp(−bound/beta)·Z without bias.

    Raises:
      ValueError: max_tries or chunk < 1, beta <= 0, a bound that is NaN, a reward above the bound (the law would be
        cut there), and those of `best_of_n`.
    """
    names = RejectionParams._fields[2:]
    request = open_request(
        policy,
        reward,
        params,
        rng,
        prompts,
        max_new_tokens,
        eos_ids,
        temperature,
        per_prompt=names,
        tokenizer=tokenizer,
    )
    found, highest = _run(request, rng, max_tries, chunk, _exponential, False)
    bound, beta = request.params["bound"], request.params["beta"]
    if is_concrete(highest, bound, beta):
        # A reward that is its bound up to rounding is not above it, nor is one whose cut changes no probability by more
        # than 1e-5 of itself.
        size = np.maximum(np.abs(np.asarray(bound)), np.abs(np.asarray(highest)))
        slack = float(np.finfo(np.float32).eps) * size + 1e-5 * np.asarray(beta)
        bad = np.flatnonzero(np.asarray(highest) > np.asarray(bound) + slack).tolist()
        if bad:
            most = float(np.asarray(highest)[bad].max())
            named = f"{bad[:8]}{' and others' * (len(bad) > 8)}"
            raise ValueError(f"bound: expected at least every reward, found up to {most:.9g} for prompts {named}")
    return found


def first_above(
    policy: Policy,
    reward: Reward | TextReward,
    params: Params,
    rng: Array,
    prompts: Prompts,
    *,
    max_tries: int,
    max_new_tokens: int,
    eos_ids: EosIds = None,
    temperature: ArrayLike = 1.0,
    chunk: int = 8,
    tokenizer: Tokenizer | Decode | None = None,
) -> Decoded[RejectionInfo]:
    """Gives the first draw y ~ pi whose reward reaches a threshold: pi(y | r(y) >= threshold) exactly, for rows that
    were accepted; a best-of-n that stops when it is good enough.

    A row without an accepted draw after max_tries is marked, and its response is the best of its draws (the first among
    equals).

    Args:
      params: FirstAboveParams, or {"policy", "reward", "reward_threshold"}.
      policy, reward, rng, prompts, max_tries, max_new_tokens, eos_ids, temperature, chunk, tokenizer: as `rejection`.

    Returns:
      Decoded: the responses [B,T]; as KL an unbiased estimate of −log p, the KL to the policy, p = Pr(r >= threshold)
      (in rows without an accepted draw the bound of best-of-max_tries); RejectionInfo, whose accept_rate is the share
      of the first chunk's draws that reach the threshold, an unbiased estimate of p.

    Raises:
      ValueError: max_tries or chunk < 1, a threshold that is NaN, and those of `best_of_n`.
    """
    names = FirstAboveParams._fields[2:]
    request = open_request(
        policy,
        reward,
        params,
        rng,
        prompts,
        max_new_tokens,
        eos_ids,
        temperature,
        per_prompt=names,
        tokenizer=tokenizer,
    )
    return _run(request, rng, max_tries, chunk, _above, True)[0]


def _run(
    request: Request,
    rng: Array,
    max_tries: int,
    chunk: int,
    acceptance: Callable[[Params, Array], Array],
    fall_back: bool,
) -> tuple[Decoded[RejectionInfo], Array]:
    """As `_rejection`. ValueErrors: counts below 1, NaN among the numbers per prompt or the rewards."""
    max_tries, chunk = count("max_tries", max_tries), count("chunk", chunk)
    for name, value in request.params.items():
        if name not in ("policy", "reward") and is_concrete(value) and np.isnan(np.asarray(value)).any():
            raise ValueError(f"{name}: expected numbers, found {np.asarray(value)}")
    found: tuple[Decoded[RejectionInfo], Array] = _rejection(
        request.policy,
        request.reward,
        request.params,
        rng,
        request.prompts,
        max_tries,
        request.max_new_tokens,
        request.eos_ids,
        min(chunk, max_tries),
        acceptance,
        fall_back,
    )
    check_scores(found[0].info.reward[:, None])
    return found


def _exponential(params: Params, score: Array) -> Array:
    """log of the acceptance probability [B,n] of rewards [B,n]."""
    log_accept: Array = (score - params["bound"][:, None]) / params["beta"][:, None]
    return log_accept


def _above(params: Params, score: Array) -> Array:
    """log of the acceptance probability [B,n] of a threshold: 0 from the threshold on, −inf below. NaN is accepted so
    that it surfaces."""
    return jnp.where(score < params["reward_threshold"][:, None], -jnp.inf, 0).astype(score.dtype)


class _Carry(NamedTuple):
    begin: Array  # the number of the chunk's first draw
    completions: Completions
    found: RejectionInfo
    highest: Array  # [B], reward so far


@functools.partial(jax.jit, static_argnums=(0, 1, 5, 6, 7, 8, 9, 10))
def _rejection(
    policy: Policy,
    reward: Reward,
    params: Params,
    rng: Array,
    prompts: Prompts,
    max_tries: int,
    max_new_tokens: int,
    eos_ids: tuple[int, ...],
    chunk: int,
    acceptance: Callable[[Params, Array], Array],
    fall_back: bool,
) -> tuple[Decoded[RejectionInfo], Array]:
    """(what was decoded, the highest reward [B]). acceptance(params, rewards [B,n]) -> log-probabilities; fall_back: a
    row that accepts none keeps the best of its draws, not the last, and the acceptance is a threshold's."""
    start, draws, coins = jax.random.split(rng, 3)
    index = prompt_index(prompts)
    batch = index.shape[0]
    state, output = start_policy(policy, params["policy"], start, prompts["policy"], max_new_tokens)
    state, output = repeat_rows((state, output), chunk)
    scored = repeat_rows(prompts["reward"], chunk)

    def draw(number: Array, done: Array) -> Any:
        """Draws `number` [chunk] of every prompt that is not done: completions, rewards, log acceptance [B,chunk]."""
        drawn = rollout.rollout(
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
        ).completions
        score = score_completions(reward, params["reward"], scored, drawn).reshape(batch, chunk)
        log_accept = acceptance(params, score)
        return jax.tree.map(lambda x: x.reshape((batch, chunk, *x.shape[1:])), drawn), score, log_accept

    def coin(number: Array) -> Array:
        def keys(i: Array) -> Array:
            return jax.vmap(lambda j: jax.random.fold_in(jax.random.fold_in(coins, i), j))(number)

        return jax.vmap(jax.vmap(jax.random.uniform))(jax.vmap(keys)(index))

    def attempt(carry: _Carry) -> _Carry:
        """One chunk of draws for every prompt that has accepted none."""
        found = carry.found
        number = carry.begin + jnp.arange(chunk, dtype=jnp.int32)
        drawn, score, log_accept = draw(number, found.accepted)
        allowed = number < max_tries
        # NaN is accepted so that it surfaces.
        accept = ~(jnp.log(coin(number)) >= log_accept) & allowed
        hit = accept.any(axis=1)
        last = jnp.minimum(max_tries - carry.begin, chunk) - 1
        spent = jnp.where(hit, jnp.argmax(accept, axis=1), last).astype(jnp.int32)
        pick = spent
        if fall_back:
            pick = jnp.where(hit, spent, jnp.argmax(jnp.where(allowed, score, -jnp.inf), axis=1))
        chosen = jax.tree.map(lambda x: x[jnp.arange(batch), pick], drawn)
        # Of a fixed number of draws: a mean up to the accepted one would depend on where it stopped.
        rate = jnp.where(carry.begin == 0, jnp.exp(jnp.minimum(log_accept, 0)).mean(axis=1), found.accept_rate)
        new = RejectionInfo(hit, found.tries + spent + 1, score[jnp.arange(batch), pick], rate)
        both, before = (chosen, new), (carry.completions, found)
        if fall_back:
            worse = ~hit & (carry.begin > 0) & (new.reward <= found.reward)
            both = where_rows(worse, (carry.completions, found._replace(tries=new.tries)), both)
        both = where_rows(found.accepted, before, both)
        top = jnp.where(allowed, score, -jnp.inf).max(axis=1)
        highest = jnp.where(found.accepted, carry.highest, jnp.maximum(carry.highest, top))
        return _Carry(carry.begin + chunk, both[0], both[1], highest)

    shapes = jax.eval_shape(lambda: draw(jnp.arange(chunk, dtype=jnp.int32), jnp.zeros(batch, bool)))
    empty = jax.tree.map(lambda s: jnp.zeros((batch, *s.shape[2:]), s.dtype), shapes[0])
    score_type = shapes[1].dtype
    none = RejectionInfo(
        jnp.zeros(batch, bool),
        jnp.zeros(batch, jnp.int32),
        jnp.zeros(batch, score_type),
        jnp.zeros(batch, shapes[2].dtype),
    )
    carry = _Carry(jnp.zeros((), jnp.int32), empty, none, jnp.full(batch, -jnp.inf, score_type))
    carry = jax.lax.while_loop(lambda c: (c.begin < max_tries) & ~c.found.accepted.all(), attempt, carry)
    found = carry.found
    if fall_back:
        kl = _kl.threshold_estimate(found.accepted, found.tries, max_tries, score_type)
    else:
        excess = acceptance(params, found.reward[:, None])[:, 0]
        kl = _kl.rejection_estimate(excess, found.accepted, found.tries, max_tries)
    return Decoded(carry.completions, kl, found), carry.highest
