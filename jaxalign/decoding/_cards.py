"""CARDS: rejection sampling of segments, cut where the policy is uncertain, by the reward of the text so far."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign import rollout
from jaxalign._arrays import where_rows
from jaxalign._checks import entry, is_concrete
from jaxalign.decoding._best_of_n import check_scores, open_request, score_completions
from jaxalign.decoding._segments import entropy
from jaxalign.prompts import prompt_index
from jaxalign.types import Array, ArrayLike, Completions, Params, Policy, Prompts, Reward, State, StepOutput


class Cards(NamedTuple):
    """completions: Completions [B,T]; reward [B], of the whole response; segments [B]: kept ones; tries [B]: proposed
    ones, which is as many calls of the reward; capped [B]: segments kept without passing, after the last try; steps
    [B]: tokens drawn, those thrown away included; kl_bound [B]: an estimate of a bound on the KL to the policy [nats],
    whose mean over draws is Σ over segments of −log Pr(a proposal passes), or of log K − (K−1)/K for the best of K."""

    completions: Completions
    reward: Array
    segments: Array
    tries: Array
    capped: Array
    steps: Array
    kl_bound: Array


def cards(
    policy: Policy,
    reward: Reward,
    params: Params,
    rng: Array,
    prompts: Prompts,
    *,
    max_new_tokens: int,
    eos_ids: tuple[int, ...],
    tries: int = 20,
    min_segment: int = 1,
    max_segment: int | None = None,
    temperature: ArrayLike = 1.0,
) -> Cards:
    """Segment by segment from the policy, each proposed until it passes (CARDS, arXiv 2406.16306). A segment ends
    before the first token whose predictive entropy reaches `entropy`, with the response, or at max_segment tokens; with
    the text so far it passes with probability

        min(1, exp((r(x, y_1..y_n) − r*_n)/beta)),   r*_n = start + (threshold − start)·n/T.

    After `tries` proposals the one of highest reward is kept, whatever it is (as the paper's code does). No law is
    claimed: the reward of an unfinished text is no value, and the segments are accepted one at a time. The reward must
    be defined for unfinished text.

    The rows go on by themselves; one round steps every row that is not done through one proposal and takes one reward
    of each. Memory: three sets of B states (at the segment's start, of the proposal, and of the best proposal).

    Args:
      params: {"policy", "reward", "beta": scalar or [B] > 0, "threshold": scalar or [B], "entropy": scalar or [B] >= 0,
        in nats; 0 makes every token a segment, infinity the whole response}, and if wanted {"start": scalar or [B]},
        which lets the goal rise over the response; constant without it. The code's settings: entropy 3, beta 0.7,
        segments of 4 to 64 tokens, start halfway from the prompt's own reward to the threshold, which is 8.5 for its
        reward model.
      rng: consumed. A prompt's response depends on rng and its index alone.
      tries: >= 1, for each segment.
      min_segment, max_segment: tokens; max_segment None for no limit but max_new_tokens.

    ValueError: sizes below 1 or in the wrong order, beta <= 0, entropy < 0, a threshold or start that is not a finite
    number, a reward that is NaN, and those of `best_of_n`.
    """
    if tries < 1:
        raise ValueError(f"tries: expected at least 1, found {tries}")
    longest = max_new_tokens if max_segment is None else max_segment
    if min_segment < 1 or (max_segment is not None and longest < min_segment):
        raise ValueError(
            f"min_segment, max_segment: expected 1 <= min_segment <= max_segment, found {min_segment} and {max_segment}"
        )
    goals = params if "start" in params else params | {"start": entry(params, "threshold")}
    for name in ("threshold", "start"):
        value = entry(goals, name)
        if is_concrete(value) and not np.all(np.isfinite(np.asarray(value))):
            raise ValueError(f"{name}: expected finite numbers, found {np.asarray(value)}")
    level = entry(params, "entropy")
    if is_concrete(level) and not np.all(np.asarray(level) >= 0):
        raise ValueError(f"entropy: expected a value >= 0, found {np.asarray(level)}")
    names = ("beta", "threshold", "entropy", "start")
    asked = open_request(policy, reward, goals, prompts, max_new_tokens, eos_ids, temperature, per_prompt=names)
    sizes = (tries, min_segment, longest)
    found, nan = _cards(asked.policy, reward, asked.params, rng, asked.prompts, max_new_tokens, asked.eos_ids, sizes)
    check_scores(jnp.where(nan, jnp.nan, found.reward)[:, None])
    return found


class _Draft(NamedTuple):
    """A text so far: B rows, each with its own length."""

    state: State
    output: StepOutput
    finished: Array  # [B]: EOS, or the limit
    length: Array  # [B]
    records: dict[str, Array]  # each [B,T]


class _Round(NamedTuple):
    number: Array
    kept: _Draft
    best: _Draft  # of the proposals of this segment
    best_reward: Array
    attempt: Array  # [B], proposals of this segment so far
    reward: Array  # [B], of kept
    statistics: dict[str, Array]
    nan: Array  # [B]


@functools.partial(jax.jit, static_argnums=(0, 1, 5, 6, 7))
def _cards(
    policy: Policy,
    reward: Reward,
    params: Params,
    rng: Array,
    prompts: Prompts,
    limit: int,
    eos_ids: tuple[int, ...],
    sizes: tuple[int, int, int],
) -> tuple[Cards, Array]:
    tries, min_segment, max_segment = sizes
    harmonic = jnp.cumsum(jnp.concatenate([jnp.zeros(1), 1 / jnp.arange(1.0, tries + 1)]))
    start, draws, moves, coins = jax.random.split(rng, 4)
    index = prompt_index(prompts)
    batch = index.shape[0]
    rows = jnp.arange(batch)

    def propose(number: Array, kept: _Draft) -> _Draft:
        """One segment more for every row that is not finished. A row's rounds are numbered alike whatever is beside it:
        all rows take part until they are finished."""
        key, own = jax.random.fold_in(draws, number), jax.random.fold_in(moves, number)

        def body(carry: tuple[Array, _Draft, Array]) -> tuple[Array, _Draft, Array]:
            t, draft, ended = carry
            token = rollout.draw_rows(draft.output.log_prob, jax.random.fold_in(key, t), index[:, None])
            new = rollout.record(draft.output, token, ~ended)
            slot = jnp.where(ended, limit, draft.length)
            records = {
                name: value.at[rows, slot].set(new[name].astype(value.dtype), mode="drop")
                for name, value in draft.records.items()
            }
            length = draft.length + ~ended
            finished = draft.finished | (~ended & (rollout.is_eos(token, eos_ids) | (length >= limit)))
            still = ended | finished
            step = jax.random.fold_in(own, t)
            state, output = policy.step(params["policy"], step, draft.state, jnp.where(still, -1, token))
            # A row that stands still has no output of its own; the next segment begins with the one it had.
            output = where_rows(still, draft.output, output)
            cut = entropy(output.log_prob) >= params["entropy"]
            ended = still | (cut & (t + 1 >= min_segment)) | (t + 1 >= max_segment)
            return t + 1, _Draft(state, output, finished, length, records), ended

        carry = (jnp.zeros((), jnp.int32), kept, kept.finished)
        return jax.lax.while_loop(lambda c: ~c[2].all(), body, carry)[1]

    def score(draft: _Draft) -> Array:
        text = Completions(**draft.records, finished=draft.finished, truncated=~draft.finished)
        return score_completions(reward, params["reward"], prompts["reward"], text)

    def uniform(number: Array) -> Array:
        key = jax.random.fold_in(coins, number)
        return jax.vmap(lambda i: jax.random.uniform(jax.random.fold_in(key, i)))(index)

    def round_(carry: _Round) -> _Round:
        kept, active = carry.kept, ~carry.kept.finished
        draft = propose(carry.number, kept)
        found = score(draft)
        share = draft.length / limit
        goal = params["start"] + (params["threshold"] - params["start"]) * share
        accept = jnp.log(uniform(carry.number)) < (found - goal) / params["beta"]
        attempt = carry.attempt + 1
        better = (carry.attempt == 0) | (found > carry.best_reward)
        best, best_reward = where_rows(better, (draft, found), (carry.best, carry.best_reward))
        forced = ~accept & (attempt >= tries)
        chosen, paid = where_rows(accept, (draft, found), (best, best_reward))
        moved = active & (accept | forced)
        # A segment that passes with probability a has KL <= −log a, and n tries have E[1 + 1/2 + … + 1/(n−1)] = −log a.
        bound = jnp.where(forced, np.log(tries) - (tries - 1) / tries, harmonic[attempt - 1])
        counts = {
            "kl_bound": jnp.where(moved, bound, 0).astype(paid.dtype),
            "segments": moved,
            "tries": active,
            "capped": active & forced,
            "steps": jnp.where(active, draft.length - kept.length, 0),
        }
        return _Round(
            carry.number + 1,
            where_rows(moved, chosen, kept),
            best,
            best_reward,
            jnp.where(moved, 0, attempt),
            jnp.where(moved, paid, carry.reward),
            {name: carry.statistics[name] + value for name, value in counts.items()},
            carry.nan | (active & jnp.isnan(found)),
        )

    state, output = policy.init(params["policy"], start, prompts["policy"], limit)
    none, no = jnp.zeros(batch, jnp.int32), jnp.zeros(batch, bool)
    empty = _Draft(state, output, no, none, rollout.no_records((batch, limit), output.log_prob.dtype))
    paid = jnp.zeros(batch, jax.eval_shape(lambda: score(empty)).dtype)
    statistics: dict[str, Any] = dict.fromkeys(("segments", "tries", "capped", "steps"), none)
    statistics["kl_bound"] = paid
    carry = _Round(jnp.zeros((), jnp.int32), empty, empty, paid, none, paid, statistics, no)
    carry = jax.lax.while_loop(lambda c: ~c.kept.finished.all(), round_, carry)
    ended = (carry.kept.records["mask"] & rollout.is_eos(carry.kept.records["tokens"], eos_ids)).any(axis=1)
    drawn = Completions(**carry.kept.records, finished=ended, truncated=~ended)
    return Cards(drawn, carry.reward, **carry.statistics), carry.nan
