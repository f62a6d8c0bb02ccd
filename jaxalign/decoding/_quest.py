"""QUEST: a Metropolis–Hastings chain over whole responses whose stationary law is the response-level optimum."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxalign import rollout
from jaxalign._arrays import where_rows
from jaxalign.decoding._best_of_n import check_scores, open_request, score_completions
from jaxalign.prompts import prompt_index
from jaxalign.types import Array, ArrayLike, Completions, Params, Policy, Prompts, Reward, State, StepOutput


class Chain(NamedTuple):
    """last: Completions [B,T], the state after the last move; reward [B,M+1] of the states, the first response's in
    front; accepted [B,M] bool; accept_rate [B], its mean; states: Completions [B,M+1,T], or None unless kept."""

    last: Completions
    reward: Array
    accepted: Array
    accept_rate: Array
    states: Completions | None


def quest(
    policy: Policy,
    reward: Reward,
    params: Params,
    rng: Array,
    prompts: Prompts,
    *,
    moves: int,
    max_new_tokens: int,
    eos_ids: tuple[int, ...],
    temperature: ArrayLike = 1.0,
    keep_states: bool = False,
) -> Chain:
    """M moves of QUEST from a response of the policy (QAlign, arXiv 2504.03790; QUEST, arXiv 2406.00049). A move cuts
    y at a place i drawn uniformly from its |y| tokens, EOS included, draws the rest anew from the policy, and goes to
    y' with probability

        min(1, exp((r(y') − r(y))/beta)·|y|/|y'|),

    else stays. The stationary law is pi(y)·exp(r(y)/beta)/Z, pi the policy at this temperature: no bound of the reward
    and no value is needed, and the last state tends to it as M grows. The states of one chain depend on each other.

    A move costs |y'| steps of the policy for the longest row (a Policy cannot go back, so the kept tokens are stepped
    again, from the prompt's state, which is encoded once) and one reward of each whole response. Memory: two sets of B
    states.

    Args:
      params: {"policy", "reward", "beta": scalar or [B] > 0}.
      rng: consumed. A prompt's chain depends on rng and its index alone, and its first m moves are those of a chain of
        m. A policy that draws does so with one key per position, the same in every move: it is one fixed policy.
      moves: M >= 0; 0 is a draw from the policy.
      keep_states: also gives every state.

    ValueError: moves < 0, beta <= 0, a reward that is NaN (a response of −inf is left at once, and never gone to from
    one that is not), and those of `best_of_n`.
    """
    if moves < 0:
        raise ValueError(f"moves: expected at least 0, found {moves}")
    asked = open_request(policy, reward, params, prompts, max_new_tokens, eos_ids, temperature, per_prompt=("beta",))
    chain = _quest(
        asked.policy, reward, asked.params, rng, asked.prompts, moves, max_new_tokens, asked.eos_ids, keep_states
    )
    check_scores(chain.reward)
    return chain


def log_accept(reward: Array, proposed: Array, length: Array, proposed_length: Array, *, beta: ArrayLike) -> Array:
    """log of exp((r' − r)/beta)·|y|/|y'|, elementwise: the ratio of QAlign, whose minimum with 1 is the probability of
    going from y to y'. The lengths are there because i is one of |y| places on the way out, and one of |y'| on the way
    back. A state of reward −inf is always left."""
    gain = jnp.where(reward == -jnp.inf, jnp.inf, proposed - jnp.where(reward == -jnp.inf, 0, reward)) / beta
    return gain + jnp.log(length) - jnp.log(proposed_length)


class _Carry(NamedTuple):
    t: Array
    state: State
    output: StepOutput
    finished: Array
    records: dict[str, Array]  # each [T,B]


@functools.partial(jax.jit, static_argnums=(0, 1, 5, 6, 7, 8))
def _quest(
    policy: Policy,
    reward: Reward,
    params: Params,
    rng: Array,
    prompts: Prompts,
    moves: int,
    steps: int,
    eos_ids: tuple[int, ...],
    keep_states: bool,
) -> Chain:
    start, cuts, coins, draws, inside = jax.random.split(rng, 5)
    index = prompt_index(prompts)
    batch = index.shape[0]
    state, output = policy.init(params["policy"], start, prompts["policy"], steps)

    def uniform(key: Array, move: Array) -> Array:
        """One number per prompt, of its own stream."""
        key = jax.random.fold_in(key, move)
        return jax.vmap(lambda i: jax.random.uniform(jax.random.fold_in(key, i)))(index)

    def regrow(key: Array, tokens: Array, kept: Array) -> Completions:
        """The first `kept` [B] tokens of tokens [B,T], and the rest drawn anew."""

        def choose(carry: _Carry) -> tuple[_Carry, Array]:
            drawn = rollout.draw_rows(carry.output.log_prob, jax.random.fold_in(key, carry.t), index[:, None])
            token = jnp.where(carry.t < kept, tokens[:, carry.t], drawn)
            new = rollout.record(carry.output, token, ~carry.finished)
            records = {
                name: value.at[carry.t].set(new[name].astype(value.dtype)) for name, value in carry.records.items()
            }
            finished = carry.finished | rollout.is_eos(token, eos_ids)
            return carry._replace(t=carry.t + 1, finished=finished, records=records), token

        def body(carry: _Carry) -> _Carry:
            own = jax.random.fold_in(inside, carry.t)
            carry, token = choose(carry)
            new = policy.step(params["policy"], own, carry.state, jnp.where(carry.finished, -1, token))
            return carry._replace(state=new[0], output=new[1])

        records = rollout.no_records((steps, batch), output.log_prob.dtype)
        carry = _Carry(jnp.zeros((), jnp.int32), state, output, jnp.zeros(batch, bool), records)
        carry = jax.lax.while_loop(lambda c: (c.t < steps - 1) & ~c.finished.all(), body, carry)
        carry, _ = choose(carry)
        fields = {name: value.T for name, value in carry.records.items()}
        return Completions(**fields, finished=carry.finished, truncated=~carry.finished)

    def move(carry: tuple[Completions, Array], number: Array) -> tuple[Any, Any]:
        current, paid = carry
        length = current.mask.sum(axis=1)
        kept = jnp.minimum((uniform(cuts, number) * length).astype(jnp.int32), length - 1)
        proposed = regrow(jax.random.fold_in(draws, number), current.tokens, kept)
        score = score_completions(reward, params["reward"], prompts["reward"], proposed)
        ratio = log_accept(paid, score, length, proposed.mask.sum(axis=1), beta=params["beta"])
        # Move 0 is the first response, of which nothing is kept. NaN is gone to, so that it shows.
        accept = ~(jnp.log(uniform(coins, number)) >= ratio) | (number == 0)
        current, paid = where_rows(accept, (proposed, score), (current, paid))
        return (current, paid), (paid, accept, current if keep_states else None)

    empty = rollout.no_records((batch, steps), output.log_prob.dtype)
    none = Completions(**empty, finished=jnp.zeros(batch, bool), truncated=jnp.ones(batch, bool))
    paid_type = jax.eval_shape(lambda: score_completions(reward, params["reward"], prompts["reward"], none)).dtype
    first = (none, jnp.zeros(batch, paid_type))
    (last, _), (paid, accept, states) = jax.lax.scan(move, first, jnp.arange(moves + 1))
    accepted = accept[1:].T
    rate = accepted.sum(axis=1) / max(moves, 1)
    states = jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1), states)
    return Chain(last, paid.T, accepted, rate, states)
