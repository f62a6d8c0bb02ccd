"""CARDS: rejection sampling of segments, cut where the policy is uncertain, by the reward of the text so far."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign import rollout
from jaxalign._arrays import where_rows, write
from jaxalign._checks import is_concrete
from jaxalign._parts import start_policy
from jaxalign._programs import tells_programs
from jaxalign.decoding import _kl
from jaxalign.decoding.requests import (
    Decode,
    EosIds,
    Tokenizer,
    check_scores,
    count,
    number,
    open_params,
    open_request,
    optional_reward,
    score_completions,
    uniform_per_prompt,
)
from jaxalign.decoding.stopping import SegmentRule, entropy_reaches
from jaxalign.prompts import prompt_index
from jaxalign.types import (
    Array,
    ArrayLike,
    Completions,
    Decoded,
    Params,
    Policy,
    Prompts,
    Reward,
    State,
    StepOutput,
    TextReward,
)


class CardsParams(NamedTuple):
    """Parameters of `cards`; a dict of the same names is accepted. All but the first two are scalars or [B]."""

    policy: Params
    """The policy's."""
    reward: Params
    """The reward's."""
    beta: ArrayLike
    """Softness of the test [reward], > 0."""
    reward_threshold: ArrayLike
    """The reward that a segment has to reach at the end of the response."""
    entropy_threshold: ArrayLike
    """The predictive entropy [nats] that ends a segment, >= 0; 0 makes every token a segment, infinity the whole
    response."""
    reward_start: ArrayLike | None = None
    """The goal at the prompt, which rises from there to reward_threshold over the response; None: constant."""


class CardsInfo(NamedTuple):
    """The reward of each response, and the segments and tries that it took."""

    reward: Array
    """[B], of the whole response."""
    segments: Array
    """[B], kept ones."""
    tries: Array
    """[B], proposed segments, which is as many calls of the reward."""
    capped: Array
    """[B], segments kept without passing, after the last try."""
    policy_steps: Array
    """[B], tokens drawn, those thrown away included."""


@tells_programs
def cards(
    policy: Policy,
    reward: Reward | TextReward,
    params: Params,
    rng: Array,
    prompts: Prompts,
    *,
    max_new_tokens: int,
    eos_ids: EosIds = None,
    temperature: ArrayLike = 1.0,
    max_tries: int = 20,
    min_segment: int = 1,
    max_segment: int | None = None,
    segment_rule: SegmentRule = entropy_reaches,
    tokenizer: Tokenizer | Decode | None = None,
) -> Decoded[CardsInfo]:
    """Draws a response segment by segment from the policy, each proposed until it passes (CARDS, arXiv 2406.16306). A
    segment ends before the first token whose predictive entropy reaches entropy_threshold, with the response, or at
    max_segment tokens; with the text so far it passes with probability

        min(1, exp((r(x, y_1..y_n) − r*_n)/beta)),   r*_n = start + (threshold − start)·n/T.

    After max_tries proposals the one of highest reward is kept, whatever it is (as the paper's code does). No law is
    claimed: the reward of an unfinished text is no value, and the segments are accepted one at a time. The reward must
    be defined for unfinished text.

    Rows do not wait for each other; one round steps every row that is not done through one proposal and takes one
    reward of each. Memory: three sets of B states (at the segment's start, of the proposal, and of the best proposal).

    Args:
      params: CardsParams, or {"policy", "reward", "beta", "reward_threshold", "entropy_threshold"} and if wanted
        {"reward_start"}. The code's settings: entropy 3, beta 0.7, segments of 4 to 64 tokens, start halfway from the
        prompt's own reward to the threshold, which is 8.5 for its reward model.
      rng: consumed. A prompt's response depends on rng and its index alone at one batch size and width; `in_chunks`
        holds it at every other.
      max_tries: >= 1, for each segment.
      min_segment, max_segment: tokens; max_segment None for no limit but max_new_tokens.
      segment_rule: where a segment ends, a function of `stopping`.
      policy, reward, prompts, max_new_tokens, eos_ids, temperature, tokenizer: as `best_of_n`.

    Returns:
      Decoded: the responses [B,T]; as KL an estimate of a bound on the KL to the policy, whose mean over draws is Σ
      over segments of −log Pr(a proposal passes), or of log K − (K−1)/K for the best of K; CardsInfo.

    Raises:
      ValueError: sizes below 1 or in the wrong order, beta <= 0, entropy_threshold < 0, a reward threshold or start
        that is not a finite number, a reward that is NaN, and those of `best_of_n`.
    """
    max_tries = count("max_tries", max_tries)
    max_new_tokens = count("max_new_tokens", max_new_tokens)
    shortest = count("min_segment", min_segment)
    longest = max_new_tokens if max_segment is None else count("max_segment", max_segment)
    if max_segment is not None and longest < shortest:
        raise ValueError(f"min_segment, max_segment: expected min_segment <= max_segment, found {shortest} > {longest}")
    names = ("beta", "reward_threshold", "entropy_threshold", "reward_start")
    given = open_params(params, ("policy", "reward", *names[:3]), {"reward_start": None, **optional_reward(reward)})
    if given["reward_start"] is None:
        given["reward_start"] = given["reward_threshold"]
    for name in ("reward_threshold", "reward_start"):
        value = number(name, given[name])
        if is_concrete(value) and not np.all(np.isfinite(np.asarray(value))):
            raise ValueError(f"{name}: expected finite numbers, found {np.asarray(value)}")
    level = number("entropy_threshold", given["entropy_threshold"])
    if is_concrete(level) and not np.all(np.asarray(level) >= 0):
        raise ValueError(f"entropy_threshold: expected a value >= 0, found {np.asarray(level)}")
    request = open_request(
        policy,
        reward,
        given,
        rng,
        prompts,
        max_new_tokens,
        eos_ids,
        temperature,
        per_prompt=names,
        tokenizer=tokenizer,
    )
    found: Decoded[CardsInfo]
    found, nan = _cards(
        request.policy,
        request.reward,
        request.params,
        rng,
        request.prompts,
        max_new_tokens,
        request.eos_ids,
        _Sizes(max_tries, shortest, min(longest, max_new_tokens), request.tempered),
        segment_rule,
    )
    check_scores(jnp.where(nan, jnp.nan, found.info.reward)[:, None])
    return found


class _Sizes(NamedTuple):
    max_tries: int
    min_segment: int
    max_segment: int
    tempered: bool


class _Draft(NamedTuple):
    """A text so far: B rows, each with its own length."""

    state: State
    output: StepOutput
    finished: Array  # [B]: EOS, or the limit
    length: Array  # [B]
    records: dict[str, Array]  # each [B,T]


class _Statistics(NamedTuple):
    """Sums over the segments so far, [B]."""

    kl_bound: Array
    segments: Array
    tries: Array
    capped: Array
    policy_steps: Array


class _Round(NamedTuple):
    number: Array
    kept: _Draft
    best: _Draft  # of the proposals of this segment
    best_reward: Array
    attempt: Array  # [B], proposals of this segment so far
    reward: Array  # [B], of kept
    statistics: _Statistics
    nan: Array  # [B]


@functools.partial(jax.jit, static_argnums=(0, 1, 5, 6, 7, 8))
def _cards(
    policy: Policy,
    reward: Reward,
    params: Params,
    rng: Array,
    prompts: Prompts,
    limit: int,
    eos_ids: tuple[int, ...],
    sizes: _Sizes,
    segment_rule: SegmentRule,
) -> tuple[Decoded[CardsInfo], Array]:
    max_tries = sizes.max_tries
    start, draws, moves, coins = jax.random.split(rng, 4)
    index = prompt_index(prompts)
    batch = index.shape[0]
    columns = jnp.arange(sizes.max_segment)

    def ends(t: Array, output: StepOutput) -> Array:
        """Rows whose segment of t + 1 tokens ends here."""
        cut = segment_rule(output, params["entropy_threshold"])
        return (cut & (t + 1 >= sizes.min_segment)) | (t + 1 >= sizes.max_segment)

    def propose(number: Array, kept: _Draft) -> _Draft:
        """One segment more for every row that is not finished. A row's rounds are numbered alike whatever the other
        rows do: all take part until they are finished."""
        rolled = rollout.rollout(
            policy,
            params["policy"],
            jax.random.fold_in(draws, number),
            kept.state,
            kept.output,
            steps=sizes.max_segment,
            eos_ids=eos_ids,
            finished=kept.finished,
            rows=index[:, None],
            limits=limit - kept.length,
            step_rng=jax.random.fold_in(moves, number),
            keep_output=True,
            hooks=rollout.Hooks(after_step=ends),
        )
        drawn = rolled.completions
        slots = jnp.where(drawn.mask, kept.length[:, None] + columns, limit)
        records = {name: write(value, slots, getattr(drawn, name)) for name, value in kept.records.items()}
        length = kept.length + drawn.mask.sum(axis=1)
        return _Draft(rolled.state, rolled.output, drawn.finished | (length >= limit), length, records)

    def score(draft: _Draft) -> Array:
        text = Completions(**draft.records, finished=draft.finished, truncated=~draft.finished)
        return score_completions(reward, params["reward"], prompts["reward"], text)

    def attempt_segment(carry: _Round) -> _Round:
        kept, active = carry.kept, ~carry.kept.finished
        draft = propose(carry.number, kept)
        found = score(draft)
        share = draft.length / limit
        goal = params["reward_start"] + (params["reward_threshold"] - params["reward_start"]) * share
        accept = jnp.log(uniform_per_prompt(coins, carry.number, index)) < (found - goal) / params["beta"]
        attempt = carry.attempt + 1
        better = (carry.attempt == 0) | (found > carry.best_reward)
        best, best_reward = where_rows(better, (draft, found), (carry.best, carry.best_reward))
        forced = ~accept & (attempt >= max_tries)
        chosen, chosen_reward = where_rows(accept, (draft, found), (best, best_reward))
        moved = active & (accept | forced)
        # A segment that passes with probability a has KL <= −log a, which the tries estimate.
        passed = _kl.surprise_of_tries(attempt, max_tries, found.dtype)
        bound = jnp.where(forced, _kl.selection_bound(max_tries), passed)
        counts = _Statistics(
            kl_bound=jnp.where(moved, bound, 0).astype(found.dtype),
            segments=moved,
            tries=active,
            capped=active & forced,
            policy_steps=jnp.where(active, draft.length - kept.length, 0),
        )
        return _Round(
            carry.number + 1,
            where_rows(moved, chosen, kept),
            best,
            best_reward,
            jnp.where(moved, 0, attempt),
            jnp.where(moved, chosen_reward, carry.reward),
            jax.tree.map(lambda total, new: total + new, carry.statistics, counts),
            carry.nan | (active & jnp.isnan(found)),
        )

    state, output = start_policy(policy, params["policy"], start, prompts["policy"], limit)
    none, no = jnp.zeros(batch, jnp.int32), jnp.zeros(batch, bool)
    empty = _Draft(state, output, no, none, rollout.no_records((batch, limit), output.log_prob.dtype))
    nothing = jnp.zeros(batch, jax.eval_shape(score, empty).dtype)
    statistics = _Statistics(nothing, none, none, none, none)
    carry = _Round(jnp.zeros((), jnp.int32), empty, empty, nothing, none, nothing, statistics, no)
    carry = jax.lax.while_loop(lambda c: ~c.kept.finished.all(), attempt_segment, carry)
    ended = (carry.kept.records["mask"] & rollout.is_eos(carry.kept.records["tokens"], eos_ids)).any(axis=1)
    drawn = Completions(**carry.kept.records, finished=ended, truncated=~ended)
    kl_bound, *counts = carry.statistics
    kl = _kl.segments_bound(kl_bound, tempered=sizes.tempered)
    return Decoded(drawn, kl, CardsInfo(carry.reward, *counts)), carry.nan
