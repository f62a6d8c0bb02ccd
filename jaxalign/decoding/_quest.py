"""QUEST: a Metropolis–Hastings chain over whole responses whose stationary law is the response-level optimum."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from jaxalign import rollout
from jaxalign._arrays import where_rows
from jaxalign._parts import start_policy
from jaxalign._programs import tells_programs
from jaxalign.decoding import _kl
from jaxalign.decoding.requests import (
    Decode,
    EosIds,
    Tokenizer,
    check_scores,
    count,
    open_request,
    score_completions,
    uniform_per_prompt,
)
from jaxalign.prompts import prompt_index
from jaxalign.types import Array, ArrayLike, Completions, Decoded, Params, Policy, Prompts, Reward, TextReward


class QuestParams(NamedTuple):
    """Parameters of `quest`; a dict of the same names is accepted."""

    policy: Params
    """The policy's."""
    reward: Params
    """The reward's."""
    beta: ArrayLike
    """The KL weight [reward], a scalar or [B], > 0."""


class QuestInfo(NamedTuple):
    """What happened along each chain."""

    reward: Array
    """[B,M+1] of the states, that of the first response in front."""
    accepted: Array
    """[B,M] bool: whether each move was made."""
    accept_rate: Array
    """[B], the mean of accepted."""
    states: Completions | None
    """[B,M+1,T], the states; None unless kept."""


class CutDraw(Protocol):
    """Tokens [B] that are kept, in [0, length), of responses of length [B] >= 1; uniform [B] in [0,1)."""

    def __call__(self, uniform: Array, length: Array) -> Array: ...


class CutLogProb(Protocol):
    """The log-probability [B] of keeping `kept` [B] tokens of responses of length [B]."""

    def __call__(self, kept: Array, length: Array) -> Array: ...


class Cut(NamedTuple):
    """Where a move of QUEST cuts a response: the proposal's first half. The probability of a cut enters the acceptance,
    so that the stationary law does not depend on it, as long as every cut has some."""

    draw: CutDraw
    """draw(uniform [B], length [B]) -> tokens kept [B]."""
    log_prob: CutLogProb
    """log_prob(kept [B], length [B]) -> [B]."""


def _uniform_draw(uniform: Array, length: Array) -> Array:
    return jnp.minimum((uniform * length).astype(jnp.int32), length - 1)


def _uniform_log_prob(kept: Array, length: Array) -> Array:
    del kept
    return -jnp.log(length)


uniform_cut = Cut(_uniform_draw, _uniform_log_prob)
"""The cut of QUEST: every place of the response is as likely."""


@tells_programs
def quest(
    policy: Policy,
    reward: Reward | TextReward,
    params: Params,
    rng: Array,
    prompts: Prompts,
    *,
    num_steps: int,
    max_new_tokens: int,
    eos_ids: EosIds = None,
    temperature: ArrayLike = 1.0,
    cut: Cut = uniform_cut,
    keep_states: bool = False,
    tokenizer: Tokenizer | Decode | None = None,
) -> Decoded[QuestInfo]:
    """Makes M moves of QUEST from a response of the policy (QAlign, arXiv 2504.03790; QUEST, arXiv 2406.00049). A move
    cuts y at a place i drawn uniformly from its |y| tokens, EOS included, draws the rest anew from the policy, and goes
    to y' with probability

        min(1, exp((r(y') − r(y))/beta)·|y|/|y'|),

    else stays. The stationary law is pi(y)·exp(r(y)/beta)/Z, pi the policy at this temperature: no bound of the reward
    and no value is needed, and the last state tends to it as M grows. The states of one chain depend on each other.

    A move costs |y'| steps of the policy for the longest row (a Policy cannot go back, so the kept tokens are stepped
    again, from the prompt's state, which is encoded once) and one reward of each whole response. Memory: two sets of B
    states.

    Args:
      params: QuestParams, or {"policy", "reward", "beta"}.
      rng: consumed. A prompt's chain depends on rng and its index alone at one batch size and width (`in_chunks` holds
        it at every other), and its first m moves are those of a chain of m. A policy that draws does so with one key
        per position, the same in every move: it is one fixed policy.
      num_steps: M >= 0, moves; 0 is a draw from the policy.
      cut: where moves cut, `uniform_cut` or a law of your own; built once.
      keep_states: whether to give every state.
      policy, reward, prompts, max_new_tokens, eos_ids, temperature, tokenizer: as `best_of_n`.

    Returns:
      Decoded: the states after the last move [B,T], QuestInfo, and a KL of kind "unknown": the law after finitely many
      moves is not known.

    Raises:
      ValueError: num_steps < 0, beta <= 0, a reward that is NaN (a response of −inf is left at once, and never moved to
        from one that is not), and those of `best_of_n`.
    """
    num_steps = count("num_steps", num_steps, least=0)
    if not isinstance(cut, Cut):
        raise ValueError(f"cut: expected a Cut, found {type(cut).__name__}")
    request = open_request(
        policy,
        reward,
        params,
        rng,
        prompts,
        max_new_tokens,
        eos_ids,
        temperature,
        per_prompt=("beta",),
        tokenizer=tokenizer,
    )
    last, info = _quest(
        request.policy,
        request.reward,
        request.params,
        rng,
        request.prompts,
        num_steps,
        request.max_new_tokens,
        request.eos_ids,
        bool(keep_states),
        cut,
    )
    check_scores(info.reward)
    return Decoded(last, _kl.unknown(info.accept_rate, tempered=request.tempered), info)


def log_accept(reward: Array, proposed: Array, length: Array, proposed_length: Array, *, beta: ArrayLike) -> Array:
    """log of exp((r' − r)/beta)·|y|/|y'|, elementwise: the ratio of QAlign, whose minimum with 1 is the probability of
    going from y to y'. The lengths are there because i is one of |y| places on the way out, and one of |y'| on the way
    back. A state of reward −inf is always left."""
    zero = jnp.zeros_like(length)
    return _log_ratio(
        reward, proposed, _uniform_log_prob(zero, length), _uniform_log_prob(zero, proposed_length), beta=beta
    )


def _log_ratio(reward: Array, proposed: Array, out: Array, back: Array, *, beta: ArrayLike) -> Array:
    """log of exp((r' − r)/beta)·P(cut back)/P(cut out), out and back the log-probabilities of the cut."""
    gain = jnp.where(reward == -jnp.inf, jnp.inf, proposed - jnp.where(reward == -jnp.inf, 0, reward)) / beta
    return gain - out + back


@functools.partial(jax.jit, static_argnums=(0, 1, 5, 6, 7, 8, 9))
def _quest(
    policy: Policy,
    reward: Reward,
    params: Params,
    rng: Array,
    prompts: Prompts,
    num_steps: int,
    max_new_tokens: int,
    eos_ids: tuple[int, ...],
    keep_states: bool,
    cut: Cut,
) -> tuple[Completions, QuestInfo]:
    start, cuts, coins, draws, inside = jax.random.split(rng, 5)
    index = prompt_index(prompts)
    batch = index.shape[0]
    state, output = start_policy(policy, params["policy"], start, prompts["policy"], max_new_tokens)

    def regrow(key: Array, tokens: Array, kept: Array) -> Completions:
        """The first `kept` [B] tokens of tokens [B,T], and the rest drawn anew."""

        def keep(t: Array, drawn: Array) -> Array:
            return jnp.where(t < kept, tokens[:, t], drawn)

        return rollout.rollout(
            policy,
            params["policy"],
            key,
            state,
            output,
            steps=max_new_tokens,
            eos_ids=eos_ids,
            rows=index[:, None],
            last_step=False,
            step_rng=inside,
            hooks=rollout.Hooks(choose_token=keep),
        ).completions

    def score(completions: Completions) -> Array:
        return score_completions(reward, params["reward"], prompts["reward"], completions)

    def move(carry: tuple[Completions, Array], number: Array) -> tuple[Any, Any]:
        current, current_reward = carry
        length = current.mask.sum(axis=1)
        kept = cut.draw(uniform_per_prompt(cuts, number, index), length)
        proposed = regrow(jax.random.fold_in(draws, number), current.tokens, kept)
        proposed_reward = score(proposed)
        out, back = cut.log_prob(kept, length), cut.log_prob(kept, proposed.mask.sum(axis=1))
        ratio = _log_ratio(current_reward, proposed_reward, out, back, beta=params["beta"])
        # Move 0 is the first response, of which nothing is kept. NaN is accepted so that it surfaces.
        accept = ~(jnp.log(uniform_per_prompt(coins, number, index)) >= ratio) | (number == 0)
        current, current_reward = where_rows(accept, (proposed, proposed_reward), (current, current_reward))
        return (current, current_reward), (current_reward, accept, current if keep_states else None)

    empty = rollout.no_records((batch, max_new_tokens), output.log_prob.dtype)
    none = Completions(**empty, finished=jnp.zeros(batch, bool), truncated=jnp.ones(batch, bool))
    first = (none, jnp.zeros(batch, jax.eval_shape(score, none).dtype))
    (last, _), (each, accept, states) = jax.lax.scan(move, first, jnp.arange(num_steps + 1))
    accepted = accept[1:].T
    rate = accepted.sum(axis=1) / max(num_steps, 1)
    states = jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1), states)
    return last, QuestInfo(each.T, accepted, rate, states)
