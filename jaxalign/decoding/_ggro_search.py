"""The loop of GGRO: candidates of a segment, the best of which is accepted, in all rows at once."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxalign._arrays import is_supported, largest, where_rows, write
from jaxalign._parts import start_policy
from jaxalign.decoding import _segments
from jaxalign.decoding._ggro_scores import scorer_of
from jaxalign.decoding.stopping import SegmentRule
from jaxalign.prompts import prompt_index
from jaxalign.rewards.token_scores import TokenScore
from jaxalign.rollout import token_value
from jaxalign.types import Array, Completions, Params, Policy, Prompts, Reward, State


class GGROInfo(NamedTuple):
    """The segments of each response and what they took. A batch scores its candidates in rounds, each of at least half
    of the rows that are not done; the others write on."""

    reward: Array
    """[B] of each response."""
    segment: Array
    """[B,T]: the number of the segment of each token, −1 after the end."""
    forced: Array
    """[B,T] bool: a token that the gradient proposed and the policy would not have taken."""
    segments: Array
    """[B]: how many."""
    greedy_reward: Array
    """[B,M] of each segment with its greedy candidate (0 beyond the last)."""
    kept_reward: Array
    """[B,M] of each segment with the candidate that was kept (0 beyond the last)."""
    policy_steps: Array
    """[B], of all candidates."""
    reward_passes: Array
    """[B]: candidates scored."""
    gradient_passes: Array
    """[B]: gradients taken."""


class Plan(NamedTuple):
    """What is static of a request."""

    steps: int
    """T."""
    eos_ids: tuple[int, ...]
    """The ids that end a response."""
    top_k: int
    """Tokens that may be forced."""
    rule: str
    """How a token is proposed."""
    min_segment: int
    """Tokens that a segment has at least."""
    segment_rule: SegmentRule
    """Where a segment ends."""


class _State(NamedTuple):
    """Where each row is, all [B,...]."""

    round: Array
    """[]: number of the attempt."""
    text: _segments.Text
    """What is accepted, before the segment that is searched."""
    scorer: State
    """The scorer's state there."""
    candidate: _segments.Text
    """The candidate that is being written."""
    token: Array
    """Its next token to feed; −1: it was scored."""
    best: _segments.Text
    """The best candidate so far."""
    proposal: State
    """The scorer's proposal of it."""
    score: Array
    """Its reward."""
    greedy_reward: Array
    """The greedy candidate's reward."""
    best_number: Array
    """The best candidate's number."""
    made: Array
    """Candidates so far."""
    pick: Array
    """The next candidate's first token, an index of the top_k."""
    tried: Array
    """[B,k]: first tokens that were tried."""
    nan: Array
    """Whether a NaN was seen."""
    info: GGROInfo
    """Of what is accepted."""


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 6))
def search(
    policy: Policy,
    reward: Reward | None,
    gradient: TokenScore,
    params: Params,
    rng: Array,
    prompts: Prompts,
    plan: Plan,
) -> tuple[Completions, GGROInfo, Array]:
    """(responses, info, whether a NaN was seen [B]). params: those of `ggro` and num_samples [], entropy_threshold
    and temperature [B]."""
    start, moves, proposals = jax.random.split(rng, 3)
    index = prompt_index(prompts)
    batch, steps = index.shape[0], plan.steps
    columns, zero = jnp.arange(steps), jnp.zeros(batch, jnp.int32)
    most = -(-steps // plan.min_segment)  # segments
    scorer = scorer_of(reward, gradient)
    rules = _segments.Rules(plan.segment_rule, params["entropy_threshold"], plan.min_segment, plan.eos_ids)

    def read(text: _segments.Text, candidate: _segments.Text) -> tuple[Array, Array]:
        """The last segment of a candidate, which begins where `text` ends: (tokens [B,T], mask [B,T])."""
        slots = jnp.minimum(text.length[:, None] + columns, steps - 1)
        length = candidate.length - text.length
        return jnp.take_along_axis(candidate.tokens, slots, axis=1), columns < length[:, None]

    def propose(scores: Array, allowed: Array, current: Array, made: Array, number: Array) -> Array:
        """The index [B] that the scores [B,k] propose where `current` [B] stands; number [B] of the segment."""
        order = jnp.arange(scores.shape[1])
        stands = order == current[:, None]
        now = jnp.where(stands, scores, 0).sum(axis=1, keepdims=True)
        value = scores - now if plan.rule == "difference" else jnp.where(stands, 0, scores)

        def gumbel(*streams: Array) -> Array:
            return jax.random.gumbel(functools.reduce(jax.random.fold_in, streams, proposals), order.shape, value.dtype)

        warm = (params["temperature"] > 0)[:, None]
        tempered = value / jnp.where(warm, params["temperature"][:, None], 1) + jax.vmap(gumbel)(index, number, made)
        value = jnp.where(allowed, jnp.where(warm, tempered, value), -jnp.inf)
        return jnp.argmax(value, axis=1).astype(jnp.int32)

    def attempt(carry: _State) -> _State:
        """Writes until half of the rows have a candidate, and scores those; rows whose search is over accept their
        best."""
        text, info, going = carry.text, carry.info, ~carry.text.done
        top, choices = largest(text.output.log_prob, carry.tried.shape[1])
        allowed, picked = is_supported(top), jnp.arange(top.shape[1]) == carry.pick[:, None]
        fresh = carry.token < 0
        begun, token = rules.write(text, text.length, token_value(choices, carry.pick), going & fresh)
        candidate, token = _segments.proceed(
            policy,
            params["policy"],
            jax.random.fold_in(moves, carry.round),
            where_rows(fresh, begun, carry.candidate),
            text.length,
            jnp.where(fresh, token, carry.token),
            rules,
            unfinished=going.sum() // 2,
        )
        ready = going & (token < 0)
        made = carry.made + ready
        more = ready & (made < params["num_samples"])
        segment, real = read(text, candidate)
        real = real & ready[:, None]
        value, scores, proposal = scorer.score(params, carry.scorer, segment, real, choices, more.any())
        lost = jnp.isnan(value) | jnp.isnan(jnp.where(allowed, scores, 0)).any(axis=1)
        first = carry.made == 0
        better = ready & (first | (value > carry.score))
        best, proposal = where_rows(better, (candidate, proposal), (carry.best, carry.proposal))
        score = jnp.where(better, value, carry.score)
        greedy_reward = jnp.where(ready & first, value, carry.greedy_reward)
        best_number = jnp.where(better, carry.made, carry.best_number)
        tried = carry.tried | (picked & ready[:, None])
        pick = jnp.where(ready, propose(scores, allowed, carry.pick, made, info.segments), carry.pick)
        over = ready & (~more | jnp.take_along_axis(tried, pick[:, None], axis=1)[:, 0])
        at = jnp.where(over, info.segments, most)
        inside = over[:, None] & (columns >= text.length[:, None]) & (columns < best.length[:, None])
        begins = inside & (columns == text.length[:, None])
        info = GGROInfo(
            reward=jnp.where(over, score, info.reward),
            segment=jnp.where(inside, info.segments[:, None], info.segment),
            forced=info.forced | (begins & (best_number > 0)[:, None]),
            segments=info.segments + over,
            greedy_reward=write(info.greedy_reward, at, greedy_reward),
            kept_reward=write(info.kept_reward, at, score),
            policy_steps=info.policy_steps + jnp.where(ready, _segments.fed(text, candidate), 0),
            reward_passes=info.reward_passes + ready,
            gradient_passes=info.gradient_passes + more,
        )
        return _State(
            round=carry.round + 1,
            text=where_rows(over, best, text),
            scorer=scorer.commit(params, carry.scorer, proposal, jnp.where(over, 0, -1)),
            candidate=candidate,
            token=token,
            best=best,
            proposal=proposal,
            score=score,
            greedy_reward=greedy_reward,
            best_number=best_number,
            made=jnp.where(over, 0, made),
            pick=jnp.where(over, 0, pick),  # first the greedy candidate: the most probable token
            tried=tried & ~over[:, None],
            nan=carry.nan | (ready & lost),
            info=info,
        )

    state, output = start_policy(policy, params["policy"], start, prompts["policy"], steps)
    text = _segments.empty(state, output, steps)
    k, no = min(plan.top_k, output.log_prob.shape[-1]), jnp.zeros(batch, bool)
    choice = jnp.zeros((batch, k), jnp.int32)
    scored = scorer.init(params, prompts["reward"], steps)
    shapes = jax.eval_shape(scorer.score, params, scored, *read(text, text), choice, jnp.asarray(True))
    nothing, _, proposal = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    info = GGROInfo(
        reward=nothing,
        segment=jnp.full((batch, steps), -1, jnp.int32),
        forced=jnp.zeros((batch, steps), bool),
        segments=zero,
        greedy_reward=jnp.zeros((batch, most), nothing.dtype),
        kept_reward=jnp.zeros((batch, most), nothing.dtype),
        policy_steps=zero,
        reward_passes=zero,
        gradient_passes=zero,
    )
    begin = _State(
        round=jnp.zeros((), jnp.int32),
        text=text,
        scorer=scored,
        candidate=text,
        token=zero - 1,
        best=text,
        proposal=proposal,
        score=nothing,
        greedy_reward=nothing,
        best_number=zero,
        made=zero,
        pick=zero,
        tried=jnp.zeros((batch, k), bool),
        nan=no,
        info=info,
    )
    # Rows are never in step: each is at its own token of its own candidate, and none waits for another's search.
    found = jax.lax.while_loop(lambda carry: ~carry.text.done.all(), attempt, begin)
    text = found.text
    mask, ref = columns < text.length[:, None], text.log_prob_ref
    # A point mass at each token: log 1, and its KL to the base.
    completions = Completions(
        text.tokens, mask, jnp.zeros_like(ref), ref, text.log_norm, -ref, text.finished, ~text.finished
    )
    return completions, found.info, found.nan
